"""Rows of an index: its layers and columns, the mapped parts, and selections of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EmbedcamError, IndexFormatError
from . import manifest as manifest_file
from .arrays import (
    SUFFIXES,
    Check,
    Column,
    broken,
    file_name,
    map_array,
    wrong_channels,
    wrong_embeddings,
    wrong_scales,
    wrong_values,
)
from .encoding import Encoding, LowRank, TopM, from_spec
from .manifest import FileEntry, LayerEntry, Manifest, PartEntry

STRINGS = ("ids", "paths", "labels")
MARKS = "marks"
"""The one column that a part may lack: the marks of the images' files."""
_FITTED = re.compile(r"(?:layer([0-9]{1,4})\.)?([a-z][a-z0-9_]*)\.([a-z0-9]+)")


@dataclass(frozen=True)
class Layer:
    """One explained layer, and the columns of its weights and of its coarse maps (if any)."""

    number: int
    name: str
    channels: int
    encoding: Encoding
    coarse_grid: tuple[int, int] | None
    fields: dict[str, Column]
    coarse: tuple[Column, Column] | None


def make_layers(
    root: Path,
    entries: Sequence[LayerEntry],
    fitted: Sequence[Mapping[str, np.ndarray]],
    width: int,
) -> list[Layer]:
    """Return the layers that a manifest describes; their arrays `fitted` once, D is the `width`."""
    layers = []
    for number, entry in enumerate(entries):
        spec = {key: value for key, value in asdict(entry.encoding).items() if value is not None}
        try:
            encoding = from_spec(spec, entry.channels, fitted[number], entry.grid)
        except (EmbedcamError, KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is unusable ({error})"
            what = f"the encoding of layers[{number}] {what}"
            raise broken(root, manifest_file.NAME, what) from error
        if isinstance(encoding, LowRank) and encoding.uses_embedding and encoding.rank != width:
            what = f"layers[{number}] derives its codes from embeddings of width {width}, and its "
            raise broken(root, manifest_file.NAME, f"{what}rank is {encoding.rank}")
        stem, coarse = f"layer{number}", None
        checks: dict[str, Check] = {"scales": wrong_scales}
        if isinstance(encoding, TopM):
            checks["channels"] = partial(wrong_channels, n_channels=entry.channels)
        fields = {
            name: Column(f"{stem}.{name}", one.dtype, one.shape, checks.get(name, wrong_values))
            for name, one in encoding.fields.items()
        }
        if entry.coarse_grid is not None:
            maps = Column(f"{stem}.coarse", "uint8", entry.coarse_grid)
            coarse = maps, Column(f"{stem}.coarse_scales", "float32", (), wrong_scales)
        name, channels, grid = entry.name, entry.channels, entry.coarse_grid
        layers.append(Layer(number, name, channels, encoding, grid, fields, coarse))
    return layers


def columns_of(width: int, normalized: bool, layers: Sequence[Layer]) -> dict[str, Column]:
    """Return every array that an index keeps for each image, by name; marks may be missing."""
    columns = [
        Column("embeddings", "float32", (width,), partial(wrong_embeddings, normalized=normalized)),
        Column("triplets_used", "uint32"),
        Column(MARKS, "uint32", (4,)),
    ]
    for layer in layers:
        columns += (*layer.fields.values(), *(layer.coarse or ()))
    return {column.stem: column for column in columns}


class StringTable:
    """UTF-8 strings in a blob `[bytes]` with offsets `[n+1]`, decoded on demand.

    Offsets are believed after they were found to be inside; `where` names the files in messages.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, where: Path) -> None:
        self.blob, self.offsets, self.where = blob, offsets, where

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, row: int) -> bytes:
        """Return the string's bytes."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        if not start <= stop <= len(self.blob):
            raise self._outside()
        return self.blob[start:stop].tobytes()

    def __getitem__(self, row: int) -> str:
        # A damaged byte must not stop a search half way; `verify` reports it.
        return self.raw(row).decode("utf-8", "replace")

    def take(self, rows: np.ndarray) -> list[str]:
        """Return some rows `[n]`."""
        first, last = int(rows[0]), int(rows[-1])
        if len(rows) > 1 and last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return self.tolist(first, last + 1)  # a run is decoded from one piece of the blob
        starts, stops = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        blob, size = self.blob.data, len(self.blob)
        if not all(a <= b <= size for a, b in zip(starts, stops, strict=True)):
            raise self._outside()
        return [str(blob[a:b], "utf-8", "replace") for a, b in zip(starts, stops, strict=True)]

    def tolist(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return rows start .. stop at once, faster than one by one."""
        offsets = np.asarray(self.offsets[start : (len(self) if stop is None else stop) + 1])
        if offsets[-1] > len(self.blob) or (offsets[1:] < offsets[:-1]).any():
            raise self._outside()
        first = int(offsets[0])
        blob = self.blob[first : int(offsets[-1])].tobytes()
        bounds = (offsets.astype(np.int64) - first).tolist()
        return [blob[a:b].decode("utf-8", "replace") for a, b in pairwise(bounds)]

    def _outside(self) -> IndexFormatError:
        return IndexFormatError(
            f"{self.where}.offsets.u64: offsets fall or lead outside the text; run `embedcam "
            "verify`, and restore the file that it names"
        )

    def bisect(self, order: np.ndarray, key: bytes) -> int:
        """Return where `key` stands, or would stand, in the sorted order."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.raw(check_row(int(order[middle]), high=len(self))) < key:
                low = middle + 1
            else:
                high = middle
        return low


def check_row(row: int, high: int) -> int:
    """Return a row number read from a file, refused where it leads outside."""
    if not 0 <= row < high:
        raise IndexFormatError(
            f"the index refers to row {row} of {high} in its strings; run `embedcam verify`, and "
            "restore the file that it names"
        )
    return row


class Part:
    """One mapped part; `arrays` maps file names to arrays."""

    def __init__(self, root: Path, entry: PartEntry, columns: Mapping[str, Column]) -> None:
        self.directory, self.count = entry.directory, entry.count
        self.arrays = _map_part(root, entry, columns)
        self.ids, self.paths, self.labels = (
            StringTable(
                self.arrays[f"{stem}.utf8"],
                self.arrays[f"{stem}.offsets.u64"],
                root / self.directory / stem,
            )
            for stem in STRINGS
        )
        self.order = self.arrays[file_name("ids.order", order_dtype(self.count))]
        self.codes = self.arrays["labels.codes.i32"]

    def texts(self, rows: np.ndarray, *kinds: str) -> list[list[Any]]:
        """Return of each kind of `STRINGS` the texts of rows `[n]`, n >= 1; a label may be None."""
        return [
            self._labels_of(rows) if kind == "labels" else getattr(self, kind).take(rows)
            for kind in kinds
        ]

    def _labels_of(self, rows: np.ndarray) -> list[str | None]:
        codes = self.codes[rows].tolist()
        names: dict[int, str | None] = {
            code: self.labels[check_row(code, len(self.labels))] for code in {*codes} - {-1}
        }
        return [names.get(code) for code in codes]

    def find(self, key: bytes) -> list[int]:
        """Return the rows with this id, removed ones included, in rising order."""
        rows, at = [], self.ids.bisect(self.order, key)
        while at < self.count and self.ids.raw(row := self._row(at)) == key:
            rows.append(row)
            at += 1
        return rows

    def ids_around(self, key: bytes, reach: int) -> list[str]:
        """Return ids around the place where `key` would stand."""
        at = self.ids.bisect(self.order, key)
        around = range(max(0, at - reach), min(self.count, at + reach))
        return [self.ids[self._row(i)] for i in around]

    def _row(self, at: int) -> int:
        return check_row(int(self.order[at]), self.count)


def order_dtype(n_rows: int) -> str:
    """Return the narrowest type that numbers the rows of a part."""
    return "uint32" if n_rows < 1 << 32 else "uint64"


def _map_part(root: Path, entry: PartEntry, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Map every file of a part, after type, shape and size were checked."""
    count = entry.count
    order = order_dtype(count)
    # Sizes of each axis; None where the data decides.
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        file_name("ids.order", order): (order, (count,)),
        "labels.codes.i32": ("int32", (count,)),
    }
    for stem in STRINGS:
        expected[f"{stem}.utf8"] = ("uint8", (None,))
        expected[f"{stem}.offsets.u64"] = ("uint64", (None if stem == "labels" else count + 1,))
    for name, column in columns.items():
        if name != MARKS or column.file in entry.files:
            expected[column.file] = (column.dtype, (count, *column.shape))
    for name in sorted(expected.keys() ^ entry.files.keys()):
        what = "is not listed in the manifest" if name in expected else "is no file of a part"
        raise broken(root, f"{entry.directory}/{name}", what)
    for name, (dtype, shape) in expected.items():
        file = entry.files[name]
        fits = len(shape) == len(file.shape) and all(
            want in (None, size) for want, size in zip(shape, file.shape, strict=True)
        )
        if file.dtype != dtype or not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            what = (
                f"the manifest says {file.dtype} {list(file.shape)} where the format asks for "
                f"{dtype} [{wanted}]"
            )
            raise broken(root, f"{entry.directory}/{name}", what)
    if entry.files["labels.offsets.u64"].shape == (0,):
        raise broken(root, f"{entry.directory}/labels.offsets.u64", "is empty")
    return {
        name: map_array(root, f"{entry.directory}/{name}", file)
        for name, file in entry.files.items()
    }


def map_fitted(root: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Map the arrays kept once, by file name."""
    folder, width = manifest.fitted, manifest.embedding.width
    for name, entry in folder.files.items():
        match = _FITTED.fullmatch(name)
        known = match and (match[1] is None or int(match[1]) < len(manifest.layers))
        if not match or not known or match[3] != SUFFIXES[entry.dtype]:
            raise broken(root, f"{folder.directory}/{name}", "is no file of the fitted folder")
        if match[1] is None and not _fits(match[2], entry, width):
            what = f"holds {entry.dtype} {list(entry.shape)}, which is no {match[2]}"
            raise broken(root, f"{folder.directory}/{name}", what)
    return {
        name: map_array(root, f"{folder.directory}/{name}", entry)
        for name, entry in folder.files.items()
    }


def _fits(name: str, entry: FileEntry, width: int) -> bool:
    # What belongs to the whole index and is compared with its embeddings; other arrays are free.
    if name not in ("embedding_mean", "probe_embedding", "probe_pooled"):
        return True
    one_row = len(entry.shape) == 1 and entry.shape[0] > 0
    fits = one_row if name == "probe_pooled" else entry.shape == (width,)
    return fits and entry.dtype.startswith("float")


def fitted_of(files: Mapping[str, np.ndarray], number: int | None) -> dict[str, np.ndarray]:
    """Return the fitted arrays of a layer by name; with None those of the whole index."""
    stem = "" if number is None else f"layer{number}."
    return {
        name.removeprefix(stem).split(".")[0]: array
        for name, array in files.items()
        if name.startswith(stem) and name.removeprefix(stem).count(".") == 1
    }


def map_tombstones(root: Path, manifest: Manifest) -> np.ndarray:
    """Map positions of removed rows, uint64 `[n]`, rising; every reader counts on them."""
    entry, rows, fitted = manifest.tombstones, manifest.counts.rows, manifest.fit.rows
    removed = np.empty(0, np.uint64)
    if entry is not None:
        removed = map_array(root, entry.file, entry)
        if len(removed) and removed.max() >= rows:
            what = f"removes row {removed.max()} of an index of {rows} rows"
            raise broken(root, entry.file, what)
        if (removed[1:] <= removed[:-1]).any():
            raise broken(root, entry.file, "the positions do not rise")
    later = rows - fitted - int((removed >= fitted).sum())
    if manifest.counts.added_after_fit != later:
        what = f"counts.added_after_fit is not {later}, the live rows behind the fit"
        raise broken(root, manifest_file.NAME, what)
    return removed
