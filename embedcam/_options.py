"""Settings: each is declared once, with its type, default, range and help.

A frozen dataclass whose fields are made by `setting` is the declaration. Its checks (`check`), its
options on the command line (`add_options`, `chosen`) and its tables in TOML follow from it.
Importing this file loads nothing heavy.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ._checks import nearest_of, number, one_of, whole
from .errors import EmbedcamError, InputError, short

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting's declaration.

    Attributes:
        kind: `int`, `float`, `bool`, `str` or `tuple` (of names).
        optional: whether None is allowed.
        least, most: the range of a number, both ends allowed.
        above, below: ends of the range of a number that are not allowed themselves.
        choices: names it chooses among, or a function that gives them; empty for any text.
        help: a line for `--help`; empty where the command line does not offer the setting.
        flag: the option's name where it is not the field's; of a boolean that is on by default,
            the option that turns it off.
        metavar: what `--help` shows for the value.
        read: what turns the command line's text into the value; None reads by `kind`.
        table, entry: where the setting stands in TOML; the entry's name where it is not the
            field's.
    """

    kind: type
    optional: bool = False
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    help: str = ""
    flag: str = ""
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    table: str = ""
    entry: str = ""

    @property
    def known(self) -> tuple[str, ...]:
        """Return the names the setting chooses among."""
        return self.choices() if callable(self.choices) else self.choices

    def checked(self, name: str, value: Any, error: type[EmbedcamError] = InputError) -> Any:
        """Return a value as the setting's kind.

        Raises:
            EmbedcamError: of the class `error`; another kind, out of range, or an unknown name.
        """
        if value is None and self.optional:
            return None
        if self.kind is int:
            most = None if self.most == math.inf else int(self.most)
            return whole(name, value, int(max(self.least, -(1 << 62))), most, error=error)
        if self.kind is float:
            return number(
                name, value, self.least, self.most, above=self.above, below=self.below, error=error
            )
        if self.kind is bool:
            if not isinstance(value, bool):
                raise error(f"{name} = {short(value)}; give true or false")
            return value
        if self.kind is tuple:
            return self._checked_names(name, value, error)
        if not isinstance(value, str):
            raise error(f"{name} = {short(value)}; give a text")
        return one_of(name, value, self.known, error=error) if self.choices else value

    def _checked_names(self, name: str, value: Any, error: type[EmbedcamError]) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise error(f"{name} = {short(value)}; give a list of names")
        names = tuple(value)
        if not all(isinstance(one, str) and one for one in names):
            raise error(f"{name} = {short(value)}; give a list of names")
        for one in names if self.choices else ():
            one_of(name, one, self.known, error=error)
        return names


def setting(default: Any, kind: type | None = None, **declared: Any) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        default: its value where none is given; None makes the setting optional.
        kind: where the default does not tell.
        declared: other attributes of `Setting`.
    """
    declaration = Setting(kind=kind or type(default), optional=default is None, **declared)
    return dataclasses.field(default=default, metadata={"setting": declaration})


def settings_of(record: Any) -> dict[str, Setting]:
    """Return the settings that a dataclass, or an instance of one, declares, by name."""
    return {
        field.name: field.metadata["setting"]
        for field in dataclasses.fields(record)
        if "setting" in field.metadata
    }


def check(record: Any, error: type[EmbedcamError] = InputError) -> None:
    """Check every setting of a frozen dataclass and keep it as its kind; for `__post_init__`.

    Raises:
        EmbedcamError: of the class `error`; names the setting, what was given and what is expected.
    """
    for name, declaration in settings_of(record).items():
        value = declaration.checked(name, getattr(record, name), error)
        object.__setattr__(record, name, value)


def add_options(group: Any, record: type, names: Iterable[str] | None = None) -> None:
    """Add the command line's options of a dataclass's settings to a parser or a group of one.

    Options that are not given stay None, so that the dataclass's own defaults, and what a file
    says, hold; see `chosen`.
    """
    declared = settings_of(record)
    for name in declared if names is None else names:
        _add_option(group, name, declared[name], getattr(record, name))


def _add_option(group: Any, name: str, declaration: Setting, default: Any) -> None:
    if not declaration.help:
        return
    flag = "--" + (declaration.flag or name).replace("_", "-")
    more: dict[str, Any] = {"dest": name, "default": None, "help": declaration.help}
    if declaration.kind is bool:
        group.add_argument(flag, action="store_false" if default else "store_true", **more)
        return
    read = declaration.read or _reader(name, declaration)
    group.add_argument(flag, type=read, metavar=declaration.metavar, **more)


def _reader(name: str, declaration: Setting) -> Callable[[str], Any]:
    """Return what reads the option's text; argparse puts the option before the message."""

    def read(text: str) -> Any:
        value: Any = text
        if declaration.kind in (int, float):
            try:
                value = declaration.kind(text)
            except ValueError:
                value = text
        elif declaration.kind is tuple:
            value = tuple(part for part in text.split(",") if part)
        try:
            return declaration.checked(name, value)
        except EmbedcamError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def chosen(options: argparse.Namespace, record: type) -> dict[str, Any]:
    """Return the settings of a dataclass that the command line was given, by name."""
    named = {name: getattr(options, name, None) for name in settings_of(record)}
    return {name: value for name, value in named.items() if value is not None}


def from_tables(
    record: type[Record], tables: Mapping[str, Any], where: str, error: type[EmbedcamError]
) -> dict[str, Any]:
    """Return the settings that TOML tables hold, by name; for the dataclass's constructor.

    Args:
        record: the dataclass; each setting names its `table`.
        tables: as `tomllib` reads them, those of the settings alone.
        where: the file, for messages.
        error: class of the exception.

    Raises:
        EmbedcamError: of the class `error`; an unknown table or entry.
    """
    entries: dict[str, dict[str, str]] = {}
    for name, declaration in settings_of(record).items():
        entries.setdefault(declaration.table, {})[declaration.entry or name] = name
    values: dict[str, Any] = {}
    for table, given in tables.items():
        known = entries.get(table)
        if known is None:
            raise error(f"{where}: unknown table [{table}]; {nearest_of(table, entries)}")
        if not isinstance(given, Mapping):
            raise error(f"{where}: {table} = {short(given)} should be a table, [{table}]")
        for entry, value in given.items():
            if entry not in known:
                raise error(
                    f"{where}: [{table}] has no entry {entry!r}; {nearest_of(entry, known)}"
                )
            values[known[entry]] = value
    return values
