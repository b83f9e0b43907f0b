"""Fits match to an index: every image of a sample is searched for among all others.

Needs embeddings and labels alone, no pictures and no network; see `embedcam.matching`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..images.number_labels import Reach, Values, number_of
from ..index.arrays import ArrayLike
from ..index.calibration import TEN, MatchCalibration, alike, match_evidence
from ..index.search import nearest

LEAST = 20
"""Images from which match is fitted; fewer say nothing that holds elsewhere."""
SAMPLE = 512
_KNOTS = 33
_FAR = 0.95
"""Quantile of the images' own nearest distances beyond which match falls."""


def calibrate_match(
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    metric: str = "l2",
    seed: int = 0,
    near: float | None = None,
) -> dict[str, Any] | None:
    """Fit match for "one" result and for "several", as a manifest keeps them.

    Args:
        embeddings: of all live images, `[N D]`; an array, a memory map, or rows gathered on demand.
        labels: theirs, `[N]`.
        metric: "l2" or "ip", by which results are searched.
        seed: of the sample.
        near: labels are numbers, and the first result is of a query's kind where it is as near in
            value as this share of the images; None of classes.

    Returns:
        Calibrations by name, or None where there are too few images.
    """
    total = embeddings.shape[0]
    if total < LEAST:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(total)[:SAMPLE])
    found = nearest(embeddings, embeddings[rows], TEN + 1, metric)
    others = [_without(*one) for one in zip(rows, found.positions, found.distances, strict=True)]
    reach = _reach(labels, near)
    own = np.array([apart[0] for _, apart in others])
    made = {}
    for name, count in (("one", 1), ("several", TEN)):
        seen, right = [], []
        for row, (found_rows, apart) in zip(rows, others, strict=True):
            known = [labels[place] for place in found_rows[:count]]
            if labels[row] is not None and known[0] is not None:
                seen.append(match_evidence(apart[:count], alike(known[0], known, reach)))
                right.append(bool(alike(labels[row], known[:1], reach)[0]))
        enough = len(seen) >= LEAST
        fitted = fit_logistic(np.array(seen), np.array(right)) if enough else ((), (), (), 0.0)
        distances, shares = _unusual(own)
        made[name] = MatchCalibration(
            *fitted, distances, shares, float(np.quantile(own, _FAR)), count, len(rows), *reach
        ).to_dict()
    return made


def _reach(labels: Sequence[str | None], near: float | None) -> Reach:
    """How far the kind of a value goes, where labels are numbers and there are two of them."""
    values = np.array([number_of(label) for label in labels]) if near is not None else np.empty(0)
    known = values[~np.isnan(values)]
    if near is None or not len(known):
        return (), ()
    if len(np.unique(known)) < 2:
        return (float(known[0]),), (0.0,)
    return Values(known, near, 1 - near).reach()


def fit_logistic(
    evidence: np.ndarray, right: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]:
    """Fit a logistic function, with an L2 penalty of 1/2 |linear|^2.

    Args:
        evidence: `[n F]`.
        right: whether the first result had the query's label, `[n]`.

    Returns:
        Mean and scale of the evidence, linear coefficients, intercept. The penalty keeps them
        finite where all are right, the prior counts one right and one wrong more.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    # One right and one wrong image of average evidence.
    x = np.concatenate([(evidence - mean) / scale, np.zeros((2, evidence.shape[1]))])
    model = LogisticRegression(solver="newton-cholesky", tol=1e-10)
    model.fit(x, np.array([*right, True, False]))
    linear, intercept = model.coef_[0], float(model.intercept_[0])
    return tuple(mean.tolist()), tuple(scale.tolist()), tuple(linear.tolist()), intercept


def _unusual(own: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots: squared distances, and the share of the images whose nearest is as far or farther."""
    values = np.unique(np.quantile(own, np.linspace(0, 1, _KNOTS)))
    shares = [float((own >= value).mean()) for value in values]
    return tuple(values.tolist()), tuple(shares)


def _without(row: int, near: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image's results but itself; but the last, where copies pushed it out of them."""
    kept = near != row
    kept[-1] &= not kept.all()
    return near[kept], apart[kept]
