"""One search over an opened index: over-fetch, drop the removed, rank exactly."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .faiss_files import REBUILD, parameters
from .files import broken
from .records import SearchSettings
from .search import SLACK, Neighbors, nearest, rank

if TYPE_CHECKING:
    from .reader import Index


class EmbeddingRows:
    """Embeddings of an index, or of some of its rows, as one array-like `[n D]`."""

    def __init__(self, index: "Index", positions: np.ndarray | None = None) -> None:
        self._index, self._positions = index, positions
        self.shape = (index.n_rows if positions is None else len(positions), index.width)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.shape[0]))
        return self._index.embeddings(rows if self._positions is None else self._positions[rows])


def search_batch(
    index: "Index", loaded: Any, queries: np.ndarray, k: int, nprobe: int | None
) -> Neighbors:
    """The k nearest live rows of each query.

    Removed rows are not known to FAISS, whatever its type, so candidates are asked for until enough
    live ones are among them; what an approximate index cannot reach, brute force finds.

    Args:
        index: opened.
        loaded: its FAISS index, or None for brute force.
        queries: checked, `[B D]`.
        k: 1 .. the number of live rows.
        nprobe: IVF lists to visit; None takes the manifest's.
    """
    settings = index.manifest.faiss.search if index.manifest.faiss else SearchSettings()
    probes, effort = nprobe or settings.nprobe or 1, settings.ef_search or 1
    candidates = np.full((len(queries), k), -1, np.int64)
    todo = np.arange(len(queries))
    fetch = min(index.n_rows, k + SLACK)
    while loaded is not None and len(todo):
        options = parameters(loaded, probes, max(effort, fetch))
        _, rows = loaded.search(queries[todo], fetch, params=options)
        candidates = _widen(candidates, fetch)
        candidates[todo] = _only_live(index, rows)
        todo = np.flatnonzero((candidates >= 0).sum(axis=1) < k)
        if fetch == index.n_rows:
            break
        # Removed rows took the places, or IVF's lists were short: look further.
        fetch, probes = min(index.n_rows, 2 * fetch), 2 * probes
    if len(todo):
        alive = index.live_positions()
        found = nearest(EmbeddingRows(index, alive), queries[todo], k, index.metric)
        candidates[todo] = -1
        candidates[todo, :k] = alive[found.positions]
    # Removed rows leave gaps: the columns that are used come first, the others go.
    candidates = -np.sort(-candidates, axis=1)
    candidates = candidates[:, : int((candidates >= 0).sum(axis=1).max(initial=k))]
    vectors = index.embeddings(np.maximum(candidates, 0).reshape(-1))
    return rank(queries, candidates, vectors.reshape(*candidates.shape, -1), k, index.metric)


def _widen(candidates: np.ndarray, columns: int) -> np.ndarray:
    wide = np.full((len(candidates), max(columns, candidates.shape[1])), -1, np.int64)
    wide[:, : candidates.shape[1]] = candidates
    return wide


def _only_live(index: "Index", rows: np.ndarray) -> np.ndarray:
    if rows.size and rows.max() >= index.n_rows:
        file = index.manifest.raw["faiss"]["file"]
        raise broken(index.path, file, "returns rows out of range", REBUILD)
    if len(index) == index.n_rows:
        return rows
    alive = index.live(np.maximum(rows, 0).reshape(-1)).reshape(rows.shape)
    return np.where(alive & (rows >= 0), rows, -1)
