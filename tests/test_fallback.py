"""The fallback: weights that are computed on a query itself, where a transfer is not trusted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_samples import built, inputs, pictures, toy
from test_index_corrupt import edit

from embedcam import DirectWeights, Explainer, Index, Recipe, TripletMargin, build_index, cam_for
from embedcam.errors import InputError
from embedcam.images import ImageSource
from embedcam.ops import cam, sharpen
from embedcam.targets import Direction

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return pictures(tmp_path_factory.mktemp("photos"), n=48, classes=4)


class Noted:
    """Weights of ones, and a note of what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, np.ndarray]] = []

    def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
        self.asked.append((positives, negatives))
        return [np.ones(8, np.float32)]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(target="margin"), Recipe(method="gradcam++"), Recipe(target="centred", norm="around"),
     Recipe(method="scorecam", encoding="dense"),
     Recipe(method="scorecam", encoding="dense", fill="black"),
     Recipe(method="smoothgradcam++", encoding="dense", seed=7, options={"samples": 3})],
    ids=lambda r: f"{r.method}, {r.target}, {r.fill}",
)  # fmt: skip
def test_an_explanation_that_is_not_trusted_is_computed_on_the_query(
    source, tmp_path, recipe
) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index", recipe)
    query = inputs(made_of, source)[5] * 1.1
    with Index.open(path) as index, torch.inference_mode():
        plain = Explainer(index, made_of.network, trusted_from=1.0).explain(query)
        assert (plain.direct, plain.trusted) == (False, False)
        asked: list[tuple[np.ndarray, np.ndarray]] = []

        class NotedWeights(DirectWeights):
            def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
                asked.append((positives, negatives))
                return super().weights(inputs, positives, negatives)

        fallback = NotedWeights(made_of.network, Recipe.from_dict(index.manifest.recipe))
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        found = explainer.explain(query)
        again = explainer.explain(query)
        positives, negatives = asked[0]
        near = {index.labels[p] for p in index.positions(found.ids)}
        rows = {tuple(v): index.labels[i] for i, v in enumerate(index.embeddings(np.arange(48)))}
    assert (found.direct, found.trusted, found.trust) == (True, True, plain.trust)
    assert np.array_equal(found.cam, again.cam)
    assert found.to_dict()["direct"] is True
    assert "computed on the query:\ntransfer not trusted" in found.tiles()[0].subcaption
    np.testing.assert_array_equal(positives, index_vectors(path, found.ids))
    assert not {rows[tuple(v)] for v in negatives} & near
    own = made_of.network.forward(query[None]).embedding[0].numpy()
    norm = recipe.norm
    if recipe.target == "centred":
        aim: Any = Direction(own - np.concatenate([positives, negatives]).mean(0))
    elif recipe.resolved_target == "distinctive":
        aim = Direction(of_its_neighbors(own, positives, negatives))
        norm = norm if recipe.entry.scored else "around"
    else:
        pairs_ = [(p, n) for p in positives for n in negatives]
        aim = TripletMargin(*map(np.array, zip(*pairs_, strict=True)))
    if recipe.per_triplet:
        drawn = np.random.default_rng(recipe.seed)
        first, second = (drawn.integers(len(v), size=50) for v in (positives, negatives))
        aim = TripletMargin(positives[first], negatives[second])
    expected = cam_for(
        made_of.network, query, aim, recipe.method, norm=norm, progress=False,
        fill=recipe.fill, seed=recipe.seed, **dict(recipe.options),
    )  # fmt: skip
    scale = np.abs(expected.weights).max()
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(found.cam, expected.cam, rtol=1e-3, atol=1e-4 * expected.cam.max())
    assert np.abs(found.weights - plain.weights).max() > 1e-3 * np.abs(plain.weights).max()


def of_its_neighbors(own: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The distinctive target at a query `[D]`, its neighbours in place of a label."""
    others = np.concatenate([positives, negatives]).astype(np.float64)
    covariance = np.cov(others.T, bias=True)
    load = 10 * np.trace(covariance) / len(own) * np.eye(len(own))
    kind = np.linalg.solve(covariance + load, 2 * (positives.mean(0) - negatives.mean(0)))
    kind -= 0.5 * (kind @ own) * own
    centred = own - others.mean(0)
    found: np.ndarray = kind / np.linalg.norm(kind) + 0.2 * centred / np.linalg.norm(centred)
    return found.astype(np.float32)


def test_what_is_explained_by_one_result_is_not_told_from_that_result(source, tmp_path) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index")
    fallback = Noted()
    asked = fallback.asked
    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        query = inputs(made_of, source)[5] * 1.1
        near = explainer.explain(query, n_neighbors=2)
        labels = {name: label for name, label in zip(index.ids, index.labels, strict=True)}
        far = next(n for n in labels if labels[n] not in near.labels and n not in near.ids)
        asked.clear()
        rival = explainer.explain(query, n_neighbors=2, result=far, above=near.ids[0])
        assert (rival.trust, rival.trusted, rival.direct, asked) == (None, None, False, [])
        assert explainer.explain(query, n_neighbors=2, result=far).direct
        ((positives, negatives),) = asked
        of = {tuple(v): labels[index.ids[i]] for i, v in enumerate(index.embeddings(range(48)))}
    np.testing.assert_array_equal(positives, index_vectors(path, [far]))
    assert len(negatives)
    assert not {of[tuple(v)] for v in negatives} & {labels[far], *near.labels}


def test_without_labels_neighbours_and_the_result_are_still_no_negatives(tmp_path) -> None:
    made_of = toy("affine")
    photos = pictures(tmp_path / "photos", n=42)
    bare = ImageSource([replace(item, label=None) for item in photos.items], photos.root)
    path = built(bare, made_of, tmp_path / "index")
    fallback = Noted()
    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        query = inputs(made_of, bare)[5] * 1.1
        far = Explainer(index, made_of.network).explain(query, n_neighbors=42).ids[-1]
        found = explainer.explain(query, n_neighbors=3, result=far)
        left_out = index.embeddings(index.positions([*found.ids, far]))
        ((_, negatives),) = fallback.asked
        assert len(negatives) == 42 - 4
        assert not {tuple(v) for v in negatives} & {tuple(v) for v in left_out}


def test_beyond_what_was_calibrated_it_is_the_nearest_that_counts(source, tmp_path) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    query = inputs(made_of, source)[0] * 1.1
    with Index.open(path) as index:
        near = Explainer(index, made_of.network).explain(query)
    nearest, farthest = float(near.distances[0]), float(near.distances[-1])
    assert farthest > 1.1 * nearest
    edit(lambda m: m["trust_calibration"]["several"].update(largest_distance=nearest / 1.5))(path)
    with Index.open(path) as index:
        far = Explainer(index, made_of.network).explain(query)
    assert far.trust == pytest.approx(near.trust / 2, rel=1e-3)
    assert near.trust > 0.1


def index_vectors(path: Path, ids: list[str]) -> np.ndarray:
    with Index.open(path) as index:
        return index.embeddings(index.positions(ids))


def test_direct_weights_of_several_layers(tmp_path) -> None:
    from test_methods_index import LAYERS, dense, layered

    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    with Index.open(tmp_path / "index") as index:
        query = network.preprocess(source.open(3))
        fallback = DirectWeights(network, recipe)
        found = Explainer(index, network, trusted_from=1.0, fallback=fallback).explain(query)
        assert found.direct
        names = index.manifest.layer_names
        maps = network.forward_layers(query[None], names)[1]
        drawn = cam(found.layer_weights[names[0]], maps[0][0].numpy())
        for name, one in zip(names[1:], maps[1:], strict=True):
            drawn = sharpen(cam(found.layer_weights[name], one[0].numpy()), drawn)
        assert drawn.max() > 0


def test_a_fallback_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="DirectWeights takes the index's network and recipe"):
        DirectWeights(toy().network, "gradcam")  # type: ignore[arg-type]


def test_features_alone_are_not_computed_again(source, tmp_path) -> None:
    made_of = toy()
    # An image that is not indexed, whose weights are its own: transfer is not exact.
    recipe = Recipe(method="gradcam++")
    path = built(source, made_of, tmp_path / "index", recipe)
    fallback = DirectWeights(made_of.network, recipe)
    explainer = Explainer(path, trusted_from=1.0, fallback=fallback)
    features = made_of.network.forward(inputs(made_of, source)[5:6] * 1.1)
    found = explainer.explain_features(
        features.embedding[0].numpy(), features.activations[0].numpy()
    )
    assert found.direct is False
    assert found.trusted is False
    assert 0 < found.trust < 1
    explainer.index.close()
