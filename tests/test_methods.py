"""What holds for every method of the zoo, parametrised from the registry."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import oracles as oracle_file
import pytest
import torch
import zoo_cases
import zoo_learned
from build_samples import activations_of, dense, drawn, inputs, opened, pictures, quicken, toy

from embedcam import (
    METHODS,
    Coordinate,
    EmbeddingNetwork,
    Explainer,
    PairContribution,
    Preprocess,
    Recipe,
    Similarity,
    add_images,
    build_index,
    cam_for,
)
from embedcam.cam import area_average, resize
from embedcam.cotangents import AnchorCotangents
from embedcam.errors import EmbedcamError, InputError, NetworkError, RecipeError
from embedcam.images import ImageSource
from embedcam.methods import MethodWarning, Subject, weights_for
from embedcam.registry import (
    LayersMethod,
    MapMethod,
    WeightMethod,
    find_method,
    storable_methods,
)
from embedcam.targets import Direction
from embedcam.triplets import label_codes

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("zoo_*.py"))
UNTRAINED = [name for name, method in METHODS.items() if not method.trained]
STORED = [name for name in UNTRAINED if isinstance(METHODS[name], WeightMethod)]
CAM_OTHER = ("cam", "other")  # CAM needs an affine head
# Enough for the law at hand; a mask, a sample or a step more changes no law.
QUICK: dict[str, dict[str, Any]] = {"rise": {"masks": 20}, "lime": {"samples": 30}}


def oracles() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in FAMILIES:
        found |= getattr(import_module(family), "ORACLES", {})
    return found


def made(name: str, network: Any, images: Any, target: Any, **options: Any) -> Any:
    """A map without the warning of methods that ignore the target."""
    if name == "polycam":
        options.setdefault("layers", ["features.1", "features"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)
        return cam_for(
            network, images, target, name, progress=False, **{**QUICK.get(name, {}), **options}
        )


def test_every_method_has_an_oracle() -> None:
    assert set(oracles()) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_documented_and_of_a_type_that_says_whether_it_is_stored(
    name: str,
) -> None:
    method = METHODS[name]
    function = method.load()
    assert function.__doc__
    assert method.title
    assert method.source
    assert isinstance(method, WeightMethod | LayersMethod) == method.storable
    assert (name in storable_methods()) == method.storable
    if isinstance(method, MapMethod):
        assert METHODS[method.nearest].storable
        with pytest.raises(RecipeError) as refused:
            Recipe(method=name)
        assert f"{method.title} cannot be put in an index: {method.why}" in str(refused.value)
        assert f"the nearest method that can is {method.nearest!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "found"),
    [("Grad-CAM", "gradcam"), ("Smooth Grad-CAM++", "smoothgradcam++"), ("LFI-CAM", "lficam")],
)
def test_methods_are_found_as_they_are_printed(given: str, found: str) -> None:
    assert find_method(given).name == found


def test_an_unknown_method_is_told_its_neighbours() -> None:
    with pytest.raises(InputError, match="method 'scorcam' is unknown; did you mean 'scorecam'"):
        find_method("scorcam")
    with pytest.raises(InputError, match="named by a string such as 'gradcam'; given 3"):
        find_method(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_batch_means_what_one_at_a_time_means(name: str) -> None:
    case = zoo_cases.make("pooled" if name == "cam" else "curved")
    several = torch.stack([case.image, case.image.flip(-1), 0.5 * case.image])
    # Two at a time: the last piece is smaller.
    together = made(name, case.network, several, case.target, batch_size=2)
    assert together.cam.shape == (3, *zoo_cases.SIZE)
    for row, image in enumerate(several):
        alone = made(name, case.network, image, case.target, batch_size=7)
        np.testing.assert_allclose(
            together.cam[row], alone.cam, atol=1e-6 * np.abs(together.cam).max() + 1e-12
        )
        if alone.weights is not None:
            np.testing.assert_allclose(together.weights[row], alone.weights, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", UNTRAINED)
def test_the_network_comes_back_as_it_was_also_after_an_exception(name: str) -> None:
    case = zoo_cases.make("pooled" if name == "cam" else "curved")
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    case.module.features[0].weight.requires_grad_(False)

    def wrong(embeddings: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the user's own")

    if METHODS[name].targeted:
        with pytest.raises(RuntimeError, match="the user's own"):
            made(name, case.network, case.image, wrong)
    made(name, case.network, case.image, case.target)
    for key, value in case.module.state_dict().items():
        assert torch.equal(value, before[key])
    for part in case.module.modules():
        assert not part._forward_hooks
        assert not part._backward_hooks
        assert not part._forward_pre_hooks
        assert not part.training
    parameters = list(case.module.parameters())
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(p.grad is None for p in parameters)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", UNTRAINED)
def test_maps_are_finite_where_nothing_speaks_for_the_target(name: str) -> None:
    case = zoo_cases.make("pooled")
    flat = torch.zeros_like(case.image)
    found = made(name, case.network, torch.stack([flat, case.image]), Direction(np.zeros(3)))
    assert np.isfinite(found.cam).all()
    if METHODS[name].targeted:
        np.testing.assert_allclose(found.cam[1], 0, atol=1e-6)


def test_a_masked_picture_may_leave_nothing() -> None:
    case = zoo_cases.make("pooled")
    with torch.no_grad():
        for part in case.module.modules():
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()
    with pytest.raises(NetworkError, match="are zero and cannot be normalised"):
        case.network.forward(torch.zeros_like(case.image)[None])
    for name in ("scorecam", "rise", "lime", "sbsm", "groupcam", "polycam"):
        found = made(name, case.network, case.image, case.target)
        assert np.isfinite(found.cam).all()


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    case = zoo_cases.make()
    with pytest.raises(InputError, match="Grad-CAM has no option 'steps'; it has no options"):
        cam_for(case.network, case.image, case.target, "gradcam", steps=3)
    with pytest.raises(InputError, match="RISE has no option 'mask'; its options are masks"):
        cam_for(case.network, case.image, case.target, "rise", mask=3)


@pytest.mark.parametrize("name", [n for n in UNTRAINED if not METHODS[n].targeted])
def test_a_method_that_ignores_the_target_says_so(name: str) -> None:
    case = zoo_cases.make()
    with pytest.warns(MethodWarning, match="ignores the target: it shows what stands out"):
        cam_for(case.network, case.image, case.target, name, progress=False)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "target is 3; give one such as Similarity"),
        (Similarity, "target is <class"),
        (Similarity(np.ones(5)), "this network embeds in 3 numbers, so give \\[3\\]"),
        (Similarity(np.ones((5, 3))), r"\[1 D\], one for each of the 1 images"),
        (Coordinate(3), "coordinate 3 of an embedding of 3 numbers; give 0 to 2"),
        (lambda f: f, "the target returned \\[1, 3\\] for embeddings \\[1, 3\\]"),
        (lambda f: f.sum(1) * float("nan"), "the target returned a NaN or an infinity"),
        (lambda f: f.detach().sum(1), "does not depend on the embedding, or was cut from it"),
    ],
)
def test_a_target_that_cannot_be_is_refused(target: Any, message: str) -> None:
    case = zoo_cases.make()
    with pytest.raises(InputError, match=message):
        cam_for(case.network, case.image, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "beside"}, "norm 'beside' is unknown; use one of through, around"),
        ({"batch_size": 0}, "batch_size = 0; give a whole number from 1"),
        ({"size": 50}, "size = 50; give \\(height, width\\)"),
        ({"size": "x"}, "size = 'x'; give"),
        ({"size": (0, 3)}, "size = \\(0, 3\\); give"),
        ({"seed": -1}, "seed = -1; give a whole number from 0"),
        (
            {"fill": "pink"},
            "fill = 'pink' is unknown; use mean, black, blur, a number, a tensor or an array",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    case = zoo_cases.make()
    with pytest.raises(InputError, match=message):
        cam_for(case.network, case.image, case.target, "scorecam", progress=False, **options)


def test_a_picture_goes_through_the_networks_own_preprocessing(tmp_path: Path) -> None:
    network, source = toy("affine").network, pictures(tmp_path)
    picture = tmp_path / source.items[3].path
    whole = inputs(toy("affine"), source)[3]
    target = Similarity(np.arange(5) + 1.0)
    found = cam_for(network, picture, target)
    np.testing.assert_array_equal(found.cam, cam_for(network, whole, target).cam)
    assert cam_for(network, [picture, picture], target).cam.shape == (2, 16, 16)
    with pytest.raises(InputError, match="the list of pictures is empty"):
        cam_for(network, [], target)
    case = zoo_cases.make()
    with pytest.raises(InputError, match="the network has no preprocessing"):
        cam_for(case.network, picture, case.target)


def test_inputs_that_are_no_input_are_refused() -> None:
    case = zoo_cases.make()
    with pytest.raises(InputError, match="holds no input; give at least one"):
        cam_for(case.network, np.zeros((0, 3, 12, 18)), case.target)
    with pytest.raises(InputError, match="floats with channels last; give the network's input"):
        cam_for(case.network, np.zeros((12, 18, 3)), case.target)


def test_cam_needs_pooling_and_a_linear_map() -> None:
    case = zoo_cases.make("curved")
    with pytest.raises(NetworkError, match="CAM needs average pooling and one linear map"):
        cam_for(case.network, case.image, case.target, "cam")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in STORED for kind in ("affine", "other") if (name, kind) != CAM_OTHER],
)
def test_an_index_redraws_the_weight_form_of_every_storable_method(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of = toy(kind)
    network, source = made_of.network, pictures(tmp_path / "photos", n=9)
    recipe = dense(method=name, faiss="Flat")
    build_index(source, network, tmp_path / "index", recipe, batch_size=4, progress=False)
    images = torch.from_numpy(inputs(made_of, source))
    with opened(tmp_path / "index") as (index, live):
        vectors = index.embeddings(live)
        stored = index.weights(live)
        explainer = Explainer(index, network)
        labels = label_codes([item.label for item in source.items])
        anchors = AnchorCotangents(recipe, vectors, labels, vectors.mean(0))
        for row in (0, 5):
            aims = anchors.of(np.array([row]))
            values = aims.values if aims.values.ndim == 3 else aims.values[:, None]
            with Subject(network, images[row : row + 1], Direction(values, aims.used)) as subject:
                own = weights_for(subject, METHODS[name]).numpy()  # type: ignore[arg-type]
            np.testing.assert_allclose(
                stored[row], own[0], rtol=2e-4, atol=2e-6 * np.abs(own).max() + 1e-12
            )
            again = explainer.explain(images[row].numpy(), neighbors=[index.ids[row]])
            redrawn = np.maximum(
                np.einsum(
                    "k,khw->hw", own[0], network.forward(images[row : row + 1]).activations[0]
                ),
                0,
            )
            np.testing.assert_allclose(
                again.cam,
                resize(redrawn.astype(np.float32), again.cam.shape),
                atol=1e-4 * redrawn.max() + 1e-7,
            )
    assert stored.any()


LAYERS = ("features.0", "features.2", "features")


def layered(seed: int = 0) -> EmbeddingNetwork:
    """A network with three layers of different grids."""
    case = zoo_cases.make("curved", seed=seed)
    case.module.float()
    return EmbeddingNetwork(case.module, "features", preprocess=Preprocess(zoo_cases.SIZE))


@pytest.mark.parametrize("encoding", ["dense", "low-rank", "top-m"])
def test_an_index_holds_every_layer_of_poly_cam_and_redraws_its_map(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    network, source = layered(), pictures(tmp_path / "photos", n=9)
    choices = {"encoding": encoding, "rank": 6, "m": 3, "layers": LAYERS}
    recipe = dense(method="polycam", **choices)
    build_index(source, network, tmp_path / "index", recipe, batch_size=4, progress=False)
    with opened(tmp_path / "index") as (index, live):
        index.verify()
        assert [layer["name"] for layer in index.manifest["layers"]] == [
            "features", "features.2", "features.0",
        ]  # fmt: skip
        vectors = index.embeddings(live)
        labels = label_codes([item.label for item in source.items])
        anchors = AnchorCotangents(recipe, vectors, labels, vectors.mean(0))
        explainer = Explainer(index, network)
        for row in (1, 6):
            image = network.preprocess(source.open(row))
            aim = Direction(anchors.of(np.array([row])).values[:, None])
            own = made("polycam", network, torch.from_numpy(image)[None], aim, layers=LAYERS)
            for number, name in enumerate(["features", "features.2", "features.0"]):
                stored, expected = index.weights([row], number)[0], own.layer_weights[name][0]
                if encoding != "top-m":
                    scale = np.abs(expected).max()
                    np.testing.assert_allclose(
                        stored, expected, rtol=1e-3, atol=1e-4 * scale + 1e-9
                    )
            again = explainer.explain(image, neighbors=[index.ids[row]])
            assert set(again.layer_weights) == set(LAYERS)
            if encoding == "dense":
                np.testing.assert_allclose(
                    again.cam, own.cam[0], rtol=1e-3, atol=1e-4 * own.cam.max()
                )
                _, tapped = network.forward_layers(
                    image[None], [layer["name"] for layer in index.manifest["layers"]]
                )
                alone = Explainer(index).explain_features(
                    vectors[row],
                    [maps[0].numpy() for maps in tapped],
                    size=zoo_cases.SIZE,
                    neighbors=[index.ids[row]],
                )
                np.testing.assert_allclose(alone.cam, again.cam, rtol=1e-5, atol=1e-9)
                # The image's own map, kept as bytes of at most 64 cells.
                kept, grid = index.coarse([row])[0], own.grid_cam[0]
                assert kept.size <= 64
                whole = area_average(grid, kept.shape)
                np.testing.assert_allclose(kept, whole, atol=whole.max() / 400)


def test_an_index_of_several_layers_grows_and_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        with pytest.raises(
            InputError, match=r"this index draws with the layers features, features\.2"
        ):
            Explainer(index).explain_features(
                features.embedding[0].numpy(), features.activations[0].numpy()
            )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "Poly-CAM draws with several layers and layers = \\[\\]; name at least two"),
        ({"layers": ("a",)}, "name at least two, each once"),
        ({"layers": ("a", "a")}, "name at least two, each once"),
        ({"layers": ("a", 3)}, "should be names of layers"),
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


def test_an_index_holds_what_lfi_cam_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def literal_margin(vectors: np.ndarray, triplets: np.ndarray) -> np.ndarray:
    """2 (f_p - f_n) of each triplet `[S 2]`, one number at a time, `[S D]`."""
    found = np.zeros((len(triplets), vectors.shape[1]))
    for s, (p, n) in enumerate(triplets):
        for d in range(vectors.shape[1]):
            found[s, d] = 2 * (float(vectors[p, d]) - float(vectors[n, d]))
    return found


def test_a_build_by_xgrad_cam_around_the_norm_is_the_literal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("other"), pictures(tmp_path / "photos", n=9)
    recipe = dense(method="xgradcam", norm="around", seed=3, faiss="none")
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    maps = activations_of(made_of, source).double()
    with opened(tmp_path / "index") as (index, live):
        vectors, stored = index.embeddings(live), index.weights(live)
    triplets = drawn(recipe, vectors, [item.label for item in source.items])
    for row in range(9):
        c = torch.from_numpy(literal_margin(vectors, triplets[row]).mean(0))
        leaf = maps[row : row + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad((made_of.head(leaf)[0] * c).sum(), leaf)
        for k in range(leaf.shape[1]):
            share = leaf[0, k].detach() / leaf[0, k].detach().sum()
            expected = float((share * gradient[0, k]).sum()) if share.isfinite().all() else 0.0
            assert stored[row, k] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_build_by_score_cam_of_the_centred_target_is_the_literal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("other"), pictures(tmp_path / "photos", n=6)
    recipe = dense(method="Score-CAM", target="centred", faiss="none")
    assert recipe.method == "scorecam"
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    with opened(tmp_path / "index") as (index, live):
        vectors, stored = index.embeddings(live).astype(float), index.weights(live)
    images, mean = inputs(made_of, source), vectors.mean(0)
    maps = activations_of(made_of, source).double().numpy()

    def score(image: np.ndarray, row: int) -> float:
        f = made_of.network.forward(image[None].astype(np.float32)).embedding[0].double().numpy()
        return float(((vectors[row] - mean) * f).sum())

    for row in (0, 4):
        nothing = score(np.zeros_like(images[row]), row)
        for k in range(maps.shape[1]):
            expected = 0.0
            if maps[row, k].max() > maps[row, k].min():
                mask = oracle_file.min_max(oracle_file.bilinear(maps[row, k], 16, 16))
                expected = score(images[row] * mask, row) - nothing
            assert stored[row, k] == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_a_build_by_smooth_grad_cam_takes_the_seed_and_only_triplets_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("other"), pictures(tmp_path / "photos", n=9)
    recipe = dense(method="smoothgradcam++", hinge=True, margin=0.05, seed=7, faiss="none")
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    with opened(tmp_path / "index") as (index, live):
        vectors, stored = index.embeddings(live), index.weights(live)
        counts = index.triplets_used(live)
    triplets = drawn(recipe, vectors, [item.label for item in source.items])
    images, some = torch.from_numpy(inputs(made_of, source)), 0
    for row in range(9):
        kept = [
            (p, n)
            for p, n in triplets[row]
            if not oracle_file.hinge_is_satisfied(vectors[row], vectors[p], vectors[n], 0.05)
        ]
        assert counts[row] == len(kept)
        if not kept:
            assert not stored[row].any()
            continue
        some += len(kept) < len(triplets[row])
        aim = Direction(literal_margin(vectors, np.array(kept)))
        weights = {}
        for seed in (7, 0):
            with Subject(made_of.network, images[row : row + 1], aim, seed=seed) as subject:
                weights[seed] = weights_for(subject, METHODS[recipe.method])[0].numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(stored[row], weights[7], rtol=1e-3, atol=1e-7)
        assert np.abs(weights[7] - weights[0]).max() > 1e-3 * np.abs(weights[7]).max()
    assert some


def test_a_method_that_the_network_cannot_do_is_refused_before_any_image_is_embedded(
    tmp_path: Path,
) -> None:
    source = pictures(tmp_path / "photos", n=9)
    for method, message in (("cam", "CAM needs average pooling"), ("lficam", "LFI")):
        made_of = toy("other")
        with pytest.raises(NetworkError, match=message):
            build_index(
                source, made_of.network, tmp_path / method, dense(method=method), progress=False
            )
        assert made_of.forwards(1) < 8  # probe pictures
        assert not (tmp_path / method).exists()


def test_cam_reads_each_image_once_and_is_grad_cam_times_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    source, kept = pictures(tmp_path / "photos", n=9), {}
    for method in ("cam", "gradcam"):
        made_of = toy("affine")
        recipe = dense(method=method, faiss="none")
        build_index(source, made_of.network, tmp_path / method, recipe, progress=False)
        with opened(tmp_path / method) as (index, live):
            kept[method] = index.weights(live)
    np.testing.assert_allclose(kept["cam"], 16 * kept["gradcam"], rtol=1e-5)


@pytest.mark.parametrize("name", ["scorecam", "rise", "eigencam"])
def test_the_norms_other_way_is_refused_where_there_is_no_gradient(name: str) -> None:
    case, title = zoo_cases.make(), METHODS[name].title
    with pytest.raises(InputError, match=f"norm 'around' changes the gradient, and {title} never"):
        made(name, case.network, case.image, case.target, norm="around")
    if METHODS[name].storable:
        with pytest.raises(RecipeError, match=f"{title} never asks for one; leave it out"):
            Recipe(method=name, norm="around")


def test_contributions_of_a_pair_need_the_vector_before_its_norm() -> None:
    case = zoo_cases.make("pooled")
    head = case.module.head
    normal = torch.nn.Sequential(head, torch.nn.LayerNorm(3, elementwise_affine=False))
    network = EmbeddingNetwork.from_parts(
        case.module.features,
        lambda maps: torch.nn.functional.normalize(normal(maps)),
        module=case.module,
        input_size=zoo_cases.SIZE,
    )
    with pytest.raises(RecipeError, match="PairContribution needs the embedding before its L2"):
        cam_for(network, case.image, PairContribution(np.ones(3)), "hirescam")


def test_a_build_by_any_method_does_not_depend_on_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    source = pictures(tmp_path / "photos", n=9)
    kept = []
    for size in (1, 4):
        path = tmp_path / str(size)
        recipe = dense(method="scorecam", faiss="none")
        build_index(source, toy("other").network, path, recipe, batch_size=size, progress=False)
        with opened(path) as (index, live):
            kept.append(index.weights(live))
    np.testing.assert_allclose(kept[0], kept[1], rtol=1e-4, atol=1e-6 * np.abs(kept[0]).max())


def test_features_alone_serve_the_methods_of_the_pooled_vector_only(tmp_path: Path) -> None:
    from embedcam import build_from_features

    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(RecipeError, match="method = 'scorecam' needs the images, and features"):
        build_from_features(
            vectors, vectors, tmp_path / "index", Recipe(method="scorecam"), grid=(2, 2)
        )


def test_every_error_of_the_zoo_is_one_of_ours() -> None:
    case = zoo_cases.make()
    for name in UNTRAINED:
        with pytest.raises(EmbedcamError):
            made(name, case.network, case.image[:, :, :0], case.target)
