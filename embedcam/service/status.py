"""GET /healthz, /readyz and /metrics: for whoever runs the service."""

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from .errors import Refused
from .pipeline import Pipeline
from .schemas import Health, Readiness, refusals
from .telemetry import CONTENT_TYPE


def router(pipeline: Pipeline) -> APIRouter:
    """The three endpoints; they take no place among the requests that are counted."""
    routes = APIRouter(tags=["status"])

    @routes.get(
        "/healthz",
        operation_id="healthz",
        summary="Whether the process answers",
        response_class=Response,
        responses={200: {"model": Health}},
    )
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get(
        "/readyz",
        operation_id="readyz",
        summary="Whether pictures can be explained: the network has answered a probe",
        response_class=Response,
        responses={200: {"model": Readiness}, **refusals(503)},
    )
    async def readyz() -> Response:
        if not pipeline.ready:
            raise Refused(
                503,
                "not_ready",
                "the network has not answered a probe yet; try again",
                {"Retry-After": "1"},
            )
        index = pipeline.index
        generation = index.manifest.generation
        return JSONResponse({"status": "ready", "images": len(index), "generation": generation})

    @routes.get(
        "/metrics",
        operation_id="metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(pipeline.telemetry.text(), headers={"Content-Type": CONTENT_TYPE})

    return routes
