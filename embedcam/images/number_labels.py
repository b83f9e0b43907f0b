"""Labels that are numbers: read from their text, and who is near and who is far in value."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, short
from .texts import LabelColumn

LARGEST = 1e300
"""Of a label: differences of larger ones are no numbers any more."""
KNOTS = 33
"""Values at which `reach` is kept."""

Reach = tuple[tuple[float, ...], tuple[float, ...]]
"""Values, rising, and how far from each its positives lie; linear in between. Empty of classes."""


def number_of(text: str | None) -> float:
    """Return a label's number; NaN where it is none, not finite, or beyond 1e300 either way."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) <= LARGEST else math.nan


def near_share(recipe: Mapping[str, Any]) -> float | None:
    """Return the share of an index's images that are near in value; None of classes."""
    if recipe.get("labels", "classes") == "classes":
        return None
    share = recipe.get("positives")
    if type(share) is not float or not 0 < share < 1:
        raise InputError(
            f"the index's recipe has positives = {short(share)}; expected a share of the images "
            "between 0 and 1: build the index again"
        )
    return share


def check_number(text: str, where: str) -> None:
    """Refuse a label that is no number; the message begins with `where` it stands."""
    if math.isnan(number_of(text)):
        raise InputError(
            f"{where}: the label {short(text)} is not a finite number; correct it, leave it empty, "
            'or take the labels as classes (labels="auto")'
        )


def numbers_of(labels: LabelColumn) -> np.ndarray:
    """Return labels as numbers, float64 `[N]`; NaN of what has none or is none."""
    numbers = np.array([*map(number_of, labels.names), math.nan])  # -1 is the last
    return np.asarray(numbers[labels.codes])


def label_values(labels: Sequence[str | None], names: Sequence[str]) -> np.ndarray | None:
    """Return labels as numbers, float64 `[N]`, NaN without one; None where no image has one."""
    column = LabelColumn.of(labels)
    known = np.flatnonzero(column.codes >= 0)
    if not len(known):
        return None
    values = numbers_of(column)
    if (wrong := np.isnan(values[known])).any():
        place = int(known[wrong.argmax()])
        check_number(str(column[place]), f"image {short(names[place])}")
    return values


class Values:
    """Images in the order of their numbers `[N]`, and the positives and negatives of each.

    Of n labelled images let p be max(1, round(positives (n - 1))), and q likewise of negatives; let
    r be an image's distance in value to its p-th nearest other, and R that to its q-th farthest.
    Its positives are all others within r, its negatives all from R on that are no positives: images
    of one value are on one side together.

    `order` `[n]` holds the positions of the labelled images, rising in value; `ranks` `[N]` the
    place of every image in it, -1 of those without a number or without negatives. `near` and `far`
    `[n 2]` are by rank the half-open intervals of the positives and of all that is no negative.
    """

    def __init__(self, values: np.ndarray, positives: float, negatives: float) -> None:
        values = np.asarray(values, np.float64)
        labelled = np.flatnonzero(~np.isnan(values))
        self.order = labelled[np.argsort(values[labelled], kind="stable")]
        self._sorted = x = values[self.order]
        n = len(x)
        if n < 2 or x[0] == x[-1]:
            raise InputError(
                f"all {n} labels are the number {x[0]:g}, so none is far from another; give images "
                "of at least two numbers, build without labels, or use the target 'centred'"
            )
        within = self._radius(max(1, round(positives * (n - 1))))
        beyond = self._radius(n - max(1, round(negatives * (n - 1))))
        self.near = self._interval(lambda apart: apart <= within)
        self.far = self._interval(lambda apart: (apart <= within) | (apart < beyond))
        known = self.far[:, 1] - self.far[:, 0] < n
        self.ranks = np.full(len(values), -1)
        self.ranks[self.order[known]] = np.flatnonzero(known)
        self.reaches = within

    def reach(self) -> Reach:
        """Return how far the positives of a value lie, at up to 33 quantiles of the values."""
        places = np.linspace(0, len(self._sorted) - 1, KNOTS).round().astype(int)
        values, first = np.unique(self._sorted[places], return_index=True)
        return tuple(values.tolist()), tuple(self.reaches[places[first]].tolist())

    def _radius(self, count: int) -> np.ndarray:
        """Return the distance in value from each image to the `count`-th nearest other, `[n]`."""
        x, ranks = self._sorted, np.arange(len(self._sorted))
        low, high = np.maximum(ranks - count, 0), np.minimum(ranks, len(x) - 1 - count)
        # Of count + 1 images in a row: the farther left they begin, the farther the left end is.
        best = _first(low, high, lambda start: x[start + count] - x >= x - x[start])
        starts = np.stack([best, np.maximum(best - 1, low)])
        return np.asarray(np.maximum(x - x[starts], x[starts + count] - x).min(0))

    def _interval(self, inside: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the ranks around each whose distance is inside, `[n 2]`, the end excluded."""
        x, n = self._sorted, len(self._sorted)
        ranks = np.arange(n)
        start = _first(np.zeros(n, int), ranks, lambda place: inside(x - x[place]))
        stop = _first(
            ranks + 1, np.full(n, n), lambda place: ~inside(x[np.minimum(place, n - 1)] - x)
        )
        return np.stack([start, stop], axis=1)


def _first(
    low: np.ndarray, high: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the first whole number from `low` on, `high` at most, from which something holds."""
    low, high = low.copy(), high.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        held = holds(middle)
        high = np.where(open_ & held, middle, high)
        low = np.where(open_ & ~held, middle + 1, low)
    return low
