"""Where a picture lies: a file, a member of a tar, a row of a table, or an address of any of these.

    photos/a.jpg                              a file
    shards/000.tar?cat/0001.jpg@1536+20480    a member: its name, where its bytes begin, how many
    data/part-0.parquet#17                    a row, also of .arrow, .feather and .lance
    s3://bucket/photos/a.jpg                  an address, read by fsspec (`embedcam[remote]`)

What is read is bounded: no file of a picture, member or cell has more than `MAX_BYTES`, and sizes
are looked at first.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zlib
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from ..errors import ImageError, cut, ran_out, reason
from .reading import MAX_PIXELS, NO_MARK, FileState, file_mark, file_state, is_url, read_image

MAX_BYTES: Final = 1 << 28
"""Of one picture that is no file of its own, or lies elsewhere."""
Root = Path | str
"""Folder that paths are relative to; a text is an address."""
_MEMBER: Final = r"(?P<tar>.+?\.tar)\?(?P<member>.+)@(?P<start>[0-9]{1,15})\+(?P<size>[0-9]{1,12})"
_ROW: Final = r"(?P<table>.+\.(?:parquet|arrow|feather|lance))#(?P<row>[0-9]{1,15})"
_INSIDE: Final = re.compile(f"(?:{_MEMBER}|{_ROW})", re.IGNORECASE | re.DOTALL)
PLACE: Final = re.compile(rf"[a-z0-9]+:/|{_INSIDE.pattern}$", re.IGNORECASE | re.DOTALL)
"""Fits what is no plain file of this machine: see `open_place`."""
# "::" chains fsspec's file systems, "%2e" is a dot to a web server, and so may a backslash be "/".
_TRICKS: Final = re.compile(
    r"::|%2e|%2f|%5c|[\\\x00-\x1f\x7f]|(?:^|/)\.\.(?:[/?#]|$)", re.IGNORECASE
)


_NAMED: Final = re.compile(
    r"(.+?\.tar(?=\?)|.+?\.(?:parquet|arrow|feather|lance)(?=#[0-9]))", re.IGNORECASE
)


class Inside(NamedTuple):
    """A picture in a file of many: `start` and `size` of a tar's member, or the row of a table."""

    file: str
    member: str = ""
    start: int = 0
    size: int = 0
    row: int = -1


def inside(place: str) -> Inside | None:
    """Return the file of many that a picture lies in, and where in it; None of a file's own."""
    if (fits := _INSIDE.fullmatch(place)) is None:
        return None
    if fits["tar"]:
        return Inside(fits["tar"], fits["member"], int(fits["start"]), int(fits["size"]))
    return Inside(fits["table"], row=int(fits["row"]))


def member_path(file: str, member: str, start: int, size: int) -> str:
    """Return the path of a member of a tar."""
    return f"{file}?{member}@{start}+{size}"


def row_path(file: str, row: int) -> str:
    """Return the path of a row of a table."""
    return f"{file}#{row}"


def as_root(root: str | os.PathLike[str]) -> Root:
    """Return a folder as a path, and an address as it is, without a slash at its end."""
    text = os.fspath(root)
    return text.rstrip("/") if is_url(text) else Path(text)


def root_text(root: Root | None) -> str | None:
    """Return a root as an index names it: an absolute path, or the address."""
    return root if root is None or isinstance(root, str) else str(root.resolve())


def located(root: Root | None, path: str) -> str:
    """Return where a picture lies whose path is relative to `root`, or stands for itself."""
    if is_url(path):
        return path
    if isinstance(root, str):
        return path if path.startswith("/") else f"{root}/{path}"
    if PLACE.match(path) is not None:  # a member's name is not a path to be made plain
        return os.path.join(root or "", path)
    return str(Path(path) if root is None else root / path)


def relative_path(path: str, root: Path) -> str:
    """Return a path relative to `root` where it lies below it, else absolute; "/" between parts."""
    base = os.path.join(os.path.abspath(root), "")
    return Path(os.path.normpath(os.path.join(base, path)).removeprefix(base)).as_posix()


def stored_path(path: str, root: str | None, index_root: str | None) -> str:
    """Return a source's path as an index keeps it: relative to the index's root if below it.

    The roots are as `root_text` has them.
    """
    if not path or root == index_root:
        return path
    place = located(as_root(root) if root else Path().resolve(), path)
    if index_root is None:
        return place
    if is_url(place) or is_url(index_root):
        return place.removeprefix(f"{index_root}/")
    return relative_path(place, Path(index_root).resolve())


def is_below(address: str, root: Root) -> bool:
    """Return whether an address lies below a root and no trick in it leads elsewhere."""
    if not isinstance(root, str) or not address.startswith(f"{root}/"):
        return False
    return _TRICKS.search(address[len(root) + 1 :]) is None


def escaped(text: str) -> str:
    r"""Return text that can be stored: bytes of a file name that are no UTF-8 as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_of(place: str) -> str:
    """Return what messages call a place: without where in a tar the bytes are."""
    within = inside(place)
    shown = f"{within.file}?{within.member}" if within and within.member else place
    return cut(shown, 200) if is_url(place) else escaped(shown)


def shard_of(name: str) -> str | None:
    """Return the tar or table that a message's name of a picture is in; None of others."""
    fits = _NAMED.match(name)
    return None if fits is None else fits[1]


def open_place(place: str, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return the picture that lies at a place, upright and RGB, or raise ImageError."""
    name = name or name_of(place)
    if PLACE.match(place) is None:
        return read_image(place, max_pixels=max_pixels, name=name)
    return read_image(read_place(place, name), max_pixels=max_pixels, name=name)


def read_place(place: str, name: str, size: int | None = None) -> bytes:
    """Return the bytes of a picture's file, member or cell, or raise ImageError.

    Of a file at an address `size` may be known already.
    """
    within = inside(place)
    try:
        if within is None:
            from .remote import read_address

            return read_address(place, 0, size)
        if within.row >= 0:
            from .tables import cell

            return cell(within.file, within.row)
        from .tars import read_member

        return read_member(within)
    except ImageError as error:
        said = str(error)
        raise type(error)(said if said.startswith(name) else f"{name}: {said}") from error.__cause__
    except FileNotFoundError:
        raise ImageError(f"{name}: {_there(place)} does not exist") from None
    except PermissionError:
        raise ImageError(f"{name}: may not be read (permission denied)") from None
    except (OSError, ValueError) as error:
        if ran_out(error):
            raise
        raise ImageError(f"{name}: cannot be read ({reason(error)})") from None


def _there(place: str) -> str:
    within = inside(place)
    return "its address" if within is None else os.path.basename(within.file)


def stamp_of(file: str) -> str:
    """Return what changes when a file does: size and time, or what its store says of it."""
    if is_url(file):
        from .remote import stamp_of_address

        return stamp_of_address(file)
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return "unreadable"
    return f"{status.st_size}:{status.st_mtime_ns}"


def place_mark(place: str, stamp: str = "") -> np.ndarray:
    """Return the mark of a picture, uint32 `[4]`: as `file_mark` for what lies on this machine.

    Of a member or row its size, the CRC-32 of the stamp of its file (see `stamp_of`), and the
    BLAKE2b-64 of its bytes; of an address nothing is read: size 0, the CRC-32 of its stamp, and 0.
    """
    if PLACE.match(place) is None:
        return file_mark(place)
    if is_url(place):
        return np.array([0, zlib.crc32(stamp.encode()) if stamp else 0, 0, 0], np.uint32)
    within = inside(place)
    assert within is not None
    stamp = stamp_of(within.file)
    try:
        data = read_place(place, "")
    except ImageError:
        return np.array(NO_MARK, np.uint32)
    content = hashlib.blake2b(data, digest_size=8).digest()
    head = [len(data) % (1 << 32), zlib.crc32(stamp.encode())]
    return np.array([*head, *np.frombuffer(content, "<u4")], np.uint32)


def place_state(place: str, mark: np.ndarray, stamp: str = "") -> FileState | None:
    """Return whether a picture is the one that was marked; None where that is not known.

    An address is not asked: `stamp` says what its store said last, or nothing.
    """
    if PLACE.match(place) is None:
        return file_state(place, mark)
    if not np.any(mark):
        return None
    if is_url(place):
        if not stamp:
            return None
        return "same" if zlib.crc32(stamp.encode()) == int(mark[1]) else "changed"
    within = inside(place)
    assert within is not None
    stamp = stamp_of(within.file)
    if stamp == "unreadable":
        return "missing"
    if zlib.crc32(stamp.encode()) == int(mark[1]):
        return "same"
    now = place_mark(place)
    if not np.any(now):
        return "missing"
    same = int(now[0]) == int(mark[0]) and bool((now[2:] == mark[2:]).all())
    return "same" if same else "changed"


def is_there(place: str) -> bool:
    """Return whether a picture's file is there, as far as this machine knows without asking."""
    if is_url(place):
        return True
    within = inside(place)
    file = place if within is None else within.file
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or (within is not None and stat.S_ISDIR(mode))
