"""Rows of an index: its layers and columns, the mapped parts, and rows gathered on demand."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from ..errors import IndexFormatError, InputError
from ..images.texts import Texts, take_each
from . import manifest as manifest_file
from .arrays import (
    SUFFIXES,
    ArrayLike,
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
from .concepts import misshapen
from .encoding import Encoding, TopM, from_spec
from .manifest import LayerEntry, Manifest, PartEntry

if TYPE_CHECKING:
    from .reader import Index

STRINGS = ("ids", "paths", "labels")
MARKS = "marks"
"""The one column that a part may lack: the marks of the images' files."""
_FITTED = re.compile(r"(?:layer([0-9]{1,4})\.)?([a-z][a-z0-9_]*)\.([a-z0-9]+)")


@dataclass(frozen=True)
class Layer:
    """One explained layer, and the columns of its weights and of its coarse maps (if any)."""

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
            if encoding.uses_embedding and spec["rank"] != width:
                raise InputError(f"codes from embeddings of width {width}, rank {spec['rank']}")
        except InputError as error:
            what = f"the encoding of layers[{number}] is unusable ({error})"
            raise broken(root, manifest_file.NAME, what) from error
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
        layers.append(
            Layer(entry.name, entry.channels, encoding, entry.coarse_grid, fields, coarse)
        )
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


class IndexRows:
    """A column of an index's rows, and new ones behind them, as one array-like `[n ...]`.

    `positions` `[n]` are the rows, None for all; the column is that of the embeddings, or another.
    """

    def __init__(
        self,
        index: "Index",
        positions: np.ndarray | None = None,
        column: Column | None = None,
        new: ArrayLike | None = None,
    ) -> None:
        self.index, self._new = index, new
        self._positions = np.arange(index.n_rows) if positions is None else positions
        self._column = column or index.columns["embeddings"]
        n_rows = len(self._positions) + (0 if new is None else new.shape[0])
        self.shape, self.dtype = (n_rows, *self._column.shape), np.dtype(self._column.dtype)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        old = self.index.select(self._positions[rows]).array(self._column)
        if self._new is None or not isinstance(rows, slice):  # new ones are read in blocks alone
            return old
        ends = rows.indices(self.shape[0])[:2]
        start, stop = (max(end - len(self._positions), 0) for end in ends)
        return np.concatenate([old, self._new[start:stop]]) if stop else old


class StringTable(Texts):
    """The strings of a part; `where` names the files in messages.

    Offsets are believed after they were found to be inside. A damaged byte does not stop a search
    half way; `verify` reports it.
    """

    errors = "replace"

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, where: Path) -> None:
        super().__init__(blob, offsets)
        self.where = where

    def _outside(self) -> IndexFormatError:
        return IndexFormatError(
            f"{self.where}.offsets.u64: offsets fall or lead outside the text; run `embedcam "
            "verify`, and restore the file that it names"
        )


def check_row(row: int, high: int) -> int:
    """Return a row number read from a file, refused where it leads outside."""
    if not 0 <= row < high:
        raise IndexFormatError(
            f"the index refers to row {row} of {high} in its strings; run `embedcam verify`, and "
            "restore the file that it names"
        )
    return row


class Part:
    """Rows, mapped or in memory; `arrays` maps file names to arrays.

    `labels` are the names that `codes` `[n]` number, and `order` `[n]` is the rows in that of their
    ids' bytes.
    """

    def __init__(
        self,
        directory: str,
        arrays: Mapping[str, np.ndarray],
        strings: Sequence[Texts],
        codes: np.ndarray,
        order: np.ndarray,
    ) -> None:
        self.directory, self.count, self.arrays = directory, len(codes), arrays
        self.ids, self.paths, self.labels = strings
        self.codes, self.order = codes, order

    @classmethod
    def map(cls, root: Path, entry: PartEntry, columns: Mapping[str, Column]) -> Self:
        """Map the files of a part."""
        arrays, folder = _map_part(root, entry, columns), root / entry.directory
        strings = [
            StringTable(arrays[f"{stem}.utf8"], arrays[f"{stem}.offsets.u64"], folder / stem)
            for stem in STRINGS
        ]
        order = arrays[file_name("ids.order", order_dtype(entry.count))]
        return cls(entry.directory, arrays, strings, arrays["labels.codes.i32"], order)

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """Return ids of rows `[n]`, n >= 1."""
        return self.ids.take(rows)

    def paths_of(self, rows: np.ndarray) -> list[str]:
        """Return paths of rows `[n]`, n >= 1."""
        return self.paths.take(rows)

    def labels_of(self, rows: np.ndarray) -> list[str | None]:
        """Return labels of rows `[n]`, or None without one."""
        codes, known = self._codes_of(rows)
        return _named(codes, known, self.labels.take(known))

    def texts_of(self, rows: np.ndarray) -> list[tuple[str, str, str | None]]:
        """Return id, path and label of rows `[n]`, n >= 1."""
        codes, known = self._codes_of(rows)
        ids, paths, names = take_each((self.ids, rows), (self.paths, rows), (self.labels, known))
        return list(zip(ids, paths, _named(codes, known, names), strict=True))

    def find(self, key: bytes) -> list[int]:
        """Return the rows with this id, removed ones included, in rising order."""
        rows, at = [], self._bisect(key)
        while at < self.count and self.ids.raw(row := self._row(at)) == key:
            rows.append(row)
            at += 1
        return rows

    def ids_around(self, key: bytes, reach: int) -> list[str]:
        """Return ids around the place where `key` would stand."""
        at = self._bisect(key)
        around = range(max(0, at - reach), min(self.count, at + reach))
        return [self.ids.raw(self._row(i)).decode("utf-8", "replace") for i in around]

    def _bisect(self, key: bytes) -> int:
        return bisect_left(range(self.count), key, key=lambda at: self.ids.raw(self._row(at)))

    def _row(self, at: int) -> int:
        return check_row(int(self.order[at]), self.count)

    def _codes_of(self, rows: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Return codes of labels of rows `[n]`, -1 without one; and those that occur, rising."""
        codes = self.codes[rows].tolist()
        known = sorted({*codes} - {-1})
        for code in known:
            check_row(code, len(self.labels.offsets) - 1)
        return codes, np.array(known, np.int64)


def _named(codes: list[int], known: np.ndarray, names: list[str]) -> list[str | None]:
    name_of = dict(zip(known.tolist(), names, strict=True))
    return [name_of.get(code) for code in codes]


def order_dtype(n_rows: int) -> str:
    """Return the narrowest type that numbers the rows of a part."""
    return "uint32" if n_rows < 1 << 32 else "uint64"


def _map_part(root: Path, entry: PartEntry, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Map every file of a part, after type, shape and size were checked."""
    count, files = entry.count, entry.files

    def free(name: str, least: int = 0) -> int:
        """Return a length that the data decides."""
        return max(least, files[name].shape[0]) if name in files else least

    order = order_dtype(count)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        file_name("ids.order", order): (order, (count,)),
        "labels.codes.i32": ("int32", (count,)),
    }
    for stem in STRINGS:
        offsets = f"{stem}.offsets.u64"
        n_offsets = free(offsets, 1) if stem == "labels" else count + 1
        expected |= {offsets: ("uint64", (n_offsets,))}
        expected |= {f"{stem}.utf8": ("uint8", (free(f"{stem}.utf8"),))}
    for name, column in columns.items():
        if name != MARKS or column.file in files:
            expected[column.file] = (column.dtype, (count, *column.shape))
    arrays = {}
    for name in sorted(expected.keys() | files.keys()):
        place, file = f"{entry.directory}/{name}", files.get(name)
        if file is None or name not in expected:
            what = "is not listed in the manifest" if file is None else "is no file of a part"
            raise broken(root, place, what)
        if (file.dtype, file.shape) != expected[name]:
            dtype, shape = expected[name]
            what = f"the manifest says {file.dtype} {list(file.shape)} where the format asks for "
            raise broken(root, place, f"{what}{dtype} {list(shape)}")
        arrays[name] = map_array(root, place, file)
    return arrays


def map_fitted(
    root: Path, manifest: Manifest, held: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Map the arrays kept once, by file name; a model's are `held` in memory, by place."""
    folder, width = manifest.fitted, manifest.embedding.width
    arrays = {}
    for name, entry in folder.files.items():
        place, match = f"{folder.directory}/{name}", _FITTED.fullmatch(name)
        known = match and (match[1] is None or int(match[1]) < len(manifest.layers))
        if not match or not known or match[3] != SUFFIXES[entry.dtype]:
            raise broken(root, place, "is no file of the fitted folder")
        # What belongs to the whole index and is compared with its embeddings; others are free.
        rows = dict.fromkeys(("embedding_mean", "text_mean", "probe_embedding"), (width,))
        rows["probe_pooled"] = (max(1, entry.shape[0]),)
        fits = entry.dtype.startswith("float") and entry.shape == rows.get(match[2])
        if match[1] is None and match[2] in rows and not fits:
            what = f"holds {entry.dtype} {list(entry.shape)}, which is no {match[2]}"
            raise broken(root, place, what)
        arrays[name] = map_array(root, place, entry) if held is None else held[place]
    whole = {name.split(".")[0]: one for name, one in folder.files.items() if name.count(".") == 1}
    shapes = {name: (one.dtype, one.shape) for name, one in whole.items()}
    wrong = misshapen(shapes, manifest.layers[0].channels) if manifest.layers else None
    if wrong is not None:
        raise broken(root, folder.directory, wrong)
    return arrays


def fitted_of(files: Mapping[str, np.ndarray], stem: str = "") -> dict[str, np.ndarray]:
    """Return the fitted arrays of the layer `stem` ("layer0."), or those of the whole index."""
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
