"""Why two pictures match, as a receipt: what every part gives, and a sum that is the similarity.

The similarity of a query f and a result f' is f . f'. With m the mean embedding of the index,

    f . f'  =  f . m  +  f . (f' - m)

the first part is what the query has in common with the average image; the second is what matches
*this* result, and it is divided among the query's positions and channels. The same with the roles
changed divides it among the result's. (`centred=False` divides f . f' itself: the positions that
are bright in any picture then take most of it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from PIL import Image

from .._checks import whole
from ..errors import InputError
from ..explain.drawing import save_picture
from ..preprocess import Extent
from ..render import Mark, Tile, draw_on_axes, in_notebook, receipt_picture
from .sides import Evidence, Side, evidence_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROBED = 16
"""Positions of the query that links begin at, where each costs a pass through the head."""
_SMALL = 5e-4
"""Remainders that would be shown as 0.000."""

Which = Literal["query", "result"]


@dataclass(frozen=True)
class Line:
    """A channel and what it gives to the score; the mean of what it gives on both sides."""

    channel: int
    contribution: float


@dataclass(frozen=True)
class Link:
    """Two positions, (row, column) each, and what their product gives to the similarity."""

    query: tuple[int, int]
    result: tuple[int, int]
    contribution: float


@dataclass(frozen=True, eq=False)
class Shown:
    """How to draw one picture of a receipt.

    `image` is upright, None where unknown; `extent` the rectangle of it that the network saw,
    (x0, y0, x1, y1) in pixels; `name` and `label` are of an indexed image.
    """

    image: Image.Image | None = None
    extent: Extent | None = None
    name: str = ""
    label: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Receipt:
    """Why a query and one result are similar.

    `similarity` is f . f', the inner product of the embeddings. `query` and `result` are what each
    side gives to it: of either `cells.sum() + shared + remainder` is the similarity, and so is
    `channels.sum() + ...`. `exact` is whether the contributions are exact (the head is average
    pooling and affine), or one vector-Jacobian product of the head on each side; the remainder then
    holds what is not of first order. `centred` is whether what the average image shares, by its
    embedding `mean` `[D]`, was put apart. `query_shown` and `result_shown` are the pictures.
    """

    similarity: float
    query: Evidence
    result: Evidence
    exact: bool
    centred: bool
    sides: tuple[Side, Side]
    mean: np.ndarray
    query_shown: Shown = field(default_factory=Shown)
    result_shown: Shown = field(default_factory=Shown)

    @property
    def channels(self) -> np.ndarray:
        """What each channel gives, `[K]`: the mean of both sides.

        `channels.sum() + shared + remainder` is the similarity.
        """
        mean: np.ndarray = (self.query.channels + self.result.channels) / 2
        return mean

    @property
    def shared(self) -> float:
        """What both have in common with the average image of the index: the mean of both sides."""
        return (self.query.shared + self.result.shared) / 2

    @property
    def remainder(self) -> float:
        """What no channel accounts for, see `Evidence`: the mean of both sides."""
        return (self.query.remainder + self.result.remainder) / 2

    def lines(self, n: int = 10) -> list[Line]:
        """Return the n channels that give most, by magnitude, largest contribution first."""
        return _top_lines(self.channels, n)

    def amounts(self, n: int = 10) -> list[tuple[str, float]]:
        """Return what adds up to the similarity: the average, n channels, all that is left."""
        shared = [("shared with the average", self.shared)] if self.centred else []
        return shared + _amounts(self.channels, n, self.remainder, self.exact)

    def point(self, row: int, column: int, of: Which = "query") -> np.ndarray:
        """Return what one position matches, `[H' W']` on the other picture's grid, signed.

        Of both positions' vectors (what each alone gives to the embedding) an equal share of the
        mean embedding is taken; the contribution is the product of what is left. Over all pairs the
        contributions sum to (f - m) . (f' - m), but for the remainders. `row` and `column` count
        from 0 on the position's own grid, that `of` the "query" or of the "result".
        """
        if of not in ("query", "result"):
            raise InputError(f'of = {of!r}; a cell is of the "query" or of the "result"')
        side, other = self.sides if of == "query" else self.sides[::-1]
        height, width = side.activations.shape[1:]
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"cell ({row}, {column}) is not on the {of}'s grid of {height} x {width}"
            )
        return self._matched(other, self._vectors(side, [row * width + column])[0])

    def matrix(self) -> np.ndarray:
        """Return `point` of every position, `[H W H' W']`.

        Where not `exact`, of as many head passes as positions.
        """
        grids = [side.activations.shape[1:] for side in self.sides]
        vectors = [
            self._vectors(side, range(height * width))
            for side, (height, width) in zip(self.sides, grids, strict=True)
        ]
        pairs: np.ndarray = (vectors[0] @ vectors[1].T).reshape(*grids[0], *grids[1])
        return pairs

    def links(self, n: int = 5) -> list[Link]:
        """Return the best matching positions, best first.

        A position is in one link at most, and a link that runs beside a better one (both ends next
        to its ends) is left out: it says the same. Where the receipt is not `exact`, links begin
        only at the query's 16 positions that give most.
        """
        n = whole("links", n)
        query, result = self.sides
        if self.exact:
            cells = np.arange(self.query.cells.size)
            pairs = self.matrix().reshape(len(cells), -1)
        else:
            cells = np.argsort(-self.query.cells, axis=None, kind="stable")[:_PROBED]
            vectors = self._vectors(query, cells.tolist())
            pairs = np.array([self._matched(result, v).ravel() for v in vectors])
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

    def to_dict(self, lines: int = 10, links: int = 5) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON; without pictures."""
        return {
            "similarity": self.similarity,
            "exact": self.exact,
            "centred": self.centred,
            "shared": self.shared,
            "remainder": self.remainder,
            **_channel_dicts(self.channels, lines),
            "query": _evidence_dict(self.query, self.query_shown),
            "result": _evidence_dict(self.result, self.result_shown),
            "links": [
                {"query": list(a.query), "result": list(a.result), "contribution": a.contribution}
                for a in (self.links(links) if links else [])
            ],
        }

    @overload
    def plot(
        self, *, lines: int = ..., links: int = ..., title: str | None = ..., ax: None = ...
    ) -> Image.Image: ...
    @overload
    def plot(
        self, *, lines: int = ..., links: int = ..., title: str | None = ..., ax: Axes
    ) -> Axes: ...
    def plot(
        self, *, lines: int = 10, links: int = 5, title: str | None = None, ax: Axes | None = None
    ) -> Image.Image | Axes:
        """Draw both pictures with their maps, the best matching positions, and the sum.

        With matplotlib axes `ax`, the query's map alone is drawn into them; they are returned.
        """
        if ax is not None:
            return draw_on_axes(ax, _tile(self.query, self.query_shown), title)
        return receipt_picture(
            [_tile(self.query, self.query_shown), _tile(self.result, self.result_shown)],
            self.amounts(lines),
            ("similarity", self.similarity),
            apart=int(self.centred),
            headings=["Query", "Result"],
            links=[
                Mark(
                    _center(link.query, self.query, self.query_shown),
                    _center(link.result, self.result, self.result_shown),
                )
                for link in self.links(links)
            ],
            title=title,
            note="Red speaks for the match, blue against it; each map has its own scale. Links "
            "join the cells that match best. " + _how(self.exact),
        )

    def save(self, path: str | Path, **choices: Any) -> Path:
        """Write the picture of `plot`, whose arguments are taken; the ending chooses the format."""
        return save_picture(lambda: self.plot(**choices), path)

    def _repr_html_(self) -> str:
        return in_notebook(self.plot(), "query and result, and what their similarity is made of")

    def __repr__(self) -> str:
        first = ", ".join(f"channel {a.channel}: {a.contribution:+.3f}" for a in self.lines(2))
        return (
            f"<Receipt: similarity {self.similarity:.3f} = {self.shared:.3f} shared with the "
            f"average image + {first}, ... {self.remainder:+.3f} remainder>"
        )

    def _vectors(self, side: Side, cells: Sequence[int]) -> np.ndarray:
        height, width = side.activations.shape[1:]
        vectors: np.ndarray = side.cell_vectors(cells) - self.mean / (height * width)
        return vectors

    def _matched(self, other: Side, vector: np.ndarray) -> np.ndarray:
        """Return `[H' W']` for a position's vector `[D]`."""
        _, cells = other.products(vector)
        return cells - float(vector @ self.mean) / cells.size


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Why one result came above another.

    `score` is half of D(f, f'') - D(f, f'), D squared Euclidean, f' the result and f'' the rival;
    for embeddings of length 1, and where the index ranks by inner products, the difference of the
    similarities. Positive: the result is nearer. `query` is what the query's positions and channels
    give to it: positive where it speaks for the result, negative for the rival. `cells.sum() +
    remainder` is the score, and `lengths` is part of that remainder: what the embeddings' own
    lengths give, (|f''|^2 - |f'|^2) / 2: of two equally similar results the shorter is nearer. 0
    for inner products. `result` and `rival` are the receipts of either with the query.
    """

    score: float
    query: Evidence
    result: Receipt
    rival: Receipt
    lengths: float = 0.0

    @property
    def query_shown(self) -> Shown:
        """The query's picture."""
        return self.result.query_shown

    @property
    def exact(self) -> bool:
        """As `Receipt.exact`."""
        return self.result.exact

    def lines(self, n: int = 10) -> list[Line]:
        """Return the n channels that give most to the score, by magnitude, largest first."""
        return _top_lines(self.query.channels, n)

    def amounts(self, n: int = 10) -> list[tuple[str, float]]:
        """Return what adds up to the score, in words: n channels, and all that is left."""
        amounts = _amounts(self.query.channels, n, self.query.remainder - self.lengths, self.exact)
        lengths = [("the embeddings' lengths", self.lengths)]
        return amounts + (lengths if abs(self.lengths) >= _SMALL else [])

    def to_dict(self, lines: int = 10) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON; without pictures."""
        return {
            "score": self.score,
            "exact": self.exact,
            "similarities": [self.result.similarity, self.rival.similarity],
            "remainder": self.query.remainder,
            **_channel_dicts(self.query.channels, lines),
            "query": _evidence_dict(self.query, self.query_shown),
            "result": _evidence_dict(self.result.result, self.result.result_shown),
            "rival": _evidence_dict(self.rival.result, self.rival.result_shown),
        }

    @overload
    def plot(self, *, lines: int = ..., title: str | None = ..., ax: None = ...) -> Image.Image: ...
    @overload
    def plot(self, *, lines: int = ..., title: str | None = ..., ax: Axes) -> Axes: ...
    def plot(
        self, *, lines: int = 10, title: str | None = None, ax: Axes | None = None
    ) -> Image.Image | Axes:
        """Draw the query and both results with their maps, and the sum, as one picture.

        With matplotlib axes `ax`, the query's map alone is drawn into them; they are returned.
        """
        if ax is not None:
            return draw_on_axes(ax, _tile(self.query, self.query_shown), title)
        receipts = (self.result, self.rival)
        results = [_tile(one.result, one.result_shown, one is self.rival) for one in receipts]
        for tile, receipt in zip(results, receipts, strict=True):
            tile.subcaption += f"\nsimilarity {receipt.similarity:.3f}"
        return receipt_picture(
            [_tile(self.query, self.query_shown), *results],
            self.amounts(lines),
            ("more similar by", self.score),
            headings=["Query", "Result", "Rival"],
            title=title,
            note="In all three red speaks for the result, blue for the rival: the maps of the two "
            "show what in them matches the query. Each map has its own scale. " + _how(self.exact),
        )

    def save(self, path: str | Path, **choices: Any) -> Path:
        """Write the picture of `plot`, as `Receipt.save`."""
        return save_picture(lambda: self.plot(**choices), path)

    def _repr_html_(self) -> str:
        return in_notebook(self.plot(), "query, result and rival, and what tells them apart")

    def __repr__(self) -> str:
        names = self.result.result_shown.name, self.rival.result_shown.name
        return f"<Comparison: {names[0]!r} above {names[1]!r} by {self.score:+.3f}>"


def make_receipt(
    query: Side,
    result: Side,
    mean: np.ndarray,
    *,
    centred: bool = True,
    query_shown: Shown | None = None,
    result_shown: Shown | None = None,
) -> Receipt:
    """Return the receipt of a pair behind one head, with the index's mean embedding `[D]`."""
    apart = np.asarray(mean, np.float64) if centred else np.zeros(len(mean))
    similarity = float(query.embedding @ result.embedding)
    return Receipt(
        similarity,
        evidence_of(query, result.embedding, similarity, apart),
        evidence_of(result, query.embedding, similarity, apart),
        query.exact and result.exact,
        centred,
        (query, result),
        apart,
        query_shown or Shown(),
        result_shown or Shown(),
    )


def make_comparison(query: Side, result: Receipt, rival: Receipt, metric: str) -> Comparison:
    """Return why the result of one receipt came above another's, by the metric "l2" or "ip"."""
    ours, theirs = result.sides[1].embedding, rival.sides[1].embedding
    lengths = float(theirs @ theirs - ours @ ours) / 2 if metric == "l2" else 0.0
    score = result.similarity - rival.similarity + lengths
    evidence = evidence_of(query, ours - theirs, score, None)
    return Comparison(score, evidence, result, rival, lengths)


def _top_lines(channels: np.ndarray, n: int) -> list[Line]:
    """Return the n channels of largest magnitude, sorted by contribution, largest first."""
    chosen = np.argsort(-np.abs(channels), kind="stable")[: whole("lines", n)]
    lines = [Line(int(channel), float(channels[channel])) for channel in chosen]
    return sorted(lines, key=lambda line: -line.contribution)


def _rest(channels: np.ndarray, lines: Sequence[Line]) -> float:
    """Return what the channels without a line of their own give together."""
    return float(channels.sum() - sum(line.contribution for line in lines))


def _amounts(
    channels: np.ndarray, n: int, remainder: float, exact: bool
) -> list[tuple[str, float]]:
    """Return n channels, all the others together, and the remainder where it is not rounding."""
    lines = _top_lines(channels, n)
    amounts = [(f"channel {line.channel}", line.contribution) for line in lines]
    if len(channels) > len(lines):
        amounts.append((f"{len(channels) - len(lines)} other channels", _rest(channels, lines)))
    if not exact or abs(remainder) >= _SMALL:
        amounts.append(("the head's bias" if exact else "not of first order", remainder))
    return amounts


def _channel_dicts(channels: np.ndarray, n: int) -> dict[str, Any]:
    lines = _top_lines(channels, n)
    return {
        "channels": [
            {"channel": line.channel, "contribution": line.contribution} for line in lines
        ],
        "other_channels": _rest(channels, lines),
    }


def _evidence_dict(evidence: Evidence, shown: Shown) -> dict[str, Any]:
    return {
        "id": shown.name,
        "label": shown.label,
        "cells": evidence.cells.astype(np.float32).tolist(),
        "shared": evidence.shared,
        "remainder": evidence.remainder,
        "extent": None if shown.extent is None else list(shown.extent),
    }


def _how(exact: bool) -> str:
    if exact:
        return "Contributions are exact: behind average pooling and an affine head all add up."
    return "Contributions are of first order; what is not is the last amount."


def _tile(evidence: Evidence, shown: Shown, rival: bool = False) -> Tile:
    """Return a picture with what in it speaks for (red) and against; a rival's the other way."""
    cells = -evidence.cells if rival else evidence.cells
    name, label = shown.name.rpartition("/")[2] or "query", shown.label or ""
    return Tile(shown.image, cells, shown.extent, name, label, signed=True)


def _center(cell: tuple[int, int], evidence: Evidence, shown: Shown) -> tuple[float, float]:
    """Return the middle of a position as shares of the picture's width and height."""
    height, width = evidence.cells.shape
    x, y = (cell[1] + 0.5) / width, (cell[0] + 0.5) / height
    if shown.image is None or shown.extent is None:
        return x, y
    x0, y0, x1, y1 = shown.extent
    x, y = (x0 + x * (x1 - x0)) / shown.image.width, (y0 + y * (y1 - y0)) / shown.image.height
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
