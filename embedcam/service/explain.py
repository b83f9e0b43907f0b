"""POST /explain and POST /search: a picture goes in, what it is like and why comes out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..explain.explainer import Explanation
from . import schemas
from .errors import choose
from .pictures import FORM_TYPE, JSON, PART, PNG, RAW_TYPES, WEBP, Prepared, encoded, overlaid
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
        operation_id="explain",
        **schemas.route(
            "Which images are like this picture, and why",
            schemas.ExplainAnswer,
            *(404, 406, *PROBLEMS),
            parameters=ExplainParameters,
            drawn=(PNG, WEBP),
            said="The results and the maps as JSON; or the picture with its map over it, where "
            "`Accept` asks for a picture.",
            openapi_extra=BODY,
        ),
    )
    async def explain(request: Request, asked: Annotated[ExplainParameters, Query()]) -> Response:
        kind = choose(request, (JSON, PNG, WEBP))
        async with pipeline.uploaded(request) as upload:
            picture, why = await pipeline.explain(
                upload,
                asked.n_neighbors,
                asked.result,
                asked.rival,
                asked.detail,
                side=None if kind == JSON else asked.picture_size,
            )

            def body() -> bytes:
                if kind == JSON:
                    prefix = request.scope.get("root_path", "")
                    return _explained(picture, why, asked.map_size, asked.signed, prefix)
                return encoded(overlaid(replace(picture.small, cam=why.cam)), kind)

            answer = await pipeline.in_thread(body)
        return Response(answer, media_type=kind, headers={"Vary": "Accept"})

    @routes.post(
        "/search",
        operation_id="search",
        **schemas.route(
            "Which images are like this picture, without the why",
            schemas.SearchAnswer,
            *PROBLEMS,
            parameters=SearchParameters,
            openapi_extra=BODY,
        ),
    )
    async def search(request: Request, asked: Annotated[SearchParameters, Query()]) -> Response:
        async with pipeline.uploaded(request) as upload:
            picture, rows = await pipeline.search(upload, asked.n_neighbors)
        prefix = request.scope.get("root_path", "")
        matches = [
            schemas.built(schemas.Match, row, **schemas.urls_of(prefix, row["id"])) for row in rows
        ]
        answer = schemas.SearchAnswer(picture=schemas.size_of(picture.size), neighbors=matches)
        return Response(schemas.written(answer), media_type=JSON)

    return routes


def _explained(
    picture: Prepared, why: Explanation, map_size: int, signed: bool, prefix: str
) -> bytes:
    height, width = why.cam.shape
    shown = why.to_dict((min(map_size, height), min(map_size, width)), signed=signed)

    def neighbor(one: Mapping[str, Any], norm: float | None) -> schemas.Neighbor:
        length = None if norm is None else float(norm)
        return schemas.built(
            schemas.Neighbor, one, norm=length, **schemas.urls_of(prefix, one["id"])
        )

    count = len(shown["neighbors"])
    norms = [None] * count if why.neighbor_norms is None else why.neighbor_norms
    answer = schemas.built(
        schemas.ExplainAnswer,
        shown,
        **schemas.shown_box(picture.size, picture.extent),
        result=None if why.asked is None else neighbor(shown["result"], why.asked.norm),
        rival=None if why.rival is None else neighbor(shown["rival"], why.rival.norm),
        neighbors=[neighbor(*pair) for pair in zip(shown["neighbors"], norms, strict=True)],
    )
    return schemas.written(answer)
