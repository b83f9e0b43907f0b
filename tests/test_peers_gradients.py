"""Gradient methods beside other implementations: equal where they follow the paper.

Where they do not, the difference is stated, and why ours is the paper's. Each library is optional.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
import zoo_gradients
from torch import Tensor, nn
from zoo_cases import Case

from embedcam.methods import MethodOutput

LAYERS = ["features.1", "features.2", "features"]
SIGNED = {"head": "curved", "target": "triplets", "signed": True}

pytestmark = pytest.mark.peers


def case_of(scale: float = 1.0, **settings: Any) -> Case:
    """A case in which no unit works in place, and whose target is scaled."""
    case = zoo_cases.make(**settings)
    case.module.features[1].inplace = False
    case.scores = [lambda f, score=score: scale * score(f) for score in case.scores]
    case.target = _Scaled(case.target, scale)
    return case


class _Scaled:
    """A target times a number: only what `Subject` asks for."""

    def __init__(self, target: Any, scale: float) -> None:
        self.target, self.scale = target, scale
        self.parts, self.holds_norm, self.check = target.parts, False, target.check

    def at(self, row: int) -> Any:
        return self

    def cotangents(self, embeddings: Tensor) -> Any:
        each, used = self.target.cotangents(embeddings)
        return self.scale * each, used


def ours(name: str, case: Case, **options: Any) -> MethodOutput:
    return zoo_cases.run(case, name, **options)[0]


def own_map(name: str, case: Case, **options: Any) -> np.ndarray:
    found = ours(name, case, **options)
    if found.maps is not None:
        return found.maps[0].numpy()
    assert found.weights is not None
    return zoo_gradients.weighted_map(found.weights[0].numpy(), case.gradient(case.image)[0])


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def grad_cam_map(kind: str, case: Case) -> np.ndarray:
    """Their map before it is resized and scaled, ReLU'd as their `forward` does."""
    library = pytest.importorskip("pytorch_grad_cam")
    with getattr(library, kind)(case.module, [case.module.features]) as made:
        (z,) = made.activations_and_grads(case.image[None])
        case.score(z).backward()
        A, G = (
            made.activations_and_grads.activations[0].numpy(),
            made.activations_and_grads.gradients[0].numpy(),
        )
        drawn = made.get_cam_image(case.image[None], None, None, A, G, False)
    case.module.zero_grad()
    return np.maximum(drawn[0], 0)


@pytest.mark.parametrize("settings", [SIGNED, {"head": "pooled", "seed": 3}])
@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("gradcam", "GradCAM", 1e-12),
        ("hirescam", "HiResCAM", 1e-12),
        ("layercam", "LayerCAM", 1e-12),
        # They add 1e-7 to the sum of activations.
        ("xgradcam", "XGradCAM", 1e-5),
    ],
)
def test_grad_cam_draws_the_same(
    name: str, kind: str, tolerance: float, settings: dict[str, Any]
) -> None:
    case = case_of(**settings)
    theirs = grad_cam_map(kind, case)
    assert theirs.max() > 0
    assert close(own_map(name, case), theirs, tolerance)


def torchcam_maps(
    kind: str, case: Case, layers: list[str], normalized: bool = False, **settings: Any
) -> tuple[list[Tensor], Any]:
    library = pytest.importorskip("torchcam.methods")
    with getattr(library, kind)(
        case.module, layers, input_shape=tuple(case.image.shape), **settings
    ) as made:
        z = case.module(case.image[None])
        maps = made(scores=z, normalized=normalized, targets=case.score)
    return maps, made


@pytest.mark.parametrize("settings", [SIGNED, {"head": "pooled", "seed": 3}])
@pytest.mark.parametrize(
    ("name", "kind"), [("gradcam", "GradCAM"), ("xgradcam", "XGradCAM"), ("layercam", "LayerCAM")]
)
def test_torchcam_draws_the_same(name: str, kind: str, settings: dict[str, Any]) -> None:
    case = case_of(**settings)
    (theirs,), _ = torchcam_maps(kind, case, ["features"])
    assert float(theirs.max()) > 0
    assert close(own_map(name, case), theirs[0].numpy(), 1e-5)


def test_torchcams_layercam_fusion_lifts_every_layer() -> None:
    """The paper lifts the shallow layers' maps by tanh; theirs lifts the deep ones' too."""
    case = case_of(head="curved", target="triplets")
    maps, made = torchcam_maps("LayerCAM", case, LAYERS)
    # They scale by smallest and largest value before; eq. 9 divides by the largest alone.
    theirs = made.fuse_cams([one / one.max() for one in maps], (12, 18))[0].numpy()
    assert close(own_map("layercam", case, layers=LAYERS, shallow=LAYERS), theirs, 1e-5)
    paper = own_map("layercam", case, layers=LAYERS)
    assert not close(paper, theirs, 0.02)
    expected = zoo_gradients.layercam(case, layers=LAYERS, shallow=["features.1"]).map
    assert expected is not None
    assert close(paper, expected, 1e-9)


class Scored(nn.Module):
    """The network with its target: input -> y `[1]`, as captum wants it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module, self.case = case.module, case

    def forward(self, x: Tensor) -> Tensor:
        return self.case.score(self.module(x)[0])[None]


def captum_of(kind: str, case: Case, *layer: nn.Module, **settings: Any) -> np.ndarray:
    library = pytest.importorskip("captum.attr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(library, kind)(Scored(case), *layer)
        return made.attribute(case.image[None].clone(), **settings)[0].detach().numpy()


@pytest.mark.parametrize("settings", [SIGNED, {"head": "pooled", "seed": 3}])
def test_captum_draws_the_same_gradcam(settings: dict[str, Any]) -> None:
    """Without a ReLU unless asked."""
    case = case_of(**settings)
    theirs = captum_of("LayerGradCam", case, case.module.features, relu_attributions=True)[0]
    assert theirs.max() > 0
    assert close(own_map("gradcam", case), theirs, 1e-12)
    A, G = case.gradient(case.image)
    signed = captum_of("LayerGradCam", case, case.module.features)[0]
    assert close((G.mean((1, 2))[:, None, None] * A).sum(0), signed, 1e-12)


@pytest.mark.parametrize("settings", [SIGNED, {"head": "pooled", "seed": 3}])
def test_captum_draws_the_same_guided_backprop(settings: dict[str, Any]) -> None:
    case = case_of(**settings)
    theirs = captum_of("GuidedBackprop", case).sum(0)
    assert np.abs(theirs).max() > 0
    assert close(own_map("guidedbackprop", case), theirs, 1e-12)


def test_captums_guided_gradcam_is_ours_once_it_upsamples_bilinearly() -> None:
    case = case_of(**SIGNED)
    layer = case.module.features
    bilinear = captum_of("GuidedGradCam", case, layer, interpolate_mode="bilinear").sum(0)
    assert np.abs(bilinear).max() > 0
    found = own_map("guidedgradcam", case)
    assert close(found, bilinear, 1e-6)
    # Its default repeats the nearest cell; the paper up-samples bilinearly.
    assert not close(found, captum_of("GuidedGradCam", case, layer).sum(0), 0.05)


def test_grad_cams_guided_backprop_draws_the_same_and_shares_one_new_relu() -> None:
    """Theirs puts one new ReLU in every place; ours changes no module."""
    library = pytest.importorskip("pytorch_grad_cam")
    case = case_of(head="pooled", target="dot", normalize=False, seed=3)
    coordinate = case.target.target.directions[0]  # type: ignore[attr-defined]
    found = own_map("guidedbackprop", case)
    head = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(coordinate))
    model = library.GuidedBackpropReLUModel(
        nn.Sequential(case.module.features, case.module.head, head).eval(), "cpu"
    )
    theirs = model(case.image[None].clone(), 0).sum(-1)
    assert close(found, theirs, 1e-12)
    units = [part for part in case.module.features if isinstance(part, nn.ReLU)]
    assert units[0] is units[1]
