"""Strings in a blob: decoded one by one on demand, found by bisection, never a dict at opening."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from ..errors import IndexFormatError, InputError

_FEW = 100

T_co = TypeVar("T_co", covariant=True)


class StringTable:
    """n UTF-8 strings end to end in a blob, with offsets `[n+1]`; both may be memory maps.

    Args:
        blob: uint8 `[bytes]`.
        offsets: uint64 `[n+1]`; those of a string are believed after they were found to be inside.
        where: the files without their endings, for messages.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, where: Path) -> None:
        self.blob, self.offsets, self.where = blob, offsets, where

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, row: int) -> bytes:
        """The string's bytes."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        if not start <= stop <= len(self.blob):
            raise self._outside()
        return self.blob[start:stop].tobytes()

    def __getitem__(self, row: int) -> str:
        # A damaged byte must not stop a search half way; `verify` reports it.
        return self.raw(row).decode("utf-8", "replace")

    def take(self, rows: np.ndarray) -> list[str]:
        """Some rows `[n]`."""
        starts, stops = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        blob, size = self.blob.data, len(self.blob)
        if not all(a <= b <= size for a, b in zip(starts, stops, strict=True)):
            raise self._outside()
        return [str(blob[a:b], "utf-8", "replace") for a, b in zip(starts, stops, strict=True)]

    def tolist(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Rows start .. stop at once, faster than one by one."""
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
        """Where `key` stands, or would stand, in the sorted order."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.raw(check_row(int(order[middle]), high=len(self))) < key:
                low = middle + 1
            else:
                high = middle
        return low


def check_row(row: int, high: int) -> int:
    """A row number read from a file, refused where it leads outside."""
    if not 0 <= row < high:
        raise IndexFormatError(
            f"the index refers to row {row} of {high} in its strings; run `embedcam verify`, and "
            "restore the file that it names"
        )
    return row


class Strings(Sequence[T_co]):
    """One string (or None) for every position: `s[7]`, `s[2:5]`, `s[array([3, 1])]`."""

    def __init__(self, total: int, lookup: Callable[[np.ndarray], list[T_co]]) -> None:
        self._total, self._lookup = total, lookup

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, where: int) -> T_co: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[T_co]: ...

    def __getitem__(self, where: int | slice | np.ndarray | list[int]) -> T_co | list[T_co]:
        if isinstance(where, slice):
            return self._lookup(np.arange(*where.indices(self._total)))
        if isinstance(where, (int, np.integer)):
            row = int(where) + self._total if where < 0 else int(where)
            if not 0 <= row < self._total:
                raise IndexError(f"position {where} of an index of {self._total} rows")
            return self._lookup(np.array([row]))[0]
        return self._lookup(check_positions(where, self._total))

    def __iter__(self) -> Iterator[T_co]:
        for start in range(0, self._total, 65536):
            yield from self._lookup(np.arange(start, min(start + 65536, self._total)))

    def __repr__(self) -> str:
        return f"<{self._total} strings>"


def check_positions(positions: object, total: int) -> np.ndarray:
    """Positions as int64 `[n]`.

    Raises:
        InputError: not whole numbers in one dimension, or outside the index.
    """
    found = np.asarray(positions)
    if found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim == 1 and found.dtype == np.int64 and len(found) <= _FEW:
        # A query's handful: Python compares it sooner than NumPy's reductions are set up.
        rows = found.tolist()
        if min(rows) >= 0 and max(rows) < total:
            return found
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"positions of shape {list(found.shape)} and type {found.dtype}; expected whole "
            "numbers [n]"
        )
    if found.min() < 0 or found.max() >= total:
        bad = found[(found < 0) | (found >= total)][0]
        raise InputError(f"position {bad} is outside the index, which has rows 0 to {total - 1}")
    return found.astype(np.int64)


def encode_strings(strings: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Blob uint8 `[bytes]` and offsets uint64 `[n+1]`.

    Raises:
        InputError: something that is not a string, or has no UTF-8 form.
    """
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
    np.cumsum([len(r) for r in raw], out=offsets[1:], dtype=np.uint64)
    return np.frombuffer(b"".join(raw), np.uint8), offsets
