"""What adds up to a score, in lines: the channels that give most, and all that is left."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError

SMALL = 5e-4
"""Remainders that would be shown as 0.000."""


@dataclass(frozen=True)
class Line:
    """A channel and what it gives to the score; the mean of what it gives on both sides."""

    channel: int
    contribution: float


def check_count(n: object, what: str) -> None:
    """Refuse what is no number of lines or links.

    Raises:
        InputError: naming it.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InputError(f"{n!r} {what}; give a whole number, 0 or more")


def top_lines(channels: np.ndarray, n: int) -> list[Line]:
    """The n channels of largest magnitude, sorted by contribution, largest first."""
    check_count(n, "lines")
    chosen = np.argsort(-np.abs(channels), kind="stable")[:n]
    found = [Line(int(channel), float(channels[channel])) for channel in chosen]
    return sorted(found, key=lambda line: -line.contribution)


def amounts_of(
    channels: np.ndarray, n: int, remainder: float, exact: bool
) -> list[tuple[str, float]]:
    """n channels, all the others together, and the remainder where it is more than rounding."""
    lines = top_lines(channels, n)
    found = [(f"channel {line.channel}", line.contribution) for line in lines]
    others = len(channels) - len(lines)
    if others:
        found.append((f"{others} other channels", other_channels(channels, n)))
    if not exact or abs(remainder) >= SMALL:
        found.append(("the head's bias" if exact else "not of first order", remainder))
    return found


def as_dicts(channels: np.ndarray, n: int) -> list[dict[str, Any]]:
    """`top_lines`, ready for JSON."""
    return [
        {"channel": line.channel, "contribution": line.contribution}
        for line in top_lines(channels, n)
    ]


def other_channels(channels: np.ndarray, n: int) -> float:
    """What the channels without a line of their own give together."""
    return float(channels.sum() - sum(line.contribution for line in top_lines(channels, n)))
