"""Whether a query's first result is of its kind: evidence of ten neighbours, and what reads it.

Match says whether the *result* is right; trust (`embedcam.calibration`) whether the *map* is.
Arrays only, so that a service needs neither torch nor scikit-learn; `embedcam.match_fit` fits it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..images.number_labels import Reach, number_of
from .calibration import fall, numbers_of, rising

if TYPE_CHECKING:
    from .records import Manifest

TEN = 10
"""Neighbours that match looks at, however many are shown."""
FALLEN = 1.15
"""Times `far`, of squared distances, beyond which nothing matches: noise and blank pictures lie
farther, and near nothing that was indexed a label says nothing."""
EVIDENCE = ("nearness", "mean nearness", "share", "gap")
"""What is looked at; with a single neighbour only the first."""


_OF_NUMBERS = ("values", "reaches")


def match_evidence(distances: np.ndarray, same: np.ndarray) -> np.ndarray:
    """What predicts whether the first of n results is of the query's kind.

    With d_i the Euclidean distances and 1 / d_i^2 their weights (equal where one is 0: those at
    distance 0 alone count):

    - *nearness*, *mean nearness*: minus the first's distance, minus the mean of all;
    - *share*: weighted share of the results that have the first's label, the first left out;
    - *gap*: how much nearer the first is than the nearest of another label,
      1 - d_1 / d_other, at least 0; the farthest stands in where all have its label.

    Args:
        distances: squared Euclidean distances of the results, the first one first, `[n]`.
        same: which results are of the first one's kind, see `alike`, `[n]`.

    Returns:
        float64 `[4]`, or `[1]` for one result.
    """
    # Of ten numbers, in Python: done before NumPy has begun.
    apart = [math.sqrt(value) for value in np.asarray(distances, np.float64).tolist()]
    if len(apart) == 1:
        return np.array([-apart[0]])
    rest = list(zip(apart[1:], np.asarray(same, bool)[1:].tolist(), strict=True))
    nearest = min(one for one, _ in rest)
    weights = [(nearest / one) ** 2 if nearest > 0 else float(one == 0) for one, _ in rest]
    agreeing = sum(weight for weight, (_, alike) in zip(weights, rest, strict=True) if alike)
    others = [one for one, alike in rest if not alike]
    other = min(others) if others else max(one for one, _ in rest)
    gap = max(0.0, 1 - apart[0] / other) if other > 0 else 0.0
    return np.array([-apart[0], -sum(apart) / len(apart), agreeing / sum(weights), gap])


def alike(one: str | None, others: Sequence[str | None], reach: Reach = ((), ())) -> np.ndarray:
    """Which labels are of one label's kind, `[n]` booleans; nothing is without a label.

    Args:
        one: the label.
        others: `[n]`.
        reach: of labels that are numbers, how far from a value its kind goes; of classes empty, and
            equal labels are of one kind.
    """
    if one is None:
        return np.zeros(len(others), bool)
    if not reach[0]:
        return np.array([other == one for other in others], bool)
    value = number_of(one)
    apart = np.abs(np.array([number_of(other) for other in others]) - value)
    found: np.ndarray = apart <= np.interp(value, *reach)
    return found


def kinship(manifest: "Manifest") -> Callable[[str, str], bool]:
    """Whether a second label is of a first one's kind, as an index has it.

    Numbers of which nothing was calibrated are never of two kinds.
    """
    if manifest.near_share is None:
        return lambda one, other: one == other
    calibration = (manifest.match_calibration or {}).get("several")
    if calibration is None:
        return lambda one, other: True
    reach = calibration.reach
    return lambda one, other: bool(alike(one, [other], reach)[0])


@dataclass(frozen=True)
class MatchCalibration:
    """From the results of a query to the probability that the first is of its kind.

    With labels: a logistic function of the standardised evidence. Without: the share of the indexed
    images whose own nearest image is at least as far away as the query's, so that usual queries lie
    around 1/2 and it only falls with distance. Beyond `far` both fall linearly, to 0 at 1.15 times
    it.

    Args:
        mean: of the evidence, `[F]`; empty without labels, as the two below.
        scale: its standard deviations, `[F]`, > 0.
        linear: `[F]`.
        intercept: of the logistic function.
        distances: of the knots, squared Euclidean, rising.
        shares: of the images whose nearest is at least as far, in [0, 1], never rising.
        far: squared distance from which match falls to 0.
        neighbors: how many results it was fitted with.
        images: how many images it was fitted with.
        values, reaches: of labels that are numbers, see `number_labels.Reach`; of classes empty.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    linear: tuple[float, ...]
    intercept: float
    distances: tuple[float, ...]
    shares: tuple[float, ...]
    far: float
    neighbors: int
    images: int
    values: tuple[float, ...] = ()
    reaches: tuple[float, ...] = ()

    @property
    def reach(self) -> Reach:
        """How far from a value its kind goes; of classes empty."""
        return self.values, self.reaches

    def match(self, distances: np.ndarray, labels: Sequence[str | None]) -> float:
        """Probability in [0, 1] that the first result is of the query's kind.

        Args:
            distances: squared Euclidean, of the results, the first one first, `[n]`.
            labels: of the results.
        """
        first = float(distances[0])
        if not self.mean or labels[0] is None:
            expected = float(np.interp(first, self.distances, self.shares))
        else:
            same = alike(labels[0], labels, self.reach)
            seen = match_evidence(distances, same).tolist()
            fitted = zip(seen, self.mean, self.scale, self.linear, strict=True)
            score = self.intercept + sum((one - m) / s * w for one, m, s, w in fitted)
            # Of a forged calibration: what is no number is no match.
            held = max(-700.0, min(score, 700.0))
            expected = 0.0 if math.isnan(score) else 1 / (1 + math.exp(-held))
        return expected * float(fall(np.asarray(first), self.far, FALLEN))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest; those of numbers where labels are numbers."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if self.values or name not in _OF_NUMBERS
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MatchCalibration":
        """From plain values, none of which is believed before it is checked.

        Raises:
            InputError: something lacks, is no finite number or does not fit.
        """
        if isinstance(values, Mapping):
            values = {**{name: [] for name in _OF_NUMBERS}, **values}
        taken = numbers_of(cls, values)
        width = len(taken["mean"])
        fits = (
            width in (0, 1 if taken["neighbors"] == 1 else len(EVIDENCE))
            and len(taken["scale"]) == len(taken["linear"]) == width
            and all(value > 0 for value in taken["scale"])
            and len(taken["distances"]) == len(taken["shares"]) >= 1
            and all(0 <= value <= 1 for value in taken["shares"])
            and rising(taken["distances"])
            and rising(taken["shares"][::-1])
            and taken["distances"][0] >= 0
            and taken["far"] >= 0
            and len(taken["values"]) == len(taken["reaches"])
            and rising(taken["values"])
            and all(value >= 0 for value in taken["reaches"])
        )
        if not fits:
            raise InputError("the calibration's numbers do not fit together")
        return cls(**taken)
