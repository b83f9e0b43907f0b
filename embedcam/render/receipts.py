"""The picture of a receipt: places that match side by side, then what adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from .overlay import Extent, checked_box, scale_box
from .tiles import (
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
    Color,
    Tile,
    font_of,
    resized,
    top_value,
)

_SIDE, _CROP, _SMALL_CROP = 280, 104, 52  # sides of tiles and crops
_FOR, _AGAINST = (179, 3, 38), (59, 76, 192)  # the ends of the signed color map
_SUM_WIDTH, _BAR_LEFT, _BAR_WIDTH = 400, 190, 140
_SHARE: Final = (20, True)
Point = tuple[float, float]
"""A point of a picture, (x, y) as shares of its width and height."""
COLORS: Final = ((250, 204, 21), (74, 222, 128), (56, 189, 248), (244, 114, 182), (251, 146, 60))
"""Of places, by their numbers."""


@dataclass(frozen=True, eq=False)
class Matched:
    """A region of each of two pictures, bool `[H W]`, and in words what they give."""

    regions: tuple[np.ndarray, np.ndarray]
    share: str
    amount: str


def receipt_picture(
    tiles: Sequence[Tile],
    amounts: Sequence[tuple[str, float]],
    total: tuple[str, float],
    *,
    apart: int = 0,
    headings: Sequence[str] = (),
    places: Sequence[Matched] = (),
    links: Sequence[tuple[Point, Point]] = (),
    crops: Mapping[str, Sequence[Image.Image]] | None = None,
    title: str | None = None,
    note: str = "",
    said: str = "",
) -> Image.Image:
    """Draw two or three pictures above their maps, places that match, and a sum.

    Parameters
    ----------
    amounts, total
        (words, number) each, and what they add up to
    apart
        So many of the first amounts are large beside the others, and have no bar
    places
        Of the first two pictures: outlined and numbered in them, and cut out side by side
    links
        Lines between a point of the first picture and one of the second
    crops
        Small pictures beside an amount, by its words
    said
        What the places are, in one sentence
    """
    lefts = [MARGIN + place * (_SIDE + BETWEEN) for place in range(len(tiles))]
    across = lefts[-1] + _SIDE + BETWEEN
    beside = max(map(len, (crops or {}).values()), default=0) * (_SMALL_CROP + 4)
    beside += 12 * bool(beside)
    canvas = Canvas(across + _SUM_WIDTH + beside * (not places) + MARGIN)
    canvas.paragraph(title or "", TITLE, INK, 36)
    if title:
        canvas.y += 14
    for left, heading in zip(lefts, headings, strict=False):
        canvas.text(left, heading, HEADING, QUIET)
    canvas.text(across, "What matches what" if places else "What adds up", HEADING, QUIET, 28)
    begun = canvas.y
    frames = canvas.tiles(
        [(left, tile, top_value([tile])) for left, tile in zip(lefts, tiles, strict=True)], _SIDE
    )
    for of, (tile, frame) in enumerate(zip(tiles[:2], frames, strict=False)):
        _outline_all(canvas, tile, frame, [place.regions[of] for place in places])
    for number, link in reversed(list(enumerate(links))):
        ends = [
            (x + across_ * width, y + down * height)
            for (x, y, width, height), (across_, down) in zip(frames, link, strict=False)
        ]
        canvas.stroke(_draw_link, ends=ends, number=number)
    end, canvas.y = canvas.y, begun
    if places:
        _draw_places(canvas, across, tiles, places)
        canvas.y = max(canvas.y, end) + 4
        canvas.paragraph(said, TEXT, QUIET, LEADING)
        canvas.y += 18
        canvas.text(MARGIN, "What adds up", HEADING, QUIET, 28)
        end = canvas.y
        wide = (MARGIN, 290, 460, canvas.width - 2 * MARGIN)
    else:
        wide = (across, _BAR_LEFT, _BAR_WIDTH, _SUM_WIDTH + beside)
    _Sum(*wide, apart, beside, crops or {}).draw(canvas, amounts, total)
    canvas.y = max(canvas.y, end) + 8
    canvas.paragraph(note, TEXT, QUIET, LEADING)
    return canvas.image()


def _draw_link(draw: ImageDraw.ImageDraw, ends: Sequence[tuple[float, float]], number: int) -> None:
    draw.line([*ends[0], *ends[1]], fill=INK, width=4)
    draw.line([*ends[0], *ends[1]], fill=COLORS[number % len(COLORS)], width=2)
    for at in ends:
        _draw_number(draw, at, number)


# Places


def _box_of(tile: Tile, size: tuple[int, int]) -> Extent:
    """Return what the grid covers of a tile's picture, drawn at a size."""
    if tile.image is None or tile.extent is None:
        return (0, 0, *size)
    return scale_box(checked_box(tile.extent, *tile.image.size), tile.image.size, size)


def _edges(region: np.ndarray, box: Extent) -> list[tuple[int, int, int, int]]:
    """Return the lines around a region of a grid over a box, in pixels."""
    (height, width), (x0, y0, x1, y1) = region.shape, box
    xs = np.rint(np.linspace(x0, x1, width + 1)).astype(int).tolist()
    ys = np.rint(np.linspace(y0, y1, height + 1)).astype(int).tolist()
    inside = np.pad(region, 1)
    lines = []
    for row, column in np.argwhere(inside[:-1, 1:-1] != inside[1:, 1:-1]).tolist():
        lines.append((xs[column], ys[row], xs[column + 1], ys[row]))
    for row, column in np.argwhere(inside[1:-1, :-1] != inside[1:-1, 1:]).tolist():
        lines.append((xs[column], ys[row], xs[column], ys[row + 1]))
    return lines


def _draw_edges(
    draw: ImageDraw.ImageDraw, edges: Sequence[tuple[int, int, int, int]], color: Color
) -> None:
    """Draw lines, edged to be seen on any picture."""
    for width, paint in ((5, INK), (3, color)):
        for x0, y0, x1, y1 in edges:
            # As wide at the corners as along the lines.
            half = width // 2
            draw.rectangle((x0 - half, y0 - half, x1 + half, y1 + half), fill=paint)


def _draw_number(draw: ImageDraw.ImageDraw, at: tuple[float, float], number: int) -> None:
    x, y = at
    color = COLORS[number % len(COLORS)]
    draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=color, outline=INK)
    draw.text((x, y), str(number + 1), INK, font_of(*HEADING), anchor="mm")


def _outline_all(
    canvas: Canvas, tile: Tile, frame: tuple[int, int, int, int], regions: Sequence[np.ndarray]
) -> None:
    """Draw regions on a picture, each once, with the numbers of all places it is in."""
    x, y, *size = frame
    x0, y0, x1, y1 = _box_of(tile, (size[0], size[1]))
    box = (x + x0, y + y0, x + x1, y + y1)
    numbers: dict[bytes, list[int]] = {}
    for number, region in enumerate(regions):
        numbers.setdefault(region.tobytes(), []).append(number)
    for those in reversed(numbers.values()):
        region, color = regions[those[0]], COLORS[those[0] % len(COLORS)]
        canvas.stroke(_draw_edges, edges=_edges(region, box), color=color)
    for those in numbers.values():
        row, column = (at.mean() + 0.5 for at in np.nonzero(regions[those[0]]))
        height, width = regions[those[0]].shape
        middle = box[0] + column / width * (box[2] - box[0])
        for place, number in enumerate(those):
            at = (
                middle + 22 * (place - (len(those) - 1) / 2),
                box[1] + row / height * (box[3] - box[1]),
            )
            canvas.stroke(_draw_number, at=at, number=number)


def _draw_places(
    canvas: Canvas, left: int, tiles: Sequence[Tile], places: Sequence[Matched]
) -> None:
    """Draw each place's regions cut out side by side, and what they give beside them."""
    for number, place in enumerate(places):
        begun = canvas.y
        for of, (tile, region) in enumerate(zip(tiles, place.regions, strict=False)):
            canvas.y = begun
            crop = _cut_out(tile, region, COLORS[number % len(COLORS)])
            canvas.pictures(left + of * (_CROP + 8), (_CROP, _CROP), {"no picture": crop})
        right = left + 2 * (_CROP + 8) + 12
        canvas.y = begun + _CROP // 2 - 24
        canvas.stroke(_draw_number, at=(right + 10, canvas.y + 12), number=number)
        canvas.text(right + 30, place.share, _SHARE, INK, 28)
        canvas.text(right + 30, place.amount, TEXT, QUIET)
        canvas.y = begun + _CROP + 12


def _cut_out(tile: Tile, region: np.ndarray, color: Color) -> Image.Image | None:
    """Return the square around a region, what is not of it a little faded."""
    if tile.image is None:
        return None
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    height, width = region.shape
    x0, y0, x1, y1 = _box_of(tile, tile.image.size)
    across, down = (x1 - x0) / width, (y1 - y0) / height
    spans = (
        (x0 + columns[0] * across, x0 + (columns[-1] + 1) * across, tile.image.width),
        (y0 + rows[0] * down, y0 + (rows[-1] + 1) * down, tile.image.height),
    )
    side = 1.1 * max(end - start for start, end, _ in spans)
    corner = [
        min(max((start + end - side) / 2, 0), max(size - side, 0)) for start, end, size in spans
    ]
    ends = [min(at + side, size) for at, (_, _, size) in zip(corner, spans, strict=True)]
    factor = _CROP / max(ends[0] - corner[0], ends[1] - corner[1])
    size = tuple(max(1, round((end - at) * factor)) for at, end in zip(corner, ends, strict=True))
    cut = resized(tile.image.convert("RGB"), size, box=(*corner, *ends))
    box = tuple((at - corner[place % 2]) * factor for place, at in enumerate((x0, y0, x1, y1)))
    inside = Image.fromarray(region.astype(np.uint8) * 255).resize(
        (max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))), Image.Resampling.NEAREST
    )
    mask = Image.new("L", cut.size, 120)
    mask.paste(255, (round(box[0]), round(box[1])), inside)
    cut = Image.composite(cut, Image.new("RGB", cut.size, (255, 255, 255)), mask)
    _draw_edges(ImageDraw.Draw(cut), _edges(region, (box[0], box[1], box[2], box[3])), color)
    return cut


# The sum


@dataclass(frozen=True)
class _Sum:
    """Where amounts are written: words, a bar from a middle line, the number, small pictures."""

    left: int
    bar_left: int
    bar_width: int
    width: int
    apart: int
    beside: int
    crops: Mapping[str, Sequence[Image.Image]]

    def draw(
        self, canvas: Canvas, amounts: Sequence[tuple[str, float]], total: tuple[str, float]
    ) -> None:
        """Draw each amount with its bar: to the right for, to the left against."""
        top = max((abs(number) for _, number in amounts[self.apart :]), default=0.0)
        right, first = self.left + self.width - 6, self.left + self.bar_left
        # Where nothing speaks against, bars begin at the left.
        both = any(number < -5e-4 for _, number in amounts[self.apart :])
        middle = first + self.beside + both * self.bar_width // 2
        room = self.bar_width // 2 if both else self.bar_width
        begun = end = canvas.y
        for place, (words, number) in enumerate(amounts):
            pictures = self.crops.get(words, ())
            height = _SMALL_CROP + 4 if pictures else LEADING + 4
            at, line = canvas.y, canvas.y + (height - LEADING) // 2
            for of, picture in enumerate(pictures):
                canvas.y = at
                left = first + of * (_SMALL_CROP + 4)
                canvas.pictures(left, (_SMALL_CROP, _SMALL_CROP), {"": picture})
            if place == self.apart:
                begun = at
            if top > 0 and place >= self.apart:
                reach = middle + round(room * number / top)
                box = (min(middle, reach), line + 2, max(middle, reach), line + 12)
                color = _FOR if number > 0 else _AGAINST
                canvas.stroke(ImageDraw.ImageDraw.rectangle, xy=box, fill=color)
            canvas.y = line
            canvas.text(right, f"{number:+.3f}", TEXT, INK, anchor="ra")
            free = self.bar_left - 10 if place >= self.apart else self.width - 80
            canvas.text(self.left, words, TEXT, QUIET, room=free)
            canvas.y = end = at + height
        rule = (middle, begun, middle, end - 4)
        canvas.stroke(ImageDraw.ImageDraw.line, xy=rule, fill=LINE)
        under = (self.left, end + 4, right, end + 4)
        canvas.stroke(ImageDraw.ImageDraw.line, xy=under, fill=LINE, width=2)
        canvas.y = end + GAP
        canvas.text(right, f"{total[1]:+.3f}", CAPTION, INK, anchor="ra")
        canvas.text(self.left, total[0], CAPTION, INK, LEADING + 8)


def window(
    picture: Image.Image, extent: Extent | None, grid: tuple[int, int], at: tuple[int, int]
) -> Image.Image:
    """Return the square around a position (row, column) of a grid, three positions wide."""
    x0, y0, x1, y1 = checked_box(extent, *picture.size)
    across, down = (x1 - x0) / grid[1], (y1 - y0) / grid[0]
    x, y = x0 + (at[1] + 0.5) * across, y0 + (at[0] + 0.5) * down
    side = min(3 * max(across, down), picture.width, picture.height)
    left = min(max(x - side / 2, 0), picture.width - side)
    top = min(max(y - side / 2, 0), picture.height - side)
    box = (left, top, left + side, top + side)
    return resized(picture.convert("RGB"), (_SMALL_CROP, _SMALL_CROP), box=box)
