"""From uploaded bytes to an explanation, through a pool of threads and the batcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..errors import InputError
from ..explain import Explainer, Explanation
from ..images.batches import default_workers
from ..index import Index, Neighbors
from ..pairs import PairExplainer, Side
from .batching import Batcher
from .errors import Refused
from .limits import Gate, Limits
from .pictures import Query, encoded, overlay, read_query
from .telemetry import Telemetry
from .upload import Upload, picture_in

logger = logging.getLogger("embedcam.service")

T = TypeVar("T")
MAX_THREADS = 4
"""That decode and draw: each may hold a decoded picture, so more of them are more memory."""
PROBE_SIDE = 64


class Asked(NamedTuple):
    """What pictures of one batch have in common."""

    kind: str
    n_neighbors: int
    result: str | None = None


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
        self.pairs = PairExplainer(explainer)
        self.gate = Gate(limits.concurrency)
        self.telemetry = Telemetry(lambda: self.gate.inside)
        self.ready = False
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, default_workers()), thread_name_prefix="embedcam-pictures"
        )
        self._batcher = Batcher(
            self._answer, limits.batch, limits.batch_seconds, self.telemetry.batched
        )

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
        self, upload: Upload, n_neighbors: int, result: str | None, side: int | None
    ) -> tuple[Query, Explanation]:
        """An uploaded picture, explained.

        Args:
            upload: as it came.
            n_neighbors: results.
            result: id of the image whose weights alone are transferred, or None.
            side: of the picture to be drawn on, or None.
        """
        if result is not None:
            find_live(self.index, result)
        asked = Asked("explain", n_neighbors, result)
        return await self._together(asked, self.read, upload, side)

    async def search(self, upload: Upload, n_neighbors: int) -> tuple[Query, Found]:
        """An uploaded picture, embedded and searched with; nothing is explained."""
        return await self._together(Asked("search", n_neighbors), self.read, upload, None)

    async def side(self, prepared: Callable[..., Query], *given: Any) -> tuple[Query, Side]:
        """A picture as receipts need it.

        Args:
            prepared: called in the pool with the rest.
            given: its arguments.
        """
        return await self._together(Asked("side", 0), prepared, *given)

    def read(self, upload: Upload, side: int | None) -> Query:
        """An uploaded picture, decoded and prepared; arguments as for `explain`."""
        preprocess = self.explainer.preprocess
        assert preprocess is not None  # `_check` saw to it
        return read_query(picture_in(upload), preprocess, self.limits.pixels, side)

    async def _together(
        self, asked: Asked, prepared: Callable[..., Query], *given: Any
    ) -> tuple[Query, Any]:
        """Prepared in the pool, then answered in a batch."""
        with self._batcher.announced() as submit:
            query = await self.in_thread(prepared, *given)
            future = submit(asked, query.inputs)
        return query, await asyncio.wrap_future(future)

    def _answer(self, asked: Asked, inputs: Sequence[np.ndarray]) -> Sequence[Any]:
        """A batch of equal settings, in the batcher's thread."""
        if asked.kind == "explain":
            return self.explainer.explain_batch(
                inputs, n_neighbors=asked.n_neighbors, result=asked.result
            )
        if asked.kind == "side":
            return self.pairs.sides(inputs)
        return self._searched(asked.n_neighbors, inputs)

    def _searched(self, n_neighbors: int, inputs: Sequence[np.ndarray]) -> list[Found]:
        network, index = self.explainer.network, self.index
        assert network is not None  # `_check` saw to it
        embeddings = network.forward(np.stack(inputs)).embedding.cpu().numpy()
        near = index.search(embeddings, n_neighbors)
        return [
            _found(index, Neighbors(*one))
            for one in zip(near.positions, near.distances, near.similarities, strict=True)
        ]

    async def probe(self) -> None:
        """Explain a picture of noise, and be ready once that has worked."""
        try:
            body = await self.in_thread(_probe_picture)
            query, made = await self.explain(Upload(body), self.n_neighbors, None, PROBE_SIDE)
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

    def close(self) -> None:
        """Finish what was begun, and end all threads."""
        self.set_ready(False)
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
    if explainer.index.manifest["faiss"] is None:
        raise InputError(
            f"{explainer.index.path} was built without FAISS, so a service cannot search it; "
            "`embedcam compact --rebuild-faiss Flat` gives it one"
        )
    if len(explainer.index) == 0:
        raise InputError(f"{explainer.index.path}: every image was removed; add images first")
