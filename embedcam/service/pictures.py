"""Bytes to pictures and back: what clients send is guarded, what they get is pixels alone."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from ..errors import ImageError, ImageTooLarge
from ..explain.finer import larger_input
from ..images import read_image
from ..preprocess import AnyPreprocess, Extent
from ..render import Tile, top_value
from ..render.overlay import scale_box
from .errors import Refused

NAME: Final = "the picture"
MAX_RATIO: Final = 100
"""Of the sides of a picture. Bringing the short side of a longer one to the network's would make
gigabytes of it before the crop."""
MAX_SCANS: Final = 100
"""Of a JPEG; progressive ones have about ten. Each scan costs a pass over all pixels and may be a
few bytes long, so that a small file could keep a processor busy for hours."""

_QUALITY: Final = {"JPEG": {"quality": 88}, "WEBP": {"quality": 84, "method": 2}, "PNG": {}}
_FORMATS: Final = {"image/jpeg": "JPEG", "image/webp": "WEBP", "image/png": "PNG"}

# Long enough to be in no compressed data by chance.
_OTHERS: Final = {
    b"<script": "a script", b"<html>": "HTML", b"<html ": "HTML", b"<!doctype html": "HTML",
    b"<?php ": "PHP",
}  # fmt: skip

# A marker of a JPEG that begins a scan's data ends it too; within the data 0xFF is followed by 0 or
# by a restart.
_IN_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


@dataclass(frozen=True)
class Query:
    """An uploaded picture, ready for the network.

    Attributes:
        inputs: the network's input, float32 `[3 H W]`.
        size: (width, height) of the upright picture.
        extent: what the network sees of it, (x0, y0, x1, y1) in its pixels.
        small: the picture for drawing on, made small; None where nothing is drawn.
        larger: the input at twice the side, `[3 2H 2W]`, for a finer map; None without.
    """

    inputs: np.ndarray
    size: tuple[int, int]
    extent: Extent
    small: Image.Image | None
    larger: np.ndarray | None = None


def read_query(
    data: bytes, preprocess: AnyPreprocess, pixels: int, side: int | None, detail: int = 1
) -> Query:
    """Decode and prepare an uploaded picture.

    Args:
        data: the bytes of its file.
        preprocess: the network's.
        pixels: limit.
        side: the longer side in pixels that the picture is made small to; None where nothing will
            be drawn.
        detail: 2 prepares it at twice the side, too.

    Raises:
        Refused: too many pixels or scans, or a file that is something else beside a picture.
        ImageError: it cannot be decoded.
    """
    _check_scans(data)
    try:
        picture = read_image(data, max_pixels=pixels, name=NAME)
    except ImageTooLarge:
        raise Refused(
            413,
            "too_many_pixels",
            f"{NAME} has more than {pixels} pixels, which is the limit; send another",
        ) from None
    _check_alone(data)
    width, height = picture.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"{NAME}: is {width} x {height}; one side may be {MAX_RATIO} times the other at most"
        )
    inputs = preprocess(picture)
    return Query(
        inputs=inputs,
        size=picture.size,
        extent=preprocess.extent(width, height),
        small=None if side is None else shrunk(picture, side),
        larger=larger_input(picture, inputs, preprocess) if detail > 1 else None,
    )


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at most `side` pixels; never enlarged."""
    if max(picture.size) <= side:
        return picture
    size = Tile(picture).fitted(side, side)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def overlay(
    small: Image.Image | None,
    cam: np.ndarray,
    extent: Extent | None,
    size: tuple[int, int] | None,
    side: int,
    changed: bool = False,
) -> Image.Image:
    """A map over a picture that was made small, on its own colour scale.

    Args:
        small: the picture, or None: the map is then drawn by itself.
        cam: `[h w]`.
        extent: what the map covers, in pixels of the picture as it was.
        size: (width, height) of the picture as it was.
        side: of the picture of a map by itself.
        changed: the picture is another than the map was made of: the map is drawn by itself.
    """
    box = None
    if small is not None and size is not None and extent is not None:
        box = scale_box(extent, size, small.size)
    tile = Tile(small, cam, box, changed=changed)
    _, drawn = tile.drawn(
        tile.fitted(side, side) if small is None else small.size, top_value([tile])
    )
    assert drawn is not None  # there is a map
    return drawn


def encoded(picture: Image.Image, media_type: str) -> bytes:
    """The picture as a file of that type, without any of what its own file held beside pixels."""
    bare = Image.fromarray(np.asarray(picture.convert("RGB")))
    held = io.BytesIO()
    kind = _FORMATS[media_type]
    options: dict[str, Any] = _QUALITY[kind]
    bare.save(held, kind, **options)
    return held.getvalue()


def _check_alone(data: bytes) -> None:
    """Refuse a picture that another program would take for something else.

    Nothing of an upload is ever sent back, so such a file does no harm here; nobody has an honest
    reason to send one. What cameras append to a JPEG, a film or a second picture, is no such thing.
    """
    words = data.lower()
    kind = next((kind for word, kind in _OTHERS.items() if word in words), None)
    if b"%pdf-" in words[:1024]:
        kind = "PDF"
    elif words[:3] == b"gif" and words[6:8] == b"/*":
        kind = "a script"
    elif zipfile.is_zipfile(io.BytesIO(data)):
        kind = "a ZIP archive"
    if kind is not None:
        raise Refused(
            422, "several_kinds", f"{NAME}: is {kind} as well; send a file that is a picture alone"
        )


def _check_scans(data: bytes) -> None:
    if data[:2] == b"\xff\xd8" and _count_scans(data) > MAX_SCANS:
        raise Refused(
            422,
            "unreadable_image",
            f"{NAME}: is a JPEG of more than {MAX_SCANS} scans; save it again, not progressive",
        )


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end, `MAX_SCANS` + 1 for more."""
    at, scans = 2, 0
    while scans <= MAX_SCANS:
        marker = _IN_SCAN.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            break
        at = marker.end()
        if marker[1] == b"\x01":  # stands alone
            continue
        scans += marker[1] == b"\xda"
        length = int.from_bytes(data[at : at + 2], "big")
        at += max(length, 2)
    return scans
