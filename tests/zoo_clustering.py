"""Literal oracles of Group-CAM, Cluster-CAM, Cosine-CAM and Poly-CAM; clusters by exhaustion."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from oracles import bilinear, cam, gradcam_weights, min_max
from zoo_cases import Case, Expected

Array = np.ndarray
Groups = list[list[int]]


def partitions(n: int, k: int) -> Iterator[Groups]:
    """Every way to part 0 .. n - 1 into k groups, none of them empty."""

    def grow(labels: list[int]) -> Iterator[list[int]]:
        if len(labels) == n:
            if max(labels, default=-1) + 1 == k:
                yield labels
            return
        for label in range(min(max(labels, default=-1) + 2, k)):
            yield from grow([*labels, label])

    for labels in grow([]):
        yield [[i for i in range(n) if labels[i] == g] for g in range(k)]


def spread(points: Array, group: list[int]) -> float:
    """The sum of squared distances to the group's mean."""
    centre = sum(points[i] for i in group) / len(group)
    return float(sum(((points[i] - centre) ** 2).sum() for i in group))


def best_kmeans(points: Array, k: int) -> Groups:
    """The least sum of spreads of all partitions."""
    return min(partitions(len(points), k), key=lambda way: sum(spread(points, g) for g in way))


def ward(points: Array, k: int) -> Groups:
    """Merging, again and again, the two groups whose union adds the least spread."""
    groups = [[i] for i in range(len(points))]
    while len(groups) > k:
        added = {
            (a, b): spread(points, groups[a] + groups[b])
            - spread(points, groups[a])
            - spread(points, groups[b])
            for a in range(len(groups))
            for b in range(a)
        }
        a, b = min(added, key=added.__getitem__)
        groups = [g for i, g in enumerate(groups) if i not in (a, b)] + [groups[a] + groups[b]]
    return groups


def normalised_cuts(points: Array, k: int) -> Groups:
    """Best k-means over the k slowest eigenvectors of the graph's random walk."""
    n = len(points)
    square = np.array([[((points[i] - points[j]) ** 2).sum() for j in range(n)] for i in range(n)])
    usual = np.median([square[i, j] for i in range(n) for j in range(n) if i != j])
    near = np.exp(-square / (2 * usual))
    # A vertex is no neighbour of its own.
    np.fill_diagonal(near, 0)
    degree = near.sum(1)
    walk = np.eye(n) - near / np.sqrt(degree[:, None] * degree[None])
    vectors = np.linalg.eigh(walk)[1][:, :k] / np.sqrt(degree)[:, None]
    return best_kmeans(vectors, k)


def parted(maps: Array, k: int, how: str, *, unit: bool = False) -> Groups:
    """Groups of the maps that are not flat; at most as many as there are of them."""
    seen = [i for i in range(len(maps)) if maps[i].max() > maps[i].min()]
    points = [maps[i].ravel() for i in seen]
    if unit:
        points = [p / math.sqrt(float((p**2).sum())) for p in points]
    if len(seen) <= k:
        return [[i] for i in seen]
    find = {"kmeans": best_kmeans, "agglomerative": ward, "spectral": normalised_cuts}[how]
    return [[seen[i] for i in group] for group in find(np.array(points), k)]


def blur(image: Array, size: int = 51, sigma: float = 50.0) -> Array:
    """Gaussian blur `[C H W]`, borders reflected; at most as far as the picture reaches."""
    out = image.astype(np.float64)
    for axis in (1, 2):
        side = out.shape[axis]
        reach = min(size // 2, side - 1)
        kernel = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
        total = sum(kernel)
        rows = np.moveaxis(out, axis, 0)
        made = np.zeros_like(rows)
        for i in range(side):
            for d in range(-reach, reach + 1):
                j = abs(i + d)
                j = 2 * (side - 1) - j if j >= side else j
                made[i] += kernel[d + reach] / total * rows[j]
        out = np.moveaxis(made, 0, axis)
    return out


def seen_through(case: Case, drawn: Array, background: Array) -> float:
    """y(X m + F (1 - m)), m = N(U(map))."""
    image = case.image.numpy()
    m = min_max(bilinear(drawn, *image.shape[1:]))
    return case.score_of_image(torch.from_numpy(image * m + background * (1 - m)))


def is_flat(drawn: Array) -> bool:
    return bool(drawn.max() == drawn.min())


def percentile_cut(drawn: Array, percentile: float | None) -> Array:
    """phi(h, theta) = h where h > the percentile of all values, else 0."""
    if percentile is None:
        return drawn
    return np.where(drawn > np.percentile(drawn, percentile), drawn, 0.0)


def weighed(case: Case) -> tuple[Array, Array, Array]:
    """A, Grad-CAM's alpha, and alpha_k A_k."""
    A, G = case.gradient(case.image)
    alpha = gradcam_weights(torch.from_numpy(G))
    return A, alpha, np.array([alpha[k] * A[k] for k in range(len(A))])


def groupcam(case: Case, groups=32, clustering="contiguous", percentile=70.0) -> Expected:
    A, alpha, parts = weighed(case)
    if clustering == "contiguous":
        size = math.ceil(len(A) / groups)
        members = [list(range(len(A)))[i : i + size] for i in range(0, len(A), size)]
    else:
        members = parted(parts, groups, clustering)
    background = blur(case.image.numpy())
    base = case.score_of_image(torch.from_numpy(background))
    weights, drawn = np.zeros(len(A)), np.zeros(A.shape[1:])
    for group in members:
        H = percentile_cut(np.maximum(sum(parts[k] for k in group), 0.0), percentile)
        if is_flat(H):
            continue
        gain = max(seen_through(case, H, background) - base, 0.0)
        drawn += gain * H
        for k in group:
            weights[k] = gain * alpha[k]
    return Expected(weights, np.maximum(drawn, 0.0))


def clustercam(
    case: Case, n_clusters=8, clustering="kmeans", view="difference", weighing="equal", fill=0.0
) -> Expected:
    A, _, _ = weighed(case)
    if weighing == "scored":
        return scored_clustercam(case, n_clusters, clustering, view)
    groups = parted(A, n_clusters, clustering)
    if not groups:
        return Expected(np.zeros(len(A)), np.zeros(A.shape[1:]))
    means = [sum(A[k] for k in group) / len(group) for group in groups]
    background = np.full(case.image.shape, fill)
    scores = [seen_through(case, mean, background) for mean in means]
    base, scissors = int(np.argmax(scores)), int(np.argmin(scores))
    drawn, weights = np.zeros(A.shape[1:]), np.zeros(len(A))
    for place, sign, role in ((base, 1.0, "base"), (scissors, -1.0, "scissors")):
        if view not in (role, "difference"):
            continue
        sign = 1.0 if view == role else sign
        drawn += sign * min_max(means[place])
        span = means[place].max() - means[place].min()
        for k in groups[place]:
            weights[k] += sign / (len(groups[place]) * span)
    return Expected(weights, np.maximum(drawn, 0.0))


def scored_clustercam(case: Case, n_clusters: int, clustering: str, view: str) -> Expected:
    """+v on the best group's mean, -(1 - v) on the worst's."""
    A, alpha, parts = weighed(case)
    groups = parted(parts, n_clusters, clustering)
    means = [sum(parts[k] for k in group) / len(group) for group in groups]
    scores = unit_gains(case, means)
    base, scissors = int(np.argmax(scores)), int(np.argmin(scores))
    v = scores[base]
    weights, difference = np.zeros(len(A)), {base: v, scissors: -(1 - v)}
    shares = {"base": {base: v}, "scissors": {scissors: 1 - v}, "difference": difference}
    for place, value in shares[view].items():
        for k in groups[place]:
            weights[k] = value * alpha[k] / len(groups[place])
    return Expected(weights, cam(weights, A))


def unit_gains(case: Case, means: list[Array]) -> list[float]:
    background = blur(case.image.numpy())
    base = case.score_of_image(torch.from_numpy(background))
    gains = [seen_through(case, mean, background) - base for mean in means]
    length = math.sqrt(sum(gain**2 for gain in gains))
    return [gain / length for gain in gains]


def cosinecam(case: Case, *, n_clusters: int = 8) -> Expected:
    A, alpha, parts = weighed(case)
    groups = parted(parts, n_clusters, "kmeans", unit=True)
    means = [sum(parts[k] for k in group) / len(group) for group in groups]
    scores = unit_gains(case, means)
    drawn, weights = np.zeros(A.shape[1:]), np.zeros(len(A))
    for score, mean, group in zip(scores, means, groups, strict=True):
        drawn += score * mean
        for k in group:
            weights[k] = score * alpha[k] / len(group)
    return Expected(weights, np.maximum(drawn, 0.0))


def layer_output(case: Case, layer: str) -> Array:
    """A of "features" or "features.<i>", run one by one so that no unit works in place on it."""
    parts = list(case.module.features)
    last = len(parts) - 1 if layer == "features" else int(layer.split(".")[1])
    out = case.image[None]
    with torch.no_grad():
        for part in parts[: last + 1]:
            out = part(out.clone())
    return out[0].numpy()


def polycam(
    case: Case, layers=("features.1", "features"), variant="both", fill=0.0, baseline=True
) -> Expected:
    """`layers` from the shallowest to the deepest."""
    image = case.image.numpy()
    whole = case.score_of_image(case.image)
    empty = case.score_of_image(torch.full_like(case.image, fill)) if baseline else 0.0
    P: Array | None = None
    found: dict[str, Array] = {}
    for layer in reversed(layers):
        A = layer_output(case, layer)
        weights = np.zeros(len(A))
        for k in range(len(A)):
            if is_flat(A[k]):
                continue
            m = min_max(bilinear(A[k], *image.shape[1:]))
            kept = case.score_of_image(torch.from_numpy(image * m + fill * (1 - m)))
            lost = case.score_of_image(torch.from_numpy(image * (1 - m) + fill * m))
            weights[k] = {
                "plus": kept - empty,
                "minus": max(whole - lost, 0.0),
                "both": max(kept - empty + whole - lost, 0.0),
            }[variant]
        found[layer] = weights
        R = cam(weights, A)
        P = R if P is None else sharpened(R, P)
    return Expected(map=P, layers=found)


def sharpened(R: Array, P: Array) -> Array:
    """L(R) U(P), L(R) = R / U(D(R))."""
    finer = bilinear(P, *R.shape)
    around = bilinear(bilinear(R, *P.shape), *R.shape)
    out = np.zeros(R.shape)
    for place in np.ndindex(R.shape):
        if around[place] > 0:
            out[place] = R[place] / around[place] * finer[place]
    return out


ORACLES = {one.__name__: one for one in (groupcam, clustercam, cosinecam, polycam)}
