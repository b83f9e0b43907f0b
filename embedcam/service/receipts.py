"""From an upload and ids to receipts: pictures in the pool, forwards in the network's thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image

from ..errors import EmbedcamError, ImageError, InputError
from ..images import read_image
from ..index import Index
from ..pairs import (
    Comparison,
    PairExplainer,
    Receipt,
    Shown,
    Side,
    check_same,
    make_comparison,
    make_receipt,
    mean_of,
)
from .errors import Refused
from .pictures import Query, shrunk
from .pipeline import Pipeline, find_live
from .upload import Upload

logger = logging.getLogger("embedcam.service")


T = TypeVar("T")


@dataclass(frozen=True)
class Receipts(Generic[T]):
    """What was asked: the query's picture, and what was told of each image's receipt."""

    query: Query
    told: list[T]
    comparison: Comparison | None


class ReceiptMaker:
    """Makes the receipts of uploads.

    Args:
        pipeline: the service's.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._pairs: PairExplainer | None
        try:
            self._pairs = PairExplainer(pipeline.explainer)
        except InputError:
            self._pairs = None

    def check(self) -> None:
        """Refuse, where the network's head is not to be had: 501."""
        if self._pairs is None:
            raise _no_receipts()

    async def receipts(
        self,
        upload: Upload,
        ids: Sequence[str],
        tell: Callable[[Query, Receipt], T],
        *,
        compared: bool = False,
        centred: bool = True,
        side: int | None = None,
    ) -> Receipts[T]:
        """The receipts of one query with these images, in their order.

        Of each receipt only what is told of it is kept: where receipts are of first order, one
        holds the graph of its picture's head. Each is a piece of work by itself, so that a request
        that has taken too long ends with the one begun.

        Args:
            upload: as it came.
            ids: of images of the index, looked up before; each once.
            tell: what is wanted of an image's picture and receipt; called in the pool, in order.
            compared: they are a result and its rival.
            centred: see `PairExplainer.receipt`.
            side: of the pictures to be drawn on, or None.

        Raises:
            Refused: 404, a picture that is not there; 409, a picture that has changed.
        """
        pipeline, index = self._pipeline, self._pipeline.index
        query = await pipeline.ask(upload, index, self._sides, side)
        told: list[T] = []
        kept: list[Receipt] = []

        def settled(name: str, result: tuple[Query, Side]) -> None:
            made = _settled(index, name, query, result, centred)
            told.append(tell(result[0], made))
            if compared:
                kept.append(made)

        # No more at once than go through the network together, so that others come between.
        step = pipeline.limits.batch
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            found = await asyncio.gather(*(self._indexed(index, name, side) for name in part))
            for name, result in zip(part, found, strict=True):
                await pipeline.in_thread(settled, name, result)
        comparison = None
        if compared:
            # A pass of the head where receipts are of first order.
            comparison = await pipeline.in_thread(make_comparison, query[1], *kept, index.metric)
        return Receipts(query[0], told, comparison)

    def _sides(self, index: Index, inputs: Sequence[Any]) -> list[Side]:
        assert self._pairs is not None  # `check` saw to it
        try:
            self._pairs.head(index)
        except InputError as error:
            # Another version of the index; what is wrong with it names files.
            logger.warning("no receipts: %s", error)
            raise _no_receipts() from None
        return self._pairs.sides(index, inputs)

    async def _indexed(self, index: Index, name: str, side: int | None) -> tuple[Query, Side]:
        return await self._pipeline.ask_prepared(index, self._sides, self._read, name, side)

    def _read(self, name: str, side: int | None) -> Query:
        """The picture of an indexed image, decoded and prepared; what fails names no file."""
        explainer = self._pipeline.explainer
        preprocess = explainer.preprocess
        assert preprocess is not None  # the pipeline checked it
        try:
            file, merged = explainer.picture_file(name), explainer.index.manifest.is_compressed
            if merged and explainer.file_state(name) == "changed":
                raise _changed()  # no stored embedding is that picture's, so none would tell
            picture = None
            if file is not None:
                picture = read_image(file, max_pixels=explainer.max_pixels)
            if picture is not None:
                return Query(
                    inputs=preprocess(picture),
                    size=picture.size,
                    extent=preprocess.extent(*picture.size),
                    small=None if side is None else shrunk(picture, side),
                )
        except EmbedcamError as error:
            logger.warning("an indexed image cannot be read: %s", error)
        raise Refused(
            404,
            "no_picture",
            "the picture of a result cannot be read any more, and a receipt needs it; leave it out",
        )


def _no_receipts() -> Refused:
    return Refused(
        501,
        "no_receipts",
        "receipts need the network's head by itself, which its ONNX file and this index do not "
        "tell; serve the network instead",
    )


def _settled(
    index: Index, name: str, query: tuple[Query, Side], result: tuple[Query, Side], centred: bool
) -> Receipt:
    (label,) = index.select([find_live(index, name)]).labels
    _check_same(index, name, result[1])
    return make_receipt(
        query[1],
        result[1],
        mean_of(index, centred),
        centred=centred,
        query_shown=_shown(query[0]),
        result_shown=_shown(result[0], name, label),
    )


def _check_same(index: Index, name: str, side: Side) -> None:
    try:
        check_same(index, name, side)
    except ImageError:
        raise _changed() from None


def _changed() -> Refused:
    return Refused(
        409,
        "changed_picture",
        "the picture of a result has changed since it was indexed; index it again, or leave it out",
    )


def _shown(picture: Query, name: str = "", label: str | None = None) -> Shown:
    """How it is drawn: made small, and the rectangle that the network saw with it."""
    small: Image.Image | None = picture.small
    x0, y0, x1, y1 = picture.extent
    across = down = 1.0
    if small is not None:
        across, down = small.width / picture.size[0], small.height / picture.size[1]
    return Shown(small, (x0 * across, y0 * down, x1 * across, y1 * down), name, label)
