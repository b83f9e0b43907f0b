"""What images there are: a source lists them in a fixed order, with stable ids, paths and labels.

An id is the image's path below its folder, "/" between the parts, a shard's key, or what a CSV or a
table says. Ids, paths and labels are columns; a job's workers map them from disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal, overload

import numpy as np
from PIL import Image

from .._checks import whole
from .._files import NotPlain, fresh, make_folder, open_regular, read_regular, written
from ..errors import ImageError, InputError, Plain, cut, reason, short
from .places import (
    PLACE,
    Root,
    as_root,
    escaped,
    inside,
    located,
    name_of,
    place_mark,
    place_state,
    read_place,
    root_text,
    stamp_of,
)
from .reading import MAX_PIXELS, FileState, ImageLike, is_url, read_image
from .texts import LabelColumn, Texts, TextsWriter, first_twice, is_same

Labels = Literal["auto", "folders", "subfolders", "none", "numbers"]
_RUN = 1 << 14
"""Images listed at once."""
_ASKED = 16
"""Addresses asked at once."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its id, where it lies (relative to the source's root when below it), its label."""

    id: str
    path: str
    label: str | None = None


@dataclass(slots=True)
class LeftOut:
    """What lies in a folder beside its images, or was not wanted of a list; counted."""

    endings: dict[str, int] = field(default_factory=dict)  # of unknown kinds, most first
    hidden: int = 0  # names that begin with a dot
    empty: int = 0  # folders that hold no file
    excluded: dict[str, int] = field(default_factory=dict)  # what each pattern left out

    def excludes(self, *names: str) -> bool:
        """Count a pattern that fits one of the names; return whether one does."""
        for pattern in self.excluded:
            if any(fnmatchcase(name, pattern.rstrip("/")) for name in names):
                self.excluded[pattern] += 1
                return True
        return False

    def __str__(self) -> str:
        said = [f"{n:,} {ending or 'without an ending'}" for ending, n in self.endings.items()]
        if len(said) > 10:
            said[10:] = [f"{sum([*self.endings.values()][10:]):,} of {len(said) - 10} other kinds"]
        said += [f"{self.hidden:,} hidden"] if self.hidden else []
        said += [f"{self.empty:,} empty folder{'s' * (self.empty > 1)}"] if self.empty else []
        said += [f"{n:,} excluded by {cut(pattern, 80)}" for pattern, n in self.excluded.items()]
        return ", ".join(said)


class Listing(Sequence[Item]):
    """Images in a fixed order, held as columns: an `Item` is made when it is asked for."""

    def __init__(self, ids: Texts, paths: Texts, labels: LabelColumn) -> None:
        self.ids, self.paths, self.labels = ids, paths, labels

    @classmethod
    def of(cls, items: Iterable[Item]) -> Listing:
        """Keep images, read once and in order."""
        ids, paths, same, rest = TextsWriter(), TextsWriter(), True, iter(items)

        def labels() -> Iterator[str | None]:
            nonlocal same
            while run := list(islice(rest, _RUN)):
                ids.extend([one.id for one in run])
                paths.extend([one.path for one in run])
                same &= all(one.id == one.path for one in run)
                yield from (one.label for one in run)

        named = LabelColumn.of(labels())
        kept, own = Texts(*ids.columns()), Texts(*paths.columns())
        return cls(kept, kept if same else own, named)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, where: int) -> Item: ...

    @overload
    def __getitem__(self, where: slice) -> list[Item]: ...

    def __getitem__(self, where: int | slice) -> Item | list[Item]:
        if isinstance(where, slice):
            columns = self.ids[where], self.paths[where], self.labels[where]
            return [Item(*one) for one in zip(*columns, strict=True)]
        return Item(self.ids[where], self.paths[where], self.labels[where])

    def __iter__(self) -> Iterator[Item]:
        return map(Item, self.ids, self.paths, self.labels)

    def __eq__(self, other: object) -> bool:
        return is_same(self, other)

    def only(self, positions: Sequence[int] | np.ndarray) -> Listing:
        """Return the images at some places."""
        rows = np.asarray(positions, np.int64)
        ids = self.ids.select(rows)
        paths = ids if self.paths is self.ids else self.paths.select(rows)
        return Listing(ids, paths, self.labels.take(rows))


class ImageSource:
    """Images on disk or at addresses, in a fixed order, with paths relative to `root`.

    `notes` says what looks like a mistake, a sentence each; `numbers` whether labels are numbers;
    `stamps` what a store said of each image's file when it was listed, None of local files.
    """

    def __init__(
        self,
        items: Sequence[Item],
        root: Root | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        left_out: LeftOut | None = None,
        notes: Sequence[str] = (),
        numbers: bool = False,
        stamps: Texts | LabelColumn | None = None,
    ) -> None:
        listed = items if isinstance(items, Listing) else Listing.of(items)
        self._take(listed, root, max_pixels, numbers, stamps)
        self.left_out, self.notes = left_out or LeftOut(), tuple(notes)
        if (twice := first_twice(listed.ids)) is not None:
            raise InputError(self._said_twice(*twice))

    def _take(
        self,
        items: Listing,
        root: Root | None,
        max_pixels: int,
        numbers: bool,
        stamps: Texts | LabelColumn | None,
    ) -> None:
        self.items, self.root, self.numbers, self.stamps = items, root, numbers, stamps
        self.max_pixels = whole("max_pixels", max_pixels, 1)

    def _said_twice(self, one: int, other: int) -> str:
        name, places = self.items.ids[one], (self.place(one), self.place(other))
        if all(map(inside, places)) and places[0] != places[1]:
            shown = [cut(name_of(place), 200) for place in places]
            who = " and ".join(shown) if shown[0] != shown[1] else f"two members {shown[0]}"
            return (
                f"{who} have the same id {short(name)}; ids must be unique: name the members, or "
                "fill the column of ids, so that no two of all shards are alike"
            )
        return f"images {one} and {other} have the same id {short(name)}; ids must be unique"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> Texts:
        """The ids, in order."""
        return self.items.ids

    @property
    def labels(self) -> LabelColumn:
        """The labels, in order; None where an image has none."""
        return self.items.labels

    def place(self, position: int) -> str:
        """Return where an image lies, see `embedcam.images.places`; "" of what has no path."""
        path = self.items.paths[position]
        return located(self.root, path) if path else ""

    def name(self, position: int) -> str:
        """Return what messages call an image: its path, or its id where it has no path."""
        place = self.place(position)
        return name_of(place) if place else self.items.ids[position]

    def refused(self, position: int) -> str | None:
        """Return why an image is not read, where its path alone says so: its error's message."""
        path = self.items.paths[position]
        if is_url(path):
            from .remote import UNKNOWN, is_known

            if not is_known(path):
                return f"{self.name(position)}: {UNKNOWN}"
            if not _reads_addresses():
                said = 'is an address, which fsspec reads; pip install "embedcam[remote]"'
                return f"{self.name(position)}: {said}"
        if escaped(path) != path:
            return f"{self.name(position)}: the file name is not UTF-8; rename it"
        return None

    def open(self, position: int) -> Image.Image:
        """Return the picture, upright and RGB, or raise ImageError, beginning with its path."""
        if (said := self.refused(position)) is not None:
            raise ImageError(said)
        held = self._held(position)
        return read_image(held, max_pixels=self.max_pixels, name=self.name(position))

    def fingerprint(self, position: int) -> str:
        """Return what changes when the file does (size and time): for resuming a build."""
        if self.stamps is not None:
            return self.stamps[position] or "unreadable"
        place = self.place(position)
        within = inside(place)
        return stamp_of(place if within is None else within.file)

    def fingerprints(self) -> Texts:
        """Return what changes when a file does, of all images in order."""
        if isinstance(self.stamps, Texts):
            return self.stamps
        positions = range(len(self))
        if self.stamps is not None or not any(map(is_url, self.items.paths)):
            return Texts.of(map(self.fingerprint, positions))
        with ThreadPoolExecutor(_ASKED, thread_name_prefix="embedcam-images") as pool:
            return Texts.of(
                stamp
                for start in range(0, len(self), _RUN)
                for stamp in pool.map(self.fingerprint, positions[start : start + _RUN])
            )

    def mark(self, position: int) -> np.ndarray:
        """Return the mark of the file, see `place_mark`; zeros for what is no file."""
        return place_mark(self.place(position), self._stamp(position))

    def state(self, position: int, mark: np.ndarray) -> FileState | None:
        """Return whether the file is the one that was marked; see `place_state`."""
        return place_state(self.place(position), mark, self._stamp(position))

    def only(self, positions: Sequence[int]) -> ImageSource:
        """Return the images at some places, as a source of their own."""
        rows = np.asarray(positions, np.int64)
        stamps = self.stamps
        if isinstance(stamps, LabelColumn):
            stamps = LabelColumn(stamps.codes[rows], stamps.names)
        elif stamps is not None:
            stamps = Texts.of(stamps[rows])
        return ImageSource(
            self.items.only(positions),
            self.root,
            max_pixels=self.max_pixels,
            left_out=self.left_out,
            numbers=self.numbers,
            stamps=stamps,
        )

    def describe(self) -> dict[str, Plain]:
        """Return what `load_source` needs beside the columns, ready for JSON.

        Raises InputError of a source that lives in this process alone.
        """
        stamps = None if self.stamps is None else type(self.stamps).__name__
        return {
            "images": len(self),
            "root": root_text(self.root),
            "max_pixels": self.max_pixels,
            "numbers": self.numbers,
            "stamps": stamps,
            "own_paths": self.items.paths is not self.items.ids,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the columns and then `describe()` into a folder, for `load_source`."""
        about, target = self.describe(), Path(folder)
        make_folder(target)
        _write_texts(target, "ids", self.items.ids)
        if about["own_paths"]:
            _write_texts(target, "paths", self.items.paths)
        _write_labels(target, "labels", self.items.labels)
        if isinstance(self.stamps, Texts):
            _write_texts(target, "stamps", self.stamps)
        elif self.stamps is not None:
            _write_labels(target, "stamps", self.stamps)
        with written(target / _ABOUT) as file:
            file.write(json.dumps(about, indent=1).encode())

    def _held(self, position: int) -> ImageLike:
        place = self.place(position)
        if PLACE.match(place) is None:
            return place
        # What a store said when it was listed spares it the question.
        known = self._stamp(position).partition(":")[0] if isinstance(self.stamps, Texts) else ""
        return read_place(place, self.name(position), int(known) if known.isdecimal() else None)

    def _stamp(self, position: int) -> str:
        return "" if self.stamps is None else self.stamps[position] or ""


_ABOUT = "images.json"
_MOST = 1 << 16


def load_source(folder: str | os.PathLike[str]) -> ImageSource:
    """Return the source that was saved into a folder, its columns mapped; or raise InputError."""
    place = Path(folder)
    try:
        about = json.loads(read_regular(place, _ABOUT, _MOST))
        if not isinstance(about, dict) or type(about.get("images")) is not int:
            raise NotPlain("says not how many images there are")
        count, root, stamps = about["images"], about.get("root"), about.get("stamps")
        numbers, own = about.get("numbers"), about.get("own_paths")
        wrong = root is not None and not isinstance(root, str)
        if wrong or type(numbers) is not bool or type(own) is not bool or count < 0:
            raise NotPlain("names no root, or another wrong value")
        ids = _read_texts(place, "ids", count)
        paths = _read_texts(place, "paths", count) if own else ids
        items = Listing(ids, paths, _read_labels(place, "labels", count))
        told: Texts | LabelColumn | None = None
        if stamps == "Texts":
            told = _read_texts(place, "stamps", count)
        elif stamps is not None:
            told = _read_labels(place, "stamps", count)
    except (OSError, ValueError, NotPlain) as error:
        said = reason(error)
        raise InputError(f"{place}: holds no list of images that can be used ({said})") from error
    source = ImageSource((), max_pixels=whole("max_pixels", about.get("max_pixels"), 1))
    source._take(items, root and as_root(root), source.max_pixels, numbers, told)
    return source


def _write_texts(folder: Path, name: str, texts: Texts) -> None:
    _write(folder / f"{name}.utf8", texts.blob)
    _write(folder / f"{name}.offsets.u64", texts.offsets.astype("<u8", copy=False))


def _write_labels(folder: Path, name: str, labels: LabelColumn) -> None:
    _write(folder / f"{name}.codes.i32", labels.codes.astype("<i4", copy=False))
    _write_texts(folder, f"{name}.names", Texts.of(labels.names))


def _write(path: Path, values: np.ndarray) -> None:
    with fresh(path) as file:
        for start in range(0, len(values), 1 << 20):
            file.write(values[start : start + (1 << 20)].tobytes())


def _read_texts(folder: Path, name: str, count: int | None) -> Texts:
    """Map a column; its sizes are checked, and what an offset says whenever it is used."""
    blob = _mapped(folder, f"{name}.utf8", "u1")
    offsets = _mapped(folder, f"{name}.offsets.u64", "<u8")
    if len(offsets) < 1 or (count is not None and len(offsets) != count + 1):
        raise NotPlain(f"{name} has {len(offsets) - 1} entries, and {count} are told")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(blob):
        raise NotPlain(f"{name}.utf8 has {len(blob)} bytes, and {int(offsets[-1])} are told")
    return Texts(blob, offsets)


def _read_labels(folder: Path, name: str, count: int) -> LabelColumn:
    codes = _mapped(folder, f"{name}.codes.i32", "<i4")
    names = list(_read_texts(folder, f"{name}.names", None))
    if len(codes) != count:
        raise NotPlain(f"{name} has {len(codes)} entries, and {count} are told")
    if count and not -1 <= int(codes.min()) <= int(codes.max()) < len(names):
        raise NotPlain(f"{name} names one of {len(names)} names that is none of them")
    return LabelColumn(codes, names)


def _mapped(folder: Path, name: str, kind: str) -> np.ndarray:
    with open(open_regular(folder, name), "rb") as file:
        size, each = os.fstat(file.fileno()).st_size, np.dtype(kind).itemsize
        if size % each:
            raise NotPlain(f"{name} has {size} bytes, no multiple of {each}")
        return np.memmap(file, kind, "r") if size else np.zeros(0, kind)


@cache
def _reads_addresses() -> bool:
    return find_spec("fsspec") is not None
