"""The fallback: weights that are computed on a query itself, where a transfer is not trusted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_samples import built, inputs, pictures, toy
from test_index_corrupt import edit
from test_methods_index import LAYERS, dense, layered

from embedcam import DirectWeights, Explainer, Index, Recipe, TripletMargin, build_index, cam_for
from embedcam.errors import InputError
from embedcam.images import ImageSource
from embedcam.targets import Direction

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return pictures(tmp_path_factory.mktemp("photos"), n=48, classes=4)


class Noted(DirectWeights):
    """Notes what it is asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[tuple[np.ndarray, np.ndarray]] = []

    def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
        self.asked.append((positives, negatives))
        return super().weights(inputs, positives, negatives)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(target="margin"), Recipe(method="gradcam++"), Recipe(target="centred", norm="around"),
     Recipe(method="scorecam", encoding="dense"),
     Recipe(method="scorecam", encoding="dense", fill="black"),
     Recipe(method="smoothgradcam++", encoding="dense", seed=7, options={"samples": 3})],
    ids=lambda r: f"{r.method}, {r.target}, {r.fill}",
)  # fmt: skip
def test_an_explanation_that_is_not_trusted_is_computed_on_the_query(source, tmp_path, recipe):
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index", recipe)
    query = inputs(made_of, source)[5] * 1.1
    with Index.open(path) as index, torch.inference_mode():
        plain = Explainer(index, made_of.network, trusted_from=1.0).explain(query)
        assert (plain.direct, plain.trusted) == (False, False)
        fallback = Noted(made_of.network, Recipe.from_dict(index.manifest.recipe))
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        found = explainer.explain(query)
        again = explainer.explain(query)
        positives, negatives = fallback.asked[0]
        near = {index.labels[p] for p in index.positions(found.ids)}
        rows = {tuple(v): index.labels[i] for i, v in enumerate(index.embeddings(np.arange(48)))}
    assert (found.direct, found.trusted, found.trust) == (True, True, plain.trust)
    assert np.array_equal(found.cam, again.cam)
    assert "computed on the query:\ntransfer not trusted" in found.tiles()[0].subcaption
    np.testing.assert_array_equal(positives, index_vectors(path, found.ids))
    assert not {rows[tuple(v)] for v in negatives} & near
    own = made_of.network.forward(query[None]).embedding[0].numpy()
    norm = recipe.norm
    if recipe.target == "centred":
        aim = Direction(own - np.concatenate([positives, negatives]).mean(0))
    elif recipe.resolved_target == "distinctive":
        aim = Direction(of_its_neighbors(own, positives, negatives))
        norm = norm if recipe.entry.scored else "around"
    else:
        n, m = len(positives), len(negatives)
        aim = TripletMargin(np.repeat(positives, m, axis=0), np.tile(negatives, (n, 1)))
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
    found = kind / np.linalg.norm(kind) + 0.2 * centred / np.linalg.norm(centred)
    return found.astype(np.float32)


def test_what_is_explained_by_one_result_is_not_told_from_that_result(source, tmp_path) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index")
    fallback = Noted(made_of.network, Recipe())
    asked = fallback.asked
    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        query = inputs(made_of, source)[5] * 1.1
        near = explainer.explain(query, n_neighbors=2)
        labels = dict(zip(index.ids, index.labels, strict=True))
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
    fallback = Noted(made_of.network, Recipe())
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
    with Explainer(path, made_of.network) as explainer:
        near = explainer.explain(query)
    nearest = float(near.distances[0])
    assert near.distances[-1] > 1.1 * nearest
    edit(lambda m: m["trust_calibration"]["several"].update(largest_distance=nearest / 1.5))(path)
    with Explainer(path, made_of.network) as explainer:
        assert explainer.explain(query).trust == pytest.approx(near.trust / 2, rel=1e-3)
    assert near.trust > 0.1


def index_vectors(path: Path, ids: list[str]) -> np.ndarray:
    with Index.open(path) as index:
        return index.embeddings(index.positions(ids))


def test_direct_weights_of_several_layers(tmp_path) -> None:
    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    fallback = DirectWeights(network, recipe)
    with Explainer(tmp_path / "index", network, trusted_from=1.0, fallback=fallback) as explainer:
        found = explainer.explain(network.preprocess(source.open(3)))
        assert found.direct
        assert list(found.layer_weights) == explainer.index.manifest.layer_names


def test_features_alone_are_not_computed_again(source, tmp_path) -> None:
    made_of = toy()
    # An image that is not indexed, whose weights are its own: transfer is not exact.
    recipe = Recipe(method="gradcam++")
    path = built(source, made_of, tmp_path / "index", recipe)
    fallback = DirectWeights(made_of.network, recipe)
    explainer = Explainer(path, trusted_from=1.0, fallback=fallback)
    features = made_of.network.forward(inputs(made_of, source)[5:6] * 1.1)
    given = features.embedding[0].numpy(), features.activations[0].numpy()
    found = explainer.explain_features(*given)
    assert (found.direct, found.trusted) == (False, False)
    assert 0 < found.trust < 1
    explainer.index.close()
    with pytest.raises(InputError, match="DirectWeights takes the index's network and recipe"):
        DirectWeights(made_of.network, "gradcam")  # type: ignore[arg-type]
