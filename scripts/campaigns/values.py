"""Hostile values in the place of every key of a manifest, with checksums that fit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcam.index.manifest import digest, sealed

Place = tuple[str | int, ...]
ABSENT = object()
"""Stands for a key that is left out."""


@dataclass(frozen=True)
class Renamed:
    """Stands for the value that was there under another key; in a list, for one more of it."""

    key: str


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


VALUES: dict[str, Any] = {
    "absent": ABSENT, "null": None, "true": True, "false": False, "0": 0, "-1": -1, "1": 1, "3": 3,
    "1.5": 1.5, "2^31-1": 2**31 - 1, "2^31": 2**31, "2^48": 2**48, "2^63": 2**63, "2^64": 2**64,
    "1e308": 1e308, "-1e308": -1e308, "4000 digits": 10**4000, "empty text": "", "a text": "x",
    "a number as text": "3", "500 characters": "x" * 500, "5,000 characters": "x" * 5000,
    "1,000,000 characters": "x" * 1_000_000, "a climbing path": "../../../../etc/passwd",
    "a device": "/dev/zero", "NUL": "a\0b", "an escape": "\x1b]0;x\x07\x1b[2J", "lines": "a\nb\r\n",
    "right to left": "\u202e\u2066abc", "half a character": "\ud800", "a list": [], "lists": [[]],
    "an object": {}, "an object in an object": {"": {}}, "large numbers": [2**63, 2**63],
    "15 deep": _nested(15), "400 deep": _nested(400), "401 deep": _nested(401),
    "named ''": Renamed(""), "named ../x": Renamed("../x"), "named long": Renamed("x" * 5000),
}  # fmt: skip
_FOUND = ("near", "distances", "ids ", "labels ", "map", "weights ", "trust", "match")
FREE = {
    ("trust_calibration",): ("trust",),
    ("match_calibration",): ("match",),
    ("faiss", "search"): _FOUND,
}
"""Keys that may rightly change an answer: a calibration's numbers, how far a search looks."""


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Every key of a manifest, and the first items of every list."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, inner in items:
        if (*before, key) != ("manifest_sha256",):
            yield (*before, key)
            yield from places(inner, (*before, key))


def changed(manifest: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """A manifest with another value in one place, sealed again."""
    other = json.loads(json.dumps(manifest))
    holder: Any = other
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(value, Renamed) and isinstance(holder, list):
        holder.append(holder[place[-1]])
    elif isinstance(value, Renamed):
        holder[value.key] = holder.pop(place[-1])
    elif value is ABSENT:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    if place[0] == "recipe" and "recipe" in other:
        other["recipe_sha256"] = digest(other["recipe"])
    return sealed(other)


def write(path: Path, manifest: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(json.dumps(manifest))


def may_differ(place: Place) -> tuple[str, ...]:
    """Beginnings of the answers that a key may rightly change."""
    return next((free for key, free in FREE.items() if place[: len(key)] == key), ())
