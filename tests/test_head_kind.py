"""Pooled or not, affine or not: found numerically, so tried on heads of every kind."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    v = torch.randn(3, D, generator=generator)
    b = 10 * torch.randn(D, generator=generator)
    norm = nn.BatchNorm1d(K).eval()
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    near = torch.eye(K)
    near[0, 1] = 0.01
    return {
        "mean": (mean, True, True, True),
        "mean, constant": (lambda a: mean(a) + 3, True, True, True),
        "linear": (lambda a: F.linear(mean(a), w), True, True, False),
        "linear, bias": (lambda a: F.linear(mean(a), w, b), True, True, False),
        "batch norm, two linears": (
            lambda a: F.linear(F.linear(norm(mean(a)), w, b), v), True, True, False,
        ),
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
        "max": (lambda a: a.amax((2, 3)), False, False, False),
        "mean and max": (lambda a: mean(a) + 0.01 * a.amax((2, 3)), False, False, False),
        "standard deviation": (lambda a: a.std((2, 3)), False, False, False),
        "flatten": (lambda a: a.flatten(1)[:, :7], False, False, False),
        "centre": (lambda a: a[:, :, 1:3, 1:3].mean((2, 3)), False, False, False),
        "constant": (lambda a: 0 * mean(a) + 1, False, False, False),
    }  # fmt: skip


HEADS = networks()


def parts(head: Callable[[Tensor], Tensor], **settings: object) -> EmbeddingNetwork:
    torch.manual_seed(1)
    trunk = nn.Conv2d(3, K, 4, 4).eval()
    return EmbeddingNetwork.from_parts(trunk, head, input_size=(16, 20), **settings)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 20, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", HEADS)
def test_the_kind_of_a_head(name: str) -> None:
    head, pooled, affine, identity = HEADS[name]
    kind = parts(head, normalize=False).head_kind
    assert (kind.pooled, kind.affine, kind.identity) == (pooled, affine, identity)
    assert (kind.matrix is not None) == affine
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
    made = network.head_pass(images(3))
    width = made.features.embedding.shape[1]
    cotangents = torch.randn(3, 5, width)
    expected = torch.stack([made.vjp(cotangents[:, s]).sum((2, 3)) for s in range(5)], 1)
    pooled = mean(made.features.activations)
    torch.testing.assert_close(network.pooled_vjp(pooled, cotangents), expected)
    one = network.pooled_vjp(pooled.numpy(), cotangents[:, 0].numpy())
    assert isinstance(one, np.ndarray)
    np.testing.assert_allclose(one, expected[:, 0], rtol=1e-4, atol=1e-5)


class Hooked(nn.Module):
    """A head that no one gave as a function, in a module that looks at its batch."""

    def __init__(self, fixed_batch: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, K, 4, 4)
        self.linear = nn.Linear(2 * K, D)
        self.fixed_batch = fixed_batch

    def forward(self, images: Tensor) -> Tensor:
        batch, a = len(images), self.conv(images)
        pooled = a.mean((2, 3))
        if self.fixed_batch:
            pooled = pooled.view(batch, K)  # fails for activations of another batch
        return self.linear(torch.cat([pooled, images.mean((1, 2, 3))[:, None].expand(-1, K)], 1))


def test_a_module_that_insists_on_its_batch_is_asked_with_one() -> None:
    torch.manual_seed(0)
    network = EmbeddingNetwork(Hooked(True).eval(), "conv", input_size=(16, 20))
    kind = network.head_kind
    assert kind.affine
    expected = network.module.linear.weight[:, :K].detach()
    np.testing.assert_allclose(kind.matrix, expected, rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, K, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3)) * images.mean((1, 2, 3))[:, None].exp()


def test_a_matrix_that_depends_on_the_picture_is_no_matrix() -> None:
    kind = EmbeddingNetwork(Gated().eval(), "conv", input_size=(16, 20)).head_kind
    assert (kind.pooled, kind.affine) == (True, False)


def test_pooled_heads_that_cannot_be_replayed_say_so() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, K, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(K)
    ).eval()
    # The right head as a function is replayed, a wrong one not believed.
    for head, replayed in (
        (None, False),
        (module[1:], True),
        (lambda a: mean(a), False),
        (lambda a: a[:, :, 2], False),
    ):
        network = EmbeddingNetwork(module, "0", head=head, input_size=(16, 20))
        assert network.head_kind.pooled
        assert network.pooled_replay == replayed
        if not replayed:
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
    assert parts(HEADS["L2 norm"][0]).already_normalized
    assert parts(lambda a: F.normalize(gem(a))).already_normalized
    assert not parts(HEADS["mean"][0]).already_normalized
    assert not parts(HEADS["layer norm"][0]).already_normalized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_are_told_apart_too(dtype: torch.dtype) -> None:
    trunk = nn.Conv2d(3, K, 4, 4).eval().to(dtype)
    for name, expected in (("linear, bias", True), ("GeM", False), ("ReLU, mean", False)):
        head = HEADS[name][0]
        network = EmbeddingNetwork.from_parts(
            trunk, lambda a, head=head: head(a.float()).to(dtype), input_size=(16, 20)
        )
        assert network.head_kind.pooled is expected


def test_a_network_that_the_probe_does_not_fit_asks_for_its_size() -> None:
    module = nn.Sequential(nn.Conv2d(3, K, 4, 4), nn.Flatten(), nn.Linear(K * 20, D)).eval()
    with pytest.raises(NetworkError, match=r"probe picture \[1, 3, 224, 224\].*input_size"):
        _ = EmbeddingNetwork(module, "0").head_kind
    assert not EmbeddingNetwork(module, "0", input_size=(16, 20)).head_kind.pooled
    seen = EmbeddingNetwork(module, "0")
    seen.forward(images())
    assert not seen.head_kind.pooled


def test_derivatives_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = parts(HEADS["layer norm"][0])
    p, c = torch.randn(3, K), torch.randn(3, 5, K)
    expected = network.pooled_vjp(p, c)
    monkeypatch.setattr("embedcam.network.head._CHUNK_NUMBERS", 4 * K)
    torch.testing.assert_close(network.pooled_vjp(p, c), expected)
    with pytest.raises(InputError, match=r"pooled \[2, 6\] and cotangents \[3, 5, 6\]"):
        network.pooled_vjp(torch.ones(2, K), c)
