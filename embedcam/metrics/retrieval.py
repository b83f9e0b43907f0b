"""Retrieval of an embedding's own label; nearness is squared Euclidean distance.

Embeddings are `[N D]`, labels `[N]`. A `gallery` `[G D]` with its labels is searched, else every
image queries all others. Of equally near ones the one stored first comes first.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from .maps import finite

BLOCK = 2**23
"""Distances held at once: 64 MB."""


def recall_at_k(
    embeddings: ArrayLike,
    labels: ArrayLike,
    k: int = 1,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the share of images with one of their own label among their k nearest others."""
    return recalls_at(embeddings, labels, [k], gallery, gallery_labels)[k]


def recalls_at(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int],
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> dict[int, float]:
    """Return `recall_at_k` for several k from one pass over the distances."""
    search = _Search(embeddings, labels, gallery, gallery_labels)
    for k in ks:
        if k != int(k) or not 1 <= k <= search.reach:
            until = "N - 1" if gallery is None else "G"
            raise InputError(f"k = {k} with {search.size} images; k must be 1 to {until}")
    if not len(ks):
        raise InputError("no k; give one or more, as [1, 5, 10]")
    hits = dict.fromkeys((int(k) for k in ks), 0)
    for distances, alike in search.blocks():
        # The place of the nearest of the same label needs no sorting: those before it are counted.
        same = np.where(alike, distances, np.inf)
        first = same.argmin(1)[:, None]
        nearest = np.take_along_axis(same, first, axis=1)
        before = (distances < nearest).sum(1)
        before += ((distances == nearest) & (np.arange(search.size) < first)).sum(1)
        reached = np.isfinite(nearest[:, 0])
        for k in hits:
            hits[k] += int((reached & (before < k)).sum())
    return {k: count / search.queries for k, count in hits.items()}


def map_at_r(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the mean average precision at R (Musgrave et al., ECCV 2020).

    An image alone with its label is left out; in `recall_at_k` it misses.
    """
    search = _Search(embeddings, labels, gallery, gallery_labels)
    scores: list[float] = []
    for distances, alike in search.blocks():
        scores += precision_at_r(distances, alike)[alike.any(1)].tolist()
    if not scores:
        what = f"none of {search.queries} images has another of its label"
        raise InputError(f"{what}; give labels that are classes, not ids")
    return float(np.mean(scores))


def precision_at_r(distances: ArrayLike, alike: ArrayLike) -> np.ndarray:
    """Return the average precision at R of single queries, whose mean is `map_at_r`, `[B]`.

    Distances `[B N]`, infinite for what takes no part; `alike` `[B N]`: which are of its label.
    """
    rows, same = np.asarray(distances, np.float64), np.asarray(alike)
    if rows.ndim != 2 or rows.shape != same.shape or same.dtype != bool:
        given = f"distances {list(rows.shape)} and alike {list(same.shape)} of type {same.dtype}"
        raise InputError(f"{given}; give both as [B N], alike as booleans")
    if np.isnan(rows).any():
        raise InputError("a distance is NaN; look at what computed it")
    return np.array([_precision_at_r(*query) for query in zip(rows, same, strict=True)])


def _precision_at_r(distances: np.ndarray, alike: np.ndarray) -> float:
    r = int(alike.sum())
    if r == 0:
        return 0.0
    # Only the nearest R, and what ties with the last of them, are worth sorting.
    near = np.flatnonzero(distances <= np.partition(distances, r - 1)[r - 1])
    hits = alike[near[np.argsort(distances[near], kind="stable")[:r]]]
    return float((np.cumsum(hits) / np.arange(1, r + 1))[hits].sum() / r)


class _Search:
    """Queries and what they search, checked; distances in blocks that fit in memory."""

    def __init__(
        self,
        embeddings: ArrayLike,
        labels: ArrayLike,
        gallery: ArrayLike | None,
        gallery_labels: ArrayLike | None,
    ) -> None:
        if (gallery is None) != (gallery_labels is None):
            raise InputError("a gallery needs its labels, and labels their gallery; give both")
        vectors, self._labels = _labelled(embeddings, labels, "embeddings", "N")
        searched, self._gallery_labels = vectors, self._labels
        self._alone = gallery is None
        if gallery is not None and gallery_labels is not None:
            searched, self._gallery_labels = _labelled(gallery, gallery_labels, "gallery", "G")
        if searched.shape[1] != vectors.shape[1]:
            shapes = f"embeddings {list(vectors.shape)} and a gallery {list(searched.shape)}"
            raise InputError(f"{shapes} differ in width; take both from one network")
        kinds = self._labels.dtype, self._gallery_labels.dtype
        if (kinds[0].kind in "US") != (kinds[1].kind in "US"):
            what = f"labels of type {kinds[0]} and {kinds[1]} never match"
            raise InputError(f"{what}; give both as strings or as numbers")
        # A power of two: which is nearer stays, and squares of extreme values stay numbers.
        _, exponent = np.frexp(max(np.abs(vectors).max(), np.abs(searched).max()))
        self._embeddings, self._gallery = (np.ldexp(one, -exponent) for one in (vectors, searched))
        self.queries, self.size = len(vectors), len(searched)
        self.reach = self.size - self._alone

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield distances `[b G]`, infinite to oneself, and which have one's own label `[b G]`."""
        squares = (self._gallery**2).sum(1)
        step = max(1, BLOCK // self.size)
        for start in range(0, self.queries, step):
            rows = np.arange(start, min(start + step, self.queries))
            some = self._embeddings[rows]
            distances = (some**2).sum(1)[:, None] + squares - 2 * some @ self._gallery.T
            alike = self._labels[rows, None] == self._gallery_labels
            if self._alone:
                distances[np.arange(len(rows)), rows] = np.inf
                alike[np.arange(len(rows)), rows] = False
            yield distances, alike


def _labelled(
    embeddings: ArrayLike, labels: ArrayLike, what: str, axis: str
) -> tuple[np.ndarray, np.ndarray]:
    array, names = finite(embeddings, what, f"{axis} D"), np.asarray(labels)
    if names.shape != array.shape[:1]:
        given = f"labels {list(names.shape)} with {what} {list(array.shape)}"
        raise InputError(f"{given}; give one label an image")
    if names.dtype.kind == "f" and np.isnan(names).any():
        raise InputError("a label is NaN, which equals nothing; give every image a label")
    return array, names
