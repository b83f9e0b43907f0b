"""Rows and fitted arrays to be written: checked, streamed into a new folder, renamed into view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._files import UNFINISHED, replace, sync_folder
from ..errors import InputError
from .arrays import SUFFIXES, ArrayLike, Column, file_name, write_array
from .reader import Index
from .rows import MARKS, Layer, order_dtype

Arrays = Mapping[str, np.ndarray]
Coarse = tuple[ArrayLike, ArrayLike]
JOIN_FACTOR = 4
"""A new part takes in the parts before it that are not more than this many times larger."""


@dataclass
class PartData:
    """Rows to be written; every array may be a memory map and is read in blocks.

    Parameters
    ----------
    ids : n different strings.
    labels : n strings or None.
    paths : n strings.
    embeddings : float32 `[n D]`.
    triplets_used : uint32 `[n]`.
    fields : for each layer, the encoding's rows (`Encoding.encode`).
    coarse : for each layer, bytes `[n h w]` and scales `[n]` (`quantize_coarse`), or None.
    marks : of the images' files, uint32 `[n 4]`, zeros for what is no file; or None.
    """

    ids: Sequence[str]
    labels: Sequence[str | None]
    paths: Sequence[str]
    embeddings: ArrayLike
    triplets_used: ArrayLike
    fields: Sequence[Mapping[str, ArrayLike]]
    coarse: Sequence[Coarse | None] = field(default_factory=lambda: [None])
    marks: ArrayLike | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def columns(self, layers: Sequence[Layer]) -> dict[str, ArrayLike]:
        """Return the arrays by the names of an index's columns, refused where they do not fit."""
        if len(self.fields) != len(layers) or len(self.coarse) != len(layers):
            raise InputError(
                f"the part has fields for {len(self.fields)} layers and coarse maps for "
                f"{len(self.coarse)}; the index has {len(layers)} layers"
            )
        columns = {"embeddings": self.embeddings, "triplets_used": self.triplets_used}
        if self.marks is not None:
            columns[MARKS] = self.marks
        for layer, fields, coarse in zip(layers, self.fields, self.coarse, strict=True):
            if fields.keys() != layer.fields.keys():
                raise InputError(
                    f"layer {layer.name!r} has the fields {sorted(fields)}; its encoding "
                    f"({layer.encoding.name}) keeps {sorted(layer.fields)}"
                )
            if (coarse is None) != (layer.coarse is None):
                raise InputError(
                    f"layer {layer.name!r} {'lacks' if coarse is None else 'has'} coarse maps, and "
                    f"its coarse_grid is {layer.coarse_grid}"
                )
            columns |= {f"layer{layer.number}.{name}": array for name, array in fields.items()}
            if coarse is not None:
                columns[f"layer{layer.number}.coarse"] = coarse[0]
                columns[f"layer{layer.number}.coarse_scales"] = coarse[1]
        return columns


def check_ids(ids: Sequence[str]) -> None:
    """Refuse ids that are empty, no strings, or given twice."""
    seen: set[str] = set()
    for row, text in enumerate(ids):
        if not isinstance(text, str) or not text:
            raise InputError(f"id {row} is {text!r}; an id is a string that is not empty")
        if text in seen:
            raise InputError(f"the id {text!r} is given twice; ids must be unique")
        seen.add(text)


def quantize_coarse(cams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coarse maps `[n h w]`, not negative, as bytes `[n h w]` and scales float32 `[n]`.

    Scales are each map's maximum, so that `bytes * scale / 255` is the map to 1/510 of its maximum.
    """
    cams = np.asarray(cams, np.float32)
    if cams.ndim != 3 or not np.isfinite(cams).all() or (cams < 0).any():
        raise InputError(
            f"coarse maps of shape {list(cams.shape)} must be [n h w], finite and not negative"
        )
    scales = cams.max(axis=(1, 2), initial=0)
    safe = np.where(scales > 0, scales, 1)[:, None, None]
    return np.rint(cams.astype(np.float64) / safe * 255).astype(np.uint8), scales


class _Chained:
    """Rows of an index and new ones behind them, fetched when they are sliced."""

    def __init__(
        self, index: Index, positions: np.ndarray, column: Column, new: ArrayLike | None
    ) -> None:
        self._index, self._positions, self._column, self._new = index, positions, column, new
        n_new = 0 if new is None else new.shape[0]
        self.shape = (len(positions) + n_new, *column.shape)
        self.dtype = np.dtype(column.dtype)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        n_old = len(self._positions)
        old = self._index.select(self._positions[start:stop]).array(self._column)
        if self._new is None or stop <= n_old:
            return old
        new = np.asarray(self._new[max(start - n_old, 0) : stop - n_old])
        return np.concatenate([old, new]) if len(old) else new


def parts_to_keep(index: Index, new_rows: int) -> int:
    """Return how many leading parts stay; the others are rewritten together with the new rows."""
    # Sizes then fall by more than JOIN_FACTOR from part to part: their number, and the maps that a
    # reader holds, grow with the logarithm of the images.
    kept, size = len(index.parts), new_rows
    while kept > 1 and index.parts[kept - 1].count <= JOIN_FACTOR * size:
        kept -= 1
        size += index.parts[kept].count
    return kept


def write_rows(
    root: Path, generation: int, index: Index, positions: np.ndarray, new: PartData | None
) -> dict[str, Any]:
    """Write rows of an index, and behind them new ones, as one part; return its entry."""
    extra = {} if new is None else _checked(new, index.columns, index.layers)
    if new is not None and index.marked:
        extra.setdefault(MARKS, np.zeros((len(new), 4), np.uint32))
    columns = {
        name: _Chained(index, positions, column, extra.get(name))
        for name, column in index.columns.items()
        if name != MARKS or MARKS in extra or index.marked
    }
    old = index.select(positions)
    strings = (old.ids, old.paths, old.labels)
    if new is not None:
        strings = ([*old.ids, *new.ids], [*old.paths, *new.paths], [*old.labels, *new.labels])
    return _write_part(root, generation, *strings, columns, index.columns)


def write_part(
    root: Path,
    generation: int,
    part: PartData,
    columns: Mapping[str, Column],
    layers: Sequence[Layer],
) -> dict[str, Any]:
    """Write a part, durably, and return its entry for the manifest."""
    arrays = _checked(part, columns, layers)
    return _write_part(root, generation, part.ids, part.paths, part.labels, arrays, columns)


def _checked(
    part: PartData, columns: Mapping[str, Column], layers: Sequence[Layer]
) -> dict[str, ArrayLike]:
    """Return the arrays of a part by column, refused where their shapes do not fit."""
    n, arrays = len(part), part.columns(layers)
    shapes: dict[str, tuple[list[int], list[int]]] = {
        "labels": ([len(part.labels)], [n]),
        "paths": ([len(part.paths)], [n]),
    }
    shapes |= {name: ([*one.shape], [n, *columns[name].shape]) for name, one in arrays.items()}
    for name, (shape, expected) in shapes.items():
        if shape != expected:
            raise InputError(f"{name} has the shape {shape}; expected {expected} for {n} ids")
    return arrays


def _write_part(
    root: Path,
    generation: int,
    ids: Sequence[str],
    paths: Sequence[str],
    labels: Sequence[str | None],
    arrays: Mapping[str, ArrayLike],
    columns: Mapping[str, Column],
) -> dict[str, Any]:
    directory = f"parts/{generation:06d}"
    folder = (root / directory).with_suffix(UNFINISHED)
    folder.mkdir(parents=True)
    files: dict[str, Any] = {}
    for name, array in arrays.items():
        column = columns[name]
        files[column.file] = write_array(folder, column.file, array, column.dtype, column.wrong)

    def put(name: str, array: np.ndarray) -> None:
        files[name] = write_array(folder, name, array, array.dtype.name)

    raw = [one.encode("utf-8", "replace") if isinstance(one, str) else b"?" for one in ids]
    # `sorted` is stable, so equal ids (one of them removed) stay in the order of their rows.
    dtype = order_dtype(len(raw))
    order = sorted(range(len(raw)), key=raw.__getitem__)
    put(file_name("ids.order", dtype), np.array(order, dtype))
    try:  # code points sort as their UTF-8 bytes do
        vocabulary = sorted({label for label in labels if label is not None})
    except TypeError as error:
        raise InputError("labels must be strings or None") from error
    for stem, strings in (("ids", ids), ("paths", paths), ("labels", vocabulary)):
        blob, offsets = encode_strings(strings, stem[:-1])
        put(f"{stem}.utf8", blob)
        put(f"{stem}.offsets.u64", offsets)
    codes: dict[str | None, int] = {label: code for code, label in enumerate(vocabulary)}
    codes[None] = -1
    put("labels.codes.i32", np.array([codes[label] for label in labels], np.int32))
    _in_view(root, folder, directory)
    return {"directory": directory, "count": len(raw), "files": files}


def encode_strings(strings: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a blob uint8 `[bytes]` and offsets uint64 `[n+1]`."""
    raw = []
    for row, text in enumerate(strings):
        if not isinstance(text, str):
            raise InputError(f"{what} {row} is {text!r}; expected a string")
        try:
            raw.append(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what} {row}, {text!r}, has no UTF-8 form; rename the file, or give other names"
            ) from error
    offsets = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum([len(one) for one in raw], out=offsets[1:], dtype=np.uint64)
    return np.frombuffer(b"".join(raw), np.uint8), offsets


def write_fitted(
    root: Path, generation: int, fitted: Sequence[Arrays], shared: Arrays
) -> dict[str, Any]:
    """Write what is fitted once, by layer and for all, durably; return the manifest's entry."""
    directory = f"fitted/{generation:06d}"
    folder = (root / directory).with_suffix(UNFINISHED)
    folder.mkdir(parents=True)
    files = {}
    groups = [(f"layer{n}.", arrays) for n, arrays in enumerate(fitted)] + [("", shared)]
    for stem, arrays in groups:
        for name, array in arrays.items():
            is_word = name.isascii() and name[:1].isalpha() and name.replace("_", "").isalnum()
            if not is_word or name != name.lower() or name in ("coarse", "coarse_scales"):
                raise InputError(f"a fitted array cannot be named {name!r}; use lower-case words")
            array = np.atleast_1d(np.asarray(array))
            dtype = array.dtype.name
            if dtype not in SUFFIXES or not np.isfinite(array).all():
                raise InputError(f"fitted {name!r} of type {dtype} must hold finite numbers")
            file = file_name(f"{stem}{name}", dtype)
            files[file] = write_array(folder, file, array, dtype)
    _in_view(root, folder, directory)
    return {"directory": directory, "files": files}


def _in_view(root: Path, folder: Path, directory: str) -> None:
    sync_folder(folder)
    replace(folder, root / directory)
    sync_folder(root)
