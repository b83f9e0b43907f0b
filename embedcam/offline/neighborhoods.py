"""The nearest other images of every image of a collection: what explains those without a label.

Exact among few images. Among many an inverted file proposes candidates and exact distances rank
them, so that an image costs the same however many there are: lists of one size, a fixed number of
them looked at, centroids trained on a sample that grows with their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from ..index import nearest
from ..index.search import SLACK, rank

EXACT = 1 << 13
"""Images up to which every one is compared with all."""
LIST, PROBES, TRAINED, ROUNDS = 512, 16, 64, 10
"""Images a list, lists looked at, images a centroid is trained on, and rounds of it."""
_BLOCK = 1 << 14
_GATHERED = 8 << 20
"""Numbers of candidates' embeddings held at once."""


class NearestOthers:
    """Finds the nearest other images of images; the same for an image in whatever company.

    Args:
        embeddings: `[N D]`; may be a memory map.
        exact: how many images are compared with all others.
    """

    def __init__(self, embeddings: np.ndarray, exact: int = EXACT) -> None:
        self.embeddings, self.exact = embeddings, exact

    def __call__(self, anchors: np.ndarray, k: int) -> np.ndarray:
        """Positions `[a k]` of the k nearest others of the images at `[a]`, nearest first.

        By squared Euclidean distance, ties by position; of many images now and then one of the k is
        missed, and a farther one stands in for it.
        """
        anchors = np.asarray(anchors, np.int64)
        if len(self.embeddings) <= max(self.exact, k + 1):
            queries = np.asarray(self.embeddings[anchors])
            found = nearest(self.embeddings, queries, k + 1).positions
        else:
            step = max(1, _GATHERED // ((k + 1 + SLACK) * self.embeddings.shape[1]))
            parts = [anchors[start : start + step] for start in range(0, len(anchors), step)]
            found = np.concatenate([self._proposed(part, k) for part in parts])
        # A duplicate may stand before the anchor itself, or push it out of the list.
        rows = zip(anchors, found, strict=True)
        return np.stack([row[row != anchor][:k] for anchor, row in rows])

    def _proposed(self, anchors: np.ndarray, k: int) -> np.ndarray:
        """The k + 1 nearest of the inverted file's candidates; where it has too few, of all."""
        queries = np.ascontiguousarray(self.embeddings[anchors], np.float32)
        with _row_by_row():
            candidates = self._lists.search(queries, k + 1 + SLACK)[1]
        found = np.empty((len(anchors), k + 1), np.int64)
        full = candidates[:, k] >= 0
        if full.any():
            some = candidates[full]
            # Where there are fewer than asked for, `rank` leaves out what is not there.
            vectors = np.asarray(self.embeddings[np.maximum(some, 0)])
            found[full] = rank(queries[full], some, vectors, k + 1, "l2").positions
        if not full.all():
            found[~full] = nearest(self.embeddings, queries[~full], k + 1).positions
        return found

    @cached_property
    def _lists(self) -> Any:
        """Every embedding in eight bits a number, in lists by its nearest centroid."""
        import faiss

        n, width = self.embeddings.shape
        n_lists = max(1, n // LIST)
        made: Any = faiss.index_factory(width, f"IVF{n_lists},SQ8")
        made.cp.niter, made.nprobe = ROUNDS, min(PROBES, n_lists)
        sample = np.sort(np.random.default_rng(0).permutation(n)[: TRAINED * n_lists])
        made.train(np.ascontiguousarray(self.embeddings[sample], np.float32))
        for start in range(0, n, _BLOCK):
            made.add(np.ascontiguousarray(self.embeddings[start : start + _BLOCK], np.float32))
        return made


@contextmanager
def _row_by_row() -> Iterator[None]:
    """Queries compared with centroids one by one: products of many would round by their number."""
    import faiss

    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1 << 30
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
