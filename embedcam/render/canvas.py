"""What panels and receipts are drawn on: words, rules and pictures down a page."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image, ImageChops, ImageDraw, ImageFont

from ..errors import ran_out

PAPER: Final = (255, 255, 255)
INK: Final = (24, 28, 36)
QUIET: Final = (98, 106, 120)
WARNING: Final = (179, 66, 15)
LINE: Final = (222, 226, 232)
MAT: Final = (243, 245, 248)

MARGIN: Final = 40
GAP: Final = 16
BETWEEN: Final = 44  # query | results
_ROUND: Final = 8
BAR: Final = (240, 12)
ELLIPSIS: Final = "…"


@lru_cache(maxsize=32)
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib brings along on every platform; without it Pillow's own."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError) as error:  # an installation for serving, or one without fonts
        if ran_out(error):
            raise
        return ImageFont.load_default(size)


TITLE: Final = (24, True)
HEADING: Final = (13, True)
CAPTION: Final = (14, True)
TEXT: Final = (13, False)
LEADING: Final = 20


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


def wrap(text: str, font: tuple[int, bool], width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font_of(*font).getlength(longer) <= width:
            lines[-1] = longer
        else:
            fits = lambda text: font_of(*font).getlength(text) <= width  # noqa: E731
            lines.append(shorten_end(word, fits))
    return lines


class Canvas:
    """Drawing commands down a page whose height is known only at the end."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.y = MARGIN
        self._commands: list[Callable[[Image.Image, ImageDraw.ImageDraw], None]] = []

    def text(
        self,
        x: int,
        text: str,
        font: tuple[int, bool],
        color: tuple[int, int, int],
        advance: int,
    ) -> None:
        """Words at x; the next thing is drawn `advance` pixels below."""
        at = (x, self.y)
        self._commands.append(lambda _, draw: draw.text(at, text, color, font_of(*font)))
        self.y += advance

    def rule(self, x: int, top: int, bottom: int) -> None:
        """A thin vertical line."""
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
            ImageDraw.Draw(mat).text(middle, missing, QUIET, font_of(*TEXT), anchor="mm")
        corners = _round_corners(box)
        self._commands.append(lambda image, _: image.paste(mat, (x, y), corners))

    def draw(self, command: Callable[[ImageDraw.ImageDraw], None]) -> None:
        """Anything else, drawn after what came before it."""
        self._commands.append(lambda _, draw: command(draw))

    def image(self) -> Image.Image:
        """The page."""
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
