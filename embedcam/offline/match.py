"""Match, fitted to an index: every image of a sample is searched for among all others.

Needs embeddings and labels alone, no pictures and no network; see `embedcam.matching`.
"""

from collections.abc import Sequence

import numpy as np

from ..images.number_labels import Reach, Values, numbers_of
from ..images.progress import SILENT, Stage
from ..images.texts import LabelColumn
from ..index.arrays import ArrayLike
from ..index.calibration import TEN, MatchCalibration, alike, match_evidence
from ..index.search import nearest, without_itself
from ..recipe.recipe import Recipe
from .triplets import sample_of

LEAST_MATCH = 20
"""Images from which match is fitted; fewer say nothing that holds elsewhere."""
SAMPLE = 512
_KNOTS = 33
_FAR = 0.95
"""Quantile of the images' own nearest distances beyond which match falls."""


def calibrate_match(
    ids: Sequence[str],
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    recipe: Recipe,
    stage: Stage = SILENT,
) -> dict[str, MatchCalibration] | None:
    """Fit match for "one" result and for "several"; None of too few."""
    total = embeddings.shape[0]
    if total < LEAST_MATCH:
        return None
    rows = sample_of(ids, recipe.seed, SAMPLE)
    with stage("match", total) as progressed:
        of = (embeddings, embeddings[rows], TEN + 1, recipe.metric)
        found = nearest(*of, progress=progressed)
    neighbors = without_itself(found, rows)
    column = LabelColumn.of(labels)
    own, others = column.take(rows), column.take(neighbors.positions.reshape(-1))
    reach = _reach(column, recipe.near)
    nearest_apart = neighbors.distances[:, 0]
    # Knots: squared distances, and the share of the images whose nearest is as far or farther.
    knots = np.unique(np.quantile(nearest_apart, np.linspace(0, 1, _KNOTS)))
    shares = tuple(float((nearest_apart >= knot).mean()) for knot in knots)
    far = float(np.quantile(nearest_apart, _FAR))
    calibrations = {}
    for name, count in (("one", 1), ("several", TEN)):
        evidence, right = [], []
        for query, (label, apart) in enumerate(zip(own, neighbors.distances, strict=True)):
            known = others[query * TEN : query * TEN + count]
            if label is not None and known[0] is not None:
                evidence.append(match_evidence(apart[:count], alike(known[0], known, reach)))
                right.append(bool(alike(label, known[:1], reach)[0]))
        enough = len(evidence) >= LEAST_MATCH
        fitted = fit_logistic(np.array(evidence), np.array(right)) if enough else ((), (), (), 0.0)
        calibrations[name] = MatchCalibration(
            *fitted, tuple(knots.tolist()), shares, far, count, len(rows), *reach
        )
    return calibrations


def _reach(labels: LabelColumn, near: float | None) -> Reach:
    """Return how far the kind of a value goes, where labels are numbers and there are two."""
    if near is None:
        return (), ()
    values = numbers_of(labels)
    known = values[~np.isnan(values)]
    if len(np.unique(known)) < 2:
        return tuple(known[:1].tolist()), (0.0,) * min(1, len(known))
    return Values(known, near, 1 - near).reach()


def fit_logistic(
    evidence: np.ndarray, right: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]:
    """Fit a logistic function to evidence `[n F]`, with an L2 penalty of 1/2 |linear|^2.

    Returns mean and scale of the evidence, linear coefficients, intercept.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    # The prior: one right and one wrong image of average evidence.
    x = np.concatenate([(evidence - mean) / scale, np.zeros((2, evidence.shape[1]))])
    model = LogisticRegression(solver="newton-cholesky", tol=1e-10)
    model.fit(x, np.array([*right, True, False]))
    linear, intercept = model.coef_[0], float(model.intercept_[0])
    return tuple(mean.tolist()), tuple(scale.tolist()), tuple(linear.tolist()), intercept
