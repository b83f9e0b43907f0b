"""Methods whose weights come from gradients at one layer.

CAM, Grad-CAM, Grad-CAM++, XGrad-CAM, Smooth Grad-CAM++, Integrated Grad-CAM, Eigen-CAM and
EigenGrad-CAM.
"""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from .._options import Setting
from ..errors import InputError, NetworkError
from ..ops import cam as draw
from . import weights as closed_forms
from .masks import fill_of
from .subject import MethodOutput, Subject

# Gradients held at once: noisy inputs times triplets.
_AT_ONCE = 256
_LARGE = 100
"""Channels or positions, whichever are fewer, from which iterating beats a decomposition."""
Count = Annotated[int, Setting(kind=int, least=1, most=1_000_000)]


def cam(subject: Subject) -> MethodOutput:
    """CAM: w = W^T dy/dz for pooled activations -> linear W -> z (Zhou et al. 2016, eq. 1 and 2).

    Exact: the bias drops out, and whatever affine follows the pooling (a batch norm, a second
    linear map) is folded into W. Grad-CAM's weights are these divided by Z = H W. A class score is
    one row of W; a target of an embedding mixes the rows by dy/dz. Where the pooled vector is
    itself the embedding, W is the identity.
    """
    features = subject.features
    if not subject.network.head_kind.affine:
        raise NetworkError(
            f"CAM needs average pooling and one linear map behind layer {subject.network.layer!r}, "
            "and something else follows it; use 'gradcam', its generalisation"
        )
    pooled = features.activations.mean((-2, -1))
    return MethodOutput(subject.network.pooled_vjp(pooled, subject.mean_cotangents(features)))


def gradcam(subject: Subject) -> MethodOutput:
    """Grad-CAM: w = (1/Z) sum_ij G_ij (Selvaraju et al. 2017, eq. 1).

    Linear in the target: over triplets it is one backward pass with the mean cotangent.
    """
    return MethodOutput(closed_forms.gradcam(subject.gradients))


def gradcam_plus_plus(subject: Subject) -> MethodOutput:
    """Grad-CAM++: w = sum_ij a_ij ReLU(G_ij), a = 1 / (2 + S G), S = sum_ij A_ij.

    See `weights.gradcam_plus_plus`. Not linear in the target, so the weights of each triplet are
    averaged, not the gradients. The factor exp(y) of the paper's derivation is left out: it would
    weigh triplets, and cancels for one target. Behind a global average pool in closed form, else
    one product through the head for each triplet.
    """
    network, head = subject.network, subject.head
    each, used = subject.cotangents(head.features)
    # What the head is, is found out by asking it, which takes longer than a backward pass or two.
    if subject.target.parts > 1 and network.pooled_replay:
        maps = head.features.activations
        pooled, positive = (one.mean((-2, -1)) for one in (maps, maps.clamp(min=0)))
        return MethodOutput(
            closed_forms.weights_from_pooled(
                network, pooled, positive, each, used, maps[0, 0].numel(), "gradcam++"
            )
        )
    subject.passes.head_backwards += each.shape[0] * each.shape[1]
    return MethodOutput(closed_forms.weights_from_head(head, each, used, "gradcam++"))


def xgradcam(subject: Subject) -> MethodOutput:
    """XGrad-CAM: w = sum_ij (A_ij / sum A) G_ij (Fu et al. 2020, eq. 8).

    Behind average pooling it is Grad-CAM. The weight is 0 where activations sum to zero, or cancel
    to the rounding of their sum, whose inverse would be noise. A negative sum is taken as it is.
    """
    gradients, activations = subject.gradients, subject.activations
    sums, sizes = activations.sum((-2, -1)), activations.abs().sum((-2, -1))
    real = sums.abs() > activations[0, 0].numel() * torch.finfo(sums.dtype).eps * sizes
    return MethodOutput((activations * gradients).sum((-2, -1)) / torch.where(real, sums, 1) * real)


def smooth_gradcam_plus_plus(
    subject: Subject,
    *,
    samples: Count = 25,
    sigma: Annotated[float, Setting(kind=float, least=0)] = 0.15,
) -> MethodOutput:
    """Smooth Grad-CAM++: w = sum_ij a ReLU(m1), a = m2 / (2 m2 + (sum_ij A) m3), >= 0.

    Omeiza et al. 2019, eq. 6-8; m1, m2, m3 are the means of G, G^2 and G^3 over `samples` noisy
    inputs (each one forward, and one backward a triplet), A is the clean image's. `sigma` is the
    noise's standard deviation as a share of the image's own range max X - min X. Each triplet has
    its own weights, which are then averaged. With sigma 0 it is Grad-CAM++.

    Departures: the paper prints m1 in a's numerator, which is no Grad-CAM++ even without noise; m2
    stands there. The sum over A takes positive activations, as Grad-CAM++ does. Where m3 < 0 the
    fraction has a pole, so its denominator is at least m2 and a at most 1. Where m2 = 0, a = 0.
    """
    _refuse_words(subject, "Smooth Grad-CAM++ adds noise to its input")
    # The clean image is not differentiated, so its forward need keep no graph.
    features = subject.features
    used = subject.cotangents(features)[1]
    rows = []
    for row in range(len(subject)):
        sums = features.activations[row].clamp(min=0).sum((-2, -1), keepdim=True)
        first, second, third = _moments(subject, row, samples, sigma)
        below = torch.maximum(2 * second + sums * third, second)
        shares = second / torch.where(below > 0, below, 1)
        each = (shares * first.clamp(min=0)).sum((-2, -1))
        counted = used[row].to(each.dtype)[:, None]
        rows.append((each * counted).sum(0) / counted.sum().clamp(min=1))
    return MethodOutput(torch.stack(rows))


def _moments(subject: Subject, row: int, samples: int, sigma: float) -> list[Tensor]:
    """Return the means of G, G^2 and G^3 over noisy inputs of one image, `[S K H W]` each."""
    image, generator = subject.images[row], subject.generator()
    spread = sigma * (image.max() - image.min())

    def noisy() -> Tensor:
        # One at a time and in double precision: neither the batch nor the precision changes draws.
        noise = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        return image + spread * noise.to(image)

    at_once = max(1, min(subject.batch_size, _AT_ONCE // subject.target.parts))
    totals: list[Tensor] = []
    for start in range(0, samples, at_once):
        piece = torch.stack([noisy() for _ in range(min(at_once, samples - start))])
        gradients = subject.differentiate(piece, row, each=True)[1]
        sums = [(gradients**power).sum(1) for power in (1, 2, 3)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [total / samples for total in totals]


def integrated_gradcam(subject: Subject, *, steps: Count = 20) -> MethodOutput:
    """Integrated Grad-CAM: mean over t of ReLU(sum_k alpha_k(t) (A_k(t) - A_k(0))).

    Sattarzadeh et al. 2021, eq. 6, as a Riemann sum; t runs over 1/m, ..., 1 (m = `steps`) along
    the line from the baseline to the image, alpha_k(t) = mean_ij G(t). The baseline is the
    subject's fill: the paper's black picture is "black", its blurred one "blur". It is not
    differentiated and may be embedded as zeros. m + 1 forward passes, m backward.

    The weights are ours: mean over t of alpha_k(t), drawn with the image's own A, so that an index
    can hold them; the paper's map is in `maps`, zero where the image is its baseline.
    """
    _refuse_words(subject, "Integrated Grad-CAM mixes its input with a baseline")
    last = closed_forms.gradcam(subject.gradients)
    weights, maps = [], []
    for row, image in enumerate(subject.images):
        baseline = fill_of(subject, row)
        subject.passes.forwards += 1
        start = subject.network.forward(baseline[None], allow_zero=True).activations[0]
        subject.progress(1)
        # t = 1 is the image itself.
        alphas, total = last[row], draw(last[row], subject.activations[row] - start)
        for part in subject.batches(steps - 1):
            shares = torch.arange(part.start + 1, part.stop + 1, device=image.device)
            shares = (shares.to(image) / steps).reshape(-1, *[1] * image.ndim)
            features, gradients = subject.differentiate(baseline + shares * (image - baseline), row)
            alpha = closed_forms.gradcam(gradients)
            alphas = alphas + alpha.sum(0)
            total = total + draw(alpha, features.activations - start).sum(0)
        weights.append(alphas / steps)
        maps.append(total / steps)
    return MethodOutput(torch.stack(weights), torch.stack(maps))


def _refuse_words(subject: Subject, what: str) -> None:
    if not subject.images.is_floating_point():
        raise InputError(
            f"{what}, and this network's input is numbers of words ({subject.images.dtype}), which "
            "lie on no line; use a method of one gradient, such as 'gradcam'"
        )


def eigencam(subject: Subject) -> MethodOutput:
    """Eigen-CAM: w = v_1 of A = U S V^T, A as `[HW K]`; map A v_1 (Muhammad and Yeasin 2020).

    The paper's eq. 3 to 5, not centered. v_1 has length 1, and 0 where all activations are 0. It
    ignores the target: it shows what stands out.

    Departures: the paper does not say which of v_1 and -v_1 to take; here the one with which the
    map sums to at least 0. The map goes through a ReLU, which changes nothing where A >= 0.
    """
    return MethodOutput(_first_direction(subject.activations.flatten(2).mT))


def eigengradcam(subject: Subject) -> MethodOutput:
    """EigenGrad-CAM: v_1 of E = G A, elementwise, as `[HW K]`; map ReLU(E v_1) (pytorch-grad-cam).

    Weight form: w = mean_ij(G) * v_1, which draws the same map where G is the same at all positions
    (average pooling) and approximates it elsewhere. v_1's sign makes E v_1 sum to at least 0.
    Whatever the sign, the map tells strong from weak rather than for from against: a channel with a
    negative gradient has a negative column in E, gets a v_1 entry of the opposite sign to those of
    the positive ones, and so *adds* to the map.

    Departures: pytorch-grad-cam centers E first, and takes whichever sign its decomposition
    returns.
    """
    gradients, activations = subject.gradients, subject.activations
    evidence = (gradients * activations).flatten(2).mT
    direction = _first_direction(evidence)
    maps = (evidence @ direction[..., None]).reshape(activations[:, 0].shape)
    return MethodOutput(gradients.mean((-2, -1)) * direction, maps.clamp(min=0))


def oriented(directions: Tensor, maps: Tensor) -> Tensor:
    """Return directions `[B K]` with the sign that makes their maps `[B Z]` sum to at least 0.

    Where the sum vanishes to rounding, the entry of largest magnitude in the map decides.
    """
    sums, size = maps.sum(-1), maps.abs().sum(-1)
    rounding = maps.shape[-1] * torch.finfo(maps.dtype).eps
    largest = maps.gather(-1, maps.abs().argmax(-1, keepdim=True))[:, 0]
    decides = torch.where(sums.abs() > rounding * size, sums, largest)
    return torch.where(decides < 0, -1, 1)[:, None].to(directions) * directions


def _first_direction(matrices: Tensor) -> Tensor:
    """Return the first right singular vector of each `[B Z K]`, oriented; 0 for a matrix of 0.

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
    """Return the first right singular vector `[K]` of one matrix `[Z K]`, K <= Z; any for 0."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    matrix = tall.detach().cpu().numpy()
    gram = LinearOperator(
        (matrix.shape[1],) * 2, matvec=lambda x: matrix.T @ (matrix @ x), dtype=matrix.dtype
    )
    # A fixed start, so that the same activations give the same bits; random, so that it is not
    # orthogonal to what is looked for.
    start = np.random.default_rng(0).standard_normal((matrix.shape[1],)).astype(matrix.dtype)
    try:
        return torch.as_tensor(eigsh(gram, k=1, which="LA", v0=start)[1][:, 0]).to(tall)
    except ArpackError:
        # Not converged in time, as where nothing is dominant.
        vectors: Tensor = torch.linalg.eigh(tall.mT @ tall)[1]
        return vectors[:, -1]
