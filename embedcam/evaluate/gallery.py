"""The index as what is ranked: its labels, its nearest, and exact places in the ranking."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ..errors import InputError
from ..index import Index, nearest
from ..metrics import precision_at_r
from .queries import generator

HELD = 1 << 28
"""Bytes of embeddings that are kept in memory; a larger index is read anew for every ranking."""
BLOCK = 1 << 22
"""Similarities held at once."""


class Gallery:
    """The live images of an index.

    seed: of the cycle through them.
    positions: `[N]`; labels: `[N]`, None where there is none; codes: `[N]`, equal for equal labels,
    -1 for none. Labels that are numbers are left out: they are no classes.
    """

    def __init__(self, index: Index, seed: int = 0) -> None:
        self.index, self.seed, self.positions = index, seed, index.live_positions()
        if not len(self.positions):
            raise InputError(f"{index.path}: every image of this index has been removed")
        self.numbers = index.manifest.near_share is not None
        self.labels: list[str | None] = (
            [None] * len(self.positions) if self.numbers else index.labels[self.positions]
        )
        self._code: dict[str, int] = {}
        for label in self.labels:
            if label is not None:
                self._code.setdefault(label, len(self._code))
        self.codes = np.array([-1 if t is None else self._code[t] for t in self.labels], np.int64)
        self._places = np.full(index.n_rows, -1)
        self._places[self.positions] = np.arange(len(self.positions))
        small = len(self.positions) * index.width * 4 <= HELD
        self._held = index.embeddings(self.positions) if small else None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return bool(self._code)

    def code(self, label: str | None) -> int:
        """The code of a label, -1 for one that the index does not know."""
        return -1 if label is None else self._code.get(label, -1)

    def of_label(self, label: str) -> np.ndarray:
        """Rows of the index with a label."""
        return self.positions[self.codes == self.code(label)]

    def label_of(self, row: int) -> str | None:
        """The label of one row of the index."""
        return self.labels[int(self._places[row])]

    @cached_property
    def cycle(self) -> np.ndarray:
        """The row that follows each row in a seeded cycle through all live images, `[n_rows]`."""
        order = self.positions[generator(self.seed, "cycle").permutation(len(self))]
        following = np.full(self.index.n_rows, -1)
        following[order] = np.roll(order, -1)
        return following

    def nearest(self, embeddings: np.ndarray, own: np.ndarray, count: int) -> list[np.ndarray]:
        """Rows of the nearest images of each query, itself left out.

        Args:
            embeddings: `[b D]`.
            own: the queries' own rows `[b]`, -1 where the index does not hold them.
            count: rows wanted; fewer where the index has no more.
        """
        if self.index.manifest.faiss is not None:
            found = self.index.search(embeddings, count + 1).positions
        else:  # neighbours come from elsewhere; here brute force finds them
            rows = nearest(_Rows(self), embeddings, count + 1, self.index.metric).positions
            found = self.positions[rows]
        kept = [row[row != mine][:count] for row, mine in zip(found, own, strict=True)]
        if any(len(row) == 0 for row in kept):
            raise InputError(
                "the index holds nothing but the query itself, so nothing can explain it; "
                "evaluate with an index of more images"
            )
        return kept

    def nearest_of(self, embedding: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
        """Those of some rows of the index that are nearest to a query `[D]`, nearest first."""
        nearness, wide = np.empty(len(rows)), embedding.astype(np.float64)
        step = max(1, BLOCK // self.index.width)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            block = self.index.embeddings(rows[part]).astype(np.float64)
            nearness[part] = block @ wide
            if self.index.metric == "l2":
                nearness[part] = 2 * nearness[part] - (block**2).sum(1)
        nearest: np.ndarray = rows[np.argsort(-nearness, kind="stable")[:count]]
        return nearest

    def similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """How near every image is by the index's metric, `[b N]` float64: larger is nearer."""
        wide = np.asarray(embeddings, np.float64)
        out = np.empty((len(wide), len(self)))
        for start, block in self._blocks():
            part = wide @ block.T
            if self.index.metric == "l2":
                part = 2 * part - (block**2).sum(1) - (wide**2).sum(1)[:, None]
            out[:, start : start + len(block)] = part
        return out

    def chunks(self, total: int) -> Iterator[slice]:
        """0 .. total in pieces whose similarities fit in memory."""
        step = max(1, BLOCK // len(self))
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))

    def ranks(self, embeddings: np.ndarray, row: int, own: int) -> np.ndarray:
        """The place of one image in the ranking of each query, from 1; equals share their mean.

        Args:
            embeddings: of queries, `[b D]`.
            row: the image's row in the index.
            own: a row that takes no part, -1 for none.
        """
        from ..metrics import rank_of

        found = []
        for some in self.chunks(len(embeddings)):
            scores = self.similarities(embeddings[some])
            if own >= 0:
                scores[:, self._places[own]] = scores.min() - 1
            item = np.full(len(scores), self._places[row])
            found.append(rank_of(scores, item))
        return np.concatenate(found)

    def precision_at_r(
        self, embeddings: np.ndarray, labels: list[str | None], own: np.ndarray
    ) -> list[float | None]:
        """Average precision at R of each query; None for one without another of its label.

        Args:
            embeddings: `[b D]`.
            labels: of the queries.
            own: their rows in the index, -1 for none.
        """
        codes = np.array([self.code(label) for label in labels])
        found: list[float | None] = []
        for some in self.chunks(len(embeddings)):
            distances = -self.similarities(embeddings[some])
            alike = (codes[some, None] == self.codes) & (codes[some, None] >= 0)
            for place, mine in enumerate(own[some]):
                if mine >= 0:
                    distances[place, self._places[mine]] = np.inf
                    alike[place, self._places[mine]] = False
            scores = precision_at_r(distances, alike)
            found += [
                float(score) if any_alike else None
                for score, any_alike in zip(scores, alike.any(1), strict=True)
            ]
        return found

    def embeddings(self, places: slice) -> np.ndarray:
        """Stored embeddings of some of the live images, `[n D]`."""
        if self._held is not None:
            return self._held[places]
        return self.index.embeddings(self.positions[places])

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, (1 << 22) // self.index.width)
        for start in range(0, len(self), step):
            yield start, self.embeddings(slice(start, start + step)).astype(np.float64)


class _Rows:
    """The live embeddings as one array-like `[N D]`."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self.shape, self.dtype = (len(gallery), gallery.index.width), np.dtype(np.float32)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            return self._gallery.embeddings(rows)
        return self._gallery.index.embeddings(self._gallery.positions[rows])
