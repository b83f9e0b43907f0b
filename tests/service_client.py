"""A service over a small index, and a client that says exactly what it is told to, in process."""

import asyncio
import io
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from build_samples import dense, pictures, quicken, toy
from PIL import Image

from embedcam import Explainer, build_index

BOUNDARY = "a-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
LAST = f"\r\n--{BOUNDARY}--\r\n".encode()


def built(folder, kind="affine", **settings):
    """An index of twelve small pictures in three folders, `folder`/photos."""
    source = pictures(folder / "photos")
    index = folder / "photos.index"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        settings = {"recipe": dense(), "progress": False, **settings}
        build_index(source, toy(kind).network, index, **settings)
    return index


def explainer(index, kind="affine", **settings):
    return Explainer(index, toy(kind).network, **settings)


def picture(seed=0, size=(40, 30)):
    """Noise of (width, height) `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def data_of(image, kind="PNG", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def form(data, name="image", filename='filename="query.png"'):
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; {filename}\r\n'
    return f"{head}Content-Type: image/png\r\n\r\n".encode() + data + LAST


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """Status and code of a refusal, which is nothing but one sentence."""
        assert self.headers["content-type"] == "application/json"
        body = self.json()
        assert {name: set(told) for name, told in body.items()} == {"error": {"code", "message"}}
        assert 10 < len(self.message) < 400
        assert "\n" not in self.message
        return self.status, body["error"]["code"]

    @property
    def message(self):
        return str(self.json()["error"]["message"])

    def image(self):
        return Image.open(io.BytesIO(self.body))


async def send(app, method, target, body=b"", headers=None):
    """One request as uvicorn would hand it on; of pieces of a body a number is a pause in seconds.

    Content-Length is added for whole bodies unless given.
    """
    path, _, query = target.partition("?")
    given = {name.lower(): value for name, value in (headers or {}).items()}
    pieces: Any = [body] if isinstance(body, bytes) else body
    last = pieces[-1] if isinstance(pieces, list) and pieces else None
    if isinstance(body, bytes) and body:
        given.setdefault("content-length", str(len(body)))
    named = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": method, "path": unquote(path), "raw_path": path.encode("latin-1"),
        "root_path": "", "query_string": query.encode("latin-1"), "headers": named,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    taken = iter(pieces)

    async def receive():
        for piece in taken:
            if isinstance(piece, bytes):
                return {"type": "http.request", "body": piece, "more_body": piece is not last}
            await asyncio.sleep(piece)
        if isinstance(last, float):
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def keep(message):
        sent.append(message)

    await app(scope, receive, keep)
    start, *rest = sent
    assert start["type"] == "http.response.start"
    names = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    return Reply(start["status"], names, b"".join(part.get("body", b"") for part in rest))


def ask(app, method, target, body=b"", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(send(app, method, target, body, named))


def post(app, target, data, **headers):
    """A picture as the body itself."""
    return ask(app, "POST", target, data, **{"content_type": "image/png", **headers})


def awake(app):
    """The application without its lifespan, for clients that begin and end it with each request."""

    async def call(scope, receive, send):
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})

    return call
