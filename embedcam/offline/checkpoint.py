"""Unfinished work on disk: chunks of arrays that a killed job finds again."""

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import numpy as np

from .. import _files
from ..errors import InputError

_KEY = "key.json"
_COMMIT = "promise.json"
_LISTING = "arrays.json"
_MOST = 16 << 20


class _Entry(TypedDict):
    """What the listing of a chunk says of an array."""

    dtype: str
    shape: list[int]
    crc32: int


class Checkpoint:
    """Keep chunks of named arrays in a folder that belongs to one key; another key empties it.

    The key is a digest of everything the chunks depend on. A chunk appears by one rename, with a
    checksum of each array, so that one cut short by a power failure is computed again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
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
            _write_text(path / _KEY, json.dumps({"key": key}))
        for leftover in path.glob(f"*{_files.UNFINISHED}"):
            if leftover.is_dir() and not leftover.is_symlink():
                _files.remove_tree(leftover)
            else:
                leftover.unlink()

    def write(self, stage: str, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a chunk; they become visible all at once."""
        folder = self._folder(stage, chunk)
        _files.remove_tree(folder)
        unfinished = folder.with_suffix(_files.UNFINISHED)
        unfinished.mkdir()
        listing: dict[str, _Entry] = {}
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            (unfinished / f"{name}.bin").write_bytes(_bytes_of(array))
            crc32 = zlib.crc32(_bytes_of(array))
            listing[name] = {"dtype": array.dtype.str, "shape": [*array.shape], "crc32": crc32}
        _write_text(unfinished / _LISTING, json.dumps([listing, _crc_of(listing)]))
        os.replace(unfinished, folder)

    def read(self, stage: str, chunk: int, *names: str) -> dict[str, np.ndarray]:
        """Return the named arrays of a finished chunk (all where none is named), memory-mapped."""
        folder = self._folder(stage, chunk)
        listing = _read_listing(folder)
        return {name: _open(folder / f"{name}.bin", listing[name]) for name in names or listing}

    def column(self, stage: str, chunk: int, name: str) -> np.ndarray:
        """Return one array of a finished chunk, memory-mapped."""
        return self.read(stage, chunk, name)[name]

    def intact(self, stage: str, chunk: int) -> bool:
        """Return whether an earlier run's chunk is whole, checksums included, or drop it."""
        folder = self._folder(stage, chunk)
        if not (folder / _LISTING).exists():
            return False
        with suppress(OSError, ValueError):
            listing, arrays = _read_listing(folder), self.read(stage, chunk)
            if all(zlib.crc32(_bytes_of(arrays[n])) == one["crc32"] for n, one in listing.items()):
                return True
        _files.remove_tree(folder)
        return False

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a writable array on disk, zero at first, for results too large to hold."""
        if 0 in shape:
            return np.zeros(shape, dtype)
        path = self.path / f"{name}.array"
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:  # never through a link
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            # Claimed now: writing to a map of a file with holes kills the process on a full disk.
            claim = getattr(os, "posix_fallocate", None)
            if claim is None:
                file.truncate(size)
            else:
                claim(file.fileno(), 0, size)
        return np.memmap(path, np.dtype(dtype), "r+", shape=shape)

    def mark_commit(self, job: str, generation: int) -> None:
        """Note durably, just before it happens, that this job becomes that generation."""
        with _files.written(self.path / _COMMIT) as file:
            file.write(json.dumps({"job": job, "generation": generation}).encode())
        _files.sync_folder(self.path.parent)

    def _folder(self, stage: str, chunk: int) -> Path:
        return self.path / f"{stage}-{chunk:07d}"


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


def _open(path: Path, entry: _Entry) -> np.ndarray:
    dtype, shape = np.dtype(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if path.stat().st_size != size:
        raise InputError(f"{path.name}: {path.stat().st_size} bytes where {size} were written")
    return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)


def _read_listing(folder: Path) -> dict[str, _Entry]:
    with suppress(ValueError, TypeError):
        listing, crc = json.loads(_read(folder, _LISTING))
        if _crc_of(listing) == crc:
            return dict(listing)
    raise InputError(f"{folder / _LISTING}: was altered; run the same command again")


def _bytes_of(array: np.ndarray) -> memoryview | bytes:
    return array.data if array.size else b""


def _crc_of(listing: object) -> int:
    return zlib.crc32(json.dumps(listing, sort_keys=True).encode())


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)
