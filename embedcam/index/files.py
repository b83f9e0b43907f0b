"""Raw arrays as files: written durably with their checksum, mapped after their size is checked."""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._files import NotPlain, fresh, open_regular
from .._files import replace as replace
from ..errors import IndexFormatError, InputError

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
Entry = dict[str, Any]
"""A file's line in the manifest: dtype, shape, bytes, sha256."""


class ArrayLike(Protocol):
    """What can be streamed to disk: an array, a memory map, or rows gathered on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

    def __getitem__(self, rows: Any) -> Any: ...


def broken(root: Path, name: str, what: str, remedy: str = _RESTORE) -> IndexFormatError:
    """The one sentence about a file that cannot be believed."""
    return IndexFormatError(f"{root / name}: {what}; {remedy}")


def file_name(stem: str, dtype: str) -> str:
    """`layer0.codes`, `float16` -> `layer0.codes.f16`."""
    return f"{stem}.{SUFFIXES[dtype]}"


def blocks(array: ArrayLike) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) in pieces of at most about 16 MiB."""
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, array.shape[0], step):
        yield start, np.asarray(array[start : start + step])


def write_array(
    folder: Path,
    name: str,
    array: ArrayLike,
    dtype: str,
    check: Callable[[int, np.ndarray], None] | None = None,
) -> Entry:
    """Stream an array to a new file, sync it, and return its line for the manifest.

    Args:
        folder: where; the caller renames the folder into view.
        name: of the file.
        array: `[n ...]`, read in blocks.
        dtype: stored type; values are cast to it.
        check: called with (first row, stored block); raises to refuse it.
    """
    digest, written = hashlib.sha256(), 0
    stored = np.dtype(dtype).newbyteorder("<")
    with fresh(folder / name) as file:
        for start, block in blocks(array):
            block = _cast(name, block, stored)
            if check is not None:
                check(start, block)
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
    """A descriptor of a regular file of exactly `size` bytes inside `root`.

    Raises:
        FileNotFoundError: it is missing (a reader may have lost a race to `compact`).
        IndexFormatError: it is something else than a plain file of that size.
    """
    try:
        descriptor = open_regular(root, name)
    except FileNotFoundError:
        raise
    except NotPlain as error:
        raise broken(root, name, str(error), remedy) from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise broken(root, name, what, remedy) from error
    found = os.fstat(descriptor).st_size
    if found != size:
        os.close(descriptor)
        cut = "truncated to" if found < size else "too long with"
        what = f"{cut} {found} bytes where the manifest says {size}"
        raise broken(root, name, what, remedy)
    return descriptor


def map_array(root: Path, name: str, entry: Entry) -> np.ndarray:
    """Map a file read-only; its entry has been checked (`records.FileEntry`)."""
    descriptor = open_checked(root, name, entry["bytes"])
    try:
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        if entry["bytes"] == 0:
            return np.empty(entry["shape"], dtype)
        mapped = mmap.mmap(descriptor, entry["bytes"], access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, dtype).reshape(entry["shape"])


def sha256_of(buffer: np.ndarray | int, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a mapped array's bytes, or of an open file from its beginning."""
    digest = hashlib.sha256()
    if isinstance(buffer, np.ndarray):
        flat = buffer.reshape(-1).view(np.uint8) if buffer.size else np.empty(0, np.uint8)
        pieces: Iterator[Any] = (
            flat[i : i + BLOCK_BYTES].data for i in range(0, len(flat), BLOCK_BYTES)
        )
    else:
        pieces = _read_pieces(buffer)
    for piece in pieces:
        digest.update(piece)
        if progress is not None:
            progress(len(piece))
    return digest.hexdigest()


def _read_pieces(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(descriptor, BLOCK_BYTES, offset):
        offset += len(piece)
        yield piece
