"""Settings: each is declared once, with its type, default, range and help.

A frozen dataclass whose fields are made by `setting` is the declaration. Its checks (`check`), its
options on the command line (`add_options`, `chosen`) and its tables in TOML (`from_tables`) follow.
Importing this file loads nothing heavy.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ._checks import interval, nearest_of, number, one_of, whole
from .errors import EmbedcamError, InputError, short

Check = Callable[[str, Any], Any]
"""Returns a value as it is kept, or raises an `InputError` that begins with the name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting's declaration.

    Attributes
    ----------
    kind : type
        `int`, `float`, `bool`, `str` or `tuple` (of names).
    optional : bool
        None is allowed.
    least, most, above, below : float
        Range of a number; `above` and `below` are not allowed themselves.
    choices : tuple of str or callable
        Names it chooses among, or a function that gives them; empty for any text.
    metavar, help : str
        What `--help` shows; without help the command line does not offer the setting.
    flag : str
        The option's name where it is not the field's; of a boolean that is on by default, the
        option that turns it off.
    letter : str
        A short name of the option, such as "-n".
    read : callable
        Turns the command line's text into the value, or raises; None reads by `kind`.
    check : callable
        Takes the place of the check by `kind`.
    repeated : bool
        The option may be given several times; the value is the list of all.
    table, entry : str
        Where the setting stands in TOML; the entry's name where it is not the field's.
    """

    kind: type
    optional: bool = False
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    metavar: str | None = None
    help: str = ""
    flag: str = ""
    letter: str = ""
    read: Callable[[str], Any] | None = None
    check: Check | None = None
    repeated: bool = False
    table: str = ""
    entry: str = ""

    @property
    def known(self) -> tuple[str, ...]:
        """Return the names the setting chooses among."""
        return self.choices() if callable(self.choices) else self.choices

    def checked(self, name: str, value: Any, error: type[EmbedcamError] = InputError) -> Any:
        """Return a value as the setting's kind, or raise `error`."""
        if value is None and self.optional:
            return None
        if self.check is not None:
            try:
                return self.check(name, value)
            except InputError as wrong:
                raise error(str(wrong)) from None
        if self.kind is int:
            most = None if self.most == math.inf else int(self.most)
            return whole(name, value, int(max(self.least, -(1 << 62))), most, error=error)
        if self.kind is float:
            return number(
                name, value, self.least, self.most, above=self.above, below=self.below, error=error
            )
        if self.kind is bool and not isinstance(value, bool):
            raise error(f"{name} = {short(value)}; give true or false")
        if self.kind is tuple:
            return self._checked_names(name, value, error)
        if self.kind is str and not isinstance(value, str):
            raise error(f"{name} = {short(value)}; give a text")
        if self.kind is str and "\0" in value:
            raise error(f"{name} = {short(value)} holds a NUL, which no name can")
        return one_of(name, value, self.known, error=error) if self.choices else value

    def _checked_names(self, name: str, value: Any, error: type[EmbedcamError]) -> tuple[str, ...]:
        names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (0,)
        if not all(isinstance(one, str) and one for one in names):
            raise error(f"{name} = {short(value)}; give a list of names")
        for one in names if self.choices else ():
            one_of(name, one, self.known, error=error)
        return names

    def from_text(self, text: str) -> Any:
        """Return what the command line's text stands for; `check` still checks choices."""
        if self.read is None and self.kind not in (int, float):
            return tuple(filter(None, text.split(","))) if self.kind is tuple else text
        try:
            return self.read(text) if self.read else self.checked("", self.kind(text))
        except (ValueError, OverflowError) as error:
            what = "a whole number" if self.kind is int else "a number"
            limits = interval(self.least, self.most, self.above, self.below)
            wrong = f"{text!r} is not {what} {limits}".rstrip()
            raise argparse.ArgumentTypeError(str(error) if self.read else wrong) from None


def setting(
    default: Any,
    metavar: str | None = None,
    help: str = "",
    *,
    kind: type | None = None,
    **declared: Any,
) -> Any:
    """Declare a field of a dataclass as a setting.

    `default` None makes it optional and wants a `kind`; `declared` are attributes of `Setting`.
    """
    declaration = Setting(
        kind=kind or type(default), optional=default is None, metavar=metavar, help=help, **declared
    )
    return dataclasses.field(default=default, metadata={"setting": declaration})


def settings_of(record: Any) -> dict[str, Setting]:
    """Return the settings that a dataclass, or an instance of one, declares, by name."""
    return {
        field.name: field.metadata["setting"]
        for field in dataclasses.fields(record)
        if "setting" in field.metadata
    }


def check(record: Any, error: type[EmbedcamError] = InputError) -> None:
    """Check every setting of a frozen dataclass and keep it as its kind; for `__post_init__`."""
    for name, declaration in settings_of(record).items():
        value = declaration.checked(name, getattr(record, name), error)
        object.__setattr__(record, name, value)


def add_options(
    group: argparse._ActionsContainer,
    record: type,
    *names: str,
    tables: Container[str] | None = None,
    help: str = "{}",
) -> None:
    """Add the options of a dataclass's settings to a parser or a group of one.

    Those named, or all others of the `tables` (None for any) that the parser does not have yet.
    What is not given stays None, so that the dataclass's defaults, and what a file says, hold;
    `help` may say more around the "{}" of the setting's own.
    """
    declared = settings_of(record)
    for name in names or declared:
        one, default = declared[name], getattr(record, name)
        flag = _flag(name, one)
        there = not names and flag in group._option_string_actions
        if not one.help or there or (tables is not None and one.table not in tables):
            continue
        flags = [one.letter, flag] if one.letter else [flag]
        more: dict[str, Any] = {"default": None, "help": help.format(one.help)}
        if one.kind is bool:
            more["action"] = "store_false" if default else "store_true"
        else:
            more |= {"type": one.from_text, "metavar": one.metavar}
            more["action"] = "append" if one.repeated else "store"
            if one.choices and one.metavar is None:
                more["choices"] = one.known
        group.add_argument(*flags, **more)


def _flag(name: str, declaration: Setting) -> str:
    return "--" + (declaration.flag or name).replace("_", "-")


def chosen(options: argparse.Namespace, record: type) -> dict[str, Any]:
    """Return the settings of a dataclass that the command line was given, by name."""
    flags = {name: one.flag or name for name, one in settings_of(record).items() if one.help}
    named = {name: getattr(options, flag, None) for name, flag in flags.items()}
    return {name: value for name, value in named.items() if value is not None}


def checked_values(record: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a table, each checked as the setting of its name; None is left out."""
    declared, kept = settings_of(record), {}
    for name, value in values.items():
        if name not in declared:
            raise InputError(f"{where} has no entry {name!r}; {nearest_of(name, declared)}")
        if value is not None:
            kept[name] = declared[name].checked(f"{where} {name}", value)
    return kept


def from_tables(
    record: type,
    tables: Mapping[str, Any],
    where: str,
    error: type[EmbedcamError],
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the settings that TOML tables, as `tomllib` reads them, hold, by name.

    Each setting names its `table`; tables called as the `others` are passed over.
    """
    entries: dict[str, dict[str, str]] = {name: {} for name in others}
    for name, declaration in settings_of(record).items():
        entries.setdefault(declaration.table, {})[declaration.entry or name] = name
    values: dict[str, Any] = {}
    for table, content in tables.items():
        if table not in entries:
            raise error(f"{where}: unknown table [{table}]; {nearest_of(table, entries)}")
        if not isinstance(content, Mapping):
            raise error(f"{where}: {table} = {short(content)} should be a table, [{table}]")
        for entry, value in content.items() if table not in others else ():
            if entry not in entries[table]:
                known = nearest_of(entry, entries[table])
                raise error(f"{where}: [{table}] has no entry {entry!r}; {known}")
            values[entries[table][entry]] = value
    return values
