"""Methods that go back to the pixels: Guided Backpropagation and Guided Grad-CAM."""

from torch import Tensor

from ..ops import cam as draw
from ..ops import resize
from .subject import Found, Subject
from .weights import gradcam as gradcam_weights


def guided_backprop(subject: Subject) -> Found:
    """Guided Backpropagation: dy/dX, kept at each ReLU only where input and gradient are positive.

    Springenberg et al. 2015, section 3.4. Summed over the input's channels: where the channels
    speak against each other, so does the map. One forward and one full backward pass. The module is
    not changed: its rectifiers (ReLU and ReLU6, modules or functions) are met as they are called. A
    `clamp(min=0)` is no rectifier here.

    Returns:
        Maps `[B H W]` at the input's size, of BOTH signs.

    Raises:
        NetworkError: the network calls no ReLU, as transformers and ConvNeXt; or its output does
            not depend on its input.
        InputError: inputs that are numbers of words.
    """
    return Found(maps=_guided(subject))


def guided_gradcam(subject: Subject) -> Found:
    """Guided Grad-CAM: Guided Backpropagation times U(Grad-CAM) (Selvaraju et al. 2017, sec. 3.2).

    U is bilinear, as in the paper. Signed, as Guided Backpropagation is: where the map is zero, one
    of the two says nothing.

    Returns:
        Maps `[B H W]` at the input's size, of BOTH signs.

    Raises:
        as `guided_backprop`.
    """
    gradients = subject.gradients
    grid = draw(gradcam_weights(gradients), subject.activations)
    pixels = _guided(subject)
    return Found(maps=pixels * resize(grid, (pixels.shape[-2], pixels.shape[-1])))


def _guided(subject: Subject) -> Tensor:
    """The guided gradient summed over the input's channels, `[B H W]` (`[B 1 L]`)."""
    gradient = subject.input_gradient(guided=True)
    if subject.network.layout == "bkl":
        # [B C L] or [B L]: one row of positions.
        return gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1, keepdim=True)
    return gradient.sum(1)
