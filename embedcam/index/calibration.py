"""Trust, how well a map fits, and match, whether a result is right: evidence and what reads it.

Arrays only, so that a service needs neither torch nor scikit-learn; `embedcam.offline` fits both.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np

from ..errors import InputError
from ..images.number_labels import Reach, number_of
from .records import Wrong, read_as, whole

if TYPE_CHECKING:
    from .manifest import Manifest

EVIDENCE = (
    "map agreement",  # mean correlation of each neighbor's signed map with the transferred one
    "weight agreement",  # L2 norm of the mean of the neighbors' unit weight vectors
    "mean nearness",  # minus the mean of the Euclidean distances
    "nearness",  # minus the smallest
    "peak",  # log of the signed map's largest magnitude over its standard deviation
    "positive share",  # of the signed map's magnitude
)
"""Evidence of trust; with a single neighbor only what follows the agreements."""
ALONE = 3
"""Place of the first evidence that a single neighbor has: there its nearness is the mean's."""
TEN = 10
"""Neighbors that match looks at, however many are shown."""
FALLEN = 1.15
"""Times `far`, of squared distances, beyond which nothing matches: noise and blank pictures lie
farther, and near nothing that was indexed a label says nothing."""
_MATCH_EVIDENCE = 4


def evidence(raw: np.ndarray, shares: np.ndarray, norm: float, distances: np.ndarray) -> np.ndarray:
    """Return `EVIDENCE` of how well transferred weights draw a query, `[6]`; of one neighbor `[3]`.

    `raw` are the neighbors' signed maps sum_k w_k A_k of the query `[n h w]`, `shares` what each is
    multiplied by `[n]`, `norm` that of the combined weights, `distances` squared `[n]`.
    """
    raw = np.asarray(raw, np.float64)
    signed = np.asarray(shares, np.float64) @ raw.reshape(len(raw), -1)
    magnitudes, total = np.abs(signed), float(signed.sum())
    size, largest = float(magnitudes.sum()), float(magnitudes.max())
    centered = signed - total / signed.size
    spread = math.sqrt(float(np.vdot(centered, centered)) / signed.size)
    # A map that varies by its rounding alone has no peak.
    peak = math.log(largest / spread) if spread > 1e-6 * largest else 0.0
    shape = [peak, (size + total) / (2 * size) if size > 0 else 0.0]
    apart = [math.sqrt(value) for value in np.asarray(distances, np.float64).tolist()]
    nearest = -min(apart)
    if len(raw) == 1:
        return np.array([nearest, *shape])
    agreement = float(correlation(raw.reshape(len(raw), -1), signed).mean())
    return np.array([agreement, norm, -sum(apart) / len(apart), nearest, *shape])


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of rows `[... n]` of float64 with `[n]`, 0 of a constant."""
    a, b = a - a.sum(-1, keepdims=True) / len(b), b - b.sum() / len(b)
    size = np.sqrt((a * a).sum(-1) * (b @ b))
    return np.asarray(a @ b / (size + (size == 0)))


def match_evidence(distances: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Return what predicts whether the first of n results is of the query's kind.

    With d_i the Euclidean distances and 1 / d_i^2 their weights (equal where one is 0: those at
    distance 0 alone count): *nearness* and *mean nearness*, minus the first's distance and minus
    the mean of all; *share*, the weighted share of the results with the first's label, the first
    left out; *gap*, how much nearer the first is than the nearest of another label,
    1 - d_1 / d_other, at least 0 (the farthest stands in where all have its label).

    `distances` are squared `[n]`, `same` says which are of the first one's kind `[n]`; returned are
    `[4]`, or `[1]` for one result.
    """
    # Of ten numbers, in Python: done before NumPy has begun.
    apart = [math.sqrt(value) for value in np.asarray(distances, np.float64).tolist()]
    if len(apart) == 1:
        return np.array([-apart[0]])
    rest = list(zip(apart[1:], np.asarray(same, bool)[1:].tolist(), strict=True))
    nearest = min(one for one, _ in rest)
    weights = [(nearest / one) ** 2 if nearest > 0 else float(one == 0) for one, _ in rest]
    agreeing = sum(weight for weight, (_, is_same) in zip(weights, rest, strict=True) if is_same)
    others = [one for one, is_same in rest if not is_same]
    other = min(others) if others else max(one for one, _ in rest)
    gap = max(0.0, 1 - apart[0] / other) if other > 0 else 0.0
    return np.array([-apart[0], -sum(apart) / len(apart), agreeing / sum(weights), gap])


def alike(one: str | None, others: Sequence[str | None], reach: Reach = ((), ())) -> np.ndarray:
    """Return which labels `[n]` are of one's kind: equal, or as near in value as `reach` says."""
    if one is None:
        return np.zeros(len(others), bool)
    if not reach[0]:
        return np.array([other == one for other in others], bool)
    value = number_of(one)
    apart = np.abs(np.array([number_of(other) for other in others]) - value)
    return np.asarray(apart <= np.interp(value, *reach))


def kinship(manifest: "Manifest") -> Callable[[str, str], bool]:
    """Return what says whether two labels are of one kind in an index.

    Numbers of which nothing was calibrated are never of two kinds.
    """
    if manifest.near_share is None:
        return lambda one, other: one == other
    calibration = (manifest.match_calibration or {}).get("several")
    if calibration is None:
        return lambda one, other: True
    reach = calibration.reach
    return lambda one, other: bool(alike(one, [other], reach)[0])


Amount = Annotated[int, whole(1, (1 << 48) - 1)]
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class _Linear(ABC):
    """A linear function of standardized evidence, and what a subclass makes of it."""

    mean: Numbers
    scale: Numbers
    linear: Numbers
    intercept: float

    def to_dict(self) -> dict[str, float | list[float]]:
        """Return plain values, for a manifest; what is empty by default and is empty stays out."""
        held = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in held.items()
            if value != default
        }

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Return what plain values describe, or an `InputError` that says why they do not."""
        try:
            return read_as(cls, values)
        except Wrong as wrong:
            raise InputError(f"the calibration's {wrong}") from wrong

    def __post_init__(self) -> None:
        alike = len(self.mean) == len(self.scale) == len(self.linear)
        if not (alike and all(value > 0 for value in self.scale) and self._fits()):
            raise Wrong(" numbers do not fit together")

    @abstractmethod
    def _fits(self) -> bool: ...


@dataclass(frozen=True)
class Calibration(_Linear):
    """From evidence to trust, the correlation of the map to expect with the query's own.

    The score is a linear function of the standardized evidence; knots join scores to expected
    correlations and to their 10th percentiles, neither ever falling, linear in between. Beyond the
    largest distance that was calibrated both fall linearly, to 0 at twice that distance.

    Parameters
    ----------
    mean, scale, linear : of the evidence its means, its standard deviations > 0, and the score's
        coefficients, `[F]`.
    intercept : of the score.
    scores, correlations, lows : of the knots, none ever falling; the latter two in [0, 1].
    largest_distance : squared Euclidean, of the nearest neighbors of the calibrated images.
    neighbors : how many neighbors the calibrated images were explained by.
    images : how many images were calibrated with.
    """

    scores: Numbers
    correlations: Numbers
    lows: Numbers
    largest_distance: float
    neighbors: Amount
    images: Amount

    def score(self, evidence: np.ndarray) -> np.ndarray:
        """Return the score of evidence `[... F]`, `[...]`."""
        mean, scale, linear = self._arrays[:3]
        return np.asarray(self.intercept + ((evidence - mean) / scale) @ linear)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        # What every query needs: a conversion takes longer than the sums.
        values = (self.mean, self.scale, self.linear, self.scores, self.correlations, self.lows)
        return tuple(np.array(one) for one in values)

    def trust(self, evidence: np.ndarray, nearest: float) -> tuple[float, float]:
        """Return the expected correlation and its 10th percentile, both in [0, 1].

        Of a query's evidence `[F]` and the squared distance to its nearest neighbor.
        """
        # Of a forged calibration: what overflows is not to be trusted, and is no number to show.
        with np.errstate(over="ignore", invalid="ignore"):
            score = self.score(evidence)
            near = fall(nearest, self.largest_distance)
            scores, *knots = self._arrays[3:]
            values = [float(np.interp(score, scores, one)) * near for one in knots]
        expected, low = (0.0 if math.isnan(one) else one for one in values)
        return expected, min(expected, low)

    def of_query(
        self, raw: np.ndarray, shares: np.ndarray, norm: float, distances: np.ndarray
    ) -> tuple[float, float]:
        """Return `trust` of a query; arguments as for `evidence`."""
        return self.trust(evidence(raw, shares, norm, distances), float(np.min(distances)))

    def _fits(self) -> bool:
        return (
            len(self.mean) == len(EVIDENCE) - (ALONE if self.neighbors == 1 else 0)
            and len(self.scores) == len(self.correlations) == len(self.lows) >= 1
            and all(0 <= value <= 1 for value in (*self.correlations, *self.lows))
            and _are_rising(self.scores, self.correlations, self.lows)
            and self.largest_distance >= 0
        )


@dataclass(frozen=True)
class MatchCalibration(_Linear):
    """From the results of a query to the probability that the first is of its kind.

    With labels: a logistic function of the standardized evidence. Without: the share of the indexed
    images whose own nearest image is at least as far away as the query's, so that usual queries lie
    around 1/2 and it only falls with distance. Beyond `far` both fall linearly, to 0 at 1.15 times
    it.

    Parameters
    ----------
    mean, scale, linear : of the evidence its means, its standard deviations > 0, and the
        coefficients, `[F]`; empty without labels.
    intercept : of the logistic function.
    distances, shares : of the knots, squared Euclidean and rising; of the images whose nearest is
        at least as far, in [0, 1] and never rising.
    far : squared distance from which match falls to 0.
    neighbors, images : how many results and how many images it was fitted with.
    values, reaches : of labels that are numbers, see `number_labels.Reach`; of classes empty.
    """

    distances: Numbers
    shares: Numbers
    far: float
    neighbors: Amount
    images: Amount
    values: Numbers = ()
    reaches: Numbers = ()

    @property
    def reach(self) -> Reach:
        """How far from a value its kind goes; of classes empty."""
        return self.values, self.reaches

    def match(self, distances: np.ndarray, labels: Sequence[str | None]) -> float:
        """Return the probability in [0, 1] that the first result is of the query's kind.

        Of squared `distances` of the results `[n]`, the first one first, and their labels.
        """
        first = float(distances[0])
        if not self.mean or labels[0] is None:
            expected = float(np.interp(first, self.distances, self.shares))
        else:
            same = alike(labels[0], labels, self.reach)
            seen = match_evidence(distances, same).tolist()
            terms = zip(seen, self.mean, self.scale, self.linear, strict=True)
            score = self.intercept + sum((one - m) / s * w for one, m, s, w in terms)
            # Of a forged calibration: what is no number is no match.
            bounded = max(-700.0, min(score, 700.0))
            expected = 0.0 if math.isnan(score) else 1 / (1 + math.exp(-bounded))
        return expected * fall(first, self.far, FALLEN)

    def _fits(self) -> bool:
        return (
            len(self.mean) in (0, 1 if self.neighbors == 1 else _MATCH_EVIDENCE)
            and len(self.distances) == len(self.shares) >= 1
            and all(0 <= value <= 1 for value in self.shares)
            and _are_rising(self.distances, self.shares[::-1], self.values)
            and len(self.values) == len(self.reaches)
            and min(self.distances[0], self.far, *self.reaches) >= 0
        )


def fall(distance: float, largest: float, until: float = 2.0) -> float:
    """Return 1 up to the largest distance, then linearly less, 0 at `until` times it."""
    if largest <= 0:
        return 0.0 if distance > 0 else 1.0
    return max(0.0, min((until - distance / largest) / (until - 1), 1.0))


def _are_rising(*curves: Numbers) -> bool:
    return all(a <= b for values in curves for a, b in pairwise(values))
