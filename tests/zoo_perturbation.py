"""Oracles of decomposition and perturbation: the papers' formulas as slow loops in float64."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import oracles
import torch
from torch import Tensor
from zoo_cases import Case, Expected

Array = np.ndarray


def under_mask(image: Tensor, mask: Array, fill: float) -> Tensor:
    """X m + fill (1 - m), pixel by pixel."""
    m = torch.from_numpy(mask)
    return torch.stack([channel * m + fill * (1 - m) for channel in image])


def first_vector(matrix: Array) -> Array:
    """v_1 of `[Z K]` with the sign that makes the map sum to at least 0."""
    if not matrix.any():
        return np.zeros(matrix.shape[1])
    v = np.linalg.svd(matrix, full_matrices=True)[2][0]
    return -v if sum((matrix @ v).tolist()) < 0 else v


def as_matrix(maps: Array) -> Array:
    """`[K h w]` -> `[h w, K]`, one row a position."""
    return np.array([maps[:, i, j] for i, j in np.ndindex(maps.shape[1:])])


def eigencam(case: Case) -> Expected:
    """Project A on its first right singular vector."""
    A = case.trunk(case.image).detach().numpy()
    return Expected(weights=first_vector(as_matrix(A)))


def eigengradcam(case: Case) -> Expected:
    """Project G A on its first right singular vector; weights are mean G times it."""
    A, G = case.gradient(case.image)
    matrix = as_matrix(A * G)
    v = first_vector(matrix)
    projected = (matrix @ v).reshape(A.shape[1:])
    means = np.array([sum(g.ravel().tolist()) / g.size for g in G])
    return Expected(weights=means * v, map=np.maximum(projected, 0))


def scorecam(case: Case, weights="raw", temperature=1.0, fill=0.0) -> Expected:
    """f(X * N(U(A_k))) - f(X_b), one channel at a time."""
    A = case.trunk(case.image).detach().numpy()
    size = tuple(case.image.shape[1:])
    baseline = case.score_of_image(torch.full_like(case.image, fill))
    raw: dict[int, float] = {}
    for k, channel in enumerate(A):
        if channel.max() == channel.min():
            continue
        mask = oracles.min_max(oracles.bilinear(channel, *size))
        raw[k] = case.score_of_image(under_mask(case.image, mask, fill)) - baseline
    if weights == "softmax":
        total = sum(math.exp(s / temperature) for s in raw.values())
        raw = {k: math.exp(s / temperature) / total for k, s in raw.items()}
    return Expected(weights=np.array([raw.get(k, 0.0) for k in range(len(A))]))


def ablationcam(case: Case) -> Expected:
    """y - y_k, with channel k of the activations set to 0."""
    with torch.no_grad():
        A = case.trunk(case.image)
        y = float(case.score(case.head(A)))
        found = []
        for k in range(len(A)):
            without = A.clone()
            without[k] = 0.0
            found.append(y - float(case.score(case.head(without))))
    return Expected(weights=np.array(found))


def rise_masks(size: tuple[int, int], masks, cells, probability) -> Iterator[Array]:
    """The masks of the paper, from the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(masks, cells, cells, generator=generator) < probability).double().numpy()
    ch, cw = math.ceil(size[0] / cells), math.ceil(size[1] / cells)
    rows = torch.randint(ch, (masks,), generator=generator).tolist()
    columns = torch.randint(cw, (masks,), generator=generator).tolist()
    for grid, y, x in zip(drawn, rows, columns, strict=True):
        large = oracles.bilinear(grid, (cells + 1) * ch, (cells + 1) * cw)
        yield large[y : y + size[0], x : x + size[1]]


def rise(case: Case, masks=2000, cells=7, probability=0.5, fill=0.0) -> Expected:
    """sum_i (f(X M_i) - mean f) M_i / (n p), negative values cut."""
    every = list(rise_masks(tuple(case.image.shape[1:]), masks, cells, probability))
    scores = [case.score_of_image(under_mask(case.image, mask, fill)) for mask in every]
    mean = sum(scores) / masks
    total = np.zeros(every[0].shape)
    for score, mask in zip(scores, every, strict=True):
        total += (score - mean) * mask
    return Expected(map=np.maximum(total / (masks * probability), 0))


def grid_labels(size: tuple[int, int], segments: int) -> Array:
    """Cells of a regular grid, pixel by pixel."""
    side = math.sqrt(size[0] * size[1] / segments)
    rows = min(size[0], max(1, round(size[0] / side)))
    columns = min(size[1], max(1, round(size[1] / side)))
    labels = np.zeros(size, int)
    for i, j in np.ndindex(size):
        labels[i, j] = (i * rows // size[0]) * columns + j * columns // size[1]
    return labels


def slic_labels(image: Tensor, segments: int) -> Array:
    """Superpixels from the library."""
    from skimage.segmentation import slic

    pixels = np.moveaxis(image.numpy(), 0, -1)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    labels = slic(pixels, segments, sigma=1, convert2lab=True, channel_axis=-1, start_label=0)
    names = sorted(set(labels.ravel().tolist()))
    return np.vectorize(names.index)(labels)


def cosine_to_ones(vector: Array) -> float:
    """The cosine of a vector to the vector of ones; 0 for a vector of zeros."""
    length = math.sqrt(sum(v * v for v in vector.tolist()))
    return sum(vector.tolist()) / (length * math.sqrt(len(vector))) if length else 0.0


def weighted_ridge(X: Array, y: Array, weights: Array, penalty: float) -> Array:
    """argmin_b,c sum_i w_i (y_i - c - x_i b)^2 + penalty |b|^2, by the normal equations."""
    n, d = X.shape
    left, right = np.zeros((d + 1, d + 1)), np.zeros(d + 1)
    for i in range(n):
        row = np.append(X[i], 1.0)
        left += weights[i] * np.outer(row, row)
        right += weights[i] * y[i] * row
    for k in range(d):
        left[k, k] += penalty
    return np.linalg.solve(left, right)[:d]


def lime(
    case: Case, samples=1000, superpixels="grid", segments=50, kernel=0.25, ridge=1.0, fill=0.0
) -> Expected:
    """A ridge regression of scores on the presence of superpixels, negative values cut."""
    if superpixels == "slic":
        labels = slic_labels(case.image, segments)
    else:
        labels = grid_labels(tuple(case.image.shape[1:]), segments)
    d = labels.max() + 1
    generator = torch.Generator().manual_seed(0)
    present = torch.randint(2, (samples, int(d)), generator=generator).double().numpy()
    present[0] = 1.0
    scores, weights = np.zeros(samples), np.zeros(samples)
    for i, vector in enumerate(present):
        scores[i] = case.score_of_image(under_mask(case.image, vector[labels], fill))
        weights[i] = math.exp(-((1 - cosine_to_ones(vector)) ** 2) / kernel**2)
    return Expected(map=np.maximum(weighted_ridge(present, scores, weights, ridge)[labels], 0))


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last is flush with the border."""
    inside = [place for place in range(side) if place % stride == 0 and place + window <= side]
    return inside if inside[-1] == side - window else [*inside, side - window]


def sbsm(case: Case, window=None, stride=None, fill=0.0) -> Expected:
    """sum_i max(d_i - d, 0) (1 - M_i) / sum_i (1 - M_i), d = -y."""
    H, W = case.image.shape[1:]
    h, w = window or (max(1, round(H * 50 / 224)), max(1, round(W * 50 / 224)))
    down, across = stride or (max(1, round(H * 20 / 224)), max(1, round(W * 20 / 224)))
    distance = -case.score_of_image(case.image)
    total, count = np.zeros((H, W)), np.zeros((H, W))
    for y in starts(H, h, down):
        for x in starts(W, w, across):
            mask = np.ones((H, W))
            mask[y : y + h, x : x + w] = 0.0
            farther = -case.score_of_image(under_mask(case.image, mask, fill)) - distance
            total += max(farther, 0.0) * (1 - mask)
            count += 1 - mask
    return Expected(map=total / np.where(count > 0, count, 1))


ORACLES: dict[str, Callable[..., Expected]] = {
    "eigencam": eigencam,
    "eigengradcam": eigengradcam,
    "scorecam": scorecam,
    "ablationcam": ablationcam,
    "rise": rise,
    "lime": lime,
    "sbsm": sbsm,
}
