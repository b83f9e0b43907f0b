"""Damage to an index: hostile values in its manifest, and random damage to any of its files."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcam.index.manifest import digest, sealed

Manifest = dict[str, Any]
Place = tuple[str | int, ...]
ABSENT = object()
"""Stands for a key that is left out."""


class Renamed(NamedTuple):
    """Stands for the value that was there under another key; in a list, for one more of it."""

    key: str


class Victim(NamedTuple):
    """A copy of an index that is to be damaged."""

    path: Path
    others: list[Path]
    rng: random.Random
    outside: Path

    def file(self) -> Path:
        """One of the files."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != ".lock")
        return self.rng.choice(files)

    def manifest(self) -> Manifest:
        """As JSON has it."""
        found: Manifest = json.loads((self.path / "manifest.json").read_text())
        return found

    def write(self, manifest: Manifest) -> None:
        """Put another manifest in its place, as it is."""
        (self.path / "manifest.json").write_text(json.dumps(manifest))


class Done(NamedTuple):
    """What was done: in words, and answers that it may rightly change."""

    what: str
    may_differ: Sequence[str] = ()


Damage = Callable[[Victim], Done]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


VALUES: dict[str, object] = {
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
    items = list(enumerate(value))[:2] if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else items:
        if (*before, key) != ("manifest_sha256",):
            yield (*before, key)
            yield from places(inner, (*before, key))


def changed(manifest: Manifest, place: Place, value: object) -> Manifest:
    """A manifest with another value in one place, sealed again."""
    other = json.loads(json.dumps(manifest))
    holder, key = other, place[-1]
    for step in place[:-1]:
        holder = holder[step]
    if isinstance(value, Renamed) and isinstance(holder, list):
        holder.append(holder[key])
    elif isinstance(value, Renamed):
        holder[value.key] = holder.pop(key)
    elif value is ABSENT:
        del holder[key]
    else:
        holder[key] = value
    if place[0] == "recipe" and "recipe" in other:
        other["recipe_sha256"] = digest(other["recipe"])
    return sealed(other)


def placed(victim: Victim, place: Place, value: str, *, seal: bool = True) -> Done:
    """Put one of `VALUES` in the place of a key, with checksums that fit if `seal`."""
    before = victim.manifest()
    after = changed(before, place, VALUES[value])
    victim.write(after if seal else {**after, "manifest_sha256": before["manifest_sha256"]})
    may_differ = next((free for key, free in FREE.items() if place[: len(key)] == key), ())
    return Done(f"{place} = {value}{'' if seal else ', not sealed'}", may_differ)


def anywhere(victim: Victim, *, seal: bool) -> Done:
    place = victim.rng.choice(list(places(victim.manifest())))
    return placed(victim, place, victim.rng.choice(list(VALUES)), seal=seal)


Change = Callable[[bytearray, random.Random], bytes | bytearray]


def rewritten(what: str, change: Change) -> Damage:
    """A damage to the bytes of a file."""

    def damage(victim: Victim) -> Done:
        file = victim.file()
        file.write_bytes(change(bytearray(file.read_bytes()), victim.rng))
        return Done(f"{file.name}: {what}")

    return damage


def flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def blank(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 8, 64, 4096)))
    data[start:stop] = bytes(stop - start)
    return data


def swap(victim: Victim) -> Done:
    a, b = victim.file(), victim.file()
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    return Done(f"{a.name} and {b.name} swapped")


def foreign(victim: Victim) -> Done:
    file = victim.file()
    other = victim.rng.choice(victim.others) / file.relative_to(victim.path)
    if other.is_file():
        shutil.copyfile(other, file)
    else:
        file.unlink()
    return Done(f"{file.name} of another index")


def replaced(victim: Victim, *, folder: bool) -> Done:
    """Put something else, or nothing, in the place of a file or a folder."""
    ways = ("nothing", "a file", "a pipe", "a link") if folder else (
        "nothing", "a pipe", "a folder", "a link", "out")  # fmt: skip
    folders = sorted(p for p in victim.path.rglob("*") if p.is_dir())
    path = victim.rng.choice(folders) if folder else victim.file()
    how, moved = victim.rng.choice(ways), victim.outside / "moved"
    path.rename(moved)
    if how == "a file":
        path.write_bytes(b"x")
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how == "out" or (folder and how == "a link"):
        path.symlink_to(moved)
    elif how == "a link":
        path.symlink_to(victim.rng.choice(("/etc/passwd", "/dev/zero", path.name, "nowhere")))
    return Done(f"{path.name} replaced by {how}")


class Line(NamedTuple):
    """An array's file in the index, its name, and the manifest's line of it."""

    path: str
    name: str
    told: dict[str, Any]


def lines(manifest: Manifest) -> list[Line]:
    found = [
        Line(f"{holder['directory']}/{name}", name, told)
        for holder in (*manifest["parts"], manifest["fitted"])
        for name, told in holder["files"].items()
    ]
    if manifest["tombstones"] is not None:
        found.append(Line(manifest["tombstones"]["file"], "tombstones", manifest["tombstones"]))
    return found


def put_array(victim: Victim, manifest: Manifest, line: Line, array: np.ndarray) -> None:
    """Write an array with a checksum that fits."""
    (victim.path / line.path).write_bytes(array.tobytes())
    line.told["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    victim.write(sealed(manifest))


def array_forged(victim: Victim) -> Done:
    """Values that the format forbids, with a checksum that fits."""
    manifest = victim.manifest()
    known = [line for line in lines(manifest) if line.told["bytes"] and forbidden(line.name)]
    line = victim.rng.choice(known)
    array = np.fromfile(victim.path / line.path, line.told["dtype"])
    value, at = victim.rng.choice(forbidden(line.name)), victim.rng.randrange(array.size)
    array[at] = value
    put_array(victim, manifest, line, array)
    return Done(f"{line.path}: {value} at {at}, sealed")


def array_resized(victim: Victim) -> Done:
    """More or fewer rows, or other axes, with a line in the manifest that fits."""
    manifest = victim.manifest()
    line = victim.rng.choice(lines(manifest))
    array = np.fromfile(victim.path / line.path, line.told["dtype"])
    n, *others = before = list(line.told["shape"])
    shapes = [[0, *others], [max(n - 1, 0), *others], [n + 1, *others], [1, *before]]
    shape = victim.rng.choice(shapes)
    line.told.update(shape=shape, bytes=int(np.prod(shape)) * array.itemsize)
    put_array(victim, manifest, line, np.resize(array, shape))
    return Done(f"{line.path}: {before} as {shape}, sealed")


def forbidden(name: str) -> Sequence[float]:
    """Values that the format forbids in an array."""
    stem = name.removeprefix("layer0.").removeprefix("layer1.").rpartition(".")[0]
    if stem.endswith(".offsets"):
        return (2**63, 2**64 - 1, 2**32, 10**6)
    if stem == "ids.order" or name == "tombstones":
        return (2**31, 2**32 - 1, 10**6)
    if stem == "labels.codes":
        return (-2, 10**6, 2**31 - 1, -(2**31))
    if stem == "channels":
        return (2**16 - 1, 1000)
    if stem in ("scales", "coarse_scales"):
        return (-1.0, np.nan, np.inf)
    if name.rpartition(".")[2] in ("f16", "f32"):
        return (np.nan, np.inf, -np.inf)
    return (0xFF,) if stem in ("ids", "paths", "labels") else ()  # 0xFF: no UTF-8


DAMAGE: dict[str, Damage] = {
    "bits flipped": rewritten("bits flipped", flip),
    "cut short": rewritten("cut short", lambda data, rng: data[: rng.randrange(len(data) + 1)]),
    "made longer": rewritten(
        "longer", lambda data, rng: data + rng.randbytes(rng.choice((1, 7, 64, 5000)))
    ),
    "blocks of zeros": rewritten("a block of zeros", blank),
    "noise": rewritten("noise", lambda data, rng: rng.randbytes(len(data))),
    "files swapped": swap,
    "files of another index": foreign,
    "files replaced by a link, pipe or folder": partial(replaced, folder=False),
    "folders replaced": partial(replaced, folder=True),
    "manifest edited": partial(anywhere, seal=False),
    "manifest edited and sealed again": partial(anywhere, seal=True),
    "arrays edited and sealed again": array_forged,
    "arrays resized and sealed again": array_resized,
}
