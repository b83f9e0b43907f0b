"""GET /items/{id}/image and /items/{id}/cam, /examples: the indexed images, and no other file.

An id is looked up in the index; the path read is the index's own, by `Explainer.picture_file`. What
leaves is a picture made again from the pixels, at a bounded size.
"""

import hashlib
import logging
import os
from contextlib import suppress
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from PIL import Image
from pydantic import BaseModel, Field
from starlette.responses import Response

from ..errors import EmbedcamError
from ..images import read_image
from ..index import Selection
from ..preprocess import Extent
from ..render import Tile, shrunk
from . import schemas
from .errors import HTTPProblem, choose
from .pictures import JPEG, JSON, PNG, WEBP, encoded, overlaid
from .pipeline import Pipeline, find_live

logger = logging.getLogger("embedcam.service")

MAX_SIDE, MAX_EXAMPLES = 1024, 24
_PROBLEMS = (403, 404, 406, 422, 500, 503)


class ItemParameters(BaseModel):
    """Query parameters of an item."""

    size: int = Field(
        default=512, ge=16, le=MAX_SIDE, description="Longer side of the picture at most."
    )


class ExamplesParameters(BaseModel):
    """Query parameters of the examples."""

    count: int = Field(default=6, ge=1, le=MAX_EXAMPLES)


def router(pipeline: Pipeline) -> APIRouter:
    """Return the three endpoints."""
    routes = APIRouter(tags=["items"])
    about = partial(schemas.route, parameters=ItemParameters)
    describe_image = about(
        "An indexed image, made small", None, *_PROBLEMS, drawn=(JPEG, WEBP), said="Its pixels."
    )
    words = "An indexed image's own map, as JSON or over the image"
    describe_cam = about(words, schemas.ItemCam, *_PROBLEMS, drawn=(PNG, WEBP))
    for described in (describe_image, describe_cam):
        described["responses"][304] = {"description": "It is still what `If-None-Match` names."}
    name_of = Annotated[str, Path(description="Id of an indexed image; it may hold slashes.")]
    item_parameters = Annotated[ItemParameters, Query()]

    @routes.get("/items/{id:path}/image", operation_id="item_image", **describe_image)
    async def image(request: Request, id: name_of, asked: item_parameters) -> Response:
        return await answered(request, id, choose(request, (JPEG, WEBP)), asked.size, False)

    @routes.get("/items/{id:path}/cam", operation_id="item_cam", **describe_cam)
    async def cam(request: Request, id: name_of, asked: item_parameters) -> Response:
        return await answered(request, id, choose(request, (JSON, PNG, WEBP)), asked.size, True)

    async def answered(request: Request, id: str, kind: str, size: int, with_map: bool) -> Response:
        known = request.headers.get("if-none-match", "").strip()
        async with pipeline.admitted():
            asked = (pipeline, id, kind, size, with_map, known)
            body, tag = await pipeline.in_thread(_item, *asked)
        headers = {"ETag": tag, "Cache-Control": "private, max-age=60", "Vary": "Accept"}
        if body is None:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    summary = "A few indexed images to search with, from all over the index"
    described = schemas.route(
        summary, schemas.ExamplesAnswer, *(403, 422, 500, 503), parameters=ExamplesParameters
    )

    @routes.get("/examples", operation_id="examples", **described)
    async def examples(request: Request, asked: Annotated[ExamplesParameters, Query()]) -> Response:
        prefix = request.scope.get("root_path", "")
        async with pipeline.admitted():
            body = await pipeline.in_thread(_examples, pipeline, asked.count, prefix)
        return Response(body, media_type=JSON, headers={"Cache-Control": "private, max-age=60"})

    return routes


def _examples(pipeline: Pipeline, count: int, prefix: str) -> bytes:
    """Take every so many images one, of those whose pictures are there."""
    live = pipeline.index.live_positions()
    chosen = live[np.unique(np.linspace(0, len(live) - 1, min(count, len(live))).astype(int))]
    rows = pipeline.index.select(chosen)
    items = []
    for name, label in zip(rows.ids, rows.labels, strict=True):
        file = pipeline.explainer.picture_file(name)
        if file is not None and file.is_file():
            items.append(schemas.Example(id=name, label=label, **schemas.urls_of(prefix, name)))
    return schemas.written(schemas.ExamplesAnswer(items=items))


def _item(
    pipeline: Pipeline, id: str, kind: str, size: int, with_map: bool, known: str
) -> tuple[bytes | None, str]:
    """Return the body, None where the client has it already, and its tag."""
    index, explainer = pipeline.index, pipeline.explainer
    position, file = find_live(index, id), explainer.picture_file(id)
    about: list[object] = [index.manifest.manifest_sha256, id, kind, size, with_map]
    with suppress(OSError, ValueError):
        if file is not None:
            status = os.stat(file)
            about += [status.st_size, status.st_mtime_ns]
    # It changes when index, file or the question does, and tells none of them.
    tag = f'"{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}"'
    if tag in known or known == "*":
        return None, tag
    picture: Image.Image | None = None
    try:
        picture = None if file is None else read_image(file, max_pixels=explainer.max_pixels)
    except EmbedcamError as error:
        logger.warning("an indexed image cannot be read: %s", error)
    if with_map:
        return _cam(pipeline, index.select([position]), picture, kind, size), tag
    if picture is None:
        raise HTTPProblem(404, "no_picture", "the picture of this image cannot be read any more")
    small = shrunk(Tile(picture), size).image or picture
    return encoded(small, kind), tag


def _cam(
    pipeline: Pipeline, row: Selection, picture: Image.Image | None, kind: str, size: int
) -> bytes:
    """Return the stored map as JSON, or drawn over the picture."""
    maps, (id,), (label,) = row.coarse(), row.ids, row.labels
    if maps is None:
        raise HTTPProblem(404, "no_map", "the index was built without the images' own maps")
    state = pipeline.explainer.file_state(id)
    extent: Extent | None = None
    if picture is not None:
        # A map over the wrong part of a picture would be worse than one beside it.
        with suppress(EmbedcamError):
            extent = pipeline.preprocess.extent(*picture.size)
    if kind != JSON:
        shown = None if extent is None else picture
        tile = Tile(shown, maps[0], extent, changed=state == "changed")
        return encoded(overlaid(shrunk(tile, size), size), kind)
    encoding = pipeline.index.encoding()
    answer = schemas.ItemCam(
        id=id,
        label=label,
        cam=np.round(maps[0].astype(float), 9).tolist(),
        norm=float(encoding.norms(encoding.unpack(row.fields(0)))[0]),
        file=state,
        picture=None if picture is None else schemas.size_of(picture.size),
        extent=None if extent is None else list(extent),
    )
    return schemas.written(answer)
