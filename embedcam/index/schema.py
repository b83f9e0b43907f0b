"""Records read from JSON by their own declaration: presence, type and range of every key.

A record is a frozen dataclass. Its annotations say what a key holds: a record, `X | None`,
`Literal[...]`, `tuple[X, ...]` (a list), `Mapping[K, X]` (an object whose keys are read as K), and
`Annotated[X, reader]`, where a reader takes a plain value and returns it or raises `Wrong`. A field
without a default MUST be present; keys that are not declared are ignored. What several keys must
keep together a record checks in `__post_init__`.
"""

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import short

Reader = Callable[[Any], Any]


class Wrong(ValueError):  # noqa: N818 - reads as the fact it states
    """What is wrong with a value, as the end of a sentence that begins with its place.

    Args:
        what: such as " is missing".
        path: keys and numbers that lead to the value, from where the reading began.
    """

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.what, self.path = what, [*path]

    def __str__(self) -> str:
        plain = re.compile(r"[\w.-]{1,60}")
        named = (
            f".{key}" if isinstance(key, str) and plain.fullmatch(key) else f"[{short(key)}]"
            for key in self.path
        )
        return ("".join(named) + self.what).lstrip(". ")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def __call__(self, value: Any) -> int:  # noqa: D102
        if not self.low <= _of_type(value, int) <= self.high:
            raise Wrong(f" = {short(value)} is impossible; expected {self.low} to {self.high}")
        return int(value)


@dataclass(frozen=True)
class Real:
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def __call__(self, value: Any) -> float:  # noqa: D102
        # Compared, not converted: a whole number of JSON may have more digits than a float holds.
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise Wrong(f" is {short(value)}; expected a number from {self.low:g} to {self.high:g}")
        return float(value)


@dataclass(frozen=True)
class Text:
    """A string of at most `longest` characters, none of them NUL, and of a pattern."""

    longest: int
    pattern: str = r"[^\0]*"
    expected: str = "text without NUL"

    def __call__(self, value: Any) -> str:  # noqa: D102
        if len(_of_type(value, str)) > self.longest:
            raise Wrong(f" has {len(value)} characters; at most {self.longest} are allowed")
        if not re.fullmatch(self.pattern, value, re.DOTALL):
            raise Wrong(f" is {short(value)}; expected {self.expected}")
        return str(value)


@cache
def reader(kind: Any) -> Reader:
    """What reads a value of an annotated type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        checked: Reader = inner[1]
        return checked
    if origin is Literal:
        return lambda value: one_of(inner, value)
    if origin in (Union, types.UnionType):
        kinds = [reader(one) for one in inner if one is not types.NoneType]
        return lambda value: None if value is None else _first_of(kinds, value)
    if origin is tuple and inner[-1] is not Ellipsis:
        return lambda value: _pair(inner, value)
    if origin is tuple:
        each = reader(inner[0])
        return lambda value: tuple(
            _at(number, each, one) for number, one in enumerate(_of_type(value, list))
        )
    if origin is Mapping:
        key, each = map(reader, inner)
        return lambda value: _table(key, each, value)
    if isinstance(kind, type) and is_dataclass(kind):
        return lambda value: _record(kind, value)
    return lambda value: _of_type(value, kind)


def check_fields(kind: type, values: Mapping[str, Any]) -> None:
    """Read those fields of a record that are there, whatever else it needs."""
    for name, (read, _) in _readers(kind).items():
        if name in values:
            _at(name, read, values[name])


def one_of(known: tuple[Any, ...], value: Any) -> Any:
    """Read one of the known values."""
    if not any(type(value) is type(one) and value == one for one in known):
        raise Wrong(f" is {short(value)}; known: {', '.join(map(str, known))}")
    return value


def _record(kind: type, value: Any) -> Any:
    given, taken = _of_type(value, dict), {}
    for name, (read, needed) in _readers(kind).items():
        if name in given:
            taken[name] = _at(name, read, given[name])
        elif needed:
            raise Wrong(" is missing", name)
    return kind(**taken)


@cache
def _readers(kind: type) -> dict[str, tuple[Reader, bool]]:
    """Of each field of a record its reader, and whether it must be present."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: (reader(hints[f.name]), f.default is MISSING) for f in fields(kind) if f.init}


def _table(key: Reader, each: Reader, value: Any) -> Mapping[str, Any]:
    taken = {}
    for name, one in _of_type(value, dict).items():
        try:
            key(name)
        except Wrong as wrong:
            said = wrong.what.partition(";")[2] or wrong.what
            raise Wrong(f" has the unknown entry {short(name)};{said}") from wrong
        taken[name] = _at(name, each, one)
    return taken


def _pair(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if len(_of_type(value, list)) != len(kinds):
        raise Wrong(f" is {short(value)}; expected {len(kinds)} values")
    return tuple(_at(n, reader(kinds[n]), one) for n, one in enumerate(value))


def _first_of(kinds: list[Reader], value: Any) -> Any:
    for read in kinds[:-1]:
        try:
            return read(value)
        except Wrong:
            continue
    return kinds[-1](value)


def _at(key: str | int, read: Reader, value: Any) -> Any:
    try:
        return read(value)
    except Wrong as wrong:
        wrong.path.insert(0, key)
        raise


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Wrong(f" is {short(value)}, not of type {kind.__name__}")
    return value
