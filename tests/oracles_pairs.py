"""Receipts of a pair once more, as slow literal loops over the head's whole Jacobian."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def jacobian(head: Callable[[Tensor], Tensor], activations: Array) -> Array:
    """dz_d / dA_kij, `[D K H W]`, one backward pass a number of z."""
    maps = torch.tensor(activations, dtype=torch.float64)[None].requires_grad_()
    z = head(maps)[0]
    rows = [torch.autograd.grad(one, maps, retain_graph=True)[0][0].numpy() for one in z]
    return np.stack(rows)


def cell_vector(J: Array, A: Array, norm: float, row: int, column: int) -> list[float]:
    """sum_k dz_d/dA_kij A_kij / |z| for every d."""
    width, channels = J.shape[:2]
    return [
        sum(J[d, k, row, column] * A[k, row, column] for k in range(channels)) / norm
        for d in range(width)
    ]


def contributions(J: Array, A: Array, norm: float, direction: Array) -> Array:
    """sum_d dz_d/dA_kij A_kij c_d / |z|, `[K H W]`."""
    total = np.zeros(A.shape)
    for d, k, i, j in np.ndindex(J.shape):
        total[k, i, j] += J[d, k, i, j] * A[k, i, j] * direction[d] / norm
    return total


def pair_product(one: list[float], other: list[float], mean: Array, n: int, m: int) -> float:
    """(v - mean / n) . (v' - mean / m), n and m the numbers of cells."""
    return sum(
        (a - mean[d] / n) * (b - mean[d] / m)
        for d, (a, b) in enumerate(zip(one, other, strict=True))
    )


def greedy_links(matrix: Array, n: int) -> list[tuple[tuple[int, ...], float]]:
    """The largest positive entry, then the largest that is allowed beside those, and so on."""
    found: list[tuple[tuple[int, ...], float]] = []
    for place in sorted(np.ndindex(*matrix.shape), key=lambda at: -matrix[at]):
        if matrix[place] > 0 and all(allowed(place, taken) for taken, _ in found):
            found.append((place, float(matrix[place])))
    return found[:n]


def allowed(place: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    """Neither cell is used, and not both touch those used together."""
    i, j, k, m = (abs(a - b) for a, b in zip(place, taken, strict=True))
    used = i == j == 0 or k == m == 0
    return not used and not (i <= 1 and j <= 1 and k <= 1 and m <= 1)
