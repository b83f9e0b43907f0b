"""The index as what is ranked: labels, nearest images, exact ranks, and the queries it holds."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..images import ImageSource, Item
from ..index import Index
from ..metrics import precision_at_r, rank_of

SAME = 1e-4
"""Relative squared distance up to which the same id is the same picture, in half precision too."""
HELD, BLOCK = 1 << 28, 1 << 22
"""Bytes of embeddings that are kept in memory; numbers of them, and similarities, held at once."""


def sample(total: int, limit: int | None, seed: int) -> np.ndarray:
    """Return a seeded sample of 0 .. total in rising order; all of it without a limit."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))


def generator(seed: int, *words: object) -> np.random.Generator:
    """Return random numbers of the seed and the words alone, not of what was drawn before."""
    digest = blake2b("\0".join(map(str, words)).encode("utf-8", "surrogatepass"), digest_size=16)
    return np.random.default_rng([seed, int.from_bytes(digest.digest(), "little")])


class Gallery:
    """The live images of an index: `positions [N]`, `labels [N]`, `codes [N]` (-1 for no label).

    Labels that are numbers are left out: they are no classes.
    """

    def __init__(self, index: Index, seed: int = 0) -> None:
        self.index, self.seed, self.positions = index, seed, index.live_positions()
        if not len(self.positions):
            raise InputError(f"{index.path}: every image of this index has been removed")
        self.numbers = index.manifest.near_share is not None
        self.labels: list[str | None] = (
            [None] * len(self.positions) if self.numbers else index.labels[self.positions]
        )
        names = dict.fromkeys(label for label in self.labels if label is not None)
        self._code = {label: code for code, label in enumerate(names)}
        self.codes = np.array([self.code(label) for label in self.labels], np.int64)
        self._places = np.full(index.n_rows, -1)
        self._places[self.positions] = np.arange(len(self.positions))
        small = len(self.positions) * index.width * 4 <= HELD
        self._held = index.embeddings(self.positions) if small else None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labeled(self) -> bool:
        """Return whether any image has a label."""
        return bool(self._code)

    def code(self, label: str | None) -> int:
        """Return the code of a label, -1 for one that the index does not know."""
        return -1 if label is None else self._code.get(label, -1)

    def of_label(self, label: str) -> np.ndarray:
        """Return the rows of the index with a label."""
        rows: np.ndarray = self.positions[self.codes == self.code(label)]
        return rows

    def label_of(self, row: int) -> str | None:
        """Return the label of one row of the index."""
        return self.labels[int(self._places[row])]

    @cached_property
    def cycle(self) -> np.ndarray:
        """Return the row after each row in a seeded cycle through all live images, `[n_rows]`."""
        order = self.positions[generator(self.seed, "cycle").permutation(len(self))]
        following = np.full(self.index.n_rows, -1)
        following[order] = np.roll(order, -1)
        return following

    def nearest(self, embeddings: np.ndarray, own_rows: np.ndarray, count: int) -> list[np.ndarray]:
        """Return up to `count` nearest rows of each query `[b D]`, its own row `[b]` left out."""
        if self.index.manifest.faiss is not None:
            rows = self.index.search(embeddings, count + 1).positions
        else:  # neighbors come from elsewhere; here brute force finds them
            rows = np.stack([self.nearest_of(one, None, count + 1) for one in embeddings])
        kept = [row[row != own][:count] for row, own in zip(rows, own_rows, strict=True)]
        if any(len(row) == 0 for row in kept):
            raise InputError(
                "the index holds nothing but the query itself; evaluate an index of more images"
            )
        return kept

    def nearest_of(self, embedding: np.ndarray, rows: np.ndarray | None, count: int) -> np.ndarray:
        """Return the `count` of some rows nearest to a query `[D]`, nearest first; None: of all."""
        nearness = self.similarities(embedding[None], rows)[0]
        some = self.positions if rows is None else rows
        nearest: np.ndarray = some[np.argsort(-nearness, kind="stable")[:count]]
        return nearest

    def similarities(self, embeddings: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return how near rows are to `[b D]`, `[b N]` float64, larger is nearer; None: all."""
        wide = np.asarray(embeddings, np.float64)
        some = self.positions if rows is None else rows
        nearness = np.empty((len(wide), len(some)))
        step = max(1, BLOCK // self.index.width)
        for start in range(0, len(some), step):
            part = slice(start, start + step)
            whole = rows is None and self._held is not None
            stored = self._held[part] if whole else self.index.embeddings(some[part])  # type: ignore[index]
            block = stored.astype(np.float64)
            nearness[:, part] = wide @ block.T
            if self.index.metric == "l2":
                squares = (block**2).sum(1) + (wide**2).sum(1)[:, None]
                nearness[:, part] = 2 * nearness[:, part] - squares
        return nearness

    def ranks(self, embeddings: np.ndarray, row: int, own_row: int) -> np.ndarray:
        """Return a row's mean rank for each query `[b D]`, from 1, without `own_row` (-1: none)."""
        ranks = []
        for some in self._chunks(len(embeddings)):
            scores = self.similarities(embeddings[some])
            if own_row >= 0:
                scores[:, self._places[own_row]] = scores.min() - 1
            ranks.append(rank_of(scores, np.full(len(scores), self._places[row])))
        return np.concatenate(ranks)

    def precision_at_r(
        self, embeddings: np.ndarray, labels: Sequence[str | None], own_rows: np.ndarray
    ) -> list[float | None]:
        """Return average precision at R of queries `[b D]`; None without another of the label."""
        codes = np.array([self.code(label) for label in labels])
        precisions: list[float | None] = []
        for some in self._chunks(len(embeddings)):
            distances = -self.similarities(embeddings[some])
            alike = (codes[some, None] == self.codes) & (codes[some, None] >= 0)
            held = np.flatnonzero(own_rows[some] >= 0)
            own = self._places[own_rows[some][held]]
            distances[held, own] = np.inf
            alike[held, own] = False
            scores = precision_at_r(distances, alike).tolist()
            known = alike.any(1).tolist()
            precisions += [one if any_ else None for one, any_ in zip(scores, known, strict=True)]
        return precisions

    def _chunks(self, total: int) -> Iterator[slice]:
        step = max(1, BLOCK // len(self))
        return (slice(start, min(start + step, total)) for start in range(0, total, step))


class OwnRows:
    """Where the index holds the queried images: the same file, or the same id and embedding.

    An index is moved together with its pictures, and `a/1.jpg` may be another picture elsewhere. A
    prototype has the path of one merged image: it is that one where the embedding is its own.
    """

    def __init__(
        self, index: Index, source: ImageSource, positions: np.ndarray, root: Path | None
    ) -> None:
        self._index, self._source, self.asked = index, source, len(positions)
        self._merged = index.manifest.is_compressed
        items = [source.items[position] for position in positions.tolist()]
        self._by_id = index.find_live([item.id for item in items])
        wanted = {_absolute(source.root, item.path) for item in items if item.path}
        self._by_path: dict[str, int] = {}
        live = index.live_positions() if root is not None and wanted else positions[:0]
        for start in range(0, len(live), 65536):
            some = live[start : start + 65536]
            for place, path in zip(some.tolist(), index.paths[some], strict=True):
                if path and (full := _absolute(root, path)) in wanted:
                    self._by_path[full] = place
        self._known: dict[int, int] = {}

    def known(self, positions: Sequence[int]) -> np.ndarray:
        """Return the rows that `find` found before, `[b]`."""
        return np.array([self._known[position] for position in positions])

    def unsure(self, positions: Sequence[int]) -> bool:
        """Return whether only the embeddings of these images can tell."""
        places = [self._candidate(self._source.items[position]) for position in positions]
        return any(place >= 0 and not sure for place, sure in places)

    def find(self, positions: Sequence[int], embeddings: np.ndarray | None) -> np.ndarray:
        """Return rows of images, -1 for none; their embeddings `[b D]` settle what is unsure."""
        rows = np.full(len(positions), -1)
        for number, position in enumerate(positions):
            place, sure = self._candidate(self._source.items[position])
            if sure:
                rows[number] = place
            elif embeddings is not None and place >= 0:
                stored = self._index.embeddings([place])[0].astype(np.float64)
                if ((stored - embeddings[number]) ** 2).sum() <= SAME * (stored**2).sum():
                    rows[number] = place
        self._known.update(zip(positions, rows.tolist(), strict=True))
        return rows

    def _candidate(self, item: Item) -> tuple[int, bool]:
        full = _absolute(self._source.root, item.path) if item.path else ""
        if full in self._by_path:
            return self._by_path[full], not self._merged
        return self._by_id.get(item.id, -1), False


def _absolute(root: object, path: str) -> str:
    return os.path.abspath(os.path.join(str(root), path) if root is not None else path)
