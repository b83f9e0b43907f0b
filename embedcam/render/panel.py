"""One PNG: the query with its map, the results with theirs, and the colour scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from ..errors import InputError
from .canvas import (
    BAR,
    BETWEEN,
    CAPTION,
    GAP,
    HEADING,
    INK,
    LEADING,
    MARGIN,
    QUIET,
    TEXT,
    TITLE,
    WARNING,
    Canvas,
    font_of,
    shorten_end,
    shorten_middle,
    wrap,
)
from .overlay import ALPHA, COLORMAP, overlay
from .tiles import (
    Scale,
    Tile,
    check_scale,
    clean,
    fitted,
    mapped_picture,
    plain_picture,
    top_values,
)


@dataclass(frozen=True)
class _Style:
    """What all tiles of a panel share."""

    side: int
    alpha: float
    cmap: str
    with_maps: bool

    def fits(self, font: tuple[int, bool]) -> Callable[[str], bool]:
        return lambda text: font_of(*font).getlength(text) <= self.side


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
    right = side + (BETWEEN + on_line * side + (on_line - 1) * GAP if on_line else 0)
    width = 2 * MARGIN + max(right, 2 * side)

    canvas = Canvas(width)
    for text, font, color in ((title, TITLE, INK), (subtitle, TEXT, QUIET)):
        for line in wrap(clean(text or ""), font, width - 2 * MARGIN):
            canvas.text(MARGIN, line, font, color, advance=font[0] + 12)
    if query.warning:
        canvas.text(MARGIN, query.warning, HEADING, WARNING, advance=26)
    if title or subtitle:
        canvas.y += 14
    left = MARGIN + side + BETWEEN
    canvas.text(MARGIN, "Query", HEADING, QUIET, advance=0)
    if results:
        heading = "Result" if len(results) == 1 else "Results"
        canvas.text(left, heading, HEADING, QUIET, advance=0)
    canvas.y += 28
    begun = canvas.y
    for index, line_of_results in enumerate(lines):
        tiles = [(left + i * (side + GAP), tile) for i, tile in enumerate(line_of_results)]
        tops = result_tops[index * columns :][: len(tiles)]
        if index == 0:
            tiles, tops = [(MARGIN, query), *tiles], [query_top, *tops]
        _draw_line(canvas, tiles, tops, style)
        canvas.y += 24
    if results:
        canvas.rule(MARGIN + side + BETWEEN // 2, begun, canvas.y - 24)
    if with_maps:
        canvas.y += 8
        cropped = any(tile.cropped for tile in [query, *results])
        _draw_legend(canvas, query_top, result_tops, scale, style, cropped)
    canvas.y += MARGIN - 20
    return canvas.image()


def _draw_line(
    canvas: Canvas, tiles: list[tuple[int, Tile]], tops: list[float], style: _Style
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
            canvas.text(x, caption, CAPTION, INK, LEADING)
        for text in tile.subcaption.split("\n") if tile.subcaption else []:
            canvas.text(x, shorten_end(clean(text), style.fits(TEXT)), TEXT, QUIET, LEADING)
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
    canvas: Canvas,
    query_top: float,
    result_tops: list[float],
    scale: Scale,
    style: _Style,
    cropped: bool,
) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    # Over a light grey, as over a picture: the left end is transparent.
    bar = overlay(Image.new("RGB", BAR, (226, 229, 234)), ramp, None, 1.0, style.alpha, style.cmap)
    none = "no evidence"
    canvas.text(MARGIN, none, TEXT, QUIET, advance=0)
    x = MARGIN + round(font_of(*TEXT).getlength(none)) + 12
    canvas.picture(x, canvas.y + 2, BAR, bar, "")
    canvas.text(x + BAR[0] + 12, "strongest", TEXT, QUIET, advance=26)
    notes = scale_note(query_top, result_tops, scale) + (f" {FRAME_NOTE}" if cropped else "")
    for line in wrap(notes, TEXT, canvas.width - 2 * MARGIN):
        canvas.text(MARGIN, line, TEXT, QUIET, LEADING)
