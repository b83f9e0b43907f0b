"""What a report says: what was asked of which index, how it went, and of each query's map."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING, Final

from ..recipe.registry import METHODS
from ..render import Block, Notice, PageLink, Table
from .folder import About

if TYPE_CHECKING:
    from ..explain.explanation import Explanation
    from ..index import Manifest
    from ..pairs import Comparison, Receipt

_WRONG = 50
"""Queries whose result has another label that are listed before all, at most."""
_UNFOLDED: Final = 12
"""Rows of a table that is seen at once; a longer one is opened by whoever wants it."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What the head of the page knows of a query: little, for there may be very many."""

    position: int
    name: str
    error: str | None = None
    nearest: str = ""
    label: str | None = None
    distance: float = 0.0
    trust: float | None = None
    trusted: bool | None = None
    direct: bool = False
    empty: bool = False
    changed: bool = False
    match: float | None = None
    asked: str | None = None  # the query's own label
    other: bool = False

    @property
    def remark(self) -> str:
        """What there is to say of the map."""
        if self.empty:
            return "empty"
        if self.direct:
            return "computed on the query"
        return "not trusted" if self.trusted is False else ""


def facts(lines: Iterable[str], kin: Callable[[str, str], bool] = eq) -> list[Fact]:
    """Return what is known of each query, from its line of JSON; `kin` compares two labels."""
    known = []
    for position, record in enumerate(map(json.loads, lines)):
        more = {"error": record["error"]} if "error" in record else {}
        for nearest in record.get("neighbors", ())[:1]:
            asked, label = record.get("label"), nearest["label"]
            more = {name: record[name] for name in ("trust", "trusted", "direct", "empty")}
            more |= {name: nearest[name] for name in ("label", "distance")}
            more |= {"nearest": nearest["id"], "match": record.get("match"), "asked": asked}
            more["other"] = None not in (asked, label) and not kin(str(asked), label)
            more["changed"] = any(one.get("file") == "changed" for one in record["neighbors"])
        known.append(Fact(position, record["query"], **more))
    return known


def intro(place: str, manifest: Manifest, options: About, known: Sequence[Fact]) -> str:
    """Say what was asked of which index, and how to read the maps."""
    layers, grid = manifest.layers, manifest.layers[0].grid
    name = manifest.network.name if manifest.network is not None else None
    names = ", ".join(f"{one.name} ({one.channels:,} channels)" for one in layers)
    size = "" if grid is None else f" on a grid of {grid[0]} x {grid[1]}"
    asked = (
        f"{_counted(len(known), 'query', 'queries')} against the index {place}: "
        f"{_counted(manifest.counts.live, 'image', 'images')}, generation "
        f"{manifest.generation}, embedded by {name or 'a network without a name'}"
        f", layer {names}{size}."
    )
    entry = METHODS.get(manifest.method)
    method = manifest.method if entry is None else entry.title
    read = (
        f"A map shows what in a query speaks for its results: {method} weights "
        f"{_source_of_weights(options)}; a result's own map shows what tells it from other images. "
        "Distances are squared Euclidean: smaller is nearer."
    )
    if any(one.trust is not None for one in known):
        read += (
            " Trust is the correlation to be expected with a map computed on the query itself, 0 "
            "to 1; a map is not to be trusted where more than one in ten such maps are expected "
            f"below {options['trusted_from']:g}."
        )
    if options.get("receipts"):
        read += (
            "\n\nBelow a query is its receipt with the first result: the places of both that "
            "match, cut out side by side, each with its share of what the two have in common "
            "beyond the average image; then what adds up to the similarity."
        )
    return f"{asked}\n\n{read}"


def _source_of_weights(options: About) -> str:
    if options["result"] is not None:
        rival = "" if options.get("above") is None else f" less those of {options['above']}"
        return f"of the one image {options['result']}{rival}"
    if options["neighbors"] is not None:
        return f"transferred from {', '.join(options['neighbors'])}"
    count = options["n_neighbors"]
    near = "nearest image" if count == 1 else f"{count} nearest images"
    by = ", weighted by distance" if options["transfer"] == "distance" and count > 1 else ""
    return f"transferred from the {near}{by}"


def blocks(known: Sequence[Fact]) -> list[Block]:
    """Return what to look out for, what could not be read, and every query with its link."""
    explained = [one for one in known if one.error is None]
    failed = [[one.name, one.error] for one in known if one.error is not None]
    counts: dict[str, Sequence[object]] = {
        "could not be explained": failed,
        "with a map that is not to be trusted": [o for o in explained if o.trusted is False],
        "with an empty map": [one for one in explained if one.empty],
        "whose weights were computed on the query itself": [o for o in explained if o.direct],
        "with a result whose picture has changed since the build: its map is of the old one": [
            one for one in explained if one.changed
        ],
    }
    warned = [f"{len(those):,} {what}" for what, those in counts.items() if those]
    shown: list[Block] = []
    if warned:
        shown.append(Notice(f"Of {_counted(len(known), 'query', 'queries')}", warned))
    if failed:
        folded = len(failed) > _UNFOLDED
        shown.append(Table(["query", "why not"], failed, "Could not be explained", folded=folded))
    if len(explained) < 2:
        return shown
    # What is most in doubt first: another label, then match and trust, unknown ones before all.
    ordered = sorted(
        explained,
        key=lambda one: (not one.other, *(-1 if n is None else n for n in (one.match, one.trust))),
    )
    wrong = [one for one in ordered if one.other]
    title = "All queries"
    if wrong:
        first = f"First result of another label: {len(wrong):,} of {len(explained):,} queries"
        if len(wrong) > _WRONG:
            first += f", the {_WRONG} least likely matches"
        shown.append(_overview(wrong[:_WRONG], first))
        title += ", those first"
    elif any(one.match is not None for one in explained):
        title += ", the least likely matches first"
    elif any(one.trust is not None for one in explained):
        title += ", the least trusted first"
    shown.append(_overview(ordered, title, folded=bool(wrong) or len(explained) > _UNFOLDED))
    return shown


def _overview(shown: Sequence[Fact], title: str, *, folded: bool = False) -> Table:
    columns: list[tuple[str, bool, Callable[[Fact], object]]] = [
        ("query", True, lambda one: PageLink(one.name, anchor(one.position))),
        ("its label", any(one.asked is not None for one in shown), lambda one: one.asked or ""),
        ("nearest image", True, lambda one: one.nearest),
        ("label", any(one.label is not None for one in shown), lambda one: one.label or ""),
        ("distance", True, lambda one: f"{one.distance:.3f}"),
        ("match", any(one.match is not None for one in shown), lambda one: _share(one.match)),
        ("trust", any(one.trust is not None for one in shown), lambda one: _share(one.trust)),
        ("map", any(one.remark for one in shown), lambda one: one.remark),
    ]
    kept = [(name, cell) for name, wanted, cell in columns if wanted]
    rows = [[cell(one) for _, cell in kept] for one in shown]
    return Table([name for name, _ in kept], rows, title, folded=folded)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _counted(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def anchor(position: int) -> str:
    """Return what a link to a query's row names."""
    return f"q{position + 1}"


def in_sentences(why: Receipt | Comparison) -> str:
    """Return a receipt for those who do not see it."""
    amounts = [f"{words} {number:+.3f}" for words, number in (*why.amounts(), why.total)]
    return ". ".join([*why.in_words(), "What adds up: " + ", ".join(amounts)])


def note_of(explanation: Explanation) -> str:
    """Say what must be known before the map of a query is looked at."""
    notes = []
    if explanation.doubtful:
        notes.append(f"Its first result is doubtful: match {explanation.match:.2f}.")
    if explanation.empty:
        notes.append(f"Its map is empty: {explanation.why_empty}.")
    elif explanation.trusted is False:
        notes.append(
            "Its map is not to be trusted: one in ten such maps correlates below "
            f"{explanation.trust_low:.2f} with a map computed on the query itself."
        )
    return " ".join(notes)
