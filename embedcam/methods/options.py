"""Checks of options that several methods have."""

from typing import Any

import numpy as np

from ..errors import InputError, short


def whole_number(name: str, value: Any, least: int = 1, most: int = 1_000_000) -> int:
    """A whole number, Python's or NumPy's.

    Raises:
        InputError: it is something else, less than `least`, or more than `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} = {short(value)}; give a whole number from {least}")
    if value > most:
        raise InputError(f"{name} = {short(value)}; give a whole number from {least} to {most:,}")
    return int(value)


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse what is not among the known.

    Raises:
        InputError: with those there are.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} = {short(value)} is unknown; use one of {', '.join(known)}")
