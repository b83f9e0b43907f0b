"""Around every request: hosts it may name, its line in the log, headers for browsers."""

import asyncio
import logging
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HTTPProblem, response_of
from .pipeline import Telemetry

logger = logging.getLogger("embedcam.service")

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_HEAD: Final = 65_536
"""Bytes of a request's address and headers."""
_DRAIN_SECONDS, _DRAIN_BYTES = 0.5, 64_000_000


class Frame:
    """An ASGI application around the service's.

    `hosts` are names that a `Host` header may have, without port; None takes any. A page of another
    site that resolves to this machine (DNS rebinding) is refused by it.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, hosts: Collection[str] | None) -> None:
        self.app, self.telemetry = app, telemetry
        self.hosts = None if hosts is None else frozenset(map(str.lower, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; whatever fails in it is answered too, and logged."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, asked = time.perf_counter(), scope["method"]
        # What GET would say, without the body.
        inner: Scope = {**scope, "method": "GET" if asked == "HEAD" else asked}
        exchange = _Exchange(scope, receive, send)
        try:
            problem = self._problem(scope)
            answer = self.app if problem is None else response_of(problem)
            await answer(inner, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status:  # half an answer cannot be taken back
                logger.exception("failed while answering")
                raise
            await response_of(error)(inner, exchange.receive, exchange.send)
        finally:
            self._tell(inner, asked, exchange.status, time.perf_counter() - start)

    def _problem(self, scope: Scope) -> HTTPProblem | None:
        """Refuse another host, and a head that a proxy before the service might read otherwise.

        Where both disagree on where a request ends, what follows is taken for another one.
        """
        headers, version = Headers(scope=scope), scope["http_version"]
        size = len(scope["path"]) + sum(len(name) + len(value) for name, value in headers.raw)
        chunked = "transfer-encoding" in headers
        close, host = {"Connection": "close"}, re.sub(r":[0-9]*$", "", headers.get("host", ""))
        if version not in ("1.0", "1.1", "2", "3"):
            said = "this version of HTTP is not spoken; use 1.1"
            return HTTPProblem(505, "unknown_version", said, close)
        if size > MAX_HEAD:
            said = f"address and headers are longer than {MAX_HEAD} bytes, which is the limit"
            return HTTPProblem(431, "head_too_long", said, close)
        if chunked and ("content-length" in headers or version == "1.0"):
            said = "Transfer-Encoding beside Content-Length, or in HTTP/1.0, has no meaning"
            return HTTPProblem(400, "broken_request", f"{said}; give one", close)
        if self.hosts is not None and host.lower() not in self.hosts:
            said = "this service does not go by the name in the Host header; start it with"
            return HTTPProblem(403, "wrong_host", f"{said} --allow-host NAME if it should")
        return None

    def _tell(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        known = method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")
        shown = method if known else "other"
        # A pattern, never an address a client made up.
        route = getattr(scope.get("route"), "path", "") or "other"
        self.telemetry.requests.labels(shown, route, str(status)).inc()
        self.telemetry.seconds.labels(route).observe(seconds)
        # Quoted: a line break in an address would forge a line of the log.
        path = quote(scope["path"][:200], errors="replace")
        logger.info("%s %s %d %.1f ms", shown, path, status, 1e3 * seconds)


class _Exchange:
    """A request's body, as far as it has been taken, and the answer on its way."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self._left = "transfer-encoding" in headers or length.strip() not in ("", "0")
        self._asks_first = headers.get("expect", "").lower() == "100-continue"
        self._bare, self._started, self.status = scope["method"] == "HEAD", False, 0

    async def receive(self) -> Message:
        self._started = True
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._left = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status != 408:  # it has been waited for long enough
                await self._drain()
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self._left:
                headers["Connection"] = "close"
        elif self._bare and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        """Take what is still coming, for a moment: a client that is sending hears no answer."""
        if self._asks_first and not self._started:
            return
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._left and taken < _DRAIN_BYTES:
                    taken += len((await self.receive()).get("body", b""))
