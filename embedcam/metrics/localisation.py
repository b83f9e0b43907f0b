"""A map beside the place it should mark: no sharpening, and a threshold only where a name says so.

A map without energy marks no place. Everything here counts it as a uniform map, which scores what
chance does: the region's share of the area.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from ..errors import InputError
from .checks import evened, finite, fraction_of, maps_and_regions, maps_of, same_shape, whole

THRESHOLDS = tuple(step / 20 for step in range(1, 21))
"""0.05, 0.10 ... 1: what `best_iou` tries."""


def energy_share(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Share of each map's energy that lies inside a region (Chen et al., WACV 2020, section 4.2).

    A map without energy tells nothing: it scores chance, the region's share of the area.

    Args:
        maps: `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: shapes that differ, a negative, infinite or NaN value, an empty batch.
    """
    maps, inside = maps_and_regions(maps, inside)
    maps = evened(maps)
    total = maps.sum((1, 2))
    chance = inside.mean((1, 2))
    share = (maps * inside).sum((1, 2)) / np.where(total > 0, total, 1)
    return np.where(total > 0, share, chance)


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """A box as the covered part of each pixel, `[H W]` in [0, 1].

    Args:
        box: x0, y0, x1, y1 in pixels of the map, edges between pixels; parts outside are cut.
        size: (H, W), both >= 1.

    Raises:
        InputError: a box that is not four numbers, a NaN, or an empty size.
    """
    if len(box) != 4 or any(math.isnan(edge) for edge in box):
        raise InputError(f"box {box} must be four numbers: x0, y0, x1, y1 in pixels of the map")
    x0, y0, x1, y1 = box
    rows = np.arange(whole(size[0], "height", 1))
    columns = np.arange(whole(size[1], "width", 1))
    down = np.clip(np.minimum(rows + 1, y1) - np.maximum(rows, y0), 0, 1)
    across = np.clip(np.minimum(columns + 1, x1) - np.maximum(columns, x0), 0, 1)
    return down[:, None] * across[None, :]


def pointing_hit(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """The pointing game (Zhang et al. 2018): whether a map's largest value lies in the region.

    Of several largest pixels each counts the same: the score is the share of them that is inside,
    so no rule of reading order decides. There is no margin around the region: widen `inside` for
    one. A map without energy, like a uniform one, scores the region's share of the area.

    Args:
        maps: `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].

    Returns:
        `[B]` float64 in [0, 1]; 0 or 1 where the largest pixel is one and the region of booleans.

    Raises:
        InputError: shapes that differ, a negative, infinite or NaN value, an empty batch.
    """
    maps, inside = maps_and_regions(maps, inside)
    largest = maps == maps.max((1, 2), keepdims=True)
    hits: np.ndarray = (largest * inside).sum((1, 2)) / largest.sum((1, 2))
    return hits


def iou_at(maps: ArrayLike, inside: ArrayLike, threshold: float) -> np.ndarray:
    """Intersection over union of a region and the pixels >= `threshold` times the map's largest.

    A map without energy, like a uniform one, marks the whole picture: it scores the region's share
    of the area.

    Args:
        maps: `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].
        threshold: in (0, 1].

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: shapes that differ, a negative, infinite or NaN value, an empty batch, or a
            threshold outside (0, 1].
    """
    maps, inside = maps_and_regions(maps, inside)
    marked = _marked(maps, threshold)
    both = (marked * inside).sum((1, 2))
    either: np.ndarray = np.where(marked, 1.0, inside).sum((1, 2))
    return both / either


def best_iou(
    maps: ArrayLike, inside: ArrayLike, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[np.ndarray, np.ndarray]:
    """The largest `iou_at` over thresholds, image by image, and the threshold that reaches it.

    The threshold is chosen by looking at the answer: an upper bound on what a fixed one can do, not
    what a user gets.

    Args:
        maps: `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].
        thresholds: each in (0, 1]; of equally good ones the first given is told.

    Returns:
        IoU `[B]` in [0, 1] and threshold `[B]`, float64.

    Raises:
        InputError: as `iou_at`, or no threshold at all.
    """
    tried = np.array([fraction_of(one, "threshold") for one in thresholds])
    if not tried.size:
        raise InputError("no thresholds; give one or more, each in (0, 1]")
    drawn, regions = maps_and_regions(maps, inside)
    order = np.argsort(tried, kind="stable")
    scores = np.empty((len(drawn), len(tried)))
    for row, (one, region) in enumerate(zip(evened(drawn), regions, strict=True)):
        scores[row, order] = _ious(one, region, tried[order])
    best = scores.argmax(1)
    return scores[np.arange(len(scores)), best], tried[best]


def box_from_map(maps: ArrayLike, threshold: float = 0.2) -> np.ndarray:
    """The tight box around the largest connected part of a map, cut at a share of its top value.

    Weakly supervised localisation as in Zhou et al. (CVPR 2016): a fifth of the map's largest value
    as the threshold, and the box that covers the largest connected component. Pixels that touch at
    a corner are connected; of equally large components the one that begins first, row by row, is
    taken. A map without energy, like a uniform one, gives the whole picture.

    Args:
        maps: `[B H W]`, >= 0.
        threshold: share of the largest value, in (0, 1].

    Returns:
        `[B 4]` float64: x0, y0, x1, y1 in pixels, edges between pixels.

    Raises:
        InputError: maps that are not `[B H W]`, a negative, infinite or NaN value, an empty batch,
            or a threshold outside (0, 1].
    """
    boxes = [_largest_part(one) for one in _marked(maps_of(maps), threshold)]
    return np.array(boxes, np.float64)


def box_iou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Intersection over union of two boxes, pair by pair; two boxes without area score 0.

    Args:
        a: `[B 4]`: x0, y0, x1, y1 with x0 <= x1 and y0 <= y1.
        b: `[B 4]`.

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        InputError: boxes that are not `[B 4]`, a NaN, or edges the wrong way round.
    """
    a, b = _boxes(a), _boxes(b)
    same_shape(a, b, "boxes")
    # Axes: pair, box, corner, coordinate.
    pair = evened(np.stack([a, b], axis=1).reshape(len(a), 2, 2, 2))
    sides = np.clip(pair[:, :, 1].min(1) - pair[:, :, 0].max(1), 0, None)
    both = sides.prod(1)
    either = (pair[:, :, 1] - pair[:, :, 0]).prod(2).sum(1) - both
    return np.clip(both / np.where(either > 0, either, 1), 0, 1)


def localisation_accuracy(boxes: ArrayLike, truth: ArrayLike, least: float = 0.5) -> float:
    """Share of boxes that overlap the true one with an IoU of `least` or more.

    The half is that of weakly supervised localisation (Zhou et al., CVPR 2016), there counted only
    where the class is right too; an embedding has no class, so the box alone counts.

    Args:
        boxes: `[B 4]`, as `box_from_map` gives them.
        truth: `[B 4]`, the true boxes.
        least: the IoU that counts as found, in (0, 1].

    Returns:
        A share in [0, 1].

    Raises:
        InputError: as `box_iou`, or `least` outside (0, 1].
    """
    return float((box_iou(boxes, truth) >= fraction_of(least, "least")).mean())


def _marked(maps: np.ndarray, threshold: float) -> np.ndarray:
    """Pixels >= threshold * max; a map without energy is marked everywhere, by the same rule."""
    even = evened(maps)
    marked: np.ndarray = even >= fraction_of(threshold, "threshold") * even.max(
        (1, 2), keepdims=True
    )
    return marked


def _ious(even: np.ndarray, inside: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """`iou_at` of one map for every threshold `[n]`, from one look at each pixel.

    A pixel's level is how many thresholds it passes, by the very comparisons of `_marked`.
    """
    levels = np.searchsorted(rising * even.max(), even.ravel(), side="right")
    bins = len(rising) + 1
    pixels = np.bincount(levels, minlength=bins)
    covered = np.bincount(levels, inside.ravel(), minlength=bins)
    marked, both = (counts[::-1].cumsum()[::-1][1:] for counts in (pixels, covered))
    ious: np.ndarray = both / (marked + covered.cumsum()[:-1])
    return ious


def _largest_part(marked: np.ndarray) -> tuple[int, int, int, int]:
    parts, _ = ndimage.label(marked, np.ones((3, 3)))
    _, first, sizes = np.unique(parts[marked], return_index=True, return_counts=True)
    taken = int(parts[marked][first[sizes == sizes.max()].min()])
    rows, columns = ndimage.find_objects(parts, taken)[taken - 1]
    return columns.start, rows.start, columns.stop, rows.stop


def _boxes(boxes: ArrayLike) -> np.ndarray:
    array = finite(boxes, "boxes", "B 4")
    if array.shape[1] != 4:
        raise InputError(f"boxes {list(array.shape)} must be [B 4]: x0, y0, x1, y1 of each")
    turned = (array[:, 2:] < array[:, :2]).any(1)
    if turned.any():
        raise InputError(
            f"box {array[turned][0].tolist()} has its edges the wrong way round; "
            "give x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, not a width and a height"
        )
    return array
