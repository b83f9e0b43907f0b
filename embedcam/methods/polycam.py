"""Poly-CAM: coarse maps of deep layers sharpened by fine maps of shallow ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import sharpen
from .grouping import blended
from .masks import fill_like, flat, pictures_only
from .options import one_of
from .subject import Found, Subject


def polycam(
    subject: Subject,
    *,
    layers: Sequence[str] | None = None,
    variant: str = "both",
    baseline: bool = True,
) -> Found:
    """Poly-CAM: from the deepest layer up, P = R, then P = L(R) U(P), L(R) = R / U(D(R)).

    R = ReLU(sum_k w_k A_k) of each layer; D resizes bilinearly to the size of P, U back to R's:
    L(R) is how R differs within the cells of P. With m = N(U(A_k)), F the subject's fill, and X
    seen through m being X m + F (1 - m):

        plus    w_k = y(X through m) - y(F)
        minus   w_k = ReLU(y(X) - y(X through 1 - m))
        both    w_k = ReLU(y(X through m) - y(F) + y(X) - y(X through 1 - m))

    (Englebert, Cornu and De Vleeschouwer 2022, arXiv 2204.13359, PCAM+, PCAM- and PCAM+-.) The
    paper's y is a probability, about 0 where nothing is seen, and has no y(F); a similarity may be
    anything there, and without the baseline a negative one gives a map of zeros. The
    published code masks with U(N(A_k)), N by the 0.1 and 99.9 percentiles, and scales the final
    map; here N is min-max and the map is not scaled.

    A flat channel has weight 0; where U(D(R)) is 0 (to the rounding of max R), L(R) is 0. With one
    layer the map is R.
    Passes: 1 forward, one of F an image, and one, with "both" two, for each channel of every layer
    that is not flat: shallow layers with few channels are cheap, but every layer counts.

    Args:
        subject: pictures `[B C H W]`.
        layers: names, such as ["layer1", "layer2", "layer3", "layer4"], in any order: where they
            ran says which is deepest.
        variant: "plus", "minus" or "both".
        baseline: False leaves y(F) out, as printed.

    Returns:
        layers: the weights `[B K_l]` of each by its name; maps `[B h w]` >= 0 of the shallowest's
        size.

    Raises:
        InputError: no list of layers, or a variant that is unknown.
        NetworkError: unknown layers, a network given as trunk and head, or one without pictures.
    """
    one_of("variant", variant, ("plus", "minus", "both"))
    if layers is None or isinstance(layers, str) or not list(layers):
        raise InputError(
            f"Poly-CAM draws from several layers and layers = {layers!r}; give their names, such "
            "as layers=['layer1', 'layer2', 'layer3', 'layer4']: nothing sharpens the map of one"
        )
    pictures_only(subject, "Poly-CAM", "ablationcam")
    with subject.several(list(layers)) as made:
        names, depth, activations = made.layers, made.depth, made.activations
        embedding = made.features.embedding
    nothing = [_of_fill(subject, row, variant, baseline) for row in range(len(subject))]
    weights: dict[str, Tensor] = {}
    maps: Tensor | None = None
    for place in sorted(range(len(names)), key=lambda place: -depth[place]):
        own = activations[place]
        found = torch.stack(
            [
                _channel_weights(
                    subject, row, own[row], embedding[row : row + 1], variant, nothing[row]
                )
                for row in range(len(own))
            ]
        )
        weights[names[place]] = found
        drawn = (found[:, :, None, None] * own).sum(1).clamp(min=0)
        maps = drawn if maps is None else sharpen(drawn, maps)
    return Found(maps=maps, layers={name: weights[name] for name in names})


def _of_fill(subject: Subject, row: int, variant: str, baseline: bool) -> float:
    """y(F), or 0 where it is left out or cancels."""
    if variant == "minus" or not baseline:
        return 0.0
    fill = fill_like(subject.images[row], subject.fill, subject.network.preprocess)
    return float(subject.scores(row, [fill[None]]))


def _channel_weights(
    subject: Subject, row: int, maps: Tensor, embedding: Tensor, variant: str, nothing: float
) -> Tensor:
    """w of one image's channel maps `[K h w]`, `[K]`."""
    weights = maps.new_zeros(len(maps))
    seen = ~flat(maps)
    if not seen.any():
        return weights
    picture = subject.images[row]
    fill = fill_like(picture, subject.fill, subject.network.preprocess)
    total = torch.zeros_like(weights[seen])
    if variant != "minus":
        total += subject.scores(row, blended(subject, picture, maps[seen], fill)).to(total)
        total -= nothing
    if variant != "plus":
        # Through 1 - m picture and fill change places.
        without = subject.scores(row, blended(subject, fill, maps[seen], picture))
        total += (subject.target.at(row).score(embedding) - without).to(total)
        total = total.clamp(min=0)
    weights[seen] = total
    return weights
