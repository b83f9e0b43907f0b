"""The lines of a receipt: what each channel or concept gives, and no large amount left unnamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..index.concepts import Exemplar


@dataclass(frozen=True)
class Line:
    """A channel or concept by its number, and what it gives to a score, the mean of both sides.

    `exemplars` are indexed pictures and positions where it answers most, best first; `name` is what
    a user called a concept, else "".
    """

    kind: Literal["channel", "concept"]
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


# `Receipt.reasons(n=8) -> list[Line]`: what a receipt shows, concepts where the index has them,
# else channels; `Receipt.lines(n)` stays the channels, `Receipt.amounts()` all that adds up.
