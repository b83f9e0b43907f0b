"""How far transfers can be trusted, learned from indexed images that play queries.

Each image of a sample is left out of the index: it is none of its own neighbours, and where weights
are a closed form of the embeddings it has no part in its label's statistics either. What can be
seen of the map that its neighbours' weights draw is held against how well that map agrees with the
one computed on the image itself, by the very target that `DirectWeights` computes.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from ..index.arrays import ArrayLike
from ..index.calibration import Calibration
from ..index.search import draw_negatives, nearest
from ..recipe.recipe import Recipe
from ..targets import head_cotangent, query_cotangent
from .cotangents import AnchorCotangents, coded_labels

SAMPLE = 512
"""Images that play queries, at most."""
LEAST = 40
"""Images from which a calibration is fitted; fewer say nothing that holds elsewhere."""
COUNTS = {"one": 1, "several": 5}
"""Neighbours that each calibration is fitted with."""
LEFT_OUT = 10
"""Of so many images at most one is left out at a time."""
FOLDS = 5
_LOW = 0.1
_BIN = 40
"""Images behind one 10th percentile, at least."""
_MAPPED, _BLOCK = 1 << 16, 1 << 12


def sample_rows(n_rows: int, seed: int, most: int = SAMPLE) -> np.ndarray:
    """Draw which rows play queries: a seeded sample, in order; none where there are too few."""
    if n_rows < LEAST:
        return np.empty(0, np.int64)
    return np.sort(np.random.default_rng(seed).permutation(n_rows)[:most])


@dataclass(frozen=True)
class LeftOut:
    """An indexed image as a query that was never indexed.

    Attributes:
        row: of the image.
        near: rows of its nearest images, nearest first, `[n]`.
        distances: theirs, squared, `[n]`.
        negatives: rows of other images.
        codes: dy/dz of those near in an index without it, `[n D]`; None where weights are no
            closed form.
        own: dy/dz at the image as the fallback has it, `[D]`; None likewise.
    """

    row: int
    near: np.ndarray
    distances: np.ndarray
    negatives: np.ndarray
    codes: np.ndarray | None = None
    own: np.ndarray | None = None


def leave_out(
    recipe: Recipe,
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    rows: np.ndarray,
    *,
    closed_form: bool,
    normalized: bool,
) -> dict[str, list[LeftOut]]:
    """Leave each row of a sample out of the index, a few at a time, and search with it.

    Args:
        recipe: the index's.
        embeddings: of all images, `[N D]`; an array, a memory map, or rows gathered on demand.
        labels: theirs, `[N]`.
        rows: of the sample, `[n]`.
        closed_form: weights are W^T dy/dz, so that they can be had for the smaller index.
        normalized: whether embeddings are z / |z|.

    Returns:
        By the names of `COUNTS`, the sample in order.
    """
    total, names = embeddings.shape[0], np.array([*labels, None], object)[:-1]
    n_parts = min(len(rows), math.ceil(LEFT_OUT * len(rows) / total))
    part_of = np.random.default_rng(recipe.seed).permutation(len(rows)) % n_parts
    found: dict[tuple[str, int], LeftOut] = {}
    for part in range(n_parts):
        out = rows[part_of == part]
        rest = np.setdiff1d(np.arange(total), out)
        smaller = _Smaller(recipe, _taken(embeddings, rest), names[rest], closed_form, normalized)
        for name, count in COUNTS.items():
            for one in smaller.queries(np.asarray(embeddings[out]), count):
                row, near, others = int(out[one.row]), rest[one.near], rest[one.negatives]
                found[name, row] = replace(one, row=row, near=near, negatives=others)
    return {name: [found[name, int(row)] for row in rows] for name in COUNTS}


class _Smaller:
    """An index without a few of its images, which query it."""

    def __init__(
        self,
        recipe: Recipe,
        embeddings: np.ndarray,
        labels: np.ndarray,
        closed_form: bool,
        normalized: bool,
    ) -> None:
        self.recipe, self.embeddings, self.labels = recipe, embeddings, labels
        self.normalized, self.anchors = normalized, None
        if closed_form:
            mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
            codes = coded_labels(recipe, labels.tolist(), [""] * len(labels))
            self.anchors = AnchorCotangents(recipe, embeddings, codes, mean)

    def queries(self, vectors: np.ndarray, count: int) -> Iterator[LeftOut]:
        """Search with each of `[n D]`; rows are of this index, and of the vectors."""
        seen = nearest(self.embeddings, vectors, count, self.recipe.metric)
        every = np.arange(len(self.embeddings))
        for row, (near, apart) in enumerate(zip(seen.positions, seen.distances, strict=True)):
            others = draw_negatives(
                np.delete(every, near), self.labels[near], lambda at: self.labels[at].tolist()
            )
            one = LeftOut(row, near, apart, others)
            yield one if self.anchors is None else self._with_codes(one, vectors[row])

    def _with_codes(self, one: LeftOut, own: np.ndarray) -> LeftOut:
        assert self.anchors is not None
        target, norm = self.recipe.resolved_target, self.recipe.norm
        near, others = self.embeddings[one.near], self.embeddings[one.negatives]
        values = query_cotangent(target, norm, own, near, others)
        codes = self._at_head(self.anchors.of(one.near).values, near)
        return replace(one, codes=codes, own=self._at_head(values[None], own[None])[0])

    def _at_head(self, values: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """dy/dz but for |z|: every map's weights are scaled to length 1, or its map is alone."""
        lengths, norm = np.ones(len(values), np.float32), self.recipe.head_norm
        found: np.ndarray = head_cotangent(values, embeddings, lengths, norm, self.normalized)
        return found.astype(np.float32)


def _taken(embeddings: ArrayLike, rows: np.ndarray) -> np.ndarray:
    """Those rows; of a large collection in a file of their own, not in memory."""
    if len(rows) < _MAPPED:
        return np.asarray(embeddings[rows])
    with tempfile.TemporaryFile() as file:
        taken = np.memmap(file, np.float32, "w+", shape=(len(rows), embeddings.shape[1]))
    for start in range(0, len(rows), _BLOCK):
        taken[start : start + _BLOCK] = embeddings[rows[start : start + _BLOCK]]
    return taken


def fit_calibration(
    evidence: np.ndarray,
    correlations: np.ndarray,
    nearest: np.ndarray,
    *,
    neighbors: int,
    seed: int = 0,
) -> Calibration:
    """Fit scores by ridge regression, and what they are worth by centred isotonic regression.

    What a score is worth is fitted with scores of images that the ridge regression did not see: the
    mean correlation, and 10th percentiles of at least 40 images of like scores.

    Args:
        evidence: of the images explained by their neighbours, `[n F]`, see `calibration.evidence`.
        correlations: of the transferred signed map with the directly computed one, `[n]`.
        nearest: squared distance of each image's nearest neighbour, `[n]`.
        neighbors: how many explained an image.
        seed: of the folds.

    Raises:
        InputError: fewer than 40 images, or arrays that do not fit or are not finite.
    """
    evidence, y = np.asarray(evidence, np.float64), np.asarray(correlations, np.float64)
    if len(evidence) < LEAST:
        raise InputError(f"{len(evidence)} images calibrate no trust; give at least {LEAST}")
    if not len(evidence) == len(y) == len(nearest):
        raise InputError("evidence, correlations and distances must be of the same images")
    for values in (evidence, y, nearest):
        if not np.isfinite(values).all():
            raise InputError("evidence or correlations hold NaN or infinity; give finite numbers")
    mean, scale = evidence.mean(0), evidence.std(0)
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    x = (evidence - mean) / scale
    fold = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    unseen = np.empty(len(y))
    for part in range(FOLDS):
        known = fold != part
        weights, intercept = _ridge(x[known], y[known])
        unseen[~known] = x[~known] @ weights + intercept
    weights, intercept = _ridge(x, y)
    scores, worth = _isotonic(unseen, y)
    return Calibration(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        linear=tuple(weights.tolist()),
        intercept=intercept,
        scores=scores,
        correlations=worth,
        lows=_lows(unseen, y, scores),
        largest_distance=float(np.max(nearest)),
        neighbors=int(neighbors),
        images=len(y),
    )


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients `[F]` and intercept; the penalty chosen by leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    centre, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    model = RidgeCV(np.logspace(-2, 4, 13)).fit((x - centre) / spread, y)
    weights = model.coef_ / spread
    return weights, float(model.intercept_ - centre @ weights)


def _isotonic(scores: np.ndarray, y: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of the rising function that fits best: scores, and what they are worth in [0, 1].

    Each pool of the fit is one knot, at its mean score, so that what lies between is told apart:
    centred isotonic regression (Oron & Flournoy 2017).
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit(scores, y).predict(scores)
    worth = np.unique(fitted)
    centres = [float(scores[fitted == value].mean()) for value in worth]
    return tuple(centres), tuple(worth.tolist())


def _lows(scores: np.ndarray, y: np.ndarray, knots: Sequence[float]) -> tuple[float, ...]:
    """10th percentile of the correlations of like scores, never falling, at the knots."""
    bins = np.array_split(np.argsort(scores, kind="stable"), max(1, len(y) // _BIN))
    centres = np.array([scores[some].mean() for some in bins])
    lows = np.array([np.quantile(y[some], _LOW) for some in bins])
    rising = _isotonic(centres, lows)
    return tuple(np.interp(knots, *rising).tolist())
