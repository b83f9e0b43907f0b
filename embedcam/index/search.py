"""Nearest neighbors by exact values: FAISS proposes candidates, the embeddings decide."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._checks import LARGEST, as_numbers, check_vectors, whole
from ..errors import InputError
from ..images.progress import in_passes
from .arrays import ArrayLike, Told, blocks
from .faiss_build import metric_code, parameters, threads
from .rows import IndexRows

if TYPE_CHECKING:
    import faiss

    from .reader import Index

SLACK = 16
"""Candidates beyond k, so that rounding inside FAISS cannot push out a true neighbor.

Of coarse codes more are asked for, see `faiss_build.candidates`.
"""
N_NEGATIVES = 50
_GATHERED = 8 << 20
"""Numbers of candidates' embeddings ranked at once: about 64 MiB as float64."""
_MANY, _SCORED = 20, 1 << 21
"""Queries from which products are cheaper than FAISS's comparisons; numbers of a product."""


class Neighbors(NamedTuple):
    """The k nearest rows of each query, nearest first.

    Attributes
    ----------
    positions : int64 `[B k]`, rows of the index.
    distances : float32 `[B k]`, squared Euclidean: smaller is nearer.
    similarities : float32 `[B k]`, inner products: larger is nearer.
    """

    positions: np.ndarray
    distances: np.ndarray
    similarities: np.ndarray

    def first(self, count: int | None) -> "Neighbors":
        """Return the first `count` of one query's results `[n]`; all of them for None."""
        return Neighbors(*(values[:count] for values in self))

    @classmethod
    def of(
        cls, positions: np.ndarray, distances: np.ndarray, similarities: np.ndarray
    ) -> "Neighbors":
        """Return neighbors from exact values, float64, refused where one is beyond float32."""
        with np.errstate(over="ignore"):
            values = distances.astype(np.float32), similarities.astype(np.float32)
        if not all(np.isfinite(one).all() for one in values):
            raise InputError(
                f"distances overflow: an indexed embedding holds numbers beyond {LARGEST:g}; scale "
                "the embeddings down and build the index again"
            )
        return cls(positions, *values)


def check_queries(queries: np.ndarray, width: int, normalized: bool = False) -> np.ndarray:
    """Return queries as float32 `[B D]`, refused where they are no such numbers."""
    vectors = queries
    if not isinstance(queries, np.ndarray) or queries.dtype.kind != "f":
        vectors = as_numbers("queries", queries)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        given = f"queries of shape {list(vectors.shape)} and type {vectors.dtype}"
        raise InputError(f"{given}; expected numbers [B {width}]")
    return np.ascontiguousarray(check_vectors(vectors, normalized))


def nearest(
    embeddings: ArrayLike,
    queries: np.ndarray,
    n_neighbors: int,
    metric: str = "l2",
    *,
    progress: Callable[[int], object] | None = None,
) -> Neighbors:
    """Find exact nearest rows by brute force, in blocks; the same result for any batching.

    Parameters
    ----------
    embeddings : `[N D]`, may be a memory map.
    queries : `[B D]`.
    n_neighbors : k; N where there are fewer rows.
    metric : "l2" or "ip".
    progress : called with the number of rows just compared with all queries.

    Raises
    ------
    InputError
        Wrong shapes, non-finite queries, an unknown metric, or no rows at all.
    """
    total, width = embeddings.shape
    queries = check_queries(queries, width)
    k = min(whole("n_neighbors", n_neighbors, 1), total)
    if total == 0:
        raise InputError("there are no embeddings to search")
    kind = metric_code(metric)
    fetch = min(total, k + SLACK)
    step = max(1, min(4096, _GATHERED // (fetch * width)))
    watched = embeddings
    if progress is not None:
        watched = Told(embeddings, in_passes(progress, max(1, -(-len(queries) // step))))

    def ranked(batch: np.ndarray) -> Neighbors:
        candidates = _knn(watched, batch, fetch, kind)
        rows, where = np.unique(candidates, return_inverse=True)
        vectors = np.asarray(embeddings[rows], np.float32)[where.reshape(candidates.shape)]
        return rank(batch, candidates, vectors, k, metric)

    return in_batches(ranked, queries, step)


def without_itself(neighbors: Neighbors, rows: np.ndarray) -> Neighbors:
    """Return the neighbors `[B k]` without each query's own row `[B]`, `[B k-1]`.

    Where many are alike a row may not be among its neighbors: then the farthest goes.
    """
    kept = neighbors.positions != rows[:, None]
    kept[kept.all(axis=1), -1] = False
    shape = len(rows), neighbors.positions.shape[1] - 1
    return Neighbors(*(values[kept].reshape(shape) for values in neighbors))


def search(
    index: "Index", queries: np.ndarray, n_neighbors: int, nprobe: int | None = None
) -> Neighbors:
    """Return the nearest live rows of queries `[B D]`; see `Index.search`."""
    queries = check_queries(queries, index.width, index.normalized)
    k = min(n_neighbors, index.n_rows - len(index.tombstones))
    entry = index.manifest.faiss
    if not index.manifest.parts:
        raise InputError(
            f"{index.path}: is a model, which holds no images; give the rows that a store returned "
            "(rows=, or --store), or the index itself"
        )
    if entry is None:
        raise InputError(
            "this index was built without FAISS; give neighbors= ids that your own search "
            "found, or give it one with `embedcam compact --rebuild-faiss Flat`"
        )
    probes = (entry.search.nprobe or 1) if nprobe is None else whole("nprobe", nprobe, 1)
    if k == 0:
        raise InputError("every image of this index has been removed; add images first")
    file = index.faiss_file
    loaded, times = (None, 1) if file is None else (file.loaded(), file.times)
    fetch = min(index.n_rows, (k + SLACK) * times)

    def ranked(batch: np.ndarray) -> Neighbors:
        if loaded is None:
            found = np.full((len(batch), k), -1, np.int64)
        else:
            effort = entry.search.ef_search or 1
            found = _proposed(index, loaded, batch, k, fetch, probes, effort)
        found.sort(axis=1)
        found = found[:, ::-1]
        if found[:, -1].min(initial=0) < 0:
            found = _completed(index, batch, found, k)
        vectors = index.embeddings(np.maximum(found, 0).reshape(-1))
        return rank(batch, found, vectors.reshape(*found.shape, index.width), k, index.metric)

    # OpenMP's threads are not there in a forked child.
    alone = len(queries) == 1 or index.process != os.getpid()
    with threads(1 if alone else index.n_threads):
        return in_batches(ranked, queries, max(1, _GATHERED // (fetch * index.width)))


def _proposed(
    index: "Index",
    loaded: "faiss.Index",
    queries: np.ndarray,
    k: int,
    fetch: int,
    probes: int,
    effort: int,
) -> np.ndarray:
    """Return FAISS's live candidates, of each query k or as many as it can reach, padded by -1."""
    # Removed rows are not known to FAISS, whatever its type, so candidates are asked for until
    # enough live ones are among them.
    found, todo = np.empty((len(queries), k), np.int64), np.arange(len(queries))
    while len(todo):
        options = parameters(loaded, probes, max(effort, fetch))
        _, rows = loaded.search(queries[todo], fetch, params=options)
        if rows.max(initial=-1) >= index.n_rows and index.faiss_file is not None:
            raise index.faiss_file.broken("returns rows out of range")
        if len(index.tombstones):
            alive = index.live(np.maximum(rows, 0).reshape(-1)).reshape(rows.shape)
            rows = np.where(alive & (rows >= 0), rows, -1)
        if len(todo) == len(queries):
            found = rows
        else:
            found = np.pad(found, ((0, 0), (0, fetch - found.shape[1])), constant_values=-1)
            found[todo] = rows
        if fetch == index.n_rows or found.min(initial=0) >= 0:
            break
        todo = np.flatnonzero((found >= 0).sum(axis=1) < k)
        # Removed rows took the places, or IVF's lists were short: look further.
        fetch, probes = min(index.n_rows, 2 * fetch), 2 * probes
    return found


def _completed(index: "Index", queries: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """Return candidates `[B C]`, falling, where brute force found what FAISS could not reach."""
    if len(todo := np.flatnonzero((found >= 0).sum(axis=1) < k)):
        alive = index.live_positions()
        exact = nearest(IndexRows(index, alive), queries[todo], k, index.metric)
        found[todo] = -1
        found[todo, :k] = alive[exact.positions]
    # Removed rows leave gaps: the columns that are used come first, the others go.
    found = -np.sort(-found, axis=1)
    return found[:, : int((found >= 0).sum(axis=1).max(initial=k))]


def rank(
    queries: np.ndarray, candidates: np.ndarray, vectors: np.ndarray, k: int, metric: str
) -> Neighbors:
    """Return the k best of each query's candidates by exact values; ties to the lower position.

    Of queries `[B D]`, candidates `[B C]`, at least k each (-1 marks none), and their `[B C D]`.
    """
    wide = queries.astype(np.float64)[:, None]
    vectors = vectors.astype(np.float64)
    # No product of matrices, whose last bits depend on where a row stands.
    similarities = np.einsum("bcd,bd->bc", vectors, wide[:, 0])
    vectors -= wide  # in place: differences, so that an exact match has a distance of exactly 0
    distances = np.einsum("bcd,bcd->bc", vectors, vectors)
    scores = np.where(candidates < 0, np.inf, distances if metric == "l2" else -similarities)
    best = np.lexsort((candidates, scores), axis=1)[:, :k]

    values, rows = (candidates.astype(np.int64), distances, similarities), np.arange(len(best))
    return Neighbors.of(*(one[rows[:, None], best] for one in values))


def in_batches(
    search: Callable[[np.ndarray], Neighbors], queries: np.ndarray, step: int
) -> Neighbors:
    """Search for queries `[B D]`, `step` at a time, and join the results."""
    if len(queries) <= step:
        return search(queries)
    batches = [search(queries[i : i + step]) for i in range(0, len(queries), step)]
    return Neighbors(*map(np.concatenate, zip(*batches, strict=True)))


def _knn(embeddings: ArrayLike, queries: np.ndarray, fetch: int, kind: int) -> np.ndarray:
    import faiss

    if len(queries) >= _MANY:
        return _knn_of_many(embeddings, queries, fetch, kind == faiss.METRIC_L2)
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


def _knn_of_many(
    embeddings: ArrayLike, queries: np.ndarray, fetch: int, squared: bool
) -> np.ndarray:
    """Return places of the nearest rows of many queries, by products of matrices, `[B fetch]`."""
    n, step = len(queries), max(1, _SCORED // len(queries))
    scores = np.full((n, fetch), np.inf, np.float32)
    positions = np.full((n, fetch), -1, np.int64)
    for first, block in blocks(embeddings):
        for start in range(0, len(block), step):
            rows = np.ascontiguousarray(block[start : start + step], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                apart = queries @ (rows.T * np.float32(-2 if squared else -1))
                if squared:  # but for the query's own length, which orders nothing
                    apart += np.einsum("nd,nd->n", rows, rows)
                query, row = np.nonzero(apart < scores[:, -1:])
            if not len(query):
                continue
            # Rows that are nearer than what was kept, side by side behind it; stable, and blocks
            # come in rising order: ties fall to the lower position.
            counts = np.bincount(query, minlength=n)
            place = fetch + np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
            wider = ((0, 0), (0, int(counts.max())))
            scores = np.pad(scores, wider, constant_values=np.inf)
            positions = np.pad(positions, wider, constant_values=-1)
            scores[query, place], positions[query, place] = apart[query, row], first + start + row
            best = np.argsort(scores, axis=1, kind="stable")[:, :fetch]
            scores = np.take_along_axis(scores, best, axis=1)
            positions = np.take_along_axis(positions, best, axis=1)
    return positions


# A query's neighbors: searched, or those that another search engine named


def find_neighbors(
    index: "Index",
    embeddings: np.ndarray,
    n_neighbors: int,
    named: Sequence[Sequence[str]] | None,
) -> list[Neighbors]:
    """Return for each query `[B D]` its neighbors: searched, or those that were named."""
    if named is None:
        ask = index.ranked if index.in_memory else partial(search, index)
        found = ask(embeddings, n_neighbors)
        return [Neighbors(*one) for one in zip(*found, strict=True)]
    pairs = zip(embeddings, named, strict=True)
    return [named_neighbors(index, embedding, ids) for embedding, ids in pairs]


def named_neighbors(index: "Index", embedding: np.ndarray, ids: Sequence[str]) -> Neighbors:
    """Return named images beside a query `[D]`, in the order named."""
    if isinstance(ids, str):
        raise InputError(f"expected a list of ids as neighbours, got the string {ids!r}")
    if len(ids) == 0:
        raise InputError("no neighbour was given; name at least one id")
    if not all(isinstance(name, str) for name in ids):
        kinds = ", ".join(sorted({type(name).__name__ for name in ids}))
        raise InputError(f"ids are strings, as in `index.ids`; given {kinds}")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise InputError(f"the neighbour {twice!r} was given twice; name each id once")
    return index.beside(index.positions(ids), embedding)


def draw_negatives(
    candidates: np.ndarray,
    near: Iterable[str | None],
    labels_of: Callable[[np.ndarray], Sequence[str | None]],
) -> np.ndarray:
    """Draw at most `N_NEGATIVES` seeded random images that are not labelled as the neighbors are.

    From `candidates` `[n]`, n >= 1, all but the neighbors, whose labels are `near`; where all that
    are drawn have one of these, it does not matter.
    """
    count = min(8 * N_NEGATIVES, len(candidates))
    sample = np.random.default_rng(0).choice(candidates, count, False)
    known = {label for label in near if label is not None}
    apart = np.array([label not in known for label in labels_of(sample)])
    return (sample[apart] if apart.any() else sample)[:N_NEGATIVES]


def check_wanted(
    n_neighbors: int | None,
    neighbors: Sequence[Sequence[str]] | None,
    n_queries: int,
    default: int,
) -> int:
    """Return how many neighbors are to be searched for; a number and names both are refused."""
    if neighbors is not None:
        if n_neighbors is not None:
            raise InputError("give n_neighbors to search, or neighbors to name them, not both")
        if isinstance(neighbors, str) or len(neighbors) != n_queries:
            raise InputError(
                f"neighbors holds {len(neighbors)} lists of ids for {n_queries} queries; give "
                "one list for each"
            )
    return default if n_neighbors is None else whole("n_neighbors", n_neighbors, 1)


def check_rival(result: str | None, above: str | None) -> None:
    """Refuse a rival that goes with no result, or is the result itself."""
    if above is None:
        return
    if result is None:
        raise InputError(
            f"above = {above!r} is a rival, and no result was named; give result, the image that "
            "is to be told from it"
        )
    if result == above:
        raise InputError(f"above = {above!r} is the result itself; name another image")
