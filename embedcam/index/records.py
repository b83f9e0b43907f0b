"""Plain values of JSON, read into records with suspicion: a value is what it should be, or `Wrong`.

A record is a frozen dataclass whose annotations say what a key holds: a record, `X | None`,
`Literal[...]`, `tuple[X, ...]` (a list), `Mapping[K, X]` (an object whose keys are read as K), or
`Annotated[X, reader]`. A field without a default must be present; undeclared keys are ignored.
"""

import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError, short

Json = dict[str, Any]
"""An object as JSON has it."""
Reader = Callable[[Any], Any]
"""Takes a plain value and returns what it stands for, or raises `Wrong`."""
T = TypeVar("T")


class Wrong(InputError):  # noqa: N818 - reads as the fact it states
    """What is wrong with a value, as the end of a sentence, and the keys that lead to it."""

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.what, self.path = what, [*path]

    def __str__(self) -> str:
        plain = re.compile(r"[\w.-]{1,60}")
        keys = (
            f".{key}" if isinstance(key, str) and plain.fullmatch(key) else f"[{short(key)}]"
            for key in self.path
        )
        return ("".join(keys) + self.what).lstrip(". ")


def read_as(kind: type[T], value: object) -> T:
    """Return the record that a plain value describes."""
    record: T = _reader(kind)(value)  # type: ignore[arg-type]  # mypy: no type[T] is hashable
    return record


def of_type(kind: type[T], value: object) -> T:
    """Return a value of exactly that type."""
    if type(value) is kind and isinstance(value, kind):
        return value
    raise Wrong(f" is {short(value)}, not of type {kind.__name__}")


def whole(low: int, high: int) -> Callable[[object], int]:
    """Return a reader of whole numbers."""

    def read(value: object) -> int:
        if not low <= (number := of_type(int, value)) <= high:
            raise Wrong(f" = {short(value)} is impossible; expected {low} to {high}")
        return number

    return read


def real(low: float, high: float) -> Callable[[object], float]:
    """Return a reader of numbers, whole ones included."""

    def read(value: object) -> float:
        # Compared, not converted: a whole number of JSON may have more digits than a float holds.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise Wrong(f" is {short(value)}; expected a number from {low:g} to {high:g}")
        return float(value)

    return read


def text(
    longest: int, pattern: str = r"[^\0]*", expected: str = "text without NUL"
) -> Callable[[object], str]:
    """Return a reader of texts that fit a pattern."""

    def read(value: object) -> str:
        given = of_type(str, value)
        if len(given) > longest:
            raise Wrong(f" has {len(given)} characters; at most {longest} are allowed")
        if not re.fullmatch(pattern, given, re.DOTALL):
            raise Wrong(f" is {short(given)}; expected {expected}")
        return given

    return read


def one_of(known: tuple[T, ...], value: object) -> T:
    """Return the one of those known that a value is, of the same type."""
    for one in known:
        if type(value) is type(one) and value == one:
            return one
    raise Wrong(f" is {short(value)}; known: {', '.join(map(str, known))}")


@cache
def _reader(kind: Any) -> Reader:
    """Return what reads a value of an annotated type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        checked: Reader = inner[1]
        return checked
    if origin is Literal:
        return partial(one_of, inner)
    if origin in (Union, types.UnionType):
        return partial(_first_of, [_reader(one) for one in inner if one is not types.NoneType])
    if origin is tuple:
        return partial(_tuple, inner)
    if origin is Mapping:
        return partial(_mapping, *map(_reader, inner))
    if isinstance(kind, type) and is_dataclass(kind):
        return partial(_record, kind)
    return (
        real(-sys.float_info.max, sys.float_info.max) if kind is float else partial(of_type, kind)
    )


def _first_of(kinds: list[Reader], value: object) -> Any:
    for read in kinds[:-1]:
        try:
            return read(value)
        except Wrong:
            continue
    return None if value is None else kinds[-1](value)


def _tuple(kinds: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    values = of_type(list, value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(values) != len(kinds):
        raise Wrong(f" is {short(value)}; expected {len(kinds)} values")
    return tuple(_at(n, _reader(kind), values[n]) for n, kind in enumerate(kinds))


def _mapping(key: Reader, each: Reader, value: object) -> Json:
    taken = {}
    for name, one in of_type(dict, value).items():
        try:
            key(name)
        except Wrong as wrong:
            what = wrong.what.partition(";")[2] or wrong.what
            raise Wrong(f" has the unknown entry {short(name)};{what}") from wrong
        taken[name] = _at(name, each, one)
    return taken


@cache
def _fields_of(kind: type) -> dict[str, tuple[Reader, bool]]:
    """Return of each field of a record its reader, and whether it must be present."""
    hints = get_type_hints(kind, include_extras=True)
    declared = [one for one in fields(kind) if one.init]
    return {one.name: (_reader(hints[one.name]), one.default is MISSING) for one in declared}


def _record(kind: Any, value: object) -> Any:
    values, taken = of_type(dict, value), {}
    for name, (read, needed) in _fields_of(kind).items():
        if name in values:
            taken[name] = _at(name, read, values[name])
        elif needed:
            raise Wrong(" is missing", name)
    return kind(**taken)


def _at(key: str | int, read: Reader, value: object) -> Any:
    try:
        return read(value)
    except Wrong as wrong:
        wrong.path.insert(0, key)
        raise
