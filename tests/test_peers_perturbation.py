"""Beside grad-cam, torchcam and captum: equal where they have the formula, else what differs."""

from typing import Any

import numpy as np
import pytest
import torch
import zoo_perturbation as zoo
from torch import Tensor, nn
from zoo_cases import CHANNELS, SIZE, Case, make, run

from embedcam import EmbeddingNetwork
from embedcam.targets import Coordinate, NegativeDistance

pytestmark = pytest.mark.peers


def find(case: Case, name: str, **options: Any) -> Any:
    return run(case, name, **options)[0]


def with_trunk(features: nn.Module, head: nn.Module | None = None) -> Case:
    """A case whose trunk is another one; y is the second number of an embedding as it is."""
    case = make("curved", normalize=False)
    module = nn.Sequential()
    module.add_module("features", features)
    module.add_module("head", head or case.module.head)
    module.double().eval()
    network = EmbeddingNetwork(module, "features", normalize=False)
    return Case(network, module, case.image, Coordinate(1), [lambda f: f[1]])


def at_full_size() -> Case:
    """Activations of the picture's size: nothing is resized."""
    torch.manual_seed(3)
    return with_trunk(nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Tanh()))


class Centred(nn.Module):
    """Activations whose mean over positions is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return maps - maps.mean((-2, -1), keepdim=True)


def grad_cam(case: Case, name: str) -> tuple[Any, Tensor, np.ndarray]:
    """grad-cam's class on the case's layer, A `[1 K h w]` and G."""
    peers = pytest.importorskip("pytorch_grad_cam")
    A, G = case.gradient(case.image)
    return getattr(peers, name)(case.module, [case.module.features]), A[None], G[None]


def weights_of_grad_cam(case: Case, name: str) -> np.ndarray:
    peer, A, G = grad_cam(case, name)
    targets = [lambda z: case.score(z)]
    found: np.ndarray = peer.get_cam_weights(
        case.image[None], case.module.features, targets, np.asarray(A), G
    )
    return found[0]


def test_scorecam_by_softmax_is_grad_cams_where_nothing_is_resized() -> None:
    case = at_full_size()
    mine = find(case, "scorecam", weights="softmax").weights[0].numpy()
    np.testing.assert_allclose(mine, weights_of_grad_cam(case, "ScoreCAM"), atol=1e-6)


@pytest.mark.parametrize("head", ["pooled", "curved"])
def test_ablationcam_is_grad_cams_before_its_division(head: str) -> None:
    case = make(head)
    y = case.score_of_image(case.image)
    mine = find(case, "ablationcam").weights[0].numpy()
    theirs = weights_of_grad_cam(case, "AblationCAM")
    np.testing.assert_allclose(mine / y, theirs, rtol=1e-4, atol=1e-5)


def test_grad_cam_turns_ablationcam_around_where_the_score_is_negative() -> None:
    # A negative distance is never positive: dividing by it shows what speaks against the match.
    case = make("curved")
    reference = torch.as_tensor(case.target.reference)  # type: ignore[attr-defined]
    case.target = NegativeDistance(reference)
    case.scores = [lambda f: -((f - reference) ** 2).sum()]
    mine = find(case, "ablationcam").weights[0].numpy()
    theirs = weights_of_grad_cam(case, "AblationCAM")
    assert np.corrcoef(mine, theirs)[0, 1] == pytest.approx(-1, abs=1e-6)


def test_eigencam_is_grad_cams_where_channels_have_no_mean() -> None:
    torch.manual_seed(5)
    case = with_trunk(Centred())
    peer, A, G = grad_cam(case, "EigenCAM")
    theirs = peer.get_cam_image(None, None, None, A, G, False)[0]
    mine = (find(case, "eigencam").weights[0].numpy()[:, None, None] * A[0]).sum(0)
    sign = np.sign((mine * theirs).sum())
    np.testing.assert_allclose(mine, sign * theirs, atol=1e-5)


def test_lime_is_captums_with_the_same_samples_and_a_ridge() -> None:
    captum = pytest.importorskip("captum.attr")
    from captum._utils.models.linear_model import SkLearnRidge

    case = make("curved", "triplets")
    samples, kernel = 80, 0.4
    labels = zoo.grid_labels(SIZE, 9)
    count = int(labels.max()) + 1
    present = torch.randint(2, (samples, count), generator=torch.Generator().manual_seed(0))
    present[0] = 1
    drawn = iter(present.double())

    def similarity(original: Tensor, perturbed: Tensor, vector: Tensor, **_: Any) -> float:
        return float(np.exp(-((1 - zoo.cosine_to_ones(vector[0].numpy())) ** 2) / kernel**2))

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
    mine = (
        find(case, "lime", samples=samples, superpixels="grid", segments=9, kernel=kernel)
        .maps[0]
        .numpy()
    )
    assert mine.max() > 0
    np.testing.assert_allclose(mine, np.maximum(theirs, 0), atol=1e-5 * mine.max())
