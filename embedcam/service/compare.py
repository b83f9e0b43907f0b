"""POST /compare: why a picture and its results match, as receipts that add up."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

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
from .errors import HTTPProblem, choose
from .explain import BODY, PROBLEMS
from .pictures import JSON, PNG, WEBP, Prepared, encoded, prepare, small_box
from .pipeline import Pipeline, check_apart, find_live
from .schemas import (
    CompareAnswer,
    Contrast,
    Evidence,
    PairReceipt,
    built,
    route,
    size_of,
    written,
)

logger = logging.getLogger("embedcam.service")

MAX_LINES = 50
MAX_PAIRS = 250_000
"""Numbers of all `pairs` of an answer together, about 2 MB: a hundred receipts on maps of 7 x 7, or
six of 14 x 14."""
DRAWN_SIDE = 560

_ID = "Id of an image of the index"


def router(pipeline: Pipeline) -> APIRouter:
    """Return the one endpoint."""
    routes = APIRouter(tags=["queries"])
    maker, most = ReceiptMaker(pipeline), pipeline.limits.n_neighbors

    class CompareParameters(BaseModel):
        result: list[str] = Field(
            min_length=1, max_length=most, description=f"{_ID}; once for each."
        )
        rival: str | SkipJsonSchema[None] = Field(
            default=None, description=f"{_ID}: why did the one result come above it?"
        )
        cell: (
            Annotated[str, Field(pattern=r"^[0-9]{1,3},[0-9]{1,3}$", examples=["2,5"])]
            | SkipJsonSchema[None]
        ) = Field(default=None, description="Row and column of a cell, from 0: what does it match?")
        of: Literal["query", "result"] = Field(default="query", description="Whose cell it is.")
        centred: bool = Field(
            default=True, description="Put apart what the average image of the index shares."
        )
        lines: int = Field(
            default=10, ge=0, le=MAX_LINES, description="Channels with a line of their own."
        )
        links: int = Field(
            default=5, ge=0, le=MAX_LINES, description="Links between cells, at most."
        )

        def point_of(self, receipt: Receipt) -> list[list[float]] | None:
            if self.cell is None:
                return None
            row, _, column = self.cell.partition(",")
            try:
                point = receipt.point(int(row), int(column), self.of)
            except InputError as error:
                raise HTTPProblem(404, "unknown_cell", str(error)) from None
            return rounded(point)

    @routes.post(
        "/compare",
        operation_id="compare",
        **route(
            "Why this picture and an image match, or why one image came above another",
            CompareAnswer,
            *(404, 406, 409, 501, *PROBLEMS),
            parameters=CompareParameters,
            drawn=(PNG, WEBP),
            said="Receipts as JSON; or one drawn, where `Accept` asks for a picture.",
            openapi_extra=BODY,
        ),
    )
    async def compare(request: Request, asked: Annotated[CompareParameters, Query()]) -> Response:
        maker.check()
        kind = choose(request, (JSON, PNG, WEBP))
        ids = _checked_ids(pipeline.index, asked.result, asked.rival)
        if kind != JSON and (len(asked.result) > 1 or asked.cell is not None):
            said = (
                "a picture shows the receipt of one result, or of it and a rival; ask for "
                "application/json for more"
            )
            raise HTTPProblem(422, "not_drawable", said)
        left = MAX_PAIRS

        def told(picture: Prepared, receipt: Receipt) -> PairReceipt | None:
            """Write a receipt, with its `pairs` while there is room; a drawn one is drawn later."""
            nonlocal left
            if kind != JSON:
                return None
            numbers = receipt.query.cells.size * receipt.result.cells.size
            fits = receipt.exact and numbers <= left
            left -= numbers * fits
            shown = receipt.to_dict(asked.lines, asked.links)
            pairs = receipt.matrix().reshape(receipt.query.cells.size, -1) if fits else None
            return built(
                PairReceipt,
                shown,
                **{name: shown["result"][name] for name in ("id", "label")},
                **_picture(picture),
                query=built(Evidence, shown["query"]),
                result=built(Evidence, shown["result"]),
                pairs=None if pairs is None else rounded(pairs),
                point=asked.point_of(receipt),
            )

        async with pipeline.uploaded(request) as upload:
            side = None if kind == JSON else DRAWN_SIDE
            index, read = pipeline.index, pipeline.reading(upload, side)
            query = await pipeline.ask(maker.sides, index, read)
            receipts, kept = await maker.receipts(
                index, query, ids, told, asked.centred, side, keep=kind != JSON or bool(asked.rival)
            )

            def body() -> bytes:
                # A pass of the head where receipts are of first order.
                compared = asked.rival is not None
                why = (
                    make_comparison(query[1], kept[0], kept[1], index.metric) if compared else None
                )
                if kind == JSON:
                    return _written(query[0], receipts, why, asked.lines)
                if why is not None:
                    return encoded(why.plot(lines=asked.lines), kind)
                return encoded(kept[0].plot(lines=asked.lines, links=asked.links), kind)

            answer = await pipeline.in_thread(body)
        return Response(answer, media_type=kind, headers={"Vary": "Accept"})

    return routes


def _checked_ids(index: Index, results: list[str], rival: str | None) -> list[str]:
    """Return the images to compare with; each is in the index, and named once."""
    ids = [*results, *([] if rival is None else [rival])]
    for name in ids:
        find_live(index, name)
    if len(set(results)) < len(results):
        raise HTTPProblem(422, "repeated_result", "result: names an image twice; name each once")
    if rival is not None and len(results) > 1:
        said = "rival: goes with one result; leave the other results out"
        raise HTTPProblem(422, "too_many_results", said)
    check_apart(results[0], rival)
    return ids


def _picture(picture: Prepared) -> dict[str, Any]:
    return {"picture": size_of(picture.size), "extent": list(picture.extent)}


def _written(
    query: Prepared, receipts: Sequence[PairReceipt | None], why: Comparison | None, lines: int
) -> bytes:
    contrast = None
    if why is not None:
        shown = why.to_dict(lines)
        contrast = built(Contrast, shown, query=shown["query"]["cells"])
    told = [one for one in receipts if one is not None]
    return written(CompareAnswer(**_picture(query), receipts=told, contrast=contrast))


def rounded(values: np.ndarray[Any, Any]) -> list[list[float]]:
    """Return the numbers to four significant digits (whole ones from 1000 on), as lists."""
    values = np.asarray(values, np.float64)
    # Powers of ten are exact up to 22, so that the quotient is the number those digits name.
    digits = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros(values.shape)))
    powers = 10.0 ** np.clip(3 - digits, 0, 22)
    numbers: list[list[float]] = (np.rint(values * powers) / powers + 0.0).tolist()
    return numbers


class ReceiptMaker:
    """Makes receipts of pictures: read in the pool, forwards in the network's thread."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._pairs: PairExplainer | None
        try:
            self._pairs = PairExplainer(pipeline.explainer)
        except InputError:
            self._pairs = None

    def check(self) -> PairExplainer:
        """Return what explains pairs, or raise HTTPProblem 501 where there is no head to be had."""
        if self._pairs is None:
            raise _no_receipts()
        return self._pairs

    async def receipts(
        self,
        index: Index,
        query: tuple[Prepared, Side],
        ids: Sequence[str],
        tell: Callable[[Prepared, Receipt], PairReceipt | None],
        centred: bool,
        side: int | None,
        *,
        keep: bool,
    ) -> tuple[list[PairReceipt | None], list[Receipt]]:
        """Return what is told of each image's receipt with the query, and the receipts to keep.

        Others are let go of: where receipts are of first order, one holds the graph of its
        picture's head. Each is a piece of work by itself, so that a request that has taken too
        long ends with the one begun.
        """
        told: list[PairReceipt | None] = []
        kept: list[Receipt] = []

        def settle(name: str, picture: Prepared, its_side: Side) -> None:
            (label,) = index.select([find_live(index, name)]).labels
            try:
                check_same(index, name, its_side)
            except ImageError:
                raise _changed() from None
            receipt = make_receipt(
                query[1],
                its_side,
                mean_of(index, centred),
                centred=centred,
                query_shown=Shown(query[0].small, small_box(query[0]), "", None),
                result_shown=Shown(picture.small, small_box(picture), name, label),
            )
            told.append(tell(picture, receipt))
            if keep:
                kept.append(receipt)

        # No more at once than go through the network together, so that others come between.
        step = self._pipeline.limits.batch
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            pictures = await asyncio.gather(*(self._indexed(index, name, side) for name in part))
            for name, (picture, its_side) in zip(part, pictures, strict=True):
                await self._pipeline.in_thread(settle, name, picture, its_side)
        return told, kept

    def sides(self, index: Index, inputs: Sequence[Any]) -> list[Side]:
        """Return what the network makes of pictures, for receipts."""
        pairs = self.check()
        try:
            pairs.head(index)
        except InputError as error:
            # Another version of the index; what is wrong with it names files.
            logger.warning("no receipts: %s", error)
            raise _no_receipts() from None
        return pairs.sides(index, inputs)

    async def _indexed(self, index: Index, name: str, side: int | None) -> tuple[Prepared, Side]:
        return await self._pipeline.ask(self.sides, index, lambda: self._read(name, side))

    def _read(self, name: str, side: int | None) -> Prepared:
        """Return an indexed image's picture, decoded and prepared; what fails names no file."""
        explainer = self._pipeline.explainer
        try:
            file, merged = explainer.picture_file(name), explainer.index.manifest.is_compressed
            if merged and explainer.file_state(name) == "changed":
                raise _changed()  # no stored embedding is that picture's, so none would tell
            if file is not None:
                picture = read_image(file, max_pixels=explainer.max_pixels)
                return prepare(picture, self._pipeline.preprocess, side)
        except EmbedcamError as error:
            logger.warning("an indexed image cannot be read: %s", error)
        raise HTTPProblem(
            404,
            "no_picture",
            "the picture of a result cannot be read any more, and a receipt needs it; leave it out",
        )


def _no_receipts() -> HTTPProblem:
    return HTTPProblem(
        501,
        "no_receipts",
        "receipts need the network's head by itself, which its ONNX file and this index do not "
        "tell; serve the network instead",
    )


def _changed() -> HTTPProblem:
    return HTTPProblem(
        409,
        "changed_picture",
        "the picture of a result has changed since it was indexed; index it again, or leave it out",
    )
