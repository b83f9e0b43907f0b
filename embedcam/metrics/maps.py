"""Arrays checked and brought near 1; pixels in order; two maps, or two methods, compared."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .._checks import number, whole
from ..errors import InputError


def finite(values: ArrayLike, what: str, axes: str) -> np.ndarray:
    """Return numbers as finite float64 with the axes written in `axes` ("B H W"), none empty."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be an array of numbers [{axes}]; {error}") from error
    if array.ndim != len(axes.split()) or not array.size:
        given = f"{what} {list(array.shape)} must be [{axes}] with no empty axis"
        raise InputError(f"{given}; put one image in a batch of one")
    if not np.isfinite(array).all():
        raise InputError(f"{what} must be finite; got a NaN or an infinity: look at what made it")
    return array


def alike(first: ArrayLike, second: ArrayLike, what: str, axes: str) -> list[np.ndarray]:
    """Return two arrays as `finite` does, refusing different shapes: no pairing by broadcasting."""
    pair = [finite(values, what, axes) for values in (first, second)]
    shapes = [list(one.shape) for one in pair]
    if shapes[0] != shapes[1]:
        raise InputError(f"{what} have shapes {shapes[0]} and {shapes[1]}; give both the same")
    return pair


def drawn_maps(maps: ArrayLike) -> np.ndarray:
    """Return maps `[B H W]` as float64, finite and >= 0."""
    # Said before `finite` could, as of a map the sign is the likelier mistake.
    array = np.asarray(maps)
    if array.dtype.kind in "biuf" and not (array >= 0).all():
        what = "a map must be >= 0 everywhere; got a NaN or a negative value"
        raise InputError(f"{what}: give it as ReLU leaves it, not a signed map")
    return finite(maps, "maps", "B H W")


def maps_and_regions(
    maps: ArrayLike, inside: ArrayLike, *, signed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return maps and the regions they are judged by, both `[B H W]` float64, regions in [0, 1]."""
    sizes = list(np.shape(maps)), list(np.shape(inside))
    if sizes[0] != sizes[1] or len(sizes[0]) != 3:
        both = f"maps {sizes[0]} and regions {sizes[1]} must both be [B H W] of one size"
        raise InputError(f"{both}; resize the maps to the regions")
    checked = finite(maps, "maps", "B H W") if signed else drawn_maps(maps)
    regions = finite(inside, "regions", "B H W")
    if regions.min() < 0 or regions.max() > 1:
        given = f"regions must lie in [0, 1]; got {regions.min():g} to {regions.max():g}"
        raise InputError(f"{given}: a mask of 255 must be divided by 255")
    return checked, regions


def evened(values: np.ndarray) -> np.ndarray:
    """Return each row `[B ...]` times a power of two, its largest magnitude in [0.5, 1) or 0.

    No digit changes, while squares and sums of extreme values neither overflow nor vanish.
    """
    axes = tuple(range(1, values.ndim))
    _, exponent = np.frexp(np.abs(values).max(axes, keepdims=True))
    return np.asarray(np.ldexp(values, -exponent))


def pixel_ranks(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions `[B H*W]`, the largest first, ties in order, and places `[B H W]`."""
    order = np.argsort(-maps.reshape(len(maps), -1), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    return order, ranks.reshape(maps.shape)


def pixel_count(fraction: float, pixels: int) -> int:
    """Return how many of `pixels` a share is: the nearest whole number, halves up, at least 1."""
    return max(1, math.floor(fraction * pixels + 0.5))


def share_of(name: str, value: float) -> float:
    """Return a share in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{name} = {value}; it must lie in (0, 1]: 0.2 means a fifth")
    return float(value)


def cosines(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return the cosine between two weight vectors `[B K]` each, `[B]`; 0 where either is zero."""
    return _cosines(*alike(a, b, "weights", "B K"))


def correlations(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return Pearson's correlation of two maps `[B H W]` of any sign, `[B]`; 0 of a constant."""
    return _cosines(*(_centered(one.reshape(len(one), -1)) for one in alike(a, b, "maps", "B H W")))


def rank_correlations(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return Spearman's rank correlation of two maps `[B H W]`, `[B]`; 0 of a constant."""
    from scipy.stats import rankdata

    ranks = (rankdata(m.reshape(len(m), -1), axis=1) for m in alike(a, b, "maps", "B H W"))
    return _cosines(*map(_centered, ranks))


def map_iou(a: ArrayLike, b: ArrayLike, fraction: float) -> np.ndarray:
    """Return the IoU of the first `fraction` of pixels of two maps `[B H W]`, `[B]`.

    Less those at a map's smallest value: the zeros of two sparse maps are no agreement.
    """
    pair = alike(a, b, "maps", "B H W")
    count = pixel_count(share_of("fraction", fraction), pair[0][0].size)
    first, second = (
        (pixel_ranks(maps)[1] < count) & (maps > maps.min((1, 2), keepdims=True)) for maps in pair
    )
    either = (first | second).sum((1, 2))
    return np.asarray((first & second).sum((1, 2)) / np.maximum(either, 1))


def _centered(rows: np.ndarray) -> np.ndarray:
    rows = evened(rows)
    # A constant row is exactly zero, whatever its mean rounds to.
    constant = rows.max(1, keepdims=True) == rows.min(1, keepdims=True)
    return np.where(constant, 0, rows - rows.mean(1, keepdims=True))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = evened(a), evened(b)
    # Apart under the root: their product could vanish where neither does.
    norms = np.sqrt((a * a).sum(1)) * np.sqrt((b * b).sum(1))
    return np.asarray(np.clip((a * b).sum(1) / np.where(norms > 0, norms, 1), -1, 1))


BLOCK = 2**20
"""Resampled values held at once: 16 MB with their positions."""


class PairedDifference(NamedTuple):
    """Mean of a - b, its interval, and the share with a > b, equal pairs counting a half."""

    mean: float
    low: float
    high: float
    win_rate: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `[N]` figures of images or scenes (Efron 1979).

    `statistic` is called with `axis=1` on `[d N]`; `level` is the coverage, in (0, 1).
    """
    # Not scipy.stats.bootstrap, whose other random numbers would change every reported interval.
    values = finite(values, "values", "N")
    level = number("level", level, above=0, below=1)
    generator = np.random.default_rng(seed)
    count, step = whole("draws", draws, 1), max(1, BLOCK // len(values))
    resampled = [
        statistic(values[generator.integers(0, len(values), (rows, len(values)))], axis=1)
        for start in range(0, count, step)
        for rows in [min(step, count - start)]
    ]
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> PairedDifference:
    """Return the mean difference of two methods' figures `[N]` of the same images in one order.

    Pairs are resampled: what is hard about an image is hard for both, and cancels.
    """
    first, second = alike(a, b, "values", "N")
    low, high = bootstrap_interval(first - second, level=level, draws=draws, seed=seed)
    wins = (first > second).mean() + (first == second).mean() / 2
    return PairedDifference(float((first - second).mean()), low, high, float(wins))
