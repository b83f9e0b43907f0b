"""One HTML file that shows many explanations: no scripts, nothing fetched, light and dark.

`page` makes a whole document; `page_head`, `page_row` and `page_foot` are its pieces, for a page of
more rows than memory should hold at once.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
from PIL import Image

from ..errors import cut
from .blocks import Block, breakable, drawn_blocks, paragraphs, text
from .canvas import shorten_middle
from .chart import STYLE as CHART_STYLE
from .chart import Chart
from .overlay import ALPHA, COLORMAP, colormap
from .panel import FRAME_NOTE, scale_note
from .style import LONG, STYLE
from .tiles import Scale, Tile, check_scale, fitted, mapped_picture, plain_picture, top_values

_SIDE: Final = 320
_CAPTION: Final = 40  # letters of an id; its whole is in the tooltip
_SHARED_NOTE: Final = "The results of one query share a colour scale; the query's map has its own."
_IN_NOTEBOOK: Final = 1_600_000  # pixels of a picture, a third of a megabyte
_ONE_ROUND: Final = 1.35  # taller than this, a picture is shown smaller rather than the row taller


@dataclass
class Row:
    """A query, its results, and what there is to say about them.

    compact: small, and side by side with the compact rows before and after it.
    anchor: what links to it name: letters and digits; empty for none.
    scale: of its results, as in `panel`; None takes the page's.
    """

    query: Tile
    results: Sequence[Tile]
    notes: str = ""
    title: str = ""
    compact: bool = False
    anchor: str = ""
    scale: Scale | None = None


@dataclass(frozen=True)
class Look:
    """What all rows of a page share.

    scale: as in `panel`, for the results of each row by itself.
    side: the longest side of the pictures stored in the page, in pixels.
    alpha, cmap: as of `overlay`.
    quality: of the JPEG pictures, 1 to 95.
    long: of hundreds of rows: pictures are decoded, and rows laid out, as they come into sight.
    """

    scale: Scale = "joint"
    side: int = _SIDE
    alpha: float = ALPHA
    cmap: str = COLORMAP
    quality: int = 88
    long: bool = False

    def __post_init__(self) -> None:
        check_scale(self.scale)


def page(
    rows: Sequence[Row],
    *,
    title: str = "Explanations",
    intro: str = "",
    tables: Sequence[Block] = (),
    scale: Scale = "joint",
    side: int = _SIDE,
    alpha: float = ALPHA,
    cmap: str = COLORMAP,
) -> str:
    """A whole HTML document, self-contained: pictures and styles are inside.

    intro: plain text; an empty line begins a new paragraph.
    tables: in the order given; charts that follow one another stand side by side.
    scale: as in `panel`, for the results of each row by itself.
    side: the longest side of the pictures stored in the page, in pixels.
    """
    look = Look(scale, side, alpha, cmap)
    tiles = [tile for row in rows for tile in (row.query, *row.results)]
    parts = [
        page_head(
            title,
            intro,
            tables,
            look,
            maps=any(tile.cam is not None for tile in tiles),
            cropped=any(tile.cropped for tile in tiles),
        )
    ]
    for compact, run in groupby(rows, lambda row: row.compact):
        drawn = [page_row(row, look) for row in run]
        if compact:
            note = paragraphs(_SHARED_NOTE if scale == "joint" else "", "quiet")
            drawn = ['<div class="compact">\n', *drawn, "</div>\n", note and f"{note}\n"]
        parts += drawn
    return "".join([*parts, page_foot()])


def page_head(
    title: str,
    intro: str = "",
    tables: Sequence[Block] = (),
    look: Look | None = None,
    *,
    maps: bool = True,
    cropped: bool = False,
) -> str:
    """A document up to its first row.

    title, intro, tables: as of `page`.
    look: of the rows that follow; None takes the default.
    maps: whether any of them has a map, so that colours need a legend.
    cropped: whether any map leaves a visible part of its picture out (`Tile.cropped`).
    """
    look = look or Look()
    parts = [paragraphs(intro, "intro"), *drawn_blocks(tables)]
    if maps:
        parts.append(_legend(cropped, look.alpha, look.cmap))
    if maps and look.long:  # once, in place of a note below every row
        joint = look.scale == "joint"
        parts.append(paragraphs(_SHARED_NOTE if joint else scale_note(1, [1], "each"), "quiet"))
    charted = any(isinstance(block, Chart) for block in tables)
    return _HEAD.format(
        title=text(title),
        style=STYLE + (CHART_STYLE if charted else "") + (LONG if look.long else ""),
        body="".join(f"{part}\n" for part in parts if part),
    )


def page_row(row: Row, look: Look | None = None) -> str:
    """A row of a page."""
    look = look or Look()
    tiles = [row.query, *row.results]
    scale = row.scale or look.scale
    query_top, result_tops = top_values(row.query, row.results, scale)
    shape = max(
        size[1] / size[0] for size in (fitted(tile, look.side, look.side) for tile in tiles)
    )
    figures = [
        _figure(tile, top, look, "query" if i == 0 else "result", row.compact)
        for i, (tile, top) in enumerate(zip(tiles, [query_top, *result_tops], strict=True))
    ]
    heading = f"<h2>{breakable(row.title)}</h2>\n" if row.title else ""
    has_map = any(tile.cam is not None for tile in tiles)
    noted = has_map and not row.compact and not look.long
    note = scale_note(query_top, result_tops, scale) if noted else ""
    anchor = f' id="{text(row.anchor)}"' if row.anchor else ""
    return (
        f'<section{anchor} style="--shape:{1 / min(shape, _ONE_ROUND):.4f}">\n{heading}'
        f"{paragraphs(row.notes, 'notes')}"
        f'<div class="tiles">\n{"".join(figures)}</div>\n'
        f"{paragraphs(note, 'quiet')}\n</section>\n"
    )


def page_foot() -> str:
    """The end of a document, behind its last row."""
    return "</main>\n</body>\n</html>\n"


def _legend(cropped: bool, alpha: float, cmap: str) -> str:
    at = np.linspace(0, 1, 9)
    stops = [
        f"rgba({r * 255:.0f},{g * 255:.0f},{b * 255:.0f},{alpha * share:.3f}) {share:.1%}"
        for (r, g, b), share in zip(colormap(at, cmap), at, strict=True)
    ]
    frame = f" {FRAME_NOTE}" if cropped else ""
    return (
        '<p class="legend"><span>no evidence</span>'
        f'<span class="bar" style="background-image:linear-gradient(90deg,{",".join(stops)})">'
        "</span><span>strongest</span></p>\n"
        f'<p class="quiet">Point at a picture, or tap it, to see it without its map.{frame}</p>'
    )


def _figure(tile: Tile, top: float, look: Look, role: str, compact: bool) -> str:
    size = fitted(tile, look.side, look.side)
    what = text(tile.caption or role)
    plain = _img(plain_picture(tile, size), f"{role}: {what}", "plain", look)
    mapped = mapped_picture(tile, size, top, look.alpha, look.cmap)
    drawn = _img(mapped, f"map over {role} {what}", "map", look)
    inside = plain + drawn or "<span>picture not found</span>"
    focus = ' tabindex="0"' if plain and drawn else ""
    # Two objects side by side are shown as large as one beside them.
    wide = compact and role == "query" and size[0] > 1.5 * size[1]
    shape = f' style="--shape:{size[0] / size[1]:.4f}"' if wide else ""
    kind = f"{role} wide" if wide else role
    badge = '<span class="badge">Query</span>' if role == "query" else ""
    short = shorten_middle(tile.caption, lambda words: len(words) <= _CAPTION)
    lines = [f'<b class="warning">{breakable(tile.warning)}</b>'] if tile.warning else []
    lines += [f'<b title="{what}">{breakable(short)}</b>'] if tile.caption else []
    lines += [f"<span>{breakable(line)}</span>" for line in tile.subcaption.split("\n") if line]
    return (
        f'<figure class="{kind}"{shape}><div class="frame"{focus}>{inside}{badge}</div>\n'
        f"<figcaption>{''.join(lines)}</figcaption></figure>\n"
    )


def in_notebook(picture: Image.Image, alt: str) -> str:
    """A picture as notebooks show it: small enough that a saved one with several stays small."""
    shown = picture.convert("RGB")
    if (pixels := shown.width * shown.height) > _IN_NOTEBOOK:
        share = (_IN_NOTEBOOK / pixels) ** 0.5
        shown = shown.resize((int(share * shown.width), int(share * shown.height)))
    size = f'style="width: {picture.width}px; max-width: 100%"'
    return f'<img alt="{text(cut(alt, 400))}" {size} src="{_jpeg(shown, 80)}">'


def _jpeg(picture: Image.Image, quality: int) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _img(picture: Image.Image | None, alt: str, kind: str, look: Look) -> str:
    """A picture inside the page; `alt` is already escaped."""
    if picture is None:
        return ""
    later = 'loading="lazy" decoding="async" ' if look.long else ""
    return (
        f'<img class="{kind}" alt="{alt}" width="{picture.width}" height="{picture.height}" '
        f'{later}src="{_jpeg(picture, look.quality)}">'
    )


_HEAD: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}"""
