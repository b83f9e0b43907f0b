"""Concepts: parts that activations are made of, and the pictures where each answers most.

A position's activations are, roughly, a sum of parts: a V with V `[P K]` not negative (non-negative
matrix factorisation, Lee and Seung, Nature 1999). V is fitted once, over positions of a sample of
the images. What a picture's channels give to a score is divided among the parts by the share that
each has in them, as a mixture of sounds is divided among its sources (Févotte, Bertin and Durrieu,
Neural Computation 2009): the amounts and a rest add up to the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("channel", "concept")
"""What has exemplars."""


class Exemplar(NamedTuple):
    """A picture of the index and the position (row, column) where a line answers with `value`."""

    id: str
    row: int
    column: int
    value: float


@dataclass(frozen=True, eq=False)
class Concepts:
    """P parts of K channels, `parts` `[P K]`, float32 and not negative, with their `names`.

    Of a layer whose activations are signed they are `[P 2K]`: parts of what is positive, and
    behind them of what is negative, without its sign. A name that nobody gave is "".
    """

    parts: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.parts)

    def shares(self, activations: np.ndarray) -> np.ndarray:
        """Return the share of each part in each channel of a picture `[K H W]`, `[P K]`.

        They are 0 to 1, and add up to 1 in a channel, or to 0 where no part has it.
        """
        raise NotImplementedError

    def divide(self, channels: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, float]:
        """Return what each part gives to a score, `[P]`, and the rest, which no part explains.

        `channels` `[K]` is what each channel of the picture gives; amounts and rest add up to all.
        """
        amounts = shares @ channels
        return amounts, float(channels.sum() - amounts.sum())
