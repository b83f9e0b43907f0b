"""The application: what is put together."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import EmbedcamError
from ..explain.explainer import Explainer
from . import compare, explain, files, items, status
from .errors import Refused, handle
from .files import PAGE
from .frame import Frame
from .limits import Limits
from .pipeline import Pipeline

_ABOUT = (
    "Which images of an index are like a picture, and what in it and in them is the reason. "
    "Every refusal is a JSON object with a code for programs and one sentence for people."
)


def create_app(
    explainer: Explainer, *, limits: Limits | None = None, hosts: Collection[str] | None = None
) -> FastAPI:
    """Explanations over HTTP, as an ASGI application for one process.

    Its lifespan begins with a probe of the network and ends when everything begun is finished; the
    explainer stays the caller's to close. `app.state.pipeline` is what does the work.

    Args:
        explainer: with a network, and an index that can be searched.
        limits: of requests; None takes the defaults.
        hosts: names that a request's `Host` header may have, such as "localhost"; None takes any.

    Raises:
        InputError: an explainer that cannot explain pictures.
    """
    pipeline = Pipeline(explainer, limits or Limits())

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
    for kind in (Refused, EmbedcamError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    for room in (explain, compare, items, status):
        app.include_router(room.router(pipeline))
    app.include_router(files.router(PAGE))
    app.add_middleware(Frame, telemetry=pipeline.telemetry, hosts=hosts)
    return app
