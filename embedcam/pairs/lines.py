"""The lines of a receipt: what each channel or concept gives, and no large amount left unnamed.

A channel has a number and little more; a concept is a part that activations are made of. Both are
shown by the indexed pictures where they answer most (see `embedcam.index.concepts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from .._checks import whole
from ..errors import InputError
from ..index.concepts import Concepts, Exemplar
from ..index.records import Json

MOST_LINES = 12
"""Of a receipt, all that adds up counted, unless more are asked for."""
N_CHANNELS, N_CONCEPTS, N_EXEMPLARS = 10, 8, 3
"""Lines shown where nothing is said, and exemplars beside each."""
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
        """Return plain values, ready for JSON: a concept's exemplars too, of a channel none."""
        told: Json = {self.kind: self.number, "contribution": self.contribution}
        if self.kind == "concept":
            told |= {"name": self.name, "exemplars": self.shown}
        return told

    @property
    def shown(self) -> list[Json]:
        """The exemplars, ready for JSON."""
        return [one._asdict() for one in self.exemplars]


Find = Callable[[Kind, Sequence[int]], Sequence[Sequence[Exemplar]]]
"""Returns the exemplars of lines of a kind, of each by its number."""
Crop = Callable[[Exemplar], Image.Image | None]


class Known:
    """What an index says of channels and concepts: its `concepts`, and exemplars that `find` finds.

    What was found is kept, for receipts outlive the index they are of. `crop` cuts out what an
    exemplar shows, and returns None where its picture cannot be read any more.
    """

    def __init__(
        self,
        concepts: Concepts | None = None,
        find: Find | None = None,
        crop: Crop = lambda _: None,
    ) -> None:
        self.concepts, self._find, self.crop = concepts, find, crop
        self._kept: dict[tuple[Kind, int], tuple[Exemplar, ...]] = {}

    def keep(self, kind: Kind, numbers: Iterable[int]) -> None:
        """Find the exemplars of lines, all that are not known yet at once."""
        lacking = [n for n in dict.fromkeys(numbers) if (kind, n) not in self._kept]
        if self._find is None or not lacking:
            return
        for number, found in zip(lacking, self._find(kind, lacking), strict=True):
            self._kept[kind, number] = tuple(found)

    def shown(self, lines: list[Line]) -> list[Line]:
        """Return lines with those of their exemplars that are known, or can still be found."""
        for kind in {line.kind for line in lines}:
            with suppress(InputError):  # of an index that was closed
                self.keep(kind, [line.number for line in lines])
        exemplars = (self._kept.get((line.kind, line.number), ()) for line in lines)
        return [replace(one, exemplars=of) for one, of in zip(lines, exemplars, strict=True)]

    def crops(self, exemplars: Sequence[Exemplar]) -> list[Image.Image]:
        """Return what exemplars show, of those whose pictures can be read."""
        return [crop for one in exemplars if (crop := self.crop(one)) is not None]


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
