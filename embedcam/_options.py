"""Settings: each is declared once; its checks, its option on the command line and TOML follow.

A class whose attributes are made by `setting`, mostly a frozen dataclass, is the declaration.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from ._checks import interval, nearest_of, number, one_of, whole
from .errors import EmbedcamError, InputError, Plain, short

T = TypeVar("T")
Values: TypeAlias = dict[str, Any]
"""Values of settings by their names, as keyword arguments of what takes them."""
_KINDS = {bool: "true or false", str: "a text", tuple: "a list of names"}


class Setting:
    """One setting's declaration; as a class's attribute it reads as its default."""

    # No dataclass: importing that takes longer than all else that `--help` does.
    kind: type = str  # int, float, bool, str or tuple (of names)
    default: Plain = None
    optional = False  # None is allowed
    # The range of a number; `above` and `below` are not allowed themselves.
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    # Names it chooses among, or a function that gives them; empty for any text.
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    # What `--help` shows; without help the command line does not offer the setting.
    metavar: str | None = None
    help = ""
    # The option's name where it is not the field's (of a boolean that is on by default, the option
    # that turns it off), and a short one such as "-n".
    flag = ""
    letter = ""
    # In place of reading the command line's text by `kind`; and of the check by `kind`: returns the
    # value as it is kept, or raises.
    read: Callable[[str], Plain] | None = None
    check: Callable[[str, Plain], Plain] | None = None
    repeated = False  # the option may be given several times; the value is the list of all
    # Where the setting stands in TOML; the entry's name where it is not the field's.
    table = ""
    entry = ""

    def __init__(self, **declared: Any) -> None:
        if unknown := [name for name in declared if not hasattr(Setting, name)]:
            raise TypeError(f"a setting has no {', '.join(unknown)}")
        vars(self).update(declared)

    def __get__(self, record: object, owner: type) -> Plain:
        return self.default

    @property
    def known(self) -> tuple[str, ...]:
        """Return the names the setting chooses among."""
        return self.choices() if callable(self.choices) else self.choices

    def checked(self, name: str, value: Plain, error: type[EmbedcamError] = InputError) -> Plain:
        """Return a value as the setting's kind, or raise `error`."""
        if value is None and self.optional:
            return None
        if self.check is not None:
            try:
                return self.check(name, value)
            except InputError as wrong:
                raise error(str(wrong)) from None
        if self.kind is int:
            return whole(name, value, self.least, self.most, error=error)
        if self.kind is float:
            ends = {"above": self.above, "below": self.below}
            return number(name, value, self.least, self.most, **ends, error=error)
        if self.kind is tuple and isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)
        names = value if isinstance(value, tuple) else (value,)
        of_texts = self.kind is not tuple or all(isinstance(one, str) and one for one in names)
        if not isinstance(value, self.kind) or not of_texts:
            raise error(f"{name} = {short(value)}; give {_KINDS[self.kind]}")
        if isinstance(value, str) and "\0" in value:
            raise error(f"{name} = {short(value)} holds a NUL, which no name can")
        for one in names if self.choices else ():
            one_of(name, one, self.known, error=error)
        return value

    def from_text(self, text: str) -> Plain:
        """Return what the command line's text stands for; `checked` still checks choices."""
        try:
            if self.read is not None:
                return self.read(text)
            if self.kind in (int, float):
                return self.checked("", self.kind(text))
        except (ValueError, OverflowError) as error:
            what = "a whole number" if self.kind is int else "a number"
            limits = interval(self.least, self.most, self.above, self.below)
            wrong = f"{text!r} is not {what} {limits}".rstrip()
            raise argparse.ArgumentTypeError(str(error) if self.read else wrong) from None
        return tuple(filter(None, text.split(","))) if self.kind is tuple else text


def setting(default: T, metavar: str | None = None, help: str = "", **declared: Any) -> T:
    """Declare an attribute of a class as a setting; default None makes it optional, of a `kind`."""
    what = {"kind": type(default), "optional": default is None, **declared}
    return Setting(default=default, metavar=metavar, help=help, **what)  # type: ignore[return-value]


def settings_of(record: type) -> dict[str, Setting]:
    """Return the settings that a class and those above it declare, by name."""
    places = [vars(one) for one in reversed(record.__mro__)]
    return {n: value for place in places for n, value in place.items() if type(value) is Setting}


def check(record: object, error: type[EmbedcamError] = InputError) -> None:
    """Check every setting of a frozen dataclass and keep it as its kind; for `__post_init__`."""
    for name, declaration in settings_of(type(record)).items():
        value = declaration.checked(name, getattr(record, name), error)
        object.__setattr__(record, name, value)


def add_options(
    group: argparse._ActionsContainer,
    record: type,
    *names: str,
    tables: Container[str] | None = None,
    help: str = "{}",
) -> None:
    """Add options to a parser or a group of one, for the settings of a class.

    Those named, or all others of the `tables` (None for any) that the parser does not have yet.
    What is not given stays None, so that the class's defaults, and what a file says, hold; `help`
    may say more around the "{}" of the setting's own.
    """
    declared = settings_of(record)
    for name in names or declared:
        one = declared[name]
        flag = "--" + (one.flag or name).replace("_", "-")
        there = not names and flag in group._option_string_actions
        if not one.help or there or (tables is not None and one.table not in tables):
            continue
        if one.kind is bool:
            more: Values = {"action": "store_false" if one.default else "store_true"}
        else:
            choices = one.known if one.choices and one.metavar is None else None
            more = {"type": one.from_text, "metavar": one.metavar, "choices": choices}
            more["action"] = "append" if one.repeated else "store"
        flags = filter(None, (one.letter, flag))
        group.add_argument(*flags, default=None, help=help.format(one.help), **more)


def chosen(options: argparse.Namespace, record: type) -> Values:
    """Return the settings of a class that the command line was given, by name."""
    flags = {name: one.flag or name for name, one in settings_of(record).items() if one.help}
    named = {name: getattr(options, flag, None) for name, flag in flags.items()}
    return {name: value for name, value in named.items() if value is not None}


def checked_values(record: type, values: Mapping[str, Plain], where: str) -> Values:
    """Return the values of a table, each checked as the setting of its name; None is left out."""
    declared, kept = settings_of(record), {}
    for name, value in values.items():
        _check_entry(name, declared, where, InputError)
        if value is not None:
            kept[name] = declared[name].checked(f"{where} {name}", value)
    return kept


def from_tables(
    record: type,
    tables: Mapping[str, Plain],
    where: str,
    error: type[EmbedcamError],
    others: Iterable[str] = (),
) -> dict[str, Plain]:
    """Return the settings of TOML tables, by name; tables called as the `others` are passed by."""
    entries: dict[str, dict[str, str]] = {name: {} for name in others}
    for name, declaration in settings_of(record).items():
        entries.setdefault(declaration.table, {})[declaration.entry or name] = name
    values = {}
    for table, content in tables.items():
        if table not in entries:
            raise error(f"{where}: unknown table [{table}]; {nearest_of(table, entries)}")
        if not isinstance(content, Mapping):
            raise error(f"{where}: {table} = {short(content)} should be a table, [{table}]")
        for entry, value in content.items() if table not in others else ():
            _check_entry(entry, entries[table], f"{where}: [{table}]", error)
            values[entries[table][entry]] = value
    return values


def _check_entry(entry: str, known: Iterable[str], where: str, error: type[EmbedcamError]) -> None:
    if entry not in known:
        raise error(f"{where} has no entry {entry!r}; {nearest_of(entry, known)}")
