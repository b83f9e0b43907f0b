"""Grad-CAM and Grad-CAM++ channel weights `[B K]` of a target, averaged over triplets.

Grad-CAM's are linear in the cotangent: their mean over triplets is ONE backward pass with the mean
cotangent. Grad-CAM++'s are not, and each triplet has its own. G = dy/dA, A are `[B K H W]`.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..network import HeadPass


class PooledHead(Protocol):
    """Anything that differentiates a head behind a global average pool."""

    def pooled_vjp(self, pooled: Tensor, cotangents: Tensor) -> Tensor:
        """Return dy/dp `[B K]` or `[B S K]` at pooled `[B K]` for dy/dz `[B D]` or `[B S D]`."""


def gradcam(gradients: Tensor) -> Tensor:
    """Return alpha_k = (1/Z) sum_ij dy/dA_ij^k (Selvaraju et al. 2017, eq. 1)."""
    return gradients.mean((-2, -1))


def gradcam_plus_plus(gradients: Tensor, activations: Tensor) -> Tensor:
    """Return w_k = sum_ij ReLU(G_ij) / (2 + S_k ReLU(G_ij)), S_k = sum_ij max(A, 0), >= 0.

    Chattopadhay et al. 2018, eq. 10 and 19, with G^2 cancelled: no epsilon, as G is about 1e-4.
    """
    positive = gradients.clamp(min=0)
    sums = activations.clamp(min=0).sum((-2, -1), keepdim=True)
    return (positive / (2 + sums * positive)).sum((-2, -1))


def pooled_gradcam(gradients: Tensor, positions: int) -> Tensor:
    """Return Grad-CAM behind average pooling, from g = dy/dp `[... K]`: dy/dA_ij = g / Z."""
    return gradients / positions


def pooled_gradcam_plus_plus(gradients: Tensor, positive_pooled: Tensor) -> Tensor:
    """Return Grad-CAM++ behind average pooling, ReLU(g) / (2 + p+ g), p+ the mean of max(A, 0)."""
    positive = gradients.clamp(min=0)
    return positive / (2 + positive_pooled * positive)


def weights_from_pooled(
    network: PooledHead,
    pooled: Tensor,
    positive_pooled: Tensor,
    head_cotangents: Tensor,
    used: Tensor | None,
    positions: int,
    method: str,
) -> Tensor:
    """Return averaged weights from means of A and max(A, 0) over `positions`, `[B K]`: no forward.

    `head_cotangents` are dy/dz `[B D]`, or `[B S D]` for Grad-CAM++ of triplets, of which `used`
    `[B S]` count (None: all). `method` is "cam", "gradcam" or "gradcam++".
    """
    if method == "cam":
        return network.pooled_vjp(pooled, head_cotangents)
    if method == "gradcam":
        return pooled_gradcam(network.pooled_vjp(pooled, head_cotangents), positions)
    if head_cotangents.ndim == 2:
        gradients = network.pooled_vjp(pooled, head_cotangents)
        return pooled_gradcam_plus_plus(gradients, positive_pooled)
    counted = _counted(head_cotangents, used)
    # One image at a time: its [S K] products stay in the processor's cache.
    rows = []
    for image in range(len(pooled)):
        one = slice(image, image + 1)
        gradients = network.pooled_vjp(pooled[one], head_cotangents[one])[0]
        each = pooled_gradcam_plus_plus(gradients, positive_pooled[one])[None]
        weights = counted[one].to(each.dtype)
        rows.append((weights[:, None] @ each)[0, 0] / weights.sum().clamp(min=1))
    return torch.stack(rows)


def weights_from_head(
    head_pass: HeadPass, head_cotangents: Tensor, used: Tensor | None, method: str
) -> Tensor:
    """Return averaged weights by the head's vector-Jacobian products; see `weights_from_pooled`."""
    activations = head_pass.features.activations
    if method == "gradcam":
        return gradcam(head_pass.vjp(head_cotangents))
    if head_cotangents.ndim == 2:
        return gradcam_plus_plus(head_pass.vjp(head_cotangents), activations)
    counted = _counted(head_cotangents, used)
    total = activations.new_zeros(activations.shape[:2])
    for triplet in range(head_cotangents.shape[1]):
        gradients = head_pass.vjp(head_cotangents[:, triplet])
        total += gradcam_plus_plus(gradients, activations) * counted[:, triplet, None]
    return total / counted.sum(1).clamp(min=1)[:, None]


def _counted(cotangents: Tensor, used: Tensor | None) -> Tensor:
    return cotangents.new_ones(cotangents.shape[:2], dtype=torch.bool) if used is None else used
