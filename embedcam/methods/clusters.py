"""Which channels belong together: groups of channel maps, as a matrix of zeros and ones.

The clustering itself is scikit-learn's, in float64 and seeded, so its outcome does not depend on
threads beyond rounding. Flat maps say nothing about where, and belong to no cluster; maps that are
equal (to 1e-6 of the largest value) are one point with a count, so there are never more clusters
than points, and equal maps are never parted.
"""

import numpy as np
import torch
from torch import Tensor

from .masks import flat

RESTARTS = 10
"""Starts of k-means; the best is kept."""
EQUAL = 6
"""Decimals, of maps scaled to a largest value of 1, to which equal maps agree."""


def contiguous(maps: Tensor, groups: int) -> Tensor:
    """Neighbouring channels, ceil(K / groups) in each, the last with what is left.

    Args:
        maps: `[K h w]`.
        groups: how many at most.

    Returns:
        Membership, zeros and ones, `[g K]`.
    """
    size = -(-len(maps) // groups)
    return _membership(np.arange(len(maps)) // size, maps)


def clustered(maps: Tensor, clusters: int, how: str, seed: int, *, unit: bool = False) -> Tensor:
    """Channels whose maps are alike.

    Args:
        maps: one for each channel, `[K h w]`.
        clusters: how many; fewer where there are fewer maps that differ and are not flat.
        how: "kmeans" (Lloyd, k-means++, 10 starts), "spectral" (normalised cuts of the affinity
            exp(-d^2 / (2 median d^2)) over Euclidean distances d) or "agglomerative" (Ward).
        seed: of k-means and of spectral clustering.
        unit: scale each map to length 1 first, so that shape alone decides, and sign.

    Returns:
        Membership, zeros and ones, `[g K]`, groups in the order of their first channel; flat maps
        are in none. `[0 K]` where all maps are flat.
    """
    rows = maps.detach().flatten(1).double().cpu().numpy()
    seen = np.flatnonzero(~flat(maps).cpu().numpy())
    labels = np.full(len(rows), -1)
    if len(seen):
        rows = rows[seen]
        scale = np.abs(rows).max(1, keepdims=True) if unit else np.abs(rows).max()
        rows = rows / scale
        if unit:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        labels[seen] = _labels(rows, clusters, how, _random(seed))
    return _membership(labels, maps)


def _membership(labels: np.ndarray, like: Tensor) -> Tensor:
    """Labels `[K]`, -1 for none, as zeros and ones `[g K]`, by first appearance."""
    names, first = np.unique(labels[labels >= 0], return_index=True)
    ordered = names[np.argsort(first)]
    return torch.from_numpy(labels[None] == ordered[:, None]).to(like)


def _random(seed: int) -> np.random.RandomState:
    # The library's seeds end at 2**32; a seed sequence takes any.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that differ in the order they appear, which of them each row is, and their counts."""
    _, first, which, counts = np.unique(
        np.round(rows, EQUAL) + 0.0, axis=0, return_index=True, return_inverse=True,
        return_counts=True,
    )  # fmt: skip
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[first[order]], place[which.reshape(-1)], counts[order]


def _labels(rows: np.ndarray, clusters: int, how: str, random: np.random.RandomState) -> np.ndarray:
    """A label for each row `[n d]`, with at most as many clusters as rows that differ."""
    points, which, counts = _distinct(rows)
    clusters = min(clusters, len(points))
    if clusters == len(points):
        return which
    if clusters == 1:
        return np.zeros(len(rows), int)
    if how == "kmeans":
        return _kmeans(points, counts, clusters, random)[which]
    if how == "spectral":
        return _spectral(points, clusters, random)[which]
    from sklearn.cluster import AgglomerativeClustering

    found: np.ndarray = AgglomerativeClustering(clusters, linkage="ward").fit(points).labels_
    return found[which]


def _kmeans(
    points: np.ndarray, counts: np.ndarray, clusters: int, random: np.random.RandomState
) -> np.ndarray:
    from sklearn.cluster import KMeans

    # Without a tolerance every start runs until no label changes: rounding cannot stop it earlier.
    found: np.ndarray = (
        KMeans(clusters, n_init=RESTARTS, tol=0, random_state=random)
        .fit(points, sample_weight=counts.astype(np.float64))
        .labels_
    )
    return found


def _spectral(points: np.ndarray, clusters: int, random: np.random.RandomState) -> np.ndarray:
    """Normalised cuts: k-means over the first eigenvectors of the graph's Laplacian."""
    from sklearn.manifold import spectral_embedding

    squares = (points * points).sum(1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0)
    np.fill_diagonal(distances, 0)
    usual = np.median(distances[~np.eye(len(points), dtype=bool)])
    # Half of all pairs may be near to each other and the rest far: then the mean is the scale.
    usual = usual if usual > 0 else distances.mean()
    # No two points are wholly apart, or the graph would fall into pieces.
    affinity = np.maximum(np.exp(-distances / (2 * usual)), 1e-12)
    embedded = spectral_embedding(
        affinity, n_components=clusters, random_state=random, drop_first=False
    )
    scaled = embedded / np.abs(embedded).max()
    return _labels(scaled, clusters, "kmeans", random)
