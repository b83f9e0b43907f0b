"""A service without an index: its images are rows of a store, which each request asks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeVar

import numpy as np
from prometheus_client import Counter, Histogram

from ..errors import EmbedcamError, InputError, short
from ..explain.explainer import Explainer
from ..explain.explanation import Explanation, Result
from ..explain.queries import Query
from ..explain.texts import Words
from ..index import Neighbors
from ..index.in_memory import Row, Rows, listed
from ..index.search import find_neighbors
from .errors import HTTPProblem
from .limits import Limits
from .pictures import Prepared
from .pipeline import (
    SECONDS,
    Answer,
    Asked,
    Pipeline,
    check_names,
    find_live,
    given,
    nearest,
    passes,
    unknown_image,
)

logger = logging.getLogger("embedcam.service")

P = ParamSpec("P")
R = TypeVar("R")
READY_SECONDS: Final = 1.0
"""For so long an answer of the store to GET /readyz is believed."""
COUNT_SECONDS: Final = 60.0
"""For so long a count of its rows is, which may take a store a while."""

_PROBLEMS: Final[Mapping[str, tuple[int, str]]] = {
    "store_unavailable": (503, "the store of the images cannot be asked; try again"),
    "store_slow": (503, "the store of the images did not answer in time; try again"),
    "no_rows": (503, "the store holds no image that this service's model reads; try again later"),
    "other_generation": (
        503,
        "the store's images are of another generation than this service's model; try again later",
    ),
    "unusable_rows": (
        502,
        "the store answered with rows that cannot be read; the server's log says why",
    ),
}
"""What the log says of each names hosts and files, which a client may not see."""


class StorePipeline(Pipeline):
    """All the work of a service whose explainer has a store.

    The store is asked in threads of its own: a question that is never answered costs its thread,
    and no other request. `renew` returns an explainer of the model as it is now, with a
    store of the model's generation.
    """

    def __init__(
        self,
        explainer: Explainer,
        limits: Limits,
        renew: Callable[[], Explainer] | None = None,
    ) -> None:
        super().__init__(explainer, limits)
        self._renew = renew
        registry, by = self.telemetry.registry, ("operation",)
        said = "From a question to the store to its answer, which may come too late."
        self._seconds = Histogram(
            "embedcam_store_seconds", said, by, buckets=SECONDS, registry=registry
        )
        said = "Questions to the store without an answer that could be used."
        self._failures = Counter("embedcam_store_failures", said, ("reason",), registry=registry)
        self._free = threading.BoundedSemaphore(2 * limits.concurrency)
        self._forget()

    def open(self) -> None:
        """Make ready for requests; no thread begins yet."""
        if self._closed:
            # No pool, whose threads the end of the process waits for: one may never come back.
            self._questions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            self._idle, self._threads = threading.Semaphore(0), 0
        super().open()

    def close(self) -> None:
        """Finish what was begun, but for questions to the store, and end all threads."""
        super().close()
        for _ in range(self._threads):
            self._questions.put(None)

    def _forget(self) -> None:
        """Forget what was found of a store; when, and what, each."""
        self._asking_whether_ready = False
        self._told: tuple[float, HTTPProblem | None] = (-np.inf, None)
        self._count: tuple[float, int | None] = (-np.inf, None)

    def _check(self) -> None:
        """Take any store: it may be filled while it is served."""

    # What is asked of the service

    async def explain(
        self,
        wanted: tuple[int, str | None, str | None, int],
        read: Callable[[], Prepared],
        tell: Callable[[Prepared, Explanation], R],
    ) -> R:
        """Explain a picture by the rows that the store returns for it, and tell of it."""
        n_shown, result, rival, detail = wanted
        explainer, named = self.explainer, given(result, rival)
        picture, query = await self.ask(self.embedded, (explainer, detail), read)
        n_searched = explainer.count_searched(n_shown)
        held = await self._asked(self._near, explainer, query.embedding, n_searched, named)
        check_names(given(result), rival)

        def explained() -> R:
            explain = partial(held.explain_embedded, query, n_shown, result, rival)
            return tell(picture, self._usable(explain, InputError))

        return await self.in_thread(explained)

    async def search(
        self, n_neighbors: int, read: Callable[[], Prepared]
    ) -> tuple[Prepared, list[Result]]:
        """Return a picture, and the rows that the store returns for it."""
        explainer = self.explainer
        picture, query = await self.ask(self.embedded, (explainer, 1), read)
        held = await self._asked(self._near, explainer, query.embedding, n_neighbors)
        return picture, nearest(held.index, query.embedding[None], n_neighbors)[0]

    async def near_words(
        self, embed: Answer[Asked, Words], asked: Asked, n_neighbors: int
    ) -> tuple[Explainer, Words, Neighbors]:
        """Return an explainer of the rows that the store returns for words."""
        explainer = self.explainer
        words = (await self.ask(embed, None, lambda: asked))[1]
        held = await self._asked(self._near, explainer, words.embedding, n_neighbors)
        (near,) = find_neighbors(held.index, words.embedding[None], n_neighbors, None)
        return held, words, near

    async def holding(self, ids: Sequence[str]) -> Explainer:
        """Return an explainer of these rows, or raise HTTPProblem 404 where one is missing."""
        return await self._asked(self._these, self.explainer, ids)

    async def some(self, count: int) -> tuple[Explainer, list[str]]:
        """Return an explainer, and so many of its rows' ids, that lie in different directions."""
        held = await self._asked(self._around, self.explainer, count)
        return held, [*held.index.ids]

    async def images(self) -> int | None:
        """Return how many images the store holds, None where it does not say.

        Raises HTTPProblem 503 where nothing can be explained by it now.
        """
        if not self.ready:
            return await super().images()
        asked, problem = self._told
        # While one asks, others are told what was found last.
        if time.monotonic() - asked > READY_SECONDS and not self._asking_whether_ready:
            self._asking_whether_ready = True
            try:
                problem = await self._why_not_ready(self.explainer)
            finally:
                self._asking_whether_ready = False
            self._told = time.monotonic(), problem
        elif np.isneginf(asked):
            problem = _problem("store_unavailable")
        if problem is not None:
            raise problem
        return self._count[1]

    async def _why_not_ready(self, explainer: Explainer) -> HTTPProblem | None:
        try:
            await self._asked(self._search, explainer, _any_embedding(explainer), 1)
        except HTTPProblem as problem:
            return problem
        count = getattr(explainer.store, "generations", None)
        if count is not None and time.monotonic() - self._count[0] > COUNT_SECONDS:
            held = None
            with suppress(HTTPProblem):  # some take long to count, and answer all the same
                counted = await self._asked(self._timed, "count", count)
                held = counted.get(explainer.index.generation)
            self._count = time.monotonic(), held
        return None

    def reload(self) -> bool:
        """Serve the model as it is now and return whether it changed.

        Raises EmbedcamError of a model that cannot be served, or whose rows the store does not
        hold; the old one is served on.
        """
        if self._renew is None:
            raise InputError("this service was made of an explainer, and does not know its file")
        after = self._renew()
        if after.index.manifest.manifest_sha256 == self.index.manifest.manifest_sha256:
            _let_go(after)
            return False
        assert after.store is not None
        try:
            if not listed(after.store.search(_any_embedding(after), 1)):
                raise InputError(
                    f"the store holds no row of the generation {after.index.generation}, which "
                    f"{after.index.path} reads; write them first with `embedcam rows`"
                )
        except BaseException:
            _let_go(after)
            raise
        before, self.explainer = self.explainer, after
        self._forget()
        logger.info("%s: generation %s is served", after.index.path, after.index.generation)
        # Requests that began with the one before are at their end by then.
        later = threading.Timer(2 * self.limits.seconds, _let_go, [before])
        later.daemon = True
        later.start()
        return True

    def embedded(self, wanted: tuple[Explainer, int], pictures: Sequence[Prepared]) -> list[Query]:
        """Embed pictures; `wanted` are the explainer and detail. Called in the network's thread."""
        explainer, detail = wanted
        queries: list[Query] = []
        for inputs, larger in passes(pictures, detail):
            queries += explainer.embedded(inputs, detail=detail, larger=larger)
        return queries

    # What is asked of the store, each in a thread of its own

    def _near(
        self, explainer: Explainer, embedding: np.ndarray, n: int, ids: Sequence[str] = ()
    ) -> Explainer:
        """Return an explainer of the n nearest rows, and of those with these ids."""
        rows = self._search(explainer, embedding, n)
        known = {row["id"] for row in rows}
        if missing := [one for one in ids if one not in known]:
            rows = rows + self._fetch(explainer, missing)
        return self._holding(explainer, rows, ids, n)

    def _these(self, explainer: Explainer, ids: Sequence[str]) -> Explainer:
        """Return an explainer of the rows with these ids."""
        return self._holding(explainer, self._fetch(explainer, [*dict.fromkeys(ids)]), ids)

    def _around(self, explainer: Explainer, count: int) -> Explainer:
        """Return an explainer of rows in so many directions, the nearest of each."""
        rng, chosen = np.random.default_rng(0), dict[str, Row]()
        for _ in range(count):
            direction = _of_length_1(rng.standard_normal(explainer.index.width))
            rows = self._search(explainer, direction, count)
            fresh = (row for row in rows if row["id"] not in chosen)
            chosen |= {row["id"]: row for row in islice(fresh, 1)}
        return self._holding(explainer, [*chosen.values()])

    def _search(self, explainer: Explainer, embedding: np.ndarray, n: int) -> list[Row]:
        """Return the rows that the store finds, one at least."""
        assert explainer.store is not None
        found = self._timed("search", explainer.store.search, embedding, n)
        if not (rows := self._of_model(explainer, found)):
            raise self._failed("no_rows", f"no row of generation {explainer.index.generation}")
        return rows

    def _fetch(self, explainer: Explainer, ids: Sequence[str]) -> list[Row]:
        """Return the rows of these ids that the store holds."""
        assert explainer.store is not None
        return self._of_model(explainer, self._timed("fetch", explainer.store.fetch, ids))

    def _timed(self, operation: str, ask: Callable[P, R], *given: P.args, **more: P.kwargs) -> R:
        with self._seconds.labels(operation).time():
            return ask(*given, **more)

    def _of_model(self, explainer: Explainer, found: Rows) -> list[Row]:
        """Return rows as mappings, or raise HTTPProblem where all are of another generation."""

        def read() -> list[Row]:
            rows, ours = listed(found), explainer.index.generation
            if not all(isinstance(row["id"], str) for row in rows):
                raise InputError("the store returned a row without an id")
            if rows and all(row["generation"] != ours for row in rows):
                theirs = short(rows[0]["generation"])
                said = f"the store's rows are of generation {theirs}, and {ours} is served"
                raise self._failed("other_generation", said)
            return rows

        return self._usable(read)

    def _holding(
        self,
        explainer: Explainer,
        rows: list[Row],
        ids: Sequence[str] = (),
        wanted: int | None = None,
    ) -> Explainer:
        """Return an explainer of rows, which hold these ids."""
        if not rows:
            raise unknown_image()
        held = self._usable(partial(explainer.with_rows, rows, wanted))
        for name in ids:
            find_live(held.index, name)
        return held

    async def _asked(self, ask: Callable[P, R], *given: P.args, **more: P.kwargs) -> R:
        """Return what is made of the store's answers in time, or raise HTTPProblem."""
        limit, start = self.limits.store_seconds, time.perf_counter()
        if not self._free.acquire(blocking=False):
            raise self._failed("store_slow", "too many questions wait for its answer")
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()

        def answer() -> None:
            try:
                future.set_result(ask(*given, **more))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._free.release()

        self._questions.put(answer)
        if not self._idle.acquire(blocking=False):
            self._threads += 1
            waiting = self._questions, self._idle
            threading.Thread(target=_answer_all, args=waiting, daemon=True).start()
        try:
            async with asyncio.timeout(limit):
                return await asyncio.wrap_future(future)
        except HTTPProblem:
            raise
        except TimeoutError:
            raise self._failed("store_slow", f"no answer within {limit:g} s") from None
        except Exception as error:
            late = time.perf_counter() - start >= limit  # it keeps the limit itself
            raise self._failed("store_slow" if late else "store_unavailable", error) from None

    def _usable(self, read: Callable[[], R], passing: type[Exception] = HTTPProblem) -> R:
        """Return what is made of rows, or raise HTTPProblem 502 where they do not bear it."""
        try:
            return read()
        except (HTTPProblem, passing):
            raise
        except Exception as error:
            raise self._failed("unusable_rows", error) from None

    def _failed(self, code: str, why: object) -> HTTPProblem:
        """Count a failure, log it, and return what a client is told."""
        self._failures.labels(code).inc()
        cause = why if isinstance(why, Exception) and not isinstance(why, EmbedcamError) else None
        logger.warning("%s: %s", code, why, exc_info=cause)
        return _problem(code)


def _answer_all(
    questions: SimpleQueue[Callable[[], None] | None], idle: threading.Semaphore
) -> None:
    while (answer := questions.get()) is not None:
        answer()
        idle.release()


def _problem(code: str) -> HTTPProblem:
    status, said = _PROBLEMS[code]
    return HTTPProblem(status, code, said, {"Retry-After": "5"} if status == 503 else None)


def _of_length_1(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def _any_embedding(explainer: Explainer) -> np.ndarray:
    return _of_length_1(np.ones(explainer.index.width))


def _let_go(explainer: Explainer) -> None:
    """Close an explainer and its store."""
    explainer.close()
    close = getattr(explainer.store, "close", None)
    if close is not None:
        close()
