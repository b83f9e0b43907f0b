"""The section on transfer: its tables, what they say, its figure and its bars."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from measuring import figure

from embedcam.metrics import paired_difference

from . import transfers
from .bench import Bench
from .report import Bar, Interval, forest, markdown, mean_of, ratio
from .transfers import Carried


def measure(bench: Bench) -> list[Carried]:
    """Pictures, then scenes; scenes' sources say so."""
    scenes = transfers.scenes(bench)
    for one in scenes:
        one.source = f"scene: {one.source}"
    return [*transfers.pictures(bench), *scenes]


def _carried(found: Mapping[str, list[Carried]], recipe: str, source: str) -> dict[str, Carried]:
    return {
        data: next(one for one in rows if (one.recipe, one.source) == (recipe, source))
        for data, rows in found.items()
    }


def _kept(rows: Mapping[str, Carried]) -> dict[str, Interval]:
    return {data: ratio(one.kept, one.direct) for data, one in rows.items()}


def table(rows: list[Carried]) -> str:
    """Pictures, then scenes, as Markdown."""
    texts = []
    for scene, what in ((False, "energy"), (True, "share")):
        lines = []
        for one in rows:
            if one.source.startswith("scene: ") != scene:
                continue
            cells = [one.recipe, one.source.removeprefix("scene: "), figure(one.auc)]
            if one.source == "direct":
                cells += ["", figure(one.kept), "", ""]
            else:
                gained = paired_difference(one.auc, one.direct_auc)
                cells += [
                    f"{gained.mean:+.3f} [{gained.low:+.3f}, {gained.high:+.3f}]",
                    figure(one.kept),
                    str(ratio(one.kept, one.direct)),
                    _alike(one.alike),
                ]
            lines.append(cells)
        columns = ["weights", "results" if scene else "from", "AUC", "AUC - direct", what]
        kept = f"{what} kept"
        texts.append(markdown([*columns, kept, "map correlation (5th percentile)"], lines))
    return "\n".join(texts)


def _alike(values: np.ndarray) -> str:
    """Empty where nothing differs: such targets are the same for all images of a label."""
    least = np.quantile(values, 0.05)
    return "" if least >= 0.995 else f"{figure(values)} ({least:.2f})"


def said(found: Mapping[str, list[Carried]]) -> str:
    """What all benches say."""

    def kept(recipe: str, source: str) -> str:
        intervals = _kept(_carried(found, recipe, source)).values()
        return " / ".join(f"{one.mean:.3f}" for one in intervals)

    def alike(recipe: str, source: str) -> str:
        rows = _carried(found, recipe, source).values()
        return " / ".join(f"{one.alike.mean():.3f}" for one in rows)

    def areas(recipe: str, source: str) -> str:
        rows = _carried(found, recipe, source).values()
        return " / ".join(f"{one.auc.mean():.3f}" for one in rows)

    through, around, default, paper = transfers.RECIPES
    five, other, few = "5 nearest, mean", "a random other class", "nearest of 50 prototypes"
    right, wrong = (f"1 nearest, of {whose} label" for whose in ("its", "another"))
    scene = "scene: 1 given"
    return (
        f"By the default, signed maps drawn with the weights of five neighbours correlate with the "
        f"query's own direct map at {alike(default, five)} (one neighbour of its label "
        f"{alike(default, right)}, one of another {alike(default, wrong)}, a random other class "
        f"{alike(default, other)}), at a single AUC of {areas(default, five)} beside the direct "
        f"map's {areas(default, 'direct')} and the mean activation's "
        f"{areas(default, 'mean activation')}. By the margin through the norm it is "
        f"{alike(through, five)}, around it {alike(around, five)}. In the paper's setting it is "
        f"{alike(paper, five)}, but a random other class's weights have {alike(paper, other)}: "
        "there, maps agree because they say little. The nearest of 50 prototypes has "
        f"{alike(default, few)} by the default. Of the energy, five neighbours keep "
        f"{kept(default, five)} by the default, {kept(through, five)} by the margin, "
        f"{kept(paper, five)} by the paper's setting. In scenes, by the margin, one given result "
        f"has a pasted AUC of {areas(through, scene)}, at {kept(through, scene)} of the share of "
        f"its own target differentiated in the scene; the paper's setting {areas(paper, scene)}, "
        f"at {kept(paper, scene)}. By the default and around the norm the two are the same map, "
        "and nothing is compared."
    )


def draw(found: Mapping[str, list[Carried]], path: Path) -> None:
    """AUC beside the direct map's, and map correlation, from each source."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {}
    for title, show in (
        ("single AUC", lambda one: mean_of(one.auc)),
        ("map correlation", lambda one: mean_of(one.alike)),
    ):
        for recipe in transfers.RECIPES:
            panels[f"{recipe}:\n{title}"] = {
                data: {
                    one.source: show(one)
                    for one in rows
                    if one.recipe == recipe
                    and one.source != "direct"
                    and not one.source.startswith("scene: ")
                }
                for data, rows in found.items()
            }
    forest(path, panels, columns=len(transfers.RECIPES), width=3.2, alike=True)


def bars(found: Mapping[str, list[Carried]]) -> list[Bar]:
    """What is kept beside what should be."""
    found_bars = []
    for promise, source, least in (
        ("transferred from 5 keeps 0.97 of the energy", "5 nearest, mean", 0.97),
        ("scenes: 1 given result keeps 0.95 of the share", "scene: 1 given", 0.95),
        ("scenes: 5 given results keep 0.95 of the share", "scene: 5 given", 0.95),
    ):
        for recipe, choice in transfers.RECIPES.items():
            if source.startswith("scene: ") and choice.head_norm == "around":
                continue
            kept = _kept(_carried(found, recipe, source))
            shown = {data: str(one) for data, one in kept.items()}
            short = {data: least - one.mean for data, one in kept.items()}
            found_bars.append(Bar(promise, recipe, shown, short))
    return found_bars
