"""Signed maps beside a region, by the order of their values alone.

Sharpening a map, an offset or any other increasing change of its values raises energy and share
without knowing more; it changes nothing here, except for `equal_area_share`, which is of the map as
it is drawn and stands beside the others for that.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from .checks import evened, fraction_of, maps_and_regions


def pixel_auc(maps: ArrayLike, inside: ArrayLike, outside: ArrayLike | None = None) -> np.ndarray:
    """Return the area under the ROC curve of each map's pixels: inside a region against outside.

    It is the chance that a pixel drawn from inside has a larger value than one from outside, equal
    values counting half: 0.5 for a map that knows nothing, and where either region is empty.

    Args:
        maps: signed, `[B H W]`, before the ReLU.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].
        outside: what it is held against, as `inside`; None takes all the rest.

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: shapes that differ, an infinite or NaN value, an empty batch.
    """
    maps, inside = maps_and_regions(maps, inside, signed=True)
    other = 1 - inside
    if outside is not None:
        _, other = maps_and_regions(maps, outside, signed=True)
    areas = np.full(len(maps), 0.5)
    for row, (hits, misses) in enumerate(_steps(maps, inside, other)):
        if hits.sum() > 0 and misses.sum() > 0:
            before = hits.cumsum() - hits / 2
            areas[row] = (before * misses).sum() / (hits.sum() * misses.sum())
    return areas


def average_precision(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Return the average precision of each map's pixels as a search for those of a region.

    Precision is read after each step of equal values, the largest first, and weighted by the recall
    that the step adds, without interpolation. A map that knows nothing scores the region's share of
    the area; so does every map where the region is empty.

    Args:
        maps: signed, `[B H W]`, before the ReLU.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: as `pixel_auc`.
    """
    maps, inside = maps_and_regions(maps, inside, signed=True)
    scores = np.zeros(len(maps))
    for row, (hits, misses) in enumerate(_steps(maps, inside, 1 - inside)):
        if hits.sum() > 0:
            precision = hits.cumsum() / (hits + misses).cumsum()
            scores[row] = (precision * hits).sum() / hits.sum()
    return scores


def hottest_precision(
    maps: ArrayLike, inside: ArrayLike, fraction: float | None = None
) -> np.ndarray:
    """Return the share of each map's hottest pixels that lies in a region.

    Equal values at the border of the hottest count in part, so no rule of reading order decides: a
    map of one value scores the region's share of the area.

    Args:
        maps: signed, `[B H W]`, before the ReLU.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].
        fraction: how many of the pixels are hottest, in (0, 1]; None takes the region's own area,
            so that a perfect map scores 1. An empty region scores 0.

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: as `pixel_auc`, or a fraction outside (0, 1].
    """
    maps, inside = maps_and_regions(maps, inside, signed=True)
    pixels = maps[0].size
    scores = np.zeros(len(maps))
    for row, (hits, misses) in enumerate(_steps(maps, inside, 1 - inside)):
        area = hits.sum() if fraction is None else fraction_of(fraction, "fraction") * pixels
        if area > 0:
            size = hits + misses
            taken = np.clip(area - (size.cumsum() - size), 0, size)
            scores[row] = (taken / size * hits).sum() / area
    return scores


def equal_area_share(maps: ArrayLike, inside: ArrayLike, other: ArrayLike) -> np.ndarray:
    """Return the share of a region in the energy of two, each brought to the same area.

    mean inside / (mean inside + mean other): a larger object does not win by its size. 0.5 where
    the map has no energy in either, or one of them is empty.

    Args:
        maps: as drawn, `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].
        other: what it is held against, as `inside`.

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: shapes that differ, a negative, infinite or NaN value, an empty batch.
    """
    drawn, inside = maps_and_regions(maps, inside)
    drawn, other = maps_and_regions(drawn, other)
    drawn = evened(drawn)
    areas = [region.sum((1, 2)) for region in (inside, other)]
    dense = [
        (drawn * region).sum((1, 2)) / np.where(area > 0, area, 1)
        for region, area in zip((inside, other), areas, strict=True)
    ]
    both = dense[0] + dense[1]
    known = (areas[0] > 0) & (areas[1] > 0) & (both > 0)
    return np.where(known, dense[0] / np.where(both > 0, both, 1), 0.5)


def _steps(
    maps: np.ndarray, inside: np.ndarray, outside: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each map, how much of both regions lies at each of its values, largest first."""
    for one, hit, miss in zip(maps, inside, outside, strict=True):
        _, step = np.unique(-one.ravel(), return_inverse=True)
        yield np.bincount(step, hit.ravel()), np.bincount(step, miss.ravel())
