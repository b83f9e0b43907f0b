"""Methods whose weights or maps come from gradients, or from a decomposition of the activations."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from .._options import Setting
from ..errors import InputError, NetworkError
from ..ops import cam as draw
from ..ops import normalize, resize
from . import weights as closed_forms
from .masking import fill_of
from .subject import Count, Layers, MethodOutput, Subject

# Gradients held at once: noisy inputs times triplets.
_AT_ONCE = 256
_LARGE = 100
"""Channels or positions, whichever are fewer, from which iterating beats a decomposition."""


def cam(subject: Subject) -> MethodOutput:
    """CAM: w = W^T dy/dz for pooling -> linear W -> z (Zhou et al. 2016, eq. 1 and 2)."""
    features = subject.features
    if not subject.network.head_kind.affine:
        raise NetworkError(
            "CAM needs average pooling and one linear map, and something else follows layer "
            f"{subject.network.layer!r}; use 'gradcam', its generalisation"
        )
    pooled = features.activations.mean((-2, -1))
    return MethodOutput(subject.network.pooled_vjp(pooled, subject.mean_cotangents(features)))


def gradcam(subject: Subject) -> MethodOutput:
    """Grad-CAM: w = (1/Z) sum_ij G_ij (Selvaraju et al. 2017, eq. 1)."""
    return MethodOutput(closed_forms.gradcam(subject.gradients))


def gradcam_plus_plus(subject: Subject) -> MethodOutput:
    """Grad-CAM++: w = sum_ij ReLU(G) / (2 + S G), S = sum_ij max(A, 0) (Chattopadhay et al. 2018).

    Not linear in the target, so the weights of each triplet are averaged, not the gradients.
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
    """XGrad-CAM: w = sum_ij (A_ij / sum A) G_ij (Fu et al. 2020, eq. 8)."""
    gradients, activations = subject.gradients, subject.activations
    sums, sizes = activations.sum((-2, -1)), activations.abs().sum((-2, -1))
    # Of activations that cancel to the rounding of their sum the inverse would be noise.
    real = sums.abs() > activations[0, 0].numel() * torch.finfo(sums.dtype).eps * sizes
    return MethodOutput((activations * gradients).sum((-2, -1)) / torch.where(real, sums, 1) * real)


def smooth_gradcam_plus_plus(
    subject: Subject,
    *,
    samples: Count = 25,
    sigma: Annotated[float, Setting(kind=float, least=0)] = 0.15,
) -> MethodOutput:
    """Smooth Grad-CAM++: w = sum_ij a ReLU(m1), a = m2 / (2 m2 + S m3).

    Omeiza et al. 2019, eq. 6-8; m_n is the mean of G^n over `samples` inputs with noise of
    `sigma` (max X - min X).
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

    Sattarzadeh et al. 2021, eq. 6; t = 1/m ... 1 (m = `steps`) from the fill to the image.
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
        words = f"this network's input is numbers of words ({subject.images.dtype})"
        raise InputError(f"{what}, and {words}; use a method of one gradient, such as 'gradcam'")


def eigencam(subject: Subject) -> MethodOutput:
    """Eigen-CAM: w = v_1 of A = U S V^T, A as `[HW K]` (Muhammad and Yeasin 2020, eq. 3-5)."""
    return MethodOutput(_first_direction(subject.activations.flatten(2).mT))


def eigengradcam(subject: Subject) -> MethodOutput:
    """EigenGrad-CAM: v_1 of E = G A as `[HW K]`; map ReLU(E v_1) (pytorch-grad-cam).

    Weights mean_ij(G) * v_1 draw the same map behind average pooling and approximate it elsewhere.
    """
    gradients, activations = subject.gradients, subject.activations
    evidence = (gradients * activations).flatten(2).mT
    direction = _first_direction(evidence)
    maps = (evidence @ direction[..., None]).reshape(activations[:, 0].shape)
    return MethodOutput(gradients.mean((-2, -1)) * direction, maps.clamp(min=0))


def oriented(directions: Tensor, maps: Tensor) -> Tensor:
    """Return directions `[B K]` with the sign that makes their maps `[B Z]` sum to at least 0."""
    # Where the sum vanishes to rounding, the entry of largest magnitude decides.
    sums, size = maps.sum(-1), maps.abs().sum(-1)
    rounding = maps.shape[-1] * torch.finfo(maps.dtype).eps
    largest = maps.gather(-1, maps.abs().argmax(-1, keepdim=True))[:, 0]
    decides = torch.where(sums.abs() > rounding * size, sums, largest)
    return torch.where(decides < 0, -1, 1)[:, None].to(directions) * directions


def _first_direction(matrices: Tensor) -> Tensor:
    """Return the first right singular vector of each `[B Z K]`, oriented; 0 for a matrix of 0."""
    # Half precision reaches from 1e-20 to 6e4, whose squares single precision does not hold.
    scale = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = matrices / torch.where(scale > 0, scale, 1)
    upright = matrices.shape[2] <= matrices.shape[1]
    tall = scaled if upright else scaled.mT
    # Squaring spreads the first two singular values as far apart as it spreads the rounding.
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
    # Fixed, for the same bits; random, so as not to be orthogonal to what is looked for.
    start = np.random.default_rng(0).standard_normal((matrix.shape[1],)).astype(matrix.dtype)
    try:
        return torch.as_tensor(eigsh(gram, k=1, which="LA", v0=start)[1][:, 0]).to(tall)
    except ArpackError:
        vectors: Tensor = torch.linalg.eigh(tall.mT @ tall)[1]  # nothing is dominant
        return vectors[:, -1]


GAMMA = 2.0
"""Of tanh(gamma M / max M), which lifts the maps of shallow layers (Jiang et al. 2021, eq. 9)."""


def hirescam(subject: Subject) -> MethodOutput:
    """HiResCAM: ReLU(sum_k G_k A_k), weights G `[B K h w]` (Draelos and Carin 2020, eq. 2)."""
    gradients = subject.gradients
    return MethodOutput(gradients, _product(gradients, subject.activations))


def layercam(subject: Subject, *, layers: Layers = None, shallow: Layers = None) -> MethodOutput:
    """Layer-CAM: M = ReLU(sum_k ReLU(G_k) A_k) (Jiang et al. 2021, eq. 6-7).

    Of several `layers` the maximum of tanh(2 M / max M) where `shallow` (None: a grid more than
    twice as fine as the deepest's) and M / max M elsewhere (eq. 9); one alone is not scaled.
    """
    if layers is None and shallow is not None:
        what = f"shallow = {shallow!r} says which of several layers are shallow"
        raise InputError(f"{what}; give layers= too")
    maps, deepest = _maps_of_layers(subject, layers, positive=True)
    if len(maps) == 1 and not shallow:
        return _fused(subject, layers, maps.values())
    if shallow is None:
        height, width = maps[deepest].shape[-2:]
        lifted = {n for n, m in maps.items() if m.shape[-2] > 2 * height or m.shape[-1] > 2 * width}
    else:
        lifted = set(shallow)
        if unknown := [name for name in shallow if name not in maps]:
            names, known = (", ".join(map(repr, one)) for one in (unknown, maps))
            raise InputError(f"shallow names {names}; give a list of some of the layers {known}")

    def scaled(name: str) -> Tensor:
        largest = maps[name].amax((-2, -1), keepdim=True)
        shares = maps[name] / torch.where(largest > 0, largest, 1)
        return torch.tanh(GAMMA * shares) if name in lifted else shares

    return _fused(subject, layers, map(scaled, maps))


def zoomcam(subject: Subject, *, layers: Layers = None) -> MethodOutput:
    """Zoom-CAM: maximum over layers of U(N(ReLU(sum_k A_k G_k))) (Shi et al. 2020, eq. 4-6)."""
    maps, _ = _maps_of_layers(subject, layers, positive=False)
    return _fused(subject, layers, map(normalize, maps.values()))


def guided_backprop(subject: Subject) -> MethodOutput:
    """Guided Backpropagation: dy/dX, at each ReLU only where input and gradient are positive.

    Springenberg et al. 2015, section 3.4; summed over the input's channels, of BOTH signs.
    """
    return MethodOutput(maps=_guided(subject))


def guided_gradcam(subject: Subject) -> MethodOutput:
    """Guided Backpropagation times U(Grad-CAM), signed (Selvaraju et al. 2017, sec. 3.2)."""
    gradients = subject.gradients
    coarse = draw(closed_forms.gradcam(gradients), subject.activations)
    return MethodOutput(maps=_guided(subject) * resize(coarse, _size(subject)))


def _guided(subject: Subject) -> Tensor:
    gradient = subject.input_gradient(guided=True)
    if subject.network.layout == "bkl":
        # [B C L] or [B L]: one row of positions.
        gradient = gradient.reshape(len(gradient), -1, 1, gradient.shape[-1])
    return gradient.sum(1)


def _product(gradients: Tensor, activations: Tensor) -> Tensor:
    return (gradients * activations).sum(1).clamp(min=0)


def _maps_of_layers(
    subject: Subject, layers: tuple[str, ...] | None, positive: bool
) -> tuple[dict[str, Tensor], str]:
    """Return each layer's map `[B h w]` by its name, and the deepest; None: the network's own."""

    def product(gradient: Tensor, activations: Tensor) -> Tensor:
        return _product(gradient.clamp(min=0) if positive else gradient, activations)

    if layers is None:
        own, gradients = subject.network.layer, subject.gradients
        return {own: product(gradients, subject.activations)}, own
    with subject.several(layers) as run:
        subject.passes.head_backwards += len(subject)
        found = run.vjp(subject.mean_cotangents(run.features))
        maps = dict(zip(run.layers, map(product, found, run.activations), strict=True))
        return maps, run.layers[run.depth.index(max(run.depth))]


def _fused(subject: Subject, layers: Layers, maps: Iterable[Tensor]) -> MethodOutput:
    """Return the maximum of layers' maps at the input's size; the network's own as it is."""
    size = _size(subject)
    drawn = [one if layers is None else resize(one, size) for one in maps]
    return MethodOutput(maps=torch.stack(drawn).amax(0))


def _size(subject: Subject) -> tuple[int, int]:
    sides = subject.images.shape
    return (1 if subject.network.layout == "bkl" else sides[-2], sides[-1])
