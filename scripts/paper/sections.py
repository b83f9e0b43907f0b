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


def _settings(tables: Tables, separator: str = ", ") -> dict[str, dict[str, dict[str, Interval]]]:
    """Energy and share of every row, for a forest."""
    return {
        what: {
            data: {separator.join(filter(None, r.cells)): mean_of(getattr(r, what)) for r in rows}
            for data, rows in tables.items()
        }
        for what in ("energy", "share")
    }


def _averaging_said(tables: Tables) -> str:
    low, top = (named(tables, name, "50") for name in ("low-rank 128", "top 50 signed"))
    five, every = (named(tables, "low-rank 128", count) for count in ("5", "all"))
    return (
        f"Fifty triplets instead of one change the energy of low-rank weights by "
        f"{each(low, _gain('energy'))} (more in {each(low, _wins('energy'))} of the pictures), of "
        f"the paper's top 50 by {each(top, _gain('energy'))} ({each(top, _wins('energy'))}); the "
        f"share in scenes by {each(low, _gain('share'))} and {each(top, _gain('share'))}. Five "
        f"already give low-rank weights an energy of {each(five, _score('energy'))} and a share of "
        f"{each(five, _score('share'))}, all of them {each(every, _score('energy'))} and "
        f"{each(every, _score('share'))}: most of the gain comes from the first ten, and nothing "
        "is lost by taking all, which need no draw. Low-rank and dense are the same to three "
        "digits."
    )


def _averaging_draw(tables: Tables, path: Path) -> None:
    ticks = {**{count: str(count) for count in weights.COUNTS}, 220: "all"}
    panels = {}
    for what in ("energy", "share"):
        for data, rows in tables.items():
            panels[f"{data}: {what}"] = {
                name: [
                    (220 if r.cells[1] == "all" else int(r.cells[1]), mean_of(getattr(r, what)))
                    for r in rows
                    if r.cells[0] == name
                ]
                for name in ("low-rank 128", "top 50 signed", "low-rank 128, around")
            }
    sweep(path, panels, "triplets an image, S", ticks, columns=len(tables))


def _shown(row: Row) -> str:
    found = gain(row, "energy")
    return f"{Interval(*found[:3])}, wins {found.win_rate:.0%}"


def _averaging_bars(tables: Tables) -> list[Bar]:
    bars = []
    for name in weights.ENCODINGS:
        for count in ("50", "all"):
            rows = named(tables, name, count)
            bars.append(
                Bar(
                    "averaged beats one triplet: the interval of the energy gained is above 0",
                    f"{name}, {count} triplets",
                    {data: _shown(row) for data, row in rows.items()},
                    {data: -gain(row, "energy").low for data, row in rows.items()},
                )
            )
    return bars


def _encodings_said(tables: Tables) -> str:
    kinds = {
        kind: {
            data: next((r for r in rows if r.cells == (kind, "50")), rows[-1])
            for data, rows in tables.items()
        }
        for kind in ("top-M, signed", "top-M, magnitude")
    }
    dense = {data: rows[0] for data, rows in tables.items()}
    few = {data: rows[1] for data, rows in tables.items()}
    signed, size = kinds["top-M, signed"], kinds["top-M, magnitude"]
    return (
        f"Against low-rank weights of as many bytes, the paper's 50 largest channels change "
        f"the share by {each(signed, _gain('share'))} and the energy by "
        f"{each(signed, _gain('energy'))}; the 50 of largest magnitude by "
        f"{each(size, _gain('share'))} and {each(size, _gain('energy'))}. By sign, keeping "
        "more channels does not help until the negative ones are kept too: only they can take "
        "energy from the other object. And few "
        f"components are enough: {few[next(iter(few))].cells[1]} of them reach a share of "
        f"{each(few, _score('share'))} where dense weights have {each(dense, _score('share'))}; "
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
    for what in ("energy", "share"):
        for data, rows in tables.items():
            panels[f"{data}: {what}"] = {
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
    margin = pick("margin, all triplets")
    return (
        f"Through the norm, the margin's share is {each(margin, _score('share'))}, that of the "
        f"nearness of positives alone {each(near, _score('share'))}, of the distance of negatives "
        f"alone {each(far, _score('share'))}: the two add up to the margin exactly, and neither "
        "does its work. Nearness alone marks what the picture *lacks* of its class's mean, since "
        "its own embedding drops out (through the norm) or is taken away (around it); the distance "
        "of negatives is nearly the centred target, and around the norm as good as the margin in "
        f"scenes ({each(pick('distance of negatives alone', 'around'), _gain('share'))} of share). "
        "The discriminant target, whitened embeddings and the mean of a label's pictures, adds "
        f"{each(pick('discriminant'), _gain('share'))} of share and "
        f"{each(pick('discriminant'), _gain('energy'))} of energy. "
        f"The centred target falls behind through the norm ({each(centred, _gain('share'))} of "
        f"share), and keeps up around it ({each(pick('centred', 'around'), _gain('share'))}). The "
        f"hinge does not help: it leaves {each(hinge, _counted)} of 50 triplets, and changes the "
        f"share by {each(hinge, _gain('share'))}. With the loss's own sign, what is drawn is the "
        f"evidence against: a share of {each(pick('the loss with its own sign'), _score('share'))}."
    )


def _counted(row: Row) -> str:
    assert row.counts is not None
    return f"{row.counts.mean():.1f} (none for {int((row.counts == 0).sum())} pictures)"


def _methods_said(tables: Tables) -> str:
    plain, plus = (named(tables, name, "50", "through") for name in ("Grad-CAM", "Grad-CAM++"))
    mean = named(tables, "mean activation", "", "")
    return (
        f"Grad-CAM++ of 50 triplets is within a few hundredths of the mean activation, which "
        f"explains nothing: energy {each(plus, _score('energy'))} against "
        f"{each(mean, _score('energy'))}, share {each(plus, _score('share'))} against "
        f"{each(mean, _score('share'))}. Of the same triplets Grad-CAM's share is "
        f"{each(plain, _score('share'))}; Grad-CAM++ differs from it by "
        f"{each(plus, _gain('share'))}. Its weights cannot be negative, and averaging makes those "
        "of all pictures alike. With one triplet Grad-CAM's energy is no better than the mean "
        "activation's: it is the averaging that makes the map."
    )


def _sampling_said(tables: Tables) -> str:
    semi, hard = (named(tables, kind, "50") for kind in ("semihard", "hard"))
    random, every = named(tables, "random", "50"), named(tables, "all", "all")
    return (
        f"In scenes random negatives explain best: semihard ones change the share by "
        f"{each(semi, _gain('share'))}, hard ones by {each(hard, _gain('share'))} from random's "
        f"{each(random, _score('share'))}. On single objects the data sets differ: the "
        f"energy changes by {each(semi, _gain('energy'))} and {each(hard, _gain('energy'))}. "
        "Hard negatives are of the few classes most alike, so the map says what tells a picture "
        "from those, and not from whatever stands beside it. All triplets, which cost no "
        f"draw, differ from 50 random ones by "
        f"{each(every, _gain('share'))} of share and {each(every, _gain('energy'))} of energy."
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
