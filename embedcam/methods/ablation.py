"""Ablation-CAM: how much of the target is lost without each channel."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NetworkError
from .subject import Found, Subject


def ablationcam(subject: Subject) -> Found:
    """Ablation-CAM: w_k = y - y_k, y_k with channel k set to 0 (Desai and Ramaswamy 2020, eq. 3).

    Behind average pooling and an affine head z = W p + b the ablated head outputs are z - p_k W_k,
    and no pass at all is needed beyond the one for the activations; elsewhere the activations go
    through the head alone, one pass a channel. A channel that is 0 everywhere has weight 0 and is
    not asked for. Works over positions (layout "bkl") too.

    Departure: the paper divides by y. A margin or a negative distance can be 0 or negative, where
    the division blows the map up or flips it; where y > 0 the maps are the same up to scale.

    Returns:
        weights `[B K]`. An ablated embedding of length 0, of which a cosine is not defined, scores
        0: no evidence.
    """
    features = subject.features
    matrix = _affine_head(subject)
    weights = torch.zeros_like(features.activations[:, :, 0, 0])
    for row, maps in enumerate(features.activations):
        kept = maps.flatten(1).any(1).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        if matrix is None:
            ablated = subject.head_scores(row, _without_each(subject, maps, kept))
        else:
            z = features.embedding[row]
            z = z * features.norm[row] if subject.network.normalize else z
            ablated = _rank_one_scores(subject, row, z, maps.mean((-2, -1)), matrix, kept)
        score = subject.target.at(row).score(features.embedding[row : row + 1])
        weights[row, kept] = (score - ablated.nan_to_num(nan=0.0)).to(weights)
    return Found(weights)


def _affine_head(subject: Subject) -> Tensor | None:
    """W `[D K]`, where the head is affine behind average pooling."""
    network, activations = subject.network, subject.activations
    try:
        # Takes the time of a few passes, once a network, and can save K passes an image.
        kind = network.head_kind
    except NetworkError:
        # A network that the probe picture does not fit can still run on its own inputs.
        return None
    if not kind.affine:
        return None
    return torch.as_tensor(kind.matrix, device=activations.device).to(activations)


def _without_each(subject: Subject, maps: Tensor, kept: Tensor) -> Iterator[Tensor]:
    """The activations `[n K H W]` with one of the channels kept set to 0 in each."""
    for part in subject.batches(len(kept)):
        channels = kept[part]
        piece = maps.expand(len(channels), *maps.shape).clone()
        piece[torch.arange(len(channels), device=maps.device), channels] = 0
        yield piece


def _rank_one_scores(
    subject: Subject, row: int, z: Tensor, pooled: Tensor, matrix: Tensor, kept: Tensor
) -> Tensor:
    """y of z - p_k W_k, for the channels kept."""
    target = subject.target.at(row)
    found = []
    for part in subject.batches(len(kept)):
        channels = kept[part]
        ablated = z - pooled[channels, None] * matrix[:, channels].mT
        found.append(target.score(subject.normalized(ablated)))
    return torch.cat(found)
