"""uvicorn on a socket, until a signal: what was begun is finished first."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import EmbedcamError, InputError

logger = logging.getLogger("embedcam.service")

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MAX_CONNECTIONS = 512
HEADER_SECONDS = 10.0
"""How long a client may take for the head of a request."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on which nothing listens yet; port 0 takes any that is free.

    Raises:
        InputError: the address cannot be used.
    """
    if not 0 <= port <= 65_535:
        raise InputError(f"port {port}: give a whole number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{host} port {port} cannot be used ({reason}); choose with --host and --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    host = str(bound.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def serve(
    app: ASGIApp,
    bound: socket.socket,
    *,
    seconds: float,
    reload: Callable[[], Any] | None = None,
) -> None:
    """Answer requests until SIGINT or SIGTERM; returns once what was begun is finished.

    Args:
        app: from `create_app`.
        bound: from `bind`; closed in the end.
        seconds: that a request may take; a second more is what shutting down waits for.
        reload: called in a thread of its own on SIGHUP, or None.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=ceil(2 * seconds) + 1,
    )
    with bound, _signals(reload), _one_blas_thread():
        uvicorn.Server(config).run(sockets=[bound])


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """NumPy's products on one thread: the products of a map are small.

    Beside the threads of torch, which wait by spinning, those of BLAS come to a stop now and then:
    on two cores a map of half a millisecond took sixteen.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # an installation for serving alone
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield


@contextmanager
def _signals(reload: Callable[[], Any] | None) -> Iterator[None]:
    """SIGHUP reloads; SIGINT and SIGTERM, which uvicorn raises again once it is done, end quietly.

    Signals belong to the main thread; in another one they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hang_up(*_: object) -> None:
        if reload is not None:
            threading.Thread(target=_reloaded, args=(reload,), name="embedcam-reload").start()

    def nothing(*_: object) -> None:
        pass

    taken: dict[int, Callable[..., None]] = {signal.SIGINT: nothing, signal.SIGTERM: nothing}
    if hasattr(signal, "SIGHUP"):
        taken[signal.SIGHUP] = hang_up
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reloaded(reload: Callable[[], Any]) -> None:
    try:
        reload()
    except EmbedcamError as error:
        logger.error("the index was not loaded again: %s", error)
    except Exception:
        logger.exception("the index could not be loaded again; the old one goes on being served")


class _Protocol(H11Protocol):
    """uvicorn's, with a limit to how long the head of a request may take.

    Without one a client that sends a header a minute would hold its connection for ever.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has said nothing yet."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Some bytes came, the end of a head perhaps."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._patience is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None
