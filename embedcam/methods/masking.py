"""Methods that take channels away, or show only theirs: Score-CAM, Ablation-CAM and Poly-CAM."""

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from .._options import Setting
from ..errors import InputError, NetworkError
from ..network.gradients import listed, not_finite
from ..ops import sharpen
from .elementwise import Layers
from .masks import fill_of, flat, map_scores, pictures_only
from .subject import MethodOutput, Subject

# Numbers of activations put through the head at once, whatever a batch of inputs is: they are small
# beside a picture, and each piece may cost a run of the trunk.
_AT_ONCE = 1 << 24


def scorecam(
    subject: Subject,
    *,
    weights: Annotated[str, Setting(kind=str, choices=("raw", "softmax"))] = "raw",
    temperature: Annotated[float, Setting(kind=float, above=0)] = 1.0,
) -> MethodOutput:
    """Score-CAM: w_k = f(X m_k) - f(X_b), m_k = N(U(A_k)) (Wang et al. 2020, definitions 2 and 3).

    The paper's algorithm 1 also puts the K scores through a softmax: `weights="softmax"`, of
    w / `temperature`. It is not the default because scores of embeddings span little, cosines at
    most 2 and in practice a few tenths, while the softmax is over hundreds of channels: every
    weight comes out near 1 / K, the map is the mean activation whatever the target, and the
    baseline cancels. Raw weights are mostly of one sign too, so their map keeps much of the mean
    activation; a softmax with a temperature of the size of the scores' spread (about 0.1 for
    cosines) keeps least of it. The authors' code has neither baseline nor softmax over channels.

    Masked pixels fade to the subject's fill, which is also the baseline X_b: X m + X_b (1 - m).
    A flat channel masks nothing in particular: its weight is 0, it is not put through the network
    and is left out of the softmax. At most K + 2 forward passes an image.
    """
    if weights == "raw" and temperature != 1:
        raise InputError(
            f"temperature = {temperature!r} divides the scores before a softmax; give "
            "weights='softmax' with it"
        )
    pictures_only(subject, "Score-CAM")
    activations = subject.activations
    result = torch.zeros_like(activations[:, :, 0, 0])
    for row, maps in enumerate(activations):
        seen = ~flat(maps)
        if not seen.any():
            continue
        fill = fill_of(subject, row)
        scores = map_scores(subject, row, maps[seen], subject.images[row], fill)
        scores = scores - subject.scores(row, [fill[None]]).to(scores)
        if weights == "softmax":
            scores = torch.softmax(scores / temperature, 0)
        result[row, seen] = scores
    return MethodOutput(result)


def ablationcam(subject: Subject) -> MethodOutput:
    """Ablation-CAM: w_k = y - y_k, y_k with channel k set to 0 (Desai and Ramaswamy 2020, eq. 3).

    Behind average pooling and an affine head z = W p + b the ablated head outputs are z - p_k W_k,
    and no pass at all is needed beyond the one for the activations; elsewhere the activations go
    through the head alone, one pass a channel, in pieces of some 16 million numbers; unless trunk
    and head were given as functions, each piece takes a run of the trunk too. A channel that is 0
    everywhere has weight 0 and is not asked for. Works over positions (layout "bkl") too.

    Departure: the paper divides by y. A margin or a negative distance can be 0 or negative, where
    the division blows the map up or flips it; where y > 0 the maps are the same up to scale.

    Where a channel is the only one that is not 0, nothing is left of the activations; a head that
    makes NaN or infinity of nothing is taken to give zeros: no evidence. So is an embedding of
    length 0, of which a cosine is not defined. Any other ablated embedding must be finite.
    """
    features = subject.features
    subject.passes.forwards += subject.network.check_tokens(subject.images)
    matrix = _affine_head(subject)
    weights = torch.zeros_like(features.activations[:, :, 0, 0])
    for row, maps in enumerate(features.activations):
        kept = maps.flatten(1).any(1).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        target, score = subject.target.at(row), subject.score(row)
        for channels, z in _ablated(subject, row, kept, matrix):
            usable = _usable(z, channels, row, emptied=len(kept) == 1)
            if subject.network.normalize:
                length = torch.linalg.vector_norm(usable, dim=1, keepdim=True)
                usable = usable / torch.where(length > 0, length, 1)
            weights[row, channels] = (score - target.score(usable)).to(weights)
    return MethodOutput(weights)


def _affine_head(subject: Subject) -> Tensor | None:
    """Return W `[D K]`, where the head is affine behind average pooling."""
    try:
        # Takes the time of a few passes, once a network, and can save K passes an image.
        kind = subject.network.head_kind
    except NetworkError:
        # A network that the probe picture does not fit can still run on its own inputs.
        return None
    if not kind.affine:
        return None
    return torch.as_tensor(kind.matrix, device=subject.activations.device).to(subject.activations)


def _ablated(
    subject: Subject, row: int, kept: Tensor, matrix: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some of the channels kept, and z `[n D]` of the head without each of them."""
    features, maps = subject.features, subject.activations[row]
    if matrix is not None:
        z = features.embedding[row]
        z = z * features.norm[row] if subject.network.normalize else z
        pooled = maps.mean((-2, -1))
        for part in subject.batches(len(kept)):
            channels = kept[part]
            yield channels, z - pooled[channels, None] * matrix[:, channels].mT
        return
    head = subject.network.head_alone(subject.images[row : row + 1], subject.batch_size)
    spent = 0
    for channels in torch.split(kept, max(1, _AT_ONCE // maps.numel())):
        piece = maps.expand(len(channels), *maps.shape).clone()
        piece[torch.arange(len(channels), device=maps.device), channels] = 0
        z = head(piece)
        subject.passes.forwards += head.inputs - spent
        spent = head.inputs
        subject.passes.heads += len(channels)
        subject.progress(len(channels))
        yield channels, z


def _usable(z: Tensor, channels: Tensor, row: int, *, emptied: bool) -> Tensor:
    """Return z `[n D]` of finite numbers; where nothing is left of the activations 0 for others."""
    infinite = ~torch.isfinite(torch.linalg.vector_norm(z, dim=1))
    if not bool(infinite.any()):
        return z
    if emptied:
        return torch.where(infinite[:, None], 0, z)
    flags = torch.zeros(int(channels.max()) + 1, dtype=torch.bool, device=z.device)
    flags[channels[infinite]] = True
    raise not_finite(f"without channels {listed(flags)} of the image at position {row}")


def polycam(
    subject: Subject,
    *,
    layers: Layers = None,
    variant: Annotated[str, Setting(kind=str, choices=("plus", "minus", "both"))] = "both",
    baseline: Annotated[bool, Setting(kind=bool)] = True,
) -> MethodOutput:
    """Poly-CAM: from the deepest layer up, P = R, then P = L(R) U(P), L(R) = R / U(D(R)).

    R = ReLU(sum_k w_k A_k) of each layer; D resizes bilinearly to the size of P, U back to R's:
    L(R) is how R differs within the positions of P. With m = N(U(A_k)), F the subject's fill, and X
    seen through m being X m + F (1 - m):

        plus    w_k = y(X through m) - y(F)
        minus   w_k = ReLU(y(X) - y(X through 1 - m))
        both    w_k = ReLU(y(X through m) - y(F) + y(X) - y(X through 1 - m))

    (Englebert, Cornu and De Vleeschouwer 2022, arXiv 2204.13359, PCAM+, PCAM- and PCAM+-.) The
    paper's y is a probability, about 0 where nothing is seen, and has no y(F) (`baseline=False`); a
    similarity may be anything there, and without the baseline a negative one gives a map of zeros.
    The published code masks with U(N(A_k)), N by the 0.1 and 99.9 percentiles, and scales the final
    map; here N is min-max and the map is not scaled.

    `layers` come in any order: where they ran says which is deepest. A flat channel has weight 0;
    where U(D(R)) is 0 (to the rounding of max R), L(R) is 0. With one layer the map is R.
    Passes: 1 forward, one of F an image, and one, with "both" two, for each channel of every layer
    that is not flat: shallow layers with few channels are cheap, but every layer counts.
    """
    if not layers:
        raise InputError(
            f"Poly-CAM draws from several layers and layers = {layers!r}; give their names, such "
            "as layers=['layer1', 'layer2', 'layer3', 'layer4']: nothing sharpens the map of one"
        )
    pictures_only(subject, "Poly-CAM")
    with subject.several(layers) as run:
        names, depth, activations = run.layers, run.depth, run.activations
        embedding = run.features.embedding
    rows = range(len(subject))
    nothing = [0.0 for _ in rows]
    if variant != "minus" and baseline:
        nothing = [float(subject.scores(row, [fill_of(subject, row)[None]])) for row in rows]
    weights: dict[str, Tensor] = {}
    maps: Tensor | None = None

    def weights_of(row: int, channels: Tensor) -> Tensor:
        picture, fill, seen = subject.images[row], fill_of(subject, row), ~flat(channels)
        total = channels.new_zeros(len(channels))
        if variant != "minus":
            total += map_scores(subject, row, channels, picture, fill)
            total -= nothing[row]
        if variant != "plus":
            # Through 1 - m picture and fill change places.
            without = map_scores(subject, row, channels, fill, picture)
            score = subject.target.at(row).score(embedding[row : row + 1])
            total = (total + (score.to(total) - without)).clamp(min=0)
        return torch.where(seen, total, 0)

    for place in sorted(range(len(names)), key=lambda place: -depth[place]):
        of_layer = activations[place]
        weights[names[place]] = torch.stack([weights_of(row, of_layer[row]) for row in rows])
        layer_map = (weights[names[place]][:, :, None, None] * of_layer).sum(1).clamp(min=0)
        maps = layer_map if maps is None else sharpen(layer_map, maps)
    return MethodOutput(maps=maps, layers={name: weights[name] for name in names})
