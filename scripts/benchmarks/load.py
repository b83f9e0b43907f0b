"""A closed loop of clients over loopback, and bodies that nobody honest sends."""

import http.client
import io
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import NamedTuple

from PIL import Image


class Call(NamedTuple):
    """A request, and the status it is to be answered with."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = {}
    expected: int = 200
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
    port: int,
    concurrency: int,
    calls: Iterator[Call],
    told: Callable[[Call, int, bytes, float], None],
) -> None:
    """Send calls, each client its next as soon as one is answered; `told` has every answer.

    One client at a time takes a call or tells. A connection that breaks is status 0.
    """
    lock = threading.Lock()

    def client() -> None:
        with closing(Caller(port)) as caller:
            while True:
                with lock:
                    call = next(calls, None)
                if call is None:
                    return
                try:
                    answer = caller(call)
                except OSError as error:
                    answer = 0, repr(error).encode(), 0.0
                with lock:
                    told(call, *answer)

    with ThreadPoolExecutor(concurrency) as pool:
        for one in [pool.submit(client) for _ in range(concurrency)]:
            one.result()


def until_ready(port: int) -> None:
    """Wait until a server takes requests, two minutes at most."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with suppress(OSError), closing(Caller(port)) as caller:
            if caller(Call("GET", "/readyz"))[0] == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server is not ready after two minutes")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, its checksum right."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, depth: int = 8, color: int = 0) -> bytes:
    """A PNG that says it has this size, whatever its pixels are."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
    note = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(50_000_000), 9))
    return plain[:33] + note + plain[33:]


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
    first, *rest = [Image.new("L", (40, 30), page % 256) for page in range(number)]
    return data_of(first, "TIFF", save_all=True, append_images=rest)


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
