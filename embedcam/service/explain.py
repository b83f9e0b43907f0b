"""POST /explain and POST /search: a picture goes in, what it is like and why comes out."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..explain.explainer import Explanation
from .accept import choose
from .addresses import item_url
from .parameters import only
from .pictures import Query as Picture
from .pictures import encoded, overlay
from .pipeline import Found, Pipeline, Wanted
from .schemas import ExplainAnswer, SearchAnswer, refusals
from .upload import FORM_TYPE, PART, RAW_TYPES, read_upload

JSON, PNG, WEBP = "application/json", "image/png", "image/webp"
MAX_CELLS, MAX_SIDE = 224, 1024
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
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
            **{kind: BINARY for kind in RAW_TYPES},
        },
    }
}
REFUSALS = (400, 403, 408, 413, 415, 422, 500, 503)


def router(pipeline: Pipeline) -> APIRouter:
    """The two endpoints."""
    routes = APIRouter(tags=["queries"])
    count = Annotated[
        int,
        Query(ge=1, le=pipeline.limits.n_neighbors, description="Images that come back."),
    ]

    @routes.post(
        "/explain",
        operation_id="explain",
        summary="Which images are like this picture, and why",
        response_class=Response,
        responses={
            200: {
                "model": ExplainAnswer,
                "description": "The results and the maps as JSON; or the picture with its map "
                "over it, where `Accept` asks for a picture.",
                "content": {PNG: BINARY, WEBP: BINARY},
            },
            **refusals(404, 406, *REFUSALS),
        },
        openapi_extra=BODY,
        dependencies=[
            Depends(
                only(
                    "n_neighbors", "result", "rival", "detail", "signed", "map_size", "picture_size"
                )
            )
        ],
    )
    async def explain(
        request: Request,
        n_neighbors: count = pipeline.n_neighbors,
        result: Annotated[
            str | SkipJsonSchema[None],
            Query(description="Id of one image: what in the picture matched this one."),
        ] = None,
        rival: Annotated[
            str | SkipJsonSchema[None],
            Query(
                description="Id of another image, with `result`: what in the picture speaks for "
                "the result rather than for this one."
            ),
        ] = None,
        detail: Annotated[
            int,
            Query(
                ge=1,
                le=2,
                description="2 draws a finer map: the picture is shown to the network once more at "
                "twice the side, for about four more embeddings.",
            ),
        ] = pipeline.explainer.detail,
        signed: Annotated[
            bool,
            Query(
                description="Of the JSON: the map before its ReLU, too, negative where the "
                "picture speaks against the results."
            ),
        ] = False,
        map_size: Annotated[
            int, Query(ge=1, le=MAX_CELLS, description="Of the JSON's map: cells a side at most.")
        ] = 14,
        picture_size: Annotated[
            int,
            Query(ge=16, le=MAX_SIDE, description="Of an overlay: its longer side at most."),
        ] = 512,
    ) -> Response:
        kind = choose(request.headers.get("accept"), (JSON, PNG, WEBP))
        with pipeline.gate.admitted():
            upload = await read_upload(request, pipeline.limits)
            async with pipeline.deadline():
                side = None if kind == JSON else picture_size
                wanted = Wanted(n_neighbors, result, rival, detail)
                query, made = await pipeline.explain(upload, wanted, side)
                if kind == JSON:
                    prefix = request.scope.get("root_path", "")
                    asked = (query, made, map_size, signed, prefix)
                    body = await pipeline.in_thread(_explained, *asked)
                else:
                    body = await pipeline.in_thread(_drawn, query, made, picture_size, kind)
        return Response(body, media_type=kind, headers={"Vary": "Accept"})

    @routes.post(
        "/search",
        operation_id="search",
        summary="Which images are like this picture, without the why",
        response_class=Response,
        responses={200: {"model": SearchAnswer}, **refusals(*REFUSALS)},
        openapi_extra=BODY,
        dependencies=[Depends(only("n_neighbors"))],
    )
    async def search(request: Request, n_neighbors: count = pipeline.n_neighbors) -> Response:
        with pipeline.gate.admitted():
            upload = await read_upload(request, pipeline.limits)
            async with pipeline.deadline():
                query, found = await pipeline.search(upload, n_neighbors)
                prefix = request.scope.get("root_path", "")
                body = await pipeline.in_thread(_searched, query, found, prefix)
        return Response(body, media_type=JSON)

    return routes


def _explained(
    query: Picture, made: Explanation, map_size: int, signed: bool, prefix: str
) -> bytes:
    height, width = made.cam.shape
    shown = made.to_dict((min(map_size, height), min(map_size, width)), signed=signed)
    norms = made.neighbor_norms
    neighbors = [
        _neighbor(one, None if norms is None else norms[place], prefix)
        for place, one in enumerate(shown["neighbors"])
    ]
    kept = (
        "cam", *(["signed_cam"] if signed else []),
        "empty", "why_empty", "transfer", "match", "trust", "trust_low", "trusted", "direct",
        "explained",
    )  # fmt: skip
    named = {
        name: None if one is None else _neighbor(shown[name], one.norm, prefix)
        for name, one in (("result", made.asked), ("rival", made.rival))
    }
    return _dumped(
        {
            "picture": size_of(query),
            "extent": list(query.extent),
            **{name: shown[name] for name in kept},
            **named,
            "neighbors": neighbors,
        }
    )


def _searched(query: Picture, found: Found, prefix: str) -> bytes:
    rows = zip(
        found.ids, found.labels, found.distances.tolist(), found.similarities.tolist(), strict=True
    )
    return _dumped({"picture": size_of(query), "neighbors": [_match(*row, prefix) for row in rows]})


def _drawn(query: Picture, made: Explanation, side: int, kind: str) -> bytes:
    return encoded(overlay(query.small, made.cam, query.extent, query.size, side), kind)


def _neighbor(one: Mapping[str, Any], norm: float | None, prefix: str) -> dict[str, Any]:
    return {
        **_match(one["id"], one["label"], one["distance"], one["similarity"], prefix),
        "file": one["file"],
        "cam": one["cam"],
        "norm": None if norm is None else float(norm),
    }


def _match(
    name: str, label: str | None, distance: float, similarity: float, prefix: str
) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "distance": distance,
        "similarity": similarity,
        "image_url": item_url(prefix, name, "image"),
        "cam_url": item_url(prefix, name, "cam"),
    }


def size_of(query: Picture) -> dict[str, int]:
    """Of the upright picture, for JSON."""
    return {"width": query.size[0], "height": query.size[1]}


def _dumped(body: Mapping[str, Any]) -> bytes:
    # A NaN is no JSON: it would be a fault of ours, and is to be seen as one.
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
