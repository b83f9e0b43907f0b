"""The body of a request: counted while it comes in, and never on disk."""

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import python_multipart
from python_multipart.exceptions import FormParserError
from starlette.requests import Request
from starlette.types import Receive

from .errors import Refused
from .limits import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PART: Final = "image"
"""Name of the form's field that holds the picture."""

RAW_TYPES: Final = (
    "image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif",
    "image/jp2", "application/octet-stream",
)  # fmt: skip
"""Types of a body that is the picture itself; the decoder looks at the bytes, not at the type."""
FORM_TYPE: Final = "multipart/form-data"
MAX_HEAD: Final = 8192
"""Bytes of a form field's headers: reading a long one takes time that grows with its square."""


@dataclass(frozen=True)
class Upload:
    """A body as it came, and the boundary where it is a form."""

    body: bytes
    boundary: str | None = None


async def read_upload(request: Request, limits: Limits) -> Upload:
    """The whole body.

    Raises:
        Refused: 408 too slow, 413 too long, 415 a type that holds no picture, 422 nothing in it.
    """
    declared = request.headers.get("content-length", "")
    if declared and not re.fullmatch(r"[0-9]{1,18}", declared):
        raise Refused(400, "unusable_header", "Content-Length: give a whole number of bytes")
    if declared and int(declared) > limits.body_bytes:
        raise _too_long(limits)
    boundary = _boundary(request.headers.get("content-type", ""))
    try:
        async with asyncio.timeout(limits.seconds):
            body = await _collected(request.receive, limits)
    except TimeoutError:
        raise Refused(
            408,
            "slow_upload",
            f"the body did not arrive within {limits.seconds:g} s; send it again",
        ) from None
    if not body:
        raise Refused(422, "empty_body", "the body is empty; send the bytes of a picture")
    return Upload(body, boundary)


async def _collected(receive: Receive, limits: Limits) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "cut_off", "the connection was closed before the body was complete")
        body += message.get("body", b"")
        if len(body) > limits.body_bytes:
            raise _too_long(limits)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(limits: Limits) -> Refused:
    return Refused(
        413,
        "body_too_long",
        f"the body is longer than {limits.body_bytes} bytes, which is the limit; send a smaller "
        "picture",
    )


def _boundary(content_type: str) -> str | None:
    """The boundary of a form; None where the body is the picture itself."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        _, options = python_multipart.multipart.parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise Refused(
                422, "broken_form", "the form names no boundary; send multipart/form-data as curl "
                f'-F "{PART}=@picture.jpg" does',
            )  # fmt: skip
        return boundary.decode("latin-1")
    if kind and kind not in RAW_TYPES:
        raise Refused(
            415,
            "unusable_type",
            f"this content type holds no picture that can be read; send {FORM_TYPE} with the field "
            f"{PART!r}, or the picture itself as image/jpeg, image/png, image/webp or another "
            "pixel format",
            {"Accept-Post": ", ".join((FORM_TYPE, *RAW_TYPES))},
        )
    return None


def picture_in(upload: Upload) -> bytes:
    """The bytes of the picture: the body itself, or the one field of the form.

    Names of files are not looked at.

    Raises:
        Refused: 422, a form that is broken, or whose fields are not the picture alone.
    """
    if upload.boundary is None:
        return upload.body
    form = _Form()
    try:
        boundary = upload.boundary.encode("latin-1")
        parser = python_multipart.MultipartParser(boundary, form.callbacks())
        parser.write(upload.body)
        parser.finalize()
    except FormParserError:
        raise Refused(422, "broken_form", "the form cannot be read: its parts are broken") from None
    if not form.complete:
        raise Refused(422, "broken_form", "the form breaks off before its last boundary")
    if not form.picture:
        raise Refused(
            422, "empty_body", f"the form holds no picture; send it in the field {PART!r}"
        )
    return bytes(form.picture)


class _Form:
    """Collects the one field there may be."""

    def __init__(self) -> None:
        self.picture = bytearray()
        self.complete = False
        self._parts = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._head = 0

    def callbacks(self) -> "MultipartCallbacks":
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_name,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise Refused(
                422, "too_many_parts", f"the form has several fields; send {PART!r} alone, once"
            )

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, length: int) -> None:
        self._head += length
        if self._head > MAX_HEAD:
            raise Refused(
                422, "broken_form", f"the form's field has headers of more than {MAX_HEAD} bytes"
            )

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _check_name(self) -> None:
        _, options = python_multipart.multipart.parse_options_header(self._disposition)
        if options.get(b"name") != PART.encode():
            raise Refused(
                422, "unknown_part", f"the form has a field of another name; send it as {PART!r}"
            )

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self.picture += data[start:end]

    def _end(self) -> None:
        self.complete = True
