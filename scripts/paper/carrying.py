"""The section on transfer: its tables, what they say, its figure and its bars."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from measuring import figure

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
        lines = [
            [
                one.recipe,
                one.source.removeprefix("scene: "),
                figure(one.kept),
                *([figure(one.direct)] if scene else []),
                "" if one.source == "direct" else str(ratio(one.kept, one.direct)),
                "" if one.source == "direct" else _alike(one.alike),
            ]
            for one in rows
            if one.source.startswith("scene: ") == scene
        ]
        direct = ["share, in the scene itself"] if scene else []
        columns = ["weights", "results" if scene else "from", what, *direct, f"{what} kept"]
        texts.append(markdown([*columns, "map correlation (5th percentile)"], lines))
    return "\n".join(texts)


def _alike(values: np.ndarray) -> str:
    return f"{figure(values)} ({np.quantile(values, 0.05):.2f})"


def said(found: Mapping[str, list[Carried]]) -> str:
    """What all benches say."""

    def kept(recipe: str, source: str) -> str:
        intervals = _kept(_carried(found, recipe, source)).values()
        return " / ".join(f"{one.mean:.3f}" for one in intervals)

    def alike(recipe: str, source: str) -> str:
        rows = _carried(found, recipe, source).values()
        return " / ".join(f"{one.alike.mean():.2f}" for one in rows)

    through, around, _, paper = transfers.RECIPES
    ranges = {
        data: [
            ratio(one.kept, one.direct).mean
            for one in rows
            if one.recipe == through and one.source[0].isdigit()
        ]
        for data, rows in found.items()
    }
    spread = " / ".join(f"{min(kept):.3f} to {max(kept):.3f}" for kept in ranges.values())
    five, other, few = "5 nearest, mean", "a random other class", "nearest of 50 prototypes"
    return (
        f"Through the norm, five neighbours keep {kept(through, five)} of the direct map's energy "
        f"at a map correlation of {alike(through, five)}; weights of a random other class keep "
        f"{kept(through, other)} at {alike(through, other)}. Around the norm it is "
        f"{kept(around, five)} at {alike(around, five)}. In the paper's setting it is "
        f"{kept(paper, five)} at {alike(paper, five)}, but a random other class's weights keep "
        f"{kept(paper, other)} at {alike(paper, other)}: there, maps agree because they say "
        f"little. Through the norm, one to ten neighbours in either mode keep {spread}, and the "
        f"nearest of 50 prototypes {kept(through, few)}. In scenes one given result keeps "
        f"{kept(through, 'scene: 1 given')} of the share of its own target differentiated in the "
        "scene; around the norm the two are the same map. The paper's setting keeps "
        f"{kept(paper, 'scene: 1 given')} of a share that is small to begin with."
    )


def draw(found: Mapping[str, list[Carried]], path: Path) -> None:
    """Energy kept and map correlation from each source."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {}
    for title, show in (
        ("energy kept", lambda one: ratio(one.kept, one.direct)),
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
        for recipe in transfers.RECIPES:
            kept = _kept(_carried(found, recipe, source))
            shown = {data: str(one) for data, one in kept.items()}
            short = {data: least - one.mean for data, one in kept.items()}
            found_bars.append(Bar(promise, recipe, shown, short))
    return found_bars
