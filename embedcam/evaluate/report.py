"""What an evaluation gives: numbers, their summary, tables for the terminal, and a page."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .._files import write_whole
from ..render import Block, Chart, Notice, Table, drawn_blocks, page
from ..render import Row as PageRow
from .baselines import BASELINES
from .measures import MEAN, MEASURES, TRANSFERRED
from .summary import LEAST, Summary
from .work import Row

ON_ONE_OBJECT = (
    "On pictures of one object mean activation, which shows what is salient, is hard to beat: what "
    "is salient is mostly what matched. Two objects tell them apart."
)
_INTERVAL = " [95%]"
_TRANSFERRED = TRANSFERRED + _INTERVAL
Cell = Callable[[str], str]
"""From a measure's name to what stands in its line of a table."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How good the maps of an index are.

    Attributes
    ----------
    summary : means with 95% intervals, comparisons, curves, notes, flags and the settings
    rows : a dict for each image that was read; baselines' columns are "BASELINE: MEASURE"
    scenes : a dict for each question about a picture of two objects
    examples, grid : the best and the worst; a few questions by each method or recipe that was named
    """

    summary: Summary
    rows: list[Row]
    scenes: list[Row] = field(default_factory=list)
    examples: Sequence[PageRow] = ()
    grid: Sequence[PageRow] = ()

    def __repr__(self) -> str:
        done, flags = len(self.rows), len(self.summary["flags"])
        return f"<Evaluation of {self.summary['index']}: {done} images, {flags} flags>"

    def _repr_html_(self) -> str:
        return "\n".join(drawn_blocks([*notices(self.summary), *tables(self.summary)]))

    def to_dict(self) -> Summary:
        """Return the summary, ready for JSON."""
        copied: Summary = json.loads(json.dumps(self.summary))
        return copied

    def save_csv(self, path: str | Path) -> Path:
        """Write a line for each image; InputError where it cannot be written."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        return write_whole(path, text.getvalue())

    def html(self) -> str:
        """Return the whole report as one self-contained page."""
        summary = self.summary
        blocks, curves = notices(summary), charts(summary)
        for table in tables(summary):
            blocks.append(table)
            if table.caption.startswith(("Beside", "Faithfulness")):
                blocks += curves
                curves = []
        return page(
            [*self.grid, *self.examples],
            title="How good are the maps?",
            intro=intro(summary),
            tables=blocks + curves,
        )

    def save_html(self, path: str | Path) -> Path:
        """Write the report; InputError where it cannot be written."""
        return write_whole(path, self.html())


def tables(summary: Summary) -> list[Table]:
    """Return every table of an evaluation, each with its caption and what its figures mean."""
    shown = [
        _retrieval(summary),
        _localization(summary["localisation"]),
        *(_objects(*entry) for entry in summary["objects"].items()),
        _beside(summary),
        _faithfulness(summary),
        _sanity(summary["sanity"]),
        _fidelity(summary["fidelity"]),
    ]
    return [table for table in shown if table is not None]


def notices(summary: Summary) -> list[Block]:
    """Return what stands above the figures: the verdict, and what was left out."""
    raised: dict[str, list[str]] = {}
    for one in summary["checks"]:
        if one["raised"]:
            raised.setdefault(one["flag"], []).append(one["says"].removeprefix(f"{one['flag']}: "))
    blocks: list[Block] = [Notice(_capital(flag), lines) for flag, lines in raised.items()]
    if summary["flags"] and summary["beats"]:
        blocks.append(Notice("Beats every control", summary["beats"], good=True))
    blocks.append(_verdict(summary))
    if summary["notes"]:
        blocks.append(Notice("Left out, or worth knowing", summary["notes"], good=True))
    return blocks


def _verdict(summary: Summary) -> Notice:
    named = [one["says"] for one in summary["checks"]]
    flags = [text for text in summary["flags"] if text not in named]
    if flags:
        return Notice("Does not beat every control", flags)
    if summary["controls"] or any(entry["controls"] for entry in summary["objects"].values()):
        return Notice("Beats every control on every measure", good=True)
    return Notice("Nothing was held against a control, so these figures prove little")


def intro(summary: Summary) -> str:
    """Say what was measured, in two sentences."""
    images = summary["images"]
    text = (
        f"{images['measured']:,} of {_images(images['given'])} against an index of "
        f"{summary['indexed_images']:,} ({summary['index']}); each map is drawn with weights "
        f"transferred from {summary['settings']['n_neighbors']} neighbours."
    )
    if images["indexed"]:
        text += f" The index holds {images['indexed']:,} of them, which never explain themselves."
    if images["skipped"]:
        text += f" {_images(len(images['skipped']))} could not be used."
    return text


def charts(summary: Summary) -> list[Block]:
    """Return the deletion and insertion curves."""
    kinds = (
        ("deletion", "the map's top pixels removed", "The lower, the better."),
        ("insertion", "only the map's top pixels shown", "The higher, the better."),
    )
    return [
        Chart(
            f"{kind.capitalize()}: {what}",
            {
                method: [(step / (len(one[kind]) - 1), y) for step, y in enumerate(one[kind])]
                for method, one in summary["curves"].items()
            },
            x_label="share of the pixels",
            y_label="mean similarity to the nearest result",
            notes=notes,
        )
        for kind, what, notes in kinds
        if summary["curves"]
    ]


def _images(count: int) -> str:
    return f"{count:,} image" + "s" * (count != 1)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(mean: Mapping[str, float]) -> str:
    if mean["n"] < LEAST:
        return _number(mean["mean"])
    return f"{_number(mean['mean'])} [{_number(mean['low'])}, {_number(mean['high'])}]"


def _table(names: Iterable[str], columns: Mapping[str, Cell], caption: str, notes: str) -> Table:
    rows = [[MEASURES[name].title, *(cell(name) for cell in columns.values())] for name in names]
    return Table(["measure", *columns], rows, caption, notes)


def _better(name: str) -> str:
    return "more" if MEASURES[name].better > 0 else "less"


def _chance(found: Summary, name: str) -> str:
    return f"{found[name]['chance']:.3f}" if "chance" in found[name] else "–"


def _salient(found: Summary, name: str) -> str:
    one = found[name]
    return _interval(one["mean_activation"]) if "mean_activation" in one else "–"


def _free(names: Iterable[str]) -> str:
    titles = [MEASURES[name].title for name in names if MEASURES[name].free]
    return f"No change of contrast moves: {', '.join(titles)}." if titles else ""


def _meanings(names: Iterable[str]) -> str:
    measures = [MEASURES[name] for name in names if MEASURES[name].group == "faithfulness"]
    return " ".join(f"{_capital(one.title)}: {one.says}." for one in measures if one.says)


def _retrieval(summary: Summary) -> Table | None:
    means = summary["retrieval"]
    if not means:
        return None
    count = next(iter(means.values()))["n"]
    return Table(
        ["", *(MEASURES[name].title for name in means)],
        [[f"{count:,} queries", *map(_interval, means.values())]],
        "Does the network retrieve at all?",
        "Queries against the index, never their own image. Maps of a network that does not bring "
        "back the right images explain nothing worth knowing.",
    )


def _localization(means: Summary) -> Table | None:
    if not means:
        return None
    columns: dict[str, Cell] = {
        "chance": partial(_chance, means),
        _TRANSFERRED: lambda name: _interval(means[name]),
        MEAN + _INTERVAL: partial(_salient, means),
        "": lambda name: MEASURES[name].says,
    }
    return _table(
        means, columns,
        f"Localisation, {_images(next(iter(means.values()))['n'])} with a box or mask",
        "Chance is what a map that is the same everywhere scores: the region's share of the area. "
        f"A pointing game says little where objects stand in the middle. {_free(means)}",
    )  # fmt: skip


def _objects(name: str, entry: Summary) -> Table:
    means = entry["measures"]
    others = _others(entry["controls"]) or {MEAN + _INTERVAL: partial(_salient, means)}
    columns: dict[str, Cell] = {
        "chance": partial(_chance, means),
        _TRANSFERRED: lambda name: _interval(means[name]),
        **others,
    }
    return _table(
        means, columns,
        f"Telling two objects apart: {name}, {entry['questions']:,} questions",
        "Each object of a picture is asked about in turn with the stored weights of one result of "
        f"its kind; a map that ignores the question scores one half. {_free(means)}",
    )  # fmt: skip


def _beside(summary: Summary) -> Table | None:
    compared = summary["controls"]
    if not compared:
        return None
    others = _others(compared)
    columns: dict[str, Cell] = {
        "better": _better,
        _TRANSFERRED: lambda name: _interval(compared[name]["ways"][TRANSFERRED]),
        **others,
    }
    table = _table(
        compared, columns,
        f"Beside {'other ways and ' * bool(summary['methods'] or summary['recipes'])}"
        f"controls that know nothing, {_images(summary['sample'])}",
        f"{ON_ONE_OBJECT} An empty map scores "
        "chance where it should mark a place, and removes pixels row by row. "
        "* transferred maps are not better than this: the 95% interval of the paired difference "
        f"reaches 0 or lies on the wrong side. {_meanings(compared)}",
    )  # fmt: skip
    empty = summary["empty_in_controls"]
    methods = (TRANSFERRED, *(name.removesuffix(_INTERVAL) for name in others))
    shares = (f"{empty[method]:.3f}" if method in empty else "–" for method in methods)
    return replace(table, rows=[*table.rows, ["empty maps", "–", *shares]])


def _others(compared: Summary) -> dict[str, Cell]:
    methods = dict.fromkeys(method for one in compared.values() for method in one["differences"])
    return {
        method + _INTERVAL * (method not in BASELINES): partial(_against, compared, method)
        for method in methods
    }


def _against(compared: Summary, method: str, name: str) -> str:
    entry = compared[name]
    if method not in entry["ways"]:
        return "–"
    star = "" if entry["differences"][method]["beats"] else "*"
    mean = entry["ways"][method]
    return (_number(mean["mean"]) if method in BASELINES else _interval(mean)) + star


def _faithfulness(summary: Summary) -> Table | None:
    means = summary["faithfulness"]
    if not means or summary["controls"]:
        return None
    return _table(
        means,
        {"better": _better, _TRANSFERRED: lambda name: _interval(means[name])},
        f"Faithfulness, {_images(summary['sample'])}",
        f"Without controls: a figure by itself says little. {_meanings(means)}",
    )


def _sanity(stages: Sequence[Summary]) -> Table | None:
    if not stages:
        return None
    return Table(
        ["shuffled from the output down", "rank correlation of the maps [95%]", "empty maps"],
        [
            [f"{one['modules']} of {one['of']}", _interval(one), f"{one['empty']:.0%}"]
            for one in stages
        ],
        "Sanity: the network's parameters shuffled, module after module",
        "A map that hardly changes where the network no longer works does not show what the "
        "network does. An empty map says that nothing speaks for the results.",
    )


def _fidelity(means: Summary) -> Table | None:
    if not means:
        return None
    counts = sorted({one["n_neighbors"] for line in means.values() for one in line})
    rows = []
    for kind, line in means.items():
        cells = {one["n_neighbors"]: _interval(one) for one in line}
        rows.append([kind, f"{line[0]['n']:,}", *(cells.get(count, "–") for count in counts)])
    return Table(
        ["results", "images", *(f"{n} neighbour{'s' * (n > 1)} [95%]" for n in counts)], rows,
        "Transfer fidelity: correlation of the query's own map with the transferred one",
        "The own map is computed on the query itself, as a fallback does; both are taken before "
        "the ReLU, at the positions of the layer.",
    )  # fmt: skip
