"""POST /explain and POST /search: a picture goes in, what it is like and why comes out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from PIL import Image
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..explain.explanation import Explanation, Result
from . import schemas
from .errors import choose
from .pictures import FORM_TYPE, JSON, PART, PNG, RAW_TYPES, WEBP, Prepared, overlaid
from .pipeline import Pipeline

MAX_CELLS, MAX_SIDE = 224, 1024
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A picture: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000; of an "
        "animation the first frame. As the form field `image`, or as the body itself.",
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": [PART],
                    "additionalProperties": False,
                    "properties": {PART: {"type": "string", "format": "binary"}},
                },
                "encoding": {PART: {"contentType": ", ".join(RAW_TYPES)}},
            },
            **{kind: schemas.BINARY for kind in RAW_TYPES},
        },
    }
}
PROBLEMS = (400, 403, 408, 413, 415, 422, 500, 503)


def router(pipeline: Pipeline) -> APIRouter:
    """Return the two endpoints."""
    routes = APIRouter(tags=["queries"])
    most = pipeline.limits.n_neighbors

    class SearchParameters(BaseModel):
        n_neighbors: int = Field(
            default=pipeline.n_neighbors, ge=1, le=most, description="Images that come back."
        )

    class ExplainParameters(SearchParameters):
        result: str | SkipJsonSchema[None] = Field(
            default=None, description="Id of one image: what in the picture matched this one."
        )
        rival: str | SkipJsonSchema[None] = Field(
            default=None,
            description="Id of another image, with `result`: what in the picture speaks for the "
            "result rather than for this one.",
        )
        detail: int = Field(
            default=pipeline.explainer.detail,
            ge=1,
            le=2,
            description="2 draws a finer map: the picture is shown to the network once more at "
            "twice the side, for about four more embeddings.",
        )
        signed: bool = Field(
            default=False,
            description="Of the JSON: the map before its ReLU, too, negative where the picture "
            "speaks against the results.",
        )
        map_size: int = Field(
            default=14, ge=1, le=MAX_CELLS, description="Of the JSON's map: cells a side at most."
        )
        picture_size: int = Field(
            default=512, ge=16, le=MAX_SIDE, description="Of an overlay: its longer side at most."
        )

    @routes.post(
        "/explain",
        **schemas.route(
            "Which images are like this picture, and why",
            schemas.ExplainAnswer,
            *(404, 406, *PROBLEMS),
            parameters=ExplainParameters,
            drawn=(PNG, WEBP),
            said="The results and the maps as JSON; or the picture with its map over it, where "
            "`Accept` asks for a picture.",
            body=BODY,
        ),
    )
    async def explain(request: Request, asked: Annotated[ExplainParameters, Query()]) -> Response:
        kind = choose(request, (JSON, PNG, WEBP))
        side = None if kind == JSON else asked.picture_size

        def answer(picture: Prepared, why: Explanation) -> Response:
            told: Image.Image | schemas.ExplainAnswer = (
                _explained(request, picture, why, asked.map_size, asked.signed)
                if kind == JSON
                else overlaid(replace(picture.small, cam=why.cam))
            )
            return schemas.response(told, kind, {"Vary": "Accept"})

        async with pipeline.admitted(request) as upload:
            about = (asked.n_neighbors, asked.result, asked.rival, asked.detail, side)
            return await pipeline.in_thread(answer, *await pipeline.explain(upload, *about))

    @routes.post(
        "/search",
        **schemas.route(
            "Which images are like this picture, without the why",
            schemas.SearchAnswer,
            *PROBLEMS,
            parameters=SearchParameters,
            body=BODY,
        ),
    )
    async def search(request: Request, asked: Annotated[SearchParameters, Query()]) -> Response:
        async with pipeline.admitted(request) as upload:
            picture, near = await pipeline.search(upload, asked.n_neighbors)
        neighbors = [
            schemas.Match(
                id=id,
                label=label,
                distance=distance,
                similarity=similarity,
                **schemas.urls_of(request, id),
            )
            for id, label, distance, similarity in near
        ]
        size = schemas.size_of(picture.size)
        return schemas.response(schemas.SearchAnswer(picture=size, neighbors=neighbors))

    return routes


def _explained(
    request: Request, picture: Prepared, why: Explanation, map_size: int, signed: bool
) -> schemas.ExplainAnswer:
    height, width = why.cam.shape
    shown = why.to_dict((min(map_size, height), min(map_size, width)), signed=signed)

    def neighbor(told: Mapping[str, Any] | None, one: Result | None) -> schemas.Neighbor | None:
        if told is None or one is None:
            return None
        urls = schemas.urls_of(request, one.id)
        return schemas.built(schemas.Neighbor, told, norm=one.norm, **urls)

    return schemas.built(
        schemas.ExplainAnswer,
        shown,
        picture=schemas.size_of(picture.size),
        extent=picture.extent,
        result=neighbor(shown["result"], why.asked),
        rival=neighbor(shown["rival"], why.rival),
        neighbors=list(map(neighbor, shown["neighbors"], why.neighbors())),
    )
