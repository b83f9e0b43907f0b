"""What stands above the pictures of a page: paragraphs, tables, notices and charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

import numpy as np

from .chart import Chart, chart_svg
from .tiles import clean


@dataclass(frozen=True)
class Link:
    """A word of a table that leads to a row of the same page, by the row's anchor."""

    words: str
    anchor: str

    def __str__(self) -> str:
        return self.words


@dataclass
class Table:
    """A table of words, numbers and links.

    folded: only its caption is seen until it is opened.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    notes: str = field(default="")
    folded: bool = False


@dataclass
class Notice:
    """What a reader must see before the figures: a heading and a list of sentences.

    good: whether it is good news.
    """

    title: str
    lines: Sequence[str] = ()
    good: bool = False


Block = Table | Chart | Notice


def text(value: object) -> str:
    """Anything as text of HTML, escaped; also fit for an attribute."""
    return escape(clean(str(value)), quote=True)


def breakable(words: str) -> str:
    """Text whose long words may break behind their joints."""
    return re.sub("([_/])", r"\1<wbr>", text(words))


def paragraphs(words: str, kind: str) -> str:
    """A paragraph of that class for each block of text between empty lines."""
    blocks = [" ".join(block.split()) for block in words.replace("\r", "").split("\n\n")]
    return "\n".join(f'<p class="{kind}">{text(block)}</p>' for block in blocks if block)


def drawn_blocks(blocks: Sequence[Block]) -> list[str]:
    """Each block as HTML; charts that follow one another stand side by side."""
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
    lines = "".join(f"<li>{text(line)}</li>" for line in notice.lines)
    kind = "notice good" if notice.good else "notice"
    body = f"<ul>{lines}</ul>" if lines else ""
    return f'<div class="{kind}"><b>{text(notice.title)}</b>{body}</div>'


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
            made.append(f"<{tag}{scope}{kind}>{_cell(value)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    words = text(table.caption)
    caption = f"<caption>{words}</caption>" if table.caption and not table.folded else ""
    body = "\n".join(cells("td", row) for row in table.rows)
    drawn = (
        f'<div class="scroll"><table>{caption}\n<thead>{cells("th", table.header)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>\n{paragraphs(table.notes, 'quiet')}"
    )
    if not table.folded:
        return drawn
    return f"<details><summary>{words or 'Table'}</summary>\n{drawn}</details>"


def _cell(value: object) -> str:
    if isinstance(value, Link):
        return f'<a href="#{text(value.anchor)}">{breakable(value.words)}</a>'
    return text(value)


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
