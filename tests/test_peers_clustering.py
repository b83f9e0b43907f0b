"""Group-, Cluster-, Cosine- and Poly-CAM beside what their published programs compute.

No library among grad-cam, torchcam and captum has these methods. Their authors' programs are told
here in literal form, for a target in place of the softmax: equal where they implement the formula;
where they do not, a test says by what they differ.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo_cases
import zoo_clustering as zoo
from torch import Tensor
from zoo_cases import Case

from embedcam.methods import MethodOutput
from embedcam.ops import sharpen

pytestmark = pytest.mark.peers

KINDS: list[dict[str, Any]] = [
    {"head": "curved", "target": "triplets", "seed": 2},
    {"head": "curved", "target": "triplets", "signed": True},
    {"head": "pooled", "target": "triplets", "signed": True, "normalize": False, "seed": 3},
]


def of(name: str, case: Case, **options: Any) -> MethodOutput:
    return zoo_cases.run(case, name, **options)[0]


def upsampled(maps: Tensor | None) -> Tensor:
    assert maps is not None
    return F.interpolate(maps[:, None], zoo_cases.SIZE, mode="bilinear", align_corners=False)[0, 0]


def scores(case: Case, pictures: Tensor) -> Tensor:
    return torch.tensor([case.score_of_image(one) for one in pictures], dtype=torch.float64)


def group_program(case: Case, groups: int, *, first: bool) -> Tensor:
    """The authors' Group-CAM before its last min-max, all groups at once as they have it.

    Args:
        case: the case.
        groups: a divisor of the channels.
        first: the first program: a cut at the 70th percentile, masks weighted in place of the
            maps and one ReLU at the end; else the later one, without a cut.
    """
    activations, gradients = case.gradient(case.image)
    parts = torch.from_numpy(gradients).mean((1, 2))[:, None, None] * torch.from_numpy(activations)
    drawn = torch.stack([chunk.sum(0) for chunk in parts.chunk(groups)]).relu()
    if first:
        limits = [float(np.percentile(one.numpy(), 70)) for one in drawn]
        drawn = torch.stack([one * (one > q) for one, q in zip(drawn, limits, strict=True)])
    drawn = F.interpolate(drawn[:, None], zoo_cases.SIZE, mode="bilinear", align_corners=False)
    low, high = drawn.amin((-2, -1), keepdim=True), drawn.amax((-2, -1), keepdim=True)
    masks = (drawn - low) / (high - low)
    if first:  # it leaves out flat groups
        masks = masks.nan_to_num(0)
    dim = torch.from_numpy(zoo.blur(case.image.numpy()))
    gain = scores(case, case.image * masks + dim * (1 - masks)) - scores(case, dim[None])
    if first:
        return (gain[:, None, None] * masks[:, 0]).sum(0).relu()
    return (gain.relu()[:, None, None] * drawn[:, 0]).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_group_cam_without_the_cut_is_the_later_program(kind: dict[str, Any]) -> None:
    case = zoo_cases.make(**kind)
    theirs = group_program(case, 3, first=False)
    assert theirs.any()
    ours = upsampled(of("groupcam", case, groups=3, percentile=None).maps)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_a_flat_group_is_nan_in_the_later_program_and_nothing_here() -> None:
    case = zoo_cases.make("curved", "triplets")
    with torch.no_grad():  # one chunk of two channels is dead
        case.module.features[3].weight[:2] = 0
        case.module.features[3].bias[:2] = -1
    assert group_program(case, 3, first=False).isnan().any()
    found = of("groupcam", case, groups=3, percentile=None)
    assert found.maps is not None
    assert found.weights is not None
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
    torch.testing.assert_close(
        sharpen(drawn, coarse), poly_program(drawn[:, None], coarse[:, None])[:, 0]
    )
