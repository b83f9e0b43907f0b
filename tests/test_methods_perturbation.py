"""Decomposition and perturbation against their oracles, and the laws they must keep."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import zoo_perturbation as zoo
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from toys import VIT_LAYER, seeded, small_vit
from zoo_cases import CHANNELS, SIZE, WIDTH, Case, distance, make, run, run_on

from embedcam import EmbeddingNetwork
from embedcam.errors import InputError, NetworkError
from embedcam.methods import Subject, gradients, run_method
from embedcam.methods import masking as pixels
from embedcam.methods.masking import fill_like
from embedcam.recipe.registry import METHODS
from embedcam.targets import Coordinate, NegativeDistance, Similarity


@pytest.mark.parametrize(("channels", "side"), [(300, 7), (64, 14), (20, 20), (400, 11)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_truncated_decomposition_is_the_full_one(channels, side, signed, monkeypatch) -> None:
    maps = torch.randn(2, channels, side, side + 1, generator=torch.Generator().manual_seed(0))
    matrices = (maps if signed else maps.clamp(min=0)).flatten(2).mT
    found = gradients._first_direction(matrices)
    assert torch.equal(found, gradients._first_direction(matrices))
    full = torch.linalg.svd(matrices.double())[2][:, 0]
    full = full * torch.sign((matrices.double() @ full[..., None]).sum((1, 2)))[:, None]
    torch.testing.assert_close(found.double(), full, rtol=0, atol=1e-4 if signed else 1e-5)

    def gives_up(*_: Any, **__: Any) -> None:
        raise scipy.sparse.linalg.ArpackError(-9)

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", gives_up)
    torch.testing.assert_close(gradients._first_direction(matrices), found, rtol=0, atol=2e-4)


def test_decompositions_of_nothing_of_anything_and_of_any_scale() -> None:
    assert not gradients._first_direction(torch.zeros(1, 150, 150)).any()
    found = gradients._first_direction(torch.eye(150)[None])[0]
    torch.testing.assert_close(torch.linalg.vector_norm(found), torch.tensor(1.0))
    matrix = torch.rand(1, 12, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1e30):
        scaled = gradients._first_direction(matrix * scale)
        torch.testing.assert_close(scaled, gradients._first_direction(matrix))


@given(
    maps=arrays(np.float64, (2, 4, 6), elements=st.integers(-3, 3).map(float)),
    vectors=arrays(np.float64, (2, 6), elements=st.integers(-3, 3).map(float)),
)
def test_the_sign_that_comes_back_does_not_matter(maps: np.ndarray, vectors: np.ndarray) -> None:
    matrices, v = torch.from_numpy(maps), torch.from_numpy(vectors)
    drawn = (matrices @ v[..., None])[..., 0]
    first, second = gradients.oriented(v, drawn), gradients.oriented(-v, -drawn)
    shown = drawn.any(1)
    assert torch.equal(first[shown], second[shown])
    assert bool(((matrices @ first[..., None]).sum((1, 2)) >= 0).all())


def test_behind_average_pooling_the_weights_of_eigengradcam_draw_its_map() -> None:
    case = make()
    found = run(case, "eigengradcam")[0]
    drawn = (found.weights[0, :, None, None] * case.trunk(case.image)).sum(0).clamp(min=0)
    torch.testing.assert_close(drawn.detach(), found.maps[0])


class FlatChannels(nn.Module):
    """Channel 0 dead, channel 1 constant at 0.3, the others alive."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        maps = self.inside(x)
        fixed = torch.zeros_like(maps[:, :2])
        fixed[:, 1] = 0.3
        return torch.cat([fixed, maps[:, 2:]], 1)


def flat_case(head: str = "curved", dtype: torch.dtype = torch.float64) -> Case:
    case = make(head, signed=True)
    case.module.features = FlatChannels(case.module.features)
    module = case.module.to(dtype).eval()
    network = EmbeddingNetwork(module, "features")
    return Case(network, module, case.image.to(dtype), case.target, case.scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flat_channel_gets_no_weight_and_costs_no_pass(dtype: torch.dtype) -> None:
    case = flat_case(dtype=dtype)
    for options in ({}, {"weights": "softmax"}):
        output, subject = run(case, "scorecam", **options)
        weights = output.weights
        assert weights[0, :2].tolist() == [0, 0]
        assert bool((weights[0, 2:] != 0).all())
        assert subject.passes.forwards == CHANNELS - 2 + 2
        if options:
            assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("head", ["pooled", "curved"])
def test_a_dead_channel_is_not_ablated(head: str) -> None:
    case = flat_case(head)
    output, subject = run(case, "ablationcam")
    assert output.weights[0, 0] == 0
    assert bool((output.weights[0, 1:] != 0).all())
    assert subject.passes.heads == (0 if head == "pooled" else CHANNELS - 1)
    # The trunk runs once more beside the one piece of activations.
    assert subject.passes.forwards == (1 if head == "pooled" else 2)
    assert distance(zoo.ablationcam(case), output) < 1e-9


def test_ablation_does_not_flip_where_the_score_is_not_positive() -> None:
    # -|f - r|^2 = 2 f . r - 2 is never positive: the paper's division would turn its map around.
    case = make("curved")
    target, cosines = NegativeDistance(case.target.reference), run(case, "ablationcam")[0].weights
    distances = run_on(case.network, case.image[None], target, "ablationcam")[0].weights
    torch.testing.assert_close(distances, 2 * cosines)


class Unsteady(nn.Module):
    """z = p / |p|: NaN where nothing is left; `limit`: infinity where p is short."""

    def __init__(self, limit: float, alive: int) -> None:
        super().__init__()
        self.features, self.limit = nn.Conv2d(3, 3, 1, bias=False), limit
        self.features.weight.data[:alive] = 1
        self.features.weight.data[alive:] = 0

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).abs().mean((-2, -1))
        z = pooled / pooled.norm(dim=1, keepdim=True)
        return z / (pooled.amin(1, keepdim=True) > self.limit) if self.limit else z


def unsteady(limit: float = 0.0, alive: int = 3) -> tuple[EmbeddingNetwork, Tensor]:
    module = Unsteady(limit, alive).double().eval()
    image = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    return EmbeddingNetwork(module, "features"), image


def test_a_head_that_makes_nan_of_nothing_says_nothing_there() -> None:
    network, image = unsteady(alive=1)
    # The target at nothing is not 0: -|0 - r|^2 = -1, and y = -2 + 2 r_0.
    reference = np.array([0.6, 0.8, 0.0])
    found = run_on(network, image, NegativeDistance(reference), "ablationcam")[0].weights
    np.testing.assert_allclose(found, [[-2 + 2 * 0.6 + 1, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("kind", [torch.inf, torch.nan])
def test_an_ablated_embedding_that_is_not_finite_is_refused(kind: float) -> None:
    network, image = unsteady(limit=1e-3)
    network.forward(image)  # whole, it can be embedded
    if kind is torch.nan:
        network.module.register_forward_hook(lambda *a: a[2] * torch.where(a[2] > 1e9, kind, 1.0))
    said = r"embeddings without channels 0, 1, 2 of the image at position 0 hold NaN or infinity; c"
    with pytest.raises(NetworkError, match=said):
        run_on(network, image, Similarity([1.0, 0.0, 0.0]), "ablationcam")[0]


def literal_drops(score: Callable[[Tensor], Tensor], maps: Tensor) -> list[float]:
    """y - y_k of activations `[1 K ...]`, one channel after another set to 0."""
    drops = []
    for k in range(maps.shape[1]):
        without = maps.clone()
        without[:, k] = 0
        with torch.no_grad():
            drops.append(float(score(maps) - score(without)))
    return drops


@pytest.mark.parametrize("plain", [True, False])
def test_a_head_given_as_a_function_needs_no_trunk(plain: bool) -> None:
    case, seen = make("curved", "triplets", signed=True), []

    def trunk(x: Tensor) -> Any:
        seen.append(len(x))
        return case.module.features(x) if plain else (case.module.features(x), "more")

    def head(made: Any) -> Tensor:
        return case.module.head(made if plain else made[0])

    network = EmbeddingNetwork.from_parts(trunk, head, module=case.module)
    assert not network.head_kind.affine
    with Subject(network, case.image[None], case.target) as subject:
        assert subject.activations.shape == (1, CHANNELS, 4, 6)
        seen.clear()
        found = run_method(subject, METHODS["ablationcam"])
    assert distance(zoo.ablationcam(case), found) < 1e-9
    # What comes beside the activations is had from the trunk.
    assert seen == ([] if plain else [1])
    assert subject.passes.forwards == (1 if plain else 2)
    assert subject.passes.heads == CHANNELS


def test_a_head_given_as_a_function_gets_its_class_token_from_the_trunk() -> None:
    def trunk(x: Tensor) -> Tensor:
        patches = torch.nn.functional.avg_pool2d(x, 4).flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True) ** 2, patches], 1)

    def head(tokens: Tensor) -> Tensor:
        near = (tokens[:, 1:] * tokens[:, :1]).sum(-1, keepdim=True).softmax(1)
        return tokens[:, 0] + (near * tokens[:, 1:]).sum(1)

    module = nn.Linear(1, 1).double().eval()
    network = EmbeddingNetwork.from_parts(trunk, head, module=module, normalize=False)
    image = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    found = run_on(network, image, Coordinate(1), "ablationcam")[0].weights
    assert network.layout == "btk"
    tokens = trunk(image)

    def score(patches: Tensor) -> Tensor:
        return head(torch.cat([tokens[:, :1], patches.mT], 1))[0, 1]

    np.testing.assert_allclose(found[0], literal_drops(score, tokens[:, 1:].mT))


@pytest.mark.parametrize(("pieces", "numbers"), [(1, 1 << 24), (3, 2 * CHANNELS * 24), (6, 1)])
def test_ablated_activations_are_cut_by_their_size(pieces, numbers, monkeypatch) -> None:
    monkeypatch.setattr("embedcam.methods.masking._AT_ONCE", numbers)
    case = make("curved", "triplets", signed=True)
    assert case.network.head_kind is not None
    seen: list[int] = []
    case.module.features.register_forward_hook(lambda *a: seen.append(len(a[2])))
    for batch_size in (1, 100):
        seen.clear()
        found, subject = run(case, "ablationcam", batch_size=batch_size)
        # Every run of the trunk is counted, and the size of a batch adds none.
        assert seen == [1] * (1 + pieces)
        assert subject.passes.forwards == 1 + pieces
        assert distance(zoo.ablationcam(case), found) < 1e-9


def test_where_pictures_are_repeated_they_are_at_most_a_batch() -> None:
    class Mixed(nn.Module):
        """The head looks at the picture, so that trunk and head must see as many."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            grey = x.mean(1).view(len(x), 1, *SIZE)
            maps = torch.stack([a * g for a, g in zip(self.features(x), grey, strict=True)])
            return self.head(maps.pow(3).mean((-2, -1)))

    module = Mixed().double().eval()
    network, seen = EmbeddingNetwork(module, "features"), []
    image = torch.rand(1, 3, *SIZE, dtype=torch.float64)
    network.forward(image)  # so that it knows the size
    maps = module.features(image)
    network.head_kind  # noqa: B018
    module.features.register_forward_hook(lambda *a: seen.append(len(a[2])))
    output, subject = run_on(network, image, Coordinate(0), "ablationcam", batch_size=2)
    assert seen == [1, 1, 2, 2, 1]
    assert subject.passes.forwards == sum(seen)

    def score(maps: Tensor) -> Tensor:
        z = module.head((maps * image.mean(1, keepdim=True)).pow(3).mean((-2, -1)))[0]
        return (z / z.norm())[0]

    np.testing.assert_allclose(output.weights[0], literal_drops(score, maps), atol=1e-12)


def test_ablation_refuses_patch_tokens_that_reach_nothing() -> None:
    network = EmbeddingNetwork(seeded(small_vit), "encoder.ln")
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NetworkError, match=rf"patch tokens of layer 'encoder.ln' .*{VIT_LAYER}"):
        run_on(network, pictures, Coordinate(0), "ablationcam")


def test_a_network_that_the_probe_does_not_fit_is_ablated_through_its_head() -> None:
    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert x.min() >= 0  # the probe picture has negative numbers
            return self.head(self.features(x).mean((-2, -1)))

    module = Grey().double().eval()
    network = EmbeddingNetwork(module, "features")
    image = torch.rand(1, 1, 8, 9, dtype=torch.float64)
    output, subject = run_on(network, image, Coordinate(0), "ablationcam")
    assert subject.passes.heads == 4

    def score(maps: Tensor) -> Tensor:
        z = module.head(maps.mean((-2, -1)))[0]
        return (z / z.norm())[0]

    expected = literal_drops(score, module.features(image))
    np.testing.assert_allclose(output.weights[0], expected, atol=1e-12)


@pytest.mark.parametrize("name", ["eigencam", "ablationcam"])
def test_over_positions(name: str) -> None:
    features = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(10, WIDTH))
    module = nn.Sequential(features, *head).double().eval()
    network = EmbeddingNetwork(module, "0", layout="bkl", normalize=False)
    signals = torch.randn(2, 2, 9, dtype=torch.float64)
    found = run_on(network, signals, Coordinate(2), name)[0].weights
    maps = module[0](signals).detach()
    for row in range(2):
        if name == "eigencam":
            expected = zoo.first_vector(maps[row].T.numpy())
        else:
            expected = literal_drops(lambda kept: module[1:](kept)[0, 2], maps[row : row + 1])
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-12)


def test_masked_pictures_go_at_most_a_batch_at_a_time() -> None:
    case = make("curved", signed=True)
    sizes: list[int] = []
    case.network.forward(case.image[None])  # looks once at how the module runs
    case.module.features.register_forward_hook(lambda *a: sizes.append(len(a[2])))
    run(case, "scorecam", batch_size=4)
    run(case, "rise", masks=10, batch_size=4)
    assert sizes == [1, 4, 2, 1, 1, 4, 4, 2]


def test_superpixels_are_a_grid_or_given() -> None:
    image = torch.zeros(3, 4, 6)
    labels = pixels.superpixels_of(image, "grid", 6)
    assert labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert int(pixels.superpixels_of(image, "grid", 1000).max()) == 23
    named = pixels.superpixels_of(image, torch.tensor([[5] * 6, [5] * 6, [9] * 6, [7] * 6]), 2)
    assert named[:, 0].tolist() == [0, 0, 2, 1]


def test_slic_follows_the_picture() -> None:
    pytest.importorskip("skimage")
    image = torch.zeros(3, 20, 30, dtype=torch.float64)
    image[:, :, 15:] = 1.0
    labels = pixels.superpixels_of(image, "slic", 6)
    assert not set(labels[:, :13].unique().tolist()) & set(labels[:, 17:].unique().tolist())
    assert int(labels.max()) + 1 == len(labels.unique())
    case = make("curved", "triplets")
    options: dict[str, Any] = {"samples": 60, "superpixels": "slic", "segments": 12}
    assert distance(zoo.lime(case, **options), run(case, "lime", **options)[0]) < 1e-9
    assert pixels.superpixels_of(image[:1], "slic", 6).shape == (20, 30)


def test_slic_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    case = make()
    with pytest.raises(InputError, match=r"'slic' needs scikit-image, .*embedcam\[lime\], or .*'g"):
        run(case, "lime", superpixels="slic")
    # The default asks for nothing, and says the same with and without the library.
    missing = run(case, "lime", samples=20)[0].maps
    monkeypatch.undo()
    assert torch.equal(missing, run(case, "lime", samples=20)[0].maps)


def test_fills() -> None:
    image = torch.rand(3, 5, 6)
    colour = np.array([1.0, 2.0, 3.0])[:, None, None]
    colour.setflags(write=False)
    filled = fill_like(image, colour)
    assert filled.dtype == image.dtype
    assert filled[2, 0, 0] == 3
    assert torch.equal(filled, fill_like(image, torch.tensor(colour)))
    for number in (np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5):
        assert torch.equal(fill_like(image, number), torch.full_like(image, 0.5))
    with pytest.raises(InputError, match=r"fill has shape \[2, 9\], .* \[3, 5, 6\]; give a number"):
        fill_like(image, torch.zeros(2, 9))


NOT_FINITE = r"fill holds NaN or infinity in torch\.float32; give finite"


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (float("nan"), NOT_FINITE),
        (np.float32("inf"), NOT_FINITE),
        (1e39, NOT_FINITE),
        (np.array([[[1.0]], [[np.inf]], [[0.0]]]), NOT_FINITE),
        (torch.full((3, 5, 6), torch.nan), NOT_FINITE),
        (True, "fill = True is unknown; use mean, black, blur, a number, a tensor or an array"),
        (None, "fill = None is unknown"),
        ([0.0], r"fill = \[0.0\] is unknown"),
        (np.array(["a"]), "fill is an array of <U1, unknown to torch; give float32"),
        (1j * np.ones(3), "fill is of torch.complex128; give real numbers"),
    ],
)
def test_fills_that_are_no_finite_numbers_are_refused(fill: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fill_like(torch.rand(3, 5, 6), fill)


@pytest.mark.parametrize("shape", [(9,), (2, 9)])
def test_fills_of_what_is_no_picture(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    for fill in ("blur", "black"):
        with pytest.raises(InputError, match=rf"'{fill}' is for pictures .*; use 'mean' or a numb"):
            fill_like(image, fill, preprocess=None)
    assert not fill_like(image, "mean").any()
    assert fill_like(image, 2.0).shape == shape
    with pytest.raises(InputError, match="does not broadcast") as caught:
        fill_like(image, torch.zeros(4, 4, 4, 4))
    advised = str(caught.value).rpartition("such as ")[2]
    assert fill_like(image, torch.ones(eval(advised))).shape == shape
