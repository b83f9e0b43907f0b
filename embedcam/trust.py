"""How far transfers can be trusted, learned from images that are explained twice.

A sample of the index's images is drawn by its own weights and by those of its neighbours, itself
left out; what can be seen of the second without the first is held against how well both agree.

Left out is the image as a neighbour. By the discriminant target it keeps its part in the weights
that its label shares, 1/n of a label's n images: in labels of a few images they agree too well.
"""

import math
from typing import Protocol

import numpy as np

from .calibration import Calibration, correlation, evidence, pairs
from .errors import InputError
from .transfer import coefficients

SAMPLE = 512
"""Images that are explained twice, at most."""
LEAST = 40
"""Images from which a calibration is fitted; fewer say nothing that holds elsewhere."""
FOLDS = 5
STRANGERS = 0.3
"""How much an image explained as if it were new counts beside one explained by its neighbours."""
SEVERAL = 5
"""Neighbours that the calibration for several is fitted with."""
_BLOCK = 1 << 14


class Drawn(Protocol):
    """One image of the sample, to be drawn with stored weights of any rows."""

    def look(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By each row's weights of the (deepest) layer.

        Returns:
            Signed maps sum_k w_k A_k `[n h w]`, and products of the weights with each other,
            `[n n]`.
        """

    def fuse(self, drawn: np.ndarray, rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """The map of all layers together, from the deepest layer's `[h w]` >= 0."""


def sample_rows(n_rows: int, seed: int) -> np.ndarray:
    """Which rows are explained twice: a seeded sample, in order; none where there are too few."""
    if n_rows < LEAST:
        return np.empty(0, np.int64)
    return np.sort(np.random.default_rng(seed).permutation(n_rows)[:SAMPLE])


class Twice:
    """Collects the evidence of images explained twice, and fits calibrations to it.

    Args:
        embeddings: of all images of the index, `[N D]`; may be a memory map.
        labels: codes of their labels, as `classes.label_codes` gives them, `[N]`; None where no
            image has one.
        rows: of the sample, see `sample_rows`, `[n]`.
        metric: "l2" or "ip", which neighbours a search finds.
        seed: of what is drawn.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        rows: np.ndarray,
        metric: str = "l2",
        seed: int = 0,
    ) -> None:
        self.rows, self.seed = rows, seed
        count = min(SEVERAL, len(embeddings) - 1)
        usual = _itself(rows)
        self.neighbors = _nearest(embeddings, rows, count, metric, usual)
        guises = [_far(embeddings, rows, seed)] + ([] if labels is None else [_alike(labels, rows)])
        self.strangers = [_nearest(embeddings, rows, count, metric, guise) for guise in guises]
        self._found: dict[tuple[int, int], list[np.ndarray]] = {}
        self._agree: dict[tuple[int, int], list[float]] = {}

    def see(self, place: int, drawn: Drawn) -> None:
        """Explain one image of the sample every way, by one neighbour and by several."""
        ways = []
        for rows, distances in (self.neighbors, *self.strangers):
            left = np.isfinite(distances[place])
            ways.append((rows[place][left], distances[place][left]))
        own = self.rows[place : place + 1]
        rows = np.concatenate([own, *(near for near, _ in ways)])
        raw, gram = drawn.look(rows)
        expected = drawn.fuse(np.maximum(raw[0], 0), own, np.ones(1, np.float32)).ravel()
        start = 1
        for guise, (near, apart) in enumerate(ways):
            for count in sorted({1, len(near)}) if len(near) else ():
                these = slice(start, start + count)
                norms = np.sqrt(np.maximum(gram.diagonal()[these], 0))
                shares = coefficients(norms, apart[:count])
                norm = math.sqrt(max(float(shares @ gram[these, these] @ shares), 0.0))
                seen = evidence(raw[these], shares, norm, apart[:count])
                mixed = np.maximum(np.tensordot(shares, raw[these], 1), 0)
                found = drawn.fuse(mixed, near[:count], shares).ravel()
                key = (min(count, 2), guise)
                self._found.setdefault(key, []).append(seen)
                self._agree.setdefault(key, []).append(correlation(found, expected))
            start += len(near)

    def fit(self) -> dict[str, Calibration]:
        """Calibrations for explanations by "one" neighbour and by "several"."""
        made = {}
        nearest = self.neighbors[1][:, 0]
        for name, key in (("one", 1), ("several", 2)):
            # A guise in which some image has too few left to be explained by teaches nothing.
            whole = [
                guise
                for guise in range(1, 1 + len(self.strangers))
                if len(self._found.get((key, guise), ())) == len(self.rows)
            ]
            made[name] = fit_calibration(
                np.array(self._found[key, 0]),
                np.array(self._agree[key, 0]),
                np.array([one for guise in whole for one in self._found[key, guise]]),
                np.array([one for guise in whole for one in self._agree[key, guise]]),
                nearest,
                neighbors=1 if name == "one" else self.neighbors[0].shape[1],
                seed=self.seed,
            )
        return made


def fit_calibration(
    evidence: np.ndarray,
    correlations: np.ndarray,
    novel: np.ndarray,
    novel_correlations: np.ndarray,
    nearest: np.ndarray,
    *,
    neighbors: int,
    seed: int = 0,
) -> Calibration:
    """Fit scores by ridge regression and their meaning by isotonic regression.

    Images are explained by their neighbours, themselves left out, and again as if they were of a
    kind the index does not hold: nothing of the nearer half, nothing of their label. The score
    learns from all: otherwise it could not know what distance means, since all images of one
    collection lie about equally far apart. What a score is worth is fitted on the first alone, with
    scores of images that the regression did not see.

    Args:
        evidence: of the images explained by their neighbours, `[n F]`, see `calibration.evidence`.
        correlations: of the transferred with the directly computed map, `[n]`.
        novel: of the same images explained as if they were new, all of them once or several times,
            `[m n F]` as rows, or nothing.
        novel_correlations: `[m n]`, or nothing.
        nearest: squared distance of each image's nearest neighbour, `[n]`.
        neighbors: how many explained an image.
        seed: of the folds.

    Raises:
        InputError: fewer than 40 images, or arrays that do not fit or are not finite.
    """
    evidence, novel = np.asarray(evidence, np.float64), np.asarray(novel, np.float64)
    y, novel_y = np.asarray(correlations, np.float64), np.asarray(novel_correlations, np.float64)
    if len(evidence) < LEAST:
        raise InputError(f"{len(evidence)} images calibrate no trust; give at least {LEAST}")
    novel = novel.reshape(-1, evidence.shape[1])
    guises, rest = divmod(len(novel), len(y))
    if not len(evidence) == len(y) == len(nearest) or rest or len(novel) != len(novel_y):
        raise InputError("evidence, correlations and distances must be of the same images")
    for values in (evidence, y, nearest, novel, novel_y):
        if not np.isfinite(values).all():
            raise InputError("evidence or correlations hold NaN or infinity; give finite numbers")
    # Of both, or a distance that is usual among strangers would lie far out, where squares rule.
    both = np.concatenate([evidence, novel])
    mean, scale = both.mean(0), both.std(0)
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    design, new = _design(evidence, mean, scale), _design(novel, mean, scale)
    fold = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    unseen = np.empty(len(y))
    for part in range(FOLDS):
        known = fold != part
        # An image is not scored by a fit that saw it in its other guise.
        known_new = np.tile(known, guises)
        weights, intercept = _ridge((design[known], y[known]), (new[known_new], novel_y[known_new]))
        unseen[~known] = design[~known] @ weights + intercept
    weights, intercept = _ridge((design, y), (new, novel_y))
    scores, worth = _isotonic(unseen, y)
    width = evidence.shape[1]
    return Calibration(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        linear=tuple(weights[:width].tolist()),
        quadratic=tuple(weights[width:].tolist()),
        intercept=float(intercept),
        scores=scores,
        correlations=worth,
        largest_distance=float(np.max(nearest)),
        neighbors=int(neighbors),
        images=len(y),
    )


def _design(values: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Standardised evidence and its products, `[n F + F (F + 1) / 2]`."""
    x = (values - mean) / scale
    first, second = pairs(x.shape[1])
    return np.concatenate([x, x[:, first] * x[:, second]], axis=1)


def _ridge(
    usual: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Coefficients `[C]` and intercept; the penalty chosen by leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    design, y = (np.concatenate(both) for both in zip(usual, new, strict=True))
    counted = np.r_[np.ones(len(usual[1])), np.full(len(new[1]), STRANGERS)]
    centre, spread = design.mean(0), design.std(0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    model = RidgeCV(np.logspace(-2, 4, 13))
    model.fit((design - centre) / spread, y, sample_weight=counted)
    weights = model.coef_ / spread
    return weights, float(model.intercept_ - centre @ weights)


def _isotonic(scores: np.ndarray, y: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of the rising function that fits best: scores, and what they are worth in [0, 1]."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, y)
    return tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist())


class _Left(Protocol):
    """Which of the rows from `start` on are left out for each of the sample, `[n b]`."""

    def __call__(self, start: int, distances: np.ndarray) -> np.ndarray: ...


def _itself(rows: np.ndarray) -> _Left:
    """An image does not explain itself."""

    def left(start: int, distances: np.ndarray) -> np.ndarray:
        others: np.ndarray = rows[:, None] == start + np.arange(distances.shape[1])
        return others

    return left


def _alike(labels: np.ndarray, rows: np.ndarray) -> _Left:
    """As if the index held nothing of an image's label."""

    def left(start: int, distances: np.ndarray) -> np.ndarray:
        same: np.ndarray = labels[rows][:, None] == labels[start : start + distances.shape[1]]
        return same | _itself(rows)(start, distances)

    return left


def _far(embeddings: np.ndarray, rows: np.ndarray, seed: int) -> _Left:
    """As if the index held nothing of the nearer half of an image's."""
    some = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:2048])
    border = np.median(_squared(embeddings[rows], embeddings[some]), axis=1)[:, None]

    def left(start: int, distances: np.ndarray) -> np.ndarray:
        return (distances <= border) | _itself(rows)(start, distances)

    return left


def _nearest(
    embeddings: np.ndarray, rows: np.ndarray, count: int, metric: str, left: _Left
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of the sample, nearest first: rows and squared distances, `[n count]`.

    A place that nothing is left for has an infinite distance.
    """
    queries = np.asarray(embeddings[rows], np.float64)
    best = np.full((len(rows), count), np.inf)
    found, apart = np.zeros((len(rows), count), np.int64), best.copy()
    for start in range(0, len(embeddings), _BLOCK):
        block = np.asarray(embeddings[start : start + _BLOCK], np.float64)
        distances = _squared(queries, block)
        order = distances if metric == "l2" else -(queries @ block.T)
        order = np.where(left(start, distances), np.inf, order)
        keys = np.concatenate([best, order], axis=1)
        places = _smallest(keys, count)
        best = np.take_along_axis(keys, places, axis=1)
        numbers = np.broadcast_to(start + np.arange(len(block)), order.shape)
        found = np.take_along_axis(np.concatenate([found, numbers], 1), places, axis=1)
        apart = np.take_along_axis(np.concatenate([apart, distances], 1), places, axis=1)
    return found, np.where(np.isfinite(best), apart, np.inf)


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Places of each row's smallest, ties by place, `[n count]`; the others are not sorted."""
    last = np.partition(keys, count - 1, axis=1)[:, count - 1]
    places = np.empty((len(keys), count), np.int64)
    for row, (values, bound) in enumerate(zip(keys, last, strict=True)):
        within = np.flatnonzero(values <= bound)
        places[row] = within[np.argsort(values[within], kind="stable")[:count]]
    return places


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, `[n m]` float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    clipped: np.ndarray = np.maximum(found, 0)
    return clipped
