"""The FAISS index of `faiss = "auto"`: its type by the number of images, its reach by measure."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arrays import ArrayLike
from .faiss_build import first_of, parameters, threads
from .search import SLACK, Neighbors, nearest, rank, without_itself

if TYPE_CHECKING:
    import faiss

RECALL = 0.999
"""Of a sample of rows, which lists were trained on and suit better; of other queries it is .99."""
_QUERIES, _NEAREST, _FIRST = 256, 5, 8


def enough_lists(
    index: "faiss.Index",
    embeddings: ArrayLike,
    metric: str,
    progress: Callable[[int], object] | None = None,
) -> int | None:
    """Return how many lists must be visited, so that the true 5 nearest are found; None if none do.

    A seeded sample of the rows of `[N D]` asks, each without itself. The number doubles from 8 on
    until .999 of the true five, or others as near, are among the candidates that are re-ranked.
    `progress` is as for `nearest`, which takes longest.
    """
    total = embeddings.shape[0]
    own = np.random.default_rng(0).choice(total, min(total, _QUERIES), replace=False)
    own = np.sort(own)
    queries = np.ascontiguousarray(embeddings[own], np.float32)
    k = min(total, _NEAREST + 1)
    exact = nearest(embeddings, queries, k, metric, progress=progress)
    true = _scores(without_itself(exact, own), metric)[:, -1:]
    n_lists, probes = int(getattr(first_of(index), "nlist", 1)), _FIRST
    while True:
        probes = min(probes, n_lists)
        with threads(1):
            found = index.search(queries, k + SLACK, params=parameters(index, probes, 1))[1]
        vectors = np.asarray(embeddings[np.maximum(found, 0).reshape(-1)], np.float32)
        kept = rank(queries, found, vectors.reshape(*found.shape, -1), k, metric)
        kept = without_itself(kept, own)
        # An image that is there many times has more than five as near: any of them will do.
        right = (_scores(kept, metric) <= true) & (kept.positions >= 0)
        if right.mean() >= RECALL:
            return probes
        if probes == n_lists:
            return None
        probes *= 2


def _scores(neighbors: Neighbors, metric: str) -> np.ndarray:
    return neighbors.distances if metric == "l2" else -neighbors.similarities
