"""One map over one picture; color and opacity both grow with the value, so weak maps look weak."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .._checks import number
from ..errors import InputError

Extent = tuple[float, float, float, float]

COLORMAP: Final = "inferno"
SIGNED_COLORMAP: Final = "coolwarm"
"""Red where evidence speaks for, blue where it speaks against."""
ALPHA: Final = 0.7
# Rows of a picture colored at a time: a photograph of 80 megapixels needs no gigabytes of floats.
_STRIP: Final = 256


def colormap(values: np.ndarray, name: str = COLORMAP) -> np.ndarray:
    """Return the colors of values in [0, 1] (clipped): `[...]` to float32 RGB `[... 3]` in [0, 1].

    name: any of matplotlib's color maps; inferno, viridis, magma, plasma and cividis show equal
    steps as equal.
    """
    table = _table(name)
    # Against rounding to the nearest entry: at 1.0 the last one, no index beyond it.
    return np.asarray(table[np.rint(np.clip(values, 0, 1) * (len(table) - 1)).astype(np.intp)])


@lru_cache(maxsize=16)
def _table(name: str) -> np.ndarray:
    """Return the 256 colors of a map, float32 `[256 3]`."""
    if name in (COLORMAP, SIGNED_COLORMAP):
        # Our own copies (matplotlib's, CC0): what answers queries needs no matplotlib.
        return np.fromfile(Path(__file__).with_name(f"{name}.f32"), "<f4").reshape(256, 3)
    try:
        from matplotlib import colormaps

        return np.asarray(colormaps[name](np.linspace(0, 1, 256)), dtype=np.float32)[:, :3]
    except ImportError:
        raise InputError(
            f"colour map {name!r} is matplotlib's, which is not installed; take {COLORMAP}, or "
            "run pip install matplotlib"
        ) from None
    except (KeyError, TypeError):
        raise InputError(
            f"colour map {name!r} is not known; take inferno, viridis, magma, plasma, cividis "
            "or another of matplotlib's"
        ) from None


def overlay(
    image: Image.Image,
    cam: ArrayLike,
    extent: Extent | None = None,
    vmax: float | None = None,
    alpha: float = ALPHA,
    cmap: str | None = None,
    signed: bool = False,
) -> Image.Image:
    """Return the picture with a map over it, at the picture's size.

    A pixel of value v, clipped to [0, vmax], gets the color of v / vmax at an opacity of
    alpha * v / vmax. Outside the box, and everywhere if the map is empty, the picture is plain.

    Parameters
    ----------
    image : a Pillow picture, left as it is
    cam : `[h w]`, finite; negative values count as none, unless `signed`
    extent : crop box (x0, y0, x1, y1) in pixels that the map covers; default the whole picture
    vmax : value of the strongest color; default the map's own maximum. Give the same one to maps
        that are to be compared
    alpha : opacity of the strongest color, 0 to 1
    cmap : default `COLORMAP`, or `SIGNED_COLORMAP`
    signed : show negative values, too, by the other half of the color map; vmax is then the
        largest magnitude

    Raises
    ------
    InputError
        An argument that cannot be drawn.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"overlay: expected a Pillow image, given {type(image).__name__}")
    values = checked_cam(cam, signed)
    number("overlay: alpha", alpha, 0, 1)
    top = float(np.abs(values).max()) if vmax is None else number("overlay: vmax", vmax)
    box = checked_box(extent, *image.size)
    return paint(image.convert("RGB"), values, box, top, alpha, cmap, signed)


def paint(
    plain: Image.Image,
    cam: np.ndarray,
    box: Extent,
    top: float,
    alpha: float = ALPHA,
    cmap: str | None = None,
    signed: bool = False,
) -> Image.Image:
    """Return an RGB picture with a checked map over a checked box; itself where nothing shows."""
    table = _table(cmap or (SIGNED_COLORMAP if signed else COLORMAP))
    if top <= 0 or not cam.any():
        return plain
    pixels = np.array(plain)
    place, spread, below, above, shares = _spread(cam, plain.size, box)
    for start in range(0, len(below), _STRIP):
        part = slice(start, start + _STRIP)
        lower = spread[below[part]]
        values = lower + shares[part] * (spread[above[part]] - lower)
        share = np.clip(values / np.float32(top), -1, 1)
        steps = np.clip((1 + share) / 2 if signed else share, 0, 1) * (len(table) - 1)
        colors = table[np.rint(steps).astype(np.intp)] * np.float32(255)
        opacity = np.float32(alpha) * np.abs(share)[..., None]
        region = pixels[place][part]
        # In float, then rounded: 8-bit arithmetic would wrap around.
        region[...] = np.rint(region + opacity * (colors - region))
    return Image.fromarray(pixels)


def _spread(
    cam: np.ndarray, size: tuple[int, int], box: Extent
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the pixels (rows, columns) of a box, and the map spread over its columns.

    Each row of pixels lies between two rows of that, below and above, at a share of the way.
    """
    axes = []
    for cells, pixels, low, high in (
        (cam.shape[1], size[0], box[0], box[2]),
        (cam.shape[0], size[1], box[1], box[3]),
    ):
        first = min(max(math.ceil(low - 0.5), 0), pixels)
        last = min(max(math.ceil(high - 0.5), first), pixels)
        at = (np.arange(first, last) + 0.5 - low) / (high - low) * cells - 0.5
        at = np.clip(at, 0, cells - 1)
        below = np.floor(at).astype(np.intp)
        share = (at - below).astype(np.float32)[:, None]
        axes.append((slice(first, last), below, np.minimum(below + 1, cells - 1), share))
    (columns, below, above, share), (rows, lower, upper, shares) = axes
    spread = (cam.T[below] + share * (cam.T[above] - cam.T[below])).T
    return (rows, columns), spread, lower, upper, shares


def checked_box(extent: Extent | None, width: int, height: int) -> Extent:
    """Return the crop box (x0, y0, x1, y1) that a map covers; the whole picture by default."""
    if extent is None:
        return 0.0, 0.0, float(width), float(height)
    if len(extent) != 4 or not np.isfinite(extent).all():
        raise InputError(f"extent is {extent}; give four finite numbers (x0, y0, x1, y1)")
    x0, y0, x1, y1 = map(float, extent)
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"extent is {extent}; expected x0 < x1 and y0 < y1, in pixels")
    return x0, y0, x1, y1


def scale_box(box: Extent, size: tuple[int, int], new_size: tuple[int, int]) -> Extent:
    """Return a crop box of a picture of (width, height) `size` for the same at another size."""
    across, down = new_size[0] / size[0], new_size[1] / size[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def checked_cam(cam: ArrayLike, signed: bool = False) -> np.ndarray:
    """Return a map as float32 `[h w]`, negative values as 0 unless signed."""
    values = np.asarray(cam)
    if values.dtype.kind not in "fiub":
        raise InputError(f"cam: expected numbers, given {values.dtype}")
    values = values.astype(np.float32, copy=False)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"cam: expected a map [h w], given {list(values.shape)}")
    if (wrong := np.count_nonzero(~np.isfinite(values))) > 0:
        raise InputError(
            f"cam: {wrong} of {values.size} values are NaN or infinite; a map is made of finite "
            "numbers, so look at the weights and activations that it came from"
        )
    return values if signed else np.maximum(values, 0)
