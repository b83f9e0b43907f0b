"""A receipt as one picture: what matched where, and the sum that is the similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from PIL import Image, ImageDraw

from ..errors import InputError
from .canvas import (
    BETWEEN,
    CAPTION,
    GAP,
    HEADING,
    INK,
    LEADING,
    LINE,
    MARGIN,
    QUIET,
    TEXT,
    TITLE,
    Canvas,
    font_of,
    shorten_end,
    shorten_middle,
    wrap,
)
from .tiles import Tile, clean, fitted, mapped_picture, plain_picture, top_value

FOR: Final = (179, 3, 38)
AGAINST: Final = (59, 76, 192)
"""The ends of the signed colour map, for bars beside maps."""
_SUM_WIDTH: Final = 400
_BAR_LEFT, _BAR_WIDTH, _NUMBER_WIDTH = 190, 140, 64
_LINK: Final = ((250, 204, 21), (74, 222, 128), (56, 189, 248), (244, 114, 182), (251, 146, 60))


@dataclass(frozen=True)
class Mark:
    """A link between a point of the first picture and one of the second.

    start, end: (x, y) as shares of the picture's width and height.
    """

    start: tuple[float, float]
    end: tuple[float, float]


def receipt_picture(
    tiles: Sequence[Tile],
    amounts: Sequence[tuple[str, float]],
    total: tuple[str, float],
    *,
    apart: int = 0,
    headings: Sequence[str] = (),
    links: Sequence[Mark] = (),
    title: str | None = None,
    note: str = "",
    side: int = 280,
) -> Image.Image:
    """Pictures above their maps, links between the first two, and a sum beside them.

    Args:
        tiles: two or three; signed ones show evidence against in another colour.
        amounts: what is added up, (words, number) each, in this order.
        total: what they sum to.
        apart: so many first amounts are large beside the others, and have no bar.
        headings: one above each tile.
        links: between the first two tiles.
        title: heading of it all.
        note: sentences below.
        side: of a tile, in pixels.
    """
    if not 2 <= len(tiles) <= 3 or not 48 <= side <= 2048:
        raise InputError(
            f"receipt: {len(tiles)} pictures of {side} pixels; give 2 or 3 of 48 to 2048"
        )
    lefts = [MARGIN + place * (side + BETWEEN) for place in range(len(tiles))]
    across = lefts[-1] + side + BETWEEN
    canvas = Canvas(across + _SUM_WIDTH + MARGIN)
    for text in wrap(clean(title or ""), TITLE, canvas.width - 2 * MARGIN):
        canvas.text(MARGIN, text, TITLE, INK, advance=TITLE[0] + 12)
    if title:
        canvas.y += 14
    for left, heading in zip(lefts, headings, strict=False):
        canvas.text(left, heading, HEADING, QUIET, advance=0)
    canvas.text(across, "What adds up", HEADING, QUIET, advance=28)
    begun = canvas.y
    _draw_tiles(canvas, list(zip(lefts, tiles, strict=True)), side, links)
    end = canvas.y
    canvas.y = begun
    _draw_sum(canvas, across, amounts, total, apart)
    canvas.y = max(canvas.y, end) + 8
    for line in wrap(note, TEXT, canvas.width - 2 * MARGIN):
        canvas.text(MARGIN, line, TEXT, QUIET, LEADING)
    canvas.y += MARGIN - 20
    return canvas.image()


def _draw_tiles(
    canvas: Canvas, placed: list[tuple[int, Tile]], side: int, links: Sequence[Mark]
) -> None:
    height = max(fitted(tile, side, side)[1] for _, tile in placed)
    corners = []
    for left, tile in placed:
        size = fitted(tile, side, height)
        missing = "" if tile.image is not None else "no picture"
        canvas.picture(left, canvas.y, (side, height), plain_picture(tile, size), missing)
        drawn = mapped_picture(tile, size, top_value([tile]))
        canvas.picture(left, canvas.y + height + 8, (side, height), drawn, "no map")
        corner = left + (side - size[0]) // 2, canvas.y + (height - size[1]) // 2
        corners.append((corner, size))
    for number, link in reversed(list(enumerate(links))):
        ends = [
            (round(x + share[0] * width), round(y + share[1] * tall))
            for ((x, y), (width, tall)), share in zip(corners, (link.start, link.end), strict=False)
        ]
        canvas.draw(partial(_draw_link, ends=ends, number=number))
    canvas.y += 2 * height + 22
    begun = canvas.y
    fits = lambda text: font_of(*CAPTION).getlength(text) <= side  # noqa: E731
    lowest = begun
    for left, tile in placed:
        canvas.y = begun
        if tile.caption:
            canvas.text(left, shorten_middle(clean(tile.caption), fits), CAPTION, INK, LEADING)
        for text in tile.subcaption.split("\n") if tile.subcaption else []:
            canvas.text(left, shorten_end(clean(text), fits), TEXT, QUIET, LEADING)
        lowest = max(lowest, canvas.y)
    canvas.y = lowest


def _draw_link(draw: ImageDraw.ImageDraw, ends: list[tuple[int, int]], number: int) -> None:
    """A line with a numbered disc at both ends, edged to be seen on light and dark pictures."""
    color = _LINK[number % len(_LINK)]
    draw.line([*ends[0], *ends[1]], fill=INK, width=4)
    draw.line([*ends[0], *ends[1]], fill=color, width=2)
    for x, y in ends:
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=color, outline=INK)
        draw.text((x, y), str(number + 1), INK, font_of(*HEADING), anchor="mm")


def _draw_sum(
    canvas: Canvas,
    left: int,
    amounts: Sequence[tuple[str, float]],
    total: tuple[str, float],
    apart: int,
) -> None:
    """Each amount with a bar from a middle line: to the right for, to the left against."""
    top = max((abs(number) for _, number in amounts[apart:]), default=0.0)
    middle, half = left + _BAR_LEFT + _BAR_WIDTH // 2, _BAR_WIDTH // 2
    fits = lambda text: font_of(*TEXT).getlength(text) <= _BAR_LEFT - 10  # noqa: E731
    begun = canvas.y + apart * (LEADING + 4)
    for place, (words, number) in enumerate(amounts):
        barred = top > 0 and place >= apart
        y, length = canvas.y, round(half * number / top) if barred else 0
        box = (min(middle, middle + length), y + 4, max(middle, middle + length), y + 14)
        color = FOR if number > 0 else AGAINST
        if barred:
            canvas.draw(partial(ImageDraw.ImageDraw.rectangle, xy=box, fill=color))
        _number(canvas, left, number, TEXT)
        canvas.text(left, shorten_end(clean(words), fits), TEXT, QUIET, LEADING + 4)
    canvas.rule(middle, begun, canvas.y - 4)
    y = canvas.y + 4
    right = left + _BAR_LEFT + _BAR_WIDTH + _NUMBER_WIDTH
    canvas.draw(lambda draw: draw.line((left, y, right, y), LINE, width=2))
    canvas.y += GAP
    _number(canvas, left, total[1], CAPTION)
    canvas.text(left, total[0], CAPTION, INK, LEADING + 8)


def _number(canvas: Canvas, left: int, number: float, font: tuple[int, bool]) -> None:
    at = (left + _BAR_LEFT + _BAR_WIDTH + _NUMBER_WIDTH, canvas.y)
    canvas.draw(lambda draw: draw.text(at, f"{number:+.3f}", INK, font_of(*font), anchor="ra"))
