"""Slow, literal re-implementations of the papers' equations: what the fast code is judged by.

Nothing here imports embedcam. `tests/test_oracles.py` breaks each and watches a check notice.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Head = Score = Callable[[Tensor], Tensor]
Triplets = Sequence[tuple[int, int]]  # (positive, negative) of one anchor


def squared_distance(a: Array, b: Array) -> float:
    """D(a, b), squared Euclidean."""
    return sum((x - y) * (x - y) for x, y in zip(a.tolist(), b.tolist(), strict=True))


def triplet_loss(a: Array, p: Array, n: Array, delta: float) -> float:
    """L_tri = [D(a, p) - D(a, n) + delta]_+ ."""
    return max(squared_distance(a, p) - squared_distance(a, n) + delta, 0.0)


def margin(a: Array, p: Array, n: Array) -> float:
    """y = D(a, n) - D(a, p): larger where the anchor is nearer to its positive."""
    return squared_distance(a, n) - squared_distance(a, p)


def margin_gradient(a: Array, p: Array, n: Array) -> Array:
    """dy/da by central differences, one coordinate at a time: knows no closed form."""
    step, out = 1e-4, np.zeros(a.size)
    for i in range(a.size):
        move = step * (np.arange(a.size) == i)
        out[i] = (margin(a + move, p, n) - margin(a - move, p, n)) / (2 * step)
    return out


def hinge_is_satisfied(a: Array, p: Array, n: Array, delta: float) -> bool:
    """Whether the loss is exactly zero, so that this triplet says nothing."""
    return triplet_loss(a, p, n, delta) == 0.0


def centred_target(embeddings: Array, i: int) -> Array:
    """f_i - mean(f), the mean over every image, the i-th included."""
    n, d = embeddings.shape
    totals = [sum(float(embeddings[row, j]) for row in range(n)) for j in range(d)]
    return np.array([float(embeddings[i, j]) - total / n for j, total in enumerate(totals)])


def _distance(f: Tensor, g: Tensor) -> Tensor:
    return ((f - g) ** 2).sum()


def gradient(head, activations, score, *, normalize, norm) -> Tensor:
    """G = d score / dA for one image [K H W], `around` handing z the gradient at f = z / |z|."""
    A = activations.detach().double().clone().requires_grad_(True)
    z = head(A.unsqueeze(0))[0]
    if not normalize:
        return torch.autograd.grad(score(z), A)[0]
    if norm == "through":
        return torch.autograd.grad(score(z / z.norm()), A)[0]
    assert norm == "around"
    f = (z / z.norm()).detach().requires_grad_(True)
    (at_f,) = torch.autograd.grad(score(f), f)
    return torch.autograd.grad((z * at_f).sum(), A)[0]


def margin_score(p: Tensor, n: Tensor) -> Score:
    """y(f) = D(f, n) - D(f, p), p and n held constant."""
    return lambda f: _distance(f, n.double()) - _distance(f, p.double())


def dot_score(c: Tensor) -> Score:
    """y(f) = f . c, c held constant: the centred target with c = f_r - mean f."""
    return lambda f: (f * c.double()).sum()


def gradcam_weights(G: Tensor) -> Array:
    """alpha_k = (1/Z) sum_ij G_ij^k (Selvaraju et al. 2017, equation 1)."""
    K, H, W = G.shape
    totals = [sum(float(G[k, i, j]) for i, j in np.ndindex(H, W)) for k in range(K)]
    return np.array([total / (H * W) for total in totals])


def gradcampp_weights(G: Tensor, activations: Tensor) -> Array:
    """w_k = sum_ij a ReLU(G), a = 1 / (2 + S_k G), S_k = sum_ij max(A, 0) (Chattopadhay 2018)."""
    K, H, W = G.shape
    out = np.zeros(K)
    for k in range(K):
        S = sum(max(float(activations[k, i, j]), 0.0) for i, j in np.ndindex(H, W))
        for i, j in np.ndindex(H, W):
            g = float(G[k, i, j])
            if g > 0.0:
                out[k] += g / (2.0 + S * g)
    return out


def gradcampp_weights_as_printed(G: Tensor, activations: Tensor) -> Array:
    """The same from the paper's own fraction G^2 / (2 G^2 + S G^3), equation 19; needs A >= 0."""
    K, H, W = G.shape
    out = np.zeros(K)
    for k in range(K):
        S = sum(float(activations[k, i, j]) for i, j in np.ndindex(H, W))
        for i, j in np.ndindex(H, W):
            g = float(G[k, i, j])
            if g != 0.0:
                out[k] += max(g, 0.0) * g**2 / (2.0 * g**2 + S * g**3)
    return out


def averaged_weights(
    head, activations, embedding, embeddings, triplets, *, method="gradcam", hinge=None, **how
) -> tuple[Array, int]:
    """Mean of the weights of each triplet's margin whose hinge is not satisfied, and how many."""
    total = np.zeros(activations.shape if method == "hirescam" else activations.shape[0])
    used = 0
    for p, n in triplets:
        if hinge is not None and hinge_is_satisfied(embedding, embeddings[p], embeddings[n], hinge):
            continue
        score = margin_score(torch.from_numpy(embeddings[p]), torch.from_numpy(embeddings[n]))
        total += target_weights(head, activations, score, method=method, **how)
        used += 1
    return (total / used if used else total), used


def target_weights(head, activations, score, *, method="gradcam", normalize=True, norm="through"):
    """Channel weights [K] of one score of one image's embedding; of HiResCAM G, [K H W]."""
    G = gradient(head, activations, score, normalize=normalize, norm=norm)
    if method == "hirescam":
        return G.numpy()
    if method == "gradcam":
        return gradcam_weights(G)
    assert method == "gradcam++"
    return gradcampp_weights(G, activations)


def every_triplet(labels: Sequence[object], anchor: int) -> list[tuple[int, int]]:
    """All (positive, negative) of an anchor: its class without itself x every other class."""
    return [
        (p, n)
        for p, label_p in enumerate(labels)
        for n, label_n in enumerate(labels)
        if not (p == anchor or label_p != labels[anchor]) and label_n != labels[anchor]
    ]


def mean_cotangent(embeddings: Array, triplets: Triplets) -> Array:
    """Mean over the triplets of dy/df_a = 2 (f_p - f_n), one triplet at a time."""
    total = np.zeros(embeddings.shape[1])
    for (p, n), d in product(triplets, range(total.size)):
        total[d] += 2.0 * (float(embeddings[p, d]) - float(embeddings[n, d]))
    return total / len(triplets)


def top_m(weights: Array, m: int, by: str) -> Array:
    """The m largest of one vector [K] kept, zero elsewhere: `signed` value or `magnitude`."""
    out = np.zeros(len(weights))
    left = list(range(len(weights)))
    for _ in range(min(m, len(weights))):
        best = left[0]
        for k in left:
            here, there = float(weights[k]), float(weights[best])
            if by == "magnitude":
                here, there = abs(here), abs(there)
            if here > there:
                best = k
        out[best] = float(weights[best])
        left.remove(best)
    return out


def low_rank_decode(codes: Array, basis: Array, offset: Array) -> Array:
    """offset + sum_r code_r basis_r for one code [R]."""
    R, K = basis.shape
    parts = [sum(float(codes[r]) * float(basis[r, k]) for r in range(R)) for k in range(K)]
    return np.array([float(offset[k]) + part for k, part in enumerate(parts)])


def best_rank_error(rows: Array, offset: Array, rank: int) -> float:
    """The least squared error of any rank-R basis: the scatter's smallest eigenvalues' sum."""
    K = rows.shape[1]
    scatter = np.zeros((K, K))
    for row in rows.astype(np.float64):
        scatter += np.outer(row - offset, row - offset)
    return float(np.linalg.eigvalsh(scatter)[: max(K - rank, 0)].sum())


def half(value: float) -> float:
    """The nearest half-precision number, by the IEEE conversion of the standard library."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def half_bound(vector: Array) -> Array:
    """Half an ulp of half precision with one scale a vector, and roundings of single precision."""
    scale = max((abs(float(v)) for v in vector), default=0.0)
    return np.array(
        [max(2.0**-11 * abs(float(v)), 2.0**-25 * scale) + 2.0**-21 * abs(float(v)) for v in vector]
    )


def l2_norm(vector: Array) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in vector))


def transfer_mean(rows: Array) -> Array:
    """Weights divided by their L2 norm, zeros left out, then averaged; one neighbour: as it is."""
    if len(rows) == 1:
        return rows[0].astype(np.float64)
    counted = [row for row in rows if l2_norm(row) > 0]
    total = np.zeros(rows.shape[1])
    for row, k in product(counted, range(len(total))):
        length = l2_norm(row)
        total[k] += float(row[k]) / length
    return total / max(len(counted), 1)


def rival_weights(result: Array, rival: Array) -> Array:
    """The result's weights divided by their L2 norm, less the rival's divided by theirs."""
    ours, theirs = l2_norm(result), l2_norm(rival)
    difference = np.zeros(len(result))
    for k in range(len(result)):
        difference[k] += float(result[k]) / ours if ours > 0 else 0.0
        difference[k] -= float(rival[k]) / theirs if theirs > 0 else 0.0
    return difference


def distance_shares(squared: Sequence[float]) -> list[float]:
    """Shares of the neighbours: 1 / Euclidean distance, exact matches take all; they sum to 1."""
    exact = [s == 0.0 for s in squared]
    raw = [1.0 if e else 0.0 for e in exact] if any(exact) else [1 / math.sqrt(s) for s in squared]
    return [r / sum(raw) for r in raw]


def transfer_distance(rows: Array, squared: Sequence[float]) -> Array:
    """As `transfer_mean`, averaged with `distance_shares` in place of equal shares."""
    if len(rows) == 1:
        return rows[0].astype(np.float64)
    counted = [(row, s) for row, s in zip(rows, squared, strict=True) if l2_norm(row) > 0]
    total = np.zeros(rows.shape[1])
    if not counted:
        return total
    for (row, _), share in zip(counted, distance_shares([s for _, s in counted]), strict=True):
        length = l2_norm(row)
        for k in range(len(total)):
            total[k] += share * float(row[k]) / length
    return total


def cam(weights: Array, activations: Array) -> Array:
    """ReLU(sum_k w_k A_k) of one image, [H W]."""
    K, H, W = activations.shape
    out = np.zeros((H, W))
    for i, j in np.ndindex(H, W):
        total = sum(float(weights[k]) * float(activations[k, i, j]) for k in range(K))
        out[i, j] = max(total, 0.0)
    return out


def bilinear(image: Array, height: int, width: int) -> Array:
    """Bilinear resizing with half-pixel centres (align_corners=False), edges repeated."""
    h, w = image.shape
    out = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        y = max((i + 0.5) * h / height - 0.5, 0.0)
        x = max((j + 0.5) * w / width - 0.5, 0.0)
        y0, x0 = min(math.floor(y), h - 1), min(math.floor(x), w - 1)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        fy = y - y0
        fx = x - x0
        top = (1 - fx) * float(image[y0, x0]) + fx * float(image[y0, x1])
        bottom = (1 - fx) * float(image[y1, x0]) + fx * float(image[y1, x1])
        out[i, j] = (1 - fy) * top + fy * bottom
    return out


def _overlap(a0: float, a1: float, b0: float, b1: float) -> float:
    return max(min(a1, b1) - max(a0, b0), 0.0)


def area_average(image: Array, height: int, width: int) -> Array:
    """Each output cell: the mean of the input over the cell's rectangle, by exact areas."""
    h, w = image.shape
    out = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        y0, y1 = i * h / height, (i + 1) * h / height
        x0, x1 = j * w / width, (j + 1) * w / width
        total = 0.0
        for r, c in np.ndindex(h, w):
            area = _overlap(y0, y1, r, r + 1) * _overlap(x0, x1, c, c + 1)
            total += area * float(image[r, c])
        out[i, j] = total / ((y1 - y0) * (x1 - x0))
    return out


def min_max(image: Array) -> Array:
    """(x - min) / (max - min), a constant map to zeros."""
    values = [float(v) for v in image.ravel()]
    low, high = min(values), max(values)
    if high == low:
        return np.zeros(image.shape)
    return np.array([(v - low) / (high - low) for v in values]).reshape(image.shape)


def energy_in_mask(image: Array, mask: Array) -> float:
    """Share of a map's energy inside a mask [H W]; a map of zero energy scores the area's share."""
    inside = total = area = 0.0
    H, W = image.shape
    for i, j in np.ndindex(H, W):
        total += float(image[i, j])
        area += float(mask[i, j])
        inside += float(image[i, j]) * float(mask[i, j])
    return inside / total if total > 0 else area / (H * W)


def box_mask(box: tuple[float, float, float, float], height: int, width: int) -> Array:
    """The part of each pixel [H W] that a box (x0, y0, x1, y1) covers, pixel (i, j) = [j, j+1)."""
    x0, y0, x1, y1 = box
    out = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        out[i, j] = _overlap(y0, y1, i, i + 1) * _overlap(x0, x1, j, j + 1)
    return out


def semihard_allows(embeddings, labels, a, p, n, delta) -> bool:
    """D(a,p) < D(a,n) < D(a,p) + delta; if no negative is so, the nearest beyond the positive."""
    d_p = squared_distance(embeddings[a], embeddings[p])
    d_n = squared_distance(embeddings[a], embeddings[n])
    negatives = [i for i in range(len(labels)) if labels[i] != labels[a]]
    d = {i: squared_distance(embeddings[a], embeddings[i]) for i in negatives}
    if any(d_p < d[i] < d_p + delta for i in negatives):
        return d_p < d_n < d_p + delta
    beyond = [d[i] for i in negatives if d[i] > d_p]
    if beyond:
        return d_n == min(beyond)
    return d_n == max(d.values())  # every negative is nearer than the positive


def nearest(embeddings: Array, a: int, among: Sequence[int], k: int) -> list[int]:
    """The k nearest of `among` to image a, the nearest first; itself never."""
    rest = [i for i in among if i != a]
    return sorted(rest, key=lambda i: (squared_distance(embeddings[a], embeddings[i]), i))[:k]


def sample(ids: Sequence[str], seed: int, most: int) -> list[int]:
    """Places of the `most` ids whose first 8 bytes of BLAKE2b(seed, 0, id) are the smallest."""

    def number(name: str) -> int:
        text = b"%d\x00%b" % (seed, name.encode())
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

    return sorted(sorted(range(len(ids)), key=lambda i: number(ids[i]))[:most])
