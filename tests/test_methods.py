"""What holds for every method of the zoo, parametrised from the registry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
from build_samples import inputs, pictures, toy
from PIL import Image
from test_methods_laws import ORACLES, case_of
from zoo_cases import made

from embedcam import METHODS, EmbeddingNetwork, PairContribution, Recipe, Similarity, cam_for
from embedcam.errors import EmbedcamError, InputError, NetworkError, RecipeError
from embedcam.methods import MethodWarning
from embedcam.recipe.registry import MapMethod, find_method, storable_methods
from embedcam.render import overlay

UNTRAINED = [name for name, method in METHODS.items() if not method.trained]


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_of_a_type_that_says_whether_it_is_stored(name: str) -> None:
    method = METHODS[name]
    assert method.load().__doc__
    assert method.source
    assert isinstance(method, MapMethod) != method.storable
    assert (name in storable_methods()) == method.storable
    if isinstance(method, MapMethod):
        assert METHODS[method.nearest].storable
        with pytest.raises(RecipeError) as refused:
            Recipe(method=name)
        assert f"{method.title} cannot be put in an index: {method.why}" in str(refused.value)
        assert f"the nearest method that can is {method.nearest!r}" in str(refused.value)


def test_methods_are_found_as_they_are_printed_and_others_are_told_their_neighbours() -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, method in METHODS.items():
        assert find_method(method.title) is method
        assert method.title in page, name
    with pytest.raises(InputError, match="method = 'scorcam' is unknown; did you mean 'scorecam'"):
        find_method("scorcam")
    with pytest.raises(InputError, match="method = 3 is unknown; known: cam, gradcam"):
        find_method(3)


@pytest.mark.parametrize("name", UNTRAINED)
def test_the_network_comes_back_as_it_was_also_after_an_exception(name: str) -> None:
    case = case_of(name, head="pooled" if name == "cam" else "curved")
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    next(case.module.parameters()).requires_grad_(False)

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


def test_a_masked_picture_may_leave_nothing() -> None:
    case = zoo_cases.make("pooled")
    with torch.no_grad():
        for part in case.module.modules():
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()
    with pytest.raises(NetworkError, match="is zero and cannot be normalised"):
        case.network.forward(torch.zeros_like(case.image)[None])
    for name in ("scorecam", "rise", "lime", "sbsm", "groupcam", "polycam"):
        found = made(name, case.network, case.image, case.target)
        assert np.isfinite(found.cam).all()


LAYERS = ["features.1", "features"]
COUNT = "give a whole number from 1 to 1,000,000"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smoothgradcam++", {"samples": 0}, f"samples = 0; {COUNT}"),
        ("smoothgradcam++", {"sigma": -0.1}, r"sigma = -0\.1; give a number of at least 0"),
        ("integratedgradcam", {"steps": 2.5}, rf"steps = 2\.5; {COUNT}"),
        ("layercam", {"shallow": ["features"]}, r"which of several layers .*; give layers= too"),
        ("layercam", {"layers": LAYERS, "shallow": ["features.4"]}, "some of the layers 'feat"),
        ("layercam", {"layers": LAYERS, "shallow": "features"}, "shallow = 'features'; give a"),
        ("zoomcam", {"layers": "features"}, "layers = 'features'; give a list of names"),
        ("zoomcam", {"layers": []}, r"give a list of layers, such as \['layer3', 'layer4'\]"),
        ("zoomcam", {"layers": ["features"] * 2}, "given twice among features, features"),
        ("groupcam", {"clustering": "spectral"}, "'spectral' is unknown; known: contiguous, k"),
        ("groupcam", {"percentile": 100}, "percentile = 100; give a number of at least 0 and"),
        ("clustercam", {"n_clusters": 2.0}, f"n_clusters = 2.0; {COUNT}"),
        ("clustercam", {"clustering": "ward"}, "'ward' is unknown; known: kmeans, spectral"),
        ("polycam", {"layers": None}, "draws from several layers and layers = None; give"),
        ("polycam", {"layers": []}, r"layers = \(\); give their names, such as layers=\['layer1'"),
        ("polycam", {"variant": "+"}, r"variant = '\+' is unknown; known: plus, minus, both"),
        ("polycam", {"baseline": 1}, "baseline = 1; give true or false"),
        ("scorecam", {"weights": "relu"}, "'relu' is unknown; known: raw, softmax"),
        ("scorecam", {"weights": "softmax", "temperature": 0}, "= 0; give a number above 0"),
        ("scorecam", {"temperature": 2.0}, "give weights='softmax' with it"),
        ("rise", {"masks": 1}, "masks = 1; give a whole number from 2"),
        ("rise", {"probability": 1}, "probability = 1; give a number between 0 and 1"),
        ("lime", {"kernel": 0.0}, "kernel = 0.0; give a number above 0"),
        ("lime", {"ridge": "1"}, "ridge = '1'; give a number above 0"),
        ("lime", {"superpixels": "quickshift"}, "known: grid, slic"),
        ("lime", {"superpixels": np.zeros((3, 4), int)}, r"are \[3, 4\] of .* pixel \[12 18\]"),
        ("gradcam", {"steps": 3}, "Grad-CAM has no option 'steps'; it has no options"),
        ("rise", {"mask": 3}, "RISE has no option 'mask'; its options are masks"),
        ("sbsm", {"window": 0}, "window = 0; give a whole number of at least 1"),
        ("sbsm", {"window": (13, 2)}, "13 x 2 is larger than the picture, 12 x 18"),
        ("sbsm", {"stride": (1, 2, 3)}, r"give \(height, width\)"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, message) -> None:
    case = zoo_cases.make()
    with pytest.raises(InputError, match=message):
        made(name, case.network, case.image, case.target, **options)


@pytest.mark.parametrize("name", [n for n in UNTRAINED if not METHODS[n].targeted])
def test_a_method_that_ignores_the_target_says_so(name: str) -> None:
    case = case_of(name)
    with pytest.warns(MethodWarning, match="ignores the target: it shows what stands out"):
        cam_for(case.network, case.image, case.target, name, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": Similarity(np.ones(5))}, r"embeds in 3 numbers, so give \[3\]"),
        ({"target": lambda f: f.sum(1) * np.nan}, "the target returned a NaN or an infinity"),
        ({"norm": "beside"}, "norm = 'beside' is unknown; known: through, around"),
        ({"batch_size": 0}, "batch_size = 0; give a whole number of at least 1"),
        ({"size": 50}, r"size = 50; give \(height, width\)"),
        ({"size": "x"}, "size = 'x'; give"),
        ({"size": (0, 3)}, r"size = \(0, 3\); give"),
        ({"seed": -1}, "seed = -1; give a whole number from 0"),
        ({"images": np.zeros((0, 3, 12, 18))}, "holds no input; give at least one"),
        ({"images": np.zeros((12, 18, 3))}, "floats with channels last; give the network's input"),
    ],
)
def test_what_cannot_be_given_is_refused(given: dict[str, Any], message: str) -> None:
    case = zoo_cases.make()
    usual = {"images": case.image, "target": case.target, "method": "scorecam", "progress": False}
    with pytest.raises(InputError, match=message):
        cam_for(case.network, **{**usual, **given})


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


def test_a_map_draws_itself(tmp_path: Path) -> None:
    network, source = toy("affine").network, pictures(tmp_path)
    path = tmp_path / source.items[0].path
    target = Similarity(np.arange(5) + 1.0)
    found = cam_for(network, path, target, "rise", progress=False)
    assert repr(found) == "<MethodMap: RISE, 16 x 16 from 16 x 16, no channel weights>"
    picture = Image.open(path).convert("RGB")
    assert found.save(tmp_path / "map.png", path) == tmp_path / "map.png"
    with Image.open(tmp_path / "map.png") as written:
        np.testing.assert_array_equal(written, overlay(picture, found.cam))
    half = (0.0, 0.0, picture.width / 2, float(picture.height))
    np.testing.assert_array_equal(found.plot(picture, half), overlay(picture, found.cam, half))
    assert found.plot().size == (16, 16)
    batch = cam_for(network, [path, path], target, "gradcam", progress=False)
    with pytest.raises(InputError, match=r"the map is \[2, 16, 16\], and one \[H W\] is drawn"):
        batch.save(tmp_path / "map.png")
    with pytest.raises(InputError, match=r"map\.txt: the picture cannot be written"):
        found.save(tmp_path / "map.txt")


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
    normal = torch.nn.LayerNorm(3, elementwise_affine=False)
    network = EmbeddingNetwork.from_parts(
        case.module.features,
        lambda maps: torch.nn.functional.normalize(normal(case.module.head(maps))),
        module=case.module,
        input_size=zoo_cases.SIZE,
    )
    with pytest.raises(RecipeError, match="PairContribution needs the embedding before its L2"):
        cam_for(network, case.image, PairContribution(np.ones(3)), "hirescam")


def test_every_error_of_the_zoo_is_one_of_ours() -> None:
    case = zoo_cases.make()
    for name in UNTRAINED:
        with pytest.raises(EmbedcamError):
            made(name, case.network, case.image[:, :, :0], case.target)


def test_masked_pictures_reach_a_module_that_needs_contiguous_memory() -> None:
    case, found, formats = zoo_cases.make("curved"), [], []
    for views in (False, True):
        asked: list[bool] = []

        def trunk(images: torch.Tensor, views: Any = views, asked: Any = asked) -> torch.Tensor:
            asked.append(images.is_contiguous())
            if views:
                images = images.view(len(images), -1).view(images.shape)
            return case.module.features(images)

        own = {"module": case.module, "input_size": zoo_cases.SIZE}
        network = EmbeddingNetwork.from_parts(trunk, case.module.head, **own)
        found.append(made("scorecam", network, case.image, case.target).cam)
        formats.append(asked)
    # Channels last, where convolutions are faster; the second gives up after one attempt.
    assert not formats[0][-1]
    assert formats[1].count(False) == 1
    assert formats[1][-1]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-7)
