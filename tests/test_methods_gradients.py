"""Gradient methods against their oracles, their options, and the laws that they obey."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
import zoo_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_cases import Case, distance, parts, run
from zoo_gradients import ORACLES, cam_map

from embedcam import METHODS, EmbeddingNetwork, cam_for
from embedcam.errors import NetworkError
from embedcam.targets import Direction

# Stages of the toy trunk: [5 12 18], [5 4 6] and [6 4 6].
LAYERS = ["features.1", "features.2", "features"]


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("cam", {}, (1, 0, 0)),
        *((name, {}, (1, 1, 0)) for name in ("gradcam", "gradcam++", "xgradcam", "hirescam")),
        *((name, {"layers": LAYERS}, (1, 1, 0)) for name in ("layercam", "zoomcam")),
        ("smoothgradcam++", {"samples": 9}, (10, 9, 0)),
        ("integratedgradcam", {"steps": 9}, (10, 9, 0)),
        ("guidedbackprop", {}, (1, 0, 1)),
        ("guidedgradcam", {}, (2, 1, 1)),
    ],
)
def test_no_more_passes_than_needed(name: str, options: dict[str, Any], passes: tuple) -> None:
    spent = run(zoo_cases.make(), name, **options)[1].passes
    assert (spent.forwards, spent.head_backwards, spent.full_backwards) == passes
    assert spent.heads == 0


def test_smooth_noise_follows_the_images_range() -> None:
    case = zoo_cases.make("curved")
    found, _ = run(case, "smoothgradcam++")
    with torch.no_grad():
        case.module.features[0].weight /= 100
    scaled, _ = run(case, "smoothgradcam++", 100 * case.image[None])
    np.testing.assert_allclose(scaled.weights, found.weights, rtol=1e-9)


def test_integrated_takes_steps_and_a_baseline() -> None:
    case = zoo_cases.make("curved", "triplets")
    grey = torch.full_like(case.image, 0.25)
    for steps, fill, baseline in ((7, 0.25, grey), (1, "mean", None), (5, grey, grey)):
        expected = zoo_gradients.integrated_gradcam(case, steps=steps, baseline=baseline)
        found, _ = run(case, "integratedgradcam", steps=steps, fill=fill)
        assert distance(expected, found) < 1e-9
    own, _ = run(case, "integratedgradcam", fill=case.image)
    assert (own.maps == 0).all()
    one, _ = run(case, "integratedgradcam", steps=1)
    np.testing.assert_allclose(one.weights, run(case, "gradcam")[0].weights)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_baseline_that_is_embedded_as_zeros_is_a_start_like_any_other(steps: int) -> None:
    case = zoo_cases.make("pooled", "triplets")
    with torch.no_grad():
        for part in (case.module.features[0], case.module.features[3], case.module.head.linear):
            part.bias.zero_()
    with pytest.raises(NetworkError, match="is zero and cannot be normalised"):
        case.network.forward(torch.zeros_like(case.image)[None])
    expected = zoo_gradients.integrated_gradcam(case, steps=steps)
    for batch_size in (1, 3, 100):
        found, _ = run(case, "integratedgradcam", steps=np.int64(steps), batch_size=batch_size)
        assert distance(expected, found) < 1e-9
    assert expected.map.any()


def test_layercam_lifts_the_layers_more_than_twice_as_fine_as_the_deepest() -> None:
    case = zoo_cases.make("curved", "triplets", signed=True)
    found, _ = run(case, "layercam", layers=LAYERS)
    # [12 18] is more than twice as fine as [4 6].
    expected = zoo_gradients.layercam(case, layers=LAYERS, shallow=["features.1"])
    assert distance(expected, found) < 1e-9
    # Lifting every layer shows.
    assert distance(zoo_gradients.layercam(case, layers=LAYERS, shallow=LAYERS), found) > 0.02
    backwards, _ = run(case, "layercam", layers=LAYERS[::-1])
    np.testing.assert_allclose(backwards.maps, found.maps, rtol=1e-12)


def test_the_norm_goes_around_where_asked() -> None:
    case = zoo_cases.make("curved", "dot")
    _, through = case.gradient(case.image)
    found, _ = run(case, "gradcam", norm="around")
    plain = zoo_cases.make("curved", "dot", normalize=False)
    np.testing.assert_allclose(found.weights[0], ORACLES["gradcam"](plain).weights, rtol=1e-9)
    assert np.abs(found.weights[0].numpy() - through.mean((1, 2))).max() > 1e-3
    fused, _ = run(case, "layercam", norm="around", layers=LAYERS)
    again = zoo_gradients.layercam(plain, layers=LAYERS, shallow=["features.1"])
    assert distance(again, fused) < 1e-9
    pixels, _ = run(case, "guidedbackprop", norm="around")
    assert distance(ORACLES["guidedbackprop"](plain), pixels) < 1e-9


def test_guided_methods_need_a_rectifier() -> None:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), *head).double().eval()
    case = replace(zoo_cases.make(), network=EmbeddingNetwork(module, "1"))
    for name in ("guidedbackprop", "guidedgradcam"):
        with pytest.raises(NetworkError, match=r"ReLU, and this network has none; .*'gradcam'"):
            run(case, name)


def test_triplets_that_do_not_count_are_left_out() -> None:
    case = zoo_cases.make("curved")
    directions = np.random.default_rng(0).standard_normal((1, 3, 3))
    for name in ("gradcam++", "smoothgradcam++", "gradcam"):
        some = Direction(directions, used=np.array([[True, False, True]]))
        kept = Direction(directions[:, [0, 2]])
        none = Direction(directions, used=np.zeros((1, 3), bool))
        found = [run(replace(case, target=aim), name)[0].weights for aim in (some, kept, none)]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
        assert (found[2] == 0).all()


class Given(nn.Module):
    """Activations are the input itself; only some positions reach the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        # A network's precision is that of its parameters.
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.same(x)[..., 0] ** 2).sum(-1) + 1


def test_xgradcam_without_a_sum_is_zero_and_not_noise() -> None:
    image = torch.zeros(3, 2, 3, dtype=torch.float64)
    image[1, 0] = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)  # adds up to 6e-17
    image[2, 0] = torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64)
    module = Given().eval()
    network = EmbeddingNetwork(module, "same", normalize=False)
    case = Case(network, module, image, Direction([1.0, 1.0, 1.0]), [])
    found, _ = run(case, "xgradcam")
    # G = 2 A in the first column: 0.1 * 0.2 / -0.1.
    np.testing.assert_allclose(found.weights[0], [0, 0, -0.2], atol=1e-12)


def law_case(head: str, seed: int, signed: bool = False) -> Case:
    return zoo_cases.make(head, "triplets" if seed % 2 else "dot", seed=seed, signed=signed)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), signed=st.booleans())
def test_behind_average_pooling_gradcam_is_cam_and_hirescam_draws_it(seed, signed) -> None:
    case = law_case("pooled", seed, signed)
    names = ("cam", "gradcam", "hirescam", "xgradcam")
    cam, gradcam, hirescam, xgradcam = (run(case, name)[0] for name in names)
    np.testing.assert_allclose(cam.weights, gradcam.weights * 24, rtol=1e-9, atol=1e-13)
    A = case.trunk(case.image).detach().numpy()
    drawn = cam_map(gradcam.weights[0].numpy(), A)
    np.testing.assert_allclose(parts(hirescam)[1], drawn, atol=1e-12)
    alive = torch.from_numpy(np.abs(A.sum((1, 2))) > 1e-9)
    one, other = (found.weights[0][alive] for found in (xgradcam, gradcam))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["gradcam++", "smoothgradcam++"])
def test_what_is_squared_and_divided_is_not_homogeneous(name: str) -> None:
    """a = 1 / (2 + S G) falls with the scale of G: large targets saturate, small ones do not."""
    case = zoo_cases.make("curved", "dot")
    one, large = (
        run(replace(case, target=Direction(s * case.target.directions[0])), name)[0].weights
        for s in (1.0, 100.0)
    )
    # Not even up to one factor for the whole map.
    shares = (large / one)[one > 0]
    assert float(shares.max() / shares.min()) > 1.2


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), signed=st.booleans())
def test_maps_have_the_signs_and_ranges_they_promise(seed: int, signed: bool) -> None:
    case = law_case("curved", seed, signed)
    for name in ("integratedgradcam", "hirescam", "layercam", "zoomcam"):
        options = {"steps": 3} if name == "integratedgradcam" else {}
        assert parts(run(case, name, **options)[0])[-1].min() >= 0
    for name in ("layercam", "zoomcam"):
        fused = parts(run(case, name, layers=LAYERS)[0])[0]
        assert 0 <= fused.min() <= fused.max() <= 1 + 1e-12
    for name in ("gradcam++", "smoothgradcam++"):
        options = {"samples": 3} if name == "smoothgradcam++" else {}
        assert parts(run(case, name, **options)[0])[0].min() >= 0


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_the_full_precision(name: str, dtype: torch.dtype) -> None:
    def network(autocast: torch.dtype | None) -> EmbeddingNetwork:
        case = zoo_cases.make("pooled" if name == "cam" else "curved", "triplets", seed=3)
        return EmbeddingNetwork(case.module.float(), "features", autocast=autocast)

    case = zoo_cases.make(target="triplets", seed=3)
    options: list[dict[str, Any]] = [{}]
    if METHODS[name].several:
        options.append({"layers": LAYERS})
    for given_options in options:
        full, low = (
            cam_for(network(kind), case.image, case.target, name, **given_options).cam
            for kind in (None, dtype)
        )
        # Bent paths of ReLUs may tip over at single pixels: the mean is what must agree.
        assert np.abs(low - full).mean() < 0.06 * np.abs(full).max()
        assert np.abs(full).max() > 0


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "guidedbackprop"])
def test_half_precision_keeps_the_digits_of_small_gradients(name: str) -> None:
    case = zoo_cases.make("curved", "dot")
    network = EmbeddingNetwork(case.module.float(), "features", autocast=torch.float16)
    small = Direction(1e-9 * case.target.directions[0])
    found = cam_for(network, case.image, small, name).cam
    plain = cam_for(network, case.image, case.target, name).cam
    np.testing.assert_allclose(found * 1e9, plain, rtol=1e-2, atol=1e-2 * np.abs(plain).max())
    assert found.any()
