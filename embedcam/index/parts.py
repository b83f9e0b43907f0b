"""Rows and fitted arrays to be written: checked, streamed into a new folder, renamed into view."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from .._files import UNFINISHED, replace, sync_folder
from ..errors import InputError
from ..images.progress import SILENT, Advance, Stage, in_passes
from ..images.texts import LabelColumn, Texts, first_twice, in_runs, sorted_order
from .arrays import SUFFIXES, ArrayLike, Check, Column, file_name, write_array
from .reader import Index
from .records import Json
from .rows import MARKS, IndexRows, order_dtype

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

    def arrays(self, columns: Mapping[str, Column]) -> dict[str, ArrayLike]:
        """Return the arrays by the names of an index's columns, refused where they do not fit."""
        arrays = {"embeddings": self.embeddings, "triplets_used": self.triplets_used}
        if self.marks is not None:
            arrays[MARKS] = self.marks
        for n, fields in enumerate(self.fields):
            arrays |= {f"layer{n}.{name}": array for name, array in fields.items()}
        for n, coarse in enumerate(self.coarse):
            if coarse is not None:
                arrays |= {f"layer{n}.coarse": coarse[0], f"layer{n}.coarse_scales": coarse[1]}
        if lacking := sorted(columns.keys() - arrays.keys() - {MARKS}):
            raise InputError(f"the part lacks {lacking}, which the index keeps")
        if unknown := sorted(arrays.keys() - columns.keys()):
            raise InputError(f"the part has {unknown}; the index keeps {sorted(columns)}")
        shapes = {name: ([*one.shape], columns[name].shape) for name, one in arrays.items()}
        shapes |= {"labels": ([len(self.labels)], ()), "paths": ([len(self.paths)], ())}
        for name, (shape, of_row) in shapes.items():
            if shape != (expected := [len(self), *of_row]):
                raise InputError(f"{name} has the shape {shape}; expected {expected} for these ids")
        return arrays


def check_ids(ids: Sequence[str]) -> None:
    """Refuse ids that are empty, no strings, or given twice."""
    for row, text in enumerate(ids):
        if not isinstance(text, str) or not text:
            raise InputError(f"id {row} is {text!r}; an id is a string that is not empty")
    if (twice := first_twice(ids)) is not None:
        raise InputError(f"the id {ids[twice[0]]!r} is given twice; ids must be unique")


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


def parts_to_keep(index: Index, new_rows: int) -> int:
    """Return how many leading parts stay; the others are rewritten together with the new rows."""
    # Sizes then fall by more than JOIN_FACTOR from part to part: their number, and the maps that a
    # reader holds, grow with the logarithm of the images.
    kept, size = len(index.parts), new_rows
    while kept > 1 and index.parts[kept - 1].count <= JOIN_FACTOR * size:
        kept -= 1
        size += index.parts[kept].count
    return kept


class _Folder:
    """A folder of arrays that never change, written under another name until it is whole."""

    def __init__(self, root: Path, directory: str) -> None:
        self.root, self.directory, self.files = root, directory, Json()
        self.folder = (root / directory).with_suffix(UNFINISHED)
        self.folder.mkdir(parents=True)

    def put(
        self,
        name: str,
        array: ArrayLike,
        dtype: str,
        wrong: Check | None = None,
        progressed: Advance = lambda _: None,
    ) -> None:
        self.files[name] = write_array(self.folder, name, array, dtype, wrong, progressed)

    def put_strings(self, stem: str, strings: Iterable[str]) -> Texts:
        """Write texts, and return them."""

        def checked() -> Iterator[str]:
            for row, text in enumerate(strings):
                if not isinstance(text, str):
                    raise InputError(f"{stem[:-1]} {row} is {text!r}; expected a string")
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"{stem[:-1]} {row}, {text!r}, has no UTF-8 form; rename the file, or give "
                        "other names"
                    ) from error
                yield text

        texts = Texts.of(checked())
        self.put(f"{stem}.utf8", texts.blob, "uint8")
        self.put(f"{stem}.offsets.u64", texts.offsets, "uint64")
        return texts

    def entry(self) -> Json:
        """Put the folder in place, durably, and return its entry for the manifest."""
        sync_folder(self.folder)
        replace(self.folder, self.root / self.directory)
        sync_folder(self.root)
        return {"directory": self.directory, "files": self.files}


def write_rows(
    root: Path,
    generation: int,
    new: PartData | None,
    columns: Mapping[str, Column],
    old: tuple[Index, np.ndarray] | None = None,
    stage: Stage = SILENT,
) -> Json:
    """Write rows of an `old` index, and behind them new ones, as one part; return its entry."""
    n_rows = (0 if new is None else len(new)) + (0 if old is None else len(old[1]))
    arrays = {} if new is None else new.arrays(columns)
    ids: Iterable[str] = () if new is None else new.ids
    paths: Iterable[str] = () if new is None else new.paths
    labels: Iterable[str | None] = () if new is None else new.labels
    if old is not None:
        index, positions = old
        if index.marked and new is not None:
            arrays.setdefault(MARKS, np.zeros((len(new), 4), np.uint32))
        arrays = {
            name: IndexRows(index, positions, column, arrays.get(name))
            for name, column in columns.items()
            if name != MARKS or MARKS in arrays or index.marked
        }
        ids = chain(in_runs(index.ids, positions), ids)
        paths = chain(in_runs(index.paths, positions), paths)
        labels = chain(in_runs(index.labels, positions), labels)
    folder = _Folder(root, f"parts/{generation:06d}")
    with stage("write", n_rows) as progressed:
        written = folder.put_strings("ids", ids)
        # Equal ids (one of them removed) stay in the order of their rows.
        order, dtype = sorted_order(written), order_dtype(len(written))
        folder.put(file_name("ids.order", dtype), order.astype(dtype), dtype)
        folder.put_strings("paths", paths)
        try:  # code points sort as their UTF-8 bytes do
            known = LabelColumn.of(labels).sorted()
        except TypeError as error:
            raise InputError("labels must be strings or None") from error
        folder.put_strings("labels", known.names)
        folder.put("labels.codes.i32", known.codes, "int32")
        each = in_passes(progressed, sum(columns[name].row_bytes for name in arrays))
        for name, array in arrays.items():
            column = columns[name]
            folder.put(column.file, array, column.dtype, column.wrong, each)
        return {**folder.entry(), "count": len(written)}


def write_fitted(root: Path, generation: int, fitted: Sequence[Arrays], shared: Arrays) -> Json:
    """Write what is fitted once, by layer and for all, durably; return the manifest's entry."""
    folder = _Folder(root, f"fitted/{generation:06d}")
    groups = [*((f"layer{n}.", arrays) for n, arrays in enumerate(fitted)), ("", shared)]
    for stem, name, array in ((stem, *one) for stem, arrays in groups for one in arrays.items()):
        if not re.fullmatch(r"(?!coarse(_scales)?$)[a-z][a-z0-9_]*", name):
            raise InputError(f"a fitted array cannot be named {name!r}; use lower-case words")
        array = np.atleast_1d(np.asarray(array))
        dtype = array.dtype.name
        if dtype not in SUFFIXES or not np.isfinite(array).all():
            raise InputError(f"fitted {name!r} of type {dtype} must hold finite numbers")
        folder.put(file_name(f"{stem}{name}", dtype), array, dtype)
    return folder.entry()
