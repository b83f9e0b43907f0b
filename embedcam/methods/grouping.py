"""Methods that score groups of channels: Group-, Cluster- and Cosine-CAM, one forward a group.

Channels of no group, and of a group whose map is flat, have weight 0.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from .._options import Setting
from ..network import Features
from .masking import blurred, fill_of, flat, map_scores, pictures_only
from .subject import Count, MethodOutput, Subject
from .weights import gradcam as gradcam_weights

PERCENTILE = 70.0
"""Group-CAM's cut: the paper's theta, and that of its first published code."""
RESTARTS = 10
"""Starts of k-means; the best is kept."""
EQUAL = 6
"""Decimals, of maps scaled to a largest value of 1, to which equal maps agree."""
# Of a sum of some dozens of numbers, in units of the last place.
_ROUNDING = 64
Groups = tuple[Tensor, Tensor, Tensor]
"""Membership or its shares `[g K]`, a map of each group `[g h w]`, and its part in the whole."""


def groupcam(
    subject: Subject,
    *,
    groups: Count = 32,
    clustering: Annotated[
        str, Setting(kind=str, choices=("contiguous", "kmeans", "agglomerative"))
    ] = "contiguous",
    percentile: Annotated[
        float | None, Setting(kind=float, optional=True, least=0, below=100)
    ] = PERCENTILE,
) -> MethodOutput:
    """Group-CAM: map ReLU(sum_g w_g H_g), w_g = ReLU(y(X M_g + B (1 - M_g)) - y(B)).

    H_g = ReLU(sum_{k in g} alpha_k A_k) cut at its `percentile`, M_g = N(U(H_g)), B the blurred
    picture (Zhang et al. 2021, arXiv 2103.13859, section 3). The weight form is w_g alpha_k.
    """

    def grouped(row: int, parts: Tensor) -> Groups:
        if clustering == "contiguous":
            member = contiguous(parts, groups)
        else:
            member = clustered(parts, groups, clustering, subject.seed)
        maps = _cut(_mixed(member, parts).clamp(min=0), percentile)
        return member, maps, _gains(subject, row, maps).clamp(min=0)

    return _by_groups(subject, "Group-CAM", True, grouped)


def clustercam(
    subject: Subject,
    *,
    n_clusters: Count = 8,
    clustering: Annotated[str, Setting(kind=str, choices=("kmeans", "spectral"))] = "kmeans",
    view: Annotated[
        str, Setting(kind=str, choices=("base", "scissors", "difference"))
    ] = "difference",
    weighing: Annotated[str, Setting(kind=str, choices=("equal", "scored"))] = "equal",
) -> MethodOutput:
    """Cluster-CAM: map ReLU(N(M_b) - N(M_s)), M_g = the mean of A_k over a cluster of maps.

    b and s have the largest and the least y(X m + F (1 - m)), m = N(U(M_g)) (Feng et al. 2023,
    arXiv 2302.01642). "scored": ReLU(v M_b - (1 - v) M_s) (tetutaro/class_activation_mapping).
    """
    scored = weighing == "scored"

    def grouped(row: int, parts: Tensor) -> Groups:
        member = _shares(clustered(parts, n_clusters, clustering, subject.seed))
        means = _mixed(member, parts)
        seen = ~flat(means)
        if scored:
            scores = _unit(_gains(subject, row, means))
            # Where nothing was gained, no group is the best or the worst.
            seen &= scores.any()
            return member, means, _base_and_scissors(scores, seen, view, scored)
        scores = map_scores(subject, row, means, subject.images[row], fill_of(subject, row))
        low, high = means.amin((-2, -1)), means.amax((-2, -1))
        scales = torch.where(seen, 1 / torch.where(seen, high - low, 1), 0)
        shares = _base_and_scissors(scores, seen, view, scored)
        return member, means - low[:, None, None], shares * scales

    return _by_groups(subject, "Cluster-CAM", scored, grouped)


def cosinecam(subject: Subject, *, n_clusters: Count = 8) -> MethodOutput:
    """Cosine-CAM: map ReLU(sum_g s_g M_g), M_g = the mean of alpha_k A_k over a group.

    Groups by k-means over alpha_k A_k at length 1; s_g = y(X m_g + B (1 - m_g)) - y(B), scaled to
    length 1 (tetutaro/class_activation_mapping). The weight form s_g alpha_k / |g| is exact.
    """

    def grouped(row: int, parts: Tensor) -> Groups:
        member = _shares(clustered(parts, n_clusters, "kmeans", subject.seed, unit=True))
        means = _mixed(member, parts)
        return member, means, _unit(_gains(subject, row, means))

    return _by_groups(subject, "Cosine-CAM", True, grouped)


def _by_groups(
    subject: Subject, title: str, weighed: bool, grouped: Callable[[int, Tensor], Groups]
) -> MethodOutput:
    """Return ReLU(sum_g s_g M_g) and its weight form, `grouped` being told A_k or alpha_k A_k."""
    pictures_only(subject, title)
    weights, maps = [], []
    alphas = gradcam_weights(subject.gradients) if weighed else None
    for row, parts in enumerate(subject.activations):
        alpha = parts.new_ones(len(parts)) if alphas is None else alphas[row]
        member, drawn, scores = grouped(row, alpha[:, None, None] * parts)
        weights.append((scores @ member) * alpha)
        maps.append(_mixed(scores[None], drawn)[0].clamp(min=0))
    return MethodOutput(torch.stack(weights), torch.stack(maps))


def _mixed(weights: Tensor, maps: Tensor) -> Tensor:
    """Return sums of maps: `[g n]` and `[n h w]` -> `[g h w]`."""
    return (weights @ maps.flatten(1)).reshape(len(weights), *maps.shape[1:])


def _shares(member: Tensor) -> Tensor:
    return member / member.sum(1, keepdim=True)


def _cut(maps: Tensor, percentile: float | None) -> Tensor:
    if percentile is None:
        return maps
    # What exceeds the interpolated percentile is just what exceeds the value below it, and that
    # one is found without rounding.
    below = int(percentile * (maps[0].numel() - 1) / 100)
    limits = maps.flatten(1).sort(1).values[:, below]
    return maps * (maps > limits[:, None, None])


def _gains(subject: Subject, row: int, maps: Tensor) -> Tensor:
    """Return y of a blurred picture made clear through each map, less y of it blurred, `[n]`.

    0 for flat maps and pictures, and where a difference is the rounding of the scores.
    """
    picture, seen = subject.images[row], ~flat(maps)
    if not seen.any() or flat(picture).all():
        return maps.new_zeros(len(maps))
    dim = blurred(picture)
    scores = map_scores(subject, row, maps, picture, dim)
    base = subject.scores(row, [dim[None]]).to(scores)
    gains = scores - base
    largest = torch.cat([scores[seen], base]).abs().max() + _size_of_terms(subject, row)
    rounding = _ROUNDING * torch.finfo(gains.dtype).eps * largest
    return gains * (seen & (gains.abs() > rounding))


def _size_of_terms(subject: Subject, row: int) -> Tensor:
    """Return how large the terms of y are, which may cancel: mean over triplets of |dy/dz| |z|."""
    part, whole = slice(row, row + 1), subject.features
    image = Features(whole.embedding[part], whole.norm[part], whole.activations[part])
    each, used = subject.cotangents(image, row)
    counted = used.to(each.dtype)
    sizes: Tensor = torch.linalg.vector_norm(each, dim=2) * image.norm[:, None]
    return (sizes * counted).sum() / counted.sum().clamp(min=1)


def _unit(values: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(values)
    return values / torch.where(length > 0, length, 1)


def _base_and_scissors(scores: Tensor, seen: Tensor, view: str, scored: bool) -> Tensor:
    """Return each group's part, `[g]`: the best's positive, the worst's negative, else 0."""
    signs = torch.zeros_like(scores)
    if not seen.any():
        return signs
    base = int(torch.where(seen, scores, -torch.inf).argmax())
    scissors = int(torch.where(seen, scores, torch.inf).argmin())
    value = float(scores[base]) if scored else 1.0
    other = 1 - value if scored else 1.0
    if view == "base":
        signs[base] = value
    elif view == "scissors":
        signs[scissors] = other
    elif base != scissors:
        signs[base], signs[scissors] = value, -other
    return signs


# Which channels belong together


def contiguous(maps: Tensor, groups: int) -> Tensor:
    """Return the membership `[g K]` of neighboring channels of `[K h w]`, ceil(K / groups) each."""
    size = -(-len(maps) // groups)
    return _membership(np.arange(len(maps)) // size, maps)


def clustered(maps: Tensor, clusters: int, how: str, seed: int, *, unit: bool = False) -> Tensor:
    """Return the membership `[g K]`, zeros and ones, of channels whose maps `[K h w]` are alike.

    `how` is "kmeans", "spectral" (normalized cuts) or "agglomerative" (Ward); `unit` scales maps
    to length 1 first. Flat ones are in no group, equal ones (to 1e-6 of the largest) never parted.
    """
    rows = maps.detach().flatten(1).double().cpu().numpy()
    seen = np.flatnonzero(~flat(maps).cpu().numpy())
    labels = np.full(len(rows), -1)
    if len(seen):
        rows = rows[seen]
        rows = rows / (np.abs(rows).max(1, keepdims=True) if unit else np.abs(rows).max())
        if unit:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        # The library's seeds end at 2**32; a seed sequence takes any.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
        labels[seen] = _labels(rows, clusters, how, random)
    return _membership(labels, maps)


def _membership(labels: np.ndarray, like: Tensor) -> Tensor:
    """Return labels `[K]`, -1 for none, as zeros and ones `[g K]`, by first appearance."""
    names, first = np.unique(labels[labels >= 0], return_index=True)
    ordered = names[np.argsort(first)]
    return torch.from_numpy(labels[None] == ordered[:, None]).to(like)


def _labels(rows: np.ndarray, clusters: int, how: str, random: np.random.RandomState) -> np.ndarray:
    """Return a label for each row `[n d]`, with at most as many clusters as rows that differ."""
    _, first, which, counts = np.unique(np.round(rows, EQUAL) + 0.0, True, True, True, axis=0)
    order = np.argsort(first)
    which = np.argsort(order)[which.reshape(-1)]
    points, counts = rows[first[order]], counts[order]
    clusters = min(clusters, len(points))
    if clusters == len(points):
        return which
    if clusters == 1:
        return np.zeros(len(rows), int)
    from sklearn.cluster import AgglomerativeClustering, KMeans

    labels: np.ndarray
    if how == "kmeans":
        # Without a tolerance every start runs until no label changes: rounding cannot stop it.
        kmeans = KMeans(clusters, n_init=RESTARTS, tol=0, random_state=random)
        labels = kmeans.fit(points, sample_weight=counts.astype(np.float64)).labels_
    elif how == "spectral":
        labels = _labels(_spectral(points, clusters, random), clusters, "kmeans", random)
    else:
        labels = AgglomerativeClustering(clusters, linkage="ward").fit(points).labels_
    return labels[which]


def _spectral(points: np.ndarray, clusters: int, random: np.random.RandomState) -> np.ndarray:
    """Return the first eigenvectors of the graph's Laplacian, `[n clusters]`."""
    from scipy.spatial.distance import pdist, squareform
    from sklearn.manifold import spectral_embedding

    apart = pdist(points, "sqeuclidean")
    usual = np.median(apart) or apart.mean()  # where half of all pairs coincide
    # No two points are wholly apart, or the graph would fall into pieces.
    affinity = np.maximum(np.exp(-squareform(apart) / (2 * usual)), 1e-12)
    embedded = spectral_embedding(
        affinity, n_components=clusters, random_state=random, drop_first=False
    )
    return np.asarray(embedded / np.abs(embedded).max())
