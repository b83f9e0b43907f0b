"""Unfinished work on disk: chunks of arrays that a killed job, or another process, finds again.

Any number of processes may write to one folder. A chunk appears by one rename from a name that no
other process has, and one that is there and whole stays; nobody waits, and nobody deletes what
another writes.
"""

import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np

from .. import _files
from ..errors import InputError
from ..index.arrays import scratch_array
from ..index.records import read_as, text, whole

_KEY = "key.json"
_COMMIT = "promise.json"
_LISTING = "arrays.json"
_MOST = 16 << 20
_LARGEST = 1 << 62


@dataclass(frozen=True)
class _Entry:
    """What the listing of a chunk says of an array."""

    dtype: Annotated[str, text(8, r"[<>|]?[biuf][1248]", "a type of numbers")]
    shape: tuple[Annotated[int, whole(0, _LARGEST)], ...]
    crc32: int


@dataclass(frozen=True)
class _Listing:
    """What a chunk holds, and the stamp of what made it."""

    arrays: Mapping[Annotated[str, text(40, r"[a-z][a-z0-9_]*", "a name")], _Entry]
    made_by: str


class Checkpoint:
    """Keep chunks of named arrays in a folder, each with a checksum of each array.

    One cut short by a power failure is computed again. `made_by` is a stamp of what makes chunks
    here: one with another stamp is as good as none.
    """

    def __init__(self, path: Path, made_by: str = "") -> None:
        self.path, self.made_by = path, made_by

    @classmethod
    def owned(cls, path: Path, key: str) -> Self:
        """Take over a folder, for whoever holds the lock of what is made from it.

        The key is a digest of everything the chunks depend on; another key empties the folder. What
        killed processes left unfinished goes.
        """
        try:
            if _files.is_folder(path) and _value_of(path, _KEY, "key") != key:
                _files.remove_tree(path)
        except _files.NotPlain as error:
            raise InputError(
                f"{path}: {error}, and unfinished work is kept there; delete it and run the same "
                "command again"
            ) from error
        _files.make_folder(path)
        if _value_of(path, _KEY, "key") != key:
            publish(path / _KEY, json.dumps({"key": key}).encode())
        for leftover in path.glob(f"*{_files.UNFINISHED}"):
            if leftover.is_dir() and not leftover.is_symlink():
                _files.remove_tree(leftover)
            else:
                leftover.unlink()
        return cls(path)

    def write(self, stage: str, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a chunk; they become visible all at once, unless it is there."""
        folder = self._folder(stage, chunk)
        unfinished = unfinished_name(folder)
        try:
            unfinished.mkdir()
            entries: dict[str, _Entry] = {}
            for name, array in arrays.items():
                array = np.ascontiguousarray(array)
                (unfinished / f"{name}.bin").write_bytes(_bytes_of(array))
                entries[name] = _Entry(array.dtype.str, array.shape, zlib.crc32(_bytes_of(array)))
            listing = json.loads(json.dumps(asdict(_Listing(entries, self.made_by))))
            (unfinished / _LISTING).write_text(json.dumps([listing, _crc_of(listing)]))
            while not give_name(unfinished, folder):
                if self.intact(stage, chunk):  # another process was first
                    return
        finally:
            _files.remove_tree(unfinished)

    def read(self, stage: str, chunk: int, *names: str) -> dict[str, np.ndarray]:
        """Return the named arrays of a finished chunk (all where none is named), memory-mapped."""
        folder = self._folder(stage, chunk)
        arrays = _read_listing(folder).arrays
        return {name: _open(folder, name, arrays[name]) for name in names or arrays}

    def column(self, stage: str, chunk: int, name: str) -> np.ndarray:
        """Return one array of a finished chunk, memory-mapped."""
        return self.read(stage, chunk, name)[name]

    def has(self, stage: str, chunk: int) -> bool:
        """Return whether a chunk is there, whole or not."""
        return (self._folder(stage, chunk) / _LISTING).exists()

    def made(self, stage: str, chunk: int) -> str:
        """Return the stamp of what made a chunk that is there."""
        return _read_listing(self._folder(stage, chunk)).made_by

    def whole(self, stage: str, chunk: int, *names: str) -> bool:
        """Return whether a chunk is there, made by the same, and its arrays fit their checksums.

        Of the named arrays, all where none is named.
        """
        with suppress(OSError, ValueError, KeyError):
            listing = _read_listing(self._folder(stage, chunk))
            arrays = self.read(stage, chunk, *names)
            sums = (zlib.crc32(_bytes_of(arrays[n])) == listing.arrays[n].crc32 for n in arrays)
            return listing.made_by == self.made_by and all(sums)
        return False

    def intact(self, stage: str, chunk: int) -> bool:
        """Return whether a chunk is there and whole, or put what is there aside."""
        if self.whole(stage, chunk):
            return True
        self.put_aside(stage, chunk)
        return False

    def put_aside(self, stage: str, chunk: int) -> None:
        """Take a chunk out of the way by a rename: who reads it may read on."""
        folder = self._folder(stage, chunk)
        with suppress(FileNotFoundError):
            os.rename(folder, unfinished_name(folder))

    def put_aside_but(self, stage: str) -> None:
        """Take the chunks of all other stages out of the way: they depend on that one's."""
        for listing in [*self.path.glob(f"*-*/{_LISTING}")]:
            name, _, chunk = listing.parent.name.rpartition("-")
            if name != stage and chunk.isdecimal():
                self.put_aside(name, int(chunk))

    def array(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a writable array on disk, zero at first, for results too large to hold."""
        try:
            return scratch_array(shape, dtype, self.path, held=0)
        except OSError as error:  # that of a merge is not where its index is
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def mark_commit(self, job: str, generation: int) -> None:
        """Note durably, just before it happens, that this job becomes that generation."""
        with _files.written(self.path / _COMMIT) as file:
            file.write(json.dumps({"job": job, "generation": generation}).encode())
        _files.sync_folder(self.path.parent)

    def _folder(self, stage: str, chunk: int) -> Path:
        return self.path / f"{stage}-{chunk:07d}"


def publish(path: Path, content: bytes) -> None:
    """Write a small file that appears whole by one rename; of several the last one stays."""
    unfinished = unfinished_name(path)
    with _files.fresh(unfinished) as file:
        file.write(content)
    os.replace(unfinished, path)


def finished_job(path: Path, generation: int) -> str | None:
    """Return the job of a checkpoint that became that generation and then was killed, or None."""
    same = _value_of(path, _COMMIT, "generation") == generation
    return str(_value_of(path, _COMMIT, "job")) if same else None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, the commit marker last, so that a kill loses no trace."""
    with suppress(OSError):
        _files.remove_tree(path, last=_COMMIT)


def _read(folder: Path, name: str) -> bytes:
    """Return the bytes of a file, which may be hostile; raise OSError or ValueError."""
    try:
        _files.is_folder(folder)
        return _files.read_regular(folder, name, _MOST)
    except _files.NotPlain as error:
        raise ValueError(str(error)) from error


def _value_of(folder: Path, name: str, key: str) -> str | int | None:
    """Return what a JSON file says under a key; None where it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value: str | int = json.loads(_read(folder, name))[key]
        return value
    return None


def _open(folder: Path, name: str, entry: _Entry) -> np.ndarray:
    dtype, shape = np.dtype(entry.dtype), entry.shape
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    try:
        descriptor = _files.open_regular(folder, f"{name}.bin")
    except _files.NotPlain as error:
        raise InputError(f"{folder / name}.bin: {error}; run the same command again") from error
    with open(descriptor, "rb") as file:
        if (found := os.fstat(descriptor).st_size) != size:
            raise InputError(f"{name}.bin: {found} bytes where {size} were written")
        return np.memmap(file, dtype, "r", shape=shape) if size else np.empty(shape, dtype)


def _read_listing(folder: Path) -> _Listing:
    with suppress(ValueError, TypeError):
        listing, crc = json.loads(_read(folder, _LISTING))
        if _crc_of(listing) == crc:
            return read_as(_Listing, listing)
    raise InputError(f"{folder / _LISTING}: was altered; run the same command again")


def _bytes_of(array: np.ndarray) -> memoryview | bytes:
    return array.data if array.size else b""


def _crc_of(listing: object) -> int:
    return zlib.crc32(json.dumps(listing, sort_keys=True).encode())


def unfinished_name(path: Path) -> Path:
    """Return a name beside a file or folder that no other process on any machine has."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename)[:40]
    mine = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}.{mine}{_files.UNFINISHED}")


def give_name(unfinished: Path, folder: Path) -> bool:
    """Give a folder its name, or return that the name is taken."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not os.path.lexists(folder):
            raise
        return False
    return True
