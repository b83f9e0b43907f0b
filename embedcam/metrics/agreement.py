"""How much two ways of explaining say the same: weight vectors and maps, pair by pair.

What does not vary agrees with nothing: a zero vector or a constant map scores 0, never NaN.
"""

import numpy as np
from numpy.typing import ArrayLike

from .checks import evened, finite, fraction_of, same_shape
from .order import pixel_count, pixel_ranks


def cosines(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Cosine of the angle between two weight vectors; 0 where either is zero.

    Args:
        a: `[B K]`.
        b: `[B K]`.

    Returns:
        `[B]` float64 in [-1, 1].

    Raises:
        InputError: shapes that differ, an empty batch, a NaN or an infinity.
    """
    a, b = finite(a, "weights", "B K"), finite(b, "weights", "B K")
    same_shape(a, b, "weights")
    return _cosines(a, b)


def correlations(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Pearson's correlation of two maps over their pixels; 0 where either is constant.

    Args:
        a: `[B H W]`, of any sign.
        b: `[B H W]`.

    Returns:
        `[B]` float64 in [-1, 1].

    Raises:
        InputError: shapes that differ, an empty batch, a NaN or an infinity.
    """
    first, second = _pairs(a, b)
    return _cosines(_centred(first), _centred(second))


def rank_correlations(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Spearman's rank correlation of two maps; equal pixels share their mean rank.

    The correlation that any increasing change of a map's values leaves alone; 0 where either is
    constant.

    Args:
        a: `[B H W]`, of any sign.
        b: `[B H W]`.

    Returns:
        `[B]` float64 in [-1, 1].

    Raises:
        InputError: shapes that differ, an empty batch, a NaN or an infinity.
    """
    first, second = _pairs(a, b)
    return _cosines(_centred(_mean_ranks(first)), _centred(_mean_ranks(second)))


def map_iou(a: ArrayLike, b: ArrayLike, fraction: float) -> np.ndarray:
    """Intersection over union of the two maps' top pixels.

    A map's top pixels are the first `fraction` of them (the nearest whole number, at least one) in
    order of decreasing value, ties broken by position, less those at the map's own smallest value:
    the zeros of two sparse maps are no evidence that both mean the same place. So a constant map
    has none, and scores 0.

    Args:
        a: `[B H W]`, of any sign.
        b: `[B H W]`.
        fraction: in (0, 1].

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: shapes that differ, an empty batch, a NaN or an infinity, a fraction outside
            (0, 1].
    """
    a, b = finite(a, "maps", "B H W"), finite(b, "maps", "B H W")
    same_shape(a, b, "maps")
    count = pixel_count(fraction_of(fraction, "fraction"), a[0].size)
    first, second = _top(a, count), _top(b, count)
    either = (first | second).sum((1, 2))
    overlap: np.ndarray = (first & second).sum((1, 2)) / np.maximum(either, 1)
    return overlap


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Two batches of maps, flattened to `[B H*W]`."""
    a, b = finite(a, "maps", "B H W"), finite(b, "maps", "B H W")
    same_shape(a, b, "maps")
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _centred(rows: np.ndarray) -> np.ndarray:
    """Rows less their mean; a constant row exactly zero, whatever its mean rounds to."""
    rows = evened(rows)
    constant = rows.max(1, keepdims=True) == rows.min(1, keepdims=True)
    return np.where(constant, 0, rows - rows.mean(1, keepdims=True))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = evened(a), evened(b)
    # Apart under the root: their product could vanish where neither does.
    norms = np.sqrt((a * a).sum(1)) * np.sqrt((b * b).sum(1))
    return np.clip((a * b).sum(1) / np.where(norms > 0, norms, 1), -1, 1)


def _mean_ranks(rows: np.ndarray) -> np.ndarray:
    """Rank of every value in its row, from 1; equal values share the mean of their places."""
    ranks = np.empty_like(rows)
    for row, out in zip(rows, ranks, strict=True):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        out[:] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _top(maps: np.ndarray, count: int) -> np.ndarray:
    _, ranks = pixel_ranks(maps)
    top: np.ndarray = (ranks < count) & (maps > maps.min((1, 2), keepdims=True))
    return top
