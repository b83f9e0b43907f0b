"""Which images make one prototype, and sums over the rows of each."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..images.progress import Advance

_FULL = 4e9
"""Products of one pass of full k-means (images x groups x numbers) beyond which batches do."""
_BATCH = 4096
_BLOCK_NUMBERS = 4 << 20
_BLOCK_ROWS = 1 << 15


@dataclass(frozen=True)
class Groups:
    """A division of n rows into G groups, none empty: `of` numbers each row's, int64 `[n]`."""

    of: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of each group, int64 `[G]`, >= 1."""
        return np.bincount(self.of)

    @cached_property
    def order(self) -> np.ndarray:
        """Rows group after group, rising within each, int64 `[n]`."""
        return np.argsort(self.of, kind="stable")

    @cached_property
    def starts(self) -> np.ndarray:
        """Place in `order` of each group's first row, int64 `[G]`."""
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    @property
    def firsts(self) -> np.ndarray:
        """Lowest row of each group, int64 `[G]`."""
        return np.asarray(self.order[self.starts])


def group(
    embeddings: np.ndarray,
    labels: Sequence[str | None] | None,
    wanted: int,
    seed: int,
    progressed: Advance,
) -> Groups:
    """Divide images `[n D]` by k-means into `wanted` groups, with labels so many in each label.

    Groups are numbered by their first row; with labels, label after label (sorted, None last).
    """
    if labels is None:
        of = _kmeans(embeddings, wanted, seed)
        progressed(len(of))
        return Groups(of)
    of, before = np.empty(len(labels), np.int64), 0
    codes = {label: code for code, label in enumerate(sorted({x for x in labels if x is not None}))}
    coded = np.array([len(codes) if label is None else codes[label] for label in labels])
    for code in np.unique(coded):
        rows = np.flatnonzero(coded == code)
        of[rows] = before + _kmeans(embeddings[rows], wanted, seed)
        before = int(of[rows].max()) + 1
        progressed(len(rows))
    return Groups(of)


def sums_of_groups(
    groups: Groups, fetch: Callable[[np.ndarray], np.ndarray], width: int
) -> np.ndarray:
    """Return sums over the rows of each group, float64 `[G C]`.

    `fetch` gives `[b C]`, C = width, for rows `[b]`; it is asked for a block of rows at a time.
    """
    sums = np.zeros((len(groups), width))
    step = min(_BLOCK_ROWS, max(1, _BLOCK_NUMBERS // max(width, 1)))
    for start in range(0, len(groups.of), step):
        rows = groups.order[start : start + step]
        numbers, firsts = np.unique(groups.of[rows], return_index=True)
        sums[numbers] += np.add.reduceat(fetch(rows).astype(np.float64), firsts, axis=0)
    return sums


def _kmeans(vectors: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return the group of each vector `[n]`, numbered by first row."""
    if wanted >= len(vectors):
        return np.arange(len(vectors))
    if wanted == 1:
        return np.zeros(len(vectors), np.int64)
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if vectors.size * float(wanted) <= _FULL:
        method = KMeans(wanted, n_init=1, random_state=seed)
    else:
        method = MiniBatchKMeans(wanted, batch_size=_BATCH, n_init=1, random_state=seed)
    # Threads add up a centre in the order in which they finish: one thread, and the same seed
    # gives the same groups. Repeated vectors make fewer groups, which is no fault.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = method.fit(vectors).labels_
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[numbers.reshape(-1)]
