"""Pooled or not, affine or not: found numerically, so tried on heads of every kind."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import images

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork

K, D = 6, 4


def mean(a: Tensor) -> Tensor:
    return a.mean((2, 3))


def gem(a: Tensor) -> Tensor:
    return a.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


def networks() -> dict[str, tuple[Callable[[Tensor], Tensor], bool, bool, bool]]:
    """Head, and whether it is pooled, affine, the identity."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(D, K, generator=generator)
    b = 10 * torch.randn(D, generator=generator)
    norm = nn.BatchNorm1d(K).eval()
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    near = torch.eye(K)
    near[0, 1] = 0.01
    return {
        "mean": (mean, True, True, True),
        "linear": (lambda a: F.linear(mean(a), w), True, True, False),
        "linear, bias": (lambda a: F.linear(mean(a), w, b), True, True, False),
        "batch norm, linear": (lambda a: F.linear(norm(mean(a)), w, b), True, True, False),
        "linear, then mean": (lambda a: mean(F.conv2d(a, w[:, :, None, None])), True, True, False),
        "sum": (lambda a: a.sum((2, 3)), True, True, False),
        "nearly the identity": (lambda a: F.linear(mean(a), near), True, True, False),
        "layer norm": (lambda a: F.layer_norm(mean(a), (K,)), True, False, False),
        "linear, ReLU": (lambda a: F.relu(F.linear(mean(a), w)), True, False, False),
        "hardswish": (lambda a: F.linear(F.hardswish(mean(a)), w), True, False, False),
        "saturating": (lambda a: F.linear(mean(a).clamp(-20, 20), w), True, False, False),
        "L2 norm": (lambda a: F.normalize(mean(a)), True, False, False),
        "ReLU, mean": (lambda a: mean(F.relu(a)), False, False, False),
        "in-place ReLU, mean": (lambda a: mean(a.relu_()), False, False, False),
        "GeM": (gem, False, False, False),
        "mean and max": (lambda a: mean(a) + 0.01 * a.amax((2, 3)), False, False, False),
        "flatten": (lambda a: a.flatten(1)[:, :7], False, False, False),
        "centre": (lambda a: a[:, :, 1:3, 1:3].mean((2, 3)), False, False, False),
        "constant": (lambda a: 0 * mean(a) + 1, False, False, False),
    }  # fmt: skip


HEADS = networks()


def parts(
    head: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, **settings: object
) -> EmbeddingNetwork:
    torch.manual_seed(1)
    trunk = nn.Conv2d(3, K, 4, 4).eval().to(dtype)
    return EmbeddingNetwork.from_parts(trunk, head, input_size=(16, 20), **settings)


@pytest.mark.parametrize("name", HEADS)
def test_the_kind_of_a_head(name: str) -> None:
    head, pooled, affine, identity = HEADS[name]
    kind = parts(head, normalize=False).head_kind
    assert (kind.pooled, kind.affine, kind.identity) == (pooled, affine, identity)
    assert (kind.matrix is not None) == affine
    assert (kind.normed is not None) == (name in ("layer norm", "L2 norm"))
    if kind.matrix is not None:
        # z(p) - z(0) = W p.
        p = torch.randn(3, K)
        flat = p[:, :, None, None].expand(-1, -1, 4, 5)
        moved = head(flat.clone()) - head(torch.zeros(1, K, 4, 5))
        np.testing.assert_allclose(p.numpy() @ kind.matrix.T, moved.detach(), rtol=1e-4, atol=1e-4)


def test_heads_that_a_shift_makes_another() -> None:
    mix = torch.randn(K, K, 3, 3, generator=torch.Generator().manual_seed(4))
    deep = torch.randn(K, 1, 4, 5, generator=torch.Generator().manual_seed(5))
    heads = {name: head for name, (head, *_) in HEADS.items() if name != "constant"} | {
        "depthwise": lambda a: F.conv2d(a, deep, groups=K).flatten(1),
        "convolution, mean": lambda a: mean(F.conv2d(a, mix, padding=1).relu()),
    }
    placed = {name for name, head in heads.items() if parts(head).head_kind.uses_positions}
    assert placed == {"flatten", "centre", "depthwise"}


@pytest.mark.parametrize("name", [name for name, row in HEADS.items() if row[1]])
def test_the_derivative_from_pooled_vectors_is_that_of_a_head_pass(name: str) -> None:
    network = parts(HEADS[name][0], normalize=False)
    if name == "sum":  # behind a sum, a grid of one cell is another head, but affine all the same
        assert network.head_kind.affine
    assert network.pooled_replay
    made = network.head_pass(images(3, 16, 20))
    width = made.features.embedding.shape[1]
    cotangents = torch.randn(3, 5, width)
    expected = torch.stack([made.vjp(cotangents[:, s]).sum((2, 3)) for s in range(5)], 1)
    pooled = mean(made.features.activations)
    torch.testing.assert_close(network.pooled_vjp(pooled, cotangents), expected)
    one = network.pooled_vjp(pooled.numpy(), cotangents[:, 0].numpy())
    assert isinstance(one, np.ndarray)
    np.testing.assert_allclose(one, expected[:, 0], rtol=1e-4, atol=1e-5)


class Hooked(nn.Module):
    """A head that no one gave as a function, in a module that insists on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, K, 4, 4), nn.Linear(2 * K, D)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.conv(images).mean((2, 3)).view(len(images), K)
        return self.linear(torch.cat([pooled, images.mean((1, 2, 3))[:, None].expand(-1, K)], 1))


class Gated(Hooked):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3)) * images.mean((1, 2, 3))[:, None].exp()


def test_a_matrix_that_depends_on_the_picture_is_no_matrix() -> None:
    torch.manual_seed(0)
    hooked, gated = (
        EmbeddingNetwork(kind().eval(), "conv", input_size=(16, 20)) for kind in (Hooked, Gated)
    )
    expected = hooked.module.linear.weight[:, :K].detach()
    np.testing.assert_allclose(hooked.head_kind.matrix, expected, rtol=1e-4, atol=1e-5)
    assert (gated.head_kind.pooled, gated.head_kind.affine) == (True, False)


def test_pooled_heads_that_cannot_be_replayed_say_so() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(K))
    module = nn.Sequential(nn.Conv2d(3, K, 4, 4), *head).eval()
    # The right head as a function is replayed, a wrong one not believed.
    for given in (None, head, mean, lambda a: a[:, :, 2]):
        network = EmbeddingNetwork(module, "0", head=given, input_size=(16, 20))
        assert network.head_kind.pooled
        assert network.pooled_replay == (given is head)
        if given is not head:
            with pytest.raises(NetworkError, match=r"'0' is not a function of the pooled.*head_pa"):
                network.pooled_vjp(torch.ones(1, K), torch.ones(1, K))


def test_tokens_that_are_averaged_are_pooled_unless_the_class_token_counts() -> None:
    def trunk(images: Tensor) -> Tensor:
        patches = images.reshape(len(images), 3, 4, 4, 5, 4).mean((3, 5)).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def network(head: Callable[[Tensor], Tensor]) -> EmbeddingNetwork:
        return EmbeddingNetwork.from_parts(trunk, head, input_size=(16, 20), prefix_tokens=1)

    assert network(lambda t: t[:, 1:].mean(1)).head_kind.identity
    assert not network(lambda t: t.mean(1)).head_kind.pooled
    assert not network(lambda t: torch.cat([t[:, 0], t[:, 1:].mean(1)], 1)).head_kind.pooled


def test_modules_that_normalise_by_themselves_are_noticed() -> None:
    assert parts(lambda a: F.normalize(gem(a))).already_normalized
    for name in ("L2 norm", "mean", "layer norm"):
        assert parts(HEADS[name][0]).already_normalized == (name == "L2 norm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_are_told_apart_too(dtype: torch.dtype) -> None:
    for name, expected in (("linear, bias", True), ("GeM", False), ("ReLU, mean", False)):
        network = parts(lambda a, head=HEADS[name][0]: head(a.float()).to(dtype), dtype)
        assert network.head_kind.pooled is expected


def test_a_network_that_the_probe_does_not_fit_asks_for_its_size() -> None:
    module = nn.Sequential(nn.Conv2d(3, K, 4, 4), nn.Flatten(), nn.Linear(K * 20, D)).eval()
    with pytest.raises(NetworkError, match=r"probe picture \[1, 3, 224, 224\].*input_size"):
        _ = EmbeddingNetwork(module, "0").head_kind
    assert not EmbeddingNetwork(module, "0", input_size=(16, 20)).head_kind.pooled
    seen = EmbeddingNetwork(module, "0")
    seen.forward(images(2, 16, 20))
    assert not seen.head_kind.pooled


def test_derivatives_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = parts(HEADS["layer norm"][0])
    p, c = torch.randn(3, K), torch.randn(3, 5, K)
    expected = network.pooled_vjp(p, c)
    monkeypatch.setattr("embedcam.network.head._CHUNK_NUMBERS", 4 * K)
    torch.testing.assert_close(network.pooled_vjp(p, c), expected)
    with pytest.raises(InputError, match=r"pooled \[2, 6\] and cotangents \[3, 5, 6\]"):
        network.pooled_vjp(torch.ones(2, K), c)
