"""Tiles, a picture with its map and words each, and the one grid that panels and receipts draw."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import inf
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError, ran_out, short
from .overlay import ALPHA, Extent, checked_box, checked_cam, paint, scale_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scale = Literal["joint", "each"]
Font = tuple[int, bool]
Color = tuple[int, int, int]
CHANGED: Final = "changed since the build"

_PAPER, INK, QUIET = (255, 255, 255), (24, 28, 36), (98, 106, 120)
_WARNING, LINE, _MAT = (179, 66, 15), (222, 226, 232), (243, 245, 248)
TITLE, HEADING, CAPTION, TEXT = (24, True), (13, True), (14, True), (13, False)
LEADING: Final = 20
MARGIN, GAP, BETWEEN = 40, 16, 44  # around the page, between results, between query and results
_TILE, _COLUMNS = 240, 5  # sides of tiles; results on a line
_BAR: Final = (240, 12)
FRAME_NOTE: Final = "A frame marks what the network saw; there is no evidence outside it."


resized = partial(Image.Image.resize, resample=Image.Resampling.LANCZOS, reducing_gap=3.0)


@dataclass
class Tile:
    """A picture, its map and what to write below.

    Parameters
    ----------
    image : None where it cannot be had any more; the map is then shown by itself
    cam : `[h w]`, >= 0 unless `signed`; None for a picture without a map
    extent : crop box (x0, y0, x1, y1) in pixels that the map covers; default all of the picture
    caption : usually the id; shortened in the middle where it is too long
    subcaption : label, distance, ...; a line break begins another line
    warning : what casts doubt on all of it, shown first and apart
    signed : negative values of the map are evidence against, drawn in another color
    changed : the picture is another than the map was made of: each is shown by itself, and says so
    """

    image: Image.Image | None
    cam: np.ndarray | None = None
    extent: Extent | None = None
    caption: str = ""
    subcaption: str = ""
    warning: str = ""
    signed: bool = False
    changed: bool = False
    cropped: bool = field(default=False, init=False)
    """The map leaves a visible part of the picture out."""

    def __post_init__(self) -> None:
        if self.cam is None:
            return
        self.cam = checked_cam(self.cam, self.signed)
        if self.image is not None and self.extent is not None:
            width, height = self.image.size
            self.extent = x0, y0, x1, y1 = checked_box(self.extent, width, height)
            # Half a pixel is rounding, not a crop.
            beyond = x0 > 0.5 or y0 > 0.5 or x1 < width - 0.5 or y1 < height - 0.5
            self.cropped = beyond and not self.changed

    def fitted(self, side: int) -> tuple[int, int]:
        """Return (width, height) of the picture, its longer side made so long."""
        if self.image is None:
            return side, side
        width, height = self.image.size
        factor = side / max(width, height)
        return max(1, round(width * factor)), max(1, round(height * factor))

    def drawn(
        self, size: tuple[int, int], top: float
    ) -> tuple[Image.Image | None, Image.Image | None]:
        """Return the picture at (width, height) `size`, and the same with the map over it.

        The picture is made small first: the same, without the cost of coloring megapixels.
        """
        plain = None if self.image is None else resized(self.image.convert("RGB"), size)
        # By itself a map is drawn on a middle gray, at full opacity.
        under, opacity = Image.new("RGB", size, (128, 128, 128)), 1.0
        box: Extent = (0, 0, *size)
        if self.image is not None and plain is not None and not self.changed:
            under, opacity = plain.copy(), ALPHA
            if self.extent is not None:
                box = scale_box(self.extent, self.image.size, size)
        mapped = None
        if self.cam is not None:
            mapped = paint(under, self.cam, box, top, opacity, signed=self.signed)
            if self.cropped:
                _draw_frame(mapped, box)
        if plain is not None and self.changed:
            _draw_note(plain, CHANGED)
        return plain, mapped


def _draw_note(picture: Image.Image, words: str) -> None:
    """Write on a dark strip across the bottom, as large as fits."""
    room = picture.width - 8
    size = next((size for size in (13, 11, 9) if font_of(size, True).getlength(words) <= room), 7)
    top = picture.height - min(picture.height, size + 10)
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.rectangle((0, top, *picture.size), fill=(20, 22, 28, 215))
    middle = (picture.width // 2, (top + picture.height) // 2)
    draw.text(middle, words, (255, 255, 255), font_of(size, True), anchor="mm")


def _draw_frame(picture: Image.Image, box: Extent) -> None:
    """Draw a thin line, light on dark, around what the network saw."""
    x0, y0 = max(0, round(box[0])), max(0, round(box[1]))
    x1, y1 = min(picture.width, round(box[2])) - 1, min(picture.height, round(box[3])) - 1
    if x1 - x0 >= 2 and y1 - y0 >= 2:
        draw = ImageDraw.Draw(picture, "RGBA")
        draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255, 190))
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(0, 0, 0, 70))


def shrunk(tile: Tile, side: int) -> Tile:
    """Return the tile with a picture of at most `side` pixels a side; it draws the same."""
    if tile.image is None or max(tile.image.size) <= side:
        return tile
    size, box = tile.fitted(side), checked_box(tile.extent, *tile.image.size)
    extent = scale_box(box, tile.image.size, size)
    return replace(tile, image=resized(tile.image.convert("RGB"), size), extent=extent)


def top_value(tiles: Iterable[Tile]) -> float:
    """Return the largest value of the tiles' maps, the end of a common color scale; 0 for none."""
    return max([float(np.abs(t.cam).max()) for t in tiles if t.cam is not None], default=0.0)


def top_values(query: Tile, results: Sequence[Tile], scale: str) -> tuple[float, list[float]]:
    """Return the end of the color scale of the query and of each result.

    The query's map always has its own: its weights are averages of unit vectors, in another unit.
    """
    if scale not in ("joint", "each"):
        raise InputError(f'scale is {scale!r}; give "joint" (one for all results) or "each"')
    if scale == "each":
        return top_value([query]), [top_value([tile]) for tile in results]
    return top_value([query]), [top_value(results)] * len(results)


def scale_note(query_top: float | None, result_tops: Sequence[float], scale: Scale) -> str:
    """Say what the colors mean, in one sentence or two; `query_top` None where words asked."""
    if query_top is None:
        return {
            "each": "Each map on its own scale: strengths cannot be compared between pictures.",
            "joint": "All maps share one colour scale.",
        }[scale if len(result_tops) > 1 else "joint"]
    nothing = " There is no positive evidence in the query." if query_top == 0 else ""
    if not result_tops:
        return f"From no evidence to the strongest in this picture.{nothing}"
    if scale == "each":
        return f"Each map on its own scale: strengths cannot be compared between pictures.{nothing}"
    return f"Results share one colour scale. The query's map has its own.{nothing}"


def draw_on_axes(ax: Axes, tile: Tile, title: str | None = None) -> Axes:
    """Draw a tile's picture with its map into matplotlib axes, `title` above; return the axes."""
    if not hasattr(ax, "imshow"):
        raise InputError(f"ax = {short(ax)}; give the Axes that matplotlib's subplots returns")
    size = tile.fitted(512) if tile.image is None else tile.image.size
    plain, mapped = tile.drawn(size, top_value([tile]))
    ax.imshow(np.asarray(plain if mapped is None else mapped))
    ax.set_axis_off()
    if title:
        ax.set_title(clean(title))
    return ax


# Words


@lru_cache(maxsize=32)
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return DejaVu Sans, which matplotlib brings along; without it Pillow's own font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError) as error:  # an installation for serving, or one without fonts
        if ran_out(error):
            raise
        return ImageFont.load_default(size)


def clean(text: str) -> str:
    """Return text that can be drawn and encoded: no control characters, no lone surrogates."""
    if text.isprintable():
        return text
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join([c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text])


def shorten(
    text: str, room: float, length: Callable[[str], float] = len, *, middle: bool = False
) -> str:
    """Return the text, or as much of its beginning (of both ends: `middle`) as fits, with "…"."""
    text = clean(text)

    def shorter(kept: int) -> str:
        tail = (kept + 1) // 2 if middle else 0
        start = text[: kept - tail]
        return f"{start if middle else start.rstrip()}…{text[len(text) - tail :]}"

    if length(text) <= room:
        return text
    return shorter(bisect_left(range(1, len(text)), True, key=lambda n: length(shorter(n)) > room))


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Return lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    length = font_of(*font).getlength
    for word in clean(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and length(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width, length))
    return lines


# The grid


class Canvas:
    """Pictures, words and lines down a page whose height is known only at the end."""

    def __init__(self, width: int) -> None:
        self.width, self.y = width, MARGIN
        self._pictures: list[tuple[Image.Image, tuple[int, int]]] = []
        self._strokes: list[Callable[[ImageDraw.ImageDraw], object]] = []

    def stroke(self, draw: Callable[..., object], **how: object) -> None:
        """Draw over the pictures by a method of `ImageDraw`, after what came before."""
        self._strokes.append(partial(draw, **how))

    def text(
        self,
        x: int,
        text: str,
        font: Font,
        color: Color,
        advance: int = 0,
        *,
        anchor: str = "la",
        room: float = inf,
        middle: bool = False,
    ) -> None:
        """Write lines at x, shortened to so much room, each `advance` pixels below the last."""
        shown = font_of(*font)
        for line in text.split("\n"):
            if not line.isprintable() or shown.getlength(line) > room:
                line = shorten(line, room, shown.getlength, middle=middle)
            draw = partial(ImageDraw.ImageDraw.text, xy=(x, self.y), text=line, anchor=anchor)
            self._strokes.append(partial(draw, fill=color, font=shown))
            self.y += advance

    def paragraph(self, text: str, font: Font, color: Color, advance: int) -> None:
        """Write lines across the page."""
        for line in wrap(text, font, self.width - 2 * MARGIN):
            self.text(MARGIN, line, font, color, advance)

    def pictures(
        self, x: int, box: tuple[int, int], pictures: Mapping[str, Image.Image | None]
    ) -> None:
        """Put pictures in the middle of boxes below each other; where there is none, its name."""
        for missing, picture in pictures.items():
            mat = Image.new("RGB", box, _MAT)
            if picture is not None:
                mat.paste(picture, ((box[0] - picture.width) // 2, (box[1] - picture.height) // 2))
            else:
                middle = (box[0] // 2, box[1] // 2)
                ImageDraw.Draw(mat).text(middle, missing, QUIET, font_of(*TEXT), anchor="mm")
            self._pictures.append((mat, (x, self.y)))
            self.y += box[1] + 8

    def tiles(
        self,
        placed: Sequence[tuple[int, Tile, float]],
        side: int,
        maps: bool = True,
    ) -> list[tuple[int, int, int, int]]:
        """Draw a line of tiles: pictures of one height, their maps, and the words below.

        `placed` holds (x, tile, end of the color scale); returns (x, y, width, height) of each
        picture.
        """
        sizes = [tile.fitted(side) for _, tile, _ in placed]
        height = max(map(itemgetter(1), sizes))
        frames, begun, end = [], self.y, self.y
        for (x, tile, top), size in zip(placed, sizes, strict=True):
            self.y = begun
            plain, mapped = tile.drawn(size, top)
            corner = x + (side - size[0]) // 2, begun + (height - size[1]) // 2
            frames.append((*corner, *size))
            shown = {"picture not found" if tile.image is None else "": plain}
            self.pictures(x, (side, height), {**shown, "no map": mapped} if maps else shown)
            self.y += 6
            if tile.caption:
                self.text(x, tile.caption, CAPTION, INK, LEADING, room=side, middle=True)
            if tile.subcaption:
                self.text(x, tile.subcaption, TEXT, QUIET, LEADING, room=side)
            end = max(end, self.y)
        self.y = end
        return frames

    def image(self) -> Image.Image:
        """Return the page."""
        image = Image.new("RGB", (self.width, self.y + MARGIN - 20), _PAPER)
        for picture, corner in self._pictures:
            image.paste(picture, corner, _round_corners(picture.size))
        draw = ImageDraw.Draw(image)
        for stroke in self._strokes:
            stroke(draw)
        return image


@lru_cache(maxsize=8)
def _round_corners(box: tuple[int, int]) -> Image.Image:
    """Return a mask with smooth round corners: drawn four times as large, then made small."""
    radius = min(8, min(box) // 2)
    large = Image.new("L", (4 * box[0], 4 * box[1]), 0)
    edge = (0, 0, 4 * box[0] - 1, 4 * box[1] - 1)
    ImageDraw.Draw(large).rounded_rectangle(edge, 4 * radius, fill=255)
    return large.resize(box, Image.Resampling.BOX)


def panel(
    query: Tile | None,
    results: Sequence[Tile],
    *,
    scale: Scale = "joint",
    title: str | None = None,
    ends: tuple[str, str] = ("no evidence", "strongest"),
) -> Image.Image:
    """Draw the query in the first column, results beside it; pictures above, their maps below.

    Without a query, which words may be, the results stand alone. scale "joint" gives the results
    one color scale, so that weak evidence looks weak beside strong; "each" gives every map its own.
    `ends` are what the legend calls the ends of the scale, in few words.
    """
    side = _TILE
    query_top, tops = top_values(query or Tile(None), results, scale)
    tiles = [*([] if query is None else [query]), *results]
    maps = any([tile.cam is not None for tile in tiles])
    on_line = min(_COLUMNS, len(results))
    right = on_line * (side + GAP) - GAP if on_line else 0
    left = MARGIN
    if query is not None:
        left += side + BETWEEN
        right += side + BETWEEN * bool(on_line)

    canvas = Canvas(2 * MARGIN + max(right, 2 * side))
    if title:
        canvas.paragraph(title, TITLE, INK, 36)
    if query is not None and query.warning:
        canvas.text(MARGIN, query.warning, HEADING, _WARNING, 26)
    canvas.y += 14 * bool(title)
    if query is not None:
        canvas.text(MARGIN, "Query", HEADING, QUIET)
    if results:
        canvas.text(left, "Result" if len(results) == 1 else "Results", HEADING, QUIET)
    canvas.y += 28
    begun = canvas.y
    placed = [
        (left + place % _COLUMNS * (side + GAP), tile, top)
        for place, (tile, top) in enumerate(zip(results, tops, strict=True))
    ]
    for start in range(0, max(len(placed), 1), _COLUMNS):
        first = [(MARGIN, query, query_top)] if query is not None and start == 0 else []
        canvas.tiles([*first, *placed[start : start + _COLUMNS]], side, maps)
        canvas.y += 24
    if results and query is not None:
        x = left - BETWEEN // 2
        canvas.stroke(ImageDraw.ImageDraw.line, xy=(x, begun, x, canvas.y - 24), fill=LINE)
    if maps:
        canvas.y += 8
        note = scale_note(None if query is None else query_top, tops, scale)
        if any(map(attrgetter("cropped"), tiles)):
            note += f" {FRAME_NOTE}"
        signed = any(map(attrgetter("signed"), tiles))
        _draw_legend(canvas, note, ends, signed=signed)
    return canvas.image()


def _draw_legend(canvas: Canvas, note: str, ends: tuple[str, str], *, signed: bool) -> None:
    ramp = np.linspace(-1 if signed else 0, 1, 256, dtype=np.float32)[None]
    low, high = ends
    # Over a light gray, as over a picture: the left end is transparent.
    gray = Image.new("RGB", _BAR, (226, 229, 234))
    canvas.text(MARGIN, low, TEXT, QUIET)
    x = MARGIN + round(font_of(*TEXT).getlength(low)) + 12
    canvas.text(x + _BAR[0] + 12, high, TEXT, QUIET, 2)
    canvas.pictures(x, _BAR, {"": paint(gray, ramp, (0, 0, *_BAR), 1.0, signed=signed)})
    canvas.y += 4
    canvas.paragraph(note, TEXT, QUIET, LEADING)
