"""How far transfers can be trusted, learned from indexed images that play queries.

Each image of a sample is left out of the index: it is none of its own neighbors, and where weights
are a closed form of the embeddings it has no part in its label's statistics either. What can be
seen of the map that its neighbors' weights draw is held against how well that map agrees with the
one computed on the image itself, by the very target that `DirectWeights` computes.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError
from ..images import Batch
from ..images.progress import Advance
from ..images.texts import LabelColumn, Texts
from ..index.arrays import ArrayLike, scratch_array
from ..index.calibration import Calibration, correlation, evidence
from ..index.encoding import Encoding, LowRank
from ..index.search import draw_negatives, nearest
from ..methods import DirectWeights
from ..network import EmbeddingNetwork
from ..ops import coefficients, drawn_and_signed, signed_cams
from ..recipe.recipe import Recipe
from ..targets import head_cotangent, query_cotangent
from .cotangents import AnchorCotangents, coded_labels
from .triplets import sample_of, total_of

SAMPLE = 512
"""Images that play queries, at most."""
LEAST = 40
"""Images from which a calibration is fitted; fewer say nothing that holds elsewhere."""
COUNTS = {"one": 1, "several": 5}
"""Neighbors that each calibration is fitted with."""
LEFT_OUT = 10
"""Of so many images at most one is left out at a time."""
FOLDS = 5
_LOW = 0.1
_BIN = 40
"""Images behind one 10th percentile, at least."""
_SHARE = 8
"""One of so many images plays a query where it takes a gradient of its own."""
_HELD, _BLOCK = 32 << 20, 1 << 12

Rows = Callable[[int, np.ndarray], dict[str, np.ndarray]]
"""Fields of a layer's encoding at some rows, with "embedding" where it uses that."""


def in_closed_form(recipe: Recipe, network: EmbeddingNetwork) -> bool:
    """Return whether weights are W^T dy/dz, so that a smaller index has them at once."""
    affine = network.head_kind.matrix is not None
    return affine and recipe.entry.formula == "gradcam" and recipe.sampling != "given"


def trust_rows(ids: Sequence[str], recipe: Recipe, network: EmbeddingNetwork) -> np.ndarray:
    """Choose rows that play queries, in order; none where there are too few.

    Fewer where each takes a gradient beside its forward pass.
    """
    n_rows = len(ids)
    if n_rows < LEAST:
        return np.empty(0, np.int64)
    most = SAMPLE if in_closed_form(recipe, network) else min(SAMPLE, max(LEAST, n_rows // _SHARE))
    return sample_of(ids, recipe.seed, most)


@dataclass(frozen=True)
class View:
    """What a sampled image is drawn with.

    `maps` are the activations of each layer, deepest first, `[K h w]`; where `mixed`, combinations
    of them by the head's matrix, `[D h w]`. `inputs` `[3 H W]` is None where no gradient is needed.
    """

    maps: Sequence[np.ndarray]
    mixed: bool = False
    inputs: np.ndarray | None = None


@dataclass(frozen=True)
class HeldOut:
    """An indexed image (row) as a query that was never indexed.

    `near` are rows of its nearest images `[n]`, with squared `distances`, `negatives` rows of other
    images. In closed form `codes` are dy/dz of those near in an index without it, `[n D]`, and
    `direct` is dy/dz at the image as the fallback has it, `[D]`; else both are empty.
    """

    row: int
    near: np.ndarray
    distances: np.ndarray
    negatives: np.ndarray
    codes: np.ndarray
    direct: np.ndarray


def calibrate_trust(
    recipe: Recipe,
    network: EmbeddingNetwork,
    encodings: Sequence[Encoding],
    fields: Rows,
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    rows: np.ndarray,
    views: Iterator[View],
    progressed: Advance,
) -> dict[str, Calibration] | None:
    """Return calibrations by name from images (`rows`) that query the rest; None of too few."""
    if not len(rows):
        return None
    closed, normalized = in_closed_form(recipe, network), network.normalize
    sample = leave_out(recipe, embeddings, labels, rows, closed_form=closed, normalized=normalized)
    fallback = None if closed else DirectWeights(network, recipe)
    direct: Sequence[np.ndarray]
    seen: dict[str, list[np.ndarray]] = {name: [] for name in COUNTS}
    agreed: dict[str, list[float]] = {name: [] for name in COUNTS}
    for place, view in enumerate(views):
        for name, left_out in sample.items():
            one = left_out[place]
            if fallback is None or view.inputs is None:
                norms, factors, direct = _by_codes(one, view, network, encodings[0])
            else:
                norms = factors = [
                    layer.decode(fields(number, one.near)) for number, layer in enumerate(encodings)
                ]
                others = embeddings[one.near], embeddings[one.negatives]
                direct = fallback.weights(view.inputs, *others)
            shares = [_shares(weights, one.distances) for weights in norms]
            mixed = [np.tensordot(*pair, 1) for pair in zip(shares, factors, strict=True)]
            transferred, expected = (
                drawn_and_signed(each, view.maps)[1].astype(np.float64).ravel()
                for each in (mixed, direct)
            )
            norm = float(np.linalg.norm(np.tensordot(shares[0], norms[0], 1)))
            raw = signed_cams(factors[0], view.maps[0])
            seen[name].append(evidence(raw, shares[0], norm, one.distances))
            agreed[name].append(float(correlation(transferred, expected)))
        progressed(1)
    return {
        name: fit_calibration(
            np.array(seen[name]),
            np.array(agreed[name]),
            np.array([one.distances.min() for one in sample[name]]),
            neighbors=count,
            seed=recipe.seed,
        )
        for name, count in COUNTS.items()
    }


def _shares(weights: np.ndarray, distances: np.ndarray) -> np.ndarray:
    flat = weights.reshape(len(weights), -1).astype(np.float64)
    return coefficients(np.linalg.norm(flat, axis=1), distances)


def _by_codes(
    one: HeldOut, view: View, network: EmbeddingNetwork, encoding: Encoding
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Return the neighbors' weights, what multiplies the maps instead, and the image's own."""
    matrix = network.head_kind.matrix
    assert matrix is not None
    weights = one.codes @ matrix
    if view.mixed:
        return [weights], [one.codes], [one.direct]
    if not (isinstance(encoding, LowRank) and encoding.origin == "head"):
        weights = encoding.decode(encoding.encode(weights))
    return [weights], [weights], [one.direct @ matrix]


def forwarded(
    network: EmbeddingNetwork, layers: Sequence[str], batches: Generator[Batch, None, None]
) -> Iterator[View]:
    """Yield views of images by a forward pass; `layers` are those of an index that has several."""
    with closing(batches):
        for batch in batches:
            for _, reason in batch.errors:
                raise ImageError(f"{reason}; it could be read before, so run the command again")
            if len(layers) > 1:
                activations = network.forward_layers(batch.images, layers)[1]
            else:
                activations = [network.forward(batch.images).activations]
            for row in range(len(batch)):
                maps = [each[row].float().cpu().numpy() for each in activations]
                yield View(maps, inputs=np.asarray(batch.images[row]))


def leave_out(
    recipe: Recipe,
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    rows: np.ndarray,
    *,
    closed_form: bool,
    normalized: bool,
) -> dict[str, list[HeldOut]]:
    """Leave each row of a sample out of the index, a few at a time, and search with it.

    Returns the sample in order, by the names of `COUNTS`; with codes where `closed_form`.
    """
    total, column = embeddings.shape[0], LabelColumn.of(labels)
    n_parts = min(len(rows), math.ceil(LEFT_OUT * len(rows) / total))
    part_of = np.random.default_rng(recipe.seed).permutation(len(rows)) % n_parts
    sample: dict[tuple[str, int], HeldOut] = {}
    target, nothing = recipe.resolved_target, np.empty(0, np.float32)

    def at_head(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        # But for |z|: every map's weights are scaled to length 1, or its map is alone.
        ones = np.ones(len(values), np.float32)
        codes = head_cotangent(values, vectors, ones, recipe.head_norm, normalized)
        return np.asarray(codes, np.float32)

    for part in range(n_parts):
        out = rows[part_of == part]
        is_left = np.ones(total, bool)
        is_left[out] = False
        rest = np.flatnonzero(is_left)
        vectors, queries = _taken(embeddings, rest), np.asarray(embeddings[out])
        rest_labels, every = column.take(rest), np.arange(len(rest))
        if closed_form:
            mean = (total_of(vectors) / len(rest)).astype(np.float32)
            coded = coded_labels(recipe, rest_labels, Texts.blank(len(rest)))
            anchors = AnchorCotangents(recipe, vectors, coded, mean)
        for name, count in COUNTS.items():
            neighbors = nearest(vectors, queries, count, recipe.metric)
            found = zip(out, queries, neighbors.positions, neighbors.distances, strict=True)
            for row, query, near, distances in found:
                others = np.delete(every, near)
                labels_at = rest_labels.__getitem__
                negatives = draw_negatives(others, rest_labels[near], labels_at)
                codes = direct = nothing
                if closed_form:
                    close, apart = vectors[near], vectors[negatives]
                    codes = at_head(anchors.of(near).values, close)
                    values = query_cotangent(target, recipe.norm, query, close, apart)
                    direct = at_head(values[None], query[None])[0]
                places = rest[near], distances, rest[negatives]
                sample[name, row] = HeldOut(int(row), *places, codes, direct)
    return {name: [sample[name, row] for row in rows] for name in COUNTS}


def _taken(embeddings: ArrayLike, rows: np.ndarray) -> np.ndarray:
    """Return those rows; of a large collection in a file of their own, not in memory."""
    taken = scratch_array((len(rows), embeddings.shape[1]), "float32", held=_HELD)
    for start in range(0, len(rows), _BLOCK):
        taken[start : start + _BLOCK] = embeddings[rows[start : start + _BLOCK]]
    return taken


def fit_calibration(
    evidence: np.ndarray, y: np.ndarray, nearest: np.ndarray, *, neighbors: int, seed: int = 0
) -> Calibration:
    """Fit scores by ridge regression, and what they are worth by centered isotonic regression.

    From evidence `[n F]` of images explained by so many `neighbors`, correlations y `[n]` of the
    transferred map with the computed one, and squared distances `[n]` of the nearest neighbors.
    """
    # What a score is worth is fitted with scores of images that the ridge regression did not see.
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
        neighbors=neighbors,
        images=len(y),
    )


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit coefficients `[F]` and intercept; the penalty chosen by leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    centre, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    model = RidgeCV(np.logspace(-2, 4, 13)).fit((x - centre) / spread, y)
    weights = model.coef_ / spread
    return weights, float(model.intercept_ - centre @ weights)


def _isotonic(scores: np.ndarray, y: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fit knots of the best rising function: scores, and what they are worth in [0, 1].

    Each pool of the fit is one knot, at its mean score, so that what lies between is told apart:
    centred isotonic regression (Oron & Flournoy 2017).
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit(scores, y).predict(scores)
    worth = np.unique(fitted)
    centres = [float(scores[fitted == value].mean()) for value in worth]
    return tuple(centres), tuple(worth.tolist())


def _lows(scores: np.ndarray, y: np.ndarray, knots: Sequence[float]) -> tuple[float, ...]:
    """Return 10th percentiles of the correlations of like scores, never falling, at the knots."""
    bins = np.array_split(np.argsort(scores, kind="stable"), max(1, len(y) // _BIN))
    centres = np.array([scores[some].mean() for some in bins])
    lows = np.array([np.quantile(y[some], _LOW) for some in bins])
    rising = _isotonic(centres, lows)
    return tuple(np.interp(knots, *rising).tolist())
