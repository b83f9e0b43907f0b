"""GET /items/{id}/image and /items/{id}/cam, /examples: the indexed images, and no other file.

An id is looked up in the index; the path read is the index's own, by `Explainer.picture_file`. What
leaves is a picture made again from the pixels, at a bounded size.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request
from PIL import Image
from starlette.responses import Response

from ..errors import EmbedcamError
from ..images import read_image
from ..index import Index
from ..preprocess import Extent
from .accept import choose
from .addresses import item_url
from .errors import Refused
from .parameters import only
from .pictures import encoded, overlay, shrunk
from .pipeline import Pipeline, find_live
from .schemas import ExamplesAnswer, ItemCam, refusals

logger = logging.getLogger("embedcam.service")

JPEG, WEBP, PNG, JSON = "image/jpeg", "image/webp", "image/png", "application/json"
MAX_SIDE, MAX_EXAMPLES = 1024, 24
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "It is still what `If-None-Match` names."}
}
_REFUSALS = (403, 404, 406, 422, 500, 503)


@dataclass(frozen=True)
class _Item:
    """A live row of the index."""

    index: Index
    position: int
    file: File | None


@dataclass(frozen=True)
class _Answer:
    """A body, None where the client has it already, and its tag."""

    body: bytes | None
    tag: str


def router(pipeline: Pipeline) -> APIRouter:
    """The three endpoints."""
    routes = APIRouter(tags=["items"])
    name_of = Annotated[str, Path(description="Id of an indexed image; it may hold slashes.")]
    side_of = Annotated[
        int, Query(ge=16, le=MAX_SIDE, description="Longer side of the picture at most.")
    ]

    @routes.get(
        "/items/{id:path}/image",
        operation_id="item_image",
        summary="An indexed image, made small",
        response_class=Response,
        responses={
            200: {"description": "Its pixels.", "content": {JPEG: _BINARY, WEBP: _BINARY}},
            **_UNCHANGED,
            **refusals(*_REFUSALS),
        },
        dependencies=[Depends(only("size"))],
    )
    async def image(request: Request, id: name_of, size: side_of = 512) -> Response:
        kind = choose(request.headers.get("accept"), (JPEG, WEBP))
        return await answered(request, id, kind, size)

    @routes.get(
        "/items/{id:path}/cam",
        operation_id="item_cam",
        summary="An indexed image's own map, as JSON or over the image",
        response_class=Response,
        responses={
            200: {"model": ItemCam, "content": {PNG: _BINARY, WEBP: _BINARY}},
            **_UNCHANGED,
            **refusals(*_REFUSALS),
        },
        dependencies=[Depends(only("size"))],
    )
    async def cam(request: Request, id: name_of, size: side_of = 512) -> Response:
        kind = choose(request.headers.get("accept"), (JSON, PNG, WEBP))
        return await answered(request, id, f"cam {kind}", size)

    @routes.get(
        "/examples",
        operation_id="examples",
        summary="A few indexed images to search with, from all over the index",
        response_class=Response,
        responses={200: {"model": ExamplesAnswer}, **refusals(403, 422, 500, 503)},
        dependencies=[Depends(only("count"))],
    )
    async def examples(
        request: Request, count: Annotated[int, Query(ge=1, le=MAX_EXAMPLES)] = 6
    ) -> Response:
        prefix = request.scope.get("root_path", "")
        with pipeline.gate.admitted():
            async with pipeline.deadline():
                body = await pipeline.in_thread(_examples, pipeline, count, prefix)
        return Response(body, media_type=JSON, headers={"Cache-Control": "private, max-age=60"})

    async def answered(request: Request, id: str, what: str, size: int) -> Response:
        known = request.headers.get("if-none-match", "")
        with pipeline.gate.admitted():
            async with pipeline.deadline():
                answer = await pipeline.in_thread(_answer, pipeline, id, what, size, known)
        headers = {
            "ETag": answer.tag,
            "Cache-Control": "private, max-age=60",
            "Vary": "Accept",
        }
        if answer.body is None:
            return Response(status_code=304, headers=headers)
        return Response(answer.body, media_type=what.rpartition(" ")[2], headers=headers)

    return routes


def _answer(pipeline: Pipeline, id: str, what: str, size: int, known: str) -> _Answer:
    item = _find(pipeline, id)
    tag = _tag(item, id, what, size)
    if tag in known or known.strip() == "*":
        return _Answer(None, tag)
    draws, _, kind = what.rpartition(" ")
    if not draws:
        picture = _picture(pipeline, item.file)
        if picture is None:
            raise Refused(404, "no_picture", "the picture of this image cannot be read any more")
        return _Answer(encoded(shrunk(picture, size), kind), tag)
    return _Answer(_cam(pipeline, item, id, kind, size), tag)


def _examples(pipeline: Pipeline, count: int, prefix: str) -> bytes:
    """Every so many images one, of those whose pictures are there."""
    live = pipeline.index.live_positions()
    chosen = live[np.unique(np.linspace(0, len(live) - 1, min(count, len(live))).astype(int))]
    rows = pipeline.index.select(chosen)
    items = []
    for name, label in zip(rows.ids, rows.labels, strict=True):
        file = pipeline.explainer.picture_file(name)
        if file is not None and file.is_file():
            urls = {f"{what}_url": item_url(prefix, name, what) for what in ("image", "cam")}
            items.append({"id": name, "label": label, **urls})
    return json.dumps({"items": items}, allow_nan=False, separators=(",", ":")).encode()


def _find(pipeline: Pipeline, id: str) -> _Item:
    index = pipeline.index
    position = find_live(index, id)
    return _Item(index, position, pipeline.explainer.picture_file(id))


def _tag(item: _Item, *what: object) -> str:
    """Changes when the index, the file or what is asked of them does; tells nothing of them."""
    about: list[object] = [item.index.manifest.manifest_sha256, *what]
    try:
        status = os.stat(item.file) if item.file is not None else None
    except (OSError, ValueError):
        status = None
    about += [] if status is None else [status.st_size, status.st_mtime_ns]
    return f'"{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}"'


def _picture(pipeline: Pipeline, file: File | None) -> Image.Image | None:
    if file is None:
        return None
    try:
        return read_image(file, max_pixels=pipeline.explainer.max_pixels)
    except EmbedcamError as error:
        logger.warning("an indexed image cannot be read: %s", error)
        return None


def _cam(pipeline: Pipeline, item: _Item, id: str, kind: str, size: int) -> bytes:
    """The map as JSON, or drawn over the picture."""
    row = item.index.select([item.position])
    maps = row.coarse()
    if maps is None:
        raise Refused(404, "no_map", "the index was built without the images' own maps")
    picture, state = _picture(pipeline, item.file), pipeline.explainer.file_state(id)
    extent = _extent(pipeline, picture)
    if kind != JSON:
        small = None if picture is None or extent is None else shrunk(picture, size)
        shape = None if picture is None else picture.size
        return encoded(overlay(small, maps[0], extent, shape, size, state == "changed"), kind)
    encoding = item.index.encoding()
    norm = encoding.norms(encoding.unpack(row.fields(0)))[0]
    body = {
        "id": id,
        "label": row.labels[0],
        "cam": np.round(maps[0].astype(float), 9).tolist(),
        "norm": float(norm),
        "file": state,
        "picture": None
        if picture is None
        else {"width": picture.size[0], "height": picture.size[1]},
        "extent": None if extent is None else list(extent),
    }
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _extent(pipeline: Pipeline, picture: Image.Image | None) -> Extent | None:
    preprocess = pipeline.explainer.preprocess
    if picture is None or preprocess is None:
        return None
    try:
        return preprocess.extent(*picture.size)
    except EmbedcamError:
        # A map over the wrong part of a picture would be worse than one beside it.
        return None
