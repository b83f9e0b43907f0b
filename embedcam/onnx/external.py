"""Whether an ONNX file keeps numbers in other files: found before ONNX Runtime would open them.

Read as protobuf is written, by field numbers alone, so that no package is needed. Only messages in
which a tensor can stand are entered; all else is skipped unread.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import NetworkError

# Of each message, the fields that hold a message in which a tensor can stand (onnx.proto).
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_DEEPEST = 200


def refuse_external(path: Path) -> None:
    """Refuse a file that names others, which may be any file of this machine.

    Raises:
        NetworkError: it does, or is not written as ONNX files are.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            external = _is_external(data, 0, len(data), "model", 0)
    except OSError as error:
        raise NetworkError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise NetworkError(
            f"{path}: ONNX Runtime cannot read it ({error}); write it again with `embedcam export`"
        ) from error
    if external:
        raise NetworkError(
            f"{path}: keeps numbers in other files, which are not opened; write it in one piece, "
            "with `embedcam export` or onnx.save(model, path, save_as_external_data=False)"
        )


def _is_external(data: mmap.mmap, start: int, stop: int, kind: str, depth: int) -> bool:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    inner = _FIELDS[kind]
    for field, first, last in _fields(data, start, stop):
        if kind == "tensor" and field in (_EXTERNAL_DATA, _DATA_LOCATION):
            # A location of 0 is the file itself.
            if field == _EXTERNAL_DATA or data[first:last].strip(b"\x80") != b"\x00":
                return True
        elif field in inner and _is_external(data, first, last, inner[field], depth + 1):
            return True
    return False


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, last byte + 1) of each field of a message."""
    at = start
    while at < stop:
        key, at = _varint(data, at, stop)
        wire = key & 7
        if wire == 0:
            first, (_, at) = at, _varint(data, at, stop)
        elif wire == 2:
            size, first = _varint(data, at, stop)
            at = first + size
        elif wire in (1, 5):
            first, at = at, at + (8 if wire == 1 else 4)
        else:
            raise ValueError("it is no protobuf")
        if at > stop:
            raise ValueError("it is cut short")
        yield key >> 3, first, at


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at + place >= stop:
            break
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("it is no protobuf")
