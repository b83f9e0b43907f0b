"""Methods that weigh every position, or every pixel, by its own gradient.

HiResCAM, Layer-CAM, Zoom-CAM, Guided Backpropagation and Guided Grad-CAM. There is no one number a
channel, but HiResCAM's gradients are weights by position, which an index of aligned pictures can
keep. Layer-CAM and Zoom-CAM also fuse several layers, from one forward and one backward pass.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from .._options import Setting
from ..errors import InputError
from ..ops import cam as draw
from ..ops import normalize, resize
from .subject import MethodOutput, Subject
from .weights import gradcam as gradcam_weights

GAMMA = 2.0
"""Of tanh(gamma M / max M), which lifts the maps of shallow layers (Jiang et al. 2021, eq. 9)."""
Layers = Annotated[tuple[str, ...] | None, Setting(kind=tuple, optional=True)]


def hirescam(subject: Subject) -> MethodOutput:
    """HiResCAM: ReLU(sum_k G_k A_k), position by position (Draelos and Carin 2020, eq. 2).

    The weights are G, `[B K h w]`. Behind average pooling G is the same everywhere and the map is
    Grad-CAM's. G is linear in the target: over triplets it is one backward pass.
    """
    gradients = subject.gradients
    return MethodOutput(gradients, _product(gradients, subject.activations))


def layercam(subject: Subject, *, layers: Layers = None, shallow: Layers = None) -> MethodOutput:
    """Layer-CAM: M = ReLU(sum_k ReLU(G_k) A_k) (Jiang et al. 2021, eq. 6-7).

    With `layers` (eq. 9; None takes the network's own, unscaled) a shallow layer's M becomes
    tanh(2 M / max M), the others' M / max M; each is resized bilinearly to the input, and the
    pixelwise maximum is taken. The others are divided by their maximum because the layers' ranges
    must be one to be compared: the authors' code hands every layer's map on scaled to [0, 1], and
    an embedding's raw maps, about 1e-4, would vanish under a shallow map that reaches tanh 2. A map
    of zeros stays so; one layer alone is not scaled unless it is named as shallow.

    `shallow` None takes those whose grid is more than twice as fine, in height or in width, as that
    of the deepest: of VGG16's five stages the first three, as in the paper. `[]` takes none.
    """
    if layers is None:
        if shallow is not None:
            raise InputError(
                f"shallow = {shallow!r} says which of several layers are shallow; give layers= too"
            )
        gradients = subject.gradients
        return MethodOutput(maps=_product(gradients.clamp(min=0), subject.activations))
    maps, deepest = _maps_of_layers(subject, layers, positive=True)
    if len(maps) == 1 and not shallow:
        return MethodOutput(maps=_fused(subject, maps.values()))
    if shallow is None:
        height, width = maps[deepest].shape[-2:]
        lifted = {n for n, m in maps.items() if m.shape[-2] > 2 * height or m.shape[-1] > 2 * width}
    else:
        lifted = set(shallow)
        if unknown := [name for name in shallow if name not in maps]:
            raise InputError(
                f"shallow names {', '.join(map(repr, unknown))}; give a list of some of the layers "
                f"{', '.join(map(repr, maps))}"
            )

    def scaled(name: str) -> Tensor:
        largest = maps[name].amax((-2, -1), keepdim=True)
        shares = maps[name] / torch.where(largest > 0, largest, 1)
        return torch.tanh(GAMMA * shares) if name in lifted else shares

    return MethodOutput(maps=_fused(subject, map(scaled, maps)))


def zoomcam(subject: Subject, *, layers: Layers = None) -> MethodOutput:
    """Zoom-CAM: pixelwise maximum over layers of U(N(ReLU(sum_k A_k G_k))), in [0, 1].

    Shi et al. 2020, eq. 4-6: each layer's map is scaled to [0, 1] by its own minimum and maximum
    (N; a constant map becomes zeros), then resized bilinearly to the input (U). `layers` None takes
    the network's own, on its grid.
    """
    if layers is None:
        gradients = subject.gradients
        return MethodOutput(maps=normalize(_product(gradients, subject.activations)))
    maps, _ = _maps_of_layers(subject, layers, positive=False)
    return MethodOutput(maps=_fused(subject, map(normalize, maps.values())))


def guided_backprop(subject: Subject) -> MethodOutput:
    """Guided Backpropagation: dy/dX, kept at each ReLU only where input and gradient are positive.

    Springenberg et al. 2015, section 3.4; summed over the input's channels, so the map at the
    input's size is of BOTH signs. One forward and one full backward pass. The module is not
    changed: its rectifiers (ReLU and ReLU6, modules or functions) are met as they are called. A
    `clamp(min=0)` is no rectifier here, and a network that calls none is refused.
    """
    return MethodOutput(maps=_guided(subject))


def guided_gradcam(subject: Subject) -> MethodOutput:
    """Guided Grad-CAM: Guided Backpropagation times U(Grad-CAM) (Selvaraju et al. 2017, sec. 3.2).

    U is bilinear, as in the paper. Signed, as Guided Backpropagation is: where the map is zero, one
    of the two says nothing.
    """
    gradients = subject.gradients
    coarse = draw(gradcam_weights(gradients), subject.activations)
    return MethodOutput(maps=_guided(subject) * resize(coarse, _size(subject)))


def _guided(subject: Subject) -> Tensor:
    gradient = subject.input_gradient(guided=True)
    if subject.network.layout == "bkl":
        # [B C L] or [B L]: one row of positions.
        gradient = gradient.reshape(len(gradient), -1, 1, gradient.shape[-1])
    return gradient.sum(1)


def _product(gradients: Tensor, activations: Tensor) -> Tensor:
    return (gradients * activations).sum(1).clamp(min=0)


def _maps_of_layers(
    subject: Subject, layers: tuple[str, ...], positive: bool
) -> tuple[dict[str, Tensor], str]:
    """Return each layer's map `[B h w]` by its name, and the name of the deepest."""
    with subject.several(layers) as run:
        subject.passes.head_backwards += len(subject)
        gradients = run.vjp(subject.mean_cotangents(run.features))
        maps = {
            name: _product(gradient.clamp(min=0) if positive else gradient, activations)
            for name, gradient, activations in zip(
                run.layers, gradients, run.activations, strict=True
            )
        }
        return maps, run.layers[run.depth.index(max(run.depth))]


def _fused(subject: Subject, maps: Iterable[Tensor]) -> Tensor:
    """Return the pixelwise maximum at the input's size, `[B H W]`."""
    size = _size(subject)
    return torch.stack([resize(one, size) for one in maps]).amax(0)


def _size(subject: Subject) -> tuple[int, int]:
    """Return (H, W) of the input; (1, L) over positions."""
    sides = subject.images.shape
    return (1 if subject.network.layout == "bkl" else sides[-2], sides[-1])
