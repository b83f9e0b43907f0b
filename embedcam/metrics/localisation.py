"""Localization: a map beside the place it should mark.

Maps are `[B H W]`, regions `inside` too: booleans, or the covered part of each pixel in [0, 1].
Functions return `[B]` float64 in [0, 1]. A map without energy counts as uniform, and scores what
chance does. Sharpening raises energy and shares; `pixel_auc`, `average_precision` and
`hottest_precision` are of a signed map's order alone and do not change.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .._checks import whole
from ..errors import InputError
from .maps import alike, drawn_maps, evened, maps_and_regions, share_of

THRESHOLDS = tuple(step / 20 for step in range(1, 21))
"""0.05, 0.10 ... 1: what `best_iou` tries."""
Box = tuple[int, int, int, int]


def energy_share(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Return the share of each map's energy that lies inside (Chen et al., WACV 2020, sec. 4.2)."""
    drawn, region = maps_and_regions(maps, inside)
    drawn = evened(drawn)
    total = drawn.sum((1, 2))
    share: np.ndarray = (drawn * region).sum((1, 2)) / np.where(total > 0, total, 1)
    return np.where(total > 0, share, region.mean((1, 2)))


def equal_area_share(maps: ArrayLike, inside: ArrayLike, other: ArrayLike) -> np.ndarray:
    """Return mean inside / (mean inside + mean other): an object does not win by its size.

    0.5 where the map has no energy in either region, or one of them is empty.
    """
    drawn, both = evened(maps_and_regions(maps, inside)[0]), []
    for region in (inside, other):
        part = maps_and_regions(maps, region)[1]
        area = part.sum((1, 2))
        both.append((drawn * part).sum((1, 2)) / np.where(area > 0, area, np.nan))
    total = both[0] + both[1]
    return np.where(total > 0, both[0] / np.where(total > 0, total, 1), 0.5)


def pointing_hit(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Return whether the largest value lies inside, the pointing game (Zhang et al. 2018).

    Of several largest pixels it is the share that is inside.
    """
    maps, inside = maps_and_regions(maps, inside)
    largest = maps == maps.max((1, 2), keepdims=True)
    return np.asarray((largest * inside).sum((1, 2)) / largest.sum((1, 2)))


def pixel_auc(maps: ArrayLike, inside: ArrayLike, outside: ArrayLike | None = None) -> np.ndarray:
    """Return the area under the ROC curve of a signed map's pixels: inside against `outside`.

    None takes all the rest; equal values count half; 0.5 where either region is empty.
    """
    maps, inside = maps_and_regions(maps, inside, signed=True)
    _, other = maps_and_regions(maps, 1 - inside if outside is None else outside, signed=True)
    areas = np.full(len(maps), 0.5)
    for row, (hits, misses) in enumerate(_steps(maps, inside, other)):
        if hits.sum() > 0 and misses.sum() > 0:
            before = hits.cumsum() - hits / 2
            areas[row] = (before * misses).sum() / (hits.sum() * misses.sum())
    return areas


def average_precision(maps: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Return the average precision of a signed map's pixels as a search for those of a region.

    Read after each step of equal values, without interpolation; 0 where the region is empty.
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
    """Return the share of a signed map's hottest `fraction` of pixels that lies in a region.

    None takes the region's own area; equal values at the border of the hottest count in part.
    """
    maps, inside = maps_and_regions(maps, inside, signed=True)
    pixels = maps[0].size
    scores = np.zeros(len(maps))
    for row, (hits, misses) in enumerate(_steps(maps, inside, 1 - inside)):
        area = hits.sum() if fraction is None else share_of("fraction", fraction) * pixels
        if area > 0:
            size = hits + misses
            taken = np.clip(area - (size.cumsum() - size), 0, size)
            scores[row] = (taken / size * hits).sum() / area
    return scores


def _steps(
    maps: np.ndarray, inside: np.ndarray, outside: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each map, how much of both regions lies at each of its values, largest first."""
    for one, hit, miss in zip(maps, inside, outside, strict=True):
        _, step = np.unique(-one.ravel(), return_inverse=True)
        yield np.bincount(step, hit.ravel()), np.bincount(step, miss.ravel())


def iou_at(maps: ArrayLike, inside: ArrayLike, threshold: float) -> np.ndarray:
    """Return the IoU of a region and the pixels >= `threshold`, in (0, 1], of a map's largest."""
    maps, inside = maps_and_regions(maps, inside)
    marked = _marked(maps, threshold)
    both = (marked * inside).sum((1, 2))
    return np.asarray(both / np.where(marked, 1.0, inside).sum((1, 2)))


def best_iou(
    maps: ArrayLike, inside: ArrayLike, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[np.ndarray, np.ndarray]:
    """Return each map's best `iou_at` of several thresholds, and the first that gives it.

    It looks at the answer: a bound on what a threshold could do, not a threshold to use.
    """
    tried = np.array([share_of("threshold", value) for value in thresholds])
    if not len(tried):
        raise InputError("no thresholds; give one or more, each in (0, 1]")
    drawn, regions = maps_and_regions(maps, inside)
    order = np.argsort(tried, kind="stable")
    scores = np.empty((len(drawn), len(tried)))
    for row, (one, region) in enumerate(zip(evened(drawn), regions, strict=True)):
        scores[row, order] = _ious(one, region, tried[order])
    best = scores.argmax(1)
    return scores[np.arange(len(scores)), best], tried[best]


def _marked(maps: np.ndarray, threshold: float) -> np.ndarray:
    """Return which pixels are >= threshold * max; all of a map without energy, by the same rule."""
    even = evened(maps)
    limits = share_of("threshold", threshold) * even.max((1, 2), keepdims=True)
    return np.asarray(even >= limits)


def _ious(even: np.ndarray, inside: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """Return `iou_at` of one map for every threshold `[n]`, from one look at each pixel."""
    # A pixel's level is how many thresholds it passes, by the very comparisons of `_marked`.
    levels = np.searchsorted(rising * even.max(), even.ravel(), side="right")
    bins = len(rising) + 1
    pixels = np.bincount(levels, minlength=bins)
    covered = np.bincount(levels, inside.ravel(), minlength=bins)
    marked, both = (counts[::-1].cumsum()[::-1][1:] for counts in (pixels, covered))
    return np.asarray(both / (marked + covered.cumsum()[:-1]))


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Return the part of each pixel, `[H W]` in [0, 1], that a box x0, y0, x1, y1 covers."""
    if len(box) != 4 or any(math.isnan(edge) for edge in box):
        raise InputError(f"box {box} must be four numbers: x0, y0, x1, y1 in pixels of the map")
    x0, y0, x1, y1 = box
    rows = np.arange(whole("height", size[0], 1))
    columns = np.arange(whole("width", size[1], 1))
    down = np.clip(np.minimum(rows + 1, y1) - np.maximum(rows, y0), 0, 1)
    across = np.clip(np.minimum(columns + 1, x1) - np.maximum(columns, x0), 0, 1)
    return np.asarray(down[:, None] * across[None, :])


def box_from_map(maps: ArrayLike, threshold: float = 0.2) -> np.ndarray:
    """Return the box `[B 4]` around the largest connected part of a map (Zhou et al., CVPR 2016).

    Pixels x0, y0, x1, y1, cut at `threshold` of the largest value; corners connect, of equally
    large parts the first in reading order is taken. A map without energy gives the whole picture.
    """
    boxes = [_largest_part(one) for one in _marked(drawn_maps(maps), threshold)]
    return np.array(boxes, np.float64)


def _largest_part(marked: np.ndarray) -> Box:
    from scipy import ndimage

    parts, _ = ndimage.label(marked, np.ones((3, 3)))
    _, first, sizes = np.unique(parts[marked], return_index=True, return_counts=True)
    taken = int(parts[marked][first[sizes == sizes.max()].min()])
    rows, columns = ndimage.find_objects(parts, taken)[taken - 1]
    return columns.start, rows.start, columns.stop, rows.stop


def box_iou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return the IoU of two boxes `[B 4]` (x0 <= x1, y0 <= y1), pair by pair; 0 without area."""
    a, b = alike(a, b, "boxes", "B 4")
    # Axes: pair, box, corner, coordinate.
    pair = evened(np.stack([_boxes(a), _boxes(b)], axis=1).reshape(len(a), 2, 2, 2))
    sides = np.clip(pair[:, :, 1].min(1) - pair[:, :, 0].max(1), 0, None)
    both = sides.prod(1)
    either = (pair[:, :, 1] - pair[:, :, 0]).prod(2).sum(1) - both
    return np.asarray(np.clip(both / np.where(either > 0, either, 1), 0, 1))


def localisation_accuracy(boxes: ArrayLike, truth: ArrayLike, least: float = 0.5) -> float:
    """Return the share of boxes `[B 4]` with an IoU of `least` or more (Zhou et al., CVPR 2016)."""
    return float((box_iou(boxes, truth) >= share_of("least", least)).mean())


def _boxes(boxes: np.ndarray) -> np.ndarray:
    if boxes.shape[1] != 4:
        raise InputError(f"boxes {list(boxes.shape)} must be [B 4]: x0, y0, x1, y1 of each")
    turned = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if turned.any():
        what = f"box {boxes[turned][0].tolist()} has its edges the wrong way round"
        raise InputError(f"{what}; give x0, y0, x1, y1, not a width and a height")
    return boxes
