"""What a build keeps so that channels and concepts can be shown: parts, and where each is strong.

The embedding pass keeps, for every channel, the images and positions where it answers most, which
chunks and shards merge in any order, and the activations at some positions of a sample of the
images. The parts are fitted to those, and their exemplars are found among them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..index.concepts import MOST_BYTES, Best, arrays_of
from .plan import Plan
from .strategies import to_numpy

KEPT = 5
"""Exemplars of a line."""
NUMBERS = 1 << 23
"""Of the sample, at most."""
LEAST_IMAGES, LEAST_CHANNELS = 32, 16
"""Below these no parts are fitted."""
_ITERATIONS, _TOLERANCE = 30, 1e-4


class Seen(NamedTuple):
    """What is kept of a batch: the best of each channel, and some activations.

    They are those at sampled positions, `activations` `[n K]`, each in the image with the number in
    `places` `[n]` and at `cells` `[n]`.
    """

    best: Best
    activations: np.ndarray
    places: np.ndarray
    cells: np.ndarray


def seen(plan: Plan, positions: np.ndarray, activations: Tensor) -> Seen:
    """Return what is kept of a batch's activations `[B K H W]`; `positions` are in the source."""
    best = best_of(activations, positions)
    flat = activations.flatten(2)
    n_cells = NUMBERS // (flat.shape[1] * max(1, int(plan.sampled.sum())))
    rows = np.flatnonzero(plan.sampled[positions])
    cells = [
        drawn_cells(plan.source.ids[int(positions[row])], plan.recipe.seed, flat.shape[2], n_cells)
        for row in rows
    ]
    some = [to_numpy(flat[row][:, of]).T for row, of in zip(rows, cells, strict=True)]
    empty = np.empty((0, flat.shape[1]), np.float32)
    return Seen(
        best,
        np.concatenate([empty, *some]),
        np.repeat(positions[rows], [len(one) for one in cells]),
        np.concatenate([np.empty(0, np.int64), *cells]),
    )


def best_of(activations: Tensor, places: np.ndarray) -> Best:
    """Return of each channel the images of a batch `[B K H W]` and positions where it is largest.

    An image counts once, with the first of its largest positions.
    """
    peaks, cells = (to_numpy(one) for one in activations.flatten(2).max(-1))
    order = np.argsort(-peaks.T, axis=1, kind="stable")[:, :KEPT]
    values = (np.take_along_axis(one.T, order, 1) for one in (peaks, cells))
    peaks, cells = values
    return Best(peaks.astype(np.float32), places[order], cells.astype(np.int64))


def drawn_cells(id: str, seed: int, n: int, most: int) -> np.ndarray:
    """Choose positions of an image by a hash of its id: all n, or at least one; rising."""
    key = b"%d\0" % seed + id.encode("utf-8", "surrogateescape")
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return np.sort(np.random.default_rng(number).permutation(n)[: max(1, most)])


def joined(batches: Iterable[Seen]) -> dict[str, np.ndarray]:
    """Return what a chunk keeps of its batches, by name."""
    every = list(batches)
    best = reduce(lambda one, other: one.merged(other, KEPT), (one.best for one in every))
    arrays = {f"best_{name}": values for name, values in best._asdict().items()}
    names = Seen._fields[1:]
    return arrays | {f"seen_{n}": np.concatenate([getattr(b, n) for b in every]) for n in names}


def fitted(plan: Plan) -> dict[str, np.ndarray]:
    """Return the arrays of a new index by name: parts, and exemplars of channels and parts."""
    best = reduce(lambda one, other: one.merged(other, KEPT), _each_best(plan))
    ids, recipe = plan.source.ids, plan.recipe
    kept = [np.concatenate(plan.columns("embed", f"seen_{n}")) for n in Seen._fields[1:]]
    sample, places, cells = kept
    n = most_parts(recipe.concepts, sample, len(np.unique(places)))
    if not n:
        return arrays_of(best, None, None, ids)
    with plan.stages("concepts", len(sample)) as progressed:
        found = fit_parts(sample, n, recipe.seed)
        progressed(len(sample))
    if found is None:
        return arrays_of(best, None, None, ids)
    parts, amounts = found
    return arrays_of(best, best_positions(amounts, places, cells), parts, ids)


def _each_best(plan: Plan) -> Iterator[Best]:
    columns = (plan.columns("embed", f"best_{name}") for name in Best._fields)
    return (Best(*map(np.asarray, one)) for one in zip(*columns, strict=True))


def most_parts(asked: int, sample: np.ndarray, n_images: int) -> int:
    """Return how many parts are fitted to a sample `[n K]` of so many images; 0 for none."""
    width = int(sample.shape[1])
    if n_images < LEAST_IMAGES or width < LEAST_CHANNELS:
        return 0
    # Signed activations take two numbers a channel; half the room is for exemplars.
    n_bytes = 4 * width * (2 if (sample < 0).any() else 1)
    return min(asked, len(sample) // 2, width // 2, MOST_BYTES // 2 // n_bytes)


def fit_parts(sample: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Fit n parts to activations `[m K]`; return them, `[P K]` or `[P 2K]`, and amounts `[m P]`.

    Positions count by their direction alone. What is signed is taken apart into what is positive
    and what is negative. Parts have length 1, the one with most in the sample first; None where
    there is nothing but zeros.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    largest = float(np.abs(sample).max(initial=0))
    if not (0 < largest < np.inf):
        return None
    scaled = (sample / np.float32(largest)).astype(np.float32)
    if (scaled < 0).any():
        scaled = np.concatenate([np.maximum(scaled, 0), np.maximum(-scaled, 0)], axis=1)
    lengths = np.linalg.norm(scaled, axis=1)
    there = lengths > 0
    how = {"init": "nndsvda", "max_iter": _ITERATIONS, "tol": _TOLERANCE}
    model = NMF(n, **how, random_state=seed % (1 << 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        of_units = model.fit_transform(scaled[there] / lengths[there, None])
    sizes = np.linalg.norm(model.components_, axis=1)
    amounts = np.zeros((len(sample), n), np.float32)
    amounts[there] = of_units * sizes * (lengths[there, None] * largest)
    order = np.argsort(-amounts.sum(0, dtype=np.float64), kind="stable")
    order = order[(sizes > 0)[order]]
    if not len(order):
        return None
    parts = model.components_[order] / sizes[order, None]
    return parts.astype(np.float32), amounts[:, order]


def best_positions(amounts: np.ndarray, places: np.ndarray, cells: np.ndarray) -> Best:
    """Return of each part the positions with most of it, of as many images; amounts `[m P]`."""
    n = min(KEPT, len(np.unique(places)))
    rows = np.empty((amounts.shape[1], n), np.int64)
    for part, column in enumerate(amounts.T):
        order = np.lexsort((cells, places, -column))
        first = np.sort(np.unique(places[order], return_index=True)[1])[:n]
        rows[part] = order[first]
    return Best(np.take_along_axis(amounts.T, rows, 1), places[rows], cells[rows])
