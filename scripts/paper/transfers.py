"""Weights from neighbours, prototypes and another class, beside weights of the query's own.

Pictures: in five folds each picture is a query once, the other folds are the index. The direct map
is drawn with the query as the anchor, the index's pictures of its label as positives and the others
as negatives, by the same method, target, norm and encoding as the index's weights.

Scenes: the index holds every picture; a scene is drawn with weights of the explained picture's
nearest others of its class. The direct map is drawn with weights whose cotangent is the target of
those same results, differentiated in the scene itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from measuring import energy_in, pasted_auc, share_of, signed, single_auc

from embedcam.metrics import correlations
from embedcam.offline.cotangents import AnchorCotangents, Cotangents
from embedcam.ops import transfer
from embedcam.prototypes.groups import group
from embedcam.recipe.recipe import Recipe
from embedcam.targets import WHITENED, Whitened, whitened_cotangent, whitening, with_own

from .bench import Bench

FOLDS = 5
NEIGHBORS = (1, 3, 5, 10)
PROTOTYPES = (50, 100, 200)
RECIPES = {
    "all triplets, through": Recipe(target="margin"),
    "all triplets, around": Recipe(target="margin", norm="around"),
    "distinctive: the default": Recipe(),
    "50 triplets, top 50, through": Recipe.paper(),
}


@dataclass
class Carried:
    """What weights from one source score beside the direct ones.

    Args:
        recipe: name of the weights.
        source: where they are from; "direct" for the query's own.
        auc: single AUC of each picture's map, or pasted AUC of each scene (its mirror image
            averaged in).
        direct_auc: the same of the direct map.
        kept: energy of each picture's map, or share of each scene.
        direct: the same of the direct map.
        alike: correlation of the two signed maps, picture by picture, or scene by scene.
    """

    recipe: str
    source: str
    auc: np.ndarray
    direct_auc: np.ndarray
    kept: np.ndarray
    direct: np.ndarray
    alike: np.ndarray

    def some(self, source: str, chosen: np.ndarray) -> "Carried":
        """The same of some pictures."""
        figures = (self.auc, self.direct_auc, self.kept, self.direct, self.alike)
        return Carried(self.recipe, source, *(one[chosen] for one in figures))


def pictures(bench: Bench) -> list[Carried]:
    """One-object pictures, each a query once."""
    activations, unseen = bench.gallery.activations, bench.unseen
    mean = np.ones_like(bench.gallery.pooled)
    right = nearest_of_label(bench)
    found = []
    for name, recipe in RECIPES.items():
        sources = carried_weights(bench, _fitting(bench, recipe))
        own = sources["direct"]
        expected = signed(activations, own)
        area = single_auc(activations, own, unseen.objects)
        direct = energy_in(activations, own, unseen.regions)
        for source, weights in {**sources, "mean activation": mean}.items():
            one = Carried(
                name,
                source,
                single_auc(activations, weights, unseen.objects),
                area,
                energy_in(activations, weights, unseen.regions),
                direct,
                correlations(signed(activations, weights), expected),
            )
            found.append(one)
            if source == "1 nearest":
                found.append(one.some(f"{source}, of its label", right))
                found.append(one.some(f"{source}, of another label", ~right))
    return found


def nearest_of_label(bench: Bench) -> np.ndarray:
    """Whether each query's nearest picture of its fold's index has its label, `[N]`."""
    right = np.zeros(len(bench.codes), bool)
    for index, queries in folds(len(bench.codes)):
        nearest = index[(bench.embeddings[queries] @ bench.embeddings[index].T).argmax(1)]
        right[queries] = bench.codes[nearest] == bench.codes[queries]
    return right


def carried_weights(bench: Bench, recipe: Recipe) -> dict[str, np.ndarray]:
    """Weights `[N K]` of every picture as a query, from each source."""
    count, channels = bench.gallery.pooled.shape
    found: dict[str, np.ndarray] = {}
    for index, queries in folds(count):
        for source, weights in _of_fold(bench, recipe, index, queries):
            found.setdefault(source, np.zeros((count, channels), np.float32))[queries] = weights
    return found


def folds(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of the index and of the queries, fold after fold."""
    order = np.random.default_rng(0).permutation(count)
    for queries in np.array_split(order, FOLDS):
        yield np.setdiff1d(order, queries), np.sort(queries)


def _of_fold(
    bench: Bench, recipe: Recipe, index: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    f, codes = bench.embeddings, bench.codes
    generator = np.random.default_rng(0)
    anchors = AnchorCotangents(recipe, f[index], codes[index], bench.mean)
    weights, _ = bench.weights(recipe, anchors.of(np.arange(len(index))), index)
    own = query_cotangents(recipe, codes[queries], f[index], codes[index], generator)
    if recipe.resolved_target in WHITENED:
        own = whitened_cotangents(recipe, own, f[queries], f[index])
    counts = np.ones(len(queries), np.int64)
    yield "direct", bench.weights(recipe, Cotangents(own, None, counts), queries)[0]
    distances = ((f[queries][:, None] - f[index]) ** 2).sum(-1)
    near = np.argsort(distances, axis=1, kind="stable")
    apart = np.take_along_axis(distances, near, axis=1)
    for k in NEIGHBORS:
        for mode in ("mean", "distance") if k > 1 else ("mean",):
            name = f"{k} nearest, {mode}" if k > 1 else "1 nearest"
            yield name, transfer(weights[near[:, :k]], apart[:, :k], mode)
    for number in PROTOTYPES:
        centres, merged = prototypes(f[index], weights, number)
        nearest = ((f[queries][:, None] - centres) ** 2).sum(-1).argmin(1)
        yield f"nearest of {number} prototypes", merged[nearest]
    strange = [
        generator.choice(np.flatnonzero(codes[index] != code), size=1) for code in codes[queries]
    ]
    yield "a random other class", weights[np.concatenate(strange)]


def whitened_cotangents(
    recipe: Recipe, margins: np.ndarray, queries: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """Of queries outside the index, as `embedcam.methods.DirectWeights` computes them: the
    query's own margin, whitened by the index's embeddings, and its own part."""
    amounts = Whitened.of(recipe.resolved_target, recipe.norm, labelled=True)
    known = index.astype(np.float64)
    mean = known.mean(0)
    matrix = whitening(known.T @ known / len(known), mean, amounts.ridge)
    kind = whitened_cotangent(margins, queries, matrix, amounts.jacobian)
    return with_own(kind, queries - mean, amounts.own)


def query_cotangents(
    recipe: Recipe,
    query_codes: np.ndarray,
    embeddings: np.ndarray,
    codes: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """2 (mean f_p - mean f_n) of queries outside the index, over all triplets or drawn ones.

    Without a picture of a query's label in the index its cotangent is 0.
    """
    values = np.zeros((len(query_codes), embeddings.shape[1]), np.float32)
    for row, code in enumerate(query_codes):
        positives, negatives = np.flatnonzero(codes == code), np.flatnonzero(codes != code)
        if not len(positives):
            continue
        if recipe.resolved_sampling != "all":
            positives = generator.choice(positives, recipe.n_triplets)
            negatives = generator.choice(negatives, recipe.n_triplets)
        values[row] = 2 * (embeddings[positives].mean(0) - embeddings[negatives].mean(0))
    return values


def prototypes(
    embeddings: np.ndarray, weights: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """k-means on embeddings: mean embeddings `[n D]` and mean *unit* weights `[n K]`."""
    groups = group(embeddings, None, number, 0, lambda _: None)
    member = (np.arange(len(groups))[:, None] == groups.of).astype(np.float32)
    member /= groups.sizes[:, None]
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    unit = np.divide(weights, lengths, out=np.zeros_like(weights), where=lengths > 0)
    return member @ embeddings, member @ unit


def scenes(bench: Bench) -> list[Carried]:
    """Two-object scenes drawn with the weights of one given result and of five."""
    places, labels = bench.scenes, bench.unseen.labels
    seen, lengths = bench.embed(places.pooled)
    generator = np.random.default_rng(0)
    kinds = np.stack([labels[places.explained], labels[places.other]])
    strange = np.array(
        [
            generator.choice(np.flatnonzero((labels != a) & (labels != b)))
            for a, b in zip(*kinds[:, : kinds.shape[1] // 2], strict=True)
        ]
    )
    found = []
    for name, recipe in RECIPES.items():
        if recipe.head_norm == "around":
            # Its weights are the same wherever it is differentiated: nothing to compare.
            continue
        recipe = _fitting(bench, recipe)
        cotangents = bench.cotangents(recipe).values
        weights, _ = bench.weights(recipe)
        for count in (1, 5):
            results, apart = results_of(bench, count)
            aim = Cotangents(cotangents[results].mean(1), None, np.ones(len(results), np.int64))
            direct, _ = bench.weights_at(recipe, aim, places.pooled, seen, lengths)
            carried = {f"{count} given": transfer(weights[results], apart)}
            if count == 1:
                carried["a random other class"] = weights[np.tile(strange, 2)]
                carried["mean activation"] = np.ones_like(direct)
            found += [_scene(bench, name, source, w, direct) for source, w in carried.items()]
    return found


def _scene(
    bench: Bench, recipe: str, source: str, weights: np.ndarray, direct: np.ndarray
) -> Carried:
    activations = bench.scenes.activations
    alike = correlations(signed(activations, weights), signed(activations, direct))
    measured = [
        measure(bench.scenes, each).mean(0)
        for measure in (pasted_auc, share_of)
        for each in (weights, direct)
    ]
    return Carried(recipe, source, *measured, alike.reshape(2, -1).mean(0))


def results_of(bench: Bench, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest other pictures of each explained one's class `[n count]`, squared distances too."""
    f, labels, explained = bench.embeddings, bench.unseen.labels, bench.scenes.explained
    distances = np.maximum(2 - 2 * f[explained] @ f.T, 0)
    distances[labels[explained][:, None] != labels] = np.inf
    distances[np.arange(len(explained)), explained] = np.inf
    fewest = int(np.isfinite(distances).sum(1).min())
    near = np.argsort(distances, axis=1, kind="stable")[:, : min(count, fewest)]
    return near, np.take_along_axis(distances, near, axis=1)


def _fitting(bench: Bench, recipe: Recipe) -> Recipe:
    """The recipe, no more channels kept than there are."""
    return replace(recipe, m=min(recipe.m, bench.head.matrix.shape[1]))
