"""The lines of a receipt: what each channel or concept gives, and no large amount left unnamed.

A channel has a number and little more; a concept is a part that activations are made of. Both are
shown by the indexed pictures where they answer most (see `embedcam.index.concepts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .._checks import whole
from ..explain.explanation import Json
from ..index.concepts import Concepts, Exemplar

MOST_LINES = 12
"""Of a receipt, all that adds up counted, unless more are asked for."""
N_CONCEPTS, N_EXEMPLARS = 8, 3
Kind = Literal["channel", "concept"]
Amounts = list[tuple[str, float]]
"""Words and a number each."""


@dataclass(frozen=True)
class Line:
    """A channel or concept by its number, and what it gives to a score, the mean of both sides.

    `exemplars` are indexed pictures and positions where it answers most, best first; `name` is what
    a user called a concept, else "".
    """

    kind: Kind
    number: int
    contribution: float
    name: str = ""
    exemplars: tuple[Exemplar, ...] = ()

    @property
    def channel(self) -> int:
        """The number, of a channel."""
        return self.number

    @property
    def words(self) -> str:
        """What a reader sees: "channel 607", "concept 3" or a concept's name."""
        return self.name or f"{self.kind} {self.number}"

    def to_dict(self) -> Json:
        """Return plain values, ready for JSON; exemplars where there are any."""
        shown = {"exemplars": [one._asdict() for one in self.exemplars]} if self.exemplars else {}
        named = {"name": self.name} if self.kind == "concept" else {}
        return {self.kind: self.number, **named, "contribution": self.contribution, **shown}


Find = Callable[[Kind, Sequence[int]], Sequence[Sequence[Exemplar]]]
"""Returns the exemplars of lines of a kind, of each by its number."""


@dataclass(frozen=True, eq=False)
class Known:
    """What an index says of channels and concepts."""

    concepts: Concepts | None = None
    find: Find = lambda _, numbers: [()] * len(numbers)

    def shown(self, lines: list[Line]) -> list[Line]:
        """Return lines of one kind with their exemplars."""
        if not lines:
            return []
        found = self.find(lines[0].kind, [line.number for line in lines])
        pairs = zip(lines, found, strict=True)
        return [replace(line, exemplars=tuple(exemplars)) for line, exemplars in pairs]


NOTHING_KNOWN = Known()


def lines_of(kind: Kind, amounts: np.ndarray, n: int, names: Sequence[str] = ()) -> list[Line]:
    """Return the n that give most, by magnitude, largest contribution first; amounts `[N]`."""
    chosen = np.argsort(-np.abs(amounts), kind="stable")[: whole("lines", n)].tolist()
    lines = [Line(kind, m, float(amounts[m]), names[m] if names else "") for m in chosen]
    return sorted(lines, key=lambda line: -line.contribution)


def in_words(kind: Kind, amounts: np.ndarray, n: int, names: Sequence[str] = ()) -> Amounts:
    """Return amounts `[N]` as at most n + 2 lines that add up: n, those that follow, all others.

    Those that follow by magnitude are as many as it takes, none where they need not be, so that
    what all others give together is never the largest.
    """
    lines = lines_of(kind, amounts, n, names)
    shown = [(line.words, line.contribution) for line in lines]
    given = np.cumsum(amounts[np.argsort(-np.abs(amounts), kind="stable")], dtype=np.float64)
    given = np.concatenate([[0.0], given])
    n, total = len(lines), len(amounts)
    largest = max((abs(line.contribution) for line in lines), default=0.0)
    next_ones = np.abs(given[n:] - given[n])
    others = np.abs(given[-1] - given[n:])
    # With all of them in the next line nothing is left, so that some number always fits.
    follow = int((others <= np.maximum(largest, next_ones)).argmax())
    if follow:
        of = f"{follow} {kind}s" if follow > 1 else kind
        shown.append((f"the next {of}", float(given[n + follow] - given[n])))
    if left := total - n - follow:
        of = f"{left} other {kind}{'s' if left > 1 else ''}"
        shown.append((of, float(given[-1] - given[n + follow])))
    return shown
