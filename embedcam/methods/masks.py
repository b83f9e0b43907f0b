"""Masked pictures: masks, what takes the place of masked pixels, and the scores of what is left."""

from collections.abc import Callable
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
    """Return what masked pixels of one input `[C H W]`, or a signal or table, become; its shape.

    "mean" is 0 in the normalized input, the mean color: what masking by a product fades to, as the
    authors of the masking methods do. "black" is a black pixel, -mean/std of the `preprocess`;
    "blur" the image itself blurred (51 px, sigma 50); a number fills with that value; a tensor or
    an array is taken as it is, broadcast.
    """
    if isinstance(fill, Tensor | np.ndarray | np.generic | int | float) and not isinstance(
        fill, bool | np.bool_
    ):
        return _numbers(fill, image)
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
        return blurred(image)
    mean, std = (getattr(preprocess, name, None) for name in ("mean", "std"))
    if mean is None or std is None:
        raise InputError(
            "fill 'black' is -mean/std of the preprocessing, and this network has none that says "
            "them; use 'mean', 'blur' or a number"
        )
    return _numbers((-image.new_tensor(mean) / image.new_tensor(std))[:, None, None], image)


def fill_of(subject: Subject, row: int) -> Tensor:
    """Return the subject's fill for one of its images, `[C H W]`."""
    return fill_like(subject.images[row], subject.fill, subject.network.preprocess)


def _numbers(fill: Any, image: Tensor) -> Tensor:
    try:
        numbers = fill if isinstance(fill, Tensor) else torch.as_tensor(np.asarray(fill).copy())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"fill is an array of {np.asarray(fill).dtype}, which torch does not read; give "
            "float32 or float64"
        ) from error
    if numbers.is_complex():
        raise InputError(f"fill is of {numbers.dtype}; give real numbers")
    try:
        whole = numbers.to(image).expand_as(image)
    except RuntimeError as error:
        fits = [len(image), *[1] * (image.ndim - 1)]
        raise InputError(
            f"fill has shape {list(numbers.shape)}, which does not broadcast to one input "
            f"{list(image.shape)}; give a number, or a tensor such as {fits}"
        ) from error
    # In the input's own precision, which may not reach as far.
    if not bool(torch.isfinite(whole).all()):
        raise InputError(
            f"fill holds NaN or infinity in {image.dtype}, the input's own precision; give finite "
            "numbers"
        )
    return whole


def blurred(image: Tensor, size: int = BLUR_SIZE, sigma: float = BLUR_SIGMA) -> Tensor:
    """Blur `[C H W]`, Gaussian with reflected borders; the kernel shrinks to fit small inputs."""
    for axis in (-2, -1):
        reach = min(size // 2, image.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
        padded = F.pad(image[None], padding, mode="reflect")[0][:, None]
        image = F.conv2d(padded, kernel.reshape(shape))[:, 0]
    return image


def unit_masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return m = N(U(A)): maps `[n h w]` resized to the image, then min-max to [0, 1].

    A flat map becomes zeros, never NaN, and never the rounding of its resizing blown up.
    """
    resized = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = resized.amin((-2, -1), keepdim=True), resized.amax((-2, -1), keepdim=True)
    span = high - low
    uneven = (span > 0) & ~flat(maps)[:, None, None]
    return (resized - low) / torch.where(span > 0, span, 1) * uneven


def flat(maps: Tensor) -> Tensor:
    """Return which of the maps `[... h w]` have one value everywhere, `[...]`."""
    return maps.amin((-2, -1)) == maps.amax((-2, -1))


def pictures_only(subject: Subject, title: str) -> None:
    """Refuse inputs without a height and a width, whose regions cannot be masked."""
    if subject.network.layout_options[0] == "bkl" or subject.images.ndim != 4:
        raise NetworkError(
            f"{title} masks regions of a picture [C H W], and this network's inputs are "
            f"{list(subject.images.shape[1:])}, positions of a signal, table or text; use "
            "'ablationcam'"
        )


def masked_scores(
    subject: Subject, row: int, shown: Tensor, hidden: Tensor, total: int,
    masks: Callable[[slice], Tensor],
) -> Tensor:  # fmt: skip
    """Return y `[total]` of X m + F (1 - m) for X `shown` and F `hidden`, both `[C H W]`.

    `masks` makes those of a slice, `[n H W]`; a batch at a time is in memory.
    """
    pieces = (hidden + (shown - hidden) * masks(part)[:, None] for part in subject.batches(total))
    return subject.scores(row, pieces)


def map_scores(subject: Subject, row: int, maps: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
    """Return y of a picture seen through m = N(U(map)) of maps `[n h w]`, `[n]`; 0 for flat ones.

    `shown` and `hidden` as `masked_scores` takes them; flat maps are not put through the network.
    """
    scores = maps.new_zeros(len(maps))
    seen = ~flat(maps)
    if seen.any():
        uneven, size = maps[seen], (shown.shape[-2], shown.shape[-1])
        scores[seen] = masked_scores(
            subject, row, shown, hidden, len(uneven), lambda part: unit_masks(uneven[part], size)
        ).to(scores)
    return scores
