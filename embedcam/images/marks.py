"""The mark of a file: what tells later whether it is still the one that was read."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from functools import lru_cache
from typing import Final, Literal

import numpy as np

FileState = Literal["same", "changed", "missing"]

NO_MARK: Final = (0, 0, 0, 0)
"""Of what is no file, or could not be read; no file has it."""
MAX_HASHED: Final = 1 << 28
"""Bytes of a file whose content is looked at; of a larger one size and time have to do."""


def file_mark(path: str | os.PathLike[str]) -> np.ndarray:
    """The mark of a file as it is now, uint32 `[4]`; `NO_MARK` for what cannot be read.

    Its size modulo 2^32; the CRC-32 of its time of change (nanoseconds, as a little-endian int64);
    and the BLAKE2b-64 of its bytes, the lower half first, 0 for a file above `MAX_HASHED`. The
    size is taken before a byte is read, so a file that changes meanwhile is seen to have changed.
    """
    content = bytes(8)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            return np.array(NO_MARK, np.uint32)
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size <= MAX_HASHED:
                content = hashlib.file_digest(stream, _digest).digest()
    except (OSError, ValueError):
        return np.array(NO_MARK, np.uint32)
    return np.array([*_outside(status), *np.frombuffer(content, "<u4")], np.uint32)


def file_state(path: str | os.PathLike[str], mark: np.ndarray) -> FileState | None:
    """Whether the file at a path is the one that was marked; None where the mark is `NO_MARK`.

    Size and time tell at once that it is. With another time alone its bytes decide: copying a
    collection changes times and no picture.
    """
    if not np.any(mark):
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    if not stat.S_ISREG(status.st_mode):
        return "missing"
    size, time, *content = (int(part) for part in mark)
    found = _outside(status)
    if found == (size, time):
        return "same"
    if found[0] != size or not any(content):
        return "changed"
    now = _content(os.fspath(path), *status[1:3], *found, status.st_mtime_ns, status.st_ctime_ns)
    return "same" if now == tuple(content) else "changed"


@lru_cache(maxsize=4096)
def _content(path: str, *_: int) -> tuple[int, ...]:
    """The second half of a file's mark; read once while what the folder says of it stays."""
    return tuple(int(part) for part in file_mark(path)[2:])


def _outside(status: os.stat_result) -> tuple[int, int]:
    time = zlib.crc32(status.st_mtime_ns.to_bytes(8, "little", signed=True))
    return status.st_size % (1 << 32), time


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8)
