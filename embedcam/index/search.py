"""Nearest neighbours by exact values: FAISS proposes candidates, the embeddings decide."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import LARGEST, check_vectors, whole
from ..errors import InputError
from .files import ArrayLike, blocks

SLACK = 16
"""Candidates beyond k, so that rounding inside FAISS cannot push out a true neighbour."""


@dataclass(frozen=True)
class Neighbors:
    """The k nearest rows of each query, nearest first.

    Attributes:
        positions: int64 `[B k]`, rows of the index.
        distances: float32 `[B k]`, squared Euclidean: smaller is nearer.
        similarities: float32 `[B k]`, inner products: larger is nearer.
    """

    positions: np.ndarray
    distances: np.ndarray
    similarities: np.ndarray

    def first(self, count: int | None) -> "Neighbors":
        """The first `count` of one query's results `[n]`; all of them for None."""
        return Neighbors(self.positions[:count], self.distances[:count], self.similarities[:count])

    @classmethod
    def of(
        cls, positions: np.ndarray, distances: np.ndarray, similarities: np.ndarray
    ) -> "Neighbors":
        """Neighbours from exact values, float64.

        Raises:
            InputError: a value beyond float32, of stored embeddings whose numbers are too large.
        """
        with np.errstate(over="ignore"):
            values = distances.astype(np.float32), similarities.astype(np.float32)
        if not all(np.isfinite(one).all() for one in values):
            raise InputError(
                f"distances overflow: an indexed embedding holds numbers beyond {LARGEST:g}; scale "
                "the embeddings down and build the index again"
            )
        return cls(positions, *values)


def check_queries(queries: np.ndarray, width: int, normalized: bool = False) -> np.ndarray:
    """Queries as float32 `[B D]`.

    Raises:
        InputError: another shape, or vectors that `check_vectors` refuses.
    """
    try:
        found = np.asarray(queries)
    except ValueError as error:  # rows of several lengths
        raise InputError(f"queries cannot be read as numbers [B {width}] ({error})") from error
    if found.ndim != 2 or found.shape[1] != width or found.dtype.kind not in "fiu":
        raise InputError(
            f"queries of shape {list(found.shape)} and type {found.dtype}; expected numbers "
            f"[B {width}]"
        )
    return np.ascontiguousarray(check_vectors(found, normalized))


def rank(
    queries: np.ndarray, candidates: np.ndarray, vectors: np.ndarray, k: int, metric: str
) -> Neighbors:
    """The k best of each query's candidates by exact values; ties fall to the lower position.

    Args:
        queries: `[B D]`.
        candidates: positions `[B C]`; -1 marks none.
        vectors: `[B C D]`, the candidates' embeddings (anything where there is none).
        k: results wanted; each query must have that many candidates.
        metric: "l2" or "ip".
    """
    wide = queries.astype(np.float64)[:, None]
    vectors = vectors.astype(np.float64)
    similarities = np.matmul(vectors, wide.transpose(0, 2, 1))[..., 0]
    vectors -= wide  # in place: differences, so that an exact match has a distance of exactly 0
    distances = np.einsum("bcd,bcd->bc", vectors, vectors)
    scores = np.where(candidates < 0, np.inf, distances if metric == "l2" else -similarities)
    best = np.lexsort((candidates, scores), axis=1)[:, :k]

    def take(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, best, axis=1)

    return Neighbors.of(take(candidates).astype(np.int64), take(distances), take(similarities))


def nearest(
    embeddings: ArrayLike,
    queries: np.ndarray,
    n_neighbors: int,
    metric: str = "l2",
    *,
    progress: Callable[[int], None] | None = None,
) -> Neighbors:
    """Exact nearest rows by brute force, in blocks; the same result for any batching.

    Args:
        embeddings: `[N D]`, may be a memory map.
        queries: `[B D]`.
        n_neighbors: k; N where there are fewer rows.
        metric: "l2" or "ip".
        progress: called with the number of queries just finished.

    Raises:
        InputError: wrong shapes, non-finite queries, an unknown metric, or no rows at all.
    """
    total, width = embeddings.shape
    queries = check_queries(queries, width)
    k = min(whole("n_neighbors", n_neighbors, 1), total)
    if total == 0:
        raise InputError("there are no embeddings to search")
    kind = metric_code(metric)
    fetch = min(total, k + SLACK)
    # Exact ranking gathers [rows fetch D] float64: keep that below about 64 MiB.
    step = max(1, min(4096, (8 << 20) // (fetch * width)))
    found = []
    for start in range(0, len(queries), step):
        batch = queries[start : start + step]
        candidates = _knn(embeddings, batch, fetch, kind)
        rows, where = np.unique(candidates, return_inverse=True)
        vectors = _rows(embeddings, rows)[where.reshape(candidates.shape)]
        found.append(rank(batch, candidates, vectors, k, metric))
        if progress is not None:
            progress(len(batch))
    return join(found, k)


def join(found: list[Neighbors], k: int) -> Neighbors:
    """Results of consecutive batches as one."""
    empty = Neighbors(
        np.empty((0, k), np.int64), np.empty((0, k), np.float32), np.empty((0, k), np.float32)
    )
    return Neighbors(
        *(
            np.concatenate([getattr(f, name) for f in [empty, *found]])
            for name in ("positions", "distances", "similarities")
        )
    )


def _knn(embeddings: ArrayLike, queries: np.ndarray, fetch: int, kind: int) -> np.ndarray:
    import faiss

    scores = np.empty((len(queries), 0), np.float32)
    positions = np.empty((len(queries), 0), np.int64)
    with threads(1 if len(queries) == 1 else None):
        for start, block in blocks(embeddings):
            block = np.ascontiguousarray(block, np.float32)
            near, rows = faiss.knn(queries, block, min(fetch, len(block)), metric=kind)
            scores = np.concatenate([scores, near if kind == faiss.METRIC_L2 else -near], axis=1)
            positions = np.concatenate([positions, rows + start], axis=1)
            # Stable, and blocks come in rising order: ties fall to the lower position.
            best = np.argsort(scores, axis=1, kind="stable")[:, :fetch]
            scores = np.take_along_axis(scores, best, axis=1)
            positions = np.take_along_axis(positions, best, axis=1)
    return positions


def _rows(embeddings: Any, rows: np.ndarray) -> np.ndarray:
    return np.asarray(embeddings[rows], np.float32)


def metric_code(metric: str) -> int:
    """FAISS's number for a metric."""
    if metric not in ("l2", "ip"):
        raise InputError(f"metric {metric!r} is unknown; use 'l2' or 'ip'")
    return 1 if metric == "l2" else 0


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """FAISS on `count` OpenMP threads (None: as it is), put back afterwards.

    OpenMP keeps the number for each thread that computes, so no other thread sees it change.
    """
    import faiss

    before = faiss.omp_get_max_threads()
    if count is not None:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
