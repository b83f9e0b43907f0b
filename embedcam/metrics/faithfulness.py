"""Whether a map marks what the network used: what to remove, and what the scores after it say.

The parts that need no network. A caller removes pixels by the masks made here (filled by a colour,
a blur or `noisy_linear_imputation`), runs its network, and hands back the scores or similarities,
where larger is more like.
"""

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from .checks import evened, finite, fraction_of, maps_of, same_shape, whole
from .order import pixel_count, pixel_ranks


def deletion_steps(maps: ArrayLike, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels go first: deletion and insertion in S steps (Petsiuk et al., BMVC 2018).

    Pixels go in order of decreasing value, ties by position, row by row, so that the same map
    always goes the same way. Mask j holds the first j/S of them, to the nearest whole number
    (halves up). Deletion removes a mask's pixels, insertion keeps only those.

    Args:
        maps: `[B H W]`, >= 0.
        steps: S, 1 to H*W.

    Returns:
        The order as flat positions, `[B H*W]` int64, and the masks, `[B S+1 H W]` booleans: the
        first empty, the last full.

    Raises:
        InputError: maps that are not `[B H W]`, a negative, infinite or NaN value, an empty batch,
            or more steps than pixels.
    """
    maps = maps_of(maps)
    pixels = maps[0].size
    steps = whole(steps, "steps", 1, pixels)
    order, ranks = pixel_ranks(maps)
    counts = (2 * np.arange(steps + 1) * pixels + steps) // (2 * steps)
    return order, ranks[:, None] < counts[:, None, None]


def removal_masks(maps: ArrayLike, fraction: float) -> np.ndarray:
    """A map's top pixels: the first `fraction` of them in the order of `deletion_steps`.

    Args:
        maps: `[B H W]`, >= 0.
        fraction: in (0, 1]; the nearest whole number of pixels is taken, halves up, at least one.

    Returns:
        `[B H W]` booleans, the same number true in each.

    Raises:
        InputError: maps that are not `[B H W]`, a negative, infinite or NaN value, an empty batch,
            or a fraction outside (0, 1].
    """
    maps = maps_of(maps)
    count = pixel_count(fraction_of(fraction, "fraction"), maps[0].size)
    _, ranks = pixel_ranks(maps)
    masks: np.ndarray = ranks < count
    return masks


def curve_area(scores: ArrayLike) -> np.ndarray:
    """Area under a deletion or insertion curve by the trapezoid rule (Petsiuk et al., BMVC 2018).

    The share of pixels removed runs over [0, 1] in equal steps, so a constant score is its own
    area. Deletion is better the smaller it is, insertion the larger.

    Args:
        scores: `[B S+1]`, S >= 1, of any sign: before the first step, and after each.

    Returns:
        `[B]` float64, between the smallest and the largest score.

    Raises:
        InputError: scores that are not `[B S+1]`, a NaN or an infinity, an empty batch, no step.
    """
    scores = finite(scores, "scores", "B S+1")
    steps = scores.shape[1] - 1
    if not steps:
        raise InputError("scores [B 1] are no curve; give the score before and after each step")
    # Each divided before it is added: a sum of large scores could overflow.
    weights = np.full(steps + 1, 1 / steps)
    weights[[0, -1]] /= 2
    areas: np.ndarray = (scores * weights).sum(1)
    return np.clip(areas, scores.min(1), scores.max(1))


def rank_of(scores: ArrayLike, item: ArrayLike) -> np.ndarray:
    """The place of one gallery item in the ranking of each query; 1 is the first.

    Items of equal score share their mean place: among N equal ones each is at (N + 1) / 2, whatever
    order they are stored in.

    Args:
        scores: `[B N]`, a similarity of every gallery item: larger is nearer. Give minus a
            distance.
        item: `[B]` whole numbers from 0 to N - 1.

    Returns:
        `[B]` float64 in [1, N], whole or half.

    Raises:
        InputError: shapes that do not go together, a NaN or an infinity, an empty batch, an item
            that is not in the gallery.
    """
    scores, item = finite(scores, "scores", "B N"), np.asarray(item)
    count = scores.shape[1]
    if item.shape != scores.shape[:1] or item.dtype.kind not in "iu":
        raise InputError(
            f"items {list(item.shape)} of type {item.dtype} with scores {list(scores.shape)}; "
            "give one whole number a query: its item's place in the gallery"
        )
    if item.min() < 0 or item.max() >= count:
        raise InputError(
            f"items {item.min()} to {item.max()} of a gallery of {count}; "
            f"give places from 0 to {count - 1}"
        )
    own = scores[np.arange(len(scores)), item][:, None]
    ranks: np.ndarray = (scores > own).sum(1) + ((scores == own).sum(1) + 1) / 2
    return ranks


def rank_drop(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    """By how many places an item fell; negative where it rose.

    Args:
        before: ranks `[B]` with the whole picture, as `rank_of` gives them, 1 the first.
        after: ranks `[B]` with pixels removed.

    Returns:
        `[B]` float64.

    Raises:
        InputError: shapes that differ, a rank below 1, a NaN or an infinity, an empty batch.
    """
    first, second = _ranks(before, after)
    drop: np.ndarray = second - first
    return drop


def leaves_top(before: ArrayLike, after: ArrayLike, k: int) -> np.ndarray:
    """Whether an item was among the first k and no longer is.

    One that was not there cannot leave: it is false, and a share should be taken over those with
    `before <= k`.

    Args:
        before: ranks `[B]` with the whole picture, as `rank_of` gives them, 1 the first.
        after: ranks `[B]` with pixels removed.
        k: 1 or more.

    Returns:
        `[B]` booleans.

    Raises:
        InputError: shapes that differ, a rank below 1, a NaN or an infinity, an empty batch, k < 1.
    """
    first, second = _ranks(before, after)
    k = whole(k, "k", 1)
    left: np.ndarray = (first <= k) & (second > k)
    return left


def score_drops(
    full: ArrayLike, masked: ArrayLike, base: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """The share of each image's score that is lost where only the map's part of it is shown.

    Chattopadhay et al. (2018) divide max(0, y - y_masked) by y, a probability. Similarities and
    margins may be negative, and have no natural zero; here it is the score of the wholly masked
    image:

        drop = max(0, y - y_masked) / (y - y_base), at most 1.

    With y_base = 0 and scores >= 0 that is the paper's. An image with y <= y_base has nothing to
    lose: it is not counted, rather than called a perfect or a hopeless case, which would reward the
    method or punish it for what no map could change. Which images count does not depend on the map,
    so all methods are judged on the same ones.

    Args:
        full: y, `[B]`, the score of the whole image.
        masked: y_masked, `[B]`, of the image with only what the map marks.
        base: y_base, `[B]`, of the image with everything masked by the same fill.

    Returns:
        The drops, `[B]` float64 in [0, 1], 0 where not counted; and which are counted, `[B]`
        booleans.

    Raises:
        InputError: shapes that differ, a NaN or an infinity, an empty batch.
    """
    y, y_masked = finite(full, "scores", "B"), finite(masked, "scores", "B")
    y_base = finite(base, "scores", "B")
    same_shape(y, y_masked, "full and masked scores")
    same_shape(y, y_base, "full and base scores")
    counted = y > y_base
    y, y_masked, y_base = evened(np.stack([y, y_masked, y_base], axis=1)).T
    span = np.maximum(y - y_base, 0)
    lost = np.clip(y - y_masked, 0, span)
    return lost / np.where(span > 0, span, 1), counted


def average_drop(full: ArrayLike, masked: ArrayLike, base: ArrayLike) -> float:
    """Mean of `score_drops` over the images that count (Chattopadhay et al. 2018, restated there).

    Args:
        full: `[B]`, the score of the whole image.
        masked: `[B]`, of the image with only what the map marks.
        base: `[B]`, of the image with everything masked by the same fill.

    Returns:
        A share in [0, 1]; smaller is better. Say beside it how many images counted.

    Raises:
        InputError: as `score_drops`, or no image counts.
    """
    drops, counted = score_drops(full, masked, base)
    if not counted.any():
        raise InputError(
            f"none of {len(counted)} images scores above its wholly masked self, so there is "
            "nothing to drop; give other images or another fill"
        )
    return float(drops[counted].mean())


def average_increase(full: ArrayLike, masked: ArrayLike) -> float:
    """Share of images that score higher with only the map's part shown (Chattopadhay et al. 2018).

    A comparison of two scores, so it holds for those of any sign, and every image counts; one that
    stays exactly as it was did not increase.

    Args:
        full: `[B]`, the score of the whole image.
        masked: `[B]`, of the image with only what the map marks.

    Returns:
        A share in [0, 1]; larger is better.

    Raises:
        InputError: shapes that differ, a NaN or an infinity, an empty batch.
    """
    y, y_masked = finite(full, "scores", "B"), finite(masked, "scores", "B")
    same_shape(y, y_masked, "full and masked scores")
    return float((y_masked > y).mean())


def _ranks(before: ArrayLike, after: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = finite(before, "ranks", "B"), finite(after, "ranks", "B")
    same_shape(first, second, "ranks before and after")
    least = min(first.min(), second.min())
    if least < 1:
        raise InputError(f"a rank of {least:g}; ranks begin at 1, as `rank_of` counts them")
    return first, second
