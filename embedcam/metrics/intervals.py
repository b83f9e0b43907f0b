"""How sure a mean or a difference is, by resampling images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .._checks import number, whole
from .maps import alike, finite

BLOCK = 2**20
"""Resampled values held at once: 16 MB with their positions."""


class PairedDifference(NamedTuple):
    """How two methods fare on the same images: the mean of a - b, its interval, and the win rate.

    The win rate is the share of images with a > b, an equal pair counting one half.
    """

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

    `statistic` is called with `axis=1` on some of the `draws` at a time, `[d N]`; `level` is the
    coverage, in (0, 1).
    """
    # Not scipy.stats.bootstrap, whose other random numbers would change every reported interval.
    values = finite(values, "values", "N")
    level = number("level", level, above=0, below=1)
    generator = np.random.default_rng(seed)
    count, step = whole("draws", draws, 1), max(1, BLOCK // len(values))
    # The numbers drawn are the same however they are cut.
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

    Pairs are resampled, not the two sides: what is hard about an image is hard for both, and
    cancels.
    """
    first, second = alike(a, b, "values", "N")
    low, high = bootstrap_interval(first - second, level=level, draws=draws, seed=seed)
    wins = (first > second).mean() + (first == second).mean() / 2
    return PairedDifference(float((first - second).mean()), low, high, float(wins))
