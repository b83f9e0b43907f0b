"""From numbers an image to means with intervals, and flags for what does not beat its controls."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import bootstrap_interval
from .compared import Compared
from .controls import CONTROLS, MEAN, SHUFFLED_INDEX
from .faithfulness import Curves
from .fidelity import RESULTS
from .settings import MEASURES, METHOD
from .work import Work

Rows = Sequence[Mapping[str, Any]]

LEAST = 3
"""Images from which an interval is shown, and a control can be beaten."""
WORSE = "localises worse than the mean activation"
NO_BETTER = "tells apart no better than a shuffled index"


def summarised(
    work: Work, rows: Rows, questions: Rows, beside: Compared, transfers: Rows
) -> dict[str, Any]:
    """The whole summary: plain numbers and lists, and the notes with it."""
    others = [*work.rivals, *CONTROLS]
    sample = sampled(rows, others)
    controls = beside_controls(sample, ("localisation", "faithfulness"), others)
    asked: dict[str, Rows] = {
        "pasted pairs": [row for row in questions if row["second"] >= 0],
        "boxes of several labels": [row for row in questions if row["second"] < 0],
    }
    asked = {name: some for name, some in asked.items() if some}
    beside_each = others if work.settings.controls or work.rivals else ()
    objects: dict[str, dict[str, Any]] = {
        name: {
            "questions": len(some),
            "measures": measured(some, "objects"),
            "controls": beside_controls(some, ("objects",), beside_each),
        }
        for name, some in asked.items()
    }
    checked = checks(rows, asked)
    held = [(controls, f"{beside.images} images")]
    held += [(entry["controls"], name) for name, entry in objects.items()]
    for text in _left_out(work, rows, beside.images):
        work.note(text)
    return {
        "index": str(work.mapper.index.path),
        "images": {
            "given": len(work.reader.source),
            "asked": work.own.asked,
            "measured": len(rows),
            "indexed": sum(row["indexed"] for row in rows),
            "empty_maps": sum(row["empty"] for row in rows),
            "with_regions": sum("area" in row for row in rows),
            "skipped": work.reader.skipped,
        },
        "indexed_images": len(work.gallery),
        "settings": work.settings.to_dict(),
        "checks": checked,
        "flags": [one["says"] for one in checked if one["raised"]]
        + [text for one, what in held for text in flags(one, what)],
        "beats": [text for one, what in held for text in beaten(one, what)],
        "notes": work.notes,
        "retrieval": measured(rows, "retrieval"),
        "localisation": measured(rows, "localisation"),
        "faithfulness": measured(rows, "faithfulness"),
        "sample": beside.images,
        "masked_passes": beside.passes,
        "controls": controls,
        "empty_in_controls": empties(sample, others),
        "curves": mean_curves(beside.curves),
        "objects": objects,
        "fidelity": fidelity(transfers),
        "sanity": [
            {
                "modules": stage,
                "of": beside.modules,
                **mean_of(np.array([alike for alike, _ in values])),
                "empty": sum(empty for _, empty in values) / len(values),
            }
            for stage, values in sorted(beside.stages.items())
        ],
    }


def _left_out(work: Work, rows: Rows, sample: int) -> Iterator[str]:
    """What the rows lack, a sentence each."""
    given, asked = len(work.reader.source), work.own.asked
    if work.wants("retrieval") and not measured(rows, "retrieval"):
        what = "no image has a label"
        if work.gallery.numbers:
            what = "the index's labels are numbers, not classes"
        elif not work.gallery.labelled:
            what = "the index has no labels"
        yield f"no retrieval quality: {what}"
    if work.wants("localisation"):
        missing = sum("area" not in row for row in rows)
        if not len(work.regions):
            yield "no localisation: neither boxes nor masks were given"
        elif missing:
            yield (
                f"localisation leaves out {missing} of {len(rows)} images: without a box "
                "or mask, or with all of it outside of what the network sees"
            )
    if work.mapper.index.manifest.is_compressed:
        yield (
            "the index holds prototypes and does not know what was merged into them: a query "
            "that was is explained with its own part in them"
        )
    if sample and sample < len(rows):
        yield f"faithfulness and controls: a seeded sample of {sample} of {len(rows)} images"
    if asked < given:
        yield f"a seeded sample of {asked} of {given} images was queried"
    if empty := sum(row["empty"] for row in rows):
        yield f"{empty} of {len(rows)} maps are empty, and score what chance does"


def column(rows: Rows, name: str) -> np.ndarray:
    """The values of a column that are there, `[n]`."""
    return np.array([row[name] for row in rows if row.get(name) is not None], np.float64)


def pictures(rows: Rows) -> list[Any]:
    """Which picture, or pair of pictures, each row asks about; a row that is an image, itself."""
    return [
        (row["first"], row["second"]) if "first" in row else place for place, row in enumerate(rows)
    ]


def interval(values: np.ndarray, of: Sequence[Any]) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `[n]` values: pictures are drawn, not questions.

    of: the picture of each; all values of one are drawn together.
    """
    codes = {one: code for code, one in enumerate(dict.fromkeys(of))}
    places = [codes[one] for one in of]
    sums, counts = np.bincount(places, values), np.bincount(places)

    def mean(drawn: np.ndarray, axis: int) -> np.ndarray:
        some = drawn.astype(int)
        means: np.ndarray = sums[some].sum(axis) / counts[some].sum(axis)
        return means

    return bootstrap_interval(np.arange(len(codes)), mean)


def mean_of(values: np.ndarray, of: Sequence[Any] | None = None) -> dict[str, float]:
    """Mean, its 95% interval as `interval` draws it, and of how many."""
    low, high = interval(values, range(len(values)) if of is None else of)
    return {"mean": float(values.mean()), "low": low, "high": high, "n": len(values)}


def measured(rows: Rows, group: str) -> dict[str, Any]:
    """Each measure of a group over the rows that have it, beside chance and mean activation."""
    found: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        values = column(rows, name) if measure.group == group else np.empty(0)
        if not len(values):
            continue
        there = [row for row in rows if row.get(name) is not None]
        found[name] = mean_of(values, pictures(there))
        if measure.chance:
            found[name]["chance"] = float(column(there, measure.chance).mean())
        there = [row for row in rows if row.get(f"{MEAN}: {name}") is not None]
        if there:
            salient = column(there, f"{MEAN}: {name}")
            found[name]["mean_activation"] = mean_of(salient, pictures(there))
    return found


def beside_controls(
    rows: Rows, groups: Sequence[str], others: Sequence[str] = CONTROLS
) -> dict[str, Any]:
    """The method and other ways of drawing on the same rows, with paired differences.

    A difference is turned so that above 0 the method is better. It beats another where the whole
    95% interval lies above 0.
    """
    found: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        differences = {
            other: _difference(some, name, other)
            for other in others
            if measure.group in groups and (some := _with(rows, name, other))
        }
        if differences:
            held = [row for row in rows if any(_with([row], name, other) for other in others)]
            ways = {METHOD: mean_of(column(held, name), pictures(held))}
            for other in differences:
                some = _with(rows, name, other)
                ways[other] = mean_of(column(some, f"{other}: {name}"), pictures(some))
            found[name] = {"ways": ways, "differences": differences}
    return found


def _with(rows: Rows, name: str, other: str) -> Rows:
    """The rows that have a measure by the method and by another way."""
    return [
        row for row in rows if row.get(name) is not None and row.get(f"{other}: {name}") is not None
    ]


def _difference(rows: Rows, name: str, other: str) -> dict[str, Any]:
    """The paired difference of the method and another way, drawn over pictures."""
    better, of = MEASURES[name].better, pictures(rows)
    apart = better * (column(rows, name) - column(rows, f"{other}: {name}"))
    low, high = interval(apart, of)
    # Of one or two pictures an interval says nothing.
    enough = len(set(of)) >= LEAST
    return {
        "mean": float(apart.mean()),
        "low": low,
        "high": high,
        "win_rate": float((apart > 0).mean() + (apart == 0).mean() / 2),
        "n": len(of),
        "beats": low > 0 and enough,
        "worse": high < 0 and enough,
    }


def checks(rows: Rows, questions: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """What is checked of every index by measures that no change of contrast moves.

    Args:
        rows: of the images.
        questions: about two objects, by where they were asked.

    Returns:
        For each check that three pictures or more allow: `flag`, whether it is `raised`, and the
        paired difference that says so, in which above 0 the method is better.
    """
    one = [(WORSE, "auc", MEAN, "images with a box or mask", rows)]
    two = [(NO_BETTER, "objects_auc", SHUFFLED_INDEX, *entry) for entry in questions.items()]
    made = []
    for flag, name, other, where, asked in (*one, *two):
        some = _with(asked, name, other)
        if len(set(pictures(some))) < LEAST:
            continue
        apart = _difference(some, name, other)
        raised = apart["worse"] if flag == WORSE else not apart["beats"]
        mine, theirs = (column(some, each).mean() for each in (name, f"{other}: {name}"))
        says = (
            f"{flag}: {MEASURES[name].title} {mine:.3f} against {theirs:.3f}, difference "
            f"{apart['mean']:.3f} [{apart['low']:.3f}, {apart['high']:.3f}] ({where})"
        )
        made.append({"flag": flag, "raised": raised, "says": says, **apart})
    return made


def sampled(rows: Rows, others: Sequence[str]) -> Rows:
    """The rows of images that were drawn by other ways, too."""
    return [row for row in rows if any(f"{way}: empty" in row for way in others)]


def empties(rows: Rows, others: Sequence[str]) -> dict[str, float]:
    """The share of each way's maps that are empty, on the rows of `sampled`."""
    columns = {METHOD: "empty", **{way: f"{way}: empty" for way in others}}
    return {
        way: float(some.mean()) for way, name in columns.items() if len(some := column(rows, name))
    }


def flags(compared: Mapping[str, Any], what: str) -> list[str]:
    """A sentence for each control that the method does not beat in every measure."""
    said = []
    for control in CONTROLS:
        told = {
            name: entry["differences"][control]
            for name, entry in compared.items()
            if control in entry["differences"]
        }
        worse = [MEASURES[name].title for name, one in told.items() if one["worse"]]
        equal = [
            MEASURES[name].title
            for name, one in told.items()
            if not one["beats"] and not one["worse"]
        ]
        words = [
            f"{verdict} {_and(titles)}"
            for verdict, titles in (("worse in", worse), ("not told apart by", equal))
            if titles
        ]
        if words:
            said.append(f"{METHOD} beside {control} ({what}): {'; '.join(words)}")
    return said


def beaten(compared: Mapping[str, Any], what: str) -> list[str]:
    """A sentence that names the measures in which the method beats every control; or none."""
    names = [
        MEASURES[name].title
        for name, entry in compared.items()
        if (told := [entry["differences"][way] for way in CONTROLS if way in entry["differences"]])
        and all(one["beats"] for one in told)
    ]
    return [f"{METHOD} ({what}): better than every control in {_and(names)}"] if names else []


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def mean_curves(curves: Mapping[str, Curves]) -> dict[str, Any]:
    """The mean deletion and insertion curves of each way."""
    return {
        way: {
            "deletion": (one.deletion / one.count).tolist(),
            "insertion": (one.insertion / one.count).tolist(),
        }
        for way, one in curves.items()
    }


def fidelity(transfers: Rows) -> dict[str, Any]:
    """Correlation of own and transferred maps by kind of results and number of neighbours."""
    found: dict[str, Any] = {}
    for kind in RESULTS:
        some = [row for row in transfers if row["results"] == kind]
        counts = sorted({row["n_neighbors"] for row in some})
        by_count = [[row for row in some if row["n_neighbors"] == count] for count in counts]
        if some:
            found[kind] = [
                {"n_neighbors": count, **mean_of(column(rows, "correlation"))}
                for count, rows in zip(counts, by_count, strict=True)
            ]
    return found
