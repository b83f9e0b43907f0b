"""Averaged channel weights against the literal loop: one autograd pass a triplet, in double.

Three kinds of head (pooled and affine, not pooled, attention over tokens), both methods, the norm's
two ways and no norm: relative error at most 1e-10 in double and 1e-5 in single precision.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

from embedcam.methods.weights import (
    gradcam,
    gradcam_plus_plus,
    weights_from_head,
    weights_from_pooled,
)
from embedcam.network import EmbeddingNetwork
from embedcam.offline.triplets import Triplets, active
from embedcam.targets import head_cotangent, margin_cotangent

METHODS = ["gradcam", "gradcam++"]
NORMS = {"through": (True, "through"), "around": (True, "around"), "none": (False, "through")}
BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
N_IMAGES, N_TRIPLETS, D = 2, 6, 5


class PooledCNN(nn.Module):
    """SiLU (negative activations), average pooling, batch norm, two linear layers: z = W p + b."""

    layer, pooled = "trunk", True

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 7, 3, 2), nn.SiLU(), nn.Conv2d(7, 6, 3), nn.SiLU())
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, D))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.trunk(images).mean((2, 3))))


class PlainCNN(nn.Module):
    """A head that sees positions: a convolution, a bend, and a linear layer over all cells."""

    layer, pooled = "trunk", False

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, D))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


class Block(nn.Module):
    """Pre-norm attention and a feed-forward part, as in a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, -1)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + self.out(attention @ v)
        return tokens + self.mlp(self.norm2(tokens))


class TinyViT(nn.Module):
    """Class token first, 3 x 3 patches, two blocks; the embedding is read off the class token."""

    layer, pooled = "blocks.0", False

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.places = nn.Parameter(torch.randn(1, 10, 6))
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, D)

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        return torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.places

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(images))[:, 0])


MODELS: dict[str, type[nn.Module]] = {"pooled": PooledCNN, "plain": PlainCNN, "vit": TinyViT}


@dataclass(frozen=True)
class Case:
    """A float64 network cut by hand, its images, and embeddings that triplets point into."""

    model: nn.Module
    images: Tensor
    activations: Tensor
    heads: list[Callable[[Tensor], Tensor]]
    embeddings: np.ndarray
    triplets: np.ndarray


@lru_cache
def make(name: str) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[name]()
        images = torch.randn(N_IMAGES, 3, 12, 12)
        if name == "pooled":
            model.norm.running_mean.normal_()
            model.norm.running_var.uniform_(0.5, 2)
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        if name == "vit":
            raw = double.blocks[0](double.tokens(images.double()))
            activations = raw[:, 1:].mT.reshape(N_IMAGES, 6, 3, 3)
            heads = [token_head(double, raw[i : i + 1, :1]) for i in range(N_IMAGES)]
        else:
            activations = double.trunk(images.double())
            heads = [plain_head(double)] * N_IMAGES
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(9, D))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    # Single precision numbers, so that both precisions are asked the same question.
    embeddings = embeddings.astype(np.float32).astype(np.float64)
    triplets = rng.permuted(np.tile(np.arange(N_IMAGES, 9), (N_IMAGES, N_TRIPLETS, 1)), axis=2)
    return Case(double, images, activations, heads, embeddings, triplets[..., :2])


def plain_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(model, PooledCNN):
        return lambda maps: model.head(model.norm(maps.mean((2, 3))))
    return model.head


def token_head(model: TinyViT, token: Tensor) -> Callable[[Tensor], Tensor]:
    """What follows the first block, the image's own class token held constant."""

    def head(maps: Tensor) -> Tensor:
        tokens = torch.cat([token.expand(len(maps), -1, -1), maps.flatten(2).mT], 1)
        return model.head(model.blocks[1](tokens)[:, 0])

    return head


@lru_cache
def network_of(name: str, dtype: torch.dtype, normalize: bool) -> EmbeddingNetwork:
    model = copy.deepcopy(make(name).model).to(dtype)
    return EmbeddingNetwork(model, model.layer, normalize=normalize)


def cotangents_of(
    case: Case, features, method: str, norm: str, normalize: bool, hinge: float | None
) -> tuple[Tensor, Tensor]:
    """dy/dz of the images' triplets, the mean for Grad-CAM, and which triplets count."""
    table = torch.from_numpy(case.embeddings).to(features.embedding)
    p, n = table[case.triplets[..., 0]], table[case.triplets[..., 1]]
    used = torch.ones(case.triplets.shape[:2], dtype=torch.bool)
    if hinge is not None:
        rows = np.concatenate([features.embedding.numpy(), case.embeddings[N_IMAGES:]])
        places = Triplets(np.arange(N_IMAGES), case.triplets[..., 0], case.triplets[..., 1])
        used = torch.from_numpy(active(places, rows, hinge))
    if method == "gradcam":
        share = used.to(p) / used.sum(1, keepdim=True).clamp(min=1)
        c = margin_cotangent((share[..., None] * p).sum(1), (share[..., None] * n).sum(1))
    else:
        c = margin_cotangent(p, n)
    return head_cotangent(c, features.embedding, features.norm, norm, normalize), used


def literal(case: Case, method: str, norm: str, normalize: bool, hinge: float | None) -> np.ndarray:
    rows = []
    for i, head in enumerate(case.heads):
        with torch.no_grad():
            z = head(case.activations[i : i + 1])[0].numpy()
        own = z / np.linalg.norm(z) if normalize else z
        weights, used = oracles.averaged_weights(
            head,
            case.activations[i],
            own,
            case.embeddings,
            [tuple(pair) for pair in case.triplets[i].tolist()],
            method=method,
            normalize=normalize,
            norm=norm,
            hinge=hinge,
        )
        # The hinge must have something to leave out, and something to leave.
        assert used == N_TRIPLETS if hinge is None else 0 < used < N_TRIPLETS
        rows.append(weights)
    return np.array(rows)


def relative(got: Tensor, wanted: np.ndarray) -> float:
    difference = np.linalg.norm(got.double().numpy() - wanted, axis=1)
    return float((difference / np.linalg.norm(wanted, axis=1)).max())


@pytest.mark.parametrize("hinge", [None, 0.2], ids=["every", "hinge"])
@pytest.mark.parametrize("dtype", BARS, ids=["double", "single"])
@pytest.mark.parametrize("way", NORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_head_weights_are_the_literal_loop(name, method, way, dtype, hinge) -> None:
    case, (normalize, norm) = make(name), NORMS[way]
    made = network_of(name, dtype, normalize).head_pass(case.images)
    assert made.features.activations.dtype == dtype
    c, used = cotangents_of(case, made.features, method, norm, normalize, hinge)
    got = weights_from_head(made, c, used, method)
    wanted = literal(case, method, norm, normalize, hinge)
    assert relative(got, wanted) <= BARS[dtype]
    if name == "pooled":
        A, network = made.features.activations, network_of(name, dtype, normalize)
        assert float(A.min()) < 0
        means = A.mean((2, 3)), A.clamp(min=0).mean((2, 3))
        got = weights_from_pooled(network, *means, c, used, A[0, 0].numel(), method)
        assert relative(got, wanted) <= BARS[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_the_way_of_the_norm_and_the_sign_matter(name) -> None:
    case = make(name)
    through, around, none = (
        literal(case, "gradcam", norm, on, None) for on, norm in NORMS.values()
    )
    assert np.linalg.norm(through - around) > 0.05 * np.linalg.norm(around)
    # Not normalised, the margin's cotangent does not depend on the anchor: the same as around.
    np.testing.assert_allclose(around, none, rtol=1e-10)
    made = network_of(name, torch.float64, True).head_pass(case.images)
    c, used = cotangents_of(case, made.features, "gradcam", "through", True, None)
    assert relative(weights_from_head(made, -c, used, "gradcam"), through) == pytest.approx(2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_centred_target_is_the_literal_gradient(name, method) -> None:
    case = make(name)
    made = network_of(name, torch.float64, True).head_pass(case.images)
    centred = made.features.embedding - torch.from_numpy(case.embeddings.mean(0))
    got = weights_from_head(made, centred, None, method)
    wanted = [
        oracles.target_weights(
            head, case.activations[i], oracles.dot_score(centred[i]), method=method, norm="around"
        )
        for i, head in enumerate(case.heads)
    ]
    assert relative(got, np.array(wanted)) <= 1e-10


def test_the_order_of_the_triplets_does_not_matter_and_unused_ones_take_no_part() -> None:
    case = make("pooled")
    made = network_of("pooled", torch.float64, True).head_pass(case.images)
    A = made.features.activations
    c, used = cotangents_of(case, made.features, "gradcam++", "through", True, None)
    used[0, 2:4] = False
    pooled = (A.mean((2, 3)), A.clamp(min=0).mean((2, 3)))
    head, Z = network_of("pooled", torch.float64, True), A[0, 0].numel()
    for run in (
        lambda c, u: weights_from_head(made, c, u, "gradcam++"),
        lambda c, u: weights_from_pooled(head, *pooled, c, u, Z, "gradcam++"),
    ):
        whole = run(c, used)
        assert relative(run(c.flip(1), used.flip(1)), whole.numpy()) <= 1e-12
        louder = c.clone()
        louder[~used] *= 1e6
        assert relative(run(louder, used), whole.numpy()) <= 1e-12
        # All satisfied: no evidence, zero and not NaN.
        nothing = run(c, torch.zeros_like(used))
        assert nothing.abs().max() == 0


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("offset", [0.0, -0.7])
def test_both_formulas_are_the_loops_at_any_size(size, offset) -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64) * size
    A = torch.rand(2, 5, 3, 4, generator=generator, dtype=torch.float64) + offset
    wanted = np.array([oracles.gradcam_weights(g) for g in G])
    assert relative(gradcam(G), wanted) <= 1e-12
    wanted = np.array([oracles.gradcampp_weights(g, a) for g, a in zip(G, A, strict=True)])
    assert relative(gradcam_plus_plus(G, A), wanted) <= 1e-12
    if offset == 0.0:
        printed = [oracles.gradcampp_weights_as_printed(g, a) for g, a in zip(G, A, strict=True)]
        assert relative(gradcam_plus_plus(G, A), np.array(printed)) <= 1e-10


def test_negative_activations_never_flip_grad_cam_plus_plus() -> None:
    """With the plain sum S = -2 / G the paper's fraction would divide by zero."""
    G = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    A = torch.tensor([[[[-3.0, -1.0]]]], dtype=torch.float64)
    assert gradcam_plus_plus(G, A).tolist() == [[0.5]]
    assert gradcam_plus_plus(-G, A).tolist() == [[0.0]]


# --- a network small enough for pencil and paper ---
