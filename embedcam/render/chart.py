"""A small line chart as SVG inside a page: no scripts, its colours follow the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from ..errors import InputError
from .tiles import clean

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_DASHES: Final = ("", "7 4", "2 4", "9 3 2 3", "4 3", "12 4")
"""Lines are told apart without their colours, too."""


@dataclass
class Chart:
    """Lines over one axis; the first is the one that matters.

    lines: name -> points (x, y), x rising.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = ""
    y_label: str = ""
    notes: str = ""


def chart_svg(chart: Chart) -> str:
    """The chart as a figure of HTML.

    Raises:
        InputError: no points, or one that is not finite.
    """
    points = [point for line in chart.lines.values() for point in line]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise InputError(f"chart {chart.title!r} has no points, or some that are not finite")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def across(x: float) -> float:
        share = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        at = down(y)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in x_ticks:
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}'
            "</text>"
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{_text(chart.x_label)}'
        "</text>"
    )
    # Drawn last, the first line lies on top.
    for place, line in reversed(list(enumerate(chart.lines.values()))):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="{_kind(place)}" {_dash(place)} points="{path}"/>')
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><polyline '
        f'class="{_kind(place)}" {_dash(place)} points="0,4 26,4"/></svg>{_text(name)}</span>'
        for place, name in enumerate(chart.lines)
    )
    label = f'<p class="axis">{_text(chart.y_label)}</p>' if chart.y_label else ""
    notes = f'<p class="quiet">{_text(chart.notes)}</p>' if chart.notes else ""
    return (
        f'<figure class="chart"><figcaption><b>{_text(chart.title)}</b></figcaption>{label}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(chart.title)}">'
        f'{"".join(parts)}</svg><p class="keys">{keys}</p>{notes}</figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that take in both ends, rising."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = max(abs(low), 1e-9) / 2
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    digits = -math.floor(math.log10(rough))
    power = 10.0**-digits
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def _kind(place: int) -> str:
    return f"line c{place % len(_DASHES)}"


def _dash(place: int) -> str:
    dash = _DASHES[place % len(_DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _text(text: str) -> str:
    return escape(clean(text), quote=True)


STYLE: Final = """
:root { --c0: #b3420f; --c1: #2f6fb0; --c2: #6b7280; --c3: #7a4fa3; --c4: #2e8b57; --c5: #a3752b; }
@media (prefers-color-scheme: dark) { :root { --c0: #ffa45c; --c1: #7fb4ea; --c2: #a2a9b5;
  --c3: #c3a1e6; --c4: #79cf9f; --c5: #e0bb7a; } }
.charts { display: grid; gap: 1.5rem 2rem; margin: 1.75rem 0 .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.chart { max-width: 34rem; }
.chart figcaption { padding: 0 0 .4rem; }
.chart svg { width: 100%; height: auto; display: block; font-size: 12px; fill: var(--quiet); }
.chart svg.key { width: 1.9rem; display: inline-block; vertical-align: middle;
  margin-right: .4rem; }
.axis { margin: 0; font-size: .8125rem; color: var(--quiet); }
.grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.75; stroke: var(--c2); }
.c0 { stroke: var(--c0); stroke-width: 3; } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .5rem 0 0; font-size: .8125rem;
  color: var(--quiet); }
.keys span { white-space: nowrap; }
"""
