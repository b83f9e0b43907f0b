"""Group-CAM, Cluster-CAM, Cosine-CAM and Poly-CAM against their oracles."""

from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
import zoo_clustering as zoo
from oracles import bilinear, cam
from torch import nn
from zoo_cases import parts, run, run_on

from embedcam import EmbeddingNetwork
from embedcam.methods.grouping import clustered
from embedcam.ops import sharpen

KINDS: list[dict[str, Any]] = [
    {"head": "pooled", "target": "similarity", "seed": 1},
    {"head": "pooled", "target": "dot", "signed": True, "normalize": False, "seed": 1},
    {"head": "curved", "target": "triplets", "signed": True, "normalize": False, "seed": 1},
]
RICH: dict[str, Any] = {"head": "curved", "target": "triplets"}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_draw_the_map_of_cosine_cam_and_of_cluster_cam_but_for_an_offset(kind) -> None:
    case = zoo_cases.make(**kind)
    activations = case.trunk(case.image).detach().numpy()
    weights, drawn = parts(run(case, "cosinecam", n_clusters=3)[0])
    np.testing.assert_allclose(cam(weights, activations), drawn, rtol=1e-9, atol=1e-15)
    weights, drawn = parts(run(case, "clustercam", view="base")[0])
    offset = drawn - np.tensordot(weights, activations, 1)
    np.testing.assert_allclose(offset, offset[0, 0], rtol=1e-9, atol=1e-12)
    assert (drawn.min(), drawn.max()) == (0, pytest.approx(1))


def test_the_weight_form_of_group_cam_lacks_the_inner_relu_and_the_cut_only() -> None:
    case = zoo_cases.make(**RICH)  # activations >= 0
    activations = case.trunk(case.image).detach().numpy()
    weights, drawn = parts(run(case, "groupcam", percentile=None)[0])
    kept = np.where(weights > 0, weights, 0)  # groups of one channel: ReLU drops those below 0
    np.testing.assert_allclose(cam(kept, activations), drawn, rtol=1e-9, atol=1e-15)
    _, cut = parts(run(case, "groupcam")[0])
    assert (cut <= drawn + 1e-15).all()
    assert (cut < drawn - 1e-9).any()


def test_passes_are_counted_and_flat_groups_cost_nothing() -> None:
    case = zoo_cases.make(**RICH)
    activations = case.trunk(case.image)
    alive = int((activations.amax((-2, -1)) > activations.amin((-2, -1))).sum())
    spent = {name: run(case, name)[1].passes for name in zoo.ORACLES}
    assert spent["groupcam"].forwards <= 2 + alive
    first_alive = sum(not zoo.is_flat(one) for one in zoo.layer_output(case, "features.1"))
    polycam = 2 + 2 * (alive + first_alive)
    forwards = {"cosinecam": 2 + alive, "clustercam": 1 + alive, "polycam": polycam}
    for name, passes in forwards.items():
        assert spent[name].forwards == passes
        assert spent[name].head_backwards == (name == "cosinecam")
    black = torch.zeros_like(case.image)[None]
    with torch.no_grad():
        case.module.features[0].bias.zero_()
        case.module.features[3].bias.zero_()
    for name in zoo.ORACLES:
        found, subject = run(case, name, black)
        # Poly-CAM asks for its baseline before it sees that every channel is flat.
        assert subject.passes.forwards == 1 + (name == "polycam")
        assert not any(one.any() for one in parts(found))


SCORED: list[tuple[str, dict[str, Any]]] = [
    ("cosinecam", {}),
    ("groupcam", {}),
    *(("clustercam", {"weighing": "scored", "view": v}) for v in ("base", "scissors")),
    ("clustercam", {"weighing": "scored"}),
]


@pytest.mark.parametrize(("name", "options"), SCORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_where_nothing_can_be_gained_rounding_is_not_drawn(name, options, dtype, batch_size):
    for kind in KINDS:
        case = zoo_cases.make(**kind)
        case.module.to(dtype)
        network = EmbeddingNetwork(case.module, "features", normalize=case.network.normalize)
        for colour in (0.1, 0.7, 2.0):
            plain = torch.full_like(case.image, colour)[None].to(dtype)
            found, _ = run_on(network, plain, case.target, name, batch_size=batch_size, **options)
            assert not any(one.any() for one in parts(found)), (kind, colour)


@pytest.mark.parametrize(("name", "options"), SCORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gain_within_the_rounding_of_the_scores_is_none(name, options, dtype) -> None:
    class Still(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.features, self.head = inside.features, inside.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.head(self.features(x))
            return 1 + z.new_tensor([1.0, 3.0, 7.0]) + 32 * torch.finfo(z.dtype).eps * z

    case = zoo_cases.make(**RICH)
    network = EmbeddingNetwork(Still(case.module).to(dtype).eval(), "features")
    image = case.image[None].to(dtype)
    for batch_size in (1, 2, 100):
        found, _ = run_on(network, image, case.target, name, batch_size=batch_size, **options)
        assert not any(one.any() for one in parts(found))


@pytest.mark.parametrize("clustering", ["kmeans", "spectral", "agglomerative"])
def test_fewer_maps_that_differ_than_clusters_neither_warn_nor_fail(clustering: str) -> None:
    draw = torch.Generator().manual_seed(0)
    few = torch.rand(3, 4, 6, generator=draw, dtype=torch.float64)
    maps = torch.stack([few[0], 0 * few[0], few[1], few[0], few[2], 0 * few[1] + 3, few[1]])
    member = clustered(maps, 5, clustering, seed=0)
    assert member.tolist() == [[1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]]
    assert clustered(maps, 1, clustering, seed=0).tolist() == [[1, 0, 1, 1, 1, 0, 1]]
    assert clustered(0 * maps, 5, clustering, seed=0).shape == (0, 7)
    nearly = torch.cat([few + 1e-12 * torch.rand(3, 4, 6, generator=draw)] * 4)
    assert clustered(nearly, 8, clustering, seed=0).shape == (3, 12)


def test_channels_that_are_equal_share_their_weights_and_dead_ones_have_none() -> None:
    case = zoo_cases.make(**RICH)
    with torch.no_grad():
        for own in (case.module.features[3].weight, case.module.features[3].bias):
            own[1], own[2] = own[0], own[0]
        case.module.features[3].weight[4] = 0
        case.module.features[3].bias[4] = -1
    for name, options in (
        ("clustercam", {"view": "base"}),
        ("clustercam", {"clustering": "spectral", "n_clusters": 3}),
        ("cosinecam", {}),
        ("groupcam", {"clustering": "kmeans"}),
    ):
        weights = parts(run(case, name, **options)[0])[0]
        assert weights[4] == 0
        if name != "clustercam":  # what a group's score gave, without Grad-CAM's
            weights = weights / case.gradient(case.image)[1].mean((1, 2))
        np.testing.assert_allclose(weights[:3], weights[0], rtol=1e-9)


def test_one_group_is_base_and_scissors_at_once_and_their_difference_is_nothing() -> None:
    case = zoo_cases.make(**RICH)
    for weighing in ("equal", "scored"):
        found = run(case, "clustercam", n_clusters=1, weighing=weighing)[0]
        assert not any(one.any() for one in parts(found))
    assert run(case, "clustercam", n_clusters=1, view="base")[0].maps.any()


def test_where_the_resized_map_is_zero_poly_cam_is_zero_and_never_nan() -> None:
    draw = np.random.default_rng(0)
    for fine, coarse in (((12, 18), (4, 6)), ((7, 5), (3, 2)), ((4, 4), (4, 4)), ((3, 3), (6, 5))):
        R = np.maximum(draw.standard_normal(fine), 0)
        R[: fine[0] // 2] = 0
        P = np.maximum(draw.standard_normal(coarse), 0)
        found = sharpen(torch.from_numpy(R)[None], torch.from_numpy(P)[None])[0].numpy()
        np.testing.assert_allclose(found, zoo.sharpened(R, P), rtol=1e-9, atol=1e-15)
        assert np.isfinite(found).all()
    R = np.zeros((6, 6))
    R[0, 0] = 1e30  # between the places that D looks at
    R[1, 1] = 1e-30
    found = sharpen(torch.from_numpy(R)[None].float(), torch.ones(1, 2, 2))
    assert found.isfinite().all()
    assert not sharpen(torch.zeros(1, 6, 6), torch.ones(1, 2, 2)).any()


def test_poly_cam_takes_layers_in_any_order_and_says_which_weights_are_whose() -> None:
    case = zoo_cases.make(**RICH)
    names = ["features.1", "features.2", "features"]
    one, other = run(case, "polycam", layers=names)[0], run(case, "polycam", layers=names[::-1])[0]
    assert torch.equal(one.maps, other.maps)
    assert list(one.layers) == names
    assert [one.layers[name].shape[1] for name in names] == [5, 5, 6]
    # Where the coarse map is 0, no finer layer brings anything back.
    alone = run(case, "polycam", layers=["features"])[0].maps
    coarse = bilinear(alone[0].numpy(), 12, 18)
    assert (one.maps[0].numpy()[coarse == 0] == 0).all()


@pytest.mark.parametrize("clustering", ["kmeans", "spectral", "agglomerative"])
def test_clusters_of_many_channels_are_found_again_whatever_their_scale(clustering: str) -> None:
    draw = torch.Generator().manual_seed(1)
    centres = torch.rand(4, 5, 7, generator=draw, dtype=torch.float64)
    of_which = torch.randint(0, 4, (90,), generator=draw)
    of_which[:4] = torch.arange(4)
    noise = 0.02 * torch.randn(90, 5, 7, generator=draw, dtype=torch.float64)
    maps = centres[of_which] + noise
    expected = torch.nn.functional.one_hot(of_which, 4).T.double()
    for scale in (1e-9, 1.0, 1e6):
        for seed in (0, 1, 2**62):
            assert torch.equal(clustered(scale * maps, 4, clustering, seed), expected)
    assert torch.equal(clustered(maps.float(), 4, clustering, 0), expected.float())


def test_k_means_ends_where_every_channel_is_nearest_to_its_own_mean() -> None:
    draw = torch.Generator().manual_seed(2)
    maps = torch.rand(200, 3, 4, generator=draw, dtype=torch.float64)
    member = clustered(maps, 12, "kmeans", seed=5)
    assert member.sum(0).eq(1).all()
    rows = maps.flatten(1)
    means = (member / member.sum(1, keepdim=True)) @ rows
    assert torch.equal(torch.cdist(rows, means).argmin(1), member.argmax(0))
    assert torch.equal(clustered(maps, 12, "kmeans", seed=5), member)
    assert not torch.equal(clustered(maps, 12, "kmeans", seed=6), member)


def test_at_unit_length_shape_and_sign_alone_decide() -> None:
    draw = torch.Generator().manual_seed(3)
    one, two = torch.rand(2, 4, 6, generator=draw, dtype=torch.float64)
    maps = torch.stack([one, -one, 100 * one, two, -3 * one, 0.01 * two, -1e-5 * one])
    found = clustered(maps, 3, "kmeans", 0, unit=True)
    assert found.argmax(0).tolist() == [0, 1, 0, 2, 1, 2, 1]
