"""Unfinished work on disk: chunks of arrays that a killed job finds again."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .._files import (
    UNFINISHED,
    NotPlain,
    is_folder,
    make_folder,
    read_regular,
    remove_tree,
    sync_folder,
    written,
)
from ..errors import InputError

_KEY = "key.json"
_COMMIT = "promise.json"
_LISTING = "arrays.json"
_MOST = 16 << 20


class Checkpoint:
    """Keep chunks of named arrays in a folder that belongs to one key; another key empties it.

    The key is a digest of everything the chunks depend on. A chunk appears by one rename, with a
    checksum of each array, so that one cut short by a power failure is computed again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        try:
            if is_folder(path) and self._stored_key() != key:
                remove_tree(path)
        except NotPlain as error:
            raise InputError(
                f"{path}: {error}, and unfinished work is kept there; delete it and run the same "
                "command again"
            ) from error
        make_folder(path)
        if self._stored_key() != key:
            _write_text(path / _KEY, json.dumps({"key": key}))
        for leftover in path.glob(f"*{UNFINISHED}"):
            if leftover.is_dir() and not leftover.is_symlink():
                remove_tree(leftover)
            else:
                leftover.unlink()

    def write(self, stage: str, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a chunk; they become visible all at once."""
        folder = self._folder(stage, chunk)
        remove_tree(folder)
        unfinished = folder.with_suffix(UNFINISHED)
        unfinished.mkdir()
        listing = {}
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            (unfinished / f"{name}.bin").write_bytes(_bytes_of(array))
            listing[name] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "crc32": zlib.crc32(_bytes_of(array)),
            }
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
            if all(
                zlib.crc32(_bytes_of(arrays[name])) == listing[name]["crc32"] for name in arrays
            ):
                return True
        remove_tree(folder)
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
        with written(self.path / _COMMIT) as file:
            file.write(json.dumps({"job": job, "generation": generation}).encode())
        sync_folder(self.path.parent)

    def free_bytes(self) -> int:
        """Return the free space where the folder lies."""
        return shutil.disk_usage(self.path).free

    def _folder(self, stage: str, chunk: int) -> Path:
        return self.path / f"{stage}-{chunk:07d}"

    def _stored_key(self) -> str | None:
        try:
            return str(_read_json(self.path, _KEY)["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def finished_job(path: Path, generation: int) -> str | None:
    """Return the job of a checkpoint that became that generation and then was killed, or None."""
    try:
        marker = _read_json(path, _COMMIT)
        return str(marker["job"]) if marker["generation"] == generation else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, the commit marker last, so that a kill loses no trace."""
    with suppress(OSError):
        remove_tree(path, last=_COMMIT)


def _read_json(folder: Path, name: str) -> Any:
    """Return what a file says, which may be hostile; raise OSError or ValueError."""
    try:
        is_folder(folder)
        return json.loads(read_regular(folder, name, _MOST))
    except NotPlain as error:
        raise ValueError(str(error)) from error


def _open(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = np.dtype(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if path.stat().st_size != size:
        raise InputError(f"{path.name}: {path.stat().st_size} bytes where {size} were written")
    if size == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=shape)


def _read_listing(folder: Path) -> dict[str, Any]:
    with suppress(ValueError, TypeError):
        listing, crc = _read_json(folder, _LISTING)
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
