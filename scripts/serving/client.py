"""A closed loop of clients over loopback, each with a connection of its own that it keeps."""

import http.client
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """A request, and the status it is to be answered with."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: Sequence[int] = (200,)
    name: str = ""


class Caller:
    """One client; connects again where the server has closed."""

    def __init__(self, port: int, seconds: float = 120) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)

    def __call__(self, call: Call) -> tuple[int, bytes, float]:
        """Status, body, and seconds from the first byte sent to the last one read."""
        for again in (False, True):
            start = time.perf_counter()
            try:
                self.connection.request(call.method, call.path, call.body, dict(call.headers))
                found = self.connection.getresponse()
                body = found.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                # A kept connection may have been closed meanwhile: once is no fault.
                self.connection.close()
                if again:
                    raise
                continue
            return found.status, body, time.perf_counter() - start
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Let go of the connection."""
        self.connection.close()


def closed_loop(
    port: int, concurrency: int, number: int, call: Callable[[int], Call]
) -> list[float]:
    """Seconds of each of `number` requests, so many at a time, the next as soon as one is answered.

    Raises:
        RuntimeError: one was answered with a status that was not expected.
    """
    left = iter(range(number))
    lock, seconds, faults = threading.Lock(), list[float](), list[str]()

    def client() -> None:
        with closing(Caller(port)) as caller:
            while True:
                with lock:
                    place = next(left, None)
                if place is None or faults:
                    return
                wanted = call(place)
                status, body, took = caller(wanted)
                with lock:
                    seconds.append(took)
                    if status not in wanted.expected:
                        faults.append(f"{wanted.method} {wanted.path}: {status} {body[:200]!r}")

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    if faults:
        raise RuntimeError(faults[0])
    if len(seconds) != number:
        raise RuntimeError(f"{number - len(seconds)} of {number} requests had no answer")
    return seconds
