"""From an upload and ids to receipts: pictures in the pool, forwards in the batcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import EmbedcamError, ImageError
from ..images import read_image
from ..index import Index
from ..pairs import Comparison, Receipt, Shown, Side, make_comparison, make_receipt
from .errors import Refused
from .pictures import Query, shrunk
from .pipeline import Pipeline, find_live
from .upload import Upload

logger = logging.getLogger("embedcam.service")


@dataclass(frozen=True)
class Receipts:
    """What was asked: the query's picture, and for each image its picture and receipt."""

    query: Query
    pictures: list[Query]
    receipts: list[Receipt]
    comparison: Comparison | None


async def make_receipts(
    pipeline: Pipeline, upload: Upload, ids: Sequence[str], compared: bool, side: int | None
) -> Receipts:
    """The receipts of one query with these images, in their order.

    Args:
        pipeline: the service's.
        upload: as it came.
        ids: of images of the index, each once.
        compared: they are a result and its rival.
        side: of the pictures to be drawn on, or None.

    Raises:
        Refused: 404, an image or a picture that is not there; 409, a picture that has changed.
    """
    index = pipeline.index
    for name in ids:
        find_live(index, name)
    query, first = await pipeline.side(pipeline.read, upload, side)
    pictures: list[Query] = []
    sides: list[Side] = []
    # No more at once than go through the network together, so that others come between.
    step = pipeline.limits.batch
    for start in range(0, len(ids), step):
        part = [
            pipeline.side(_read_indexed, pipeline, name, side) for name in ids[start : start + step]
        ]
        for picture, made in await asyncio.gather(*part):
            pictures.append(picture)
            sides.append(made)
    return await pipeline.in_thread(
        _settled, pipeline, index, query, first, ids, pictures, sides, compared
    )


def _settled(
    pipeline: Pipeline,
    index: Index,
    query: Query,
    first: Side,
    ids: Sequence[str],
    pictures: list[Query],
    sides: Sequence[Side],
    compared: bool,
) -> Receipts:
    mean = index.fitted("embedding_mean")
    labels = index.select([find_live(index, name) for name in ids]).labels
    receipts = []
    for name, label, picture, side in zip(ids, labels, pictures, sides, strict=True):
        _check_same(pipeline, name, side)
        receipts.append(
            make_receipt(
                first,
                side,
                mean,
                query_shown=_shown(query),
                result_shown=_shown(picture, name, label),
            )
        )
    comparison = (
        make_comparison(first, receipts[0], receipts[1], index.metric) if compared else None
    )
    return Receipts(query, pictures, receipts, comparison)


def _read_indexed(pipeline: Pipeline, name: str, side: int | None) -> Query:
    """The picture of an indexed image, decoded and prepared; what fails names no file."""
    preprocess = pipeline.explainer.preprocess
    assert preprocess is not None  # the pipeline checked it
    try:
        file = pipeline.explainer.picture_file(name)
        picture = None if file is None else read_image(file)
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


def _check_same(pipeline: Pipeline, name: str, side: Side) -> None:
    try:
        pipeline.pairs.check_same(name, side)
    except ImageError:
        raise Refused(
            409,
            "changed_picture",
            "the picture of a result has changed since it was indexed; index it again, or leave "
            "it out",
        ) from None


def _shown(picture: Query, name: str = "", label: str | None = None) -> Shown:
    """How it is drawn: made small, and the rectangle that the network saw with it."""
    small: Image.Image | None = picture.small
    x0, y0, x1, y1 = picture.extent
    across = down = 1.0
    if small is not None:
        across, down = small.width / picture.size[0], small.height / picture.size[1]
    return Shown(small, (x0 * across, y0 * down, x1 * across, y1 * down), name, label)
