"""Random damage to the files of an index, each kind by a function that returns what it did."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcam.index.manifest import sealed

from .values import VALUES, Place, changed, may_differ, places, write

MANIFEST = "manifest.json"


@dataclass
class Victim:
    """A copy of an index that is to be damaged."""

    path: Path
    others: list[Path]
    rng: random.Random
    outside: Path

    def file(self) -> Path:
        """One of the files."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != ".lock")
        return self.rng.choice(files)

    def manifest(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        return found


@dataclass(frozen=True)
class Done:
    """What was done: in words, and answers that it may rightly change."""

    what: str
    may_differ: tuple[str, ...] = ()


def flip(victim: Victim) -> Done:
    file, data = _data(victim)
    for _ in range(victim.rng.choice((1, 1, 1, 8))):
        if data:
            data[victim.rng.randrange(len(data))] ^= 1 << victim.rng.randrange(8)
    return _put(file, data, "bits flipped")


def truncate(victim: Victim) -> Done:
    file, data = _data(victim)
    return _put(file, data[: victim.rng.randrange(len(data) + 1)], "cut short")


def extend(victim: Victim) -> Done:
    file, data = _data(victim)
    return _put(file, data + victim.rng.randbytes(victim.rng.choice((1, 7, 64, 5000))), "longer")


def blank(victim: Victim) -> Done:
    file, data = _data(victim)
    start = victim.rng.randrange(len(data) + 1)
    stop = min(len(data), start + victim.rng.choice((1, 8, 64, 4096)))
    data[start:stop] = bytes(stop - start)
    return _put(file, data, "a block of zeros")


def noise(victim: Victim) -> Done:
    file, data = _data(victim)
    return _put(file, bytearray(victim.rng.randbytes(len(data))), "noise")


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


def replaced(victim: Victim) -> Done:
    file, how = victim.file(), victim.rng.choice(("nothing", "a pipe", "a folder", "a link", "out"))
    if how == "out":
        file.rename(victim.outside / "moved")
        file.symlink_to(victim.outside / "moved")
    else:
        file.unlink()
    if how == "a pipe":
        os.mkfifo(file)
    elif how == "a folder":
        file.mkdir()
    elif how == "a link":
        file.symlink_to(victim.rng.choice(("/etc/passwd", "/dev/zero", file.name, "nowhere")))
    return Done(f"{file.name} replaced by {how}")


def folder_replaced(victim: Victim) -> Done:
    folder = victim.rng.choice(sorted(p for p in victim.path.rglob("*") if p.is_dir()))
    how = victim.rng.choice(("nothing", "a file", "a pipe", "a link"))
    folder.rename(victim.outside / "moved")
    if how == "a file":
        folder.write_bytes(b"x")
    elif how == "a pipe":
        os.mkfifo(folder)
    elif how == "a link":
        folder.symlink_to(victim.outside / "moved")
    return Done(f"{folder.name} replaced by {how}")


def edited(victim: Victim) -> Done:
    manifest, place, value = _edit(victim, victim.manifest())
    write(victim.path, {**manifest, "manifest_sha256": victim.manifest()["manifest_sha256"]})
    return Done(f"{place} = {value}, not sealed", may_differ(place))


def forged(victim: Victim) -> Done:
    manifest, place, value = _edit(victim, victim.manifest())
    write(victim.path, manifest)
    return Done(f"{place} = {value}", may_differ(place))


def array_forged(victim: Victim) -> Done:
    """Values that the format forbids, with a checksum that fits."""
    manifest = victim.manifest()
    known = [(path, line, _forbidden(name)) for path, name, line in _lines(manifest)]
    path, line, forbid = victim.rng.choice([one for one in known if one[1]["bytes"] and one[2]])
    array = np.fromfile(victim.path / path, line["dtype"])
    assert forbid is not None
    what = forbid(array, victim.rng)
    _put_array(victim, manifest, path, line, array)
    return Done(f"{path}: {what}, sealed")


def array_resized(victim: Victim) -> Done:
    """More or fewer rows, or other axes, with a line in the manifest that fits."""
    manifest = victim.manifest()
    path, _, line = victim.rng.choice(_lines(manifest))
    array = np.fromfile(victim.path / path, line["dtype"])
    n, before = line["shape"][0], list(line["shape"])
    shapes = [[0, *before[1:]], [max(n - 1, 0), *before[1:]], [n + 1, *before[1:]], [1, *before]]
    line["shape"] = victim.rng.choice(shapes)
    line["bytes"] = int(np.prod(line["shape"])) * array.itemsize
    _put_array(victim, manifest, path, line, np.resize(array, line["shape"]))
    return Done(f"{path}: {before} as {line['shape']}, sealed")


DAMAGE: dict[str, Callable[[Victim], Done]] = {
    "bits flipped": flip,
    "cut short": truncate,
    "made longer": extend,
    "blocks of zeros": blank,
    "noise": noise,
    "files swapped": swap,
    "files of another index": foreign,
    "files replaced by a link, pipe or folder": replaced,
    "folders replaced": folder_replaced,
    "manifest edited": edited,
    "manifest edited and sealed again": forged,
    "arrays edited and sealed again": array_forged,
    "arrays resized and sealed again": array_resized,
}


def _data(victim: Victim) -> tuple[Path, bytearray]:
    file = victim.file()
    return file, bytearray(file.read_bytes())


def _put(file: Path, data: bytes, what: str) -> Done:
    file.write_bytes(data)
    return Done(f"{file.name}: {what}")


def _lines(manifest: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    lines = [
        (f"{holder['directory']}/{name}", name, line)
        for holder in (*manifest["parts"], manifest["fitted"])
        for name, line in holder["files"].items()
    ]
    if manifest["tombstones"] is not None:
        lines.append((manifest["tombstones"]["file"], "tombstones", manifest["tombstones"]))
    return lines


def _put_array(
    victim: Victim, manifest: dict[str, Any], path: str, line: dict[str, Any], array: np.ndarray
) -> None:
    (victim.path / path).write_bytes(array.tobytes())
    line["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    write(victim.path, sealed(manifest))


def _edit(victim: Victim, manifest: dict[str, Any]) -> tuple[dict[str, Any], Place, str]:
    place = victim.rng.choice(list(places(manifest)))
    value = victim.rng.choice(list(VALUES))
    return changed(manifest, place, VALUES[value]), place, value


Forbid = Callable[[np.ndarray, random.Random], str]


def _forbidden(name: str) -> Forbid | None:
    stem = name.removeprefix("layer0.").removeprefix("layer1.").rpartition(".")[0]
    if stem.endswith(".offsets"):
        return _one_of(2**63, 2**64 - 1, 2**32, 10**6)
    if stem == "ids.order" or name == "tombstones":
        return _one_of(2**31, 2**32 - 1, 10**6)
    if stem == "labels.codes":
        return _one_of(-2, 10**6, 2**31 - 1, -(2**31))
    if stem == "channels":
        return _one_of(2**16 - 1, 1000)
    if stem in ("scales", "coarse_scales"):
        return _one_of(-1.0, np.nan, np.inf)
    if name.rpartition(".")[2] in ("f16", "f32"):
        return _one_of(np.nan, np.inf, -np.inf)
    return _not_utf8 if stem in ("ids", "paths", "labels") else None


def _one_of(*values: float) -> Forbid:
    def forbid(array: np.ndarray, rng: random.Random) -> str:
        value, at = rng.choice(values), rng.randrange(array.size)
        array.reshape(-1)[at] = value
        return f"{value} at {at}"

    return forbid


def _not_utf8(array: np.ndarray, rng: random.Random) -> str:
    at = rng.randrange(array.size)
    array[at] = 0xFF
    return f"byte 255 at {at}"
