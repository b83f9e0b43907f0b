"""The application: its endpoints, the page that people look at, and what runs around requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..errors import EmbedcamError
from ..explain.explainer import Explainer
from ..pairs import named_concepts
from . import items, queries
from .errors import handle
from .frame import Frame
from .limits import Limits
from .pipeline import Pipeline
from .schemas import Health, Readiness, built, is_known, response, route, tag_of
from .stored import StorePipeline

_ABOUT = (
    "Which images of an index are like a picture, and what in it and in them is the reason. "
    "Every refusal is a JSON object with a code for programs and one sentence for people."
)
PAGE: Final = Path(__file__).parent / "page"
_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def create_app(
    explainer: Explainer,
    *,
    limits: Limits | None = None,
    hosts: Collection[str] | None = None,
    renew: Callable[[], Explainer] | None = None,
    concept_names: Mapping[int, str] | None = None,
) -> FastAPI:
    """Return explanations over HTTP, as an ASGI application for one process.

    Its lifespan begins with a probe of the network and ends when everything begun is finished; the
    explainer stays the caller's to close. `app.state.pipeline` is what does the work.

    Parameters
    ----------
    explainer : with a network, and an index that can be searched or the store of its model
    limits : of requests; None takes the defaults
    hosts : names that a request's `Host` header may have, such as "localhost"; None takes any
    renew : of a model and a store: opens both as they are now, for `app.state.pipeline.reload`
    concept_names : what a user calls concepts, by number (`embedcam.index.concepts.read_names`)

    Raises
    ------
    InputError
        An explainer that cannot explain pictures; names of concepts that its index does not have.
    """
    limits = limits or Limits()
    if getattr(explainer, "store", None) is None:
        pipeline = Pipeline(explainer, limits)
    else:
        pipeline = StorePipeline(explainer, limits, renew)
    pipeline.concept_names = dict(concept_names or {})
    named_concepts(pipeline.index, pipeline.concept_names)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pipeline.open()
        probing = asyncio.create_task(pipeline.probe())
        try:
            yield
        finally:
            probing.cancel()
            await asyncio.to_thread(pipeline.close)

    app = FastAPI(
        generate_unique_id_function=lambda endpoint: endpoint.name,
        title="embedcam",
        summary="Why did this image come back?",
        description=_ABOUT,
        version=__version__,
        # Their pages load code from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.pipeline = pipeline
    for kind in (EmbedcamError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    for module in (queries, items):
        app.include_router(module.router(pipeline))
    app.include_router(_status(pipeline))
    app.include_router(_page())
    app.add_middleware(Frame, telemetry=pipeline.telemetry, hosts=hosts)
    return app


def _status(pipeline: Pipeline) -> APIRouter:
    """Return GET /healthz, /readyz and /metrics, which take no place among the requests counted."""
    routes = APIRouter(tags=["status"])

    @routes.get("/healthz", **route("Whether the process answers", Health))
    async def healthz() -> Response:
        return response(Health(status="ok"))

    said = "Whether pictures can be explained: the network has answered a probe, a store has rows"

    @routes.get("/readyz", **route(said, Readiness, 503))
    async def readyz() -> Response:
        index, images = pipeline.index, await pipeline.images()
        generation, digest = index.manifest.generation, index.generation
        words = pipeline.network.texts is not None
        of = {"images": images, "generation": generation, "digest": digest, "words": words}
        return response(built(Readiness, of, status="ready"))

    @routes.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        text = generate_latest(pipeline.telemetry.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes


def _page() -> APIRouter:
    """Return a route for each file of the page as it was when the service began, and no others."""
    routes = APIRouter()

    def add(path: str, body: bytes, kind: str) -> None:
        tag = tag_of(body)
        # Asked for again each time, lest a browser mix two versions.
        headers = {"ETag": tag, "Cache-Control": "no-cache"}

        @routes.get(path, include_in_schema=False, response_class=Response)
        async def file(request: Request) -> Response:
            if is_known(request, tag):
                return Response(status_code=304, headers=headers)
            return Response(body, headers={**headers, "Content-Type": kind})

    for file in sorted(PAGE.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            add(path, file.read_bytes(), _TYPES[file.suffix])
    return routes
