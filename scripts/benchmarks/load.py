"""A closed loop of clients over loopback, and bodies that nobody honest sends."""

import http.client
import io
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Call:
    """A request, and the status it is to be answered with."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: Sequence[int] = (200,)
    name: str = ""


class Caller:
    """One client; connects again where the server has closed."""

    def __init__(self, port: int, seconds: float = 120) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)

    def __call__(self, call: Call) -> tuple[int, bytes, float]:
        """Status, body, and seconds from the first byte sent to the last one read."""
        for again in (False, True):
            start = time.perf_counter()
            try:
                self.connection.request(call.method, call.path, call.body, dict(call.headers))
                found = self.connection.getresponse()
                body = found.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                # A kept connection may have been closed meanwhile: once is no fault.
                self.connection.close()
                if again:
                    raise
                continue
            return found.status, body, time.perf_counter() - start
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Let go of the connection."""
        self.connection.close()


def closed_loop(
    port: int, concurrency: int, number: int, call: Callable[[int], Call]
) -> list[float]:
    """Seconds of each of `number` requests, the next sent as soon as one is answered."""
    left = iter(range(number))
    lock, seconds, faults = threading.Lock(), list[float](), list[str]()

    def client() -> None:
        with closing(Caller(port)) as caller:
            while True:
                with lock:
                    place = next(left, None)
                if place is None or faults:
                    return
                wanted = call(place)
                status, body, took = caller(wanted)
                with lock:
                    seconds.append(took)
                    if status not in wanted.expected:
                        faults.append(f"{wanted.method} {wanted.path}: {status} {body[:200]!r}")

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    if faults:
        raise RuntimeError(faults[0])
    if len(seconds) != number:
        raise RuntimeError(f"{number - len(seconds)} of {number} requests had no answer")
    return seconds


def png(width: int, height: int, pixels: bytes, depth: int = 8, color: int = 0) -> bytes:
    """A PNG that says it has this size, whatever its pixels are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def claimed() -> bytes:
    """100,000 x 100,000 in its header, and no pixels."""
    return png(100_000, 100_000, zlib.compress(b""))


def bomb() -> bytes:
    """A true one: 49 kB that are 400 million pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 2500) * 1000) for _ in range(20))
    return png(20_000, 20_000, rows + packer.flush(), depth=1)


def overlong() -> bytes:
    """Small by its header; its data unpacks to a hundred times as much."""
    return png(20, 20, zlib.compress(bytes(21 * 20 + 50_000_000), 9))


def text_bomb() -> bytes:
    """A compressed comment of 50 MB before the pixels."""
    plain = data_of(Image.new("RGB", (40, 30), 7), "PNG")
    note = b"zTXt", b"note\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(note[1])) + note[0] + note[1]
    return plain[:33] + chunk + struct.pack(">I", zlib.crc32(note[0] + note[1])) + plain[33:]


def scans(number: int) -> bytes:
    """A JPEG whose last scan is repeated: each costs a pass over the pixels."""
    whole = data_of(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * number + whole[-2:]


def animation(frames: int) -> bytes:
    whole = data_of(Image.new("P", (40, 30), 1), "GIF")
    start = whole.rindex(b"\x2c")
    return whole[:start] + whole[start:-1] * frames + whole[-1:]


def pages(number: int) -> bytes:
    held = io.BytesIO()
    first, *rest = [Image.new("L", (40, 30), page % 256) for page in range(number)]
    first.save(held, "TIFF", save_all=True, append_images=rest)
    return held.getvalue()


def archive() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as packed:
        packed.writestr("evil.py", "import os")
    return data_of(Image.new("RGB", (40, 30), 7), "JPEG") + held.getvalue()


SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><text>&x;</text></svg>"""


def data_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()
