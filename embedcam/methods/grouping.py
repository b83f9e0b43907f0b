"""Methods that score groups of channels in place of channels: Group-, Cluster- and Cosine-CAM.

Each needs one forward pass a group. Their maps are on the layer's own grid. A channel that belongs
to no group, and every channel of a group whose map is flat, has weight 0: such a map hides nothing
of the picture, or everything. All of them mask pixels, so the network must take pictures.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..network import Features
from .clusters import clustered, contiguous
from .masks import blurred, fill_like, flat, masked, pictures_only, unit_masks
from .options import one_of, whole_number
from .subject import Found, Subject
from .weights import gradcam as gradcam_weights

PERCENTILE = 70.0
"""Group-CAM's cut: the paper's theta, and that of its first published code."""
_INSTEAD = "ablationcam"
# Of a sum of some dozens of numbers, in units of the last place.
_ROUNDING = 64


def groupcam(
    subject: Subject,
    *,
    groups: int = 32,
    clustering: str = "contiguous",
    percentile: float | None = PERCENTILE,
) -> Found:
    """Group-CAM: map ReLU(sum_g w_g H_g), w_g = ReLU(y(X M_g + B (1 - M_g)) - y(B)).

    H_g = ReLU(sum_{k in g} alpha_k A_k), its small values set to 0, with alpha Grad-CAM's weights;
    M_g = N(U(H_g)); B = the blurred picture (51 px, sigma 50), whatever `fill` says (Zhang et al.
    2021, arXiv 2103.13859, section 3). The weight form is w_g alpha_k: the same map but for the
    ReLU inside H_g and the cut.

    The cut keeps what is larger than the percentile of H_g's own values, before it is resized.
    Default 70, as in the paper and the first published code, which also weighted M_g and not H_g;
    the later published code has no cut: percentile=None.

    Where H_g is flat (all of it cut or negative, too) w_g is 0; where every group is, the map is 0.
    So is a gain within the rounding of the scores, and the map of a picture of one colour.
    Passes: one backward through the head; 2 forwards and one for each group that is not flat.

    Args:
        subject: pictures `[B C H W]`.
        groups: how many; where the layer has fewer channels, each is its own group.
        clustering: "contiguous" neighbours, ceil(K / groups) in each, or alpha_k A_k clustered by
            "kmeans" or "agglomerative" (Ward).
        percentile: 0 <= percentile < 100, or None for no cut.

    Returns:
        weights `[B K]` and maps `[B h w]` >= 0.

    Raises:
        InputError: options that cannot be.
        NetworkError: the network takes no pictures.
    """
    groups = whole_number("groups", groups)
    one_of("clustering", clustering, ("contiguous", "kmeans", "agglomerative"))
    _check_percentile(percentile)
    pictures_only(subject, "Group-CAM", _INSTEAD)
    alphas, activations = gradcam_weights(subject.gradients), subject.activations
    weights, maps = [], []
    for row, (alpha, own) in enumerate(zip(alphas, activations, strict=True)):
        parts = alpha[:, None, None] * own
        if clustering == "contiguous":
            member = contiguous(parts, groups)
        else:
            member = clustered(parts, groups, clustering, subject.seed)
        drawn = _cut(_mixed(member, parts).clamp(min=0), percentile)
        gains = _gains(subject, row, drawn).clamp(min=0)
        weights.append((gains @ member) * alpha)
        maps.append(_mixed(gains[None], drawn)[0])
    return Found(torch.stack(weights), torch.stack(maps))


def clustercam(
    subject: Subject,
    *,
    n_clusters: int = 8,
    clustering: str = "kmeans",
    view: str = "difference",
    weighing: str = "equal",
) -> Found:
    """Cluster-CAM: map ReLU(N(M_b) - N(M_s)), the best and the worst group of channels.

    M_g = the mean of A_k over a cluster g of channel maps; the group with the largest
    y(X m_g + F (1 - m_g)), m_g = N(U(M_g)), is the cognition-base b, that with the least the
    cognition-scissors s; F is the subject's fill (Feng et al. 2023, arXiv 2302.01642). No gradient
    is taken. N puts both on one scale, or the size of the groups would decide.

    The weight form is one scale a group, 1 / (|g| (max M_g - min M_g)), negative for the scissors:
    the same map but for the offsets min M_g of N.

    With `weighing="scored"` as in tetutaro/class_activation_mapping: maps alpha_k A_k of Grad-CAM's
    alpha are clustered, scored against the blurred picture, the scores scaled to unit length, and
    the map is ReLU(v M_b - (1 - v) M_s) with v the base's score, without N; the weight form is
    exact. It takes a gradient, and view "scissors" is ReLU((1 - v) M_s).

    Flat channels are in no group; with one group base and scissors are the same, and the difference
    is 0; with none all is 0, and "scored" so it is where no group gains more than rounding, as in a
    picture of one colour. Of groups that score alike the one with the first channel is taken.
    Passes: 1 forward and one for each group; "scored" one more, and a backward through the head.

    Args:
        subject: pictures `[B C H W]`.
        n_clusters: how many; at most as many as there are channel maps that differ and are not
            flat.
        clustering: "kmeans" or "spectral".
        view: "base", "scissors", or their "difference".
        weighing: "equal" (the paper) or "scored".

    Returns:
        weights `[B K]` and maps `[B h w]` >= 0, with "equal" <= 1.

    Raises:
        InputError: options that cannot be.
        NetworkError: the network takes no pictures.
    """
    n_clusters = whole_number("n_clusters", n_clusters)
    one_of("clustering", clustering, ("kmeans", "spectral"))
    one_of("view", view, ("base", "scissors", "difference"))
    one_of("weighing", weighing, ("equal", "scored"))
    pictures_only(subject, "Cluster-CAM", _INSTEAD)
    scored = weighing == "scored"
    alphas = gradcam_weights(subject.gradients) if scored else None
    weights, maps = [], []
    for row, own in enumerate(subject.activations):
        parts = own if alphas is None else alphas[row][:, None, None] * own
        member = _shares(clustered(parts, n_clusters, clustering, subject.seed))
        means = _mixed(member, parts)
        low, high = means.amin((-2, -1)), means.amax((-2, -1))
        scales = torch.where(high > low, 1 / torch.where(high > low, high - low, 1), 0)
        offsets = low
        if scored:
            gains = _unit(_gains(subject, row, means))
            scales, offsets = torch.ones_like(scales), torch.zeros_like(scales)
            # Where nothing was gained, no group is the best or the worst.
            signs = _base_and_scissors(gains, gains.any() & ~flat(means), view, scored)
        else:
            picture = subject.images[row]
            fill = fill_like(picture, subject.fill, subject.network.preprocess)
            scores = _seen_scores(subject, row, means, fill)
            signs = _base_and_scissors(scores, ~flat(means), view, scored)
        shares = signs * scales
        found = shares @ member
        weights.append(found if alphas is None else found * alphas[row])
        maps.append(_mixed(shares[None], means - offsets[:, None, None])[0].clamp(min=0))
    return Found(torch.stack(weights), torch.stack(maps))


def cosinecam(subject: Subject, *, n_clusters: int = 8) -> Found:
    """Cosine-CAM: map ReLU(sum_g s_g M_g), M_g = the mean of alpha_k A_k over a group.

    Groups by k-means over the maps alpha_k A_k, each scaled to length 1 and not centred, so that
    direction alone decides, and the sign of alpha_k with it; s_g = y(X m_g + B (1 - m_g)) - y(B),
    m_g = N(U(M_g)), B = the blurred picture (51 px, sigma 50) whatever `fill` says; s is scaled to
    length 1 (tetutaro/class_activation_mapping; no paper). The weight form s_g alpha_k / |g| draws
    the very map.

    That code clusters the rows of the left singular vectors of the maps centred by their common
    mean, takes the number of groups by an elbow, weights by XGrad-CAM's alpha, and scores logits of
    a sigmoid; here the maps themselves are clustered, alpha is Grad-CAM's, and y the target's.

    Flat maps are in no group; where no group scores otherwise than the blurred picture, beyond
    rounding, all is 0, as it is for a picture of one colour.
    Passes: one backward through the head; 2 forwards and one for each group that is not flat.

    Args:
        subject: pictures `[B C H W]`.
        n_clusters: how many; at most as many as there are directions that differ.

    Returns:
        weights `[B K]` and maps `[B h w]` >= 0.

    Raises:
        InputError: options that cannot be.
        NetworkError: the network takes no pictures.
    """
    n_clusters = whole_number("n_clusters", n_clusters)
    pictures_only(subject, "Cosine-CAM", _INSTEAD)
    alphas, activations = gradcam_weights(subject.gradients), subject.activations
    weights, maps = [], []
    for row, (alpha, own) in enumerate(zip(alphas, activations, strict=True)):
        parts = alpha[:, None, None] * own
        member = _shares(clustered(parts, n_clusters, "kmeans", subject.seed, unit=True))
        means = _mixed(member, parts)
        scores = _unit(_gains(subject, row, means))
        weights.append((scores @ member) * alpha)
        maps.append(_mixed(scores[None], means)[0].clamp(min=0))
    return Found(torch.stack(weights), torch.stack(maps))


def blended(
    subject: Subject, picture: Tensor, maps: Tensor, background: Tensor
) -> Iterator[Tensor]:
    """The picture where a map is high, the background where it is low, a batch at a time.

    Args:
        subject: says how many make a batch.
        picture: X, `[C H W]`.
        maps: `[n h w]`; m = N(U(map)).
        background: F, `[C H W]`.

    Yields:
        X m + F (1 - m), `[at most a batch, C H W]`.
    """
    size = (picture.shape[-2], picture.shape[-1])
    for piece in subject.batches(len(maps)):
        yield masked(picture, background, unit_masks(maps[piece], size))


def _check_percentile(percentile: Any) -> None:
    number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
    if percentile is not None and not (number and 0 <= percentile < 100):
        raise InputError(
            f"percentile = {percentile!r}; give a number from 0 to below 100, or None for no cut"
        )


def _mixed(weights: Tensor, maps: Tensor) -> Tensor:
    """Sums of maps: `[g n]` and `[n h w]` -> `[g h w]`."""
    return (weights @ maps.flatten(1)).reshape(len(weights), *maps.shape[1:])


def _shares(member: Tensor) -> Tensor:
    """Membership as shares of a mean, each group's summing to 1."""
    return member / member.sum(1, keepdim=True)


def _cut(maps: Tensor, percentile: float | None) -> Tensor:
    """Only what is larger than each map's own percentile; the rest 0."""
    if percentile is None:
        return maps
    # What exceeds the interpolated percentile is just what exceeds the value below it, and that
    # one is found without rounding.
    cells = maps[0].numel()
    below = int(percentile * (cells - 1) / 100)
    limits = maps.flatten(1).sort(1).values[:, below]
    return maps * (maps > limits[:, None, None])


def _seen_scores(subject: Subject, row: int, maps: Tensor, background: Tensor) -> Tensor:
    """y of one picture seen through each map `[n h w]`, `[n]`; 0 for flat ones, not scored."""
    found = maps.new_zeros(len(maps))
    seen = ~flat(maps)
    if seen.any():
        pieces = blended(subject, subject.images[row], maps[seen], background)
        found[seen] = subject.scores(row, pieces).to(found)
    return found


def _gains(subject: Subject, row: int, maps: Tensor) -> Tensor:
    """y of a blurred picture made clear through each map, less y of it blurred, `[n]`.

    0 for flat maps, where the picture is of one colour and so its own blur, and where a difference
    is the rounding of the scores: scaled to length 1, that would be a map at full strength.
    """
    seen = ~flat(maps)
    if not seen.any() or flat(subject.images[row]).all():
        return maps.new_zeros(len(maps))
    dim = blurred(subject.images[row : row + 1])
    scores = _seen_scores(subject, row, maps, dim[0])
    base = subject.scores(row, [dim]).to(scores)
    gains = scores - base
    largest = torch.cat([scores[seen], base]).abs().max() + _terms(subject, row)
    rounding = _ROUNDING * torch.finfo(gains.dtype).eps * largest
    return gains * (seen & (gains.abs() > rounding))


def _terms(subject: Subject, row: int) -> Tensor:
    """How large the terms of y are, which may cancel: |dy/dz| |z|, the mean over triplets."""
    part, whole = slice(row, row + 1), subject.features
    own = Features(whole.embedding[part], whole.norm[part], whole.activations[part])
    each, used = subject.cotangents(own, row)
    counted = used.to(each.dtype)
    sizes = torch.linalg.vector_norm(each, dim=2) * own.norm[:, None]
    return (sizes * counted).sum() / counted.sum().clamp(min=1)


def _unit(values: Tensor) -> Tensor:
    """A vector at length 1; of zeros: as it is."""
    length = torch.linalg.vector_norm(values)
    return values / torch.where(length > 0, length, 1)


def _base_and_scissors(scores: Tensor, seen: Tensor, view: str, scored: bool) -> Tensor:
    """The part each group plays, `[g]`: the best's positive, the worst's negative, others 0."""
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
