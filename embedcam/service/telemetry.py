"""Counters for Prometheus, in a registry of the application's own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Telemetry:
    """What is counted.

    Args:
        in_progress: tells how many requests are being worked on.
    """

    def __init__(self, in_progress: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "embedcam_requests", "Requests answered.", ("method", "route", "status"),
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "embedcam_request_seconds", "From a request's first byte to its answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._batches = Histogram(
            "embedcam_batch_pictures", "Pictures that went through the network together.",
            buckets=_BATCHES, registry=registry,
        )  # fmt: skip
        self._ready = Gauge(
            "embedcam_ready", "1 once the network has answered a probe.", registry=registry
        )
        working = Gauge("embedcam_in_progress", "Requests being worked on.", registry=registry)
        working.set_function(in_progress)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is a pattern, never an address a client made up."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batched(self, pictures: int) -> None:
        """Count a pass of the network."""
        self._batches.observe(pictures)

    def ready(self, is_ready: bool) -> None:
        """Say whether requests can be answered."""
        self._ready.set(is_ready)

    def text(self) -> bytes:
        """Everything counted, as Prometheus reads it."""
        return generate_latest(self.registry)
