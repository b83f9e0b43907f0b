"""Tar shards as webdataset writes them: listed by their headers, read at a member's place.

Members of one key (the name up to the first dot behind the last slash) that follow each other are
one sample. They are taken by their ending as a picture, a class (.cls) or JSON; all others are
counted and never opened, so nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Final, NamedTuple

from ..errors import ImageError, InputError, cut, short
from .places import MAX_BYTES, Inside, escaped
from .reading import EXTENSIONS, is_url
from .remote import opened, read_address

BLOCK: Final = 512
_KEY: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META: Final = re.compile(r"__[^/]*__(?:$|/)")
_PLAIN: Final = b"0\0007"
_LONG: Final = 1 << 20
"""Bytes of a long name, a class or JSON, at most."""
LABELS: Final = ("label", "class", "cls")
"""Entries of JSON that are taken for the label, the first there is."""


class Member(NamedTuple):
    """A regular file in a tar: where its bytes begin, and how many they are."""

    name: str
    start: int
    size: int


class Sample(NamedTuple):
    """What a key has: its picture, and its label where it is told."""

    key: str
    picture: Member
    label: str | None = None


@dataclass(slots=True)
class Others:
    """What a shard holds beside pictures; counted."""

    endings: dict[str, int] = field(default_factory=dict)
    links: int = 0

    def count(self, ending: str) -> None:
        """Count a member of no use."""
        kind = escaped(cut(ending, 20))
        self.endings[kind] = self.endings.get(kind, 0) + 1


def members(file: IO[bytes], name: str, others: Others) -> Iterator[Member]:
    """Yield the regular members of a tar in order, from their headers alone; count other kinds.

    Raises InputError where it is no tar, breaks off, or says what cannot be.
    """
    place, end = 0, file.seek(0, os.SEEK_END)
    lasting, once = dict[str, str](), dict[str, str]()
    while True:
        file.seek(place)
        head = file.read(BLOCK)
        if not head.strip(b"\0"):  # the end, or no end at all
            return
        where = f"{name}: at byte {place:,}"
        kind, size = _header(head, where)
        told = {**lasting, **once}
        if kind not in b"xgLK" and "size" in told:
            size = _whole(told["size"], where)
        start = place + BLOCK
        if start + size > end:
            raise InputError(
                f"{where} names {size:,} bytes, and the file ends after {end - start:,}; it is "
                "broken: copy it again"
            )
        place = start + -(-size // BLOCK) * BLOCK
        if kind in b"xgLK":
            if size > _LONG:
                raise InputError(f"{where} has a name or note of {size:,} bytes; it is broken")
            data = file.read(size)
            if kind == b"L":
                once["path"] = data.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind != b"K":
                (once if kind == b"x" else lasting).update(_notes(data, where))
            continue
        once = {}
        sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in told)
        if kind in _PLAIN and kind and not sparse:
            member = told.get("path") or _name(head)
            if not (kind in b"\0" and member.endswith("/")):  # a folder of old tars
                yield Member(member, start, size)
        elif kind != b"5":
            others.links += 1


def _header(head: bytes, where: str) -> tuple[bytes, int]:
    """Return a header's type and size, its checksum compared."""
    if len(head) < BLOCK:
        raise InputError(f"{where} breaks off within a header; it is broken: copy it again")
    said = head[148:156].strip(b" \0")
    blank = head[:148] + b" " * 8 + head[156:]
    total = int(said, 8) if re.fullmatch(b"[0-7]{1,8}", said) else -1
    # Some count the bytes as signed.
    if total != sum(blank) and total != sum(byte - 256 * (byte > 127) for byte in blank):
        gzip = ": it is compressed; unpack it to .tar" if head[:2] == b"\x1f\x8b" else ""
        raise InputError(f"{where} is no header of a tar{gzip}")
    field = head[124:136]
    if field[0] & 0x80:
        return head[156:157], int.from_bytes(field, "big") & ((1 << 88) - 1)
    digits = field.strip(b" \0")
    if not re.fullmatch(b"[0-7]{0,12}", digits):
        raise InputError(f"{where} has no size; it is broken")
    return head[156:157], int(digits or b"0", 8)


def _whole(text: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputError(f"{where} has the size {short(text)}; it is broken")
    return int(text)


def _name(head: bytes) -> str:
    name, prefix = head[:100].split(b"\0")[0], head[345:500].split(b"\0")[0]
    if head[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _notes(data: bytes, where: str) -> dict[str, str]:
    """Return the records "length key=value" of a pax header."""
    notes, place = dict[str, str](), 0
    while place < len(data) and data[place]:
        digits = re.match(rb"([0-9]{1,9}) ", data[place : place + 10])
        stop = place + (int(digits[1]) if digits else 0)
        key, equals, value = data[place + (digits.end() if digits else 0) : stop - 1].partition(
            b"="
        )
        if digits is None or not place < stop <= len(data) or not equals:
            raise InputError(f"{where} has a note that cannot be read; it is broken")
        place = stop
        notes[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return notes


def samples(
    file: IO[bytes], name: str, others: Others, *, labelled: bool = True
) -> Iterator[Sample]:
    """Yield what each key of a shard has, with its picture; count all other members."""
    key = ""
    picture: Member | None = None
    cls: str | None = None
    about: str | None = None
    for member in members(file, name, others):
        fits = _KEY.fullmatch(member.name)
        if fits is None or _META.match(member.name):
            others.count(os.path.splitext(member.name)[1].lower())
            continue
        if fits[1] != key:
            if picture is not None:
                yield Sample(key, picture, cls if cls is not None else about)
            key, picture, cls, about = fits[1], None, None, None
        ending = f".{fits[2].rpartition('.')[2].lower()}"
        if ending in EXTENSIONS and picture is None:
            picture = member
        elif labelled and ending == ".cls" and cls is None and member.size <= _LONG:
            cls = _text(file, member) or None
        elif labelled and ending == ".json" and about is None and member.size <= _LONG:
            about = _label_of(_text(file, member))
            if about is None:
                others.count(ending)
        else:
            others.count(ending)
    if picture is not None:
        yield Sample(key, picture, cls if cls is not None else about)


def _text(file: IO[bytes], member: Member) -> str:
    file.seek(member.start)
    return file.read(member.size).decode("utf-8", "replace").strip()


def _label_of(text: str) -> str | None:
    """Return the label that JSON tells; None of what is no JSON, or tells none."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    label = next((told[name] for name in LABELS if told.get(name) is not None), None)
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    return str(label) or None


def read_member(place: Inside) -> bytes:
    """Return a member's bytes, where its header still stands before them; else raise ImageError."""
    if place.size > MAX_BYTES or place.start < BLOCK:
        raise ImageError(
            f"has {place.size:,} bytes, and of one picture at most {MAX_BYTES:,} are read"
        )
    begin, wanted = place.start - BLOCK, place.size + BLOCK
    if is_url(place.file):
        data = read_address(place.file, begin, wanted)
    else:
        data = _read(place.file, begin, wanted)
    if len(data) < wanted:
        raise ImageError(f"{os.path.basename(place.file)} ends before it; list its images again")
    head = data[:BLOCK]
    try:
        kind, size = _header(head, "")
    except InputError:
        kind, size = b"", -1
    stored = escaped(_name(head))
    # A longer name, or one of other letters, stands in a header of its own before this one.
    known = len(place.member) >= 100 or not place.member.isascii() or stored == place.member
    if not kind or kind not in _PLAIN or not known or size != place.size:
        raise ImageError(
            f"{os.path.basename(place.file)} holds something else there now; list its images again"
        )
    return data[BLOCK:]


def _read(path: str, start: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for ever
    try:
        return os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)


def listed(path: str, others: Others, *, labelled: bool = True) -> Iterator[Sample]:
    """Yield the samples of a shard that lies at a path or an address."""
    if is_url(path):
        with opened(path) as stream:
            yield from samples(stream, path, others, labelled=labelled)
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            raise InputError(f"{path}: is no regular file")
        with open(path, "rb") as stream:
            yield from samples(stream, path, others, labelled=labelled)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
