"""Methods that look for one dominant direction: Eigen-CAM and EigenGrad-CAM."""

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from .subject import Found, Subject

_LARGE = 100
"""Channels or positions, whichever are fewer, from which iterating beats a decomposition."""


def eigencam(subject: Subject) -> Found:
    """Eigen-CAM: w = v_1 of A = U S V^T, A as `[HW K]`; map A v_1 (Muhammad and Yeasin 2020).

    The paper's eq. 3 to 5. Not centred, as the paper has it. v_1 has length 1; its sign is the one
    with which the map sums to at least 0 (see `oriented`). It ignores the target: it shows what
    stands out. Works over positions (layout "bkl") too.

    Departures: the paper does not say which of v_1 and -v_1 to take; as every method's that is
    drawn from its weights, the map goes through a ReLU. Where all activations are >= 0, so is A v_1
    with that sign, and the ReLU changes nothing.

    Returns:
        weights `[B K]`; 0 for an image whose activations are all 0.
    """
    return Found(_first_direction(subject.activations.flatten(2).mT))


def eigengradcam(subject: Subject) -> Found:
    """EigenGrad-CAM: v_1 of E = G A, elementwise, as `[HW K]`; map ReLU(E v_1) (pytorch-grad-cam).

    Weight form: w = mean_ij(G) * v_1, which draws the same map where G is the same at all positions
    (average pooling) and approximates it elsewhere.

    The sign of v_1 is the one with which E v_1 sums to at least 0; negatives are cut by the ReLU.
    Whatever the sign, the map tells strong from weak rather than for from against: a channel with a
    negative gradient has a negative column in E, gets a v_1 entry of the opposite sign to those of
    the positive ones, and so *adds* to the map. Evidence against the target is drawn like evidence
    for it.

    Departures: pytorch-grad-cam centres E first, and takes whichever sign its decomposition
    returns.

    Returns:
        weights `[B K]` and maps `[B H W]` >= 0; both 0 for an image whose gradient is 0.
    """
    gradients, activations = subject.gradients, subject.activations
    evidence = (gradients * activations).flatten(2).mT
    direction = _first_direction(evidence)
    maps = (evidence @ direction[..., None]).reshape(activations[:, 0].shape)
    return Found(gradients.mean((-2, -1)) * direction, maps.clamp(min=0))


def oriented(directions: Tensor, maps: Tensor) -> Tensor:
    """Directions `[B K]` with the sign that makes their maps `[B Z]` sum to at least 0.

    Where the sum vanishes to rounding, the entry of largest magnitude in the map decides. So v and
    -v come out the same.
    """
    sums, size = maps.sum(-1), maps.abs().sum(-1)
    rounding = maps.shape[-1] * torch.finfo(maps.dtype).eps
    largest = maps.gather(-1, maps.abs().argmax(-1, keepdim=True))[:, 0]
    decides = torch.where(sums.abs() > rounding * size, sums, largest)
    return torch.where(decides < 0, -1, 1)[:, None].to(directions) * directions


def _first_direction(matrices: Tensor) -> Tensor:
    """The first right singular vector of each `[B Z K]`, oriented; `[B K]`, 0 for a matrix of 0.

    Of small matrices from the Gram matrix of the smaller side: the first vector of it is as exact
    as that of a full decomposition, since squaring the singular values spreads the first two apart
    as much as it squares the rounding. Of large ones by Lanczos iteration (ARPACK).
    """
    # Activations of half precision reach 6e4 and gradients 1e-20, whose squares single precision
    # does not hold.
    scale = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = matrices / torch.where(scale > 0, scale, 1)
    upright = matrices.shape[2] <= matrices.shape[1]
    tall = scaled if upright else scaled.mT
    if tall.shape[2] > _LARGE:
        short = torch.stack([_iterated(one) for one in tall])
    else:
        short = torch.linalg.eigh(tall.mT @ tall)[1][..., -1]
    directions = short if upright else (short[:, None] @ scaled)[:, 0]
    lengths = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    directions = directions / torch.where(lengths > 0, lengths, 1) * (scale[..., 0] > 0)
    return oriented(directions, (scaled @ directions[..., None])[..., 0])


def _iterated(tall: Tensor) -> Tensor:
    """The first right singular vector of one matrix `[Z K]`, K <= Z, `[K]`; any for one of 0."""
    matrix = tall.detach().cpu().numpy()
    gram = LinearOperator(
        (matrix.shape[1],) * 2, matvec=lambda x: matrix.T @ (matrix @ x), dtype=matrix.dtype
    )
    # A fixed start, so that the same activations give the same bits; random, so that it is not
    # orthogonal to what is looked for.
    start = np.random.default_rng(0).standard_normal((matrix.shape[1],)).astype(matrix.dtype)
    try:
        found = eigsh(gram, k=1, which="LA", v0=start)[1][:, 0]
    except ArpackError:
        # Not found in time, as where nothing is dominant.
        return torch.linalg.eigh(tall.mT @ tall)[1][:, -1]
    return torch.as_tensor(found).to(tall)
