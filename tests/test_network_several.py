"""One run hooked at several layers, and their derivatives: `SeveralPass`."""

import pytest
import torch
from test_network import assert_same_state, relative, state_of
from torch import Tensor, nn
from torchvision import models
from toys import VIT_LAYER, by_full_autograd, images, seeded, small_vit

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork, several_pass

pytestmark = pytest.mark.usefixtures("same_draws")


class Stages(nn.Module):
    """Three stages with in-place units behind each, a branch, and a unit called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.two, self.side = nn.Conv2d(4, 5, 3, stride=2), nn.Conv2d(3, 5, 3, stride=2)
        self.three = nn.Conv2d(5, 6, 3)
        self.act = nn.ReLU(inplace=True)
        self.off, self.linear = nn.Conv2d(3, 2, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.off(x)
        side = self.side(x)
        a = self.act(self.one(x))
        b = self.two(a).relu_() + side[..., : a.shape[-2] // 2, :]
        return self.linear(self.act(self.three(b)).mean((2, 3)))


@pytest.mark.parametrize("layers", [["two"], ["three", "one"], ["side", "one", "three"]])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_layer_has_the_gradient_of_full_autograd(layers: list[str], frozen: bool) -> None:
    module, x, c = seeded(Stages).double(), images().double(), torch.randn(2, 4).double()
    expected = by_full_autograd(module, layers, x, c)
    module.requires_grad_(not frozen)
    z = module(x).detach()
    with several_pass(EmbeddingNetwork(module, "three"), x, layers) as made:
        assert made.layers == layers
        gradients = made.vjp(c)
        for name, A, G in zip(layers, made.activations, gradients, strict=True):
            torch.testing.assert_close(A, expected[name][0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(G, expected[name][1], rtol=1e-10, atol=1e-14)
            assert not A.requires_grad
            assert not G.requires_grad
        # As often as asked, linear in the cotangent.
        torch.testing.assert_close(made.vjp(-2 * c)[0], -2 * gradients[0])
        torch.testing.assert_close(made.features.norm, z.norm(dim=1))
        torch.testing.assert_close(made.features.embedding, z / z.norm(dim=1, keepdim=True))
        ran = sorted(layers, key=["side", "one", "two", "three"].index)
        assert [layers[made.depth.index(place)] for place in range(len(layers))] == ran
    with pytest.raises(InputError, match="was closed; make another"):
        made.vjp(c)


def test_a_block_and_a_layer_inside_it() -> None:
    module = seeded(lambda: models.resnet18(num_classes=4)).double()
    x, c = images(1, 64, 64).double(), torch.randn(1, 4).double()
    layers = ["layer2", "layer2.1", "layer2.0.conv1", "layer4"]
    expected = by_full_autograd(module, layers, x, c)
    with several_pass(EmbeddingNetwork(module, "layer4"), x, layers) as made:
        for name, G in zip(layers, made.vjp(c), strict=True):
            assert relative(G, expected[name][1]) < 1e-10
        assert made.depth == [2, 1, 0, 3]


def test_what_is_refused_leaves_no_hook() -> None:
    module = seeded(Stages)
    before = state_of(module)
    for layers, message in (
        ([], r"give a list of layers, such as"),
        ("three", r"give a list of layers, such as"),
        (["one", "three", "one"], r"a layer is given twice among one, three, one"),
        (["one", "act"], r"layer 'act' is called 2 times in one forward"),
        (["one", "linear"], r"'linear' returned a tensor \[2, 4\]"),
        (["off"], "'off' never reaches the embedding"),
        (["off", "one"], "'off' never reaches the embedding"),
    ):
        with pytest.raises((InputError, NetworkError), match=message):
            several_pass(EmbeddingNetwork(module, "three"), images(), layers)
        assert_same_state(before, state_of(module))
    parts = EmbeddingNetwork.from_parts(nn.Conv2d(3, 4, 1), lambda a: a.mean((2, 3)))
    assert several_pass(parts, images(), ["trunk"]).depth == [0]
    with pytest.raises(NetworkError, match="given as trunk and head, so no other layer"):
        several_pass(parts, images(), ["one"])


@pytest.mark.parametrize("kind", [None, torch.float16])
def test_patch_tokens_that_reach_nothing_are_refused(kind: torch.dtype | None) -> None:
    last, x = "encoder.layers.encoder_layer_2", images(1, 64, 64)
    network = EmbeddingNetwork(seeded(small_vit), VIT_LAYER, autocast=kind)
    said = rf"patch tokens of layer '{last}' never reach.*before its attention, '{VIT_LAYER}'"
    for layers in ([last], ["conv_proj", last], [last, VIT_LAYER]):
        with pytest.raises(NetworkError, match=said):
            several_pass(network, x, layers)
    with several_pass(network, x, ["conv_proj", VIT_LAYER]) as made:
        # Where the cotangent says nothing, zeros are the answer; else tokens are read as grids.
        assert not any(gradient.any() for gradient in made.vjp(torch.zeros(1, 10)))
        c = torch.randn(1, 10)
        gradients = made.vjp(c)
        assert [list(A.shape) for A in made.activations] == [[1, 48, 4, 4]] * 2
    full = by_full_autograd(network.module, [VIT_LAYER], x, c)[VIT_LAYER][1]
    grid = full[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert relative(gradients[1], grid) < (0.1 if kind else 1e-4)
