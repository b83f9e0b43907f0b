"""Group-CAM, Cluster-CAM, Cosine-CAM and Poly-CAM against their oracles."""

from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
import zoo_clustering as zoo
from oracles import bilinear, cam
from torch import nn
from zoo_cases import Case, Expected

from embedcam import METHODS, EmbeddingNetwork
from embedcam.errors import NetworkError
from embedcam.methods import MethodOutput, Subject
from embedcam.methods.grouping import _cut, clustered, contiguous
from embedcam.ops import sharpen
from embedcam.targets import Direction, Similarity

NAMES = sorted(zoo.ORACLES)
CASES: list[dict[str, Any]] = [
    {"head": "pooled", "target": "similarity", "seed": 1},
    {"head": "pooled", "target": "dot", "signed": True, "normalize": False, "seed": 1},
    {"head": "pooled", "target": "triplets", "seed": 2},
    {"head": "curved", "target": "similarity", "signed": True},
    {"head": "curved", "target": "dot", "normalize": False},
    {"head": "curved", "target": "triplets"},
    {"head": "curved", "target": "triplets", "signed": True, "normalize": False, "seed": 1},
]
RICH: dict[str, Any] = {"head": "curved", "target": "triplets"}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("groupcam", {"groups": groups, "clustering": clustering})
        for groups in (1, 3, 4)
        for clustering in ("contiguous", "kmeans", "agglomerative")
    ),
    ("groupcam", {"groups": 4, "percentile": None}),
    ("groupcam", {"groups": 2, "percentile": 0}),
    ("groupcam", {"groups": 3, "percentile": 33.3}),
    *(
        ("clustercam", {"n_clusters": n, "clustering": clustering, "view": view})
        for n in (2, 3, 5)
        for clustering in ("kmeans", "spectral")
        for view in ("base", "scissors", "difference")
    ),
    *(
        ("clustercam", {"n_clusters": 3, "weighing": "scored", "view": view})
        for view in ("base", "scissors", "difference")
    ),
    *(("cosinecam", {"n_clusters": n}) for n in (1, 2, 3, 5)),
    *(("polycam", {"variant": variant}) for variant in ("plus", "minus", "both")),
    ("polycam", {"layers": ("features.1", "features.2", "features")}),
    ("polycam", {"layers": ("features",)}),
    ("polycam", {"baseline": False}),
]


def made(
    name: str, network: EmbeddingNetwork, images: Any, target: Any, options: Any = None, **own: Any
) -> tuple[MethodOutput, Subject]:
    return zoo_cases.run_on(network, images, target, name, **{**(options or {}), **own})


def of(name: str, case: Case, **options: Any) -> MethodOutput:
    return made(name, case.network, case.image[None], case.target, options)[0]


def parts_of(found: MethodOutput, row: int = 0) -> list[np.ndarray]:
    assert found.maps is not None
    assert (found.maps >= 0).all()
    kept = [] if found.weights is None else [found.weights]
    kept += [found.maps, *(found.layers or {}).values()]
    return [one[row].numpy() for one in kept]


def expected_parts(expected: Expected) -> list[np.ndarray]:
    kept = [] if expected.weights is None else [expected.weights]
    assert expected.map is not None
    return [*kept, expected.map, *(expected.layers[name] for name in sorted(expected.layers)[::-1])]


def agree(found: MethodOutput, expected: Expected, tolerance: float = 1e-9) -> bool:
    ours = [*parts_of(found)]
    if found.layers:
        ours = [ours[0], *(found.layers[name][0].numpy() for name in sorted(found.layers)[::-1])]
    theirs = expected_parts(expected)
    assert len(ours) == len(theirs)
    return all(
        np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-15
        for a, b in zip(ours, theirs, strict=True)
    )


# --- the formulas ---


@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_oracle(name: str) -> None:
    drawn = 0
    for kind in CASES:
        case = zoo_cases.make(**kind)
        expected = zoo.ORACLES[name](case)
        assert expected.map is not None
        drawn += bool(expected.map.any())
        assert agree(of(name, case), expected), kind
    assert drawn >= 5


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_each_is_its_oracle_with_every_option(name: str, options: dict[str, Any]) -> None:
    drawn = False
    for kind in (RICH, CASES[1]):
        case = zoo_cases.make(**kind)
        expected = zoo.ORACLES[name](case, **options)
        assert expected.map is not None
        drawn |= bool(expected.map.any())
        assert agree(of(name, case, **options), expected), kind
    assert drawn


@pytest.mark.parametrize(
    ("name", "options", "broken"),
    [
        ("groupcam", {}, {"bend": lambda gain: gain}),
        ("groupcam", {}, {"percentile": None}),
        ("groupcam", {"groups": 3}, {"groups": 2}),
        ("groupcam", {"groups": 3, "clustering": "kmeans"}, {"clustering": "contiguous"}),
        ("clustercam", {}, {"scale": lambda drawn: drawn}),
        ("clustercam", {}, {"view": "base"}),
        ("clustercam", {"n_clusters": 3}, {"n_clusters": 2}),
        ("cosinecam", {"n_clusters": 3}, {"n_clusters": 2}),
        ("polycam", {}, {"local": False}),
        ("polycam", {}, {"variant": "plus"}),
        ("polycam", {}, {"baseline": False}),
        ("polycam", {}, {"fill": 1.0}),
    ],
)
def test_an_oracle_broken_on_purpose_disagrees(
    name: str, options: dict[str, Any], broken: dict[str, Any]
) -> None:
    case = zoo_cases.make(**RICH)
    if "bend" in broken:  # some groups must speak against the target
        case = zoo_cases.make("pooled", "similarity", signed=True, seed=2)
    found = of(name, case, **options)
    assert agree(found, zoo.ORACLES[name](case, **options))
    assert not agree(found, zoo.ORACLES[name](case, **{**options, **broken}), 1e-3)


def test_an_oracle_whose_steps_are_broken_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_cases.make(**RICH)
    of_cosine, of_group = of("cosinecam", case), of("groupcam", case)
    with monkeypatch.context() as changed:
        changed.setattr(zoo, "unit_gains", lambda case, means: [1.0] * len(means))
        assert not agree(of_cosine, zoo.cosinecam(case), 1e-3)
    with monkeypatch.context() as changed:
        changed.setattr(zoo, "blur", lambda image: 0 * image)
        assert not agree(of_cosine, zoo.cosinecam(case), 1e-3)
        assert not agree(of_group, zoo.groupcam(case), 1e-3)
    with monkeypatch.context() as changed:
        whole = zoo.min_max
        changed.setattr(zoo, "min_max", lambda drawn: 1 - whole(drawn))
        for name in NAMES:
            assert not agree(of(name, case), zoo.ORACLES[name](case), 1e-3)


@pytest.mark.parametrize("name", ["clustercam", "polycam"])
def test_the_fill_is_the_subjects(name: str) -> None:
    case = zoo_cases.make(**RICH)
    found, _ = made(name, case.network, case.image[None], case.target, fill=0.7)
    assert agree(found, zoo.ORACLES[name](case, fill=0.7))


@pytest.mark.parametrize("percentile", [0, 12.5, 33.3, 50, 70, 90, 99.9])
def test_the_cut_is_that_of_numpys_percentile(percentile: float) -> None:
    draw = np.random.default_rng(3)
    for shape in ((3, 1, 1), (4, 5, 2), (3, 7, 7), (2, 3, 11)):
        for maps in (draw.random(shape), draw.integers(0, 4, shape).astype(float)):
            expected = [zoo.percentile_cut(one, percentile) for one in maps]
            np.testing.assert_array_equal(_cut(torch.from_numpy(maps), percentile), expected)


def test_the_weight_form_of_cosine_cam_draws_its_very_map() -> None:
    for kind in CASES:
        case = zoo_cases.make(**kind)
        weights, drawn = parts_of(of("cosinecam", case, n_clusters=3))
        activations = case.trunk(case.image).detach().numpy()
        np.testing.assert_allclose(cam(weights, activations), drawn, rtol=1e-9, atol=1e-15)


def test_the_weight_form_of_group_cam_lacks_the_inner_relu_and_the_cut_only() -> None:
    case = zoo_cases.make(**RICH)  # activations >= 0
    activations = case.trunk(case.image).detach().numpy()
    weights, drawn = parts_of(of("groupcam", case, percentile=None))
    kept = np.where(weights > 0, weights, 0)  # groups of one channel: ReLU drops those below 0
    np.testing.assert_allclose(cam(kept, activations), drawn, rtol=1e-9, atol=1e-15)
    _, cut = parts_of(of("groupcam", case))
    assert (cut <= drawn + 1e-15).all()
    assert (cut < drawn - 1e-9).any()


def test_the_weight_form_of_cluster_cam_lacks_the_offset_only() -> None:
    for kind in CASES:
        case = zoo_cases.make(**kind)
        weights, drawn = parts_of(of("clustercam", case, view="base"))
        activations = case.trunk(case.image).detach().numpy()
        offset = drawn - np.tensordot(weights, activations, 1)
        np.testing.assert_allclose(offset, offset[0, 0], rtol=1e-9, atol=1e-12)
        assert drawn.min() == 0
        assert drawn.max() == pytest.approx(1)


# --- several images, any batch size, any precision ---


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_means_what_one_at_a_time_means_whatever_its_size(name: str) -> None:
    case = zoo_cases.make(**RICH)
    images = torch.stack([case.image, case.image.flip(-1), 0.5 * case.image + 0.2])
    few: dict[str, Any] = {} if name == "polycam" else {"n_clusters": 3}
    few = {"groups": 3, "clustering": "kmeans"} if name == "groupcam" else few
    together, _ = made(name, case.network, images, case.target, few, batch_size=4)
    for row, image in enumerate(images):
        for size in (1, 7, 100):
            alone, _ = made(name, case.network, image[None], case.target, few, batch_size=size)
            for a, b in zip(parts_of(together, row), parts_of(alone), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_means_nearly_the_same(name: str) -> None:
    case = zoo_cases.make(**RICH)
    exact = parts_of(of(name, case))
    case.module.float()
    network = EmbeddingNetwork(case.module, "features")
    rough, _ = made(name, network, case.image[None].float(), case.target)
    assert rough.maps is not None
    assert rough.maps.dtype == torch.float32
    for a, b in zip(parts_of(rough), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01, atol=3e-3 * np.abs(b).max())
    case.module.bfloat16()
    network = EmbeddingNetwork(case.module, "features")
    rougher, _ = made(name, network, case.image[None].bfloat16(), case.target)
    assert all(np.isfinite(one).all() for one in parts_of(rougher))


def test_passes_are_counted_and_flat_groups_cost_nothing() -> None:
    case = zoo_cases.make(**RICH)
    activations = case.trunk(case.image)
    alive = int((activations.amax((-2, -1)) > activations.amin((-2, -1))).sum())
    spent = {
        name: made(name, case.network, case.image[None], case.target)[1].passes for name in NAMES
    }
    assert spent["cosinecam"].forwards == 2 + alive
    assert spent["cosinecam"].head_backwards == 1
    assert spent["clustercam"].forwards == 1 + alive
    assert spent["clustercam"].head_backwards == 0
    assert spent["groupcam"].forwards <= 2 + alive
    first = zoo.layer_output(case, "features.1")
    first_alive = sum(not zoo.is_flat(one) for one in first)
    assert spent["polycam"].forwards == 1 + 1 + 2 * (alive + first_alive)
    assert spent["polycam"].head_backwards == 0
    black = torch.zeros_like(case.image)[None]
    with torch.no_grad():
        case.module.features[0].bias.zero_()
        case.module.features[3].bias.zero_()
    for name in NAMES:
        found, subject = made(name, case.network, black, case.target)
        # Poly-CAM asks for its baseline before it sees that every channel is flat.
        assert subject.passes.forwards == 1 + (name == "polycam")
        assert not any(one.any() for one in parts_of(found))


# --- where numbers degenerate ---


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_says_nothing_gives_zeros(name: str) -> None:
    case = zoo_cases.make(**RICH)
    found, _ = made(name, case.network, case.image[None], Direction(np.zeros(3)))
    assert not any(one.any() for one in parts_of(found))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("colour", [0.0, 2.0])
def test_a_picture_of_one_colour_is_finite(name: str, colour: float) -> None:
    for kind in CASES:
        case = zoo_cases.make(**kind)
        plain = case.with_image(torch.full_like(case.image, colour))
        assert all(np.isfinite(one).all() for one in parts_of(of(name, plain)))


SCORED: list[tuple[str, dict[str, Any]]] = [
    ("cosinecam", {}),
    ("groupcam", {}),
    *(("clustercam", {"weighing": "scored", "view": v}) for v in ("base", "scissors")),
    ("clustercam", {"weighing": "scored"}),
]


@pytest.mark.parametrize(("name", "options"), SCORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_where_nothing_can_be_gained_rounding_is_not_drawn(
    name: str, options: dict[str, Any], dtype: torch.dtype, batch_size: int
) -> None:
    for kind in CASES:
        case = zoo_cases.make(**kind)
        case.module.to(dtype)
        network = EmbeddingNetwork(case.module, "features", normalize=case.network.normalize)
        for colour in (0.1, 0.7, 2.0):
            plain = torch.full_like(case.image, colour)[None].to(dtype)
            found, _ = made(name, network, plain, case.target, options, batch_size=batch_size)
            assert not any(one.any() for one in parts_of(found)), (kind, colour)


@pytest.mark.parametrize(("name", "options"), SCORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gain_within_the_rounding_of_the_scores_is_none(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """An embedding that hardly moves: some units in the last place."""

    class Still(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.features, self.head = inside.features, inside.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.head(self.features(x))
            return 1 + z.new_tensor([1.0, 3.0, 7.0]) + 32 * torch.finfo(z.dtype).eps * z

    case = zoo_cases.make(**RICH)
    network = EmbeddingNetwork(Still(case.module).to(dtype).eval(), "features")
    for batch_size in (1, 2, 100):
        found, _ = made(
            name, network, case.image[None].to(dtype), case.target, options, batch_size=batch_size
        )
        assert not any(one.any() for one in parts_of(found))


@pytest.mark.parametrize("clustering", ["kmeans", "spectral", "agglomerative"])
def test_fewer_maps_that_differ_than_clusters_neither_warn_nor_fail(clustering: str) -> None:
    draw = torch.Generator().manual_seed(0)
    few = torch.rand(3, 4, 6, generator=draw, dtype=torch.float64)
    maps = torch.stack([few[0], 0 * few[0], few[1], few[0], few[2], 0 * few[1] + 3, few[1]])
    member = clustered(maps, 5, clustering, seed=0)
    expected = [[1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]]
    assert member.tolist() == expected
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
        ("clustercam", {"view": "scissors"}),
        ("clustercam", {"clustering": "spectral", "n_clusters": 3}),
        ("cosinecam", {}),
        ("groupcam", {"clustering": "kmeans"}),
    ):
        weights = parts_of(of(name, case, **options))[0]
        assert weights[4] == 0
        alike = weights[:3] if name == "clustercam" else gains(case, weights)[:3]
        np.testing.assert_allclose(alike, alike[0], rtol=1e-9)


def gains(case: Case, weights: np.ndarray) -> np.ndarray:
    """What a group's score gave each of its channels: the weights without Grad-CAM's."""
    _, gradient = case.gradient(case.image)
    return weights / gradient.mean((1, 2))


def test_one_group_is_base_and_scissors_at_once_and_their_difference_is_nothing() -> None:
    case = zoo_cases.make(**RICH)
    for weighing in ("equal", "scored"):
        found = of("clustercam", case, n_clusters=1, weighing=weighing)
        assert not any(one.any() for one in parts_of(found))
    assert of("clustercam", case, n_clusters=1, view="base").maps.any()  # type: ignore[union-attr]


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
    one, other = of("polycam", case, layers=names), of("polycam", case, layers=names[::-1])
    assert one.maps is not None
    assert one.maps.shape == (1, 12, 18)
    assert torch.equal(one.maps, other.maps)  # type: ignore[arg-type]
    assert one.layers is not None
    assert list(one.layers) == names
    assert [one.layers[name].shape[1] for name in names] == [5, 5, 6]
    # Where the coarse map is 0, no finer layer brings anything back.
    alone = of("polycam", case, layers=["features"]).maps
    assert alone is not None
    coarse = bilinear(alone[0].numpy(), 12, 18)
    assert (one.maps[0].numpy()[coarse == 0] == 0).all()


# --- clusters ---


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


def test_contiguous_groups_are_chunks() -> None:
    maps = torch.zeros(10, 2, 2)
    for groups in (1, 2, 3, 4, 7, 10, 32):
        chunks = torch.arange(10).chunk(groups)
        member = contiguous(maps, groups)
        assert [row.nonzero()[:, 0].tolist() for row in member] == [c.tolist() for c in chunks]


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.first(x).relu().mean(-1))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_no_pictures_are_refused(name: str) -> None:
    network = EmbeddingNetwork(Signals().eval(), "first", layout="bkl")
    title = METHODS[name].title
    with pytest.raises(
        NetworkError, match=f"{title} masks regions of a picture .* use 'ablationcam'"
    ):
        made(name, network, torch.rand(1, 2, 9), Similarity(np.ones(3)), {})
