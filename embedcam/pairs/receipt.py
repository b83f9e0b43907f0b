"""Why two pictures match, as a receipt: what every part gives, and a sum that is the similarity.

The similarity of a query f and a result f' is f . f'. With m the mean embedding of the index,

    f . f'  =  f . m  +  f . (f' - m)

the first part is what the query has in common with the average image; the second is what matches
*this* result, and it is divided among the query's cells and channels. The same with the roles
changed divides it among the result's. (`centred=False` divides f . f' itself: the cells that are
bright in any picture then take most of it.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import InputError
from ..explain.drawing import save_picture
from .drawing import draw_comparison, draw_receipt
from .lines import SMALL, Line, amounts_of, as_dicts, check_count, other_channels, top_lines
from .sides import Evidence, Side, evidence_of

if TYPE_CHECKING:
    from PIL import Image

    from ..preprocess import Extent

_PROBED = 16
"""Cells of the query that links begin at, where each costs a pass through the head."""

Which = Literal["query", "result"]


@dataclass(frozen=True)
class Link:
    """Two cells, (row, column) each, and what their product gives to the similarity."""

    query: tuple[int, int]
    result: tuple[int, int]
    contribution: float


@dataclass(frozen=True, eq=False)
class Shown:
    """How to draw one picture of a receipt.

    image: upright, or None where only the network's input is known; extent: the rectangle of it
    that the network saw, (x0, y0, x1, y1) in pixels; name and label: of an indexed image.
    """

    image: "Image.Image | None" = None
    extent: "Extent | None" = None
    name: str = ""
    label: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Receipt:
    """Why a query and one result are similar.

    Attributes:
        similarity: f . f', the inner product of the embeddings.
        query, result: what each side's cells and channels give to it, `Evidence`: of either side
            `cells.sum() + shared + remainder` is the similarity, and so is `channels.sum() + ...`.
        exact: whether the contributions are exact (the head is average pooling and affine), or one
            vector-Jacobian product of the head on each side; the remainder then holds what is not
            of first order.
        centred: whether what the average image shares was put apart.
        query_shown, result_shown: their pictures.
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
        found: np.ndarray = (self.query.channels + self.result.channels) / 2
        return found

    @property
    def shared(self) -> float:
        """What both have in common with the average image of the index: the mean of both sides."""
        return (self.query.shared + self.result.shared) / 2

    @property
    def remainder(self) -> float:
        """What no channel accounts for, see `Evidence`: the mean of both sides."""
        return (self.query.remainder + self.result.remainder) / 2

    def lines(self, n: int = 10) -> list[Line]:
        """The n channels that give most, by magnitude, largest contribution first."""
        return top_lines(self.channels, n)

    def amounts(self, n: int = 10) -> list[tuple[str, float]]:
        """What adds up to the similarity, in words: the average, n channels, all that is left."""
        shared = [("shared with the average", self.shared)] if self.centred else []
        return shared + amounts_of(self.channels, n, self.remainder, self.exact)

    def point(self, row: int, column: int, of: Which = "query") -> np.ndarray:
        """What one cell matches: contributions of its pairs with every cell of the other picture.

        Of both cells' vectors v (what the cell alone gives to the embedding) an equal share of the
        mean embedding is taken; the contribution is the product of what is left. Over all pairs
        the contributions sum to (f - m) . (f' - m), but for the remainders.

        Args:
            row, column: the cell, from 0, on its own picture's grid.
            of: whose cell it is.

        Returns:
            `[H' W']` on the other picture's grid, signed.

        Raises:
            InputError: no such cell.
        """
        own, other = self.sides if of == "query" else self.sides[::-1]
        if of not in ("query", "result"):
            raise InputError(f'of = {of!r}; a cell is of the "query" or of the "result"')
        height, width = own.activations.shape[1:]
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"cell ({row}, {column}) is not on the {of}'s grid of {height} x {width}"
            )
        return self._matched(own, other, self._vectors(own, [row * width + column])[0])

    def matrix(self) -> np.ndarray:
        """`point` of every cell, `[H W H' W']`; where not `exact`, as many head passes as cells."""
        query, result = self.sides
        grids = query.activations.shape[1:], result.activations.shape[1:]
        ours, theirs = (
            self._vectors(side, range(grid[0] * grid[1]))
            for side, grid in zip(self.sides, grids, strict=True)
        )
        return (ours @ theirs.T).reshape(*grids[0], *grids[1])

    def links(self, n: int = 5) -> list[Link]:
        """The best matching cells, best first.

        A cell is in one link at most, and a link that runs beside a better one (both ends next to
        its ends) is left out: it says the same. Where the receipt is not `exact`, links begin only
        at the query's 16 cells that give most.

        Raises:
            InputError: n is no such number.
        """
        check_count(n, "links")
        query, result = self.sides
        (_, width), (_, wide) = query.activations.shape[1:], result.activations.shape[1:]
        if self.exact:
            cells = np.arange(self.query.cells.size)
            rows = self.matrix().reshape(len(cells), -1)
        else:
            cells = np.argsort(-self.query.cells, axis=None, kind="stable")[:_PROBED]
            vectors = self._vectors(query, cells.tolist())
            rows = np.array([self._matched(query, result, v).ravel() for v in vectors])
        found: list[Link] = []
        starts, ends = (np.stack(np.divmod(a, w), -1) for a, w in (
            (cells, width), (np.arange(rows.shape[1]), wide)))  # fmt: skip
        # The next best one each time: sorting all pairs would take longer, and their number again.
        while len(found) < min(n, len(cells)):
            row, column = divmod(int(rows.argmax()), rows.shape[1])
            if rows[row, column] <= 0:
                break
            start, end = starts[row], ends[column]
            found.append(
                Link((int(start[0]), int(start[1])), (int(end[0]), int(end[1])),
                     float(rows[row, column]))
            )  # fmt: skip
            beside = (np.abs(starts - start).max(1) <= 1, np.abs(ends - end).max(1) <= 1)
            rows[np.ix_(*beside)] = 0
            rows[row], rows[:, column] = 0, 0
        return found

    def to_dict(self, lines: int = 10, links: int = 5) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; without pictures."""
        return {
            "similarity": self.similarity,
            "exact": self.exact,
            "centred": self.centred,
            "shared": self.shared,
            "remainder": self.remainder,
            "channels": as_dicts(self.channels, lines),
            "other_channels": other_channels(self.channels, lines),
            "query": _evidence_dict(self.query, self.query_shown),
            "result": _evidence_dict(self.result, self.result_shown),
            "links": [
                {"query": list(a.query), "result": list(a.result), "contribution": a.contribution}
                for a in (self.links(links) if links else [])
            ],
        }

    def plot(self, *, lines: int = 10, links: int = 5, title: str | None = None) -> "Image.Image":
        """Both pictures with their maps and links, and the sum, as one picture."""
        return draw_receipt(self, lines, links, title)

    def save(self, path: str | Path, **choices: Any) -> Path:
        """Write the picture of `plot`, whose arguments are taken; the ending chooses the format.

        Raises:
            InputError: an ending that names no format, or a place that cannot be written.
        """
        return save_picture(lambda: self.plot(**choices), path)

    def _repr_html_(self) -> str:
        from ..render import in_notebook

        return in_notebook(self.plot(), "query and result, and what their similarity is made of")

    def __repr__(self) -> str:
        first = ", ".join(f"channel {a.channel}: {a.contribution:+.3f}" for a in self.lines(2))
        return (
            f"<Receipt: similarity {self.similarity:.3f} = {self.shared:.3f} shared with the "
            f"average image + {first}, ... {self.remainder:+.3f} remainder>"
        )

    def _vectors(self, side: Side, cells: Sequence[int]) -> np.ndarray:
        height, width = side.activations.shape[1:]
        return side.cell_vectors(cells) - self.mean / (height * width)

    def _matched(self, own: Side, other: Side, vector: np.ndarray) -> np.ndarray:
        """`[H' W']` for a cell's vector `[D]`."""
        _, cells = other.products(vector)
        return cells - float(vector @ self.mean) / cells.size


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Why one result came above another.

    The score is half of D(f, f'') - D(f, f'), D squared Euclidean, f' the result and f'' the rival;
    for embeddings of length 1, and where the index ranks by inner products, it is the difference of
    the similarities. Positive: the result is nearer.

    Attributes:
        score: as above.
        query: what the query's cells and channels give to the score: positive where it speaks for
            the result, negative for the rival. `cells.sum() + remainder` is the score, and
            `lengths` is part of that remainder.
        result, rival: the receipts of either with the query.
        lengths: what the embeddings' own lengths give, (|f''|^2 - |f'|^2) / 2: of two equally
            similar results the shorter is nearer. 0 for inner products.
        query_shown: the query's picture.
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
        """The n channels that give most to the score, by magnitude, largest first."""
        return top_lines(self.query.channels, n)

    def amounts(self, n: int = 10) -> list[tuple[str, float]]:
        """What adds up to the score, in words: n channels, and all that is left."""
        rest = self.query.remainder - self.lengths
        found = amounts_of(self.query.channels, n, rest, self.exact)
        if abs(self.lengths) >= SMALL:
            found.append(("the embeddings' lengths", self.lengths))
        return found

    def to_dict(self, lines: int = 10) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; without pictures."""
        return {
            "score": self.score,
            "exact": self.exact,
            "similarities": [self.result.similarity, self.rival.similarity],
            "remainder": self.query.remainder,
            "channels": as_dicts(self.query.channels, lines),
            "other_channels": other_channels(self.query.channels, lines),
            "query": _evidence_dict(self.query, self.query_shown),
            "result": _evidence_dict(self.result.result, self.result.result_shown),
            "rival": _evidence_dict(self.rival.result, self.rival.result_shown),
        }

    def plot(self, *, lines: int = 10, title: str | None = None) -> "Image.Image":
        """The query and both results with their maps, and the sum, as one picture."""
        return draw_comparison(self, lines, title)

    def save(self, path: str | Path, **choices: Any) -> Path:
        """As `Receipt.save`."""
        return save_picture(lambda: self.plot(**choices), path)

    def _repr_html_(self) -> str:
        from ..render import in_notebook

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
    """The receipt of a pair.

    Args:
        query, result: both behind one head.
        mean: the index's mean embedding, `[D]`.
        centred: put what the average image shares apart.
        query_shown, result_shown: how to draw them.
    """
    used = np.asarray(mean, np.float64) if centred else np.zeros(len(mean))
    similarity = float(query.embedding @ result.embedding)
    return Receipt(
        similarity,
        evidence_of(query, result.embedding, similarity, used),
        evidence_of(result, query.embedding, similarity, used),
        query.exact and result.exact,
        centred,
        (query, result),
        used,
        query_shown or Shown(),
        result_shown or Shown(),
    )


def make_comparison(query: Side, result: Receipt, rival: Receipt, metric: str) -> Comparison:
    """Why the result of one receipt came above that of another.

    Args:
        query: the side both receipts share.
        result, rival: of the same query.
        metric: the index's, "l2" or "ip".
    """
    ours, theirs = result.sides[1].embedding, rival.sides[1].embedding
    lengths = float(theirs @ theirs - ours @ ours) / 2 if metric == "l2" else 0.0
    score = result.similarity - rival.similarity + lengths
    evidence = evidence_of(query, ours - theirs, score, None)
    return Comparison(score, evidence, result, rival, lengths)


def _evidence_dict(evidence: Evidence, shown: Shown) -> dict[str, Any]:
    return {
        "id": shown.name,
        "label": shown.label,
        "cells": evidence.cells.astype(np.float32).tolist(),
        "shared": evidence.shared,
        "remainder": evidence.remainder,
        "extent": None if shown.extent is None else list(shown.extent),
    }
