"""uvicorn on a socket, until a signal: what was begun is finished first."""

import asyncio
import logging
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from math import ceil

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .._checks import whole
from ..errors import EmbedcamError, InputError
from .errors import HTTPProblem, response_of
from .frame import HEADERS

logger = logging.getLogger("embedcam.service")

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MAX_CONNECTIONS = 512
HEADER_SECONDS = 10.0
"""How long a client may take for the head of a request."""
READ_SECONDS, READ_BYTES = 20.0, 65_536
"""How long a client may take to read so much of its answer, or the rest of it."""
LINGER_SECONDS = 0.5
_SEND_BUFFER = 65_536
"""The system's, of each connection: in steps of about this size it tells what a client has read."""
_BROKEN = (
    "this is no request of HTTP/1.1, or one that could be read in two ways; send another, over "
    "http, not https"
)
_BLANK_LINE = re.compile(rb"\n\r?\n")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket on which nothing listens yet; port 0 takes any that is free."""
    whole("port", port, 0, 65_535)
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        reason = error.strerror or error
        raise InputError(
            f"{host} port {port} cannot be used ({reason}); choose with --host and --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Return where a browser on this machine finds it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Tell whether only this machine reaches it."""
    return ip_address(bound.getsockname()[0]).is_loopback


def serve(
    app: ASGIApp,
    bound: socket.socket,
    *,
    seconds: float,
    reload: Callable[[], object] = lambda: None,
) -> None:
    """Answer requests until SIGINT or SIGTERM; returns once what was begun is finished.

    `bound` is closed in the end; shutting down waits twice the `seconds` that a request may take;
    `reload` is called in a thread of its own on SIGHUP.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=ceil(2 * seconds) + 1,
    )
    with bound, _signals(reload), ExitStack() as stack:
        with suppress(ImportError):  # an installation for serving alone
            from threadpoolctl import threadpool_limits

            # The products of a map are small. Beside the threads of torch, which wait by spinning,
            # those of BLAS stop now and then: on two cores a map of half a millisecond took 16.
            stack.enter_context(threadpool_limits(limits=1, user_api="blas"))
        uvicorn.Server(config).run(sockets=[bound])


@contextmanager
def _signals(reload: Callable[[], object]) -> Iterator[None]:
    """Let SIGHUP reload, and SIGINT and SIGTERM, which uvicorn raises again, end quietly.

    Signals belong to the main thread; in another one they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hang_up(*_: object) -> None:
        threading.Thread(target=_reloaded, args=(reload,), name="embedcam-reload").start()

    taken = dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: None)
    if hasattr(signal, "SIGHUP"):
        taken[signal.SIGHUP] = hang_up
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reloaded(reload: Callable[[], object]) -> None:
    try:
        reload()
    except EmbedcamError as error:
        logger.error("the index was not loaded again: %s", error)
    except Exception:
        logger.exception("the index could not be loaded again; the old one goes on being served")


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer who comes when all connections are taken."""
    said = f"{MAX_CONNECTIONS} connections are open, which is the limit; try again"
    headers = {**HEADERS, "Retry-After": "1", "Connection": "close"}
    await response_of(HTTPProblem(503, "busy", said, headers))(scope, receive, send)


class _Protocol(H11Protocol):
    """uvicorn's, with limits to how long a client may take, and refusals like all others.

    Without the limits a client that sends a header a minute, or never reads what it asked for,
    would hold its connection and the answer for ever.
    """

    _patience: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _unread = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for what a client says."""
        super().connection_made(transport)
        # Told of every byte that waits: no second answer is written while the first one does.
        transport.set_write_buffer_limits(high=0)
        self.logger = logger
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = _full
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes, the end of a head perhaps."""
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("_patience")
        elif self._patience is None:
            self._wait()

    def handle_events(self) -> None:
        """Read what came, unless a line of its head ends in a line feed alone.

        h11 takes that for the end of a line, and not all proxies do.
        """
        if self.conn.their_state is h11.IDLE:
            begun = self.conn.trailing_data[0]
            end = _BLANK_LINE.search(begun)
            head = begun if end is None else begun[: end.end()]
            if head.count(b"\n") != head.count(b"\r\n"):
                self.send_400_response(_BROKEN)
                return
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, as every other refusal looks; called by uvicorn too."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what waits for its body is told that none comes
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = response_of(
                HTTPProblem(400, "broken_request", _BROKEN, {**HEADERS, "Connection": "close"})
            )
            for event in (
                h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        # Closed at once, with bytes unread, the client might lose the answer.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on answering what was asked for whole."""
        cycle = self.cycle
        answers = cycle is not None and not (cycle.more_body or cycle.response_complete)
        if answers:
            cycle.keep_alive = False
        return answers

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not keep up with its answer."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(READ_SECONDS, self._check_reading)

    def resume_writing(self) -> None:
        """End the wait: it has taken all of it."""
        super().resume_writing()
        self._stop("_reading")

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a client."""
        self._stop("_patience")
        self._stop("_reading")
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        return False  # What a client offers to speak besides may be passed over.

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _check_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        if self._unread - left < READ_BYTES:
            logger.warning("a client did not read its answer for %g s: closed", READ_SECONDS)
            self.transport.abort()
            return
        self._unread = left
        self._reading = self.loop.call_later(READ_SECONDS, self._check_reading)

    def _stop(self, timer: str) -> None:
        handle = getattr(self, timer)
        if handle is not None:
            handle.cancel()
        setattr(self, timer, None)
