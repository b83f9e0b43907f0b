"""Rows as Markdown, differences and ratios with their intervals, bars, and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from measuring import figure, right
from PIL import Image

from embedcam.metrics import PairedDifference, bootstrap_interval, paired_difference

from .bench import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKS = ("o", "s", "^", "D")
COLUMNS = ("single", "single - base", "pasted", "pasted - base", "energy", "share", "right")


class Interval(NamedTuple):
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Bar:
    """A promise beside what was measured.

    Args:
        promise: what is asked for.
        setting: of what.
        shown: what was measured, by data set.
        short: by how much each data set misses it; 0 or less where it is met.
    """

    promise: str
    setting: str
    shown: Mapping[str, str]
    short: Mapping[str, float]

    def line(self) -> str:
        """As Markdown."""
        cells = [
            f"{self.shown[data]}: " + (f"**missed by {short:.3f}**" if short > 0 else "met")
            for data, short in self.short.items()
        ]
        return f"| {self.promise} | {self.setting} | {' | '.join(cells)} |"


def by_picture(values: np.ndarray) -> np.ndarray:
    """One figure a picture or scene: a scene and its mirror image count once."""
    return values.mean(0) if values.ndim == 2 else values


def mean_of(values: np.ndarray) -> Interval:
    """Mean over pictures or scenes."""
    values = by_picture(values)
    return Interval(float(values.mean()), *bootstrap_interval(values))


def gain(row: Row, what: str) -> PairedDifference:
    """How a row fares against its base, picture by picture, by one of its figures."""
    assert row.against is not None
    return paired_difference(*(by_picture(getattr(one, what)) for one in (row, row.against)))


def ratio(a: np.ndarray, b: np.ndarray) -> Interval:
    """mean(a) / mean(b) of the same pictures, pairs resampled together as `bootstrap_interval`."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(a), (2000, len(a)))
    low, high = np.quantile(a[picks].mean(1) / b[picks].mean(1), [0.025, 0.975])
    return Interval(float(a.mean() / b.mean()), float(low), float(high))


def difference(row: Row, what: str) -> str:
    """A row's gain as a cell: mean, interval, how often it wins."""
    if row.against is None:
        return ""
    found = gain(row, what)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {found.win_rate:.0%}"


def table(
    names: Sequence[str], rows: Sequence[Row], sizes: bool = False, bases: bool = True
) -> str:
    """Rows as Markdown: what names them, what they score, how that compares with their base."""
    columns = [*names, *(["bytes"] if sizes else [])]
    columns += [one for one in COLUMNS if bases or not one.endswith("- base")]
    lines = []
    for row in rows:
        cells = [*row.cells, *(["" if row.bytes is None else str(row.bytes)] if sizes else [])]
        for what in ("single", "pasted"):
            cells += [figure(getattr(row, what)), *([difference(row, what)] if bases else [])]
        cells += [figure(row.energy), figure(row.share), right(row.share)]
        lines.append(cells)
    return markdown(columns, lines)


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def sweep(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]],
    across: str,
    ticks: Mapping[float, str] | None = None,
    columns: int = 2,
) -> None:
    """Lines with their intervals, a panel each, over a logarithmic axis.

    Args:
        path: of the PNG.
        panels: title -> line -> (place, figure).
        across: what the axis is.
        ticks: place -> its name.
        columns: panels side by side.
    """
    rows = -(-len(panels) // columns)
    drawing = Figure(figsize=(4.5 * columns, 2.9 * rows), layout="constrained")
    for place, (title, lines) in enumerate(panels.items()):
        axes = drawing.add_subplot(rows, columns, place + 1)
        for number, (name, line) in enumerate(lines.items()):
            x = [at for at, _ in line]
            middle = [found.mean for _, found in line]
            axes.plot(x, middle, color=COLOURS[number], marker=MARKS[number], ms=4, label=name)
            ends = ([found.low for _, found in line], [found.high for _, found in line])
            axes.fill_between(x, *ends, color=COLOURS[number], alpha=0.15, lw=0)
        axes.set_xscale("log")
        axes.minorticks_off()
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if place // columns == rows - 1:
            axes.set_xlabel(across)
    _legend(drawing)
    save(drawing, path)


def forest(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    columns: int = 2,
    width: float = 4.5,
    alike: bool = False,
) -> None:
    """A dot with its interval for each name, a panel each, one colour a data set.

    Args:
        path: of the PNG.
        panels: title -> data set -> name -> figure; the same names in every panel of a row.
        columns: panels side by side.
        width: of a panel, in inches.
        alike: one axis for all panels of a row.
    """
    rows = -(-len(panels) // columns)
    most = max(len(found) for sets in panels.values() for found in sets.values())
    size = (width * columns, (0.26 * most + 0.7) * rows + 0.3)
    drawing = Figure(figsize=size, layout="constrained")
    for place, (title, sets) in enumerate(panels.items()):
        axes = drawing.add_subplot(rows, columns, place + 1)
        names = list(next(iter(sets.values())))
        for number, (data, found) in enumerate(sets.items()):
            y = np.arange(len(names)) + 0.16 * (number - (len(sets) - 1) / 2)
            figures = [found[name] for name in names]
            axes.hlines(y, [f.low for f in figures], [f.high for f in figures], COLOURS[number])
            axes.plot(
                [f.mean for f in figures], y, MARKS[number], color=COLOURS[number], ms=4, label=data
            )
        first = place % columns == 0
        axes.set_yticks(range(len(names)), names if first else [""] * len(names), fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if alike:
            axes.set_xlim(_span(list(panels.values())[place // columns * columns :][:columns]))
    _legend(drawing)
    save(drawing, path)


def _legend(drawing: Figure) -> None:
    """One legend above all panels, which hides nothing."""
    names = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(*names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def _span(row: Sequence[Mapping[str, Mapping[str, Interval]]]) -> tuple[float, float]:
    """What an axis must show for every interval of a row of panels."""
    every = [found for sets in row for names in sets.values() for found in names.values()]
    low, high = min(found.low for found in every), max(found.high for found in every)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def save(drawing: Figure, path: Path) -> None:
    """A figure as a small PNG: 64 colours are plenty for lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=100, metadata={"Software": None})
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def named(tables: Mapping[str, Sequence[Row]], *cells: str) -> dict[str, Row]:
    """The row of these cells in each data set."""
    return {data: next(row for row in rows if row.cells == cells) for data, rows in tables.items()}


def each(rows: Mapping[str, Row], show: Callable[[Row], str]) -> str:
    """What is shown of a row in each data set, with a stroke between."""
    return " / ".join(show(row) for row in rows.values())
