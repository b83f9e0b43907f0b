"""A tile: one picture with its map and its words; what panels and pages are laid out from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from .canvas import font_of
from .overlay import ALPHA, Extent, checked_cam, checked_extent, overlay

Scale = Literal["joint", "each"]
CHANGED: Final = "changed since the build"


@dataclass
class Tile:
    """A picture, its map and what to write below.

    image: None where it cannot be had any more; the map is then shown by itself.
    cam: `[h w]`, >= 0 unless `signed`; None for a picture without a map.
    extent: (x0, y0, x1, y1) in pixels of `image` that the map covers; default all of it.
    caption: usually the id; shortened in the middle where it is too long.
    subcaption: label, distance, ...; "\\n" begins another line.
    warning: what casts doubt on all of it, shown first and apart.
    signed: negative values of the map are evidence against, drawn in another colour.
    changed: the picture is another than the map was made of: each is shown by itself, and the
        picture says so.
    """

    image: Image.Image | None
    cam: np.ndarray | None = None
    extent: Extent | None = None
    caption: str = ""
    subcaption: str = ""
    warning: str = ""
    signed: bool = False
    changed: bool = False

    @property
    def cropped(self) -> bool:
        """Whether the map leaves a visible part of the picture out."""
        if self.image is None or self.cam is None or self.extent is None or self.changed:
            return False
        width, height = self.image.size
        x0, y0, x1, y1 = checked_extent(self.extent, width, height)
        # Half a pixel is rounding, not a crop.
        return x0 > 0.5 or y0 > 0.5 or x1 < width - 0.5 or y1 < height - 0.5


def check_scale(scale: str) -> None:
    """Refuse a scale that is neither of the two."""
    if scale not in ("joint", "each"):
        raise InputError(f'scale is {scale!r}; give "joint" (one for all results) or "each"')


def top_value(tiles: Iterable[Tile]) -> float:
    """The largest value of the tiles' maps: the end of their common colour scale; 0 for none."""
    return max(
        (
            float(np.abs(checked_cam(tile.cam, tile.signed)).max())
            for tile in tiles
            if tile.cam is not None
        ),
        default=0.0,
    )


def top_values(query: Tile, results: Sequence[Tile], scale: Scale) -> tuple[float, list[float]]:
    """The end of the colour scale of the query and of each result.

    The query's map always has its own: its weights are averaged from neighbours of unit norm, the
    results' are their own, so the two are in different units.
    """
    if scale == "each":
        return top_value([query]), [top_value([tile]) for tile in results]
    return top_value([query]), [top_value(results)] * len(results)


def fitted(tile: Tile, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the tile's picture, made to fit a box with its shape kept."""
    if tile.image is None:
        return min(width, height), min(width, height)
    across, down = tile.image.size
    factor = min(width / across, height / down)
    return max(1, round(across * factor)), max(1, round(down * factor))


def shrunk(tile: Tile, side: int) -> Tile:
    """The tile with its picture at `side` pixels on the longest side: there it draws the same."""
    size = fitted(tile, side, side)
    picture = _resized(tile, size)
    if picture is None or tile.image is None:
        return tile
    across, down = size[0] / tile.image.width, size[1] / tile.image.height
    x0, y0, x1, y1 = checked_extent(tile.extent, *tile.image.size)
    return replace(tile, image=picture, extent=(x0 * across, y0 * down, x1 * across, y1 * down))


def plain_picture(tile: Tile, size: tuple[int, int]) -> Image.Image | None:
    """The tile's picture at (width, height) `size`, with a note on it where it is `changed`."""
    picture = _resized(tile, size)
    if picture is not None and tile.changed:
        _draw_note(picture, CHANGED)
    return picture


def _resized(tile: Tile, size: tuple[int, int]) -> Image.Image | None:
    if tile.image is None:
        return None
    return tile.image.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def mapped_picture(
    tile: Tile, size: tuple[int, int], vmax: float, alpha: float = ALPHA, cmap: str | None = None
) -> Image.Image | None:
    """The tile's picture at `size` with its map over it, and a frame around a cropped extent.

    The picture is made small first and the map drawn at that size: the same, without the cost of
    colouring megapixels.
    """
    if tile.cam is None:
        return None
    plain = _resized(tile, size)
    if plain is None or tile.image is None or tile.changed:
        # By itself: on a middle grey, at full opacity.
        grey = Image.new("RGB", size, (128, 128, 128))
        return overlay(grey, tile.cam, None, vmax, 1.0, cmap, tile.signed)
    extent = checked_extent(tile.extent, *tile.image.size)
    across, down = size[0] / tile.image.width, size[1] / tile.image.height
    small = (extent[0] * across, extent[1] * down, extent[2] * across, extent[3] * down)
    drawn = overlay(plain, tile.cam, small, vmax, alpha, cmap, tile.signed)
    if tile.cropped:
        _draw_frame(drawn, small)
    return drawn


def _draw_note(picture: Image.Image, words: str) -> None:
    """Words on a dark strip across the bottom, as large as fit."""
    room = picture.width - 8
    size = next((size for size in (13, 11, 9) if font_of(size, True).getlength(words) <= room), 7)
    height = min(picture.height, size + 10)
    draw = ImageDraw.Draw(picture, "RGBA")
    top = picture.height - height
    draw.rectangle((0, top, picture.width, picture.height), fill=(20, 22, 28, 215))
    middle = (picture.width // 2, top + height // 2)
    draw.text(middle, words, (255, 255, 255), font_of(size, True), anchor="mm")


def _draw_frame(picture: Image.Image, extent: Extent) -> None:
    """A thin line, light on dark, around what the network saw."""
    width, height = picture.size
    x0, y0 = max(0, round(extent[0])), max(0, round(extent[1]))
    x1, y1 = min(width, round(extent[2])) - 1, min(height, round(extent[3])) - 1
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255, 190))
    draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(0, 0, 0, 70))


def clean(text: str) -> str:
    """Text that can be drawn and encoded: no control characters, no lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in text)
