"""What compression loses: transferred weights beside an image's own, from prototypes and from all.

Every image of the sample is left out: of the full index itself, and of its own prototype its share.
Otherwise a prototype of few images would be praised for repeating the very image that is asked for,
which no query finds in an index. So measured, as many prototypes as images lose nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..index import Index, nearest
from ..index.search import rank
from ..ops import transfer
from .grouping import Groups
from .merging import Centres, Merged, as_stored, encode, numbers_of

SAMPLE = 1000
"""Images that are left out, at most."""
COUNTS = (1, 5)
"""Neighbours that weights are transferred from; fewer where there are fewer."""
_STEP = 32
_DIGITS = 6


@dataclass(frozen=True)
class Compressed:
    """An index and the prototypes that were made of it.

    Args:
        index: the full one.
        live: position of each of its n live rows.
        vectors: their embeddings, `[n D]`.
        labels: theirs, `[n]`.
        groups: which rows make which prototype.
        centres: the prototypes' embeddings.
        layers: their weights, layer by layer.
        kept: groups that centres and layers have `sums` of, rising: those of the sample.
        names: the prototypes' labels, `[G]`.
    """

    index: Index
    live: np.ndarray
    vectors: np.ndarray
    labels: Sequence[str | None]
    groups: Groups
    centres: Centres
    layers: Sequence[Merged]
    kept: np.ndarray
    names: Sequence[str | None]


def sample_rows(n: int, seed: int) -> np.ndarray:
    """Which of n rows are left out in turn: all, or a seeded sample, rising."""
    if n <= SAMPLE:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:SAMPLE])


def fidelity(made: Compressed, sample: np.ndarray, tick: Callable[[int], object]) -> dict[str, Any]:
    """How near transferred weights come to an image's own, before and after; for the manifest.

    Args:
        made: the index and its prototypes.
        sample: rows that are left out in turn, `[S]`.
        tick: told how many were dealt with.

    Returns:
        "images": those of the sample that have weights of their own (not all zero) and a neighbour;
        "cosine": by number of neighbours ("1", "5"), and "recall_at_1" over the labelled images of
        the sample: each {"index", "prototypes", "loss"}, means in [-1, 1] and their difference, or
        None where nothing could be compared. A cosine is the mean over the index's layers.
    """
    cosines: list[np.ndarray] = []
    hits: list[tuple[bool, bool]] = []
    if len(made.vectors) == 1:
        sample = sample[:0]  # a single image has no other to be explained by
    from_all = _of_index(made, sample)
    for start in range(0, len(sample), _STEP):
        rows, whole = sample[start : start + _STEP], from_all[start : start + _STEP]
        small = _of_prototypes(made, rows)
        cosines.append(_cosines(made, rows, whole, small))
        for row, first, second in zip(rows, whole, small, strict=True):
            label = made.labels[row]
            if label is not None:
                hits.append((made.labels[first[0]] == label, made.names[second[0]] == label))
        tick(len(rows))
    found = np.concatenate([np.empty((0, len(COUNTS), 2)), *cosines])
    found = found[~np.isnan(found).any((1, 2))]
    return {
        "images": len(found),
        "cosine": {str(k): _compared(found[:, at]) for at, k in enumerate(COUNTS)},
        "recall_at_1": _compared(np.array(hits, float).reshape(-1, 2)),
    }


def _compared(pairs: np.ndarray) -> dict[str, float] | None:
    """Means of `[n 2]`, from all images and from prototypes, and what was lost."""
    if not len(pairs):
        return None
    index, prototypes = (round(float(mean), _DIGITS) for mean in pairs.mean(axis=0))
    return {"index": index, "prototypes": prototypes, "loss": round(index - prototypes, _DIGITS)}


def _of_index(made: Compressed, rows: np.ndarray) -> np.ndarray:
    """The nearest other images of each row, nearest first, `[b k]`."""
    found = nearest(made.vectors, made.vectors[rows], max(COUNTS) + 1, made.index.metric)
    return _without(found.positions, rows)


def _of_prototypes(made: Compressed, rows: np.ndarray) -> list[np.ndarray]:
    """The nearest prototypes of each row; its own, if it has other members, stands without it."""
    own, queries = made.groups.of[rows], made.vectors[rows]
    vectors, metric = made.centres.embeddings, made.index.metric
    others = _without(nearest(vectors, queries, max(COUNTS) + 1, metric).positions, own)
    shared = made.groups.sizes[own] > 1
    candidates = np.concatenate([others, np.where(shared, own, -1)[:, None]], axis=1)
    places = np.concatenate([vectors[others], _left_out_embedding(made, rows)[:, None]], axis=1)
    found = rank(queries, candidates, places, candidates.shape[1], metric)
    return [one[one >= 0][: max(COUNTS)] for one in found.positions]


def _without(found: np.ndarray, itself: np.ndarray) -> np.ndarray:
    """Neighbours `[b k]` without the one to leave out, `[b k-1]`."""
    kept = found != itself[:, None]
    # Among many that are alike it may not be there: then the farthest goes.
    kept[kept.all(axis=1), -1] = False
    return found[kept].reshape(len(found), found.shape[1] - 1)


def _left_out_embedding(made: Compressed, rows: np.ndarray) -> np.ndarray:
    """Embedding of each row's prototype without it, float32 `[b D]`; of groups of one anything."""
    own = made.groups.of[rows]
    means = _without_itself(made, rows, made.centres.sums, made.vectors[rows])
    return as_stored(means, made.centres.embeddings[own], made.index.normalized)


def _without_itself(
    made: Compressed, rows: np.ndarray, sums: np.ndarray, given: np.ndarray
) -> np.ndarray:
    """Means `[b C]` of each row's group without it: the group's sum, less what the row gave."""
    own = made.groups.of[rows]
    rest = np.maximum(made.groups.sizes[own] - 1, 1)[:, None]
    return (sums[np.searchsorted(made.kept, own)] - given.astype(np.float64)) / rest


def _cosines(
    made: Compressed,
    rows: np.ndarray,
    from_all: np.ndarray,
    from_prototypes: Sequence[np.ndarray],
) -> np.ndarray:
    """Cosines with the rows' own weights, `[b counts 2]`; NaN where a row has none of its own."""
    total = np.zeros((len(rows), len(COUNTS), 2))
    for layer in range(len(made.layers)):
        own = made.index.weights(made.live[rows], layer)
        left_out = _left_out_weights(made, rows, layer)
        for at in range(len(rows)):
            whole = made.index.weights(made.live[from_all[at]], layer)
            small = made.layers[layer].weights(from_prototypes[at], made.centres.embeddings)
            small[from_prototypes[at] == made.groups.of[rows[at]]] = left_out[at]
            for place, count in enumerate(COUNTS):
                for side, weights in enumerate((whole[:count], small[:count])):
                    flat = weights.reshape(len(weights), -1)
                    drawn = transfer(flat, np.zeros(len(flat)))
                    total[at, place, side] += _cosine(drawn, own[at].ravel())
    return total / len(made.layers)


def _left_out_weights(made: Compressed, rows: np.ndarray, layer: int) -> np.ndarray:
    """Weights of each row's prototype without it, as they would be stored, `[b K]`."""
    merged = made.layers[layer]
    fields = made.index.select(made.live[rows]).fields(layer)
    given = numbers_of(made.index.encoding(layer), fields)
    means = _without_itself(made, rows, merged.sums, given)
    kept = encode(merged.encoding, means)
    return merged.encoding.decode({**kept, "embedding": means.astype(np.float32)})


def _cosine(drawn: np.ndarray, own: np.ndarray) -> float:
    """In [-1, 1]; 0 where nothing was transferred, NaN where there is nothing to compare with."""
    a, b = drawn.astype(np.float64), own.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not b.any():
        return np.nan
    return float(a @ b) / lengths if lengths else 0.0
