"""Uploads to pictures, and back: guarded, never on disk, and what leaves is pixels alone."""

from __future__ import annotations

import asyncio
import io
import re
import zipfile
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import python_multipart
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from ..errors import ImageError, ImageTooLarge
from ..explain.queries import larger_input
from ..images import read_image
from ..preprocess import AnyPreprocess, Extent
from ..render import Tile, shrunk, top_value
from .errors import HTTPProblem
from .limits import Limits

PART: Final = "image"
"""Name of the form's field that holds the picture."""
FORM_TYPE: Final = "multipart/form-data"
RAW_TYPES: Final = (
    "image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif",
    "image/jp2", "application/octet-stream",
)  # fmt: skip
"""Types of a body that is the picture itself; the decoder looks at the bytes, not at the type."""
MAX_HEAD: Final = 8192
"""Bytes of a form field's headers: reading a long one takes time that grows with its square."""
MAX_RATIO: Final = 100
"""Of the sides of a picture. Bringing the short side of a longer one to the network's would make
gigabytes of it before the crop."""
MAX_SCANS: Final = 100
"""Of a JPEG; progressive ones have about ten. Each scan costs a pass over all pixels and may be a
few bytes long, so that a small file could keep a processor busy for hours."""
JSON, JPEG, PNG, WEBP = "application/json", "image/jpeg", "image/png", "image/webp"
_QUALITY: Final = {JPEG: 88, WEBP: 84, PNG: 0}
# Long enough to be in no compressed data by chance.
_OTHERS: Final = re.compile(rb"<script|<html[> ]|<!doctype html|<\?php ", re.IGNORECASE)
# A marker of a JPEG that begins a scan's data ends it too; within the data 0xFF is followed by 0 or
# by a restart.
_IN_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


class Upload(NamedTuple):
    """A body as it came, the boundary where it is a form, and whether it is JSON: words."""

    body: bytes
    boundary: str | None = None
    is_json: bool = False

    def picture(self) -> bytes:
        """Return the picture's bytes: the body, or a form's one field; or raise HTTPProblem."""
        if self.boundary is None:
            return self.body
        form = _Form()
        try:
            parser = python_multipart.MultipartParser(
                self.boundary.encode("latin-1"),
                {
                    "on_part_begin": form.begin,
                    "on_header_field": form.add_header,
                    "on_header_value": form.add_value,
                    "on_headers_finished": form.check_name,
                    "on_part_data": form.add_data,
                    "on_end": form.end,
                },
            )
            parser.write(self.body)
            parser.finalize()
        except FormParserError:
            raise _broken_form("cannot be read: its parts are broken") from None
        if not form.complete:
            raise _broken_form("breaks off before its last boundary")
        if not form.picture:
            raise _broken_form(f"holds no picture; send it in the field {PART!r}", "empty_body")
        return bytes(form.picture)


async def read_upload(request: Request, limits: Limits, words: bool = False) -> Upload:
    """Return the whole body, counted while it comes in, or raise HTTPProblem; JSON with `words`."""
    said = f"the body is longer than {limits.body_bytes} bytes, which is the limit"
    too_long = HTTPProblem(413, "body_too_long", f"{said}; send a smaller picture")
    declared = request.headers.get("content-length", "")
    if declared and not re.fullmatch(r"[0-9]{1,18}", declared):
        raise HTTPProblem(400, "unusable_header", "Content-Length: give a whole number of bytes")
    if declared and int(declared) > limits.body_bytes:
        raise too_long
    content_type = request.headers.get("content-type", "")
    is_json = words and content_type.partition(";")[0].strip().lower() == JSON
    boundary = None if is_json else _boundary(content_type, words)
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(limits.seconds):
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    said = "the connection was closed before the body was complete"
                    raise HTTPProblem(400, "cut_off", said)
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise too_long
                more = message.get("more_body", False)
    except TimeoutError:
        said = f"the body did not arrive within {limits.seconds:g} s; send it again"
        raise HTTPProblem(408, "slow_upload", said) from None
    if not body:
        raise HTTPProblem(422, "empty_body", "the body is empty; send the bytes of a picture")
    return Upload(bytes(body), boundary, is_json)


def _broken_form(said: str, code: str = "broken_form") -> HTTPProblem:
    return HTTPProblem(422, code, f"the form {said}")


def _boundary(content_type: str, words: bool) -> str | None:
    """Return the boundary of a form; None where the body is the picture itself."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            said = f'names no boundary; send {FORM_TYPE} as curl -F "{PART}=@picture.jpg" does'
            raise _broken_form(said)
        return boundary.decode("latin-1")
    if kind and kind not in RAW_TYPES:
        said = (
            f"this content type holds no picture that can be read; send {FORM_TYPE} with the field "
            f"{PART!r}, or the picture itself as {', '.join(RAW_TYPES[:3])} or another pixel format"
        )
        said += f"; or words as {JSON}" if words else ""
        accepted = {"Accept-Post": ", ".join((FORM_TYPE, *RAW_TYPES, *([JSON] if words else [])))}
        raise HTTPProblem(415, "unusable_type", said, accepted)
    return None


class _Form:
    """Collects the one field there may be; names of files are not looked at."""

    def __init__(self) -> None:
        self.picture, self.complete = bytearray(), False
        self._parts = self._length = 0
        self._name = self._disposition = b""

    def begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise _broken_form(f"has several fields; send {PART!r} alone, once", "too_many_parts")

    def add_header(self, data: bytes, start: int, end: int) -> None:
        self._name = self._counted(data[start:end]).lower()

    def add_value(self, data: bytes, start: int, end: int) -> None:
        value = self._counted(data[start:end])
        if self._name == b"content-disposition":
            self._disposition = value

    def _counted(self, part: bytes) -> bytes:
        self._length += len(part)
        if self._length > MAX_HEAD:
            raise _broken_form(f"has a field with headers of more than {MAX_HEAD} bytes")
        return part

    def check_name(self) -> None:
        if parse_options_header(self._disposition)[1].get(b"name") != PART.encode():
            raise _broken_form(f"has a field of another name; send it as {PART!r}", "unknown_part")

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self.picture += data[start:end]

    def end(self) -> None:
        self.complete = True


@dataclass(frozen=True)
class Prepared:
    """A picture, ready for the network: its input, and what it is drawn on."""

    inputs: np.ndarray  # [3 H W]
    size: tuple[int, int]  # (width, height)
    extent: Extent
    small: Tile  # without an image where nothing is drawn
    larger: np.ndarray | None = None  # the input at twice the side, for a finer map


def prepare(
    picture: Image.Image, preprocess: AnyPreprocess, side: int | None, detail: int = 1
) -> Prepared:
    """Return a picture with the network's input, and made small to `side` where it is drawn on."""
    inputs, extent = preprocess(picture), preprocess.extent(*picture.size)
    small = Tile(None) if side is None else shrunk(Tile(picture, extent=extent), side)
    larger = larger_input(picture, inputs, preprocess) if detail > 1 else None
    return Prepared(inputs, picture.size, extent, small, larger)


def read_picture(data: bytes, pixels: int) -> Image.Image:
    """Return an uploaded picture of at most so many pixels, upright.

    Raises HTTPProblem (too many pixels or scans, or something else beside a picture) or ImageError.
    """
    if data[:2] == b"\xff\xd8" and _count_scans(data) > MAX_SCANS:
        said = f"is a JPEG of more than {MAX_SCANS} scans; save it again, not progressive"
        raise HTTPProblem(422, "unreadable_image", f"the picture: {said}")
    try:
        picture = read_image(data, max_pixels=pixels, name="the picture")
    except ImageTooLarge:
        said = f"the picture has more than {pixels} pixels, which is the limit; send another"
        raise HTTPProblem(413, "too_many_pixels", said) from None
    # What else another program would take the file for. Nothing of an upload is ever sent back, so
    # such a file does no harm here; nobody has an honest reason to send one. What cameras append to
    # a JPEG, a film or a second picture, is no such thing.
    script = data[:3].lower() == b"gif" and data[6:8] == b"/*"
    document = b"%pdf-" in data[:1024].lower() or zipfile.is_zipfile(io.BytesIO(data))
    if script or document or _OTHERS.search(data):
        said = "is a script, a document or an archive as well; send a picture alone"
        raise HTTPProblem(422, "several_kinds", f"the picture: {said}")
    width, height = picture.size
    if max(width, height) > MAX_RATIO * min(width, height):
        said = f"is {width} x {height}; one side may be {MAX_RATIO} times the other at most"
        raise ImageError(f"the picture: {said}")
    return picture


def _count_scans(data: bytes) -> int:
    """Return the scans of a JPEG up to its end, `MAX_SCANS` + 1 for more."""
    at, scans = 2, 0
    while scans <= MAX_SCANS:
        marker = _IN_SCAN.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            break
        at = marker.end()
        if marker[1] == b"\x01":  # stands alone
            continue
        scans += marker[1] == b"\xda"
        at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    return scans


def overlaid(tile: Tile, side: int = 0) -> Image.Image:
    """Return a tile's picture with its map, on its own color scale; `side` of a map by itself."""
    size = (side, side) if tile.image is None else tile.image.size
    mapped = tile.drawn(size, top_value([tile]))[1]
    if mapped is None:
        raise ValueError("a tile without a map")
    return mapped


def encoded(picture: Image.Image, media_type: str) -> bytes:
    """Return the picture as a file of that type: pixels, and nothing else its file held."""
    stream = io.BytesIO()
    bare, kind = Image.fromarray(np.asarray(picture.convert("RGB"))), media_type.split("/")[1]
    bare.save(stream, kind, quality=_QUALITY[media_type], method=2)
    return stream.getvalue()
