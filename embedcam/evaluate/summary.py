"""From numbers an image to means with intervals, and flags for what does not beat its baselines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import bootstrap_interval
from .baselines import BASELINES, SHUFFLED_INDEX
from .groups import RESULTS, Compared
from .measures import MEAN, MEASURES, TRANSFERRED
from .work import Row, Work

LEAST = 3
"""Images from which an interval is shown, and a baseline can be beaten."""
WORSE = "localises worse than the mean activation"
NO_BETTER = "tells apart no better than a shuffled index"
Summary = dict[str, Any]
Some = Sequence[Row]


def summarized(
    work: Work, rows: Some, questions: Some, beside: Compared, transfers: Some
) -> Summary:
    """Return the whole summary: plain numbers and lists, and the notes with it."""
    others = [*work.rivals, *BASELINES]
    sampled = [row for row in rows if any(f"{method}: empty" in row for method in others)]
    controls = beside_others(sampled, ("localisation", "faithfulness"), others)
    by_kind = {
        "pasted pairs": [row for row in questions if row["second"] >= 0],
        "boxes of several labels": [row for row in questions if row["second"] < 0],
    }
    asked = {name: some for name, some in by_kind.items() if some}
    beside_each = others if work.settings.controls or work.rivals else ()
    objects: dict[str, Summary] = {
        name: {
            "questions": len(some),
            "measures": measured(some, "objects"),
            "controls": beside_others(some, ("objects",), beside_each),
        }
        for name, some in asked.items()
    }
    checked = checks(rows, asked)
    tables = [(controls, f"{beside.images} images")]
    tables += [(entry["controls"], name) for name, entry in objects.items()]
    for text in _left_out(work, rows, beside.images):
        work.note(text)
    empties = {TRANSFERRED: column(sampled, "empty")}
    empties |= {method: column(sampled, f"{method}: empty") for method in others}
    return {
        "index": str(work.mapper.index.path),
        "images": {
            "given": len(work.source),
            "asked": work.own_rows.asked,
            "measured": len(rows),
            "indexed": sum(row["indexed"] for row in rows),
            "empty_maps": sum(row["empty"] for row in rows),
            "with_regions": sum("area" in row for row in rows),
            "skipped": work.skipped,
        },
        "indexed_images": len(work.gallery),
        "settings": work.settings.to_dict(),
        "checks": checked,
        "flags": [one["says"] for one in checked if one["raised"]]
        + [text for table, what in tables for text in flags(table, what)],
        "beats": [text for table, what in tables for text in beaten(table, what)],
        "notes": work.notes,
        "retrieval": measured(rows, "retrieval"),
        "localisation": measured(rows, "localisation"),
        "faithfulness": measured(rows, "faithfulness"),
        "sample": beside.images,
        "masked_passes": beside.passes,
        "controls": controls,
        "empty_in_controls": {
            method: float(some.mean()) for method, some in empties.items() if len(some)
        },
        "curves": mean_curves(beside.curves),
        "objects": objects,
        "fidelity": fidelity_of(transfers),
        "sanity": [
            {
                "modules": stage,
                "of": beside.modules,
                **_mean(np.array([alike for alike, _ in values])),
                "empty": sum(empty for _, empty in values) / len(values),
            }
            for stage, values in sorted(beside.stages.items())
        ],
    }


def _left_out(work: Work, rows: Some, sampled: int) -> Iterator[str]:
    total, asked = len(work.source), work.own_rows.asked
    if work.wants("retrieval") and not measured(rows, "retrieval"):
        what = "no image has a label"
        if work.gallery.numbers:
            what = "the index's labels are numbers, not classes"
        elif not work.gallery.labeled:
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
    if sampled and sampled < len(rows):
        yield f"faithfulness and controls: a seeded sample of {sampled} of {len(rows)} images"
    if asked < total:
        yield f"a seeded sample of {asked} of {total} images was queried"
    if empty := sum(row["empty"] for row in rows):
        yield f"{empty} of {len(rows)} maps are empty, and score what chance does"


def column(rows: Some, name: str) -> np.ndarray:
    """Return the values of a column that are there, `[n]`."""
    return np.array([row[name] for row in rows if row.get(name) is not None], np.float64)


def _pictures(rows: Some) -> list[Any]:
    return [
        (row["first"], row["second"]) if "first" in row else place for place, row in enumerate(rows)
    ]


def _interval(values: np.ndarray, of: Sequence[Any]) -> tuple[float, float]:
    """Return the 95% interval of the mean of `[n]`: pictures are drawn with all their values."""
    codes = {picture: code for code, picture in enumerate(dict.fromkeys(of))}
    places = [codes[picture] for picture in of]
    sums, counts = np.bincount(places, values), np.bincount(places)

    def mean(draws: np.ndarray, axis: int) -> np.ndarray:
        some = draws.astype(int)
        means: np.ndarray = sums[some].sum(axis) / counts[some].sum(axis)
        return means

    return bootstrap_interval(np.arange(len(codes)), mean)


def _mean(values: np.ndarray, of: Sequence[Any] | None = None) -> Summary:
    low, high = _interval(values, range(len(values)) if of is None else of)
    return {"mean": float(values.mean()), "low": low, "high": high, "n": len(values)}


def _column_mean(rows: Some, name: str) -> Summary:
    there = [row for row in rows if row.get(name) is not None]
    return _mean(column(there, name), _pictures(there))


def measured(rows: Some, group: str) -> Summary:
    """Return each measure of a group over the rows that have it, by chance and mean activation."""
    table: Summary = {}
    for name, measure in MEASURES.items():
        there = [row for row in rows if row.get(name) is not None]
        if measure.group != group or not there:
            continue
        table[name] = _column_mean(there, name)
        if measure.chance:
            table[name]["chance"] = float(column(there, measure.chance).mean())
        if len(column(rows, f"{MEAN}: {name}")):
            table[name]["mean_activation"] = _column_mean(rows, f"{MEAN}: {name}")
    return table


def beside_others(rows: Some, groups: Sequence[str], others: Sequence[str] = BASELINES) -> Summary:
    """Return means of all methods on the same rows, and differences: above 0 `transferred` wins."""
    table: Summary = {}
    for name, measure in MEASURES.items():
        pairs = {other: _with(rows, name, other) for other in others if measure.group in groups}
        pairs = {other: some for other, some in pairs.items() if some}
        if pairs:
            both = [row for row in rows if any(_with([row], name, other) for other in others)]
            means = {other: _column_mean(some, f"{other}: {name}") for other, some in pairs.items()}
            table[name] = {
                "ways": {TRANSFERRED: _column_mean(both, name), **means},
                "differences": {
                    other: _difference(some, name, other) for other, some in pairs.items()
                },
            }
    return table


def _with(rows: Some, name: str, other: str) -> Some:
    pair = (name, f"{other}: {name}")
    return [row for row in rows if all(row.get(one) is not None for one in pair)]


def _difference(rows: Some, name: str, other: str) -> Summary:
    of = _pictures(rows)
    apart = MEASURES[name].better * (column(rows, name) - column(rows, f"{other}: {name}"))
    mean = _mean(apart, of)
    # Of one or two pictures an interval says nothing.
    enough = len(set(of)) >= LEAST
    return {
        **{key: mean[key] for key in ("mean", "low", "high")},
        "win_rate": float((apart > 0).mean() + (apart == 0).mean() / 2),
        "n": mean["n"],
        "beats": mean["low"] > 0 and enough,
        "worse": mean["high"] < 0 and enough,
    }


def checks(rows: Some, questions: Mapping[str, Some]) -> list[Summary]:
    """Check every index by measures that no change of contrast moves, where pictures suffice."""
    one = (WORSE, "auc", MEAN, "images with a box or mask", rows)
    two = [(NO_BETTER, "objects_auc", SHUFFLED_INDEX, *entry) for entry in questions.items()]
    checked = []
    for flag, name, other, where, asked in (one, *two):
        some = _with(asked, name, other)
        if len(set(_pictures(some))) < LEAST:
            continue
        apart = _difference(some, name, other)
        mine, theirs = (column(some, each).mean() for each in (name, f"{other}: {name}"))
        says = (
            f"{flag}: {MEASURES[name].title} {mine:.3f} against {theirs:.3f}, difference "
            f"{apart['mean']:.3f} [{apart['low']:.3f}, {apart['high']:.3f}] ({where})"
        )
        raised = apart["worse"] if flag == WORSE else not apart["beats"]
        checked.append({"flag": flag, "raised": raised, "says": says, **apart})
    return checked


def flags(table: Summary, what: str) -> list[str]:
    """Return a sentence for each baseline that the method does not beat in every measure."""
    sentences = []
    for baseline in BASELINES:
        titles: dict[str, list[str]] = {"worse in": [], "not told apart by": []}
        for name, entry in table.items():
            difference = entry["differences"].get(baseline)
            if difference is not None and not difference["beats"]:
                verdict = "worse in" if difference["worse"] else "not told apart by"
                titles[verdict].append(MEASURES[name].title)
        words = [f"{verdict} {_and(names)}" for verdict, names in titles.items() if names]
        if words:
            sentences.append(f"{TRANSFERRED} beside {baseline} ({what}): {'; '.join(words)}")
    return sentences


def beaten(table: Summary, what: str) -> list[str]:
    """Return a sentence naming the measures in which the method beats every baseline; or none."""
    beats = {
        name: [one["beats"] for other, one in entry["differences"].items() if other in BASELINES]
        for name, entry in table.items()
    }
    names = [MEASURES[name].title for name, each in beats.items() if each and all(each)]
    return [f"{TRANSFERRED} ({what}): better than every control in {_and(names)}"] if names else []


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def mean_curves(curves: Mapping[str, Sequence[np.ndarray]]) -> Summary:
    """Return the mean deletion and insertion curves of each method, from `[2 S+1]` a query."""
    means = {method: np.mean(each, axis=0).tolist() for method, each in curves.items()}
    return {
        method: {"deletion": deletion, "insertion": insertion}
        for method, (deletion, insertion) in means.items()
    }


def fidelity_of(transfers: Some) -> Summary:
    """Return the correlation of own and transferred maps by results and number of neighbors."""
    table: Summary = {}
    for kind in RESULTS:
        some = [row for row in transfers if row["results"] == kind]
        counts = sorted({row["n_neighbors"] for row in some})
        by_count = {n: [row for row in some if row["n_neighbors"] == n] for n in counts}
        if some:
            table[kind] = [
                {"n_neighbors": count, **_mean(column(rows, "correlation"))}
                for count, rows in by_count.items()
            ]
    return table
