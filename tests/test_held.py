"""Held passes: every part against a literal forward with the same held, and sums that are z."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_pairs import held_block, held_norm
from test_network import assert_same_state, state_of
from torch import Tensor, nn
from toys import VIT_LAYER, images, seeded, small_vit

from embedcam import EmbeddingNetwork
from embedcam.errors import InputError, NetworkError
from embedcam.pairs import HeldSide, PooledSide, make_receipt
from embedcam.preprocess import NORMS

K, WIDTH = 8, 5
KINDS = ("sdpa", "eager", "module")


class Block(nn.Module):
    """Patches, perhaps tokens before them, a norm, attention by one query, a perceptron, a norm."""

    def __init__(self, kind: str, prefix: int, heads: int = 2, latent: bool = False) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.patches = nn.Conv2d(3, K, 4, 4)
        self.before = nn.Parameter(torch.randn(1, prefix, K))
        self.start, self.norm, self.end = (nn.LayerNorm(K) for _ in range(3))
        self.latent = nn.Parameter(torch.randn(K)) if latent else None
        self.q, self.k, self.v, self.out = (nn.Linear(K, K) for _ in range(4))
        self.up, self.down, self.last = nn.Linear(K, 12), nn.Linear(12, K), nn.Linear(K, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.before.expand(len(x), -1, -1), x], 1)
        normed = self.start(x)
        if self.latent is None:
            y = (x + self.attend(normed, normed))[:, :1]
        else:
            y = self.attend(self.latent.expand(len(x), 1, -1), normed)
        y = y + self.down(F.gelu(self.up(self.norm(y))))
        return self.last(self.end(y)[:, 0])

    def attend(self, asking: Tensor, tokens: Tensor) -> Tensor:
        if self.kind == "module":
            return self.by_module(asking, tokens)
        q, k, v = (
            made(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made, x in ((self.q, asking), (self.k, tokens), (self.v, tokens))
        )
        if self.kind == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT / (K // self.heads) ** 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))

    def by_module(self, asking: Tensor, tokens: Tensor) -> Tensor:
        of = self.q, self.k, self.v
        return F.multi_head_attention_forward(
            *(x.transpose(0, 1) for x in (asking, tokens, tokens)),
            *(K, self.heads),
            torch.cat([one.weight for one in of]),
            torch.cat([one.bias for one in of]),
            *(None, None, False, 0.0, self.out.weight, self.out.bias),
            training=False,
        )[0].transpose(0, 1)


def network_of(module: nn.Module, layer: str = "start", **options) -> EmbeddingNetwork:
    return EmbeddingNetwork(module, layer, **options)


def sums_of(passed, direction: np.ndarray) -> tuple[float, float]:
    """z . direction, and what positions and parts give to it."""
    _, cells, parts = passed.products(direction)
    z = (passed.features.embedding * passed.features.norm[:, None])[0].double().numpy()
    return float(z @ direction), float(cells.sum()) + sum(parts.values())


DIRECTION = np.random.default_rng(0).normal(size=WIDTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [1, 3])
def test_behind_the_class_token_s_last_attention(kind: str, prefix: int) -> None:
    module = seeded(lambda: Block(kind, prefix))
    passed = network_of(module, prefix_tokens=prefix).held_pass(images(1, 16, 20))
    with torch.no_grad():
        precise = seeded(lambda: Block(kind, prefix)).double()
        x = precise.patches(images(1, 16, 20).double()).flatten(2).mT
        x = torch.cat([precise.before, x], 1)
        expected = held_block(precise, precise.start(x)[0].numpy(), x[0, 0].numpy())
        z = precise(images(1, 16, 20).double())[0].numpy()
    np.testing.assert_allclose(sum(v.sum(0) if v.ndim > 1 else v for v in expected.values()), z)
    channels, cells, parts = passed.products(DIRECTION)
    by_token = expected["tokens"] @ DIRECTION
    np.testing.assert_allclose(cells.ravel(), by_token[prefix:], rtol=1e-4, atol=1e-5)
    assert parts == pytest.approx(
        {
            "class and register tokens": by_token[:prefix].sum(),
            "the class token before the last attention": expected["stream"] @ DIRECTION,
            "the MLP": expected["perceptron"] @ DIRECTION,
        },
        rel=1e-4,
        abs=1e-5,
    )
    assert channels.sum() == pytest.approx(cells.sum(), rel=1e-6)
    value, told = sums_of(passed, DIRECTION)
    assert value - told == pytest.approx(expected["biases"] @ DIRECTION, rel=1e-4)
    masks = np.random.default_rng(1).random((3, *cells.shape))
    vectors = np.einsum("nt,td->nd", masks.reshape(3, -1), expected["tokens"][prefix:])
    np.testing.assert_allclose(passed.vectors(masks), vectors, rtol=1e-4, atol=1e-5)
    assert passed.exact
    assert passed.held == ("attention weights", NORMS)


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_latent_query(kind: str) -> None:
    module = seeded(lambda: Block(kind, 0, latent=True))
    passed = network_of(module).held_pass(images(1, 16, 16))
    with torch.no_grad():
        precise = seeded(lambda: Block(kind, 0, latent=True)).double()
        x = precise.start(precise.patches(images(1, 16, 16).double()).flatten(2).mT)
        expected = held_block(precise, x[0].numpy(), None)
    _, cells, parts = passed.products(DIRECTION)
    by_token = expected["tokens"] @ DIRECTION
    np.testing.assert_allclose(cells.ravel(), by_token, rtol=1e-4, atol=1e-5)
    assert parts == pytest.approx({"the MLP": expected["perceptron"] @ DIRECTION}, rel=1e-4)
    value, told = sums_of(passed, DIRECTION)
    assert value - told == pytest.approx(expected["biases"] @ DIRECTION, rel=1e-4)


class PoolNorm(nn.Module):
    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, K, 4, 4)
        self.norm = nn.LayerNorm(K) if centred else nn.RMSNorm(K, eps=1e-6)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.start(x).mean((2, 3)))


@pytest.mark.parametrize("centred", [True, False])
def test_behind_pooling_and_a_norm(centred: bool) -> None:
    module = seeded(lambda: PoolNorm(centred))
    passed = network_of(module).held_pass(images(1, 16, 20))
    A = passed.features.activations[0].double().numpy()
    expected = np.einsum("dkij,kij->ijd", held_norm(A, module.norm, None, centred), A)
    direction = np.random.default_rng(0).normal(size=K)
    _, cells, parts = passed.products(direction)
    np.testing.assert_allclose(cells, expected @ direction, rtol=1e-4, atol=1e-6)
    assert parts == {}
    value, told = sums_of(passed, direction)
    assert told == pytest.approx(value, rel=1e-4)  # torch begins with a bias of zero


# What has no bias adds up to the whole


def unbiased(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("bias", "in_proj_bias"):
            nn.init.zeros_(parameter)
    return module


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**16),
    st.sampled_from(KINDS),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_receipts_of_random_blocks_add_up(seed, kind, prefix, heads, latent, normalize) -> None:
    latent = latent or not prefix
    module = unbiased(seeded(lambda: Block(kind, prefix, heads, latent), seed))
    network = network_of(module, prefix_tokens=prefix, normalize=normalize)
    pair = [HeldSide(network.held_pass(images(1, 16, 16, n)), normalize) for n in range(2)]
    receipt = make_receipt(*pair, np.random.default_rng(seed).normal(size=WIDTH) * 0.1)
    size = max(1.0, *(np.abs(one.cells).sum() for one in (receipt.query, receipt.result)))
    for one in (receipt.query, receipt.result):
        assert one.remainder == pytest.approx(0, abs=1e-5 * size)
        total = one.cells.sum() + sum(one.parts.values()) + one.shared + one.remainder
        assert total == pytest.approx(receipt.similarity, abs=1e-5 * size)
    _, cells, _ = pair[0].products(DIRECTION)
    vectors = pair[0].cell_vectors(range(cells.size)) @ DIRECTION
    np.testing.assert_allclose(vectors, cells.ravel(), atol=1e-5 * size)


class Normed(nn.Module):
    """A norm over channels before or behind the mean over positions, perhaps a linear map."""

    def __init__(self, centred: bool, pooled: bool, width: int | None, eps: float) -> None:
        super().__init__()
        self.norm = (nn.LayerNorm if centred else nn.RMSNorm)(K, eps)
        self.pooled, self.last = pooled, linear(K, width) if width else nn.Identity()
        nn.init.normal_(self.norm.weight)

    def forward(self, maps: Tensor) -> Tensor:
        x = maps.flatten(2).mT
        return self.last(self.norm(x.mean(1)) if self.pooled else self.norm(x).mean(1))


@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 2**16),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 3, WIDTH]),
    st.sampled_from([1e-6, 1e-5, 1e-2]),
    st.sampled_from([0.1, 3.0]),
    st.booleans(),
)
def test_around_a_norm_receipts_need_no_derivative_and_add_up(
    seed, centred, pooled, width, eps, scale, normalize
) -> None:
    trunk = seeded(lambda: nn.Conv2d(3, K, 4, 4), seed)
    nn.init.normal_(trunk.weight, std=scale)
    head = seeded(lambda: Normed(centred, pooled, width, eps), seed + 1)
    network = EmbeddingNetwork.from_parts(trunk, head, normalize=normalize, input_size=(16, 12))
    matrix = network.affine_head(lambda: np.empty(0))
    assert (matrix.held.centered, matrix.held.pooled) == (centred, pooled)
    assert matrix.held.epsilon == pytest.approx(eps, rel=1e-2)
    pair = []
    for number in range(2):
        found = network.forward(images(1, 16, 12, number))
        norm = float(found.norm[0]) if normalize else 1.0
        given = found.activations[0].numpy(), found.embedding[0].numpy(), norm
        pair.append(PooledSide(*given, matrix.matrix, matrix.held))
    A = pair[0].activations.astype(np.float64)
    W = head.last.weight.detach().double().numpy() if width else None
    J = held_norm(A, head.norm, W, centred, pooled)
    direction = np.random.default_rng(seed).normal(size=len(J))
    expected = np.einsum("d,dkij,kij->kij", direction, J, A) / pair[0].norm
    channels, cells, parts = pair[0].products(direction)
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(expected).max()}
    np.testing.assert_allclose(channels, expected.sum((1, 2)), **close)
    np.testing.assert_allclose(cells, expected.sum(0), **close)
    assert parts == {}
    receipt = make_receipt(*pair, direction * 0.1)
    for one in (receipt.query, receipt.result):
        size = max(1.0, np.abs(one.cells).sum())
        assert one.remainder == pytest.approx(0, abs=1e-5 * size)  # torch begins without a bias
        assert one.cells.sum() + one.shared == pytest.approx(receipt.similarity, abs=1e-5 * size)


def stated(function, **parts: nn.Module):
    """A head as a function of its own parts and the activations."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict(parts)

        def forward(self, maps: Tensor) -> Tensor:
            return function(maps, **self.parts)

    return Head()


def linear(n: int = K, m: int = WIDTH) -> nn.Linear:
    return nn.Linear(n, m, bias=False)


def pooled(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def in_place(maps: Tensor, a: nn.Module) -> Tensor:
    maps = F.relu(maps * 1, inplace=True)
    x = maps.mean((2, 3))
    x.mul_(2.0).add_(maps.amax((2, 3)))
    x /= x.norm(dim=1, keepdim=True)
    kept = torch.zeros_like(x)
    kept[:, :4] = x[:, 4:]
    return a(kept)


def by_hand(maps: Tensor, a: nn.Module) -> Tensor:
    x = maps.flatten(2).mean(2)
    x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) / x.std(1, keepdim=True)
    return a(F.normalize(2 - (2 - x), dim=1) * x.square().sum(1, keepdim=True) ** -0.5)


def squeezed(maps: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    gate = a(maps.mean((2, 3))).sigmoid()[:, :, None, None]
    return b((maps * gate.expand_as(maps)).sum((2, 3)))


def gated_in_place(maps: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    maps = maps.clone()
    maps *= a(maps.mean((2, 3))).sigmoid()[:, :, None, None]
    return b(pooled(maps))


def multiplied(maps: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    x = pooled(maps)
    return c(F.silu(a(x)) * b(x)) + torch.einsum("bk,dk->bd", a(x) * x, c.weight)


def around(maps: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    x = pooled(maps)
    return a(x + F.gelu(b(x)) + torch.exp(x).log1p() * 0)


ADDING_UP = {
    "in place": lambda: stated(in_place, a=linear()),
    "norms by hand": lambda: stated(by_hand, a=linear()),
    "squeezed": lambda: stated(squeezed, a=linear(K, K), b=linear()),
    "gated in place": lambda: stated(gated_in_place, a=linear(K, K), b=linear()),
    "multiplied": lambda: stated(multiplied, a=linear(K, K), b=linear(K, K), c=linear()),
    "around": lambda: stated(around, a=linear(), b=linear(K, K)),
    "batch norm": lambda: nn.Sequential(
        nn.BatchNorm2d(K, affine=False), nn.MaxPool2d(2), nn.Flatten(), linear(K * 4)
    ),
    "groups": lambda: nn.Sequential(nn.GroupNorm(2, K), nn.AvgPool2d(4), nn.Flatten(), linear()),
    "rectified": lambda: nn.Sequential(
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear(K, 9), nn.Hardswish(), linear(9), nn.Tanh()
    ),
    "unfolded": lambda: nn.Sequential(
        nn.Unfold(2, stride=2), nn.Flatten(), linear(K * 16, 6), nn.LeakyReLU(inplace=True),
        linear(6),
    ),
}  # fmt: skip
NOT_LINEAR = {"around", "multiplied"}  # of a gated unit, half goes through the gate


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ADDING_UP)
def test_heads_without_a_bias_add_up(name: str, frozen: bool) -> None:
    made = seeded(lambda: nn.Sequential(nn.Conv2d(3, K, 4, 4), ADDING_UP[name]()))
    made.requires_grad_(not frozen)
    network, x = EmbeddingNetwork(made, "0"), images(1, 16, 16)
    before = state_of(made)
    with torch.inference_mode():
        passed = network.held_pass(x)
        np.testing.assert_allclose(
            passed.features.embedding, network.forward(x).embedding, rtol=1e-5, atol=1e-6
        )
        value, told = sums_of(passed, DIRECTION)
        _, cells, parts = passed.products(DIRECTION)
        vectors = passed.vectors(np.eye(16, dtype=np.float32).reshape(16, 4, 4))
    assert told == pytest.approx(value, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(vectors @ DIRECTION, cells.ravel(), rtol=1e-4, atol=1e-5)
    assert passed.exact
    assert np.abs(cells).sum() > 1e-3
    assert set(parts) == ({"what is not linear"} if name in NOT_LINEAR else set())
    assert_same_state(before, state_of(made))
    assert all(p.grad is None for p in made.parameters())


def test_what_passes_the_layer_by_has_a_line_of_its_own() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, K, 4, 4), nn.Conv2d(K, K, 1, bias=False)
            self.last = linear()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            made = self.second(x)
            x += made  # what comes from before is written to
            return self.last(x.mean((2, 3)))

    module = seeded(Skipping)
    passed = EmbeddingNetwork(module, "second").held_pass(images(1, 16, 16))
    with torch.no_grad():
        skipped = module.last(module.first(images(1, 16, 16)).mean((2, 3)))[0].numpy()
    assert passed.products(DIRECTION)[2] == pytest.approx(
        {"what passes the layer by": float(skipped @ DIRECTION)}, rel=1e-5
    )
    value, told = sums_of(passed, DIRECTION)
    assert told == pytest.approx(value, rel=1e-5)


def test_where_nothing_can_be_held_all_is_of_first_order() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(), nn.LogSoftmax(1))
    made = seeded(lambda: nn.Sequential(nn.Conv2d(3, K, 4, 4), head))
    network, x = EmbeddingNetwork(made, "0"), images(1, 16, 16)
    passed = network.held_pass(x)
    assert (passed.exact, passed.held) == (False, ())
    with network.head_pass(x) as plain:
        slopes = plain.vjp(DIRECTION[None])[0].numpy()
    _, cells, parts = passed.products(DIRECTION)
    expected = (slopes * passed.features.activations[0].numpy()).sum(0)
    np.testing.assert_allclose(cells, expected, rtol=1e-4, atol=1e-6)
    assert parts == {}
    masks = np.random.default_rng(0).random((2, 4, 4))
    found = passed.vectors(masks) @ DIRECTION
    np.testing.assert_allclose(found, (masks * expected).sum((1, 2)), rtol=1e-4)


def test_a_vision_transformer_of_torchvision() -> None:
    module = unbiased(seeded(small_vit))
    nn.init.zeros_(module.encoder.pos_embedding)
    passed = EmbeddingNetwork(module, VIT_LAYER).held_pass(images(1, 64, 64))
    direction = np.random.default_rng(0).normal(size=10)
    value, told = sums_of(passed, direction)
    assert told == pytest.approx(value, rel=1e-4)
    assert list(passed.products(direction)[2]) == [
        "class and register tokens",
        "the class token before the last attention",
        "the MLP",
    ]


def test_refusals() -> None:
    network = network_of(seeded(lambda: Block("sdpa", 1)), prefix_tokens=1)
    with pytest.raises(InputError, match="a held pass is of one picture; given 2"):
        network.held_pass(images(2, 16, 16))
    passed = network.held_pass(images(1, 16, 16))
    with pytest.raises(InputError, match=r"masks are \[1, 3, 4\]; expected \[n, 4, 4\]"):
        passed.vectors(np.ones((1, 3, 4)))
    assert passed.vectors(np.ones((0, 4, 4))).shape == (0, WIDTH)
    passed.close()
    with pytest.raises(InputError, match="this pass was closed"):
        passed.products(DIRECTION)
    module = seeded(small_vit)
    last = "encoder.layers.encoder_layer_2.ln_2"
    with pytest.raises(NetworkError, match=r"patch tokens of layer .* never reach"):
        EmbeddingNetwork(module, last).held_pass(images(1, 64, 64))


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_head_that_cannot_be_differentiated_twice_says_so() -> None:
    trunk = seeded(lambda: nn.Conv2d(3, 8, 4, 4))
    network = EmbeddingNetwork.from_parts(trunk, lambda maps: OnceOnly.apply(maps.mean((2, 3))))
    with network.held_pass(images(1)) as passed:
        assert passed.products(np.ones(8))[0].any()
        with pytest.raises(NetworkError, match=r"'trunk' cannot be differentiated twice"):
            passed.vectors(np.ones((1, 4, 4)))
