"""What is written behind an option, read; refused in one sentence."""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a number, true, false, none or words."""
    name, given, value = text.partition("=")
    if not name or not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as samples=50")
    words = {"true": True, "false": False, "none": None}
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(value)
    return name, words.get(value.lower(), value)


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(name for name in text.split(",") if name)


def path(text: str) -> str:
    """A path, not empty."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name was given")
    return text


def positive(text: str) -> int:
    """A whole number from 1."""
    return number(text, int, 1, "a whole number of at least 1")


def whole(text: str) -> int:
    """A whole number from 0."""
    return number(text, int, 0, "a whole number of at least 0")


def amount(text: str) -> float:
    """A number from 0."""
    return number(text, float, 0, "a number of at least 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text, float, 0, "a number from 0 to 1")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def number(text: str, kind: Callable[[str], Any], least: int, expected: str) -> Any:
    """A finite number of a kind, at least so large."""
    try:
        value = kind(text)
    except ValueError:
        value = -math.inf
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def size(text: str) -> tuple[int, int]:
    """N or HxW, in pixels."""
    try:
        sides = [positive(side) for side in text.lower().split("x")]
    except argparse.ArgumentTypeError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 224 or 224x320")
    return sides[0], sides[-1]
