"""Layout "bkl": 1-D convolutions over signals, tables and words, and maps over their positions."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import gradcam_weights, gradcampp_weights_as_printed
from torch import Tensor, nn
from toys import seeded

from embedcam import EmbeddingNetwork, Similarity, TripletMargin, cam_for
from embedcam.errors import InputError, NetworkError
from embedcam.network import several_pass

L = 20
pytestmark = pytest.mark.usefixtures("same_draws")


class OneD(nn.Module):
    """Signals `[B 2 L]`, tables `[B L]` or words `[B L]` -> `[B 5 (L - 2) / 2]` -> `[B 3]`."""

    def __init__(self, kind: str, pooled: bool) -> None:
        super().__init__()
        self.kind, self.pooled = kind, pooled
        self.words = nn.Embedding(7, 2)
        self.first = nn.Conv1d(1 if kind == "tables" else 2, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Sequential(nn.Conv1d(4, 5, 2, stride=2), nn.ReLU(inplace=True))
        self.mix = nn.Conv1d(5, 5, 3, padding=1)
        self.linear = nn.Linear(5, 3)

    def fine(self, x: Tensor) -> Tensor:
        if self.kind == "words":
            x = self.words(x).transpose(1, 2)
        return self.act(self.first(x[:, None] if self.kind == "tables" else x))

    def before(self, x: Tensor) -> Tensor:
        """A `[B K L']`."""
        return self.second(self.fine(x))

    def after(self, a: Tensor) -> Tensor:
        if not self.pooled:
            a = nn.functional.softplus(self.mix(a)) ** 2
        return self.linear(a.mean(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x))


def inputs(kind: str, batch: int = 3, length: int = L) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "words":
        return torch.randint(7, (batch, length), generator=generator)
    shape = (batch, 2, length) if kind == "signals" else (batch, length)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network_of(kind: str, pooled: bool = False, **settings: Any) -> tuple[OneD, EmbeddingNetwork]:
    module = seeded(lambda: OneD(kind, pooled), seed=2).double()
    return module, EmbeddingNetwork(module, "second", layout="bkl", **settings)


KINDS = pytest.mark.parametrize("kind", ["signals", "tables", "words"])
REFERENCE = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
POSITIVES = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
NEGATIVES = torch.tensor([[0.0, 0.1, 1.0], [-1.0, 0.3, 0.2]], dtype=torch.float64)


def oracle(module: OneD, x: Tensor, method: str, triplets: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[K]` and the map `[L']` of one input `[1 ...]`, triplet by triplet."""
    scores = [lambda f: (f * REFERENCE).sum() / REFERENCE.norm() / f.norm()]
    if triplets:
        scores = [
            lambda f, p=p, n=n: ((f - n) ** 2).sum() - ((f - p) ** 2).sum()
            for p, n in zip(POSITIVES, NEGATIVES, strict=True)
        ]
    A = module.before(x).detach().requires_grad_()
    z = module.after(A.clone())[0]
    scored = [score(z / z.norm()) for score in scores]
    G = [torch.autograd.grad(y, A, retain_graph=True)[0][0, :, None] for y in scored]
    A = A.detach()[0, :, None]
    each = [gradcampp_weights_as_printed(g, A) for g in G]
    if method == "gradcam":
        each = [gradcam_weights(g) for g in G]
    weights = np.mean(each, axis=0)
    return weights, np.maximum(weights @ A[:, 0].numpy(), 0)


@KINDS
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("triplets", [True, False])
def test_maps_over_positions_are_the_formulas(kind, method, pooled, triplets) -> None:
    module, network = network_of(kind, pooled)
    x = inputs(kind)
    target = TripletMargin(POSITIVES, NEGATIVES) if triplets else Similarity(REFERENCE)
    found = cam_for(network, x, target, method)
    assert (found.cam.shape, found.grid_cam.shape) == ((3, L), (3, 9))
    strongest = 0.0
    for row in range(3):
        weights, drawn = oracle(module, x[row : row + 1], method, triplets)
        scale = np.abs(weights).max()
        np.testing.assert_allclose(found.weights[row], weights, rtol=1e-5, atol=1e-6 * scale)
        np.testing.assert_allclose(found.grid_cam[row], drawn, rtol=1e-4, atol=1e-6 * scale)
        places = (np.arange(L) + 0.5) * len(drawn) / L - 0.5  # centres aligned
        expected = np.interp(places, np.arange(len(drawn)), drawn)
        np.testing.assert_allclose(found.cam[row], expected, rtol=1e-4, atol=1e-6 * scale)
        strongest = max(strongest, drawn.max())
    assert strongest > 1e-4


@KINDS
def test_a_forward_and_its_derivative(kind: str) -> None:
    module, network = network_of(kind)
    x, c = inputs(kind), torch.randn(3, 3, dtype=torch.float64)
    features = network.forward(x)
    torch.testing.assert_close(features.activations, module.before(x)[:, :, None])
    assert network.layout == network.describe()["layout"] == "bkl"
    leaf = module.before(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(module.after(leaf.clone()), leaf, c)
    parts = EmbeddingNetwork.from_parts(module.before, module.after, module=module, layout="bkl")
    for one in (network, parts):
        torch.testing.assert_close(one.head_pass(x).vjp(c), expected[:, :, None])
    other = torch.randn(4, 5, 1, 9, dtype=torch.float64)
    z = network.head_outputs(x[:1], other)
    torch.testing.assert_close(z, module.after(other[:, :, 0]).detach())
    # Of any length, and as arrays.
    assert network.forward(inputs(kind, 2, 30).numpy()).activations.shape == (2, 5, 1, 14)


@KINDS
def test_a_pooled_head_is_found_from_what_came_first(kind: str) -> None:
    module, network = network_of(kind, pooled=True)
    with pytest.raises(InputError, match=r"no probe of its own; run forward\(\) on an input first"):
        assert network.head_kind
    with pytest.raises(InputError, match=r"run forward\(\) on an input first"):
        network.check()
    network.forward(inputs(kind))
    network.check()
    assert network.head_kind.affine
    np.testing.assert_allclose(network.head_kind.matrix, module.linear.weight.detach(), atol=1e-9)
    cam = cam_for(network, inputs(kind), Similarity(REFERENCE), "cam")
    gradcam = cam_for(network, inputs(kind), Similarity(REFERENCE), "gradcam")
    np.testing.assert_allclose(cam.cam, 9 * gradcam.cam, rtol=1e-4, atol=1e-6)
    _, bent = network_of(kind)
    bent.forward(inputs(kind))
    assert not bent.head_kind.pooled


def test_words_are_numbers_of_any_width_and_signals_of_any_precision() -> None:
    _, network = network_of("words")
    x = inputs("words")
    for dtype in (torch.int16, torch.uint8):
        assert torch.equal(network.forward(x.to(dtype)).embedding, network.forward(x).embedding)
    module, _ = network_of("signals")
    features = EmbeddingNetwork(module.float(), "second", layout="bkl").forward(inputs("signals"))
    assert features.activations.dtype == torch.float32


@KINDS
def test_methods_of_several_layers_and_positions(kind: str) -> None:
    module, network = network_of(kind)
    x, c = inputs(kind), torch.randn(3, 3, dtype=torch.float64)
    with several_pass(network, x, ["act", "second"]) as made:
        first, second = made.vjp(c)
    assert first.shape == (3, 4, 1, 18)
    torch.testing.assert_close(second, network.head_pass(x).vjp(c))
    leaf = module.fine(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(module.after(module.second(leaf)), leaf, c)
    torch.testing.assert_close(first, expected[:, :, None])
    for method in ("layercam", "zoomcam"):
        found = cam_for(network, x, Similarity(REFERENCE), method, layers=["act", "second"])
        assert found.cam.shape == found.grid_cam.shape == (3, L)
        assert found.cam.max() > 0.5


@pytest.mark.parametrize("kind", ["signals", "tables"])
def test_methods_that_change_their_input(kind: str) -> None:
    _, network = network_of(kind)
    x, target = inputs(kind), Similarity(REFERENCE)
    for method in ("smoothgradcam++", "integratedgradcam", "guidedbackprop", "guidedgradcam"):
        found = cam_for(network, x, target, method)
        assert found.cam.shape == (3, L)
        assert np.isfinite(found.cam).all()
        alone = cam_for(network, x[1:2], target, method)
        np.testing.assert_allclose(alone.cam[0], found.cam[1], rtol=1e-5, atol=1e-8)
    assert np.abs(cam_for(network, x, target, "guidedbackprop").cam).max() > 0
    # From a signal of zeros, one step, no baseline activations to speak of.
    steps = cam_for(network, x, target, "integratedgradcam", steps=1)
    np.testing.assert_allclose(steps.weights, cam_for(network, x, target, "gradcam").weights)


def test_words_have_neither_noise_nor_gradient() -> None:
    _, network = network_of("words")
    for method, message in (
        ("smoothgradcam++", r"adds noise to its input, .* numbers of words \(torch\.int64\)"),
        ("integratedgradcam", r"mixes its input with a baseline, .* 'gradcam'"),
        ("guidedbackprop", r"whole numbers, such as words, which have no gradient; .* 'gradcam'"),
        ("guidedgradcam", r"whole numbers, such as words"),
    ):
        with pytest.raises(InputError, match=message):
            cam_for(network, inputs("words"), Similarity(REFERENCE), method)


def test_what_does_not_fit_is_refused() -> None:
    module, network = network_of("signals")
    for bad in (torch.zeros(2, 3, 4, 5), torch.zeros(5), torch.zeros(0, 2, 9)):
        with pytest.raises(InputError, match=r"expects signals \[B C L\], tables \[B L\] or the"):
            network.forward(bad)
    with pytest.raises(InputError, match=r"the input is str; layout='bkl' expects"):
        network.forward("signal.wav")  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=r"'linear' returned \[2, 3\].*|returned a tensor"):
        EmbeddingNetwork(module, "linear", layout="bkl").forward(inputs("signals", 2))
    for settings in ({"grid": (3, 3)}, {"prefix_tokens": 1}):
        tokens = EmbeddingNetwork(module, "second", layout="bkl", **settings)  # type: ignore[arg-type]
        with pytest.raises(NetworkError, match=r"says \[B K L\], without grid= or prefix_tokens"):
            tokens.forward(inputs("signals"))
    nan = inputs("signals")
    nan[1, 0, 3] = float("nan")
    with pytest.raises(InputError, match="images at positions 1 of the batch hold NaN"):
        network.forward(nan)
