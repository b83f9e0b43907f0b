"""One PNG: the query with its map, the results with theirs, and the colour scale."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from embedcam.errors import InputError
from embedcam.render.overlay import ALPHA, COLORMAP, overlay
from embedcam.render.tiles import (
    Scale,
    Tile,
    check_scale,
    clean,
    fitted,
    mapped_picture,
    plain_picture,
    top_values,
)

PAPER: Final = (255, 255, 255)
INK: Final = (24, 28, 36)
QUIET: Final = (98, 106, 120)
LINE: Final = (222, 226, 232)
MAT: Final = (243, 245, 248)

_MARGIN: Final = 40
_GAP: Final = 16
_BETWEEN: Final = 44  # query | results
_ROUND: Final = 8
_BAR: Final = (240, 12)
ELLIPSIS: Final = "…"


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib brings along on every platform; without it Pillow's own."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError):  # an installation for serving, or one without fonts
        return ImageFont.load_default(size)


TITLE: Final = (24, True)
HEADING: Final = (13, True)
CAPTION: Final = (14, True)
TEXT: Final = (13, False)
_LEADING: Final = 20


def shorten_middle(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or the longest "beginning…end" of it that fits: both ends of a path tell most."""

    def shorter(kept: int) -> str:
        tail = (kept + 1) // 2
        return text[: kept - tail] + ELLIPSIS + text[len(text) - tail :]

    return _longest(text, shorter, fits)


def shorten_end(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    return _longest(text, lambda kept: text[:kept].rstrip() + ELLIPSIS, fits)


def _longest(text: str, shorter: Callable[[int], str], fits: Callable[[str], bool]) -> str:
    """The text, or `shorter` of it with as many letters kept as fit; at least the ellipsis."""
    if fits(text):
        return text
    # From the first number of letters that does not fit, by halving.
    too_many = bisect_left(range(1, len(text)), True, key=lambda kept: not fits(shorter(kept))) + 1
    return shorter(too_many - 1)


@dataclass(frozen=True)
class _Style:
    """What all tiles of a panel share."""

    side: int
    alpha: float
    cmap: str
    with_maps: bool

    def fits(self, font: tuple[int, bool]) -> Callable[[str], bool]:
        return lambda text: _font(*font).getlength(text) <= self.side


def panel(
    query: Tile,
    results: Sequence[Tile],
    *,
    scale: Scale = "joint",
    title: str | None = None,
    subtitle: str | None = None,
    side: int = 240,
    columns: int = 5,
    alpha: float = ALPHA,
    cmap: str = COLORMAP,
) -> Image.Image:
    """The query in the first column, results beside it; pictures above, their maps below.

    scale: "joint" gives the results one colour scale, so that weak evidence looks weak beside
        strong; "each" gives every map its own. The query's map always has its own.
    side: of a tile, in pixels. columns: results on one line; more go on the next.
    """
    check_scale(scale)
    if columns < 1 or not 48 <= side <= 2048:
        raise InputError(
            f"panel: {columns} columns of {side} pixels; give at least 1 column of 48 to 2048"
        )
    results = list(results)
    with_maps = any(tile.cam is not None for tile in [query, *results])
    style = _Style(side, alpha, cmap, with_maps)
    query_top, result_tops = top_values(query, results, scale)
    on_line = min(columns, len(results))
    lines = [results[i : i + columns] for i in range(0, len(results), columns)] or [[]]
    right = side + (_BETWEEN + on_line * side + (on_line - 1) * _GAP if on_line else 0)
    width = 2 * _MARGIN + max(right, 2 * side)

    canvas = _Canvas(width)
    for text, font, color in ((title, TITLE, INK), (subtitle, TEXT, QUIET)):
        for line in wrap(clean(text or ""), font, width - 2 * _MARGIN):
            canvas.text(_MARGIN, line, font, color, advance=font[0] + 12)
    if title or subtitle:
        canvas.y += 14
    left = _MARGIN + side + _BETWEEN
    canvas.text(_MARGIN, "Query", HEADING, QUIET, advance=0)
    if results:
        heading = "Result" if len(results) == 1 else "Results"
        canvas.text(left, heading, HEADING, QUIET, advance=0)
    canvas.y += 28
    begun = canvas.y
    for index, line_of_results in enumerate(lines):
        tiles = [(left + i * (side + _GAP), tile) for i, tile in enumerate(line_of_results)]
        tops = result_tops[index * columns :][: len(tiles)]
        if index == 0:
            tiles, tops = [(_MARGIN, query), *tiles], [query_top, *tops]
        _draw_line(canvas, tiles, tops, style)
        canvas.y += 24
    if results:
        canvas.rule(_MARGIN + side + _BETWEEN // 2, begun, canvas.y - 24)
    if with_maps:
        canvas.y += 8
        cropped = any(tile.cropped for tile in [query, *results])
        _draw_legend(canvas, query_top, result_tops, scale, style, cropped)
    canvas.y += _MARGIN - 20
    return canvas.image()


def _draw_line(
    canvas: _Canvas, tiles: list[tuple[int, Tile]], tops: list[float], style: _Style
) -> None:
    """Tiles side by side: all pictures of one height, then the maps, then the words."""
    side = style.side
    height = max(fitted(tile, side, side)[1] for _, tile in tiles)
    for (x, tile), top in zip(tiles, tops, strict=True):
        size = fitted(tile, side, height)
        missing = "picture not found" if tile.image is None else ""
        canvas.picture(x, canvas.y, (side, height), plain_picture(tile, size), missing)
        if style.with_maps:
            drawn = mapped_picture(tile, size, top, style.alpha, style.cmap)
            canvas.picture(x, canvas.y + height + 8, (side, height), drawn, "no map")
    canvas.y += height + 14 + (height + 8 if style.with_maps else 0)
    begun, end = canvas.y, canvas.y
    for x, tile in tiles:
        canvas.y = begun
        if tile.caption:
            caption = shorten_middle(clean(tile.caption), style.fits(CAPTION))
            canvas.text(x, caption, CAPTION, INK, _LEADING)
        for text in tile.subcaption.split("\n") if tile.subcaption else []:
            canvas.text(x, shorten_end(clean(text), style.fits(TEXT)), TEXT, QUIET, _LEADING)
        end = max(end, canvas.y)
    canvas.y = end


def scale_note(query_top: float, result_tops: Sequence[float], scale: Scale) -> str:
    """What the colours mean, in one sentence or two."""
    nothing = " There is no positive evidence in the query." if query_top == 0 else ""
    if not result_tops:
        return f"From no evidence to the strongest in this picture.{nothing}"
    if scale == "each":
        return f"Each map on its own scale: strengths cannot be compared between pictures.{nothing}"
    return f"Results share one colour scale. The query's map has its own.{nothing}"


FRAME_NOTE: Final = "A frame marks what the network saw; there is no evidence outside it."


def _draw_legend(
    canvas: _Canvas,
    query_top: float,
    result_tops: list[float],
    scale: Scale,
    style: _Style,
    cropped: bool,
) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    # Over a light grey, as over a picture: the left end is transparent.
    bar = overlay(Image.new("RGB", _BAR, (226, 229, 234)), ramp, None, 1.0, style.alpha, style.cmap)
    none = "no evidence"
    canvas.text(_MARGIN, none, TEXT, QUIET, advance=0)
    x = _MARGIN + round(_font(*TEXT).getlength(none)) + 12
    canvas.picture(x, canvas.y + 2, _BAR, bar, "")
    canvas.text(x + _BAR[0] + 12, "strongest", TEXT, QUIET, advance=26)
    notes = scale_note(query_top, result_tops, scale) + (f" {FRAME_NOTE}" if cropped else "")
    for line in wrap(notes, TEXT, canvas.width - 2 * _MARGIN):
        canvas.text(_MARGIN, line, TEXT, QUIET, _LEADING)


def wrap(text: str, font: tuple[int, bool], width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(*font).getlength(longer) <= width:
            lines[-1] = longer
        else:
            fits = lambda text: _font(*font).getlength(text) <= width  # noqa: E731
            lines.append(shorten_end(word, fits))
    return lines


class _Canvas:
    """Drawing commands down a page whose height is known only at the end."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.y = _MARGIN
        self._commands: list[Callable[[Image.Image, ImageDraw.ImageDraw], None]] = []

    def text(
        self,
        x: int,
        text: str,
        font: tuple[int, bool],
        color: tuple[int, int, int],
        advance: int,
    ) -> None:
        at = (x, self.y)
        self._commands.append(lambda _, draw: draw.text(at, text, color, _font(*font)))
        self.y += advance

    def rule(self, x: int, top: int, bottom: int) -> None:
        self._commands.append(lambda _, draw: draw.line((x, top, x, bottom), LINE))

    def picture(
        self, x: int, y: int, box: tuple[int, int], picture: Image.Image | None, missing: str
    ) -> None:
        """A picture in the middle of a box with round corners, or words where there is none."""
        mat = Image.new("RGB", box, MAT)
        if picture is not None:
            mat.paste(picture, ((box[0] - picture.width) // 2, (box[1] - picture.height) // 2))
        else:
            middle = (box[0] // 2, box[1] // 2)
            ImageDraw.Draw(mat).text(middle, missing, QUIET, _font(*TEXT), anchor="mm")
        corners = _round_corners(box)
        self._commands.append(lambda image, _: image.paste(mat, (x, y), corners))

    def image(self) -> Image.Image:
        image = Image.new("RGB", (self.width, self.y), PAPER)
        draw = ImageDraw.Draw(image)
        for command in self._commands:
            command(image, draw)
        return image


@lru_cache(maxsize=8)
def _round_corners(box: tuple[int, int]) -> Image.Image:
    """A mask with smooth round corners: drawn four times as large, then made small."""
    radius = min(_ROUND, min(box) // 2)
    large = Image.new("L", (4 * box[0], 4 * box[1]), 0)
    edge = (0, 0, 4 * box[0] - 1, 4 * box[1] - 1)
    ImageDraw.Draw(large).rounded_rectangle(edge, 4 * radius, fill=255)
    return ImageChops.duplicate(large.resize(box, Image.Resampling.BOX))
