"""The findings as tables, for the terminal and the page; and the page itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..render import Block, Chart, Notice, Table, page
from .controls import CONTROLS, MEAN
from .evaluation import Evaluation
from .settings import MEASURES, METHOD
from .summary import LEAST

ON_ONE_OBJECT = (
    "On pictures of one object mean activation, which shows what is salient, is hard to beat: what "
    "is salient is mostly what matched. Two objects tell them apart."
)

_INTERVAL = " [95%]"


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Every table of an evaluation, each with its caption and what its figures mean."""
    made = [
        _retrieval(summary["retrieval"], summary["indexed_images"]),
        _localisation(summary["localisation"]),
        *(_objects(*entry) for entry in summary["objects"].items()),
        _beside(summary),
        _faithfulness(summary),
        _sanity(summary["sanity"]),
        _fidelity(summary["fidelity"]),
    ]
    return [table for table in made if table is not None]


def notices(summary: Mapping[str, Any]) -> list[Block]:
    """What stands above the figures: the verdict, and what was left out."""
    raised: dict[str, list[str]] = {}
    for one in summary["checks"]:
        if one["raised"]:
            raised.setdefault(one["flag"], []).append(one["says"].removeprefix(f"{one['flag']}: "))
    blocks: list[Block] = [
        Notice(f"{flag[0].upper()}{flag[1:]}", said) for flag, said in raised.items()
    ]
    if summary["flags"] and summary["beats"]:
        blocks.append(Notice("Beats every control", summary["beats"], good=True))
    blocks.append(_verdict(summary))
    if summary["notes"]:
        blocks.append(Notice("Left out, or worth knowing", summary["notes"], good=True))
    return blocks


def report(evaluation: Evaluation) -> str:
    """A self-contained page: verdict, tables, curves, and the best and the worst."""
    summary = evaluation.summary
    blocks: list[Block] = notices(summary)
    shown = tables(summary)
    curves = charts(summary)
    for table in shown:
        blocks.append(table)
        if table.caption.startswith(("Beside", "Faithfulness")):
            blocks += curves
            curves = []
    blocks += curves
    return page(
        [*evaluation.grid, *evaluation.examples],
        title="How good are the maps?",
        intro=intro(summary),
        tables=blocks,
    )


def intro(summary: Mapping[str, Any]) -> str:
    """What was measured, in two sentences."""
    images, settings = summary["images"], summary["settings"]
    text = (
        f"{images['measured']:,} of {_images(images['given'])} against an index of "
        f"{summary['indexed_images']:,} "
        f"({summary['index']}); each map is drawn with weights transferred from "
        f"{settings['n_neighbors']} neighbours."
    )
    if images["indexed"]:
        text += f" The index holds {images['indexed']:,} of them, which never explain themselves."
    if images["skipped"]:
        text += f" {_images(len(images['skipped']))} could not be used."
    return text


def _images(count: int) -> str:
    """ "1 image", "2,000 images"."""
    return f"{count:,} image" + ("" if count == 1 else "s")


def charts(summary: Mapping[str, Any]) -> list[Chart]:
    """The deletion and insertion curves."""
    curves = summary["curves"]
    if not curves:
        return []
    made = []
    for kind, taken, better in (
        ("deletion", "the map's top pixels removed", "The lower, the better"),
        ("insertion", "only the map's top pixels shown", "The higher, the better"),
    ):
        lines = {
            way: [(step / (len(one[kind]) - 1), y) for step, y in enumerate(one[kind])]
            for way, one in curves.items()
        }
        made.append(
            Chart(
                f"{kind.capitalize()}: {taken}",
                lines,
                x_label="share of the pixels",
                y_label="mean similarity to the nearest result",
                notes=f"{better}.",
            )
        )
    return made


def _verdict(summary: Mapping[str, Any]) -> Notice:
    said = [one["says"] for one in summary["checks"]]
    flags = [text for text in summary["flags"] if text not in said]
    compared = bool(summary["controls"]) or any(
        entry["controls"] for entry in summary["objects"].values()
    )
    if flags:
        return Notice("Does not beat every control", flags)
    if compared:
        return Notice("Beats every control on every measure", good=True)
    return Notice("Nothing was held against a control, so these figures prove little")


def _number(value: float) -> str:
    """Three decimals for shares and similarities, one for places in a ranking."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(one: Mapping[str, Any]) -> str:
    """The mean and its interval; of too few images the mean alone."""
    if one["n"] < LEAST:
        return _number(one["mean"])
    return f"{_number(one['mean'])} [{_number(one['low'])}, {_number(one['high'])}]"


def _table(
    found: Mapping[str, Any],
    columns: Mapping[str, Callable[[str], str]],
    caption: str,
    notes: str,
) -> Table:
    """A line for each measure that was found, by the functions from its name to a cell."""
    rows = [[MEASURES[name].title, *(cell(name) for cell in columns.values())] for name in found]
    return Table(["measure", *columns], rows, caption, notes)


def _better(name: str) -> str:
    return "more" if MEASURES[name].better > 0 else "less"


def _retrieval(found: Mapping[str, Any], indexed: int) -> Table | None:
    if not found:
        return None
    header = ["", *(MEASURES[name].title for name in found)]
    row = [f"{next(iter(found.values()))['n']:,} queries", *map(_interval, found.values())]
    return Table(
        header, [row], "Does the network retrieve at all?",
        "Queries against the index, never their own image. Maps of a network that does not bring "
        "back the right images explain nothing worth knowing.",
    )  # fmt: skip


def _localisation(found: Mapping[str, Any]) -> Table | None:
    if not found:
        return None
    columns: dict[str, Callable[[str], str]] = {
        "chance": lambda name: f"{found[name]['chance']:.3f}" if "chance" in found[name] else "–",
        "transferred [95%]": lambda name: _interval(found[name]),
        f"{MEAN} [95%]": lambda name: _salient(found[name]),
        "": lambda name: MEASURES[name].says,
    }
    return _table(
        found, columns,
        f"Localisation, {_images(next(iter(found.values()))['n'])} with a box or mask",
        "Chance is what a map that is the same everywhere scores: the region's share of the area. "
        f"A pointing game says little where objects stand in the middle. {_free(found)}",
    )  # fmt: skip


def _objects(name: str, entry: Mapping[str, Any]) -> Table | None:
    found, compared = entry["measures"], entry["controls"]
    columns: dict[str, Callable[[str], str]] = {
        "chance": lambda name: f"{found[name]['chance']:.3f}",
        "transferred [95%]": lambda name: _interval(found[name]),
    }
    others = _others(compared)
    columns |= others or {f"{MEAN} [95%]": lambda name: _salient(found[name])}
    return _table(
        found, columns,
        f"Telling two objects apart: {name}, {entry['questions']:,} questions",
        "Each object of a picture is asked about in turn with the stored weights of one result of "
        "its kind; a map that ignores the question scores one half. "
        f"{_free(found)}",
    )  # fmt: skip


def _salient(one: Mapping[str, Any]) -> str:
    """What the mean activation scores in the same measure."""
    return _interval(one["mean_activation"]) if "mean_activation" in one else "–"


def _free(names: Iterable[str]) -> str:
    """Which measures of a table no change of contrast moves."""
    titles = [MEASURES[name].title for name in names if MEASURES[name].free]
    return f"No change of contrast moves: {', '.join(titles)}." if titles else ""


def _beside(summary: Mapping[str, Any]) -> Table | None:
    compared = summary["controls"]
    if not compared:
        return None
    others = _others(compared)
    columns = {
        "better": _better,
        "transferred [95%]": lambda name: _interval(compared[name]["ways"][METHOD]),
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
    ways = (METHOD, *(name.removesuffix(_INTERVAL) for name in others))
    shares = (f"{empty[way]:.3f}" if way in empty else "–" for way in ways)
    return replace(table, rows=[*table.rows, ["empty maps", "–", *shares]])


def _others(compared: Mapping[str, Any]) -> dict[str, Callable[[str], str]]:
    """A column for each other way of drawing."""
    ways = dict.fromkeys(way for one in compared.values() for way in one["differences"])
    return {
        f"{way}{'' if way in CONTROLS else _INTERVAL}": partial(_against, compared, way)
        for way in ways
    }


def _meanings(names: Iterable[str]) -> str:
    """What the measures of pixels that are taken out or put in say, in a sentence each."""
    of_pixels = [MEASURES[name] for name in names if MEASURES[name].group == "faithfulness"]
    return " ".join(
        f"{one.title[0].upper()}{one.title[1:]}: {one.says}." for one in of_pixels if one.says
    )


def _against(compared: Mapping[str, Any], way: str, name: str) -> str:
    entry = compared[name]
    if way not in entry["ways"]:
        return "–"
    star = "" if entry["differences"][way]["beats"] else "*"
    one = entry["ways"][way]
    return f"{_number(one['mean']) if way in CONTROLS else _interval(one)}{star}"


def _faithfulness(summary: Mapping[str, Any]) -> Table | None:
    found = summary["faithfulness"]
    if not found or summary["controls"]:
        return None
    return _table(
        found,
        {"better": _better, "transferred [95%]": lambda name: _interval(found[name])},
        f"Faithfulness, {_images(summary['sample'])}",
        f"Without controls: a figure by itself says little. {_meanings(found)}",
    )


def _sanity(found: Sequence[Mapping[str, Any]]) -> Table | None:
    if not found:
        return None
    rows = [
        [f"{one['modules']} of {one['of']}", _interval(one), f"{one['empty']:.0%}"] for one in found
    ]
    return Table(
        ["shuffled from the output down", "rank correlation of the maps [95%]", "empty maps"], rows,
        "Sanity: the network's parameters shuffled, module after module",
        "A map that hardly changes where the network no longer works does not show what the "
        "network does. An empty map says that nothing speaks for the results.",
    )  # fmt: skip


def _fidelity(found: Mapping[str, Any]) -> Table | None:
    if not found:
        return None
    counts = sorted({one["n_neighbors"] for line in found.values() for one in line})
    rows = []
    for kind, line in found.items():
        cells = {one["n_neighbors"]: _interval(one) for one in line}
        rows.append([kind, f"{line[0]['n']:,}", *(cells.get(count, "–") for count in counts)])
    return Table(
        ["results", "images", *(f"{n} neighbour{'s' * (n > 1)} [95%]" for n in counts)], rows,
        "Transfer fidelity: correlation of the query's own map with the transferred one",
        "The own map is computed on the query itself, as a fallback does; both are taken before "
        "the ReLU, at the positions of the layer.",
    )  # fmt: skip
