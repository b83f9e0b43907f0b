"""Averaged channel weights against the literal loop: one autograd pass a triplet, in double."""

from functools import lru_cache
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from build_samples import SIDE, WIDTH, Toy, toy
from torch import Tensor

from embedcam.methods.weights import (
    gradcam,
    gradcam_plus_plus,
    weights_from_head,
    weights_from_pooled,
)
from embedcam.offline.triplets import active
from embedcam.targets import head_cotangent, margin_cotangent

METHODS = ["gradcam", "gradcam++"]
NORMS = {"through": (True, "through"), "around": (True, "around"), "none": (False, "through")}
BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
KINDS = ["signed", "other", "tokens"]
N_IMAGES, N_TRIPLETS = 2, 6
DRAWN = np.random.default_rng(3)
EMBEDDINGS = DRAWN.normal(size=(9, WIDTH))
EMBEDDINGS /= np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
# Single precision numbers, so that both precisions are asked the same question.
EMBEDDINGS = EMBEDDINGS.astype(np.float32).astype(np.float64)
OTHERS = np.tile(np.arange(N_IMAGES, 9), (N_IMAGES, N_TRIPLETS, 1))
TRIPLETS = DRAWN.permuted(OTHERS, axis=2)[..., :2]


@lru_cache
def run(kind: str, dtype: torch.dtype = torch.float64, normalize: bool = True) -> tuple[Toy, Any]:
    """A network and its pass over two images."""
    it = toy(kind, normalize=normalize, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(N_IMAGES, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return it, it.network.head_pass(images.to(dtype))


def cotangents_of(features: Any, method: str, norm: str, normalize: bool, hinge: float | None):
    """dy/dz of the images' triplets, the mean for Grad-CAM, and which triplets count."""
    table = torch.from_numpy(EMBEDDINGS).to(features.embedding)
    p, n = table[TRIPLETS[..., 0]], table[TRIPLETS[..., 1]]
    used = torch.ones(TRIPLETS.shape[:2], dtype=torch.bool)
    if hinge is not None:
        rows = np.concatenate([features.embedding.detach().numpy(), EMBEDDINGS[N_IMAGES:]])
        used = torch.from_numpy(active(np.arange(N_IMAGES), TRIPLETS, rows, hinge))
    if method == "gradcam":
        share = used.to(p) / used.sum(1, keepdim=True).clamp(min=1)
        c = margin_cotangent((share[..., None] * p).sum(1), (share[..., None] * n).sum(1))
    else:
        c = margin_cotangent(p, n)
    of = (features.embedding.detach(), features.norm.detach())
    return head_cotangent(c, *of, norm, normalize), used


def literal(kind: str, method: str, norm: str, normalize: bool, hinge: float | None = None):
    it, made = run(kind, torch.float64, normalize)
    rows = []
    for maps, own, triplets in zip(
        made.features.activations.detach(), made.features.embedding.detach(), TRIPLETS, strict=True
    ):
        weights, used = oracles.averaged_weights(
            it.head, maps, own.numpy(), EMBEDDINGS, triplets.tolist(),
            method=method, normalize=normalize, norm=norm, hinge=hinge,
        )  # fmt: skip
        # The hinge must have something to leave out, and something to leave.
        assert used == N_TRIPLETS if hinge is None else 0 < used < N_TRIPLETS
        rows.append(weights)
    return np.array(rows)


def relative(got: Tensor, wanted: np.ndarray) -> float:
    difference = np.linalg.norm(got.detach().double().numpy() - wanted, axis=1)
    return float((difference / np.linalg.norm(wanted, axis=1)).max())


@pytest.mark.parametrize("hinge", [None, 0.2], ids=["every", "hinge"])
@pytest.mark.parametrize("dtype", BARS, ids=["double", "single"])
@pytest.mark.parametrize("way", NORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_weights_are_the_literal_loop(kind, method, way, dtype, hinge) -> None:
    normalize, norm = NORMS[way]
    it, made = run(kind, dtype, normalize)
    A = made.features.activations.detach()
    assert A.dtype == dtype
    c, used = cotangents_of(made.features, method, norm, normalize, hinge)
    wanted = literal(kind, method, norm, normalize, hinge)
    assert relative(weights_from_head(made, c, used, method), wanted) <= BARS[dtype]
    if kind == "signed":
        assert float(A.min()) < 0
        means = A.mean((2, 3)), A.clamp(min=0).mean((2, 3))
        got = weights_from_pooled(it.network, *means, c, used, A[0, 0].numel(), method)
        assert relative(got, wanted) <= BARS[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_of_the_norm_and_the_sign_matter(kind) -> None:
    through, around, _ = (literal(kind, "gradcam", norm, on) for on, norm in NORMS.values())
    assert np.linalg.norm(through - around) > 0.05 * np.linalg.norm(around)
    made = run(kind)[1]
    c, used = cotangents_of(made.features, "gradcam", "through", True, None)
    assert relative(weights_from_head(made, -c, used, "gradcam"), through) == pytest.approx(2)


def test_the_order_of_the_triplets_does_not_matter_and_unused_ones_take_no_part() -> None:
    it, made = run("signed")
    A = made.features.activations.detach()
    c, used = cotangents_of(made.features, "gradcam++", "through", True, None)
    used[0, 2:4] = False
    pooled, Z = (A.mean((2, 3)), A.clamp(min=0).mean((2, 3))), A[0, 0].numel()
    for weigh in (
        lambda c, u: weights_from_head(made, c, u, "gradcam++"),
        lambda c, u: weights_from_pooled(it.network, *pooled, c, u, Z, "gradcam++"),
    ):
        whole = weigh(c, used)
        assert relative(weigh(c.flip(1), used.flip(1)), whole.numpy()) <= 1e-12
        louder = c.clone()
        louder[~used] *= 1e6
        assert relative(weigh(louder, used), whole.numpy()) <= 1e-12
        # All satisfied: no evidence, zero and not NaN.
        assert weigh(c, torch.zeros_like(used)).abs().max() == 0


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
    G = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    A = torch.tensor([[[[-3.0, -1.0]]]], dtype=torch.float64)
    assert gradcam_plus_plus(G, A).tolist() == [[0.5]]
    assert gradcam_plus_plus(-G, A).tolist() == [[0.0]]
