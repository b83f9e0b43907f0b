"""Concepts once more, as slow literal loops."""

import numpy as np

Array = np.ndarray


def amounts_in(sums: Array, parts: Array, updates: int = 20000) -> Array:
    """The a >= 0 with least |sums - a V|^2, by multiplicative updates (Lee and Seung, 2001)."""
    a = np.ones(len(parts))
    for _ in range(updates):
        for p in range(len(parts)):
            above = sum(sums[k] * parts[p, k] for k in range(len(sums)))
            below = sum((a @ parts)[k] * parts[p, k] for k in range(len(sums)))
            a[p] *= above / below if below else 0
    return a


def shares_in(activations: Array, parts: Array, amounts: Array) -> Array:
    """a_p V_pk over its sum over p, of signed channels of both halves together; `[P K]`."""
    n = len(activations)
    shares = np.zeros((len(parts), n))
    for k in range(n):
        halves = range(k, parts.shape[1], n)
        each = [sum(amounts[p] * parts[p, j] for j in halves) for p in range(len(parts))]
        for p in range(len(parts)):
            shares[p, k] = each[p] / sum(each) if sum(each) else 0
    return shares


def factorised(sample: Array, n: int, updates: int = 400) -> float:
    """The least |X - W V|^2 that multiplicative updates of both reach from a seeded start."""
    rng = np.random.default_rng(0)
    W, V = rng.random((len(sample), n)), rng.random((n, sample.shape[1]))
    for _ in range(updates):
        V *= (W.T @ sample) / (W.T @ W @ V + 1e-12)
        W *= (sample @ V.T) / (W @ V @ V.T + 1e-12)
    return float(((sample - W @ V) ** 2).sum())


def largest(activations: Array, channel: int, n: int) -> list[tuple[float, int, int]]:
    """(value, image, position) of the n images `[N K H W]` where a channel is largest."""
    found = []
    for image, maps in enumerate(activations):
        best = (-np.inf, 0)
        for cell, value in enumerate(maps[channel].ravel()):
            if value > best[0]:
                best = (float(value), cell)
        found.append((best[0], image, best[1]))
    return sorted(found, key=lambda one: (-one[0], one[1]))[:n]
