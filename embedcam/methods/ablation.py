"""Ablation-CAM: how much of the target is lost without each channel."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NetworkError
from ..network.gradients import listed, not_finite
from .subject import Found, Subject

# Numbers of activations put through the head at once, whatever a batch of inputs is: they are small
# beside a picture, and each piece may cost a run of the trunk.
_AT_ONCE = 1 << 24


def ablationcam(subject: Subject) -> Found:
    """Ablation-CAM: w_k = y - y_k, y_k with channel k set to 0 (Desai and Ramaswamy 2020, eq. 3).

    Behind average pooling and an affine head z = W p + b the ablated head outputs are z - p_k W_k,
    and no pass at all is needed beyond the one for the activations; elsewhere the activations go
    through the head alone, one pass a channel, in pieces of some 16 million numbers; unless trunk
    and head were given as functions, each piece takes a run of the trunk too. A channel that is 0
    everywhere has weight 0 and is not asked for. Works over positions (layout "bkl") too.

    Departure: the paper divides by y. A margin or a negative distance can be 0 or negative, where
    the division blows the map up or flips it; where y > 0 the maps are the same up to scale.

    Returns:
        weights `[B K]`. Where a channel is the only one that is not 0, nothing is left of the
        activations; a head that makes NaN or infinity of nothing is taken to give zeros: no
        evidence. So is an embedding of length 0, of which a cosine is not defined.

    Raises:
        NetworkError: any other ablated embedding is not finite; or the layer's patch tokens never
            reach the embedding, so that nothing but rounding would be found (one more forward for
            the first image, once a network).
    """
    features = subject.features
    subject.passes.forwards += subject.network.check_tokens(subject.images)
    matrix = _affine_head(subject)
    weights = torch.zeros_like(features.activations[:, :, 0, 0])
    for row, maps in enumerate(features.activations):
        kept = maps.flatten(1).any(1).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        if matrix is None:
            pieces = _head_outputs(subject, row, maps, kept)
        else:
            z = features.embedding[row]
            z = z * features.norm[row] if subject.network.normalize else z
            pieces = _rank_one_outputs(subject, z, maps.mean((-2, -1)), matrix, kept)
        target = subject.target.at(row)
        score = target.score(features.embedding[row : row + 1])
        for channels, z in pieces:
            ablated = subject.normalized(_usable(z, channels, row, emptied=len(kept) == 1))
            weights[row, channels] = (score - target.score(ablated)).to(weights)
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


def _head_outputs(
    subject: Subject, row: int, maps: Tensor, kept: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the channels kept, and z `[n D]` of the head without each of them."""
    head = subject.network.head_alone(subject.images[row : row + 1], subject.batch_size)
    spent = 0
    for channels in kept.split(max(1, _AT_ONCE // maps.numel())):
        piece = maps.expand(len(channels), *maps.shape).clone()
        piece[torch.arange(len(channels), device=maps.device), channels] = 0
        z = head(piece)
        subject.passes.forwards += head.inputs - spent
        spent = head.inputs
        subject.passes.heads += len(channels)
        subject.tick(len(channels))
        yield channels, z


def _rank_one_outputs(
    subject: Subject, z: Tensor, pooled: Tensor, matrix: Tensor, kept: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the channels kept, and z - p_k W_k `[n D]`."""
    for part in subject.batches(len(kept)):
        channels = kept[part]
        yield channels, z - pooled[channels, None] * matrix[:, channels].mT


def _usable(z: Tensor, channels: Tensor, row: int, *, emptied: bool) -> Tensor:
    """z `[n D]` of finite numbers.

    Args:
        z: head outputs without each of `channels`.
        channels: `[n]`.
        row: the image.
        emptied: no activation was left: what is not finite is a head's way to say nothing.

    Raises:
        NetworkError: not emptied, and not finite.
    """
    infinite = ~torch.isfinite(torch.linalg.vector_norm(z, dim=1))
    if not bool(infinite.any()):
        return z
    if emptied:
        return torch.where(infinite[:, None], 0, z)
    flags = torch.zeros(int(channels.max()) + 1, dtype=torch.bool, device=z.device)
    flags[channels[infinite]] = True
    raise not_finite(f"without channels {listed(flags)} of the image at position {row}")
