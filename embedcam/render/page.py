"""One HTML file that shows many explanations: no scripts, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Final

import numpy as np
from PIL import Image

from embedcam.render.canvas import shorten_middle
from embedcam.render.chart import STYLE as CHART_STYLE
from embedcam.render.chart import Chart, chart_svg
from embedcam.render.overlay import ALPHA, COLORMAP, colormap
from embedcam.render.panel import FRAME_NOTE, scale_note
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

_SIDE: Final = 320
_QUALITY: Final = 88
_CAPTION: Final = 40  # letters of an id; its whole is in the tooltip
_SHARED_NOTE: Final = "The results of one query share a colour scale; the query's map has its own."
_ONE_ROUND: Final = 1.35  # taller than this, a picture is shown smaller rather than the row taller


@dataclass
class Row:
    """A query, its results, and what there is to say about them.

    compact: small, and side by side with the compact rows before and after it.
    """

    query: Tile
    results: Sequence[Tile]
    notes: str = ""
    title: str = ""
    compact: bool = False


@dataclass
class Table:
    """A table of words and numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    notes: str = field(default="")


@dataclass
class Notice:
    """What a reader must see before the figures: a heading and a list of sentences.

    good: whether it is good news.
    """

    title: str
    lines: Sequence[str] = ()
    good: bool = False


def page(
    rows: Sequence[Row],
    *,
    title: str = "Explanations",
    intro: str = "",
    tables: Sequence[Table | Chart | Notice] = (),
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
    check_scale(scale)
    tiles = [tile for row in rows for tile in (row.query, *row.results)]
    parts = [_paragraphs(intro, "intro"), *_blocks(tables)]
    if any(tile.cam is not None for tile in tiles):
        parts.append(_legend(any(tile.cropped for tile in tiles), alpha, cmap))
    charted = any(isinstance(block, Chart) for block in tables)
    for compact, run in groupby(rows, lambda row: row.compact):
        drawn = [_row(row, scale, side, alpha, cmap) for row in run]
        if compact:
            note = _paragraphs(_SHARED_NOTE if scale == "joint" else "", "quiet")
            drawn = ['<div class="compact">', *drawn, "</div>", note]
        parts += drawn
    return _DOCUMENT.format(
        title=_text(title),
        style=_STYLE + (CHART_STYLE if charted else ""),
        body="\n".join(part for part in parts if part),
    )


def _text(text: object) -> str:
    return escape(clean(str(text)), quote=True)


def _breakable(text: str) -> str:
    """Text whose long words may break behind their joints."""
    return re.sub("([_/])", r"\1<wbr>", _text(text))


def _paragraphs(text: str, kind: str) -> str:
    blocks = [" ".join(block.split()) for block in text.replace("\r", "").split("\n\n")]
    return "\n".join(f'<p class="{kind}">{_text(block)}</p>' for block in blocks if block)


def _blocks(blocks: Sequence[Table | Chart | Notice]) -> list[str]:
    made = []
    for kind, run in groupby(blocks, type):
        if kind is Chart:
            drawn = "\n".join(chart_svg(one) for one in run if isinstance(one, Chart))
            made.append(f'<div class="charts">{drawn}</div>')
            continue
        for one in run:
            if isinstance(one, Table):
                made.append(_table(one))
            elif isinstance(one, Notice):
                made.append(_notice(one))
    return made


def _notice(notice: Notice) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in notice.lines)
    kind = "notice good" if notice.good else "notice"
    body = f"<ul>{lines}</ul>" if lines else ""
    return f'<div class="{kind}"><b>{_text(notice.title)}</b>{body}</div>'


def _table(table: Table) -> str:
    numeric = [
        all(_is_number(row[i]) for row in table.rows if i < len(row))
        for i in range(len(table.header))
    ]

    def cells(tag: str, values: Sequence[object]) -> str:
        made = []
        for i, value in enumerate(values):
            kind = ' class="number"' if i < len(numeric) and numeric[i] else ""
            scope = ' scope="col"' if tag == "th" else ""
            made.append(f"<{tag}{scope}{kind}>{_text(value)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(cells("td", row) for row in table.rows)
    return (
        f'<div class="scroll"><table>{caption}\n<thead>{cells("th", table.header)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>\n{_paragraphs(table.notes, 'quiet')}"
    )


def _is_number(value: object) -> bool:
    """Whether a cell reads as a number: 12, 0.5, 83%, 0.92 (0.95), 0.4*, or a dash for none."""
    words = (
        str(value)
        .replace("%", "")
        .replace("*", "")
        .replace("(", " ")
        .replace(")", " ")
        .replace("±", " ")
    )
    words = words.replace("[", " ").replace("]", " ").replace(",", " ")
    try:
        return all(word in "-–—" or np.isfinite(float(word)) for word in words.split())
    except ValueError:
        return False


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


def _row(row: Row, scale: Scale, side: int, alpha: float, cmap: str) -> str:
    tiles = [row.query, *row.results]
    query_top, result_tops = top_values(row.query, row.results, scale)
    shape = max(size[1] / size[0] for size in (fitted(tile, side, side) for tile in tiles))
    figures = [
        _figure(tile, top, side, alpha, cmap, "query" if i == 0 else "result", row.compact)
        for i, (tile, top) in enumerate(zip(tiles, [query_top, *result_tops], strict=True))
    ]
    heading = f"<h2>{_breakable(row.title)}</h2>\n" if row.title else ""
    has_map = any(tile.cam is not None for tile in tiles)
    note = "" if row.compact or not has_map else scale_note(query_top, result_tops, scale)
    return (
        f'<section style="--shape:{1 / min(shape, _ONE_ROUND):.4f}">\n{heading}'
        f"{_paragraphs(row.notes, 'notes')}"
        f'<div class="tiles">\n{"".join(figures)}</div>\n'
        f"{_paragraphs(note, 'quiet')}\n</section>"
    )


def _figure(
    tile: Tile, top: float, side: int, alpha: float, cmap: str, role: str, compact: bool
) -> str:
    size = fitted(tile, side, side)
    what = _text(tile.caption or role)
    plain = _img(plain_picture(tile, size), f"{role}: {what}", "plain")
    drawn = _img(mapped_picture(tile, size, top, alpha, cmap), f"map over {role} {what}", "map")
    inside = plain + drawn or "<span>picture not found</span>"
    focus = ' tabindex="0"' if plain and drawn else ""
    # Two objects side by side are shown as large as one beside them.
    wide = compact and role == "query" and size[0] > 1.5 * size[1]
    shape = f' style="--shape:{size[0] / size[1]:.4f}"' if wide else ""
    kind = f"{role} wide" if wide else role
    badge = '<span class="badge">Query</span>' if role == "query" else ""
    short = shorten_middle(tile.caption, lambda text: len(text) <= _CAPTION)
    lines = [f'<b title="{what}">{_breakable(short)}</b>'] if tile.caption else []
    lines += [f"<span>{_breakable(text)}</span>" for text in tile.subcaption.split("\n") if text]
    return (
        f'<figure class="{kind}"{shape}><div class="frame"{focus}>{inside}{badge}</div>\n'
        f"<figcaption>{''.join(lines)}</figcaption></figure>\n"
    )


def _img(picture: Image.Image | None, alt: str, kind: str) -> str:
    """A picture inside the page; `alt` is already escaped."""
    if picture is None:
        return ""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return (
        f'<img class="{kind}" alt="{alt}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


_DOCUMENT: Final = """<!DOCTYPE html>
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
{body}
</main>
</body>
</html>
"""

_STYLE: Final = """
:root { --paper: #fff; --ink: #181c24; --quiet: #5c6474; --line: #dee2e8; --mat: #f3f5f8;
  --accent: #b3420f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161b; --ink: #e9ebf0; --quiet: #9aa2b1; --line: #2d323c; --mat: #1e2229;
    --accent: #ffa45c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 3rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em;
  margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.intro, .notes { max-width: 44rem; margin: 0 0 1rem; }
.quiet { color: var(--quiet); font-size: .875rem; margin: .6rem 0 0; }
.legend { display: flex; align-items: center; gap: .75rem; color: var(--quiet);
  font-size: .875rem; margin: 1.75rem 0 0; }
.bar { width: min(15rem, 40vw); height: .75rem; border-radius: .375rem;
  background-color: #e2e5ea; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
.tiles { display: grid; gap: 1.25rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(11.5rem, 44%), 1fr)); }
figure { margin: 0; min-width: 0; }
.wide { grid-column: span 2; }
.compact { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
.compact .tiles { gap: .75rem; grid-template-columns: repeat(4, 1fr); }
.compact h2 { font-size: 1rem; }
@media (max-width: 34rem) { .compact .tiles { grid-template-columns: repeat(2, 1fr); } }
.frame { position: relative; display: grid; aspect-ratio: var(--shape); overflow: hidden;
  border-radius: .5rem; background: var(--mat); place-items: center; color: var(--quiet);
  font-size: .875rem; }
.query .frame { box-shadow: 0 0 0 2px var(--paper), 0 0 0 4px var(--accent); }
.badge { position: absolute; left: .5rem; top: .5rem; padding: .1rem .5rem; border-radius: 1rem;
  background: var(--accent); color: var(--paper); font-size: .75rem; font-weight: 600; }
.frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.map { transition: opacity .15s; }
.frame:hover .plain + .map, .frame:focus .plain + .map { opacity: 0; }
.frame:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; }
@media (prefers-reduced-motion: reduce) { .map { transition: none; } }
figcaption { padding-top: .5rem; font-size: .875rem; line-height: 1.4; }
figcaption b { display: block; font-weight: 600; overflow-wrap: anywhere; }
figcaption span { display: block; color: var(--quiet); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1.75rem 0 .5rem; }
table { border-collapse: collapse; font-size: .9375rem; }
table { min-width: min(100%, 30rem); }
caption { text-align: left; font-weight: 600; padding-bottom: .6rem; text-wrap: balance; }
th, td { text-align: left; padding: .45rem 1.5rem .45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
th { color: var(--quiet); font-weight: 500; font-size: .8125rem; }
.notice { max-width: 52rem; margin: 1.25rem 0; padding: .7rem 1rem; border-radius: .4rem;
  background: var(--mat); border-left: 4px solid var(--accent); font-size: .9375rem; }
.notice.good { border-left-color: #2e8b57; }
.notice ul { margin: .35rem 0 0; padding-left: 1.1rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { main { padding: 0; } section { break-inside: avoid; } }
"""
