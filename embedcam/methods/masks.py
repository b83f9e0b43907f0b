"""What takes the place of masked pixels: one stated fill, which is also the baseline."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, NetworkError
from ..recipe.registry import FILLS
from .subject import Subject

BLUR_SIZE, BLUR_SIGMA = 51, 50.0


def fill_like(image: Tensor, fill: Any, preprocess: Any = None) -> Tensor:
    """What masked pixels are filled with, like one input: `[C H W]`, or a signal's or table's.

    "mean" is 0 in the normalised input, the mean colour: what masking the normalised input by a
    product fades to, as the authors of the masking methods do. "black" is a black pixel, -mean/std;
    "blur" the image itself blurred (51 px, sigma 50); a number fills with that value; a tensor or
    an array is taken as it is, broadcast.

    Args:
        image: one input; `[C H W]` for "black" and "blur".
        fill: "mean", "black", "blur", a number (Python's or NumPy's), a tensor or an array.
        preprocess: the network's, for "black".

    Raises:
        InputError: an unknown fill, one that does not fit or is not finite, "blur" or "black" on
            what is no picture, or "black" without a preprocessing that knows mean and std.
    """
    if isinstance(fill, Tensor | np.ndarray | np.generic | int | float) and not isinstance(
        fill, bool | np.bool_
    ):
        return _given(fill, image)
    if not isinstance(fill, str) or fill not in FILLS:
        raise InputError(
            f"fill = {fill!r} is unknown; use {', '.join(FILLS)}, a number, a tensor or an array"
        )
    if fill == "mean":
        return torch.zeros_like(image)
    if image.ndim != 3:
        raise InputError(
            f"fill {fill!r} is for pictures [C H W], and this network's inputs are "
            f"{list(image.shape)}; use 'mean' or a number"
        )
    if fill == "blur":
        return blurred(image[None])[0]
    mean, std = (getattr(preprocess, name, None) for name in ("mean", "std"))
    if mean is None or std is None:
        raise InputError(
            "fill 'black' is -mean/std of the preprocessing, and this network has none that says "
            "them; use 'mean', 'blur' or a number"
        )
    colour = -image.new_tensor(mean) / image.new_tensor(std)
    return _broadcast(colour[:, None, None], image)


def blurred(images: Tensor, size: int = BLUR_SIZE, sigma: float = BLUR_SIGMA) -> Tensor:
    """Gaussian blur with reflected borders, `[B C H W]`; the kernel shrinks to fit small inputs."""
    height, width = images.shape[-2:]
    for axis, side in ((-2, height), (-1, width)):
        reach = min(size // 2, side - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
        flat = F.pad(images, padding, mode="reflect").flatten(0, 1)[:, None]
        images = F.conv2d(flat, kernel.reshape(shape)).reshape(*images.shape)
    return images


def unit_masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """m = N(U(A)): maps `[n h w]` resized to the image, then min-max to [0, 1].

    A flat map becomes zeros, never NaN, and never the rounding of its resizing blown up.

    Args:
        maps: `[n h w]`.
        size: (H, W).

    Returns:
        `[n H W]`.
    """
    drawn = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = drawn.amin((-2, -1), keepdim=True), drawn.amax((-2, -1), keepdim=True)
    span = high - low
    uneven = (span > 0) & ~flat(maps)[:, None, None]
    return (drawn - low) / torch.where(span > 0, span, 1) * uneven


def flat(maps: Tensor) -> Tensor:
    """Which of the maps `[... h w]` have one value everywhere, `[...]`."""
    return maps.amin((-2, -1)) == maps.amax((-2, -1))


def masked(image: Tensor, fill: Tensor, masks: Tensor) -> Tensor:
    """X m + X_fill (1 - m): one image under several masks.

    Args:
        image: X, `[C H W]`.
        fill: as `fill_like` gives, `[C H W]`.
        masks: m, `[n H W]`; 1 shows the image.

    Returns:
        `[n C H W]`.
    """
    return fill + (image - fill) * masks[:, None]


def pictures_only(subject: Subject, title: str, instead: str) -> None:
    """Refuse inputs without a height and a width, whose regions cannot be masked.

    Args:
        subject: with the inputs.
        title: the method's.
        instead: a method that works over positions.

    Raises:
        NetworkError: in one sentence.
    """
    if subject.network.layout_options[0] == "bkl" or subject.images.ndim != 4:
        raise NetworkError(
            f"{title} masks regions of a picture [C H W], and this network's inputs are "
            f"{list(subject.images.shape[1:])}, positions of a signal, table or text; use "
            f"{instead!r}"
        )


def _given(fill: Any, image: Tensor) -> Tensor:
    """A fill in numbers, checked."""
    try:
        numbers = fill if isinstance(fill, Tensor) else torch.as_tensor(np.asarray(fill).copy())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"fill is an array of {np.asarray(fill).dtype}, which torch does not read; give "
            "float32 or float64"
        ) from error
    if numbers.is_complex():
        raise InputError(f"fill is of {numbers.dtype}; give real numbers")
    # In the input's own precision, which may not reach as far.
    whole = _broadcast(numbers, image)
    if not bool(torch.isfinite(whole).all()):
        raise InputError(
            f"fill holds NaN or infinity in {image.dtype}, the input's own precision; give finite "
            "numbers"
        )
    return whole


def _broadcast(fill: Tensor, image: Tensor) -> Tensor:
    try:
        return fill.to(image).expand_as(image)
    except RuntimeError as error:
        fits = [len(image), *[1] * (image.ndim - 1)]
        raise InputError(
            f"fill has shape {list(fill.shape)}, which does not broadcast to one input "
            f"{list(image.shape)}; give a number, or a tensor such as {fits}"
        ) from error
