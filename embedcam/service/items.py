"""GET /items/{id}/image and /items/{id}/cam, /examples: the indexed images, and no other file.

An id is looked up in the index; the path read is the index's own, by `Explainer.picture_place`.
What leaves is a picture made again from the pixels, at a bounded size.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from PIL import Image
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..errors import EmbedcamError
from ..explain.explainer import Explainer
from ..images import is_there, is_url
from ..images.places import inside, stamp_of
from ..render import Tile, shrunk, window
from . import schemas
from .errors import CELL, HTTPProblem, choose
from .pictures import JPEG, JSON, PNG, WEBP, overlaid
from .pipeline import Pipeline, find_live

logger = logging.getLogger("embedcam.service")

MAX_SIDE, MAX_EXAMPLES = 1024, 24
_PROBLEMS = (403, 404, 406, 422, 500, 502, 503)
_FOR_A_MINUTE = {"Cache-Control": "private, max-age=60"}


class ItemParameters(BaseModel):
    """Query parameters of an item."""

    size: int = Field(
        default=512, ge=16, le=MAX_SIDE, description="Longer side of the picture at most."
    )


class ImageParameters(ItemParameters):
    """Query parameters of an item's picture."""

    cell: Annotated[str, Field(pattern=CELL, examples=["2,5"])] | SkipJsonSchema[None] = Field(
        default=None,
        description="Row and column of a cell, from 0: it alone is shown, with those around it.",
    )


class ExamplesParameters(BaseModel):
    """Query parameters of the examples."""

    count: int = Field(default=6, ge=1, le=MAX_EXAMPLES)


Name = Annotated[str, Path(description="Id of an indexed image; it may hold slashes.")]
Asked = Annotated[ItemParameters, Query()]


def router(pipeline: Pipeline) -> APIRouter:
    """Return the three endpoints."""
    routes = APIRouter(tags=["items"])
    of_image = schemas.route(
        "An indexed image, made small",
        None,
        *_PROBLEMS,
        parameters=ImageParameters,
        drawn=(JPEG, WEBP),
        said="Its pixels.",
    )
    of_cam = schemas.route(
        "An indexed image's own map, as JSON or over the image",
        schemas.ItemCam,
        *_PROBLEMS,
        parameters=ItemParameters,
        drawn=(PNG, WEBP),
    )
    of_examples = schemas.route(
        "A few indexed images to search with, from all over the index",
        schemas.ExamplesAnswer,
        *(403, 422, 500, 502, 503),
        parameters=ExamplesParameters,
    )
    for described in (of_image, of_cam):
        described["responses"][304] = {"description": "It is still what `If-None-Match` names."}

    @routes.get("/items/{id:path}/image", **of_image)
    async def item_image(
        request: Request, id: Name, asked: Annotated[ImageParameters, Query()]
    ) -> Response:
        kind = choose(request, (JPEG, WEBP))
        async with pipeline.admitted(request):
            held = await pipeline.holding([id])
            return await pipeline.in_thread(
                _item, held, request, id, kind, asked.size, False, asked.cell
            )

    @routes.get("/items/{id:path}/cam", **of_cam)
    async def item_cam(request: Request, id: Name, asked: Asked) -> Response:
        kind = choose(request, (JSON, PNG, WEBP))
        async with pipeline.admitted(request):
            held = await pipeline.holding([id])
            return await pipeline.in_thread(_item, held, request, id, kind, asked.size, True)

    @routes.get("/examples", **of_examples)
    async def examples(request: Request, asked: Annotated[ExamplesParameters, Query()]) -> Response:
        async with pipeline.admitted(request):
            held, ids = await pipeline.some(asked.count)
            return await pipeline.in_thread(_examples, held, request, ids)

    return routes


def _examples(explainer: Explainer, request: Request, ids: Sequence[str]) -> Response:
    """Answer with those images whose pictures are there."""
    labels = explainer.index.select(explainer.index.positions(ids)).labels
    items = []
    for id, label in zip(ids, labels, strict=True):
        place = explainer.picture_place(id)
        if place is not None and is_there(place):
            urls = schemas.urls_of(request, id)
            items.append(schemas.Example(id=id, label=label, **urls))
    return schemas.response(schemas.ExamplesAnswer(items=items), headers=_FOR_A_MINUTE)


def _item(
    explainer: Explainer,
    request: Request,
    id: str,
    kind: str,
    size: int,
    with_map: bool,
    cell: str | None = None,
) -> Response:
    """Answer with an image or its map; where the client has it already, with that alone."""
    index = explainer.index
    position, place = find_live(index, id), explainer.picture_place(id)
    about: list[object] = [index.manifest.manifest_sha256, id, kind, size, with_map, cell]
    row = index.select([position])  # a store's changes without its model
    about += [row.array(column).tobytes() for column in index.columns.values()]
    if place is not None and not is_url(place):  # what lies elsewhere is not asked about
        within = inside(place)
        about.append(stamp_of(place if within is None else within.file))
    # It changes when index, file or the question does, and tells none of them.
    tag = schemas.tag_of(repr(about).encode())
    headers = {"ETag": tag, "Vary": "Accept", **_FOR_A_MINUTE}
    if schemas.is_known(request, tag):
        return Response(status_code=304, headers=headers)
    picture: Image.Image | None = None
    try:
        picture = None if place is None else explainer.picture(id)
    except EmbedcamError as error:
        logger.warning("an indexed image cannot be read: %s", error)
    if with_map:
        return schemas.response(_cam(explainer, position, picture, kind, size), kind, headers)
    if picture is None:
        raise HTTPProblem(404, "no_picture", "the picture of this image cannot be read any more")
    if cell is not None:
        picture = _around(explainer, picture, cell)
    return schemas.response(shrunk(Tile(picture), size).image or picture, kind, headers)


def _around(explainer: Explainer, picture: Image.Image, cell: str) -> Image.Image:
    """Return what lies around a cell "row,column" of the layer's grid."""
    grid, preprocess = explainer.index.manifest.layers[0].grid, explainer.preprocess
    row, column = map(int, cell.split(","))
    if grid is None or preprocess is None or row >= grid[0] or column >= grid[1]:
        raise HTTPProblem(404, "unknown_cell", "the layer's grid has no such cell")
    return window(picture, preprocess.extent(*picture.size), grid, (row, column))


def _cam(
    explainer: Explainer, position: int, picture: Image.Image | None, kind: str, size: int
) -> schemas.ItemCam | Image.Image:
    """Return the stored map for JSON, or drawn over the picture."""
    row, preprocess = explainer.index.select([position]), explainer.preprocess
    maps, (id,), (label,) = row.coarse(), row.ids, row.labels
    if maps is None:
        raise HTTPProblem(404, "no_map", "the index was built without the images' own maps")
    state, extent = explainer.file_state(id), None
    if picture is not None and preprocess is not None:
        # A map over the wrong part of a picture would be worse than one beside it.
        with suppress(EmbedcamError):
            extent = preprocess.extent(*picture.size)
    if kind != JSON:
        shown = None if extent is None else picture
        tile = Tile(shown, maps[0], extent, changed=state == "changed")
        return overlaid(shrunk(tile, size), size)
    encoding = explainer.index.encoding()
    return schemas.ItemCam(
        id=id,
        label=label,
        cam=np.round(maps[0].astype(float), 9).tolist(),
        norm=float(encoding.norms(encoding.unpack(row.fields(0)))[0]),
        file=state,
        picture=None if picture is None else schemas.size_of(picture.size),
        extent=None if extent is None else list(extent),
    )
