"""GET / and the page's other files: those that were there when the service began, and no others."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

PAGE: Final = Path(__file__).parent / "page"
_FRONT: Final = "index.html"
_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def router(folder: Path) -> APIRouter:
    """A route for each file of the folder; its `index.html` is the front page."""
    routes = APIRouter()
    for file in sorted(folder.iterdir()):
        kind = _TYPES.get(file.suffix)
        if kind is not None:
            path = "/" if file.name == _FRONT else f"/{file.name}"
            _add(routes, path, file.read_bytes(), kind)
    return routes


def _add(routes: APIRouter, path: str, body: bytes, kind: str) -> None:
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    # Asked for again each time, lest a browser mix two versions.
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    @routes.get(path, include_in_schema=False, response_class=Response)
    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers={**headers, "Content-Type": kind})
