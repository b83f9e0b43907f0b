"""Many strings without a Python object for each: UTF-8 in one blob with offsets, and labels."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import IO, ClassVar, Protocol, Self, TypeVar, overload

import numpy as np

_RUN = 1 << 14
"""Strings decoded at once."""
_IN_MEMORY = 1 << 20
"""Bytes above which a blob lies in a file of its own, which has no name and goes with it."""
T = TypeVar("T")


class Texts(Sequence[str]):
    """Strings in a blob `[bytes]` with offsets `[n + 1]`, decoded on demand.

    `t[7]` is a string; `t[2:5]` and `t[array([3, 1])]` are lists.
    """

    errors: ClassVar[str] = "surrogateescape"
    """How bytes that are no UTF-8 are read: file names come back as they were."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets
        self._view = blob.data  # sliced sooner than an array

    @classmethod
    def of(cls, strings: Iterable[str]) -> Self:
        """Keep strings, read once and in order."""
        if isinstance(strings, cls):
            return strings
        writer, rest = TextsWriter(), iter(strings)
        while run := list(islice(rest, _RUN)):
            writer.extend(run)
        return cls(*writer.columns())

    @classmethod
    def blank(cls, n: int) -> Self:
        """Return n empty strings, which take no room."""
        return cls(np.empty(0, np.uint8), np.broadcast_to(np.uint64(0), (n + 1,)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, where: int) -> str: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[str]: ...

    def __getitem__(self, where: int | slice | np.ndarray | list[int]) -> str | list[str]:
        if isinstance(where, int | np.integer):
            row = int(where) + len(self) if where < 0 else int(where)
            if not 0 <= row < len(self):
                raise IndexError(f"{where} of {len(self)} strings")
            return self.raw(row).decode("utf-8", self.errors)
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            if step == 1:
                return self.tolist(start, max(start, stop))
            return self.take(np.arange(start, stop, step))
        return self.take(np.asarray(where, np.int64))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _RUN):
            yield from self.tolist(start, min(start + _RUN, len(self)))

    def __eq__(self, other: object) -> bool:
        return is_same(self, other)

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"

    def select(self, rows: np.ndarray) -> Texts:
        """Return some rows `[n]` as strings of their own, in blocks and without decoding them."""
        rows = np.asarray(rows, np.int64)
        writer = TextsWriter()
        for start in range(0, len(rows), _RUN):
            writer.extend_raw(self._pieces(rows[start : start + _RUN]))
        return Texts(*writer.columns())

    def raw(self, row: int) -> bytes:
        """Return the string's bytes."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        if not start <= stop <= len(self.blob):
            raise self._outside()
        return bytes(self._view[start:stop])

    def take(self, rows: np.ndarray) -> list[str]:
        """Return some rows `[n]`."""
        if not len(rows):
            return []
        first, last = int(rows[0]), int(rows[-1])
        if len(rows) > 1 and last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return self.tolist(first, last + 1)  # a run is decoded from one piece of the blob
        return [str(piece, "utf-8", self.errors) for piece in self._pieces(rows)]

    def tolist(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return rows start .. stop at once, faster than one by one."""
        offsets = np.asarray(self.offsets[start : (len(self) if stop is None else stop) + 1])
        if offsets[-1] > len(self.blob) or (offsets[1:] < offsets[:-1]).any():
            raise self._outside()
        first = int(offsets[0])
        blob = self.blob[first : int(offsets[-1])].tobytes()
        bounds = (offsets.astype(np.int64) - first).tolist()
        return [blob[a:b].decode("utf-8", self.errors) for a, b in pairwise(bounds)]

    def _pieces(self, rows: np.ndarray) -> list[memoryview]:
        """Return the bytes of some rows `[n]` where they lie."""
        bounds = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        view, size = self._view, len(self.blob)
        pieces = [view[start:stop] for start, stop in bounds if start <= stop <= size]
        if len(pieces) < len(rows):
            raise self._outside()
        return pieces

    def _outside(self) -> Exception:
        return ValueError("offsets fall or lead outside the text")


def take_each(*wanted: tuple[Texts, np.ndarray]) -> list[list[str]]:
    """Return some rows `[n]` of each of several columns."""
    return [texts.take(rows) for texts, rows in wanted]


class TextsWriter:
    """What becomes a `Texts`, some strings at a time."""

    def __init__(self) -> None:
        self._offsets, self._pieces = array("Q", [0]), bytearray()
        self._file: IO[bytes] | None = None

    def extend(self, strings: Sequence[str]) -> None:
        """Add strings at the end."""
        self.extend_raw([text.encode("utf-8", Texts.errors) for text in strings])

    def extend_raw(self, strings: Sequence[bytes | memoryview]) -> None:
        """Add the bytes of strings at the end."""
        end = self._offsets[-1]
        for raw in strings:
            self._pieces += raw
            end += len(raw)
            self._offsets.append(end)
        if self._file is None and end > _IN_MEMORY:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - `columns` closes it
        if self._file is not None:
            self._file.write(self._pieces)
            self._pieces.clear()

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the blob and its offsets; nothing can be added then."""
        bounds = np.frombuffer(self._offsets, np.uint64)
        if self._file is None:
            return np.frombuffer(bytes(self._pieces), np.uint8), bounds
        with self._file as file:  # the maps keep what it held
            start = file.tell()
            file.write(bounds.tobytes())
            file.flush()
            blob = np.memmap(file, np.uint8, "r", shape=(start,))
            return blob, np.memmap(file, np.uint64, "r", start, shape=bounds.shape)


class LabelColumn(Sequence[str | None]):
    """A label, or None, for each of n images: codes `[n]` into the names, -1 for None."""

    def __init__(self, codes: np.ndarray, names: Sequence[str]) -> None:
        self.codes, self.names = codes, list(names)

    @classmethod
    def of(cls, labels: Iterable[str | None]) -> Self:
        """Keep labels, read once and in order; names are numbered as they come."""
        if isinstance(labels, cls):
            return labels
        known: dict[str | None, int] = {None: -1}
        codes = array("i", (known.setdefault(label, len(known) - 1) for label in labels))
        return cls(np.frombuffer(codes, np.int32), [name for name in known if name is not None])

    def take(self, rows: np.ndarray) -> LabelColumn:
        """Return the labels of some rows `[n]` as a column of their own."""
        return LabelColumn(self.codes[rows], self.names)

    def sorted(self) -> LabelColumn:
        """Return the same labels; the names that occur are numbered in the order of code points."""
        occurring = np.zeros(len(self.names) + 1, bool)
        occurring[self.codes] = True  # -1 is the last
        used = sorted(np.flatnonzero(occurring[:-1]).tolist(), key=self.names.__getitem__)
        numbers = np.full(len(self.names) + 1, -1, np.int32)
        numbers[used] = np.arange(len(used))
        return LabelColumn(numbers[self.codes], [self.names[code] for code in used])

    def counts(self) -> tuple[dict[str, int], int]:
        """Return how many images have each label, by its name, and how many have none."""
        column = self.sorted()
        n_each = np.bincount(column.codes + 1, minlength=len(column.names) + 1).tolist()
        return dict(zip(column.names, n_each[1:], strict=True)), n_each[0]

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, where: int) -> str | None: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[str | None]: ...

    def __getitem__(
        self, where: int | slice | np.ndarray | list[int]
    ) -> str | list[str | None] | None:
        names: list[str | None] = [*self.names, None]  # -1 is the last
        if isinstance(where, int | np.integer):
            return names[int(self.codes[where])]
        return [names[code] for code in self.codes[where].tolist()]

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), _RUN):
            yield from self[start : start + _RUN]

    def __eq__(self, other: object) -> bool:
        return is_same(self, other)

    def __repr__(self) -> str:
        return f"<{len(self)} labels of {len(self.names)} names>"


class Rows(Protocol[T]):
    """What gives a list for places `[n]`: strings or labels."""

    def __getitem__(self, where: np.ndarray, /) -> list[T]: ...


def in_runs(strings: Rows[T], rows: np.ndarray) -> Iterator[T]:
    """Yield strings or labels of some rows `[n]`, fetched many at once."""
    for start in range(0, len(rows), _RUN):
        yield from strings[rows[start : start + _RUN]]


def sorted_order(texts: Texts) -> np.ndarray:
    """Return places `[n]` of the strings in the order of their bytes, equal ones as they stand.

    Eight bytes are compared at a time, and the next eight of those alone that are equal so far.
    """
    n = len(texts)
    number = np.int32 if n < 1 << 31 else np.int64
    order, places, group, depth = np.arange(n, dtype=number), np.arange(n, dtype=number), None, 0
    while len(places):
        # `places` in the order stand for strings that equal their neighbors in `group` so far.
        rows = order[places]
        keys, left = _eight_bytes(texts, rows, depth)
        sort = np.lexsort((left, keys) if group is None else (left, keys, group))  # stable
        order[places] = rows[sort]
        keys, left = keys[sort], left[sort]
        new = np.ones(len(places) + 1, bool)
        new[1:-1] = (keys[1:] != keys[:-1]) | (left[1:] != left[:-1])
        if group is not None:
            group = group[sort]
            new[1:-1] |= group[1:] != group[:-1]
        tied = ~(new[:-1] & new[1:]) & (left == 8)
        group = np.cumsum(new[:-1], dtype=number)[tied]
        places, depth = places[tied], depth + 8
    return order


def _eight_bytes(texts: Texts, rows: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return up to eight bytes from `depth` on as numbers that sort as they do, and how many."""
    blob, last = texts.blob, max(len(texts.blob) - 1, 0)
    keys, counts = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint8)
    for start in range(0, len(rows) if len(blob) else 0, _RUN):
        some = rows[start : start + _RUN]
        begin = texts.offsets[some].astype(np.int64) + depth
        here = np.clip(texts.offsets[some + 1].astype(np.int64) - begin, 0, 8)
        key = np.zeros(len(some), np.uint64)
        for place in range(8):
            byte = blob[np.minimum(begin + place, last)]
            key = key << np.uint64(8) | np.where(here > place, byte, 0).astype(np.uint64)
        keys[start : start + _RUN], counts[start : start + _RUN] = key, here
    return keys, counts


def hashes_of(strings: Iterable[str]) -> np.ndarray:
    """Return Python's hashes of strings, int64 `[n]`; others in another process."""
    return np.fromiter(map(hash, strings), np.int64)


def first_twice(strings: Iterable[str]) -> tuple[int, int] | None:
    """Return the places of the first string that comes twice; None where each comes once."""
    hashes = hashes_of(strings)
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(again):
        return None
    suspected, first = np.isin(hashes, again), dict[str, int]()
    for position, text in enumerate(strings):
        if suspected[position] and (other := first.setdefault(text, position)) != position:
            return other, position
    return None


def is_same(one: Sequence[object], other: object) -> bool:
    """Return whether another sequence holds the same."""
    if not isinstance(other, Sequence) or len(one) != len(other):
        return False
    return all(a == b for a, b in zip(one, other, strict=True))
