"""Methods of the zoo in an index: what is stored is what they find, and draws again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles as oracle_file
import pytest
import torch
import zoo_cases
import zoo_learned
from build_samples import Toy, dense, drawn, inputs, opened, pictures, quicken, toy
from zoo_cases import made

from embedcam import (
    METHODS,
    EmbeddingNetwork,
    Explainer,
    Preprocess,
    Recipe,
    add_images,
    build_from_features,
    build_index,
)
from embedcam.errors import InputError, NetworkError, RecipeError
from embedcam.images import ImageSource
from embedcam.methods import Subject, run_method
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.ops import area_average, resize
from embedcam.recipe.registry import WeightMethod
from embedcam.targets import Direction

Build = Callable[..., tuple[Toy, ImageSource, Path]]
UNTRAINED = [name for name, method in METHODS.items() if not method.trained]
# Those of transformers are in test_attention.
STORED = [
    name
    for name in UNTRAINED
    if isinstance(METHODS[name], WeightMethod) and not METHODS[name].attends
]
CAM_OTHER = ("cam", "other")  # CAM needs an affine head


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build an index of n pictures by a recipe: the toy network, the source, the index's path."""
    quicken(monkeypatch)

    def run(recipe: Recipe, kind: str = "other", n: int = 9, **settings: Any) -> Any:
        made_of, source = toy(kind), pictures(tmp_path / "photos", n=n)
        path = tmp_path / f"index {len(list(tmp_path.iterdir()))}"
        build_index(source, made_of.network, path, recipe, progress=False, **settings)
        return made_of, source, path

    return run


def anchors_of(recipe: Recipe, vectors: np.ndarray, source: ImageSource) -> AnchorCotangents:
    codes = label_codes([item.label for item in source.items])
    return AnchorCotangents(recipe, vectors, codes, vectors.mean(0))


KINDS = [(name, kind) for name in STORED for kind in ("affine", "other")]


@pytest.mark.parametrize(("name", "kind"), [kind for kind in KINDS if kind != CAM_OTHER])
def test_an_index_redraws_the_weight_form_of_every_storable_method(name, kind, build) -> None:
    recipe = dense(method=name, faiss="Flat")
    made_of, source, path = build(recipe, kind, batch_size=4)
    network = made_of.network
    images = torch.from_numpy(inputs(made_of, source))
    with opened(path) as (index, live):
        vectors = index.embeddings(live)
        stored = index.weights(live)
        explainer = Explainer(index, network)
        anchors = anchors_of(recipe, vectors, source)
        for row in (0, 5):
            aims = anchors.of(np.array([row]))
            values = aims.values if aims.values.ndim == 3 else aims.values[:, None]
            with Subject(network, images[row : row + 1], Direction(values, aims.used)) as subject:
                own = run_method(subject, METHODS[name]).weights.numpy()
            close = 2e-6 * np.abs(own).max() + 1e-12
            np.testing.assert_allclose(stored[row], own[0], rtol=2e-4, atol=close)
            again = explainer.explain(images[row].numpy(), neighbors=[index.ids[row]]).cam
            maps = network.forward(images[row : row + 1]).activations[0].numpy()
            redrawn = oracle_file.cam(own[0], maps)
            expected = resize(redrawn.astype(np.float32), again.shape)
            np.testing.assert_allclose(again, expected, atol=1e-4 * redrawn.max() + 1e-7)
    assert stored.any()


LAYERS = ("features.0", "features.2", "features")


def layered(seed: int = 0) -> EmbeddingNetwork:
    """A network with three layers of different grids."""
    case = zoo_cases.make("curved", seed=seed)
    case.module.float()
    return EmbeddingNetwork(case.module, "features", preprocess=Preprocess(zoo_cases.SIZE))


@pytest.mark.parametrize("encoding", ["dense", "low-rank", "top-m"])
def test_an_index_holds_every_layer_of_poly_cam(encoding: str, tmp_path, monkeypatch) -> None:
    quicken(monkeypatch)
    network, source = layered(), pictures(tmp_path / "photos", n=9)
    choices = {"encoding": encoding, "rank": 6, "m": 3, "layers": LAYERS}
    recipe = dense(method="polycam", **choices)
    build_index(source, network, tmp_path / "index", recipe, batch_size=4, progress=False)
    with opened(tmp_path / "index") as (index, live):
        index.verify()
        assert index.manifest.layer_names == list(LAYERS[::-1])
        vectors = index.embeddings(live)
        anchors = anchors_of(recipe, vectors, source)
        explainer = Explainer(index, network)
        for row in (1, 6):
            image = network.preprocess(source.open(row))
            aim = Direction(anchors.of(np.array([row])).values[:, None])
            own = made("polycam", network, torch.from_numpy(image)[None], aim, layers=LAYERS)
            for number, name in enumerate(LAYERS[::-1]):
                stored, expected = index.weights([row], number)[0], own.layer_weights[name][0]
                if encoding != "top-m":
                    close = 1e-4 * np.abs(expected).max() + 1e-9
                    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=close)
            again = explainer.explain(image, neighbors=[index.ids[row]])
            assert set(again.layer_weights) == set(LAYERS)
            if encoding == "dense":
                both = {"result": index.ids[row], "above": index.ids[row + 1]}
                told_apart = explainer.explain(image, **both).layer_weights
                for number, weights in enumerate(told_apart.values()):
                    difference = oracle_file.rival_weights(*index.weights([row, row + 1], number))
                    np.testing.assert_allclose(weights, difference, rtol=1e-4, atol=1e-6)
                close = 1e-4 * own.cam.max()
                np.testing.assert_allclose(again.cam, own.cam[0], rtol=1e-3, atol=close)
                _, tapped = network.forward_layers(image[None], index.manifest.layer_names)
                maps = [maps[0].numpy() for maps in tapped]
                given = {"size": zoo_cases.SIZE, "neighbors": [index.ids[row]]}
                alone = Explainer(index).explain_features(vectors[row], maps, **given)
                np.testing.assert_allclose(alone.cam, again.cam, rtol=1e-5, atol=1e-9)
                # The image's own map, kept as bytes of at most 64 cells.
                kept, grid = index.coarse([row])[0], own.grid_cam[0]
                assert kept.size <= 64
                whole = area_average(grid, kept.shape)
                np.testing.assert_allclose(kept, whole, atol=whole.max() / 400)


def test_an_index_of_several_layers_grows_and_says_what_it_needs(tmp_path, monkeypatch) -> None:
    quicken(monkeypatch)
    network, path = layered(), tmp_path / "index"
    source = pictures(tmp_path / "photos", n=9)
    recipe = dense(method="polycam", layers=LAYERS, faiss="Flat")
    first = ImageSource(source.items[:6], source.root)
    build_index(first, network, path, recipe, batch_size=4, progress=False)
    with opened(path) as (index, _):
        before = [index.weights(np.arange(6), number) for number in range(3)]
    rest = ImageSource(source.items[6:], source.root)
    add_images(rest, network, path, batch_size=2, progress=False)
    with opened(path) as (index, live):
        assert len(live) == 9
        for number in range(3):
            np.testing.assert_array_equal(index.weights(np.arange(6), number), before[number])
            assert np.isfinite(index.weights([6, 7, 8], number)).all()
        found = Explainer(index, network).explain(tmp_path / "photos" / source.items[0].path)
        assert found.cam.shape == zoo_cases.SIZE
        features = network.forward(network.probe_images())
        one = (features.embedding[0].numpy(), features.activations[0].numpy())
        with pytest.raises(InputError, match=r"index draws with the layers features, features\.2"):
            Explainer(index).explain_features(*one)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "Poly-CAM draws with several layers and layers = \\[\\]; name at least two"),
        ({"layers": ("a", "a")}, "name at least two, each once"),
        ({"layers": ("a", 3)}, "give a list of names"),
        ({"method": "gradcam", "layers": ("a", "b")}, "Grad-CAM works on the network's own layer"),
    ],
)
def test_layers_that_cannot_be_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"method": "polycam", **choices})


def test_the_networks_own_layer_is_the_deepest_of_poly_cam(tmp_path: Path) -> None:
    case = zoo_cases.make("curved")
    case.module.float()
    network = EmbeddingNetwork(case.module, "features.2", preprocess=Preprocess(zoo_cases.SIZE))
    source = pictures(tmp_path / "photos", n=9)
    recipe = dense(method="polycam", layers=LAYERS)
    with pytest.raises(RecipeError, match=r"and the network explains 'features\.2'; name that one"):
        build_index(source, network, tmp_path / "index", recipe, progress=False)
    assert not (tmp_path / "index").exists()


def test_an_index_holds_what_lfi_cam_learned(tmp_path: Path, monkeypatch) -> None:
    quicken(monkeypatch)
    case = zoo_learned.lfi_case()
    case.module.float()
    network = EmbeddingNetwork(case.module, "trunk", preprocess=Preprocess(zoo_cases.SIZE))
    source = pictures(tmp_path / "photos", n=9)
    build_index(source, network, tmp_path / "index", dense(method="lficam"), progress=False)
    with opened(tmp_path / "index") as (index, live):
        image = network.preprocess(source.open(2))
        found = made("lficam", network, image, case.target)
        np.testing.assert_allclose(index.weights(live)[2], found.weights, rtol=1e-4)
        drawn = Explainer(index, network).explain(image, neighbors=[index.ids[2]]).cam
        np.testing.assert_allclose(drawn, found.cam, rtol=1e-4, atol=1e-6)


def test_features_alone_serve_the_methods_of_the_pooled_vector_only(tmp_path: Path) -> None:
    vectors, recipe = np.eye(4, dtype=np.float32), Recipe(method="scorecam")
    with pytest.raises(RecipeError, match="method = 'scorecam' needs the images, and features"):
        build_from_features(vectors, vectors, tmp_path / "index", recipe, grid=(2, 2))


def test_a_build_by_smooth_grad_cam_takes_the_seed_and_only_triplets_that_count(build) -> None:
    recipe = dense(method="smoothgradcam++", hinge=True, margin=0.05, seed=7, faiss="none")
    made_of, source, path = build(recipe)
    with opened(path) as (index, live):
        vectors, stored = index.embeddings(live), index.weights(live)
        counts = index.triplets_used(live)
    triplets = drawn(recipe, vectors, [item.label for item in source.items])
    images, some = torch.from_numpy(inputs(made_of, source)), 0
    for row in range(9):
        pairs = [(vectors[p], vectors[n]) for p, n in triplets[row]]
        satisfied = oracle_file.hinge_is_satisfied
        kept = [pair for pair in pairs if not satisfied(vectors[row], *pair, 0.05)]
        assert counts[row] == len(kept)
        if not kept:
            assert not stored[row].any()
            continue
        some += len(kept) < len(pairs)
        aim = Direction(np.array([2 * (p - n) for p, n in kept]))
        weights = {}
        for seed in (7, 0):
            with Subject(made_of.network, images[row : row + 1], aim, seed=seed) as subject:
                weights[seed] = run_method(subject, METHODS[recipe.method]).weights[0].numpy()
        np.testing.assert_allclose(stored[row], weights[7], rtol=1e-3, atol=1e-7)
        assert np.abs(weights[7] - weights[0]).max() > 1e-3 * np.abs(weights[7]).max()
    assert some


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("scorecam", {"fill": "blur"}),
        ("scorecam", {"options": {"weights": "softmax", "temperature": 0.1}}),
        ("integratedgradcam", {"fill": "black", "options": {"steps": 3}}),
        ("groupcam", {"options": {"groups": 2, "percentile": None}}),
        ("xgradcam", {"norm": "around"}),
    ],
)
def test_a_recipes_fill_norm_and_options_are_the_methods(name, choices, build) -> None:
    recipe = dense(method=name, faiss="none", **choices)
    made_of, source, path = build(recipe)
    with opened(path) as (index, live):
        vectors, stored = index.embeddings(live), index.weights(live)
        assert Recipe.from_dict(index.manifest.recipe) == recipe.resolved
    aim = anchors_of(recipe, vectors, source).of(np.array([3]))
    image = torch.from_numpy(inputs(made_of, source))[3]
    options = {**recipe.method_options, "fill": recipe.fill, "norm": recipe.head_norm}
    target = Direction(aim.values[:, None], aim.used)
    chosen = made(name, made_of.network, image, target, **options).weights
    plain = made(name, made_of.network, image, target).weights
    np.testing.assert_allclose(stored[3], chosen, rtol=2e-3, atol=1e-6 * np.abs(chosen).max())
    assert np.abs(chosen - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"method": "cam"}, NetworkError, "CAM needs average pooling"),
        ({"method": "lficam"}, NetworkError, "LFI"),
        ({"method": "scorecam", "options": {"samples": 5}}, InputError, "no option 'samples'; its"),
        ({"method": "clustercam", "options": {"n_clusters": 2.5}}, InputError, "n_clusters = 2.5;"),
    ],
)
def test_what_cannot_be_is_refused_before_any_image_is_read(choices, error, message, tmp_path):
    made_of, source = toy("other"), pictures(tmp_path / "photos", n=9)
    with pytest.raises(error, match=message):
        build_index(source, made_of.network, tmp_path / "i", dense(**choices), progress=False)
    assert max(made_of.batches) <= 2  # probe pictures, and what is made of them
    assert not (tmp_path / "i").exists()
