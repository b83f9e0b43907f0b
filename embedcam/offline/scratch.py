"""Unfinished work on disk: chunks of arrays that a killed job finds again.

A scratch folder belongs to one key, the digest of everything its content depends on; another key
empties it. A chunk appears by one rename, with a checksum of each array, so that a chunk cut short
by a power failure is computed again rather than believed.
"""

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
_PROMISE = "promise.json"
_LISTING = "arrays.json"
_MOST = 16 << 20


class Scratch:
    """Chunks of named arrays under a folder.

    Args:
        path: the folder; created where missing.
        key: digest of everything the chunks depend on. A folder of another key is emptied first.

    Raises:
        InputError: a link, or something else than a folder.
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

    def has(self, stage: str, chunk: int) -> bool:
        """Whether the chunk was finished, by its listing; its bytes are checked by `read`."""
        return (self._folder(stage, chunk) / _LISTING).exists()

    def write(self, stage: str, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays; visible all at once."""
        folder = self._folder(stage, chunk)
        remove_tree(folder)
        unfinished = folder.with_suffix(UNFINISHED)
        unfinished.mkdir()
        listing = {}
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            (unfinished / f"{name}.bin").write_bytes(array.data if array.size else b"")
            listing[name] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "crc32": zlib.crc32(array.data if array.size else b""),
            }
        _write_text(unfinished / _LISTING, json.dumps([listing, _crc_of(listing)]))
        os.replace(unfinished, folder)

    def read(self, stage: str, chunk: int, *names: str) -> dict[str, np.ndarray]:
        """The named arrays of a finished chunk (all of them where none is named), memory-mapped."""
        folder = self._folder(stage, chunk)
        listing = _read_listing(folder)
        return {name: _open(folder / f"{name}.bin", listing[name]) for name in names or listing}

    def intact(self, stage: str, chunk: int) -> bool:
        """Whether an earlier run's chunk is whole, checksums included; a broken one is dropped."""
        if not self.has(stage, chunk):
            return False
        folder = self._folder(stage, chunk)
        try:
            listing = _read_listing(folder)
            arrays = self.read(stage, chunk)
            if all(zlib.crc32(arrays[n].data if arrays[n].size else b"") == listing[n]["crc32"]
                   for n in listing):  # fmt: skip
                return True
        except (OSError, ValueError):
            pass
        remove_tree(folder)
        return False

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A writable array on disk, zero at first; for results too large to hold."""
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

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        remove(self.path)

    def promise(self, job: str, generation: int) -> None:
        """Note durably, just before it happens, that this job becomes that generation."""
        with written(self.path / _PROMISE) as file:
            file.write(json.dumps({"job": job, "generation": generation}).encode())
        sync_folder(self.path.parent)

    def free_bytes(self) -> int:
        """Free space where the folder lies."""
        return shutil.disk_usage(self.path).free

    def _folder(self, stage: str, chunk: int) -> Path:
        return self.path / f"{stage}-{chunk:07d}"

    def _stored_key(self) -> str | None:
        try:
            return str(_read_json(self.path, _KEY)["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def finished_job(path: Path, generation: int) -> str | None:
    """The job whose scratch folder this is, if it became that generation and then was killed."""
    try:
        found = _read_json(path, _PROMISE)
        return str(found["job"]) if found["generation"] == generation else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(path: Path) -> None:
    """Delete a scratch folder, what `finished_job` reads last, so that a kill loses no trace."""
    with suppress(OSError):
        remove_tree(path, last=_PROMISE)


def _read_json(folder: Path, name: str) -> Any:
    """What a file says, which may be a stranger's.

    Raises:
        OSError, ValueError: it is missing, or is not what was written.
    """
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
    try:
        listing, crc = _read_json(folder, _LISTING)
        if _crc_of(listing) == crc:
            return dict(listing)
    except (ValueError, TypeError):
        pass
    raise InputError(f"{folder / _LISTING}: was altered; run the same command again")


def _crc_of(listing: object) -> int:
    return zlib.crc32(json.dumps(listing, sort_keys=True).encode())


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)
