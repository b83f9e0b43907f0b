"""Each section of the paper's tables: what is asked, measured, drawn, said, and held to a bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import carrying, weights
from .bench import Bench, Row
from .report import (
    Bar,
    Interval,
    each,
    forest,
    gain,
    mean_of,
    named,
    sweep,
    table,
)

Tables = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Section:
    """One question.

    Args:
        title: of the section.
        measure: a bench's rows.
        table: a bench's rows as Markdown.
        said: what all benches' rows say.
        draw: writes the figure.
        bars: all benches' rows beside their bars.
    """

    title: str
    measure: Callable[[Bench], list]
    table: Callable[[list], str]
    said: Callable[[Mapping[str, list]], str]
    draw: Callable[[Mapping[str, list], Path], None]
    bars: Callable[[Mapping[str, list]], list[Bar]] = lambda _: []


def _score(what: str) -> Callable[[Row], str]:
    return lambda row: f"{mean_of(getattr(row, what)).mean:.3f}"


def _gain(what: str) -> Callable[[Row], str]:
    return lambda row: f"{gain(row, what).mean:+.3f}"


def _wins(what: str) -> Callable[[Row], str]:
    return lambda row: f"{gain(row, what).win_rate:.0%}"


def _settings(tables: Tables) -> dict[str, dict[str, dict[str, Interval]]]:
    """AUC of every row on single and on pasted pictures, for a forest."""
    return {
        f"{what}: pixel AUC": {
            data: {", ".join(filter(None, r.cells)): mean_of(getattr(r, what)) for r in rows}
            for data, rows in tables.items()
        }
        for what in ("single", "pasted")
    }


def _averaging_said(tables: Tables) -> str:
    low, top, around = (
        named(tables, name, "50")
        for name in ("low-rank 128", "top 50 signed", "low-rank 128, around")
    )
    ten, every = (named(tables, "low-rank 128", count) for count in ("10", "all"))

    def gained(what: str) -> str:
        return "; ".join(
            f"{name} {each(rows, _gain(what))} (more in {each(rows, _wins(what))})"
            for name, rows in (("low-rank", low), ("around the norm", around), ("top 50", top))
        )

    mean = named(tables, "mean activation", "")
    return (
        f"Fifty triplets instead of one change the AUC of pasted pairs by: {gained('pasted')}; "
        f"that of single objects by: {gained('single')}; the energy by: {gained('energy')}. Ten "
        f"already give low-rank weights a pasted AUC of {each(ten, _score('pasted'))}, all of them "
        f"{each(every, _score('pasted'))}, and nothing is lost by taking all, which need no draw. "
        f"On single objects the mean activation has {each(mean, _score('single'))}, the mean over "
        f"all triplets {each(every, _score('single'))}. Low-rank and dense are the same to three "
        "digits."
    )


def _averaging_draw(tables: Tables, path: Path) -> None:
    ticks = {**{count: str(count) for count in weights.COUNTS}, 220: "all"}
    panels = {}
    for what in ("single", "pasted"):
        for data, rows in tables.items():
            panels[f"{data}: {what}, pixel AUC"] = {
                name: [
                    (220 if r.cells[1] == "all" else int(r.cells[1]), mean_of(getattr(r, what)))
                    for r in rows
                    if r.cells[0] == name
                ]
                for name in ("low-rank 128", "top 50 signed", "low-rank 128, around")
            }
    sweep(path, panels, "triplets an image, S", ticks, columns=len(tables))


def _averaging_bars(tables: Tables) -> list[Bar]:
    bars = []
    for what in ("single", "pasted"):
        for name in weights.ENCODINGS:
            rows = named(tables, name, "50")
            gains = {data: gain(row, what) for data, row in rows.items()}
            bars.append(
                Bar(
                    f"50 triplets beat one: the interval of the {what} AUC gained is above 0",
                    name,
                    {d: f"{Interval(*g[:3])}, wins {g.win_rate:.0%}" for d, g in gains.items()},
                    {data: -found.low for data, found in gains.items()},
                )
            )
    return bars


def _encodings_said(tables: Tables) -> str:
    kinds = {
        kind: {
            data: next(
                (r for r in rows if r.cells == (kind, "50")),
                [r for r in rows if r.cells[0] == kind][-1],
            )
            for data, rows in tables.items()
        }
        for kind in ("top-M, signed", "top-M, magnitude")
    }
    dense = {data: rows[0] for data, rows in tables.items()}
    few = {data: rows[1] for data, rows in tables.items()}
    signed, size = kinds["top-M, signed"], kinds["top-M, magnitude"]
    return (
        f"Against low-rank weights of as many bytes, the paper's 50 largest channels change "
        f"the pasted AUC by {each(signed, _gain('pasted'))} and the single AUC by "
        f"{each(signed, _gain('single'))}; the 50 of largest magnitude by "
        f"{each(size, _gain('pasted'))} and {each(size, _gain('single'))}. By sign, keeping "
        "more channels does not help in pairs until the negative ones are kept too: only they can "
        "speak against the other object. And few "
        f"components are enough: {few[next(iter(few))].cells[1]} reach a pasted AUC of "
        f"{each(few, _score('pasted'))} where dense weights have {each(dense, _score('pasted'))}; "
        "these are weights of a dozen classes, though, which span few directions. A low-rank basis "
        "is kept once an index (K numbers a component), which the bytes an image leave out."
    )


def _encodings_draw(tables: Tables, path: Path) -> None:
    panels = {}
    kinds = {
        "low-rank": "low-rank",
        "top-M by magnitude": "top-M, magnitude",
        "top-M by sign": "top-M, signed",
        "dense": "dense",
    }
    for what in ("single", "pasted"):
        for data, rows in tables.items():
            panels[f"{data}: {what}, pixel AUC"] = {
                name: [
                    (r.bytes or 0, mean_of(getattr(r, what)))
                    for r in rows
                    if r.cells[0].startswith(kind)
                ]
                for name, kind in kinds.items()
            }
    sizes = (100, 200, 500, 1000, 2000, 5000)
    sweep(path, panels, "bytes an image", {n: str(n) for n in sizes}, columns=len(tables))


def _targets_said(tables: Tables) -> str:
    def pick(name: str, norm: str = "through") -> dict[str, Row]:
        return named(tables, name, norm)

    hinge, centred = pick("margin, 50 triplets, hinge 0.2"), pick("centred")
    near, far = pick("nearness of positives alone"), pick("distance of negatives alone")
    margin, own = pick("margin, all triplets"), pick("distinctive")
    mean = named(tables, "mean activation", "")
    return (
        f"Through the norm, the margin's pasted AUC is {each(margin, _score('pasted'))}, that of "
        f"the nearness of positives alone {each(near, _score('pasted'))}, of the distance of "
        f"negatives alone {each(far, _score('pasted'))}: the two add up to the margin exactly. "
        "Nearness alone marks what the picture *lacks* of its class's mean, since its own "
        "embedding drops out (through the norm) or is taken away (around it); the distance of "
        "negatives is nearly the centred target. The distinctive target, the default, changes the "
        f"margin's pasted AUC by {each(own, _gain('pasted'))} and its single AUC by "
        f"{each(own, _gain('single'))}, to {each(own, _score('single'))} beside the mean "
        f"activation's {each(mean, _score('single'))}. The centred target changes the pasted AUC "
        f"by {each(centred, _gain('pasted'))}, around the norm by "
        f"{each(pick('centred', 'around'), _gain('pasted'))}. The hinge leaves "
        f"{each(hinge, _counted)} of 50 triplets, and changes the pasted AUC by "
        f"{each(hinge, _gain('pasted'))}. With the loss's own sign, what is drawn is the evidence "
        f"against: a pasted AUC of {each(pick('the loss with its own sign'), _score('pasted'))}."
    )


def _counted(row: Row) -> str:
    assert row.counts is not None
    return f"{row.counts.mean():.1f} (none for {int((row.counts == 0).sum())} pictures)"


def _methods_said(tables: Tables) -> str:
    plain, plus = (named(tables, name, "50", "through") for name in ("Grad-CAM", "Grad-CAM++"))
    mean = named(tables, "mean activation", "", "")
    return (
        f"Grad-CAM++ of 50 triplets lies near the mean activation, which explains nothing: single "
        f"AUC {each(plus, _score('single'))} against {each(mean, _score('single'))}, pasted AUC "
        f"{each(plus, _score('pasted'))} against {each(mean, _score('pasted'))}. Of the same "
        f"triplets Grad-CAM's pasted AUC is {each(plain, _score('pasted'))}; Grad-CAM++ differs "
        f"from it by {each(plus, _gain('pasted'))}. Its weights cannot be negative, and averaging "
        "makes those of all pictures alike."
    )


def _sampling_said(tables: Tables) -> str:
    semi, hard = (named(tables, kind, "50") for kind in ("semihard", "hard"))
    random, every = named(tables, "random", "50"), named(tables, "all", "all")
    return (
        f"Semihard negatives change the pasted AUC by {each(semi, _gain('pasted'))}, hard ones by "
        f"{each(hard, _gain('pasted'))} from random's {each(random, _score('pasted'))}; the single "
        f"AUC changes by {each(semi, _gain('single'))} and {each(hard, _gain('single'))}. "
        "Hard negatives are of the few classes most alike, so the map says what tells a picture "
        "from those, and not from whatever stands beside it. All triplets, which cost no "
        f"draw, differ from 50 random ones by {each(every, _gain('pasted'))} of pasted and "
        f"{each(every, _gain('single'))} of single AUC."
    )


SECTIONS = {
    "averaging": Section(
        "One triplet, or the mean of several",
        weights.averaging,
        lambda rows: table(("encoding", "triplets"), rows),
        _averaging_said,
        _averaging_draw,
        _averaging_bars,
    ),
    "top-m": Section(
        "Which channels, at how many bytes",
        weights.encodings,
        lambda rows: table(("encoding", "M or R"), rows, sizes=True),
        _encodings_said,
        _encodings_draw,
    ),
    "target": Section(
        "Which target",
        weights.targets,
        lambda rows: table(("target", "norm"), rows),
        _targets_said,
        lambda tables, path: forest(path, _settings(tables)),
    ),
    "method": Section(
        "Grad-CAM or Grad-CAM++",
        weights.methods,
        lambda rows: table(("method", "triplets", "norm"), rows),
        _methods_said,
        lambda tables, path: forest(path, _settings(tables)),
    ),
    "sampling": Section(
        "Which triplets",
        weights.sampling,
        lambda rows: table(("negatives", "triplets"), rows),
        _sampling_said,
        lambda tables, path: forest(path, _settings(tables)),
    ),
    "transfer": Section(
        "Transfer",
        carrying.measure,
        carrying.table,
        carrying.said,
        carrying.draw,
        carrying.bars,
    ),
}
