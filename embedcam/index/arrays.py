"""Raw arrays and strings as files: written durably with a checksum, mapped once sizes fit."""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .._checks import UNIT_TOLERANCE, wrong_number
from .._files import NotPlain, fresh, open_regular
from ..errors import IndexFormatError, InputError

if TYPE_CHECKING:
    from .manifest import FileEntry

SUFFIXES = {
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "int32": "i32",
    "int64": "i64",
}
BLOCK_BYTES = 16 << 20
_RESTORE = "restore it from a copy, or build the index again"
_FEW = 100


class ArrayLike(Protocol):
    """What can be streamed to disk: an array, a memory map, or rows gathered on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

    def __getitem__(self, rows: Any) -> Any: ...


def broken(root: Path, name: str, what: str, remedy: str = _RESTORE) -> IndexFormatError:
    """Return the error about a file that cannot be believed."""
    return IndexFormatError(f"{root / name}: {what}; {remedy}")


def file_name(stem: str, dtype: str) -> str:
    """Return `layer0.codes.f16` for `layer0.codes` and `float16`."""
    return f"{stem}.{SUFFIXES[dtype]}"


def block_rows(array: ArrayLike) -> int:
    """Return how many rows make a piece of about 16 MiB, at least 1."""
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def blocks(array: ArrayLike) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows) in pieces of at most about 16 MiB."""
    step = block_rows(array)
    for start in range(0, array.shape[0], step):
        yield start, np.asarray(array[start : start + step])


def write_array(
    folder: Path,
    name: str,
    array: ArrayLike,
    dtype: str,
    wrong: Callable[[np.ndarray], str | None] | None = None,
) -> dict[str, Any]:
    """Stream an array to a new file, sync it, and return its entry for the manifest.

    Values are cast to `dtype`; `wrong` says of each stored block what is wrong with it, or None.
    """
    digest, written = hashlib.sha256(), 0
    stored = np.dtype(dtype).newbyteorder("<")
    with fresh(folder / name) as file:
        for start, block in blocks(array):
            block = _cast(name, block, stored)
            if wrong is not None and (what := wrong(block)) is not None:
                raise InputError(f"{name}, rows from {start} on: {what}")
            if block.size:
                file.write(block.data)
                digest.update(block.data)
                written += block.nbytes
    shape = [int(n) for n in array.shape]
    return {"dtype": dtype, "shape": shape, "bytes": written, "sha256": digest.hexdigest()}


def _cast(name: str, block: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    if stored.kind in "iu" and block.dtype != stored and block.size:
        limits = np.iinfo(stored)
        if block.dtype.kind not in "iu" or block.min() < limits.min or block.max() > limits.max:
            raise InputError(f"{name}: values of type {block.dtype} do not fit {stored.name}")
    # An overflow of a narrower float shows up in the caller's check as an infinity.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(block, dtype=stored)


def open_checked(root: Path, name: str, size: int, remedy: str = _RESTORE) -> int:
    """Return a descriptor of a regular file of exactly `size` bytes inside `root`.

    Raises `FileNotFoundError` where it is missing: a reader may have lost a race to `compact`.
    """
    try:
        descriptor = open_regular(root, name)
    except FileNotFoundError:
        raise
    except NotPlain as error:
        raise broken(root, name, str(error), remedy) from error
    except OSError as error:
        raise broken(root, name, f"cannot be read ({error.strerror})", remedy) from error
    actual = os.fstat(descriptor).st_size
    if actual != size:
        os.close(descriptor)
        cut = "truncated to" if actual < size else "too long with"
        what = f"{cut} {actual} bytes where the manifest says {size}"
        raise broken(root, name, what, remedy)
    return descriptor


def map_array(root: Path, name: str, entry: "FileEntry") -> np.ndarray:
    """Map a file read-only."""
    descriptor = open_checked(root, name, entry.bytes)
    try:
        dtype = np.dtype(entry.dtype).newbyteorder("<")
        if entry.bytes == 0:
            return np.empty(entry.shape, dtype)
        mapped = mmap.mmap(descriptor, entry.bytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, dtype).reshape(entry.shape)


def sha256_of(content: np.ndarray | int, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a mapped array's bytes, or of an open file from its beginning."""
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
        if progress is not None:
            progress(len(piece))
    return digest.hexdigest()


def _pieces(content: np.ndarray | int) -> Iterator[Any]:
    if isinstance(content, int):
        offset = 0
        while piece := os.pread(content, BLOCK_BYTES, offset):
            offset += len(piece)
            yield piece
    elif content.size:
        flat = content.reshape(-1).view(np.uint8)
        yield from (flat[i : i + BLOCK_BYTES].data for i in range(0, len(flat), BLOCK_BYTES))


# What values must be: checked before they are written, and again by `verify`


@dataclass(frozen=True)
class Column:
    """An array kept for each image: its file, the type and shape of a row, what is wrong with it.

    `empty` is the column of no images; `wrong` takes stored rows and returns a sentence or None.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    empty: np.ndarray
    wrong: Callable[[np.ndarray], str | None] | None = None

    @classmethod
    def of(
        cls,
        stem: str,
        dtype: str,
        shape: tuple[int, ...] = (),
        wrong: Callable[[np.ndarray], str | None] | None = None,
    ) -> "Column":
        """Return the column whose file has this stem."""
        return cls(file_name(stem, dtype), dtype, shape, np.empty((0, *shape), dtype), wrong)


def wrong_embeddings(block: np.ndarray, normalized: bool) -> str | None:
    """Return what is wrong with embeddings `[b D]`, or None."""
    wrong = wrong_number(block)
    if wrong is not None:
        return f"row {wrong[0]} {wrong[1]}"
    if normalized:
        norms = np.linalg.norm(block.astype(np.float64), axis=1)
        bad = _first(np.abs(norms - 1) > UNIT_TOLERANCE)
        if bad is not None:
            return f"row {bad} has length {norms[bad]:.6g} where unit vectors are promised"
    return None


def wrong_channels(block: np.ndarray, n_channels: int) -> str | None:
    """Return what is wrong with channel numbers `[b M]`, which are distinct, or None."""
    # Sorting by row shows repeats as equal neighbors.
    ordered = np.sort(block.astype(np.int64), axis=1)
    bad = _first(ordered[:, -1] >= n_channels)
    if bad is not None:
        return f"row {bad} names channel {ordered[bad, -1]} of {n_channels}"
    bad = _first((np.diff(ordered, axis=1) == 0).any(axis=1))
    return None if bad is None else f"row {bad} names a channel twice"


def wrong_values(block: np.ndarray) -> str | None:
    """Return what is wrong with numbers that must be finite, or None."""
    if block.dtype.kind != "f":
        return None
    bad = _first(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
    return None if bad is None else f"row {bad} holds a NaN or an infinity"


def wrong_scales(block: np.ndarray) -> str | None:
    """Return what is wrong with scales, which are finite and not negative, or None."""
    bad = _first(~(np.isfinite(block) & (block >= 0)))
    return None if bad is None else f"row {bad} has the scale {block[bad]}"


def _first(mask: np.ndarray) -> int | None:
    where = np.flatnonzero(mask)
    return int(where[0]) if len(where) else None


# Strings


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


def check_row(row: int, high: int) -> int:
    """Return a row number read from a file, refused where it leads outside."""
    if not 0 <= row < high:
        raise IndexFormatError(
            f"the index refers to row {row} of {high} in its strings; run `embedcam verify`, and "
            "restore the file that it names"
        )
    return row


def check_positions(positions: object, total: int) -> np.ndarray:
    """Return positions as int64 `[n]`, refused unless whole numbers of an index of `total` rows."""
    rows = np.asarray(positions)
    if rows.size == 0:
        return np.empty(0, np.int64)
    if rows.ndim == 1 and rows.dtype == np.int64 and len(rows) <= _FEW:
        # A query's handful: Python compares it sooner than NumPy's reductions are set up.
        few = rows.tolist()
        if min(few) >= 0 and max(few) < total:
            return rows
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise InputError(
            f"positions of shape {list(rows.shape)} and type {rows.dtype}; expected whole "
            "numbers [n]"
        )
    if rows.min() < 0 or rows.max() >= total:
        bad = rows[(rows < 0) | (rows >= total)][0]
        raise InputError(f"position {bad} is outside the index, which has rows 0 to {total - 1}")
    return rows.astype(np.int64)
