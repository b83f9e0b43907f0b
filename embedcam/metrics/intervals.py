"""How sure a mean or a difference is, by resampling images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from .checks import finite, same_shape, whole

BLOCK = 2**20
"""Resampled values held at once: 16 MB with their positions."""


class PairedDifference(NamedTuple):
    """How two ways fare on the same images."""

    mean: float
    """Mean of a - b."""
    low: float
    """Lower end of the interval around the mean."""
    high: float
    """Upper end."""
    win_rate: float
    """Share of images with a > b, an equal pair counting one half."""


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval over images or scenes (Efron 1979).

    Args:
        values: `[N]`, one figure an image or scene.
        statistic: called with `axis=1` on some of the draws at a time, `[d N]`.
        level: coverage, in (0, 1).
        draws: resamples, 1 or more.
        seed: of the resampling.

    Returns:
        The lower and the upper end.

    Raises:
        InputError: no values, a NaN or an infinity, a level outside (0, 1), no draws.
    """
    values = finite(values, "values", "N")
    if not 0 < level < 1:
        raise InputError(f"level = {level}; it must lie between 0 and 1: 0.95 for 95%")
    generator = np.random.default_rng(seed)
    count, step = whole(draws, "draws", 1), max(1, BLOCK // len(values))
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
    """Mean difference of two ways on the same images, its bootstrap interval and the win rate.

    Pairs are resampled, not the two sides: what is hard about an image is hard for both, and
    cancels.

    Args:
        a: `[N]`, one figure an image.
        b: `[N]`, of the same images in the same order.
        level: coverage, in (0, 1).
        draws: resamples, 1 or more.
        seed: of the resampling.

    Returns:
        The mean of a - b, its interval, and the share of images with a > b (ties count half).

    Raises:
        InputError: shapes that differ, and as `bootstrap_interval`.
    """
    a, b = finite(a, "values", "N"), finite(b, "values", "N")
    same_shape(a, b, "the values of the two ways")
    low, high = bootstrap_interval(a - b, level=level, draws=draws, seed=seed)
    wins = (a > b).mean() + (a == b).mean() / 2
    return PairedDifference(float((a - b).mean()), low, high, float(wins))
