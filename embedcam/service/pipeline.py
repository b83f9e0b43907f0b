"""From uploaded bytes to an explanation, through a pool of threads and the batcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..errors import InputError
from ..explain.explainer import Explainer, Explanation
from ..images.batches import default_workers
from ..index import Index, Neighbors
from .batching import Batcher
from .errors import Refused
from .limits import Gate, Limits
from .pictures import Query, encoded, overlay, read_query
from .telemetry import Telemetry
from .upload import Upload, picture_in

logger = logging.getLogger("embedcam.service")

T = TypeVar("T")
Answer = Callable[[Any, Sequence[np.ndarray]], Sequence[Any]]
"""From what is wanted and inputs `[3 H W]` to an answer for each; in the network's thread."""
MAX_THREADS = 4
"""That decode and draw: each may hold a decoded picture, so more of them are more memory."""
PROBE_SIDE = 64


class Asked(NamedTuple):
    """What pictures of one batch have in common: what is asked, and who answers it."""

    wanted: Hashable
    answer: Answer


class Wanted(NamedTuple):
    """Results, the id of the one that is explained alone, of its rival, or None; and the detail."""

    n_neighbors: int
    result: str | None = None
    rival: str | None = None
    detail: int = 1


@dataclass(frozen=True)
class Found:
    """The images a search found: ids, labels, distances and similarities, nearest first."""

    ids: list[str]
    labels: list[str | None]
    distances: np.ndarray
    similarities: np.ndarray


class Pipeline:
    """All the work of a service; its endpoints only read parameters and write answers.

    Args:
        explainer: with a network.
        limits: of requests.

    Raises:
        InputError: an explainer that cannot explain pictures.
    """

    def __init__(self, explainer: Explainer, limits: Limits) -> None:
        _check(explainer)
        self.explainer, self.limits = explainer, limits
        self.gate = Gate(limits.concurrency)
        self.telemetry = Telemetry(lambda: self.gate.inside)
        self.ready = False
        self._closed = True
        self.open()

    def open(self) -> None:
        """Make ready for requests, the first time or after `close`; no thread begins yet."""
        if self._closed:
            limits = self.limits
            self._pool = ThreadPoolExecutor(
                min(MAX_THREADS, default_workers()), thread_name_prefix="embedcam-pictures"
            )
            self._batcher = Batcher(
                self._answer, limits.batch, limits.batch_seconds, self.telemetry.batched
            )
            self._closed = False

    @property
    def index(self) -> Index:
        """The index as it is now; a request asks once and keeps to it."""
        return self.explainer.index

    @property
    def n_neighbors(self) -> int:
        """Results of a request that does not say how many."""
        return min(self.explainer.n_neighbors, self.limits.n_neighbors)

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """As long as the limit allows; what has not begun by then never does.

        Raises:
            Refused: 503, it took longer.
        """
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise Refused(
                503,
                "too_slow",
                f"the answer took longer than {self.limits.seconds:g} s; try again later",
                {"Retry-After": "5"},
            ) from None

    async def in_thread(self, work: Callable[..., T], *given: Any) -> T:
        """Run something in the pool."""
        return await asyncio.wrap_future(self._pool.submit(work, *given))

    async def explain(
        self, upload: Upload, wanted: Wanted, side: int | None
    ) -> tuple[Query, Explanation]:
        """An uploaded picture, explained.

        Args:
            upload: as it came.
            wanted: results, the one whose weights alone are transferred, and its rival.
            side: of the picture to be drawn on, or None.
        """
        result, rival = wanted.result, wanted.rival
        self.find_live(*(name for name in (result, rival) if name is not None))
        if rival is not None:
            if result is None:
                raise Refused(
                    422, "no_result", "rival: goes with a result, and none is named; name it, too"
                )
            check_apart(result, rival)
        answer = self._explained if wanted.detail == 1 else self._explained_finer
        return await self.ask(upload, wanted, answer, side, wanted.detail)

    async def search(self, upload: Upload, n_neighbors: int) -> tuple[Query, Found]:
        """An uploaded picture, embedded and searched with; nothing is explained."""
        return await self.ask(upload, Wanted(n_neighbors), self._searched)

    async def ask(
        self,
        upload: Upload,
        wanted: Hashable,
        answer: Answer,
        side: int | None = None,
        detail: int = 1,
    ) -> tuple[Query, Any]:
        """An uploaded picture, decoded in the pool, and an answer from the network's thread.

        Args:
            upload: as it came.
            wanted: what is asked; pictures of which the same is asked are answered together.
            answer: who answers.
            side: of the picture to be drawn on, or None.
            detail: 2 has the answer get pairs of inputs, the second at twice the side.
        """
        return await self.ask_prepared(wanted, answer, self._read, upload, side, detail)

    async def ask_prepared(
        self, wanted: Hashable, answer: Answer, prepared: Callable[..., Query], *given: Any
    ) -> tuple[Query, Any]:
        """As `ask`, of any picture: `prepared` is called in the pool with what is given."""
        with self._batcher.announced() as submit:
            query = await self.in_thread(prepared, *given)
            alone = query.larger is None
            future = submit(
                Asked(wanted, answer), query.inputs if alone else (query.inputs, query.larger)
            )
        return query, await asyncio.wrap_future(future)

    def _read(self, upload: Upload, side: int | None, detail: int = 1) -> Query:
        preprocess = self.explainer.preprocess
        assert preprocess is not None  # `_check` saw to it
        return read_query(picture_in(upload), preprocess, self.limits.pixels, side, detail)

    def find_live(self, *names: str) -> None:
        """Refuse an id that no image has; see `find_live`."""
        index = self.index
        for name in names:
            find_live(index, name)

    def _answer(self, asked: Asked, inputs: Sequence[np.ndarray]) -> Sequence[Any]:
        """A batch of which the same is asked, in the batcher's thread."""
        return asked.answer(asked.wanted, inputs)

    def _explained(self, wanted: Wanted, inputs: Sequence[np.ndarray]) -> Sequence[Any]:
        return self.explainer.explain_batch(
            inputs,
            n_neighbors=wanted.n_neighbors,
            result=wanted.result,
            above=wanted.rival,
            detail=1,
        )

    def _explained_finer(self, wanted: Wanted, pairs: Sequence[Any]) -> Sequence[Any]:
        # One after the other: at twice the side each takes four times the memory.
        return [
            self.explainer.explain_batch(
                [inputs],
                n_neighbors=wanted.n_neighbors,
                result=wanted.result,
                above=wanted.rival,
                detail=wanted.detail,
                larger=[larger],
            )[0]
            for inputs, larger in pairs
        ]

    def _asked_head(self, _: Any, inputs: Sequence[np.ndarray]) -> list[Any]:
        """What the head is, which receipts need; found once, in many passes."""
        return [getattr(self.explainer.network, "head_kind", None)] * len(inputs)

    def _searched(self, wanted: Wanted, inputs: Sequence[np.ndarray]) -> list[Found]:
        network, index = self.explainer.network, self.index
        assert network is not None  # `_check` saw to it
        embeddings = network.embed(np.stack(inputs)).embedding
        near = index.search(embeddings, wanted.n_neighbors)
        return [
            _found(index, Neighbors(*one))
            for one in zip(near.positions, near.distances, near.similarities, strict=True)
        ]

    async def probe(self) -> None:
        """Explain a picture of noise, and be ready once that has worked."""
        try:
            body = await self.in_thread(_probe_picture)
            query, made = await self.explain(Upload(body), Wanted(self.n_neighbors), PROBE_SIDE)
            await self.ask(Upload(body), None, self._asked_head)
            # The first overlay loads the colours.
            await self.in_thread(
                overlay, query.small, made.cam, query.extent, query.size, PROBE_SIDE
            )
        except Exception:
            logger.exception("the network did not answer a probe; the service is not ready")
            return
        self.set_ready(True)

    def set_ready(self, is_ready: bool) -> None:
        """Whether requests can be answered."""
        self.ready = is_ready
        self.telemetry.ready(is_ready)

    def reload(self) -> bool:
        """Serve the index as it is now, see `Explainer.reload`; not ready while it cannot be.

        Returns:
            Whether another version is served now.

        Raises:
            InputError: the new version is empty, or cannot be searched.
            and as `Explainer.reload`, which leaves the old one serving.
        """
        changed = self.explainer.reload()
        try:
            _check(self.explainer)
        except InputError:
            self.set_ready(False)
            raise
        if changed:
            self.set_ready(True)
        return changed

    def close(self) -> None:
        """Finish what was begun, and end all threads."""
        self.set_ready(False)
        self._closed = True
        self._batcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


def find_live(index: Index, name: str) -> int:
    """Position of an image.

    Raises:
        Refused: 404; unlike the index's own message it names no other image.
    """
    found = index.find_live([name])
    if name not in found:
        raise Refused(404, "unknown_image", "the index holds no image of this id")
    return found[name]


def check_apart(result: str, rival: str) -> None:
    """Refuse a rival that is the result itself.

    Raises:
        Refused: 422.
    """
    if rival == result:
        raise Refused(422, "same_image", "result and rival are the same image; name two")


def _found(index: Index, near: Neighbors) -> Found:
    rows = index.select(near.positions)
    return Found(rows.ids, rows.labels, near.distances, near.similarities)


def _probe_picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (PROBE_SIDE, PROBE_SIDE, 3), np.uint8)
    return encoded(Image.fromarray(noise), "image/png")


def _check(explainer: Explainer) -> None:
    if not isinstance(explainer, Explainer):
        raise InputError(f"a service needs an Explainer; given {type(explainer).__name__}")
    if explainer.network is None or explainer.preprocess is None:
        raise InputError(
            "a service embeds pictures: give the Explainer the network, with its preprocessing"
        )
    if explainer.index.manifest.faiss is None:
        raise InputError(
            f"{explainer.index.path} was built without FAISS, so a service cannot search it; "
            "`embedcam compact --rebuild-faiss Flat` gives it one"
        )
    if len(explainer.index) == 0:
        raise InputError(f"{explainer.index.path}: every image was removed; add images first")
