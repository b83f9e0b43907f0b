"""Checks of options that several methods have."""

from typing import Any

import numpy as np

from ..errors import InputError


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A whole number, Python's or NumPy's.

    Raises:
        InputError: it is something else, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} = {value!r}; give a whole number from {least}")
    return int(value)


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse what is not among the known.

    Raises:
        InputError: with those there are.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} = {value!r} is unknown; use one of {', '.join(known)}")
