"""Methods beside other implementations: equal where they have the formula, else what differs."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo_cases
import zoo_clustering
import zoo_gradients
import zoo_perturbation
from torch import Tensor, nn
from zoo_cases import CHANNELS, SIZE, Case, make

from embedcam import EmbeddingNetwork
from embedcam.methods import MethodOutput
from embedcam.ops import sharpen
from embedcam.targets import Coordinate

pytestmark = pytest.mark.peers
LAYERS = ["features.1", "features.2", "features"]
SIGNED = {"head": "curved", "target": "triplets", "signed": True}


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
    return zoo_gradients.cam_map(found.weights[0].numpy(), case.gradient(case.image)[0])


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def grad_cam_map(kind: str, case: Case) -> np.ndarray:
    """Their map before it is resized and scaled, ReLU'd as their `forward` does."""
    library = pytest.importorskip("pytorch_grad_cam")
    with getattr(library, kind)(case.module, [case.module.features]) as made:
        (z,) = made.activations_and_grads(case.image[None])
        case.score(z).backward()
        seen = made.activations_and_grads
        A, G = seen.activations[0].numpy(), seen.gradients[0].numpy()
        drawn = made.get_cam_image(case.image[None], None, None, A, G, False)
    case.module.zero_grad()
    return np.maximum(drawn[0], 0)


def torchcam_maps(kind: str, case: Case, layers: list[str]) -> tuple[list[Tensor], Any]:
    library, shape = pytest.importorskip("torchcam.methods"), tuple(case.image.shape)
    with getattr(library, kind)(case.module, layers, input_shape=shape) as made:
        z = case.module(case.image[None])
        return made(scores=z, normalized=False, targets=case.score), made


def test_torchcams_layercam_fusion_lifts_every_layer() -> None:
    """The paper lifts the shallow layers' maps by tanh; theirs lifts the deep ones' too."""
    case = case_of(head="curved", target="triplets")
    maps, made = torchcam_maps("LayerCAM", case, LAYERS)
    # They scale by smallest and largest value before; eq. 9 divides by the largest alone.
    theirs = made.fuse_cams([one / one.max() for one in maps], (12, 18))[0].numpy()
    assert close(own_map("layercam", case, layers=LAYERS, shallow=LAYERS), theirs, 1e-5)
    assert not close(own_map("layercam", case, layers=LAYERS), theirs, 0.02)


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


def torchcam_map(kind: str, case: Case) -> np.ndarray:
    return torchcam_maps(kind, case, ["features"])[0][0][0].numpy()


def captum_gradcam(kind: str, case: Case) -> np.ndarray:
    return captum_of(kind, case, case.module.features, relu_attributions=True)[0]


def captum_guided(kind: str, case: Case) -> np.ndarray:
    return captum_of(kind, case).sum(0)


@pytest.mark.parametrize("settings", [SIGNED, {"head": "pooled", "seed": 3}])
@pytest.mark.parametrize(
    ("name", "peer", "kind", "tolerance"),
    [
        ("gradcam", grad_cam_map, "GradCAM", 1e-12),
        ("hirescam", grad_cam_map, "HiResCAM", 1e-12),
        ("layercam", grad_cam_map, "LayerCAM", 1e-12),
        ("xgradcam", grad_cam_map, "XGradCAM", 1e-5),  # they add 1e-7 to the sum of activations
        ("gradcam", torchcam_map, "GradCAM", 1e-5),
        ("xgradcam", torchcam_map, "XGradCAM", 1e-5),
        ("layercam", torchcam_map, "LayerCAM", 1e-5),
        ("gradcam", captum_gradcam, "LayerGradCam", 1e-12),
        ("guidedbackprop", captum_guided, "GuidedBackprop", 1e-12),
    ],
)
def test_a_peer_draws_the_same(name, peer, kind, tolerance, settings) -> None:
    case = case_of(**settings)
    theirs = peer(kind, case)
    assert np.abs(theirs).max() > 0
    assert close(own_map(name, case), theirs, tolerance)


def test_captums_guided_gradcam_is_ours_once_it_upsamples_bilinearly() -> None:
    case = case_of(**SIGNED)
    layer = case.module.features
    bilinear = captum_of("GuidedGradCam", case, layer, interpolate_mode="bilinear").sum(0)
    assert np.abs(bilinear).max() > 0
    found = own_map("guidedgradcam", case)
    assert close(found, bilinear, 1e-6)
    # Its default repeats the nearest cell; the paper up-samples bilinearly.
    assert not close(found, captum_of("GuidedGradCam", case, layer).sum(0), 0.05)


def with_trunk(*features: nn.Module) -> Case:
    """A case whose trunk is another one; y is the second number of an embedding as it is."""
    case = make("curved", normalize=False)
    case.module.features = nn.Sequential(*features)
    module = case.module.double().eval()
    network = EmbeddingNetwork(module, "features", normalize=False)
    return Case(network, module, case.image, Coordinate(1), [lambda f: f[1]])


def grad_cam(case: Case, name: str) -> tuple[Any, Tensor, np.ndarray]:
    """grad-cam's class on the case's layer, A `[1 K h w]` and G."""
    peers = pytest.importorskip("pytorch_grad_cam")
    A, G = case.gradient(case.image)
    return getattr(peers, name)(case.module, [case.module.features]), A[None], G[None]


def weights_of_grad_cam(case: Case, name: str) -> np.ndarray:
    peer, A, G = grad_cam(case, name)
    given = (case.image[None], case.module.features, [case.score], np.asarray(A), G)
    return peer.get_cam_weights(*given)[0]


def test_scorecam_by_softmax_is_grad_cams_where_nothing_is_resized() -> None:
    torch.manual_seed(3)
    case = with_trunk(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Tanh())
    mine = ours("scorecam", case, weights="softmax").weights[0].numpy()
    np.testing.assert_allclose(mine, weights_of_grad_cam(case, "ScoreCAM"), atol=1e-6)


@pytest.mark.parametrize("head", ["pooled", "curved"])
def test_ablationcam_is_grad_cams_before_its_division(head: str) -> None:
    case = make(head)
    y = case.score_of_image(case.image)
    mine = ours("ablationcam", case).weights[0].numpy()
    theirs = weights_of_grad_cam(case, "AblationCAM")
    np.testing.assert_allclose(mine / y, theirs, rtol=1e-4, atol=1e-5)


def test_eigencam_is_grad_cams_where_channels_have_no_mean() -> None:
    torch.manual_seed(5)
    conv = nn.Conv2d(3, CHANNELS, 3, padding=1, stride=3)
    case = with_trunk(conv, nn.InstanceNorm2d(CHANNELS))  # channels without a mean
    peer, A, G = grad_cam(case, "EigenCAM")
    theirs = peer.get_cam_image(None, None, None, A, G, False)[0]
    mine = (ours("eigencam", case).weights[0].numpy()[:, None, None] * A[0]).sum(0)
    sign = np.sign((mine * theirs).sum())
    np.testing.assert_allclose(mine, sign * theirs, atol=1e-5)


def test_lime_is_captums_with_the_same_samples_and_a_ridge() -> None:
    captum = pytest.importorskip("captum.attr")
    from captum._utils.models.linear_model import SkLearnRidge

    case = make("curved", "triplets")
    samples, kernel = 80, 0.4
    labels = zoo_perturbation.grid_labels(SIZE, 9)
    count = int(labels.max()) + 1
    present = torch.randint(2, (samples, count), generator=torch.Generator().manual_seed(0))
    present[0] = 1
    drawn = iter(present.double())

    def similarity(original: Tensor, perturbed: Tensor, vector: Tensor, **_: Any) -> float:
        cosine = zoo_perturbation.cosine_to_ones(vector[0].numpy())
        return float(np.exp(-((1 - cosine) ** 2) / kernel**2))

    peer = captum.Lime(
        lambda images: torch.stack([case.score(z) for z in case.module(images).detach()]),
        interpretable_model=SkLearnRidge(alpha=1.0),
        similarity_func=similarity,
        perturb_func=lambda original, **_: next(drawn)[None],
    )
    theirs = peer.attribute(
        case.image[None],
        baselines=0.0,
        feature_mask=torch.from_numpy(labels)[None, None],
        n_samples=samples,
    )[0, 0].numpy()
    mine = own_map("lime", case, samples=samples, superpixels="grid", segments=9, kernel=kernel)
    assert mine.max() > 0
    np.testing.assert_allclose(mine, np.maximum(theirs, 0), atol=1e-5 * mine.max())


KINDS: list[dict[str, Any]] = [
    {"head": "curved", "target": "triplets", "seed": 2},
    {"head": "curved", "target": "triplets", "signed": True},
    {"head": "pooled", "target": "triplets", "signed": True, "normalize": False, "seed": 3},
]


def resized(maps: Tensor) -> Tensor:
    return F.interpolate(maps[:, None], SIZE, mode="bilinear", align_corners=False)


def scores_of(case: Case, pictures: Tensor) -> Tensor:
    return torch.tensor([case.score_of_image(one) for one in pictures], dtype=torch.float64)


def group_program(case: Case, groups: int) -> Tensor:
    """The authors' later Group-CAM before its last min-max; `groups` divide K."""
    activations, gradients = case.gradient(case.image)
    parts = torch.from_numpy(gradients).mean((1, 2))[:, None, None] * torch.from_numpy(activations)
    drawn = resized(torch.stack([chunk.sum(0) for chunk in parts.chunk(groups)]).relu())
    low, high = drawn.amin((-2, -1), keepdim=True), drawn.amax((-2, -1), keepdim=True)
    masks = (drawn - low) / (high - low)
    dim = torch.from_numpy(zoo_clustering.blur(case.image.numpy()))
    gain = scores_of(case, case.image * masks + dim * (1 - masks)) - scores_of(case, dim[None])
    return (gain.relu()[:, None, None] * drawn[:, 0]).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_group_cam_without_the_cut_is_the_later_program(kind: dict[str, Any]) -> None:
    case = zoo_cases.make(**kind)
    theirs = group_program(case, 3)
    assert theirs.any()
    found = resized(ours("groupcam", case, groups=3, percentile=None).maps)[0, 0]
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-15)


def test_a_flat_group_is_nan_in_the_later_program_and_nothing_here() -> None:
    case = zoo_cases.make("curved", "triplets")
    with torch.no_grad():  # one chunk of two channels is dead
        case.module.features[3].weight[:2] = 0
        case.module.features[3].bias[:2] = -1
    assert group_program(case, 3).isnan().any()
    found = ours("groupcam", case, groups=3, percentile=None)
    assert found.maps.isfinite().all()
    assert not found.weights[0, :2].any()


def poly_program(drawn: Tensor, coarse: Tensor) -> Tensor:
    """The authors' step from one layer to the next finer one."""

    def to(maps: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)

    around = to(to(drawn, coarse), drawn).clamp(min=1e-12)
    return drawn / around * to(coarse, drawn)


def test_poly_cams_sharpening_is_the_authors_where_the_resized_map_is_not_zero() -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, 12, 18, generator=draw, dtype=torch.float64) + 0.1
    coarse = torch.rand(2, 4, 6, generator=draw, dtype=torch.float64)
    theirs = poly_program(drawn[:, None], coarse[:, None])[:, 0]
    torch.testing.assert_close(sharpen(drawn, coarse), theirs)
