"""Grad-CAM and Grad-CAM++ channel weights of a target, averaged over triplets.

Grad-CAM's weights are linear in the cotangent, so their mean over S triplets is ONE backward pass
with the mean cotangent. Grad-CAM++'s are not: each triplet has its own. Behind a global average
pool both are closed forms of the pooled vector; elsewhere they are vector-Jacobian products through
the head alone. Gradients are dy/dA, `[B K H W]`; weights are `[B K]`.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..network import HeadPass


class PooledHead(Protocol):
    """Anything that differentiates a head behind a global average pool."""

    def pooled_vjp(self, pooled: Tensor, cotangents: Tensor) -> Tensor:
        """dy/dp `[B K]` or `[B S K]` at pooled `[B K]` for dy/dz `[B D]` or `[B S D]`."""


def gradcam(gradients: Tensor) -> Tensor:
    """alpha_k = (1/Z) sum_ij dy/dA_ij^k (Selvaraju et al. 2017, eq. 1).

    Args:
        gradients: `[B K H W]`.

    Returns:
        `[B K]`.
    """
    return gradients.mean((-2, -1))


def gradcam_plus_plus(gradients: Tensor, activations: Tensor) -> Tensor:
    """w_k = sum_ij a_ij ReLU(G_ij), a = 1 / (2 + S_k G) (Chattopadhay et al. 2018, eq. 10 and 19).

    The paper's a = G^2 / (2 G^2 + S_k G^3) with G^2 cancelled, S_k = sum_ij A_ij^k taken over the
    positive activations: the paper assumes A >= 0, and 2 + S_k G >= 2 then holds wherever G > 0.
    No epsilon: embedding gradients are about 1e-4, and one near their square decides the result.

    Args:
        gradients: G, `[B K H W]`.
        activations: A, `[B K H W]`.

    Returns:
        `[B K]`, >= 0.
    """
    positive = gradients.clamp(min=0)
    sums = activations.clamp(min=0).sum((-2, -1), keepdim=True)
    return (positive / (2 + sums * positive)).sum((-2, -1))


def pooled_gradcam(gradients: Tensor, cells: int) -> Tensor:
    """Grad-CAM behind a global average pool, where dy/dA_ij = g / Z at every position.

    Args:
        gradients: g = dy/dp of the pooled vector p, `[... K]`.
        cells: Z = H W.
    """
    return gradients / cells


def pooled_gradcam_plus_plus(gradients: Tensor, positive_pooled: Tensor) -> Tensor:
    """Grad-CAM++ behind a global average pool: ReLU(g) / (2 + p+ g).

    Args:
        gradients: g = dy/dp, `[... K]`.
        positive_pooled: p+, the mean of max(A, 0) over positions, `[... K]`.
    """
    positive = gradients.clamp(min=0)
    return positive / (2 + positive_pooled * positive)


def weights_from_pooled(
    network: PooledHead,
    pooled: Tensor,
    positive_pooled: Tensor,
    head_cotangents: Tensor,
    used: Tensor | None,
    cells: int,
    method: str,
) -> Tensor:
    """Averaged weights of a batch from its pooled vectors alone, without any forward pass.

    Args:
        network: the head behind a global average pool.
        pooled: mean of A over positions, `[B K]`.
        positive_pooled: mean of max(A, 0), `[B K]`; used by Grad-CAM++.
        head_cotangents: dy/dz, `[B D]` (Grad-CAM: of the mean) or `[B S D]`.
        used: triplets that count, `[B S]`, with `[B S D]`.
        cells: Z = H W.
        method: "cam", "gradcam" or "gradcam++".

    Returns:
        `[B K]`.
    """
    if method == "cam":
        return network.pooled_vjp(pooled, head_cotangents)
    if method == "gradcam":
        return pooled_gradcam(network.pooled_vjp(pooled, head_cotangents), cells)
    if head_cotangents.ndim == 2:
        gradients = network.pooled_vjp(pooled, head_cotangents)
        return pooled_gradcam_plus_plus(gradients, positive_pooled)
    assert used is not None
    # One image at a time: its [S K] products stay in the processor's cache.
    rows = []
    for image in range(len(pooled)):
        one = slice(image, image + 1)
        gradients = network.pooled_vjp(pooled[one], head_cotangents[one])[0]
        each = pooled_gradcam_plus_plus(gradients, positive_pooled[one])
        rows.append(_mean_used(each[None], used[one])[0])
    return torch.stack(rows)


def weights_from_head(
    head_pass: HeadPass, head_cotangents: Tensor, used: Tensor | None, method: str
) -> Tensor:
    """Averaged weights of a batch by vector-Jacobian products through the head alone.

    Args:
        head_pass: one forward of the batch, differentiable from the layer on.
        head_cotangents: dy/dz, `[B D]` or `[B S D]`.
        used: triplets that count, `[B S]`, with `[B S D]`.
        method: "gradcam" or "gradcam++".

    Returns:
        `[B K]`.
    """
    activations = head_pass.features.activations
    if method == "gradcam":
        return gradcam(head_pass.vjp(head_cotangents))
    if head_cotangents.ndim == 2:
        return gradcam_plus_plus(head_pass.vjp(head_cotangents), activations)
    assert used is not None
    total = activations.new_zeros(activations.shape[:2])
    for triplet in range(head_cotangents.shape[1]):
        gradients = head_pass.vjp(head_cotangents[:, triplet])
        each = gradcam_plus_plus(gradients, activations)
        total += each * used[:, triplet, None]
    return total / used.sum(1).clamp(min=1)[:, None]


def _mean_used(values: Tensor, used: Tensor) -> Tensor:
    """Mean over triplets that count, `[B S K]` and `[B S]` -> `[B K]`; zero where none does."""
    counted = used.to(values.dtype)
    return (counted[:, None] @ values)[:, 0] / counted.sum(1).clamp(min=1)[:, None]
