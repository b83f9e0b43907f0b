"""The gradient at the input: plain against autograd, guided against a rule written out by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_network import relative
from torch import Tensor, nn
from toys import images, seeded, small_vit, toy

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork, Features, input_gradient

Rectify = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.usefixtures("same_draws")


class Two(nn.Module):
    """Two rectifiers of any kind between linear maps; `a` is read again behind the first."""

    def __init__(self, rectify: Rectify, top: float = np.inf) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.linear = nn.Linear(5, 3)
        self.rectify, self.top = rectify, top

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(6 * x)
        b = self.mix(self.rectify(a) + 0.0)
        c = self.rectify(b)
        return self.linear(c.mean((2, 3)))

    def by_hand(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """Back through each map by its own adjoint; a rectifier keeps what is positive twice."""
        with torch.no_grad():
            a = self.conv(6 * x)
            b = self.mix(a.clamp(0, self.top))
            cells = b.shape[2] * b.shape[3]
            g = (cotangent @ self.linear.weight)[:, :, None, None].expand_as(b) / cells
            g = g * (g > 0) * (b > 0) * (b < self.top)
            g = F.conv_transpose2d(g, self.mix.weight, padding=1)
            g = g * (g > 0) * (a > 0) * (a < self.top)
            return 6 * F.conv_transpose2d(g, self.conv.weight, padding=1)


RECTIFIERS: dict[str, tuple[Rectify, float]] = {
    "one module called twice": (nn.ReLU(inplace=True), np.inf),
    "F.relu": (F.relu, np.inf),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), np.inf),
    "F.relu in place by position": (lambda x: F.relu(x, True), np.inf),
    "F.relu in place, result ignored": (lambda x: (F.relu(x, inplace=True), x)[1], np.inf),
    "F.relu_": (F.relu_, np.inf),
    "torch.relu": (torch.relu, np.inf),
    "torch.relu_": (torch.relu_, np.inf),
    "x.relu()": (Tensor.relu, np.inf),
    "x.relu_(), result ignored": (lambda x: (x.relu_(), x)[1], np.inf),
    "ReLU6": (nn.ReLU6(), 6.0),
    "F.relu6": (F.relu6, 6.0),
    "F.relu6 in place": (lambda x: F.relu6(x, inplace=True), 6.0),
    "hardtanh from 0": (lambda x: F.hardtanh(x, 0.0, 2.0), 2.0),
    "hardtanh in place": (lambda x: F.hardtanh(x, 0.0, 2.0, True), 2.0),
}


@pytest.mark.parametrize("kind", RECTIFIERS)
def test_every_rectifier_is_guided(kind: str) -> None:
    module = seeded(lambda: Two(*RECTIFIERS[kind])).double()
    x, c = images().double(), torch.tensor([[1.0, -0.5, 0.3], [-1.0, 0.2, 0.8]]).double()
    network = EmbeddingNetwork(module, "conv")
    features, found = input_gradient(network, x, lambda _: c)
    expected = module.by_hand(x, c)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    # The forward pass is the module's own.
    torch.testing.assert_close(features.embedding, network.forward(x).embedding)
    _, plain = input_gradient(network, x, lambda _: c, guided=False)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(plain, torch.autograd.grad(module(leaf), leaf, c)[0])
    assert relative(plain, expected) > 0.1


def test_units_that_are_not_rectifiers_are_left_alone() -> None:
    class Other(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.hardtanh(x))  # from -1: no rectifier

    module = seeded(lambda: Other(F.relu)).double()
    x, c = images().double(), torch.ones(2, 3).double()
    _, found = input_gradient(EmbeddingNetwork(module, "conv"), x, lambda _: c)
    expected = module.by_hand(x.clamp(-1, 1), c) * ((x > -1) & (x < 1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_cotangents_are_asked_for_what_the_forward_gave() -> None:
    network, x = EmbeddingNetwork(toy(), "relu"), images()
    seen: list[Features] = []
    input_gradient(network, x, lambda f: (seen.append(f), f.embedding)[1])
    (found,) = seen
    for name, expected in vars(network.head_pass(x).features).items():
        torch.testing.assert_close(getattr(found, name), expected)
        assert not getattr(found, name).requires_grad


def test_an_exception_of_the_caller_s_own_passes_and_rectifiers_outside_are_plain() -> None:
    with pytest.raises(KeyError, match="the caller's own"):
        input_gradient(EmbeddingNetwork(toy(), "relu"), images(), lambda _: {}["the caller's own"])
    leaf = torch.tensor([2.0, -1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(-F.relu(leaf).sum(), leaf)
    assert gradient.tolist() == [-1, 0]


def test_networks_without_a_rectifier_are_refused() -> None:
    network = EmbeddingNetwork(seeded(small_vit), "conv_proj")
    with pytest.raises(NetworkError, match=r"ReLU, and this network has none; .* 'gradcam'"):
        input_gradient(network, images(1, 64, 64), lambda f: f.embedding)
    _, plain = input_gradient(network, images(1, 64, 64), lambda f: f.embedding + 1, guided=False)
    assert plain.any()


def test_networks_cut_from_their_input_are_refused() -> None:
    class Cut(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    for module in (seeded(lambda: Cut(F.relu)), toy(Tensor.detach)):
        with pytest.raises(NetworkError, match=r"no gradient comes back .* detach\(\)"):
            input_gradient(EmbeddingNetwork(module, "conv"), images(), lambda f: f.embedding)


def test_inputs_that_are_no_images() -> None:
    network = EmbeddingNetwork(toy(), "relu")
    with pytest.raises(InputError, match=r"whole numbers, such as words, which have no gradient"):
        input_gradient(network, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), lambda f: f.embedding)
    found = input_gradient(network, images().numpy(), lambda f: f.embedding + 1)[1]
    same = input_gradient(network, images(), lambda f: f.embedding + 1)[1]
    torch.testing.assert_close(found, same)
