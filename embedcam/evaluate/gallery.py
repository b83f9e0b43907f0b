"""The index as what is ranked: labels, nearest images, exact ranks, and the queries it holds."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np

from ..errors import InputError
from ..images import ImageSource, Root
from ..index import Index
from ..index.rows import IndexRows
from ..index.search import nearest
from ..metrics import precision_at_r, rank_of
from .regions import absolute

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
    """The live images of an index: `positions [N]`, `codes [N]` of labels (-1 for none).

    Labels that are numbers are left out: they are no classes.
    """

    def __init__(self, index: Index, seed: int = 0) -> None:
        self.index, self.seed, self.positions = index, seed, index.live_positions()
        if not len(self.positions):
            raise InputError(f"{index.path}: every image of this index has been removed")
        self.numbers = index.manifest.near_share is not None
        labels = [None] * len(self) if self.numbers else index.labels[self.positions]
        self._labels = list(dict.fromkeys(label for label in labels if label is not None))
        self.labeled = bool(self._labels)
        self._codes = {label: code for code, label in enumerate(self._labels)}
        self.codes = np.array([self.code(label) for label in labels], np.int64)
        self._places = np.full(index.n_rows, -1)
        self._places[self.positions] = np.arange(len(self))
        self._stored: IndexRows | np.ndarray = IndexRows(index, self.positions)
        if len(self) * index.width * 4 <= HELD:
            self._stored = index.embeddings(self.positions)

    def __len__(self) -> int:
        return len(self.positions)

    def code(self, label: str | None) -> int:
        """Return the code of a label, -1 for one that the index does not know."""
        return -1 if label is None else self._codes.get(label, -1)

    def of_label(self, label: str) -> np.ndarray:
        """Return the rows of the index with a label."""
        return np.asarray(self.positions[self.codes == self.code(label)])

    def label_of(self, row: int) -> str | None:
        """Return the label of one row of the index."""
        code = self.codes[self._places[row]]
        return None if code < 0 else self._labels[code]

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
            found = nearest(self._stored, embeddings, count + 1, self.index.metric)
            rows = self.positions[found.positions]
        kept = [row[row != own][:count] for row, own in zip(rows, own_rows, strict=True)]
        if any(len(row) == 0 for row in kept):
            raise InputError(
                "the index holds nothing but the query itself; evaluate an index of more images"
            )
        return kept

    def nearest_of(self, embedding: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
        """Return the `count` of some rows nearest to a query `[D]`, nearest first."""
        if not len(rows):
            return rows
        stored = IndexRows(self.index, rows)
        found = nearest(stored, embedding[None], count, self.index.metric)
        return np.asarray(rows[found.positions[0]])

    def ranks(self, embeddings: np.ndarray, row: int, own_row: int) -> np.ndarray:
        """Return a row's mean rank for each query `[b D]`, from 1, without `own_row` (-1: none)."""
        ranks = []
        for _, scores in self._compared(embeddings):
            if own_row >= 0:
                scores[:, self._places[own_row]] = scores.min() - 1
            ranks.append(rank_of(scores, np.full(len(scores), self._places[row])))
        return np.concatenate(ranks)

    def precision_at_r(
        self, embeddings: np.ndarray, labels: Sequence[str | None], own_rows: np.ndarray
    ) -> list[float | None]:
        """Return average precision at R of queries `[b D]`; None without another of the label."""
        codes = np.array([self.code(label) for label in labels])[:, None]
        precisions: list[float | None] = []
        for some, scores in self._compared(embeddings):
            alike = (codes[some] == self.codes) & (codes[some] >= 0)
            held = np.flatnonzero(own_rows[some] >= 0)
            own = self._places[own_rows[some][held]]
            scores[held, own], alike[held, own] = -np.inf, False
            found = zip(precision_at_r(-scores, alike).tolist(), alike.any(1), strict=True)
            precisions += [one if known else None for one, known in found]
        return precisions

    def _compared(self, embeddings: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield a few queries at a time and how near all images are, `[b N]`, larger is nearer."""
        queries, step = max(1, BLOCK // len(self)), max(1, BLOCK // self.index.width)
        for some in (slice(at, at + queries) for at in range(0, len(embeddings), queries)):
            wide = np.asarray(embeddings[some], np.float64)
            nearness = np.empty((len(wide), len(self)))
            for part in (slice(at, at + step) for at in range(0, len(self), step)):
                block = self._stored[part].astype(np.float64)
                nearness[:, part] = wide @ block.T
                if self.index.metric == "l2":
                    squares = (block**2).sum(1) + (wide**2).sum(1)[:, None]
                    nearness[:, part] = 2 * nearness[:, part] - squares
            yield some, nearness


class OwnRows:
    """Where the index holds the queried images: the same file, or the same id and embedding.

    An index is moved together with its pictures, and `a/1.jpg` may be another picture elsewhere. A
    prototype has the path of one merged image: it is that one where the embedding is its own.
    """

    def __init__(
        self, index: Index, source: ImageSource, positions: np.ndarray, root: Root | None
    ) -> None:
        self._index, self._source, self.asked = index, source, len(positions)
        items = [source.items[position] for position in positions.tolist()]
        self._by_id = index.find_live([item.id for item in items])
        wanted = {absolute(source.root, item.path) for item in items if item.path}
        self._by_path: dict[str, int] = {}
        live = index.live_positions() if root is not None and wanted else positions[:0]
        for start in range(0, len(live), 65536):
            some = live[start : start + 65536]
            for row, path in zip(some.tolist(), index.paths[some], strict=True):
                if path and (full := absolute(root, path)) in wanted:
                    self._by_path[full] = row
        self._known: dict[int, int] = {}

    def known(self, positions: Sequence[int]) -> np.ndarray:
        """Return the rows that `find` found before, `[b]`."""
        return np.array([self._known[position] for position in positions])

    def find(self, positions: Sequence[int], embeddings: np.ndarray) -> np.ndarray:
        """Return rows of images, -1 for none; their embeddings `[b D]` settle what is unsure."""
        for position, embedding in zip(positions, embeddings, strict=True):
            item = self._source.items[position]
            path = absolute(self._source.root, item.path) if item.path else ""
            row = self._by_path.get(path, self._by_id.get(item.id, -1))
            sure = path in self._by_path and not self._index.manifest.is_compressed
            if row >= 0 and not sure:
                stored = self._index.embeddings([row])[0].astype(np.float64)
                if ((stored - embedding) ** 2).sum() > SAME * (stored**2).sum():
                    row = -1
            self._known[position] = row
        return self.known(positions)
