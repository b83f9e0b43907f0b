"""One HTML file for many explanations, from templates: nothing is fetched, light and dark."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError, cut
from .overlay import ALPHA, colormap
from .tiles import FRAME_NOTE, Scale, Tile, clean, scale_note, shorten, top_values

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

PAGE_FOOT: Final = "</main>\n</body>\n</html>\n"
_SIDE: Final = 320
_CAPTION: Final = 40  # letters of an id; its whole is in the tooltip
_SHARED_NOTE: Final = "The results of one query share a colour scale; the query's map has its own."
_IN_NOTEBOOK: Final = 1_600_000  # pixels of a picture, a third of a megabyte
_ONE_ROUND: Final = 1.35  # taller than this, a picture is shown smaller rather than the row taller
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 260, 46, 12, 12, 40  # of a chart
_DASHES: Final = ("", "7 4", "2 4", "9 3 2 3", "4 3", "12 4")
"""Lines are told apart without their colors, too."""


class PageLink(NamedTuple):
    """A word of a table that leads to a row of the same page, by the row's anchor."""

    words: str
    anchor: str

    def __str__(self) -> str:
        return self.words


@dataclass
class Table:
    """A table of words, numbers and links; of a folded one only the caption is seen at first."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    notes: str = ""
    folded: bool = False


@dataclass
class Notice:
    """What a reader must see before the figures: a heading and a list of sentences."""

    title: str
    lines: Sequence[str] = ()
    good: bool = False


@dataclass
class Chart:
    """Lines over one axis, each a name and points (x, y), x rising; the first matters most."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = ""
    y_label: str = ""
    notes: str = ""


Block = Table | Chart | Notice
Axis = tuple[list[float], int, int]
"""Ticks, and where the first and the last of them lie."""


@dataclass
class Row:
    """A query, its results, and what there is to say about them.

    compact: small, and side by side with the compact rows before and after it. anchor: what links
    to it name, letters and digits. scale: of its results, as in `panel`; None takes the page's.
    beneath: a picture below them, and the same in words.
    """

    query: Tile
    results: Sequence[Tile]
    notes: str = ""
    title: str = ""
    compact: bool = False
    anchor: str = ""
    scale: Scale | None = None
    beneath: tuple[Image.Image, str] | None = None


@dataclass(frozen=True)
class Look:
    """What all rows of a page share, as of `panel`; `quality` of its JPEGs.

    long: of hundreds of rows; pictures are decoded, and rows laid out, as they come into sight.
    """

    scale: Scale = "joint"
    side: int = _SIDE
    quality: int = 88
    long: bool = False

    def __post_init__(self) -> None:
        top_values(Tile(None), (), self.scale)  # refuses an unknown scale


_PLAIN = Look()


def page(
    rows: Sequence[Row],
    *,
    title: str = "Explanations",
    intro: str = "",
    tables: Sequence[Block] = (),
    scale: Scale = "joint",
) -> str:
    """Return a whole HTML document, self-contained: pictures and styles are inside.

    intro is plain text, where an empty line begins a paragraph.
    """
    look = Look(scale)
    tiles = [tile for row in rows for tile in (row.query, *row.results)]
    maps, cropped = any(t.cam is not None for t in tiles), any(t.cropped for t in tiles)
    parts = [page_head(title, intro, tables, look, maps=maps, cropped=cropped)]
    for compact, run in groupby(rows, lambda row: row.compact):
        drawn = [page_row(row, look) for row in run]
        if compact:
            note = f'<p class="quiet">{_SHARED_NOTE}</p>\n' if scale == "joint" else ""
            drawn = ['<div class="compact">\n', *drawn, "</div>\n", note]
        parts += drawn
    return "".join([*parts, PAGE_FOOT])


def page_head(
    title: str,
    intro: str = "",
    tables: Sequence[Block] = (),
    look: Look = _PLAIN,
    *,
    maps: bool = True,
    cropped: bool = False,
) -> str:
    """Return a document up to its first row; rows of `look` follow.

    maps: any of them has a map, so that colors need a legend; cropped: of any map, `Tile.cropped`.
    """
    from markupsafe import Markup

    at = np.linspace(0, 1, 9)
    stops = [
        f"rgba({r * 255:.0f},{g * 255:.0f},{b * 255:.0f},{ALPHA * share:.3f}) {share:.1%}"
        for (r, g, b), share in zip(colormap(at), at, strict=True)
    ]
    return _written(
        "head.html",
        title=title,
        intro=intro,
        blocks=[Markup(block) for block in drawn_blocks(tables)],
        charted=any(isinstance(block, Chart) for block in tables),
        long=look.long,
        maps=maps,
        stops=",".join(stops),
        frame_note=FRAME_NOTE if cropped else "",
        # Once, in place of a note below every row.
        note=_SHARED_NOTE if look.scale == "joint" else scale_note(1, [1], "each"),
    )


def page_row(row: Row, look: Look = _PLAIN) -> str:
    """Return a row of a page."""
    tiles = [row.query, *row.results]
    scale = row.scale or look.scale
    query_top, tops = top_values(row.query, row.results, scale)
    sizes = [tile.fitted(look.side) for tile in tiles]
    noted = any(tile.cam is not None for tile in tiles) and not row.compact and not look.long
    return _written(
        "row.html",
        row=row,
        shape=1 / min(max(size[1] / size[0] for size in sizes), _ONE_ROUND),
        note=scale_note(query_top, tops, scale) if noted else "",
        long=look.long,
        beneath=row.beneath and (row.beneath[0], _jpeg(row.beneath[0], look.quality)),
        figures=[
            {
                "tile": tile,
                "role": "result" if place else "query",
                "pictures": [
                    None if picture is None else (picture, _jpeg(picture, look.quality))
                    for picture in tile.drawn(size, top)
                ],
                "short": shorten(tile.caption, _CAPTION, middle=True),
                # Two objects side by side are shown as large as one beside them.
                "wide": row.compact and not place and size[0] > 1.5 * size[1],
                "shape": size[0] / size[1],
            }
            for place, (tile, size, top) in enumerate(
                zip(tiles, sizes, [query_top, *tops], strict=True)
            )
        ],
    )


def drawn_blocks(blocks: Sequence[Block]) -> list[str]:
    """Return blocks as HTML; charts that follow one another stand side by side."""
    html: list[str] = []
    charts: list[tuple[Chart, Axis, Axis]] = []
    for block, following in zip_longest(blocks, blocks[1:]):
        if isinstance(block, Chart):
            charts.append(_plotted(block))
            if not isinstance(following, Chart):
                html.append(_written("block.html", charts=charts, dashes=_DASHES))
                charts = []
        elif isinstance(block, Table):
            numeric = [
                all(_is_number(row[place]) for row in block.rows if place < len(row))
                for place in range(len(block.header))
            ]
            html.append(_written("block.html", table=block, numeric=numeric))
        else:
            html.append(_written("block.html", notice=block))
    return html


def in_notebook(picture: Image.Image, alt: str) -> str:
    """Return a picture as notebooks show it: so small that a saved one with several stays small."""
    from markupsafe import Markup

    shown = picture.convert("RGB")
    if (pixels := shown.width * shown.height) > _IN_NOTEBOOK:
        share = (_IN_NOTEBOOK / pixels) ** 0.5
        shown = shown.resize((int(share * shown.width), int(share * shown.height)))
    tag = Markup('<img alt="{}" style="width: {}px; max-width: 100%" src="{}">')
    return str(tag.format(clean(cut(alt, 400)), picture.width, _jpeg(shown, 80)))


def _jpeg(picture: Image.Image, quality: int) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _plotted(chart: Chart) -> tuple[Chart, Axis, Axis]:
    """Return a chart with its axes, in units of its drawing."""
    points = [point for line in chart.lines.values() for point in line]
    if not points or not np.isfinite(points).all():
        raise InputError(f"chart {chart.title!r} has no points, or some that are not finite")
    x_ticks, y_ticks = (ticks(min(values), max(values)) for values in zip(*points, strict=True))
    across, down = (_LEFT, _WIDTH - _RIGHT), (_HEIGHT - _BOTTOM, _TOP)
    return chart, (x_ticks, *across), (y_ticks, *down)


def _placed(value: float, axis: Axis) -> float:
    ends, start, end = axis
    return start + (value - ends[0]) / (ends[-1] - ends[0]) * (end - start)


def ticks(low: float, high: float) -> list[float]:
    """Return four to seven round numbers that take in both ends, rising."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = max(abs(low), 1e-9) / 2
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    digits = -math.floor(math.log10(rough))
    step = next(
        one * 10.0**-digits for one in (1, 2, 5, 10) if one * 10.0**-digits >= rough * 0.999
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def _is_number(value: object) -> bool:
    """Tell whether a cell reads as a number: 12, 0.5, 83%, 0.92 (0.95), 0.4*, or a dash."""
    words = re.sub(r"[()±\[\],]", " ", re.sub("[%*]", "", str(value))).split()
    try:
        return all(word in "-–—" or math.isfinite(float(word)) for word in words)
    except ValueError:
        return False


# Templates


def _written(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"breakable": _breakable, "paragraphs": _paragraphs, "on": _placed}
    environment.tests["link"] = lambda value: isinstance(value, PageLink)
    return environment


def _breakable(words: object) -> Markup:
    """Return text whose long words may break behind their joints."""
    from markupsafe import Markup, escape

    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(clean(str(words))))))


def _paragraphs(text: str) -> list[str]:
    blocks = (" ".join(block.split()) for block in text.replace("\r", "").split("\n\n"))
    return list(filter(None, blocks))
