"""Why two pictures match, as a receipt: what every part gives, and a sum that is the similarity.

The similarity of a query f and a result f' is f . f'. With m the mean embedding of the index,

    f . f'  =  f . m  +  f . (f' - m)

the first part is what the query has in common with the average image; the second, what matches
*this* result, is divided among the query's positions and channels, and likewise among the result's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from PIL import Image

from .._checks import whole
from ..errors import InputError
from ..explain.drawing import save_picture
from ..preprocess import Extent
from ..render import Tile, draw_on_axes, in_notebook, receipt_picture
from .sides import Contributions, Side, evidence_of

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
    """How to draw one picture of a receipt; `name` and `label` are of an indexed image."""

    image: Image.Image | None = None  # upright
    extent: Extent | None = None  # of it what the network saw, (x0, y0, x1, y1) in pixels
    name: str = ""
    label: str | None = None


_UNKNOWN = Shown()


@dataclass(frozen=True, eq=False, repr=False)
class Receipt:
    """Why a query and one result are similar.

    `similarity` is f . f', and `query` and `result` are what each side gives to it: of either
    `cells.sum() + shared + remainder`, and `channels.sum() + ...`, is the similarity. Where not
    `exact` (the head is more than average pooling and affine), the remainder holds what is not of
    first order. `centred` is whether what the average image shares, `mean` `[D]`, was put apart.
    """

    similarity: float
    query: Contributions
    result: Contributions
    exact: bool
    centred: bool
    sides: tuple[Side, Side]
    mean: np.ndarray
    query_shown: Shown = _UNKNOWN
    result_shown: Shown = _UNKNOWN

    @property
    def channels(self) -> np.ndarray:
        """What each channel gives, `[K]`: the mean of both sides."""
        return np.asarray((self.query.channels + self.result.channels) / 2)

    @property
    def shared(self) -> float:
        """What both have in common with the average image of the index: the mean of both sides."""
        return (self.query.shared + self.result.shared) / 2

    @property
    def remainder(self) -> float:
        """What no channel accounts for: the mean of both sides."""
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

        The product of both positions' vectors (what each alone gives to the embedding), each less
        its share of the mean embedding: over all pairs (f - m) . (f' - m), but for the remainders.
        `row` and `column` count from 0 on the grid `of` the "query" or of the "result".
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
        """Return `point` of every position, `[H W H' W']`; a head pass each where not `exact`."""
        grids = [side.activations.shape[1:] for side in self.sides]
        vectors = [
            self._vectors(side, range(height * width))
            for side, (height, width) in zip(self.sides, grids, strict=True)
        ]
        return np.asarray((vectors[0] @ vectors[1].T).reshape(*grids[0], *grids[1]))

    def links(self, n: int = 5) -> list[Link]:
        """Return the best matching positions, best first, each position in one link at most.

        A link beside a better one (both ends next to its ends) is left out. Where not `exact`,
        links begin only at the query's 16 positions that give most.
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
        names = ("similarity", "exact", "centred", "shared", "remainder")
        return {name: getattr(self, name) for name in names} | {
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
                (
                    _center(link.query, self.query, self.query_shown),
                    _center(link.result, self.result, self.result_shown),
                )
                for link in self.links(links)
            ],
            title=title,
            note="Red speaks for the match, blue against it; each map has its own scale. Links "
            "join the cells that match best. " + _HOW[self.exact],
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
        return np.asarray(side.cell_vectors(cells) - self.mean / side.activations[0].size)

    def _matched(self, other: Side, vector: np.ndarray) -> np.ndarray:
        _, cells = other.products(vector)
        return cells - float(vector @ self.mean) / cells.size


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Why one result came above another.

    `score` is half of D(f, f'') - D(f, f'), D squared Euclidean, f' the result and f'' the rival;
    for embeddings of length 1 and inner products the difference of the similarities. `query` is
    what the query gives to it, negative where it speaks for the rival: `cells.sum() + remainder` is
    the score. `lengths` is the part of the remainder that the embeddings' own lengths give,
    (|f''|^2 - |f'|^2) / 2, 0 for inner products. `result` and `rival` are their receipts.
    """

    score: float
    query: Contributions
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
            "show what in them matches the query. Each map has its own scale. " + _HOW[self.exact],
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
    query_shown: Shown = _UNKNOWN,
    result_shown: Shown = _UNKNOWN,
) -> Receipt:
    """Return the receipt of a pair behind one head, with the index's mean embedding `[D]`."""
    apart = np.asarray(mean, np.float64) if centred else np.zeros(len(mean))
    similarity = float(query.embedding @ result.embedding)
    gives = (
        evidence_of(query, result.embedding, similarity, apart),
        evidence_of(result, query.embedding, similarity, apart),
    )
    exact, sides = query.exact and result.exact, (query, result)
    return Receipt(similarity, *gives, exact, centred, sides, apart, query_shown, result_shown)


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
    return float(channels.sum() - sum(line.contribution for line in lines))


def _amounts(
    channels: np.ndarray, n: int, remainder: float, exact: bool
) -> list[tuple[str, float]]:
    lines = _top_lines(channels, n)
    amounts = [(f"channel {line.channel}", line.contribution) for line in lines]
    if len(channels) > len(lines):
        amounts.append((f"{len(channels) - len(lines)} other channels", _rest(channels, lines)))
    if not exact or abs(remainder) >= _SMALL:
        amounts.append(("the head's bias" if exact else "not of first order", remainder))
    return amounts


def _channel_dicts(channels: np.ndarray, n: int) -> dict[str, Any]:
    lines = _top_lines(channels, n)
    return {"channels": [asdict(line) for line in lines], "other_channels": _rest(channels, lines)}


def _evidence_dict(evidence: Contributions, shown: Shown) -> dict[str, Any]:
    return {
        "id": shown.name,
        "label": shown.label,
        "cells": evidence.cells.astype(np.float32).tolist(),
        "shared": evidence.shared,
        "remainder": evidence.remainder,
        "extent": None if shown.extent is None else list(shown.extent),
    }


_HOW = {
    True: "Contributions are exact: behind average pooling and an affine head all add up.",
    False: "Contributions are of first order; what is not is the last amount.",
}


def _tile(evidence: Contributions, shown: Shown, rival: bool = False) -> Tile:
    cells = -evidence.cells if rival else evidence.cells
    name, label = shown.name.rpartition("/")[2] or "query", shown.label or ""
    return Tile(shown.image, cells, shown.extent, name, label, signed=True)


def _center(cell: tuple[int, int], evidence: Contributions, shown: Shown) -> tuple[float, float]:
    """Return the middle of a position as shares of the picture's width and height."""
    height, width = evidence.cells.shape
    x, y = (cell[1] + 0.5) / width, (cell[0] + 0.5) / height
    if shown.image is None or shown.extent is None:
        return x, y
    x0, y0, x1, y1 = shown.extent
    x, y = (x0 + x * (x1 - x0)) / shown.image.width, (y0 + y * (y1 - y0)) / shown.image.height
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
