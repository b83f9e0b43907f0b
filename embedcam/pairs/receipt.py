"""Why two pictures match, as a receipt: what every part gives, and a sum that is the similarity.

The similarity of a query f and a result f' is f . f'. With m the mean embedding of the index,

    f . f'  =  f . m  +  f . (f' - m)

the first part is what the query has in common with the average image; the second, what matches
*this* result, is divided among the query's positions and channels, and likewise among the result's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import numpy as np
from PIL import Image

from .._checks import one_of, whole
from ..errors import InputError
from ..explain.drawing import save_picture
from ..explain.sides import NOT_SHOWN, Contributions, Shown, Side, evidence_of
from ..index.concepts import Concepts
from ..index.records import Json
from ..render import Matched, draw_on_axes, in_notebook, receipt_picture
from .lines import (
    MOST_LINES,
    N_CHANNELS,
    N_CONCEPTS,
    NOTHING_KNOWN,
    Amounts,
    Known,
    Line,
    in_words,
    lines_of,
)
from .places import BLOCKS, Place, find_places, products_of_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROBED = 16
"""Positions of the query that links begin at, where each costs a pass through the head."""
_SMALL = 5e-4
"""Remainders that would be shown as 0.000."""
_NEXT_TO_NONE = 0.02
"""Of the similarity, what is beyond the average where nothing is: shares of it would mislead."""


@dataclass(frozen=True)
class Link:
    """Two positions, (row, column) each, and what their product gives to the similarity."""

    query: tuple[int, int]
    result: tuple[int, int]
    contribution: float


@dataclass(frozen=True, eq=False, repr=False)
class Total(ABC):
    """Parts that add up to a score; `channels` `[K]` is what each channel gives."""

    query: Contributions
    channels: np.ndarray
    exact: bool
    known: Known = field(default=NOTHING_KNOWN, kw_only=True)
    _alt: ClassVar[str]

    @property
    @abstractmethod
    def total(self) -> tuple[str, float]:
        """The score, and what it is in words; `amounts` add up to it."""

    @abstractmethod
    def amounts(self, n: int = 10) -> Amounts:
        """Return what adds up to the score, in words: n channels, and all that is left."""

    def in_words(self, n: int = 5) -> list[str]:
        """Return sentences: what matches what, of n places at most, or what is unexpected."""
        return []

    @abstractmethod
    def _draw(self, lines: int, links: int, title: str | None) -> Image.Image: ...

    @abstractmethod
    def _divided(self, concepts: Concepts) -> tuple[np.ndarray, float]:
        """Return what each concept gives, `[P]`, and what no concept explains."""

    @cached_property
    def divided(self) -> tuple[np.ndarray, float] | None:
        """What each concept gives, `[P]`, and what none explains; None without concepts.

        Both add up to the sum of `channels`.
        """
        return None if self.known.concepts is None else self._divided(self.known.concepts)

    def lines(self, n: int = N_CHANNELS) -> list[Line]:
        """Return the n channels that give most, by magnitude, largest contribution first."""
        return self.known.shown(lines_of("channel", self.channels, n))

    def concepts(self, n: int = N_CONCEPTS) -> list[Line]:
        """Return the n concepts that give most, as `lines`; none where the index has none."""
        if self.divided is None or self.known.concepts is None:
            return []
        of = self.divided[0], n, self.known.concepts.names
        return self.known.shown(lines_of("concept", *of))

    def reasons(self, n: int = N_CONCEPTS) -> list[Line]:
        """Return the n concepts that give most where the index has concepts, else channels."""
        return self.lines(n) if self.divided is None else self.concepts(n)

    def _amounts(self, n: int, left: float, besides: int = 0) -> Amounts:
        """Return amounts with at most n lines of a kind; so many lines `besides` stand apart."""
        last: Amounts = list(self.parts.items())
        if self.divided is not None and abs(self.divided[1]) >= _SMALL:
            last.append(("what no concept explains", self.divided[1]))
        if not self.exact or abs(left) >= _SMALL:
            last.append(("the head's bias" if self.exact else "not of first order", left))
        # Two more: those that follow, and all others.
        n = max(0, min(n, max(MOST_LINES, n) - besides - len(last) - 2))
        if self.divided is None or self.known.concepts is None:
            return in_words("channel", self.channels, n) + last
        return in_words("concept", self.divided[0], n, self.known.concepts.names) + last

    def _crops(self, amounts: Amounts, n: int) -> dict[str, list[Image.Image]]:
        """Return what the exemplars of lines show, by the words of those among the amounts."""
        told = {words for words, _ in amounts}
        lines = {line.words: line for line in self.reasons(n) if line.words in told}
        return {words: self.known.crops(line.exemplars) for words, line in lines.items()}

    @property
    def parts(self) -> dict[str, float]:
        """What is neither of a position nor of a channel, by name."""
        return self.query.parts

    def _channels(self, n: int) -> Json:
        lines = self.lines(n)
        rest = float(self.channels.sum() - sum(line.contribution for line in lines))
        told: Json = {"channels": [line.to_dict() for line in lines], "other_channels": rest}
        if any(line.exemplars for line in lines):
            told["channel_exemplars"] = [line.shown for line in lines]
        if self.divided is not None:
            amounts, unexplained = self.divided
            shown = self.concepts()
            others = float(amounts.sum() - sum(line.contribution for line in shown))
            told["concepts"] = [line.to_dict() for line in shown]
            told |= {"other_concepts": others, "no_concept": unexplained}
        return told

    @overload
    def plot(
        self, *, lines: int = ..., links: int = ..., title: str | None = ..., ax: None = ...
    ) -> Image.Image: ...
    @overload
    def plot(
        self, *, lines: int = ..., links: int = ..., title: str | None = ..., ax: Axes
    ) -> Axes: ...
    def plot(
        self, *, lines: int = 10, links: int = 0, title: str | None = None, ax: Axes | None = None
    ) -> Image.Image | Axes:
        """Draw the pictures with their maps, and the sum; of a receipt first the places that match.

        Of a receipt so many of the best `links` are drawn into the pictures, too.

        With matplotlib axes `ax`, the query's map alone is drawn into them; they are returned.
        """
        if ax is not None:
            return draw_on_axes(ax, self.query.tile(), title)
        return self._draw(lines, links, title)

    def save(
        self, path: str | Path, *, lines: int = 10, links: int = 0, title: str | None = None
    ) -> Path:
        """Write the picture of `plot`; the ending chooses the format."""
        return save_picture(lambda: self._draw(lines, links, title), path)

    def _repr_html_(self) -> str:
        return in_notebook(self.plot(), self._alt)


@dataclass(frozen=True, eq=False, repr=False)
class Receipt(Total):
    """Why a query and one result are similar.

    `similarity` is f . f', and `query` and `result` are what each side gives to it: of either
    `cells.sum() + sum(parts.values()) + shared + remainder`, and `channels.sum() + ...`, is the
    similarity. Where `exact`, the remainder is the head's biases, and `held` says what was held at
    its values for that; else it holds what is not of first order. `centred` is whether what the
    average image shares, `mean` `[D]`, was put apart. `channels`, `parts`, `shared` and `remainder`
    are means of both sides. Of a part of the query, `within` `[H W]` is how much of each position
    counts, and `outside` what all the others give.
    """

    similarity: float
    result: Contributions
    shared: float
    remainder: float
    centred: bool
    sides: tuple[Side, Side]
    mean: np.ndarray
    within: np.ndarray | None = None
    _alt = "query and result, and what their similarity is made of"

    @property
    def held(self) -> tuple[str, ...]:
        """What was held at its values so that all adds up, in words: attention weights, ..."""
        return tuple(dict.fromkeys(word for side in self.sides for word in side.held))

    @property
    def parts(self) -> dict[str, float]:
        """What is neither of a position nor of a channel, by name; means of both sides."""
        names = dict.fromkeys((*self.query.parts, *self.result.parts))
        both = self.query.parts, self.result.parts
        return {name: sum(parts.get(name, 0.0) for parts in both) / 2 for name in names}

    @property
    def _how(self) -> str:
        if not self.exact:
            return "Contributions are of first order; what is not is the last amount."
        held = " and ".join(filter(None, [", ".join(self.held[:-1]), *self.held[-1:]]))
        return f"Contributions are exact, with {held} held." if held else "Contributions are exact."

    @property
    def outside(self) -> float:
        """What the query gives outside of the part that was asked about; mean of both sides."""
        return (self.query.outside + self.result.outside) / 2

    @property
    def beyond(self) -> float:
        """What all pairs of positions give, of which places are a part; the channels' sum."""
        return float(self.channels.sum())

    @property
    def unshared(self) -> float:
        """What the two have beyond the average, positions and parts; 0 where that is next to none.

        What places carry is said as a share of it.
        """
        amount = self.beyond + sum(self.parts.values())
        return amount if amount > _NEXT_TO_NONE * abs(self.similarity) else 0.0

    def places(self, n: int = 5) -> list[Place]:
        """Return the pairs of regions that match and give most, at most n, most first.

        Each region takes at most 15% of its picture, all together at most 40% of either. What all
        pairs of positions give is `beyond`; see `embedcam.pairs.places`.
        """
        known = self._kept and products_of_positions(*self.sides, self.mean, *self._kept)
        return find_places(*self.sides, self.mean, n, self.within, known)

    def in_words(self, n: int = 5) -> list[str]:
        """Return sentences: what matches what, of n places at most, and what they carry.

        Pairs of places that are called the same are one.
        """
        merged: dict[tuple[str, str], Place] = {}
        for place in self.places(n):
            called = place.where("query"), place.where("result")
            before = merged[called].contribution if called in merged else 0.0
            merged[called] = replace(place, contribution=before + place.contribution)
        found = sorted(merged.values(), key=lambda place: -place.contribution)
        told = [place.words(self.unshared) for place in found]
        return told + list(filter(None, [self._said(found)]))

    @property
    def total(self) -> tuple[str, float]:
        """The similarity, in words and a number."""
        return "similarity", self.similarity

    def amounts(self, n: int = 10) -> Amounts:
        """Return what adds up to the similarity: the average, n channels, all that is left."""
        shared = [("shared with the average", self.shared)] if self.centred else []
        if self.within is not None:
            shared.append(("outside the box", self.outside))
        return shared + self._amounts(n, self.remainder, len(shared))

    def _divided(self, concepts: Concepts) -> tuple[np.ndarray, float]:
        of = zip((self.query, self.result), self.sides, strict=True)
        both = [concepts.divide(one.channels, s.activations) for one, s in of]
        return (both[0][0] + both[1][0]) / 2, (both[0][1] + both[1][1]) / 2

    def point(self, row: int, column: int, of: Literal["query", "result"] = "query") -> np.ndarray:
        """Return what one position matches, `[H' W']` on the other picture's grid, signed.

        The product of both positions' vectors (what each alone gives to the embedding), each less
        its share of the mean embedding: over all pairs (f - m) . (f' - m), but for the remainders.
        `row` and `column` count from 0 on the grid `of` the "query" or of the "result".
        """
        side, other = self.sides if of == "query" else self.sides[::-1]
        one_of("of", of, ("query", "result"))
        height, width = side.activations.shape[1:]
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"cell ({row}, {column}) is not on the {of}'s grid of {height} x {width}"
            )
        return self._matched(other, self._vectors(side, [row * width + column])[0])

    def matrix(self) -> np.ndarray:
        """Return `point` of every position, `[H W H' W']`."""
        vectors, both = self._kept or self._positions()
        ours, theirs = (each @ self.mean for each in vectors)
        n, others = both.shape
        less = ours[:, None] / others + theirs / n - float(self.mean @ self.mean) / (n * others)
        grids = [side.activations.shape[1:] for side in self.sides]
        return np.asarray((both - less).reshape(*grids[0], *grids[1]))

    @cached_property
    def _kept(self) -> tuple[list[np.ndarray], np.ndarray] | None:
        """What places and links both need, of pictures that are not divided into blocks."""
        sizes = [size for side in self.sides for size in side.activations.shape[1:]]
        return self._positions() if self.sides[0].direct and max(sizes) <= BLOCKS else None

    def _positions(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Return what each position gives to its embedding, `[n D]` of both, and their products."""
        vectors = [side.cell_vectors(range(side.activations[0].size)) for side in self.sides]
        return vectors, vectors[0] @ vectors[1].T

    def links(self, n: int = 5) -> list[Link]:
        """Return the best matching positions, best first, each position in one link at most.

        A link beside a better one (both ends next to its ends) is left out. Behind attention,
        links begin only at the query's 16 positions that give most.
        """
        n = whole("links", n)
        query, result = self.sides
        if query.direct:
            cells = np.arange(self.query.cells.size)
            pairs = self.matrix().reshape(len(cells), -1)
        else:
            cells = np.argsort(-self.query.cells, axis=None, kind="stable")[:_PROBED]
            vectors = self._vectors(query, cells.tolist())
            pairs = np.array([self._matched(result, v).ravel() for v in vectors])
        if self.within is not None:
            pairs = pairs * self.within.ravel()[cells, None]
        links: list[Link] = []
        starts = np.stack(np.divmod(cells, query.activations.shape[2]), -1)
        ends = np.stack(np.divmod(np.arange(pairs.shape[1]), result.activations.shape[2]), -1)
        # The next best one each time: sorting all pairs would take longer, and their number again.
        while len(links) < min(n, len(cells)):
            row, column = divmod(int(pairs.argmax()), pairs.shape[1])
            if pairs[row, column] <= 0:
                break
            (a, b), (c, d) = starts[row].tolist(), ends[column].tolist()
            links.append(Link((a, b), (c, d), float(pairs[row, column])))
            near = [np.abs(starts - (a, b)).max(1) <= 1, np.abs(ends - (c, d)).max(1) <= 1]
            pairs[np.ix_(*near)] = 0
            pairs[row], pairs[:, column] = 0, 0
        return links

    def to_dict(self, lines: int = 10, links: int = 5, places: int = 5) -> Json:
        """Return plain lists and numbers, ready for JSON; without pictures."""
        names = ("similarity", "exact", "centred", "shared", "outside", "remainder")
        found = self.places(places) if places else []
        return {name: getattr(self, name) for name in names} | {
            "places": [place.to_dict(self.unshared) for place in found],
            "held": list(self.held),
            "parts": self.parts,
            **self._channels(lines),
            "query": self.query.to_dict(),
            "result": self.result.to_dict(),
            "links": [
                {"query": list(a.query), "result": list(a.result), "contribution": a.contribution}
                for a in (self.links(links) if links else [])
            ],
        }

    def _draw(self, lines: int, links: int, title: str | None) -> Image.Image:
        amounts, found = self.amounts(lines), self.places()
        return receipt_picture(
            [self.query.tile(), self.result.tile()],
            amounts,
            self.total,
            apart=self.centred + (self.within is not None),
            headings=["Query", "Result"],
            places=[
                Matched(
                    (one.query, one.result), one.told(self.unshared), f"{one.contribution:+.3f}"
                )
                for one in found
            ],
            links=[
                (self.query.middle(*link.query), self.result.middle(*link.result))
                for link in (self.links(links) if links else [])
            ],
            crops=self._crops(amounts, lines),
            title=title,
            said=self._said(found),
            note="Red speaks for the match, blue against it; each map has its own scale. "
            + self._how,
        )

    def _said(self, places: Sequence[Place]) -> str:
        """Say how much of what the two share beyond the average these places carry."""
        if not places or self.unshared <= 0:
            return ""
        share = sum(place.contribution for place in places) / self.unshared
        several = f"These {len(places)} pairs of places carry" if len(places) > 1 else "It carries"
        whose = "the two share" if self.within is None else "the box and the result share"
        than = " (the other places speak against it)" if share > 1 else ""
        return f"{several} {share:.0%} of what {whose} beyond the average picture{than}."

    def __repr__(self) -> str:
        first = ", ".join(f"{a.words}: {a.contribution:+.3f}" for a in self.reasons(2))
        return (
            f"<Receipt: similarity {self.similarity:.3f} = {self.shared:.3f} shared with the "
            f"average image + {first}, ... {self.remainder:+.3f} remainder>"
        )

    def _vectors(self, side: Side, cells: Sequence[int]) -> np.ndarray:
        return np.asarray(side.cell_vectors(cells) - self.mean / side.activations[0].size)

    def _matched(self, other: Side, vector: np.ndarray) -> np.ndarray:
        _, cells, _ = other.products(vector)
        return cells - float(vector @ self.mean) / cells.size


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Total):
    """Why one result came above another.

    `score` is half of D(f, f'') - D(f, f'), D squared Euclidean, f' the result and f'' the rival;
    for embeddings of length 1 and inner products the difference of the similarities. `query` is
    what the query gives to it, negative where it speaks for the rival: `cells.sum() + remainder` is
    the score. `lengths` is the part of the remainder that the embeddings' own lengths give,
    (|f''|^2 - |f'|^2) / 2, 0 for inner products. `result` and `rival` are their receipts.
    """

    score: float
    result: Receipt
    rival: Receipt
    lengths: float = 0.0
    _alt = "query, result and rival, and what tells them apart"

    @property
    def total(self) -> tuple[str, float]:
        """The score, in words and a number."""
        return "more similar by", self.score

    def in_words(self, n: int = 5) -> list[str]:
        """Return a sentence where the rival is nearer than the result; else none."""
        names = self.rival.result.shown.name, self.result.result.shown.name
        return [f"{names[0]} is nearer than {names[1]}."] if self.score < 0 else []

    def amounts(self, n: int = 10) -> Amounts:
        """Return what adds up to the score, in words: n channels, and all that is left."""
        lengths = [("the embeddings' lengths", self.lengths)] if abs(self.lengths) >= _SMALL else []
        left = self.query.remainder - self.lengths
        return self._amounts(n, left, len(lengths)) + lengths

    def _divided(self, concepts: Concepts) -> tuple[np.ndarray, float]:
        return concepts.divide(self.channels, self.result.sides[0].activations)

    def to_dict(self, lines: int = 10) -> Json:
        """Return plain lists and numbers, ready for JSON; without pictures."""
        return {
            "score": self.score,
            "exact": self.exact,
            "similarities": [self.result.similarity, self.rival.similarity],
            "remainder": self.query.remainder,
            "parts": self.parts,
            **self._channels(lines),
            "query": self.query.to_dict(),
            "result": self.result.result.to_dict(),
            "rival": self.rival.result.to_dict(),
        }

    def _draw(self, lines: int, links: int, title: str | None) -> Image.Image:
        amounts = self.amounts(lines)
        how = "In all three red speaks for the result, blue for the rival: the maps of the two " + (
            "show what in them matches the query. Each map has its own scale."
        )
        results = [self.result.result.tile(), self.rival.result.tile(rival=True)]
        for tile, receipt in zip(results, (self.result, self.rival), strict=True):
            tile.subcaption += f"\nsimilarity {receipt.similarity:.3f}"
        return receipt_picture(
            [self.query.tile(), *results],
            amounts,
            self.total,
            headings=["Query", "Result", "Rival"],
            crops=self._crops(amounts, lines),
            title=title,
            note=" ".join([*self.in_words(), how, self.result._how]),
        )

    def __repr__(self) -> str:
        names = self.result.result.shown.name, self.rival.result.shown.name
        return f"<Comparison: {names[0]!r} above {names[1]!r} by {self.score:+.3f}>"


def make_receipt(
    query: Side,
    result: Side,
    mean: np.ndarray,
    *,
    centred: bool = True,
    query_shown: Shown = NOT_SHOWN,
    result_shown: Shown = NOT_SHOWN,
    within: np.ndarray | None = None,
    known: Known = NOTHING_KNOWN,
) -> Receipt:
    """Return the receipt of a pair behind one head, with the index's mean embedding `[D]`.

    With `within`, weights `[H W]` from 0 to 1, of that part of the query's positions; `known` is
    what the index says of channels and concepts.
    """
    apart = np.asarray(mean, np.float64) if centred else np.zeros(len(mean))
    similarity = float(query.embedding @ result.embedding)
    ours = evidence_of(query, result.embedding, similarity, apart, query_shown)
    theirs = evidence_of(result, query.embedding, similarity, apart, result_shown)
    if within is not None:
        ours = ours.restricted(query.products(result.embedding - apart, within))
        # What the part gives, with its share of what lies nowhere; see `places`.
        part, whole_query = query.vectors(np.stack([within, np.ones_like(within)]))
        direction = part + within.mean() * (query.embedding - whole_query - apart)
        theirs = theirs.restricted(result.products(direction))
    return Receipt(
        query=ours,
        channels=(ours.channels + theirs.channels) / 2,
        exact=query.exact and result.exact,
        similarity=similarity,
        result=theirs,
        shared=(ours.shared + theirs.shared) / 2,
        remainder=(ours.remainder + theirs.remainder) / 2,
        centred=centred,
        sides=(query, result),
        mean=apart,
        within=within,
        known=known,
    )


def keep_exemplars(receipts: Sequence[Total]) -> None:
    """Find the exemplars of the lines that receipts of one index show, all at once."""
    known = receipts[0].known
    channels = (lines_of("channel", one.channels, N_CHANNELS) for one in receipts)
    known.keep("channel", [line.number for lines in channels for line in lines])
    divided = (one.divided for one in receipts)
    concepts = (lines_of("concept", one[0], N_CONCEPTS) for one in divided if one is not None)
    known.keep("concept", [line.number for lines in concepts for line in lines])


def make_comparison(query: Side, result: Receipt, rival: Receipt, metric: str) -> Comparison:
    """Return why the result of one receipt came above another's, by the metric "l2" or "ip"."""
    ours, theirs = result.sides[1].embedding, rival.sides[1].embedding
    lengths = float(theirs @ theirs - ours @ ours) / 2 if metric == "l2" else 0.0
    score = result.similarity - rival.similarity + lengths
    evidence = evidence_of(query, ours - theirs, score, None, result.query.shown)
    of = score, result, rival, lengths
    return Comparison(evidence, evidence.channels, result.exact, *of, known=result.known)
