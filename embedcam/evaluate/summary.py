"""From numbers an image to means with intervals, and flags for what does not beat its baselines."""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from ..metrics import bootstrap_interval
from .groups import RESULTS, Compared
from .measures import MEAN, MEASURES, TRANSFERRED
from .rivals import BASELINES, SHUFFLED_INDEX
from .settings import Record
from .work import Work

LEAST = 3
"""Images from which an interval is shown, and a baseline can be beaten."""
WORSE = "localises worse than the mean activation"
NO_BETTER = "tells apart no better than a shuffled index"
Some = Sequence[Record]


def summarized(
    work: Work, rows: Some, questions: Some, beside: Compared, transfers: Some
) -> Record:
    """Return the whole summary: plain numbers and lists, and the notes with it."""
    others = [*work.rivals, *BASELINES]
    sampled = [row for row in rows if any(f"{method}: empty" in row for method in others)]
    controls = beside_others(sampled, ("localisation", "faithfulness"), others)
    asked: dict[str, list[Record]] = {}
    for row in sorted(questions, key=lambda row: row["second"] < 0):
        kind = "pasted pairs" if row["second"] >= 0 else "boxes of several labels"
        asked.setdefault(kind, []).append(row)
    beside_each = others if work.settings.controls or work.rivals else ()
    objects: dict[str, Record] = {
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
    empties = {method: column(sampled, f"{method}: empty") for method in others}
    empties = {TRANSFERRED: column(sampled, "empty")} | empties
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
            method: float(np.nanmean(some))
            for method, some in empties.items()
            if not np.isnan(some).all()
        },
        "curves": mean_curves(beside.curves),
        "objects": objects,
        "fidelity": fidelity_of(transfers),
        "sanity": [
            {
                "modules": stage,
                "of": beside.modules,
                **_mean(np.array([alike for alike, _ in values]), range(len(values))),
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
    """Return the values of a column, `[n]`; NaN where there is none."""
    return np.array([row.get(name) for row in rows], np.float64)


def _pictures(rows: Some) -> list[Hashable]:
    return [
        (row["first"], row["second"]) if "first" in row else place for place, row in enumerate(rows)
    ]


def _present(values: np.ndarray, of: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that are there, `[n]`, and the number of the picture each is of, `[n]`."""
    there = np.flatnonzero(~np.isnan(values))
    codes: dict[Hashable, int] = {}
    return values[there], np.array([codes.setdefault(of[n], len(codes)) for n in there.tolist()])


def _mean(values: np.ndarray, of: Sequence[Hashable]) -> Record:
    """Return the mean and its 95% interval, pictures drawn with all their values; {} of none."""
    known, codes = _present(values, of)
    if not len(known):
        return {}
    sums, counts = np.bincount(codes, known), np.bincount(codes)

    def mean(draws: np.ndarray, axis: int) -> np.ndarray:
        some = draws.astype(int)
        return np.asarray(sums[some].sum(axis) / counts[some].sum(axis))

    low, high = bootstrap_interval(np.arange(len(sums)), mean)
    return {"mean": float(known.mean()), "low": low, "high": high, "n": len(known)}


def measured(rows: Some, group: str) -> Record:
    """Return each measure of a group over the rows that have it, by chance and mean activation."""
    table: Record = {}
    of = _pictures(rows)
    for name, measure in MEASURES.items():
        values = column(rows, name)
        if measure.group != group or not (mean := _mean(values, of)):
            continue
        table[name] = mean
        if measure.chance:
            chance = column(rows, measure.chance)[~np.isnan(values)]
            mean["chance"] = float(np.nanmean(chance))
        if salient := _mean(column(rows, f"{MEAN}: {name}"), of):
            mean["mean_activation"] = salient
    return table


def beside_others(rows: Some, groups: Sequence[str], others: Sequence[str] = BASELINES) -> Record:
    """Return means of all methods on the same rows, and differences: above 0 `transferred` wins."""
    table: Record = {}
    of = _pictures(rows)
    for name, measure in MEASURES.items():
        if measure.group not in groups:
            continue
        mine = column(rows, name)
        pairs = {other: column(rows, f"{other}: {name}") + 0 * mine for other in others}
        pairs = {other: theirs for other, theirs in pairs.items() if not np.isnan(theirs).all()}
        if pairs:
            alone = np.isnan(list(pairs.values())).all(0)
            means = {other: _mean(theirs, of) for other, theirs in pairs.items()}
            table[name] = {
                "ways": {TRANSFERRED: _mean(np.where(alone, np.nan, mine), of), **means},
                "differences": {
                    other: _difference(measure.better * (mine - theirs), of)
                    for other, theirs in pairs.items()
                },
            }
    return table


def _difference(apart: np.ndarray, of: Sequence[Hashable]) -> Record:
    mean, (known, codes) = _mean(apart, of), _present(apart, of)
    # Of one or two pictures an interval says nothing.
    enough = codes.max() + 1 >= LEAST
    return {
        **{key: mean[key] for key in ("mean", "low", "high")},
        "win_rate": float((known > 0).mean() + (known == 0).mean() / 2),
        "n": mean["n"],
        "beats": bool(mean["low"] > 0 and enough),
        "worse": bool(mean["high"] < 0 and enough),
    }


def checks(rows: Some, questions: Mapping[str, Some]) -> list[Record]:
    """Check every index by measures that no change of contrast moves, where pictures suffice."""
    one = (WORSE, "auc", MEAN, "images with a box or mask", rows)
    two = [(NO_BETTER, "objects_auc", SHUFFLED_INDEX, *entry) for entry in questions.items()]
    checked = []
    for flag, name, other, where, asked in (one, *two):
        pair = np.stack([column(asked, name), column(asked, f"{other}: {name}")])
        of, both = _pictures(asked), ~np.isnan(pair).any(0)
        if len({of[place] for place in np.flatnonzero(both).tolist()}) < LEAST:
            continue
        apart = _difference(pair[0] - pair[1], of)
        mine, theirs = pair[:, both].mean(1)
        says = (
            f"{flag}: {MEASURES[name].title} {mine:.3f} against {theirs:.3f}, difference "
            f"{apart['mean']:.3f} [{apart['low']:.3f}, {apart['high']:.3f}] ({where})"
        )
        raised = apart["worse"] if flag == WORSE else not apart["beats"]
        checked.append({"flag": flag, "raised": raised, "says": says, **apart})
    return checked


def flags(table: Record, what: str) -> list[str]:
    """Return a sentence for each baseline that the method does not beat in every measure."""
    sentences = []
    for baseline in BASELINES:
        titles: dict[str, list[str]] = {"worse in": [], "not told apart by": []}
        for name, entry in table.items():
            found = entry["differences"].get(baseline, {"beats": True})
            if not found["beats"]:
                verdict = "worse in" if found["worse"] else "not told apart by"
                titles[verdict].append(MEASURES[name].title)
        if words := [f"{verdict} {_and(names)}" for verdict, names in titles.items() if names]:
            sentences.append(f"{TRANSFERRED} beside {baseline} ({what}): {'; '.join(words)}")
    return sentences


def beaten(table: Record, what: str) -> list[str]:
    """Return a sentence naming the measures in which the method beats every baseline; or none."""
    names = []
    for name, entry in table.items():
        judged = [one["beats"] for other, one in entry["differences"].items() if other in BASELINES]
        names += [MEASURES[name].title] if judged and all(judged) else []
    return [f"{TRANSFERRED} ({what}): better than every control in {_and(names)}"] if names else []


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def mean_curves(curves: Mapping[str, Sequence[np.ndarray]]) -> Record:
    """Return the mean deletion and insertion curves of each method, from `[2 S+1]` a query."""
    means = {method: np.mean(each, axis=0).tolist() for method, each in curves.items()}
    return {
        method: dict(zip(("deletion", "insertion"), each, strict=True))
        for method, each in means.items()
    }


def fidelity_of(transfers: Some) -> Record:
    """Return the correlation of own and transferred maps by results and number of neighbors."""
    table: Record = {}
    for kind in RESULTS:
        some = [row for row in transfers if row["results"] == kind]
        for count in sorted({row["n_neighbors"] for row in some}):
            found = column([row for row in some if row["n_neighbors"] == count], "correlation")
            mean = _mean(found, range(len(found)))
            table.setdefault(kind, []).append({"n_neighbors": count, **mean})
    return table
