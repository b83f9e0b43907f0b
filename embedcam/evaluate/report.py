"""What an evaluation gives: numbers, their summary, tables for the terminal, and a page."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._files import write_whole
from ..render import Block, Chart, Notice, Table, drawn_blocks, page
from ..render import Row as PageRow
from .measures import MEAN, MEASURES, TRANSFERRED
from .rivals import BASELINES
from .settings import Record
from .summary import LEAST

ON_ONE_OBJECT = (
    "On pictures of one object mean activation, which shows what is salient, is hard to beat: what "
    "is salient is mostly what matched. Two objects tell them apart."
)
_INTERVAL = " [95%]"
_TRANSFERRED = TRANSFERRED + _INTERVAL
Cells = Mapping[str, str]
"""What stands in a column of a table, by the measure's name."""


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

    summary: Record
    rows: list[Record]
    scenes: list[Record] = field(default_factory=list)
    examples: Sequence[PageRow] = ()
    grid: Sequence[PageRow] = ()

    def __repr__(self) -> str:
        done, flags = len(self.rows), len(self.summary["flags"])
        return f"<Evaluation of {self.summary['index']}: {done} images, {flags} flags>"

    def _repr_html_(self) -> str:
        return "\n".join(drawn_blocks([*notices(self.summary), *tables(self.summary)]))

    def to_dict(self) -> Record:
        """Return the summary, ready for JSON."""
        copied: Record = json.loads(json.dumps(self.summary))
        return copied

    def save_csv(self, path: str | Path) -> Path:
        """Write a line for each image; InputError where it cannot be written."""
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return write_whole(path, text.getvalue())

    def html(self) -> str:
        """Return the whole report as one self-contained page."""
        shown, heads = tables(self.summary), ("Beside", "Faithfulness")
        places = (n for n, one in enumerate(shown, 1) if one.caption.startswith(heads))
        place = next(places, len(shown))
        blocks = [*notices(self.summary), *shown[:place], *charts(self.summary), *shown[place:]]
        rows, title = [*self.grid, *self.examples], "How good are the maps?"
        return page(rows, title=title, intro=intro(self.summary), tables=blocks)

    def save_html(self, path: str | Path) -> Path:
        """Write the report; InputError where it cannot be written."""
        return write_whole(path, self.html())


def notices(summary: Record) -> list[Block]:
    """Return what stands above the figures: the verdict, and what was left out."""
    raised = {one["says"]: one["flag"] for one in summary["checks"] if one["raised"]}
    blocks: list[Block] = [
        Notice(
            _capital(flag), [says[len(flag) + 2 :] for says, one in raised.items() if one == flag]
        )
        for flag in dict.fromkeys(raised.values())
    ]
    flags = [text for text in summary["flags"] if text not in raised]
    if summary["flags"] and summary["beats"]:
        blocks.append(Notice("Beats every control", summary["beats"], good=True))
    if flags:
        blocks.append(Notice("Does not beat every control", flags))
    elif summary["controls"] or any(entry["controls"] for entry in summary["objects"].values()):
        blocks.append(Notice("Beats every control on every measure", good=True))
    else:
        title = "Nothing was held against a control, so these figures prove little"
        blocks.append(Notice(title))
    if summary["notes"]:
        blocks.append(Notice("Left out, or worth knowing", summary["notes"], good=True))
    return blocks


def intro(summary: Record) -> str:
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


def charts(summary: Record) -> list[Block]:
    """Return the deletion and insertion curves."""
    kinds = (
        ("deletion", "the map's top pixels removed", "The lower, the better."),
        ("insertion", "only the map's top pixels shown", "The higher, the better."),
    )
    blocks: list[Block] = []
    for kind, what, notes in kinds if summary["curves"] else ():
        curves = {method: one[kind] for method, one in summary["curves"].items()}
        lines = {
            method: [(step / (len(curve) - 1), y) for step, y in enumerate(curve)]
            for method, curve in curves.items()
        }
        labels = ("share of the pixels", "mean similarity to the nearest result")
        blocks.append(Chart(f"{kind.capitalize()}: {what}", lines, *labels, notes))
    return blocks


def tables(summary: Record) -> list[Table]:
    """Return every table of an evaluation, each with its caption and what its figures mean."""
    return [
        *_retrieval(summary["retrieval"]),
        *_localization(summary["localisation"]),
        *(_objects(*entry) for entry in summary["objects"].items()),
        *_faithfulness(summary),
        *_sanity(summary["sanity"]),
        *_fidelity(summary["fidelity"]),
    ]


def _retrieval(means: Record) -> Iterator[Table]:
    if means:
        count = next(iter(means.values()))["n"]
        yield Table(
            ["", *(MEASURES[name].title for name in means)],
            [[f"{count:,} queries", *map(_interval, means.values())]],
            "Does the network retrieve at all?",
            "Queries against the index, never their own image. Maps of a network that does not "
            "bring back the right images explain nothing worth knowing.",
        )


def _localization(means: Record) -> Iterator[Table]:
    if means:
        count = next(iter(means.values()))["n"]
        yield _table(
            {
                **_judged(means),
                **_salient(means),
                "": {name: MEASURES[name].says for name in means},
            },
            f"Localisation, {_images(count)} with a box or mask",
            "Chance is what a map that is the same everywhere scores: the region's share of the "
            f"area. A pointing game says little where objects stand in the middle. {_free(means)}",
        )


def _objects(name: str, entry: Record) -> Table:
    means = entry["measures"]
    return _table(
        {**_judged(means), **(_others(entry["controls"]) or _salient(means))},
        f"Telling two objects apart: {name}, {entry['questions']:,} questions",
        "Each object of a picture is asked about in turn with the stored weights of one result of "
        f"its kind; a map that ignores the question scores one half. {_free(means)}",
    )


def _faithfulness(summary: Record) -> Iterator[Table]:
    compared, means, images = summary["controls"], summary["faithfulness"], summary["sample"]
    if not compared and not means:
        return
    own = {name: one["ways"][TRANSFERRED] for name, one in compared.items()} or means
    columns = {
        "better": {name: "more" if MEASURES[name].better > 0 else "less" for name in own},
        _TRANSFERRED: {name: _interval(mean) for name, mean in own.items()},
        **_others(compared),
    }
    chosen = [MEASURES[name] for name in own if MEASURES[name].group == "faithfulness"]
    meanings = " ".join(f"{_capital(one.title)}: {one.says}." for one in chosen if one.says)
    if not compared:
        notes = f"Without controls: a figure by itself says little. {meanings}"
        yield _table(columns, f"Faithfulness, {_images(images)}", notes)
        return
    empty = summary["empty_in_controls"]
    shares = {name: empty.get(name.removesuffix(_INTERVAL)) for name in list(columns)[1:]}
    cells = ("–" if share is None else f"{share:.3f}" for share in shares.values())
    ways = "other ways and " * bool(summary["methods"] or summary["recipes"])
    yield _table(
        columns,
        f"Beside {ways}controls that know nothing, {_images(images)}",
        f"{ON_ONE_OBJECT} An empty map scores "
        "chance where it should mark a place, and removes pixels row by row. "
        "* transferred maps are not better than this: the 95% interval of the paired difference "
        f"reaches 0 or lies on the wrong side. {meanings}",
        ["empty maps", "–", *cells],
    )


def _sanity(stages: Sequence[Record]) -> Iterator[Table]:
    if stages:
        yield Table(
            ["shuffled from the output down", "rank correlation of the maps [95%]", "empty maps"],
            [
                [f"{one['modules']} of {one['of']}", _interval(one), f"{one['empty']:.0%}"]
                for one in stages
            ],
            "Sanity: the network's parameters shuffled, module after module",
            "A map that hardly changes where the network no longer works does not show what the "
            "network does. An empty map says that nothing speaks for the results.",
        )


def _fidelity(means: Record) -> Iterator[Table]:
    counts = sorted({one["n_neighbors"] for line in means.values() for one in line})
    rows = []
    for kind, line in means.items():
        cells = {one["n_neighbors"]: _interval(one) for one in line}
        rows.append([kind, f"{line[0]['n']:,}", *(cells.get(count, "–") for count in counts)])
    if rows:
        yield Table(
            ["results", "images", *(f"{n} neighbour{'s' * (n > 1)} [95%]" for n in counts)],
            rows,
            "Transfer fidelity: correlation of the query's own map with the transferred one",
            "The own map is computed on the query itself, as a fallback does; both are taken "
            "before the ReLU, at the positions of the layer.",
        )


def _table(columns: Mapping[str, Cells], caption: str, notes: str, *more: Sequence[str]) -> Table:
    names = columns[_TRANSFERRED]
    rows = [
        [MEASURES[name].title, *(one.get(name, "–") for one in columns.values())] for name in names
    ]
    return Table(["measure", *columns], [*rows, *more], caption, notes)


def _judged(means: Record) -> dict[str, Cells]:
    chance = {name: f"{one['chance']:.3f}" for name, one in means.items() if "chance" in one}
    return {"chance": chance, _TRANSFERRED: {name: _interval(one) for name, one in means.items()}}


def _salient(means: Record) -> dict[str, Cells]:
    there = {
        name: one["mean_activation"] for name, one in means.items() if "mean_activation" in one
    }
    return {MEAN + _INTERVAL: {name: _interval(mean) for name, mean in there.items()}}


def _others(compared: Record) -> dict[str, Cells]:
    columns: dict[str, dict[str, str]] = {}
    for name, entry in compared.items():
        for method, difference in entry["differences"].items():
            head, shown = method + _INTERVAL, _interval
            if method in BASELINES:
                head, shown = method, _mean
            star = "" if difference["beats"] else "*"
            columns.setdefault(head, {})[name] = shown(entry["ways"][method]) + star
    return dict(columns)


def _free(names: Iterable[str]) -> str:
    titles = [MEASURES[name].title for name in names if MEASURES[name].free]
    return f"No change of contrast moves: {', '.join(titles)}." if titles else ""


def _mean(mean: Mapping[str, float], key: str = "mean") -> str:
    value = mean[key]
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(mean: Mapping[str, float]) -> str:
    ends = f" [{_mean(mean, 'low')}, {_mean(mean, 'high')}]" if mean["n"] >= LEAST else ""
    return _mean(mean) + ends


def _images(count: int) -> str:
    return f"{count:,} image" + "s" * (count != 1)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
