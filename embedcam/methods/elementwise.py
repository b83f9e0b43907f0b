"""Methods that weigh every position by its own gradient: HiResCAM, Layer-CAM, Zoom-CAM.

There is no one number a channel, but HiResCAM's gradients are weights by position, which an index
of aligned pictures can keep. Layer-CAM and Zoom-CAM also fuse several layers, from one forward and
one backward pass to the shallowest of them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import normalize, resize
from .subject import Found, Subject

GAMMA = 2.0
"""Of tanh(gamma M / max M), which lifts the maps of shallow layers (Jiang et al. 2021, eq. 9)."""


def hirescam(subject: Subject) -> Found:
    """HiResCAM: ReLU(sum_k G_k A_k), position by position (Draelos and Carin 2020, eq. 2).

    Behind average pooling G is the same everywhere and the map is Grad-CAM's. G is linear in the
    target, as Grad-CAM's weights are: over triplets it is one backward pass.

    Returns:
        Weights by position G, `[B K h w]`, and maps `[B h w]`, >= 0.
    """
    gradients = subject.gradients
    return Found(gradients, _product(gradients, subject.activations))


def layercam(
    subject: Subject,
    *,
    layers: Sequence[str] | None = None,
    shallow: Sequence[str] | None = None,
) -> Found:
    """Layer-CAM: M = ReLU(sum_k ReLU(G_k) A_k) (Jiang et al. 2021, eq. 6-7).

    Over several layers (eq. 9): a shallow layer's M becomes tanh(2 M / max M), the others'
    M / max M; each is resized bilinearly to the input, and the pixelwise maximum is taken. The
    others are divided by their maximum because the layers' ranges must be one to be compared: the
    authors' code hands every layer's map on scaled to [0, 1], and an embedding's raw maps, about
    1e-4, would vanish under a shallow map that reaches tanh 2 = 0.96. A map of zeros stays so.

    Args:
        subject: what is explained.
        layers: names of the layers to fuse; None takes the network's own, unscaled.
        shallow: which of `layers` are shallow. None takes those whose grid is more than twice as
            fine, in height or in width, as that of the deepest layer given: of VGG16's five stages
            the first three, as in the paper. `[]` takes none.

    Returns:
        Maps `[B h w]` of one layer on its own grid, >= 0; of several at the input's size, in
        [0, 1].

    Raises:
        InputError: layers given twice, none, or `shallow` without or beyond `layers`.
        NetworkError: a layer that is not there, is called never or twice, or reaches nothing.
    """
    if layers is None:
        if shallow is not None:
            raise InputError(
                f"shallow = {shallow!r} says which of several layers are shallow; give layers= too"
            )
        gradients = subject.gradients
        return Found(maps=_product(gradients.clamp(min=0), subject.activations))
    found, deepest = _layers(subject, layers, positive=True)
    if len(found) == 1 and not shallow:
        return Found(maps=resize(next(iter(found.values())), _size(subject)))
    lifted = _shallow(found, deepest, shallow)
    scaled = (_scaled(maps, name in lifted) for name, maps in found.items())
    return Found(maps=_fused(subject, scaled))


def zoomcam(subject: Subject, *, layers: Sequence[str] | None = None) -> Found:
    """Zoom-CAM: pixelwise maximum over layers of U(N(ReLU(sum_k A_k G_k))).

    Shi et al. 2020, eq. 4-6: each layer's map is scaled to [0, 1] by its own minimum and maximum
    (N), then resized bilinearly to the input (U). A constant map becomes zeros.

    Args:
        subject: what is explained.
        layers: names of the layers to fuse; None takes the network's own.

    Returns:
        Maps in [0, 1]: of the network's own layer `[B h w]` on its grid, of a list of layers at
        the input's size.

    Raises:
        InputError: layers given twice, or none.
        NetworkError: a layer that is not there, is called never or twice, or reaches nothing.
    """
    if layers is None:
        gradients = subject.gradients
        return Found(maps=normalize(_product(gradients, subject.activations)))
    found, _ = _layers(subject, layers, positive=False)
    return Found(maps=_fused(subject, (normalize(maps) for maps in found.values())))


def _product(gradients: Tensor, activations: Tensor) -> Tensor:
    """ReLU(sum_k G A), `[B K H W]` twice -> `[B H W]`."""
    return (gradients * activations).sum(1).clamp(min=0)


def _layers(
    subject: Subject, layers: Sequence[str], positive: bool
) -> tuple[dict[str, Tensor], str]:
    """Each layer's map `[B h w]` by its name, and the name of the deepest."""
    if isinstance(layers, str):
        raise InputError(f"layers = {layers!r} is one name; give a list such as [{layers!r}]")
    with subject.several(list(layers)) as made:
        subject.passes.head_backwards += len(subject)
        gradients = made.vjp(subject.mean_cotangents(made.features))
        maps = {
            name: _product(gradient.clamp(min=0) if positive else gradient, activations)
            for name, gradient, activations in zip(
                made.layers, gradients, made.activations, strict=True
            )
        }
        return maps, made.layers[made.depth.index(max(made.depth))]


def _shallow(found: dict[str, Tensor], deepest: str, given: Sequence[str] | None) -> set[str]:
    if given is None:
        height, width = found[deepest].shape[-2:]
        return {
            name
            for name, maps in found.items()
            if maps.shape[-2] > 2 * height or maps.shape[-1] > 2 * width
        }
    unknown = [given] if isinstance(given, str) else [name for name in given if name not in found]
    if unknown:
        raise InputError(
            f"shallow names {', '.join(map(repr, unknown))}; give a list of some of the layers "
            f"{', '.join(map(repr, found))}"
        )
    return set(given)


def _scaled(maps: Tensor, shallow: bool) -> Tensor:
    """tanh(2 M / max M) or M / max M of each map; zeros stay zeros."""
    largest = maps.amax((-2, -1), keepdim=True)
    shares = maps / torch.where(largest > 0, largest, 1)
    return torch.tanh(GAMMA * shares) if shallow else shares


def _fused(subject: Subject, maps: Iterator[Tensor]) -> Tensor:
    """Pixelwise maximum at the input's size, `[B H W]`."""
    size = _size(subject)
    fused = resize(next(maps), size)
    for one in maps:
        fused = torch.maximum(fused, resize(one, size))
    return fused


def _size(subject: Subject) -> tuple[int, int]:
    """(H, W) of the input; (1, L) over positions."""
    sides = subject.images.shape
    return (1 if subject.network.layout == "bkl" else sides[-2], sides[-1])
