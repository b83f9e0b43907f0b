"""The rows of an index: its layers and columns, the mapped parts, and selections of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from ..errors import EmbedcamError, InputError
from . import manifest as manifest_file
from .arrays import (
    SUFFIXES,
    Column,
    StringTable,
    broken,
    check_positions,
    check_row,
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
_RUN = 1 << 16
T_co = TypeVar("T_co", covariant=True)


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

    @classmethod
    def of(cls, number: int, entry: LayerEntry, encoding: Encoding) -> "Layer":
        """Return the layer that an entry describes."""

        def wrong(name: str) -> Any:
            if isinstance(encoding, TopM) and name == "channels":
                return partial(wrong_channels, n_channels=entry.channels)
            return wrong_scales if name == "scales" else wrong_values

        fields = {
            name: Column.of(f"layer{number}.{name}", one.dtype, one.shape, wrong(name))
            for name, one in encoding.fields.items()
        }
        coarse = None
        if entry.coarse_grid is not None:
            maps = Column.of(f"layer{number}.coarse", "uint8", entry.coarse_grid)
            coarse = maps, Column.of(f"layer{number}.coarse_scales", "float32", (), wrong_scales)
        name, channels, grid = entry.name, entry.channels, entry.coarse_grid
        return cls(number, name, channels, encoding, grid, fields, coarse)


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
            what = (
                f"layers[{number}] derives its codes from embeddings of width {width}, and its "
                f"rank is {encoding.rank}"
            )
            raise broken(root, manifest_file.NAME, what)
        layers.append(Layer.of(number, entry, encoding))
    return layers


def columns_of(width: int, normalized: bool, layers: Sequence[Layer]) -> dict[str, Column]:
    """Return every array that an index keeps for each image, by name; marks may be missing."""
    wrong = partial(wrong_embeddings, normalized=normalized)
    columns = {
        "embeddings": Column.of("embeddings", "float32", (width,), wrong),
        "triplets_used": Column.of("triplets_used", "uint32"),
        MARKS: Column.of(MARKS, "uint32", (4,)),
    }
    for layer in layers:
        of_layer = (*layer.fields.values(), *(layer.coarse or ()))
        columns |= {column.file.rpartition(".")[0]: column for column in of_layer}
    return columns


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


class Rows:
    """The mapped parts of an open index, in the order of their rows, until they are closed.

    Apart from `Index`, so that `index.ids` and the others refer to this and not to the index: an
    index that nobody holds any more is then let go at once, not when garbage is collected.
    """

    def __init__(
        self, root: Path, manifest: Manifest, layers: list[Layer], columns: dict[str, Column]
    ) -> None:
        self.root, self.layers, self.columns = root, layers, columns
        self._parts: list[Part] | None = [Part(root, part, columns) for part in manifest.parts]
        self.starts = np.cumsum([0, *(part.count for part in self._parts)])

    @property
    def parts(self) -> list[Part]:
        """The mapped parts; an `InputError` where they were closed."""
        parts = self._parts
        if parts is None:
            raise InputError(f"{self.root}: the index is closed; open it again")
        return parts

    def close(self) -> None:
        """Let go of the files; selections made before stay valid."""
        self._parts = None

    def pieces(self, positions: np.ndarray) -> "list[tuple[Part, np.ndarray | slice, np.ndarray]]":
        """Return parts, the places among `positions` that lie in each, and their rows there."""
        parts = self.parts
        if len(positions) == 0:
            return []
        if len(parts) == 1:
            return [(parts[0], slice(None), positions)]
        home = np.searchsorted(self.starts, positions, side="right") - 1
        return [
            (parts[number], where, positions[where] - self.starts[number])
            for number in np.unique(home).tolist()
            for where in [np.flatnonzero(home == number)]
        ]


class Selection:
    """Rows of an index in the order they were asked for; made by `Index.select`.

    They are found in their parts once, then fetched field by field, also of a closed index.
    """

    def __init__(self, rows: Rows, positions: np.ndarray) -> None:
        self.positions, self._rows = positions, rows
        self._pieces = rows.pieces(positions)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def ids(self) -> list[str]:
        """Stable ids, `[n]`."""
        return self._strings("ids")

    @property
    def paths(self) -> list[str]:
        """Where the images were read, `[n]`."""
        return self._strings("paths")

    @property
    def labels(self) -> list[str | None]:
        """Labels, None for images without one, `[n]`."""
        labels: list[str | None] = [None] * len(self)
        for part, where, rows in self._pieces:
            names: dict[int, str | None] = {-1: None}
            for slot, code in zip(_slots(where, rows), part.codes[rows].tolist(), strict=True):
                if code not in names:
                    names[code] = part.labels[check_row(code, len(part.labels))]
                labels[slot] = names[code]
        return labels

    @property
    def embeddings(self) -> np.ndarray:
        """Stored embeddings, float32 `[n D]`."""
        return self.array(self._rows.columns["embeddings"])

    @property
    def triplets_used(self) -> np.ndarray:
        """Triplets that gave evidence for each row's weights, uint32 `[n]`."""
        return self.array(self._rows.columns["triplets_used"])

    @property
    def marks(self) -> np.ndarray:
        """Marks of the images' files, uint32 `[n 4]`; zeros where none was taken."""
        return self.array(self._rows.columns[MARKS])

    def fields(self, layer: int = 0) -> dict[str, np.ndarray]:
        """Return what the layer's encoding decodes, with "embedding" where it uses that."""
        of = self._rows.layers[layer]
        fields = {name: self.array(column) for name, column in of.fields.items()}
        if "channels" in fields and fields["channels"].max(initial=0) >= of.channels:
            what = f"names a channel beyond {of.channels}"
            raise broken(self._rows.root, of.fields["channels"].file, what)
        if of.encoding.uses_embedding:
            fields["embedding"] = self.embeddings
        return fields

    def coarse(self, layer: int = 0) -> np.ndarray | None:
        """Return coarse maps, float32 `[n h w]`, or None where none are stored."""
        columns = self._rows.layers[layer].coarse
        if columns is None:
            return None
        maps, scales = (self.array(column) for column in columns)
        if not np.isfinite(scales).all():
            raise broken(self._rows.root, columns[1].file, "holds a NaN or an infinity")
        return maps * (scales[:, None, None] / np.float32(255))

    def array(self, column: Column) -> np.ndarray:
        """Return rows of a column, `[n ...]`; zeros where a part lacks it."""
        file = column.file
        if len(self._pieces) == 1:
            part, _, rows = self._pieces[0]
            if file in part.arrays:
                only: np.ndarray = part.arrays[file][rows]
                return only
        values = np.zeros((len(self), *column.shape), column.dtype)
        for part, where, rows in self._pieces:
            if file in part.arrays:
                values[where] = part.arrays[file][rows]
        return values

    def _strings(self, kind: str) -> list[str]:
        strings = [""] * len(self)
        for part, where, rows in self._pieces:
            table: StringTable = getattr(part, kind)
            for slot, text in zip(_slots(where, rows), table.take(rows), strict=True):
                strings[slot] = text
        return strings


def _slots(where: np.ndarray | slice, rows: np.ndarray) -> Sequence[int]:
    slots: Sequence[int] = range(len(rows)) if isinstance(where, slice) else where.tolist()
    return slots


class Strings(Sequence[T_co], Generic[T_co]):
    """One string (or None) for every position: `s[7]`, `s[2:5]`, `s[array([3, 1])]`."""

    def __init__(self, rows: Rows, kind: str) -> None:
        self._rows, self._kind = rows, kind

    def __len__(self) -> int:
        return int(self._rows.starts[-1])

    def _lookup(self, positions: np.ndarray) -> list[T_co]:
        strings: list[T_co] = getattr(Selection(self._rows, positions), self._kind)
        return strings

    @overload
    def __getitem__(self, where: int) -> T_co: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[T_co]: ...

    def __getitem__(self, where: int | slice | np.ndarray | list[int]) -> T_co | list[T_co]:
        total = len(self)
        if isinstance(where, slice):
            return self._lookup(np.arange(*where.indices(total)))
        if isinstance(where, (int, np.integer)):
            row = int(where) + total if where < 0 else int(where)
            if not 0 <= row < total:
                raise IndexError(f"position {where} of an index of {total} rows")
            return self._lookup(np.array([row]))[0]
        return self._lookup(check_positions(where, total))

    def __iter__(self) -> Iterator[T_co]:
        for start in range(0, len(self), _RUN):
            yield from self._lookup(np.arange(start, min(start + _RUN, len(self))))

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"
