"""Why words and a picture match, as a receipt: one side alone, for words have no positions.

With t the embedding of a text, f a picture's and m' the mean embedding of texts,

    f . t  =  f . m'  +  f . (t - m')

the first part is what the picture has in common with any text; the second, what answers *these*
words, is divided among the picture's positions and channels. Of two texts f . (t - t') is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..explain.sides import Shown, Side, evidence_of
from ..explain.texts import Words
from ..index.concepts import Concepts
from ..index.records import Json
from ..render import receipt_picture
from .lines import Amounts, Known
from .receipt import Total

if TYPE_CHECKING:
    from ..index import Index


@dataclass(frozen=True, eq=False, repr=False)
class TextReceipt(Total):
    """Why a picture is similar to words, or more to the one text than to the other.

    `score` is f . t, of two texts f . t - f . t'. `query` is what the picture gives to it:
    `cells.sum()`, its parts, `shared` and `remainder` add up to the score. `centred` is whether
    what any text shares was put apart, and `held` says what was held, as of a `Receipt`.
    """

    text: str
    above: str | None
    score: float
    centred: bool
    side: Side
    _alt = "a picture, and what its similarity with words is made of"

    @property
    def shared(self) -> float:
        """What the picture has in common with the average text."""
        return self.query.shared

    @property
    def held(self) -> tuple[str, ...]:
        """What was held at its values so that all adds up, in words."""
        return self.side.held

    @property
    def words(self) -> str:
        """The text in quotes, with what it is held against."""
        return f'"{self.text}"' + ("" if self.above is None else f' above "{self.above}"')

    @property
    def total(self) -> tuple[str, float]:
        """The score, in words and a number."""
        return "similarity" if self.above is None else "more similar by", self.score

    def in_words(self, n: int = 5) -> list[str]:
        """Return a sentence where the picture answers the other text better; else none."""
        said = f'The picture answers "{self.above}" better than "{self.text}".'
        return [said] if self.above is not None and self.score < 0 else []

    def amounts(self, n: int = 10) -> Amounts:
        """Return what adds up to the score: the average text, n channels, all that is left."""
        shared = [("shared with the average text", self.shared)] if self.centred else []
        return shared + self._amounts(n, self.query.remainder, len(shared))

    def to_dict(self, lines: int = 10) -> Json:
        """Return plain lists and numbers, ready for JSON; without pictures."""
        names = ("text", "above", "score", "exact", "centred", "shared")
        told = {name: getattr(self, name) for name in names}
        told |= {"held": list(self.held), "parts": self.parts}
        return {**told, **self._channels(lines), "picture": self.query.to_dict()}

    def _divided(self, concepts: Concepts) -> tuple[np.ndarray, float]:
        return concepts.divide(self.query.channels, self.side.activations)

    def _draw(self, lines: int, links: int, title: str | None) -> Image.Image:
        amounts = self.amounts(lines)
        rather = "these words" if self.above is None else f'"{self.text}"'
        against = "against them" if self.above is None else f'for "{self.above}"'
        return receipt_picture(
            [self.query.tile()],
            amounts,
            self.total,
            apart=int(self.centred),
            crops=self._crops(amounts, lines),
            title=self.words if title is None else title,
            note=" ".join([*self.in_words(), f"Red speaks for {rather}, blue {against}."]),
        )

    def __repr__(self) -> str:
        name = self.query.shown.name or "a picture"
        return f"<TextReceipt: {self.words} and {name}: {self.score:+.3f}>"


def make_text_receipt(
    index: Index, words: Words, side: Side, shown: Shown, known: Known
) -> TextReceipt:
    """Return the receipt of words and a picture, with the index's mean embedding of texts."""
    mean = index.shared().get("text_mean") if words.rival is None else None
    apart = None if mean is None else mean.astype(np.float64)
    direction = words.embedding.astype(np.float64)
    if words.rival is not None:
        direction = direction - words.rival
    score = float(side.embedding @ direction)
    evidence = evidence_of(side, direction, score, apart, shown)
    return TextReceipt(
        query=evidence,
        channels=evidence.channels,
        exact=side.exact,
        text=words.text,
        above=words.above,
        score=score,
        centred=apart is not None,
        side=side,
        known=known,
    )
