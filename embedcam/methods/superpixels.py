"""A picture cut into regions that are masked as one."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

KINDS = ("grid", "slic")


def superpixels_of(image: Tensor, kind: Any, wanted: int) -> Tensor:
    """Labels 0 .. d - 1 of the pixels, `[H W]`, on the image's device.

    Args:
        image: `[C H W]`.
        kind: "grid", "slic", or labels `[H W]`, an array or tensor of whole numbers.
        wanted: d, nearly; of "grid" and "slic".

    Raises:
        InputError: an unknown kind, labels that do not fit, or "slic" without scikit-image.
    """
    if not isinstance(kind, str):
        labels = _given(kind, (image.shape[1], image.shape[2]))
    elif kind not in KINDS:
        raise InputError(
            f"superpixels = {kind!r} is unknown; use {', '.join(map(repr, KINDS))} or labels [H W]"
        )
    elif kind == "grid":
        labels = grid(image.shape[1], image.shape[2], wanted)
    else:
        labels = _slic(image, wanted)
    # Numbered without gaps: every label then is a column of the regression that something moves.
    numbered = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return torch.from_numpy(numbered).to(image.device)


def grid(height: int, width: int, wanted: int) -> np.ndarray:
    """A regular grid of nearly square cells, about `wanted` of them, at most one a pixel."""
    side = (height * width / wanted) ** 0.5
    rows, columns = (min(n, max(1, round(n / side))) for n in (height, width))
    of_row, of_column = np.arange(height) * rows // height, np.arange(width) * columns // width
    labels: np.ndarray = of_row[:, None] * columns + of_column
    return labels


def _slic(image: Tensor, wanted: int) -> np.ndarray:
    """SLIC on the image scaled to [0, 1], smoothed by a pixel; in Lab where it has three channels.

    Unsmoothed, pixel noise breaks the regions into specks that are then merged, down to one.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise InputError(
            "superpixels = 'slic' needs scikit-image, which is not installed; "
            "pip install embedcam[lime], or use superpixels='grid'"
        ) from error
    pixels = image.double().cpu().numpy().transpose(1, 2, 0)
    span = pixels.max() - pixels.min()
    pixels = (pixels - pixels.min()) / (span if span > 0 else 1)
    labels: np.ndarray = slic(
        pixels,
        n_segments=wanted,
        sigma=1,
        convert2lab=len(image) == 3,
        channel_axis=-1,
        start_label=0,
    )
    return labels


def _given(labels: Any, size: tuple[int, int]) -> np.ndarray:
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if found.shape != size or found.dtype.kind not in "iu":
        raise InputError(
            f"superpixels are {list(found.shape)} of {found.dtype}; expected a label, a whole "
            f"number, for each pixel [{size[0]} {size[1]}], or 'grid' or 'slic'"
        )
    return found
