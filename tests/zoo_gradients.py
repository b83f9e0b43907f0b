"""Oracles of the gradient methods: the papers' formulas as loops, in double precision."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from oracles import bilinear, gradcam_weights, min_max
from oracles import cam as cam_map
from torch import Tensor, nn
from zoo_cases import Case, Expected

Array = np.ndarray


def cells(grid: Array) -> list[float]:
    """All numbers of one channel, row by row."""
    return [float(value) for row in grid for value in row]


def cam(case: Case) -> Expected:
    """w_k = sum_d W_dk dy/dz_d, W of the one linear layer (Zhou et al. 2016)."""
    A = case.trunk(case.image).detach()
    z = case.head(A).detach().requires_grad_()
    (at_z,) = torch.autograd.grad(case.score(z), z)
    W = case.module.head.linear.weight.detach()
    pairs = [list(zip(column.tolist(), at_z.tolist(), strict=True)) for column in W.T]
    return Expected(np.array([sum(w * c for w, c in column) for column in pairs]))


def gradcam(case: Case) -> Expected:
    """alpha_k = (1/Z) sum_ij G_ij (Selvaraju et al. 2017, eq. 1)."""
    return Expected(gradcam_weights(case.gradient(case.image)[1]))


def gradcam_plus_plus(case: Case) -> Expected:
    """Eq. 10 and 19 of Chattopadhay et al. 2018 as printed, for each triplet, then their mean."""
    every = []
    for triplet in range(len(case.scores)):
        A, G = case.gradient(case.image, triplet)
        every.append([_plus_plus(A[k], G[k], G[k] ** 2, G[k] ** 3) for k in range(len(G))])
    return Expected(np.mean(every, axis=0))


def _plus_plus(A: Array, m1: Array, m2: Array, m3: Array) -> float:
    """sum_ij a ReLU(m1), a = m2 / (2 m2 + (sum A) m3), of one channel; A counts where positive."""
    S = sum(max(value, 0.0) for value in cells(A))
    total = 0.0
    for first, second, third in zip(cells(m1), cells(m2), cells(m3), strict=True):
        if second == 0.0:
            continue
        # The pole: a stays at most 1.
        total += max(first, 0.0) * second / max(2.0 * second + S * third, second)
    return total


def smooth_gradcam_plus_plus(case: Case, samples=25, sigma=0.15, seed=0) -> Expected:
    """Omeiza et al. 2019: moments of G over noisy images, A of the clean one, triplets apart."""
    spread = sigma * float(case.image.max() - case.image.min())
    generator = torch.Generator().manual_seed(seed)
    noisy = [
        case.image + spread * torch.randn(case.image.shape, generator=generator, dtype=torch.double)
        for _ in range(samples)
    ]
    A = case.trunk(case.image).detach().numpy()
    every = []
    for triplet in range(len(case.scores)):
        drawn = [case.gradient(image, triplet)[1] for image in noisy]
        m1, m2, m3 = (sum(G**power for G in drawn) / samples for power in (1, 2, 3))
        every.append([_plus_plus(A[k], m1[k], m2[k], m3[k]) for k in range(len(A))])
    return Expected(np.mean(every, axis=0))


def xgradcam(case: Case) -> Expected:
    """w_k = sum_ij (A_ij / sum A) G_ij (Fu et al. 2020, eq. 8); 0 where sum A is 0."""
    A, G = case.gradient(case.image)
    out = np.zeros(len(A))
    for k in range(len(A)):
        total = math.fsum(cells(A[k]))
        if total != 0.0:
            out[k] = sum(a / total * g for a, g in zip(cells(A[k]), cells(G[k]), strict=True))
    return Expected(out)


def integrated_gradcam(case: Case, *, steps: int = 20, baseline: Tensor | None = None) -> Expected:
    """(1/m) sum_t ReLU(sum_k alpha_k(t) (A_k(t) - A_k(0))) and (1/m) sum_t alpha_k(t), t > 0."""
    start = torch.zeros_like(case.image) if baseline is None else baseline
    A0 = case.trunk(start).detach().numpy()
    alphas, maps = [], []
    for step in range(1, steps + 1):
        A, G = case.gradient(start + step / steps * (case.image - start))
        alphas.append(gradcam_weights(G))
        maps.append(cam_map(alphas[-1], A - A0))
    return Expected(np.mean(alphas, axis=0), np.mean(maps, axis=0))


def product_map(A: Array, G: Array) -> Array:
    """ReLU(sum_k G A)."""
    return cam_map(np.ones(len(A)), A * G)


def hirescam(case: Case) -> Expected:
    """G, and ReLU(sum_k G A) (Draelos and Carin 2020)."""
    A, G = case.gradient(case.image)
    return Expected(G, product_map(A, G))


def gradients_at(case: Case, layers: Sequence[str]) -> list[tuple[Array, Array]]:
    """A and dy/dA of stages of the trunk ("features.<n>" or "features"), each cut by itself."""
    stages = list(case.module.features)
    found = []
    for layer in layers:
        cut = len(stages) if layer == "features" else int(layer.split(".")[1]) + 1
        x = case.image[None]
        for stage in stages[:cut]:
            x = stage(x)
        leaf = x.detach().clone().requires_grad_()
        x = leaf.clone()
        for stage in stages[cut:]:
            x = stage(x)
        (G,) = torch.autograd.grad(case.score(case.head(x[0])), leaf)
        found.append((leaf.detach()[0].numpy(), G[0].numpy()))
    return found


def layercam(case: Case, layers: Sequence[str] | None = None, shallow=()) -> Expected:
    """ReLU(sum_k ReLU(G) A) (Jiang et al. 2021, eq. 6-7); several fused by eq. 9 and a maximum."""
    if layers is None:
        A, G = case.gradient(case.image)
        return Expected(map=product_map(A, np.maximum(G, 0)))
    size = (case.image.shape[1], case.image.shape[2])
    drawn = []
    for name, (A, G) in zip(layers, gradients_at(case, layers), strict=True):
        M = product_map(A, np.maximum(G, 0))
        largest = max(cells(M))
        if largest > 0:
            M = np.tanh(2 * M / largest) if name in shallow else M / largest
        drawn.append(bilinear(M, *size))
    return Expected(map=np.max(drawn, axis=0))


def zoomcam(case: Case, *, layers: Sequence[str] | None = None) -> Expected:
    """max over layers of U(N(ReLU(sum_k A G))) (Shi et al. 2020, eq. 4-6)."""
    if layers is None:
        return Expected(map=min_max(product_map(*case.gradient(case.image))))
    size = (case.image.shape[1], case.image.shape[2])
    maps = [min_max(product_map(A, G)) for A, G in gradients_at(case, layers)]
    return Expected(map=np.max([bilinear(M, *size) for M in maps], axis=0))


def _back_through(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Vector times Jacobian of one layer at x, guided where it is a ReLU (eq. in section 3.4)."""
    if isinstance(module, nn.ReLU):
        kept = torch.zeros_like(gradient)
        for index in np.ndindex(*gradient.shape):
            if x[index] > 0 and gradient[index] > 0:
                kept[index] = gradient[index]
        return kept
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(module(leaf), leaf, gradient)[0]


def guided_backprop(case: Case) -> Expected:
    """Springenberg et al. 2015: layer by layer from the score down to the pixels."""
    stages, inputs, x = list(case.module.features), [], case.image[None]
    for stage in stages:
        inputs.append(x.detach().clone())
        x = stage(x.clone()).detach()
    _, G = case.gradient(case.image)
    gradient = torch.from_numpy(G)[None]
    for stage, before in zip(reversed(stages), reversed(inputs), strict=True):
        gradient = _back_through(stage, before, gradient)
    return Expected(map=np.sum([one.numpy() for one in gradient[0]], axis=0))


def guided_gradcam(case: Case) -> Expected:
    """Guided Backpropagation * U(Grad-CAM) (Selvaraju et al. 2017, section 3.2)."""
    A, G = case.gradient(case.image)
    pixels = guided_backprop(case).map
    return Expected(map=pixels * bilinear(cam_map(gradcam_weights(G), A), *pixels.shape))


ORACLES: dict[str, Callable[[Case], Expected]] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "smoothgradcam++": smooth_gradcam_plus_plus,
    "xgradcam": xgradcam,
    "integratedgradcam": integrated_gradcam,
    "hirescam": hirescam,
    "layercam": layercam,
    "zoomcam": zoomcam,
    "guidedbackprop": guided_backprop,
    "guidedgradcam": guided_gradcam,
}
