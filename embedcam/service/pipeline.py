"""From uploaded pictures to answers, through a pool of threads and one thread with the network."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.requests import Request

from ..errors import EmbedcamError, InputError
from ..explain.explainer import Explainer
from ..explain.explanation import Explanation, Result
from ..explain.texts import Words
from ..images.batches import default_workers
from ..index import Index, Neighbors
from ..index.search import find_neighbors
from .errors import HTTPProblem
from .limits import Limits
from .pictures import PNG, Prepared, Upload, encoded, overlaid, prepare, read_picture, read_upload

logger = logging.getLogger("embedcam.service")

P = ParamSpec("P")
R = TypeVar("R")
Asked = TypeVar("Asked")
Answer = Callable[[Any, Sequence[Asked]], Sequence[R]]
"""From what is wanted and several pictures, or words, to an answer for each; called in the
network's thread.
"""
MAX_THREADS = 4
"""That decode and draw: each may hold a decoded picture, so more of them are more memory."""
PROBE_SIDE = 64
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(eq=False)
class _Job:
    wish: tuple[Answer[Any, Any], Hashable]
    picture: object
    future: Future[Any]


class Batcher:
    """One thread that puts up to `most` pictures of equal wishes through the network together.

    The first of a batch waits `seconds` for those that were announced; one that is alone goes at
    once. `batched` is told how many pictures went together.
    """

    def __init__(
        self, most: int, seconds: float, batched: Callable[[int], object] = lambda pictures: None
    ) -> None:
        self._most, self._seconds, self._batched = most, seconds, batched
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._announced = 0
        # Its thread is begun by the first picture: an application that was only made, or forked
        # before it served, has none.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedcam-network")

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Say that a picture will come, which is submitted in the block."""
        with self._changed:
            self._announced += 1
        try:
            yield
        finally:
            with self._changed:
                self._announced -= 1
                self._changed.notify_all()

    def submit(self, answer: Answer[Asked, R], wanted: Hashable, picture: Asked) -> Future[R]:
        """Return the answer to come."""
        job = _Job((answer, wanted), picture, Future())
        with self._changed:
            self._thread.submit(self._run)
            self._waiting.append(job)
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._thread.shutdown()

    def _run(self) -> None:
        live = [job for job in self._next() if job.future.set_running_or_notify_cancel()]
        if live:
            self._batched(len(live))
            _settle(live)

    def _next(self) -> list[_Job]:
        """Return the first picture that waits and others of its wish, if they did not go before."""
        with self._changed:
            until = time.monotonic() + self._seconds
            while 0 < len(self._waiting) < self._most and self._announced:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            alike = [job for job in self._waiting if job.wish == self._waiting[0].wish]
            alike = alike[: self._most]
            self._waiting = [job for job in self._waiting if job not in alike]
            return alike


def _settle(jobs: Sequence[_Job]) -> None:
    answer, wanted = jobs[0].wish
    try:
        answers = answer(wanted, [job.picture for job in jobs])
    except BaseException as error:
        if len(jobs) > 1 and isinstance(error, EmbedcamError):
            # One of them is at fault, and the error does not say which.
            for job in jobs:
                _settle([job])
            return
        for job in jobs:
            job.future.set_exception(error)
    else:
        for job, one in zip(jobs, answers, strict=True):
            job.future.set_result(one)


class Telemetry:
    """Counters for Prometheus, in a registry of the application's own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        by = ("method", "route", "status")
        said = "From a request's first byte to its answer."
        together = "Pictures that went through the network together."
        self.requests = Counter("embedcam_requests", "Requests answered.", by, registry=registry)
        self.seconds = Histogram(
            "embedcam_request_seconds", said, ("route",), buckets=SECONDS, registry=registry
        )
        self.batches = Histogram(
            "embedcam_batch_pictures", together, buckets=_BATCHES, registry=registry
        )
        for name, said, value in (
            ("ready", "1 once the network has answered a probe.", lambda: pipeline.ready),
            ("in_progress", "Requests being worked on.", lambda: pipeline.inside),
        ):
            Gauge(f"embedcam_{name}", said, registry=registry).set_function(value)


class Pipeline:
    """All the work of a service; its endpoints only read parameters and write answers.

    Raises InputError for an explainer that cannot explain pictures. `concept_names` are what a user
    calls concepts, by number.
    """

    concept_names: Mapping[int, str] = MappingProxyType({})

    def __init__(self, explainer: Explainer, limits: Limits) -> None:
        if not isinstance(explainer, Explainer):
            raise InputError(f"a service needs an Explainer; given {type(explainer).__name__}")
        network, preprocess = explainer.network, explainer.preprocess
        if network is None or preprocess is None:
            raise InputError(
                "a service embeds pictures: give the Explainer the network, with its preprocessing"
            )
        self.explainer, self.limits = explainer, limits
        self.network, self.preprocess = network, preprocess
        self._check()
        self.n_neighbors = min(explainer.n_neighbors, limits.n_neighbors)
        self.inside, self.ready, self._closed = 0, False, True
        self.telemetry = Telemetry(self)
        self.open()

    def _check(self) -> None:
        if self.index.manifest.faiss is None:
            raise InputError(
                f"{self.index.path} was built without FAISS, so a service cannot search it; "
                "`embedcam compact --rebuild-faiss Flat` gives it one"
            )
        if len(self.index) == 0:
            raise InputError(f"{self.index.path}: every image was removed; add images first")

    def open(self) -> None:
        """Make ready for requests, the first time or after `close`; no thread begins yet."""
        if self._closed:
            workers = min(MAX_THREADS, default_workers())
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="embedcam-pictures")
            batched = self.telemetry.batches.observe
            self._batcher = Batcher(self.batch, self.limits.batch_seconds, batched)
            self._closed = False

    def close(self) -> None:
        """Finish what was begun, and end all threads."""
        self.ready, self._closed = False, True
        self._batcher.close()
        self._pool.shutdown(cancel_futures=True)

    @property
    def batch(self) -> int:
        """Pictures that go through the network together."""
        return self.limits.batch or self.network.usual_run.batch_size

    @property
    def index(self) -> Index:
        """The index as it is now; a request asks once and keeps to it."""
        return self.explainer.index

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place, or raise HTTPProblem 503: who waits in a queue does not see overload."""
        most = self.limits.concurrency
        if self.inside >= most:
            said = f"{most} requests are being worked on, which is the limit; try again"
            raise HTTPProblem(503, "busy", said, {"Retry-After": "1"})
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def admitted(self, request: Request, words: bool = False) -> AsyncIterator[Upload]:
        """Take a place and read the body, then work on it as long as the limit allows.

        What has not begun by then never does. With `words` the body may be JSON.
        """
        with self.place():
            upload = Upload(b"")
            if request.method == "POST":
                upload = await read_upload(request, self.limits, words)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    yield upload
            except TimeoutError:
                said = f"the answer took longer than {self.limits.seconds:g} s; try again later"
                raise HTTPProblem(503, "too_slow", said, {"Retry-After": "5"}) from None

    async def in_thread(self, work: Callable[P, R], *arguments: P.args, **more: P.kwargs) -> R:
        """Run something in the pool."""
        return await asyncio.wrap_future(self._pool.submit(work, *arguments, **more))

    async def ask(
        self, answer: Answer[Asked, R], wanted: Hashable, read: Callable[[], Asked]
    ) -> tuple[Asked, R]:
        """Return a picture, read in the pool, and an answer from the network's thread.

        Pictures of which the same is wanted are answered together.
        """
        with self._batcher.announced():
            picture = await self.in_thread(read)
            future = self._batcher.submit(answer, wanted, picture)
        return picture, await asyncio.wrap_future(future)

    def reading(
        self, upload: Upload, side: int | None = None, detail: int = 1
    ) -> Callable[[], Prepared]:
        """Return what reads an upload; it is made small to `side` where it will be drawn on."""
        return lambda: prepare(
            read_picture(upload.picture(), self.limits.pixels), self.preprocess, side, detail
        )

    async def explain(
        self,
        wanted: tuple[int, str | None, str | None, int],
        read: Callable[[], Prepared],
        tell: Callable[[Prepared, Explanation], R],
    ) -> R:
        """Explain a picture, and tell of it in the pool.

        `wanted` are n_neighbors, a result, its rival, and detail.
        """
        _, result, rival, _ = wanted
        await self.holding(given(result, rival))
        check_names(given(result), rival)
        return await self.in_thread(tell, *await self.ask(self._explained, wanted, read))

    def _explained(
        self, wanted: tuple[int, str | None, str | None, int], pictures: Sequence[Prepared]
    ) -> list[Explanation]:
        n_neighbors, result, rival, detail = wanted
        answers: list[Explanation] = []
        for inputs, larger in passes(pictures, detail):
            answers += self.explainer.explain_batch(
                inputs,
                n_neighbors=n_neighbors,
                result=result,
                above=rival,
                detail=detail,
                larger=larger,
            )
        return answers

    async def search(
        self, n_neighbors: int, read: Callable[[], Prepared]
    ) -> tuple[Prepared, list[Result]]:
        """Return a picture, and what is near to it, without maps."""
        return await self.ask(self._searched, n_neighbors, read)

    def _searched(self, n_neighbors: int, pictures: Sequence[Prepared]) -> list[list[Result]]:
        index, inputs = self.index, np.stack([one.inputs for one in pictures])
        return nearest(index, self.network.embed(inputs).embedding, n_neighbors)

    async def near_words(
        self, embed: Answer[Asked, Words], asked: Asked, n_neighbors: int
    ) -> tuple[Explainer, Words, Neighbors]:
        """Return an explainer that holds the pictures nearest to words, and these."""
        wanted = self.explainer, embed, n_neighbors
        words, near = (await self.ask(self._near_words, wanted, lambda: asked))[1]
        return wanted[0], words, near

    def _near_words(
        self, wanted: tuple[Explainer, Answer[Asked, Words], int], asked: Sequence[Asked]
    ) -> list[tuple[Words, Neighbors]]:
        explainer, embed, n_neighbors = wanted
        words = embed(None, asked)
        vectors = np.array([one.embedding for one in words])
        near = find_neighbors(explainer.index, vectors, n_neighbors, None)
        return [*zip(words, near, strict=True)]

    async def holding(self, ids: Sequence[str]) -> Explainer:
        """Return an explainer whose index holds these images, or raise HTTPProblem 404."""
        for name in ids:
            find_live(self.index, name)
        return self.explainer

    async def some(self, count: int) -> tuple[Explainer, list[str]]:
        """Return an explainer, and so many of its index's ids, from all over it."""
        explainer = self.explainer
        live = explainer.index.live_positions()
        chosen = live[np.unique(np.linspace(0, len(live) - 1, min(count, len(live))).astype(int))]
        return explainer, explainer.index.ids[chosen]

    async def images(self) -> int | None:
        """Return how many images there are, None where that is not known.

        Raises HTTPProblem 503 while pictures cannot be explained.
        """
        if not self.ready:
            said = "the network has not answered a probe yet; try again"
            raise HTTPProblem(503, "not_ready", said, {"Retry-After": "1"})
        return len(self.index)

    async def probe(self) -> None:
        """Explain a picture of noise, and be ready once that has worked."""
        try:
            shape = (PROBE_SIDE, PROBE_SIDE, 3)
            noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            upload = Upload(await self.in_thread(encoded, Image.fromarray(noise), PNG))
            wanted, read = (self.n_neighbors, None, None, 1), self.reading(upload, PROBE_SIDE)
            with suppress(HTTPProblem):  # of a store, which is no matter of the network's
                await self.explain(wanted, read, lambda *_: None)
            # What the head is, which receipts need, is found once, in many passes.
            picture, _ = await self.ask(self._warmed_up, None, read)
            # The first overlay loads the colors.
            await self.in_thread(overlaid, replace(picture.small, cam=np.ones((2, 2))))
        except Exception:
            logger.exception("the network did not answer a probe; the service is not ready")
            return
        self.ready = True

    def _warmed_up(self, _: None, pictures: Sequence[Prepared]) -> list[None]:
        self.network.warm_up()
        return [None] * len(pictures)

    def reload(self) -> bool:
        """Serve the index as it is now and return whether it changed; not ready while it cannot be.

        Raises InputError for an index that is empty or cannot be searched, and as
        `Explainer.reload`, which leaves the old one serving.
        """
        changed = self.explainer.reload()
        try:
            self._check()
        except InputError:
            self.ready = False
            raise
        self.ready |= changed
        return changed


def passes(
    pictures: Sequence[Prepared], detail: int
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray] | None]]:
    """Yield what goes through the network together: inputs, and those at twice the side if any."""
    # One after the other where finer: at twice the side each takes four times the memory.
    for group in [pictures] if detail == 1 else [[one] for one in pictures]:
        larger = [one.larger for one in group if one.larger is not None]
        yield [one.inputs for one in group], larger or None


def nearest(index: Index, embeddings: np.ndarray, n_neighbors: int) -> list[list[Result]]:
    """Return what is near to each embedding `[B D]`, without maps."""
    near = index.search(embeddings, n_neighbors)
    return [listed_results(index, Neighbors(*one)) for one in zip(*near, strict=True)]


def listed_results(index: Index, near: Neighbors) -> list[Result]:
    """Return one query's neighbors, without maps."""
    rows = index.select(near.positions)
    scores = near.distances, near.similarities
    return Result.of(rows.ids, rows.labels, rows.paths, *scores, None, None)


def find_live(index: Index, name: str) -> int:
    """Return the position of an image, or raise HTTPProblem 404, which names no other image."""
    positions = index.find_live([name])
    if name not in positions:
        raise unknown_image()
    return positions[name]


def unknown_image() -> HTTPProblem:
    """Return what is answered where there is no image of an id."""
    return HTTPProblem(404, "unknown_image", "the index holds no image of this id")


def given(*ids: str | None) -> list[str]:
    """Return those ids that were named."""
    return [one for one in ids if one is not None]


def check_names(results: Sequence[str], rival: str | None) -> None:
    """Raise HTTPProblem unless the rival goes with one result, and no image is named twice."""
    if len(set(results)) < len(results):
        raise HTTPProblem(422, "repeated_result", "result: names an image twice; name each once")
    if rival is not None and not results:
        said = "rival: goes with a result, and none is named; name it, too"
        raise HTTPProblem(422, "no_result", said)
    if rival is not None and len(results) > 1:
        said = "rival: goes with one result; leave the other results out"
        raise HTTPProblem(422, "too_many_results", said)
    if rival in results:
        raise HTTPProblem(422, "same_image", "result and rival are the same image; name two")
