"""One map over one picture.

Colour and opacity both grow with the value: no evidence leaves the picture as it is, so a weak map
looks weak, and there is no step between a faint map, an empty one and what the network did not see.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from ..errors import InputError

Extent = tuple[float, float, float, float]

COLORMAP: Final = "inferno"
SIGNED_COLORMAP: Final = "coolwarm"
"""Red where evidence speaks for, blue where it speaks against."""
ALPHA: Final = 0.7
# Rows of a picture coloured at a time: a photograph of 80 megapixels needs no gigabytes of floats.
_STRIP: Final = 256


def colormap(values: np.ndarray, name: str = COLORMAP) -> np.ndarray:
    """Colours of values in [0, 1] (clipped): `[...]` to float32 RGB `[... 3]` in [0, 1].

    name: any of matplotlib's colour maps. Perceptually uniform ones show equal steps as equal:
        inferno, viridis, magma, plasma, cividis.
    """
    table = _table(name)
    values = _finite("values", values)
    # Against rounding to the nearest entry: at 1.0 the last one, no index beyond it.
    steps = np.rint(np.clip(values, 0, 1) * (len(table) - 1)).astype(np.intp)
    return table[steps]


@lru_cache(maxsize=16)
def _table(name: str) -> np.ndarray:
    """The 256 colours of a map, float32 `[256 3]`."""
    if name == COLORMAP:
        # Our own copy (matplotlib's, CC0): what answers queries needs no matplotlib.
        own = np.fromfile(Path(__file__).with_name(f"{name}.f32"), "<f4").reshape(256, 3)
        own.setflags(write=False)
        return own
    try:
        from matplotlib import colormaps
    except ImportError:
        raise InputError(
            f"colour map {name!r} is matplotlib's, which is not installed; take {COLORMAP}, or run "
            "pip install matplotlib"
        ) from None
    try:
        found = colormaps[name]
    except (KeyError, TypeError):
        raise InputError(
            f"colour map {name!r} is not known; take inferno, viridis, magma, plasma, cividis or "
            "another of matplotlib's"
        ) from None
    table = np.asarray(found(np.linspace(0, 1, 256)), dtype=np.float32)[:, :3]
    table.setflags(write=False)
    return table


def stretch(cam: np.ndarray, size: tuple[int, int], extent: Extent | None = None) -> np.ndarray:
    """A map at the resolution of the picture: `[h w]` to float32 `[H W]`, 0 outside the extent.

    Bilinear, pixel centres aligned (as `embedcam.cam.resize`, which it equals without an extent),
    but onto any rectangle: its edges may fall between pixels or outside the picture. A pixel
    belongs to the extent if its centre does.

    size: (H, W) of the picture.
    extent: (x0, y0, x1, y1) in pixels of the picture that the map covers; default all of it.
    """
    cam = checked_cam(cam)
    height, width = size
    x0, y0, x1, y1 = checked_extent(extent, width, height)
    rows, columns = _Axis(cam.shape[0], height, y0, y1), _Axis(cam.shape[1], width, x0, x1)
    whole = np.zeros((height, width), dtype=np.float32)
    whole[rows.span, columns.span] = rows.interpolate(columns.interpolate(cam.T).T)
    return whole


def overlay(
    image: Image.Image,
    cam: np.ndarray,
    extent: Extent | None = None,
    vmax: float | None = None,
    alpha: float = ALPHA,
    cmap: str | None = None,
    signed: bool = False,
) -> Image.Image:
    """The picture with a map over it, at the picture's size.

    A pixel of value v, clipped to [0, vmax], gets the colour of v / vmax at an opacity of
    alpha * v / vmax. Outside the extent, and everywhere if the map is empty, the picture is plain.

    cam: `[h w]`, finite; negative values count as none, unless `signed`.
    extent: (x0, y0, x1, y1) in pixels of the picture that the map covers; default all of it.
    vmax: the value of the strongest colour; default the map's own maximum. Give the same one to
        maps that are to be compared.
    cmap: default `COLORMAP`, or `SIGNED_COLORMAP`.
    signed: negative values are shown too, by the other half of the colour map, and vmax is the
        largest magnitude.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"overlay: expected a Pillow image, given {type(image).__name__}")
    cam = checked_cam(cam, signed)
    cmap = cmap or (SIGNED_COLORMAP if signed else COLORMAP)
    if not 0 <= alpha <= 1:  # NaN included
        raise InputError(f"overlay: alpha is {alpha}; give an opacity from 0 to 1")
    strongest = float(np.abs(cam).max())
    top = strongest if vmax is None else float(vmax)
    if not math.isfinite(top):
        raise InputError(f"overlay: vmax is {top}; give a finite number")
    width, height = image.size
    x0, y0, x1, y1 = checked_extent(extent, width, height)
    _table(cmap)
    plain = image.convert("RGB")  # a copy, also of RGB
    if top <= 0 or strongest <= 0:
        return plain
    pixels = np.array(plain)
    rows, columns = _Axis(cam.shape[0], height, y0, y1), _Axis(cam.shape[1], width, x0, x1)
    across = columns.interpolate(cam.T).T
    for start in range(0, len(rows), _STRIP):
        part = slice(start, start + _STRIP)
        value = np.clip(rows.interpolate(across, part) / np.float32(top), -1, 1)
        where = (slice(rows.span.start + start, rows.span.stop)), columns.span
        region = pixels[where][: len(value)]
        colours = colormap((1 + value) / 2 if signed else value, cmap) * np.float32(255)
        opacity = np.float32(alpha) * np.abs(value)[..., None]
        # In float, then rounded: 8-bit arithmetic would wrap around.
        region[...] = np.rint(region + opacity * (colours - region))
    return Image.fromarray(pixels)


class _Axis:
    """Linear interpolation of n cells that cover [low, high) onto the pixels whose centres do."""

    def __init__(self, n_cells: int, n_pixels: int, low: float, high: float) -> None:
        first = min(max(math.ceil(low - 0.5), 0), n_pixels)
        last = min(max(math.ceil(high - 0.5), first), n_pixels)
        self.span = slice(first, last)
        at = (np.arange(first, last) + 0.5 - low) / (high - low) * n_cells - 0.5
        at = np.clip(at, 0, n_cells - 1)
        self.below = np.floor(at).astype(np.intp)
        self.above = np.minimum(self.below + 1, n_cells - 1)
        self.share = (at - self.below).astype(np.float32)[:, None]

    def __len__(self) -> int:
        return len(self.below)

    def interpolate(self, cells: np.ndarray, part: slice = slice(None)) -> np.ndarray:
        """`[n_cells m]` to `[pixels m]`."""
        below, above = cells[self.below[part]], cells[self.above[part]]
        mixed: np.ndarray = below + self.share[part] * (above - below)
        return mixed


def checked_extent(extent: Extent | None, width: int, height: int) -> Extent:
    """The rectangle that a map covers, (x0, y0, x1, y1); the whole picture by default."""
    if extent is None:
        return 0.0, 0.0, float(width), float(height)
    values = [float(value) for value in extent]
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise InputError(f"extent is {extent}; give four finite numbers (x0, y0, x1, y1)")
    x0, y0, x1, y1 = values
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"extent is {extent}; expected x0 < x1 and y0 < y1, in pixels")
    return x0, y0, x1, y1


def checked_cam(cam: np.ndarray, signed: bool = False) -> np.ndarray:
    """float32 `[h w]`, negative values as 0 unless signed."""
    values = np.asarray(cam)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"cam: expected a map [h w], given {list(values.shape)}")
    finite = _finite("cam", values)
    return finite if signed else np.maximum(finite, 0)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name}: expected numbers, given {values.dtype}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values)).sum())
        raise InputError(
            f"{name}: {n_bad} of {values.size} values are NaN or infinite; a map is made of finite "
            "numbers, so look at the weights and activations that it came from"
        )
    return values
