"""Raw arrays as files: written durably with a checksum, mapped once sizes fit."""

import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .._checks import UNIT_TOLERANCE, wrong_number
from .._files import NotPlain, fresh, open_regular
from ..errors import IndexFormatError, InputError

if TYPE_CHECKING:
    from .manifest import FileEntry

_BITS = {"float": (16, 32, 64), "uint": (8, 16, 32, 64), "int": (32, 64)}
SUFFIXES = {f"{kind}{n}": f"{kind[0]}{n}" for kind, bits in _BITS.items() for n in bits}
"""Types of arrays, and how their files' names end."""
BLOCK_BYTES = 16 << 20
HELD = 1 << 20
"""Bytes of an array above which it lies in a file, where it may grow with the collection."""
Check = Callable[[np.ndarray], str | None]
"""Says what is wrong with stored rows, or None."""
_RESTORE = "restore it from a copy, or build the index again"


class ArrayLike(Protocol):
    """What can be streamed to disk: an array, a memory map, or rows gathered on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype[np.generic]: ...  # noqa: D102

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


class Told:
    """An array that tells how many rows were read of it, in slices."""

    def __init__(self, array: ArrayLike, progressed: Callable[[int], object]) -> None:
        self._array, self._progressed = array, progressed
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        some = self._array[rows]
        if isinstance(rows, slice):
            self._progressed(len(some))
        return some


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


def scratch_array(
    shape: tuple[int, ...], dtype: str, folder: Path | None = None, held: int | None = None
) -> np.ndarray:
    """Return a writable array, zero at first; of more bytes than are `held` in a nameless file.

    It lies in `folder`, or where temporary files do, and goes with the array.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= (HELD if held is None else held):
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps what it held
        # Claimed now: writing to a map of a file with holes kills the process on a full disk.
        claim = getattr(os, "posix_fallocate", None)
        if claim is None:
            file.truncate(size)
        else:
            claim(file.fileno(), 0, size)
        return np.memmap(file, np.dtype(dtype), "r+", shape=shape)


def write_array(
    folder: Path,
    name: str,
    array: ArrayLike,
    dtype: str,
    wrong: Check | None = None,
    progressed: Callable[[int], object] = lambda _: None,
) -> dict[str, str | int | list[int]]:
    """Stream an array to a new file, sync it, and return its entry for the manifest.

    Values are cast to `dtype`; `wrong` says of each stored block what is wrong with it, or None;
    `progressed` is told how many bytes were written.
    """
    digest, written = hashlib.sha256(), 0
    stored = np.dtype(dtype).newbyteorder("<")
    with fresh(folder / name) as file:
        for start, block in blocks(array):
            if stored.kind in "iu" and block.dtype != stored and block.size:
                limits, kind = np.iinfo(stored), block.dtype.kind
                if kind not in "iu" or block.min() < limits.min or block.max() > limits.max:
                    raise InputError(f"{name}: values of type {block.dtype} do not fit {dtype}")
            # An overflow of a narrower float shows up in the check as an infinity.
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(block, dtype=stored)
            if wrong is not None and (what := wrong(block)) is not None:
                raise InputError(f"{name}, rows from {start} on: {what}")
            if block.size:
                file.write(block.data)
                digest.update(block.data)
                written += block.nbytes
                progressed(block.nbytes)
    shape = [int(n) for n in array.shape]
    return {"dtype": dtype, "shape": shape, "bytes": written, "sha256": digest.hexdigest()}


def read_array(path: str | Path) -> np.ndarray:
    """Read an array from a `.npy` file, memory-mapped; never unpickled."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; give a .npy array") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy array of numbers; use numpy.save") from error


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


def forget(array: np.ndarray) -> None:
    """Give back the memory of a mapped array that was read; it is read again where it is used."""
    held: object = array
    while isinstance(held, np.ndarray | memoryview):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    if isinstance(held, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        held.madvise(mmap.MADV_DONTNEED)


def sha256_of(content: np.ndarray | int, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a mapped array's bytes, or of an open file from its beginning."""
    digest, start = hashlib.sha256(), 0
    held = content if isinstance(content, int) else content.reshape(-1).view(np.uint8).data
    while True:
        stop = start + BLOCK_BYTES
        piece = os.pread(held, BLOCK_BYTES, start) if isinstance(held, int) else held[start:stop]
        if not piece:
            return digest.hexdigest()
        digest.update(piece)
        start += len(piece)
        if progress is not None:
            progress(len(piece))


# What values must be: checked before they are written, and again by `verify`


@dataclass(frozen=True)
class Column:
    """An array kept for each image: what its file is called, and the type and shape of a row.

    `wrong` takes stored rows and returns what is wrong with them, or None.
    """

    stem: str
    dtype: str
    shape: tuple[int, ...] = ()
    wrong: Check | None = None
    file: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", file_name(self.stem, self.dtype))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def wrong_embeddings(block: np.ndarray, normalized: bool) -> str | None:
    """Return what is wrong with embeddings `[b D]`, or None."""
    if not normalized:
        return wrong_number(block)
    norms = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
    # A length of 1 has no number that is none.
    if (bad := _first(~(np.abs(norms - 1) <= UNIT_TOLERANCE))) is None:
        return None
    told = f"row {bad} has length {norms[bad]:.6g} where unit vectors are promised"
    return wrong_number(block) or told


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
    finite = np.isfinite(block)
    if finite.all():
        return None
    bad = _first(~finite.all(axis=tuple(range(1, block.ndim))))
    return None if bad is None else f"row {bad} holds a NaN or an infinity"


def wrong_scales(block: np.ndarray) -> str | None:
    """Return what is wrong with scales, which are finite and not negative, or None."""
    bad = _first(~(np.isfinite(block) & (block >= 0)))
    return None if bad is None else f"row {bad} has the scale {block[bad]}"


def _first(mask: np.ndarray) -> int | None:
    where = np.flatnonzero(mask)
    return int(where[0]) if len(where) else None
