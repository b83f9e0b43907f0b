"""Parts: the rows of an index. `PartData` is one to be written, `Part` one that is mapped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._files import UNFINISHED, replace, sync_folder
from ..errors import InputError
from .content import wrong_embeddings, wrong_field, wrong_scales
from .files import ArrayLike, Entry, file_name, write_array
from .layout import MARKS, STRINGS, Layer, map_part, order_dtype
from .strings import StringTable, check_row, encode_strings

Coarse = tuple[ArrayLike, ArrayLike]


@dataclass
class PartData:
    """Rows to be written; every array may be a memory map and is read in blocks.

    Args:
        ids: n different strings.
        labels: n strings or None.
        paths: n strings.
        embeddings: float32 `[n D]`.
        triplets_used: uint32 `[n]`.
        fields: for each layer, the encoding's rows (`Encoding.encode`).
        coarse: for each layer, bytes `[n h w]` and scales `[n]` (`quantize_coarse`), or None.
        marks: of the images' files, uint32 `[n 4]`, zeros for what is no file; or None.
    """

    ids: Sequence[str]
    labels: Sequence[str | None]
    paths: Sequence[str]
    embeddings: ArrayLike
    triplets_used: np.ndarray
    fields: Sequence[Mapping[str, ArrayLike]]
    coarse: Sequence[Coarse | None] = field(default_factory=lambda: [None])
    marks: ArrayLike | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Gathered:
    """Rows of several sources one after the other, fetched when they are sliced."""

    def __init__(
        self, sources: Sequence[tuple[int, Callable[[slice], np.ndarray]]], like: ArrayLike
    ) -> None:
        self._sources = [s for s in sources if s[0]]
        self.shape = (sum(n for n, _ in self._sources), *like.shape[1:])
        self.dtype = like.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        pieces, first = [np.empty((0, *self.shape[1:]), self.dtype)], 0
        for count, fetch in self._sources:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                pieces.append(fetch(slice(low, high)))
            first += count
        return np.concatenate(pieces)


class Part:
    """One mapped part; `arrays` maps file names to arrays."""

    def __init__(self, root: Path, entry: Mapping[str, Any], width: int, layers: list[Layer]):
        self.directory, self.count = str(entry["directory"]), int(entry["count"])
        self.arrays = map_part(root, entry, width, layers)
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
        """Rows with this id, removed ones included, in rising order."""
        rows, at = [], self.ids.bisect(self.order, key)
        while at < self.count and self.ids.raw(row := self._row(at)) == key:
            rows.append(row)
            at += 1
        return rows

    def neighbours(self, key: bytes, reach: int) -> list[str]:
        """Ids around the place where `key` would stand."""
        at = self.ids.bisect(self.order, key)
        around = range(max(0, at - reach), min(self.count, at + reach))
        return [self.ids[self._row(i)] for i in around]

    def _row(self, at: int) -> int:
        """The row that stands at a place of the sorted order."""
        return check_row(int(self.order[at]), self.count)


def quantize_coarse(cams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coarse maps as bytes.

    Args:
        cams: `[n h w]`, not negative.

    Returns:
        bytes uint8 `[n h w]` and scales float32 `[n]` (each map's maximum), so that
        `bytes * scale / 255` is the map to 1/510 of its maximum; a map of zeros stays one.

    Raises:
        InputError: a negative or non-finite value.
    """
    cams = np.asarray(cams, np.float32)
    if cams.ndim != 3 or not np.isfinite(cams).all() or (cams < 0).any():
        raise InputError(
            f"coarse maps of shape {list(cams.shape)} must be [n h w], finite and not negative"
        )
    scales = cams.max(axis=(1, 2), initial=0)
    safe = np.where(scales > 0, scales, 1)[:, None, None]
    return np.rint(cams.astype(np.float64) / safe * 255).astype(np.uint8), scales


def write_part(
    root: Path, generation: int, part: PartData, width: int, normalized: bool, layers: list[Layer]
) -> dict[str, Any]:
    """Write a part, durably, and return its entry for the manifest.

    Raises:
        InputError: arrays of the wrong shape, or values that the format forbids.
    """
    check_shapes(part, width, layers)
    directory = f"parts/{generation:06d}"
    final = root / directory
    folder = final.with_suffix(UNFINISHED)
    folder.mkdir(parents=True)
    files: dict[str, Entry] = {}

    def put(name: str, array: ArrayLike, dtype: str, wrong: Any = None) -> None:
        def check(start: int, block: np.ndarray) -> None:
            if wrong is not None and (what := wrong(block)) is not None:
                raise InputError(f"{name}, rows from {start} on: {what}")

        files[name] = write_array(folder, name, array, dtype, check)

    put("embeddings.f32", part.embeddings, "float32", lambda b: wrong_embeddings(b, normalized))
    put("triplets_used.u32", part.triplets_used, "uint32")
    if part.marks is not None:
        put(MARKS, part.marks, "uint32")
    for layer, fields, coarse in zip(layers, part.fields, part.coarse, strict=True):
        for name in layer.encoding.fields:
            put(
                layer.file(name),
                fields[name],
                layer.encoding.fields[name].dtype,
                partial(wrong_field, layer, name),
            )
        if coarse is not None:
            maps, scales = layer.coarse_files
            put(maps, coarse[0], "uint8")
            put(scales, coarse[1], "float32", wrong_scales)
    _put_strings(part, put)
    sync_folder(folder)
    replace(folder, final)
    sync_folder(root)
    return {"directory": directory, "count": len(part), "files": files}


def _put_strings(part: PartData, put: Callable[[str, ArrayLike, str], None]) -> None:
    def table(stem: str, strings: Sequence[str]) -> None:
        blob, offsets = encode_strings(strings, stem[:-1])
        put(f"{stem}.utf8", blob, "uint8")
        put(f"{stem}.offsets.u64", offsets, "uint64")

    ids = [i.encode("utf-8", "replace") if isinstance(i, str) else b"?" for i in part.ids]
    # `sorted` is stable, so equal ids (one of them removed) stay in the order of their rows.
    order = order_dtype(len(ids))
    permutation = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=order)
    table("ids", part.ids)
    put(file_name("ids.order", order), permutation, order)
    table("paths", part.paths)
    known = {label for label in part.labels if label is not None}
    # Code points sort as their UTF-8 bytes do.
    try:
        vocabulary = sorted(known)
    except TypeError as error:
        raise InputError("labels must be strings or None") from error
    table("labels", vocabulary)
    code_of: dict[str | None, int] = {label: code for code, label in enumerate(vocabulary)}
    code_of[None] = -1
    put("labels.codes.i32", np.array([code_of[x] for x in part.labels], np.int32), "int32")


def check_shapes(part: PartData, width: int, layers: list[Layer]) -> None:
    """Refuse a part whose arrays do not fit each other or the index."""
    n = len(part)

    def need(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(shape) != expected:
            raise InputError(
                f"{what} has the shape {list(shape)}; expected {list(expected)} for {n} ids"
            )

    need("labels", (len(part.labels),), (n,))
    need("paths", (len(part.paths),), (n,))
    need("embeddings", part.embeddings.shape, (n, width))
    need("triplets_used", part.triplets_used.shape, (n,))
    if part.marks is not None:
        need("marks", part.marks.shape, (n, 4))
    if len(part.fields) != len(layers) or len(part.coarse) != len(layers):
        raise InputError(
            f"the part has fields for {len(part.fields)} layers and coarse maps for "
            f"{len(part.coarse)}; the index has {len(layers)} layers"
        )
    for layer, fields, coarse in zip(layers, part.fields, part.coarse, strict=True):
        expected = layer.encoding.fields
        if fields.keys() != expected.keys():
            raise InputError(
                f"layer {layer.name!r} has the fields {sorted(fields)}; its encoding "
                f"({layer.encoding.name}) keeps {sorted(expected)}"
            )
        for name, kind in expected.items():
            need(layer.stem(name), fields[name].shape, (n, *kind.shape))
        if (coarse is None) != (layer.coarse_grid is None):
            raise InputError(
                f"layer {layer.name!r} {'lacks' if coarse is None else 'has'} coarse maps, and its "
                f"coarse_grid is {layer.coarse_grid}"
            )
        if coarse is not None and layer.coarse_grid is not None:
            need(layer.stem("coarse"), coarse[0].shape, (n, *layer.coarse_grid))
            need(layer.stem("coarse_scales"), coarse[1].shape, (n,))


def check_ids(ids: Sequence[str]) -> None:
    """Refuse ids that are empty, no strings, or given twice."""
    seen: set[str] = set()
    for row, text in enumerate(ids):
        if not isinstance(text, str) or not text:
            raise InputError(f"id {row} is {text!r}; an id is a string that is not empty")
        if text in seen:
            raise InputError(f"the id {text!r} is given twice; ids must be unique")
        seen.add(text)
