"""How far a transferred map can be trusted: evidence at hand, and the calibration that reads it.

Arrays only, so that a service needs neither torch nor scikit-learn for it; `embedcam.trust` fits
it. Trust is an expected correlation: of the signed map that transferred weights draw with the one
that is computed on the query itself, by the index's own target (`targets.query_cotangent`).
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import InputError

EVIDENCE = (
    "map agreement",
    "weight agreement",
    "mean nearness",
    "nearness",
    "peak",
    "positive share",
)
"""What is looked at; with a single neighbour only what follows the agreements."""
ALONE = 3
"""Place of the first evidence that a single neighbour has: there its nearness is the mean's."""
_LARGEST = sys.float_info.max


def evidence(raw: np.ndarray, shares: np.ndarray, norm: float, distances: np.ndarray) -> np.ndarray:
    """What predicts how well transferred weights draw a query.

    - *map agreement*: mean correlation of each neighbour's signed map with the transferred one;
    - *weight agreement*: L2 norm of the mean of the neighbours' unit weight vectors;
    - *mean nearness*, *nearness*: minus the Euclidean distances' mean and minimum;
    - *peak*: log of the signed map's largest magnitude over its standard deviation;
    - *positive share*: of the signed map's magnitude.

    Args:
        raw: each neighbour's signed map sum_k w_k A_k of the query, `[n h w]`.
        shares: what each is multiplied by, see `transfer.coefficients`, `[n]`.
        norm: L2 norm of the combined weights.
        distances: squared Euclidean distances to the query, `[n]`.

    Returns:
        float64 `[6]`, or `[3]` for one neighbour; finite.
    """
    raw = np.asarray(raw, np.float64)
    signed = np.tensordot(np.asarray(shares, np.float64), raw, 1)
    magnitudes, total = np.abs(signed), float(signed.sum())
    size, largest = float(magnitudes.sum()), float(magnitudes.max())
    centred = signed - total / signed.size
    spread = math.sqrt(float(np.vdot(centred, centred)) / signed.size)
    # A map that varies by its rounding alone has no peak.
    peak = math.log(largest / spread) if spread > 1e-6 * largest else 0.0
    shape = [peak, (size + total) / (2 * size) if size > 0 else 0.0]
    apart = [math.sqrt(value) for value in np.asarray(distances, np.float64).tolist()]
    nearest = -min(apart)
    if len(raw) == 1:
        return np.array([nearest, *shape])
    agreement = float(correlation(raw.reshape(len(raw), -1), signed.ravel()).mean())
    return np.array([agreement, norm, -sum(apart) / len(apart), nearest, *shape])


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row `[... n]` of float64 with `[n]`, `[...]`; 0 of a constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    size = np.sqrt((a * a).sum(-1) * (b @ b))
    return np.divide(a @ b, size, out=np.zeros_like(size), where=size > 0)


@dataclass(frozen=True)
class Calibration:
    """From evidence to trust, for explanations by one neighbour or by several.

    The score is a linear function of the standardised evidence; knots join scores to expected
    correlations and to their 10th percentiles, neither ever falling, linear in between. Beyond the
    largest distance that was calibrated both fall linearly, to 0 at twice that distance.

    Args:
        mean: of the evidence, `[F]`.
        scale: its standard deviations, `[F]`, > 0.
        linear: `[F]`.
        intercept: of the score.
        scores: of the knots, rising.
        correlations: of the knots, in [0, 1], never falling.
        lows: 10th percentiles of the knots, likewise.
        largest_distance: squared Euclidean, of the nearest neighbours of the calibrated images.
        neighbors: how many neighbours the calibrated images were explained by.
        images: how many images were calibrated with.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    linear: tuple[float, ...]
    intercept: float
    scores: tuple[float, ...]
    correlations: tuple[float, ...]
    lows: tuple[float, ...]
    largest_distance: float
    neighbors: int
    images: int

    def score(self, evidence: np.ndarray) -> np.ndarray:
        """The score of evidence `[... F]`, `[...]`."""
        mean, scale, linear = self._arrays[:3]
        found: np.ndarray = self.intercept + ((evidence - mean) / scale) @ linear
        return found

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        """What every query needs, as arrays: a conversion takes longer than the sums."""
        fields = (self.mean, self.scale, self.linear, self.scores, self.correlations, self.lows)
        return tuple(np.array(one) for one in fields)

    def trust(self, evidence: np.ndarray, nearest: float) -> tuple[float, float]:
        """Return the expected correlation and its 10th percentile, both in [0, 1].

        Args:
            evidence: of one query, `[F]`.
            nearest: squared distance to the nearest neighbour.
        """
        # Of a forged calibration: what overflows is not to be trusted, and is no number to show.
        with np.errstate(over="ignore", invalid="ignore"):
            score = self.score(evidence)
            near = float(fall(np.asarray(nearest, np.float64), self.largest_distance))
            scores, *knots = self._arrays[3:]
            found = [float(np.interp(score, scores, one)) * near for one in knots]
        expected, low = np.nan_to_num(found, nan=0.0).tolist()
        return expected, min(expected, low)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """From plain values, none of which is believed before it is checked.

        Raises:
            InputError: something lacks, is no finite number or does not fit.
        """
        taken = numbers_of(cls, values)
        width = len(taken["mean"])
        known = (len(EVIDENCE), len(EVIDENCE) - ALONE)
        fits = (
            width == known[taken["neighbors"] == 1]
            and len(taken["scale"]) == len(taken["linear"]) == width
            and len(taken["scores"]) == len(taken["correlations"]) == len(taken["lows"]) >= 1
            and min(taken["scale"]) > 0
            and all(0 <= value <= 1 for value in (*taken["correlations"], *taken["lows"]))
            and all(map(rising, (taken["scores"], taken["correlations"], taken["lows"])))
            and taken["largest_distance"] >= 0
        )
        if not fits:
            raise InputError("the calibration's numbers do not fit together")
        return cls(**taken)


def numbers_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a calibration, a record of numbers and tuples of them, from plain values.

    Raises:
        InputError: one lacks, is no finite number, or no whole number from 1 where a count is due.
    """
    taken: dict[str, Any] = {}
    for name, expected in kind.__annotations__.items():
        value: Any = values.get(name) if isinstance(values, Mapping) else None
        several = expected not in (int, float)
        numbers = value if several else [value]
        if not isinstance(numbers, list) or not all(map(_finite, numbers)):
            raise InputError(f"the calibration's {name} should hold finite numbers")
        if expected is int and (value != int(value) or not 1 <= value < 1 << 48):
            raise InputError(f"the calibration's {name} should be a whole number from 1")
        taken[name] = tuple(map(float, numbers)) if several else expected(value)
    return taken


def fall(distances: np.ndarray, largest: float, until: float = 2.0) -> np.ndarray:
    """1 up to the largest calibrated distance, then linearly to 0 at `until` times it, `[...]`."""
    if largest <= 0:
        return np.where(distances > 0, 0.0, 1.0)
    with np.errstate(over="ignore"):
        return np.clip((until - distances / largest) / (until - 1), 0, 1)


def _finite(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: a whole number of JSON may have more digits than a float holds.
    return plain and -_LARGEST <= value <= _LARGEST


def rising(values: tuple[float, ...]) -> bool:
    """Whether no value is below the one before it."""
    return all(a <= b for a, b in pairwise(values))
