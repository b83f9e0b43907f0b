"""POST /explain, /search and /compare: a picture goes in, what it is like and why comes out."""

import asyncio
import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..errors import EmbedcamError, ImageError, InputError
from ..explain.explainer import Explainer
from ..explain.explanation import Explanation, Json, Result
from ..explain.sides import Shown, Side
from ..index import Index
from ..pairs import (
    NOTHING_KNOWN,
    Known,
    PairExplainer,
    Receipt,
    check_same,
    covered,
    make_comparison,
    make_receipt,
    mean_of,
)
from . import schemas
from .errors import HTTPProblem, choose
from .pictures import (
    FORM_TYPE,
    JSON,
    PART,
    PNG,
    RAW_TYPES,
    WEBP,
    Prepared,
    Upload,
    overlaid,
    prepare,
)
from .pipeline import Pipeline, check_names, find_live, given, listed_results
from .texts import WordsMaker, read_words, told_of_words

logger = logging.getLogger("embedcam.service")

MAX_CELLS, MAX_SIDE = 224, 1024
BODY: schemas.Described = {
    "requestBody": {
        "required": True,
        "description": "A picture: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000; of an "
        "animation the first frame. As the form field `image`, or as the body itself.",
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": [PART],
                    "additionalProperties": False,
                    "properties": {PART: schemas.BINARY["schema"]},
                },
                "encoding": {PART: {"contentType": ", ".join(RAW_TYPES)}},
            },
            **dict.fromkeys(RAW_TYPES, schemas.BINARY),
        },
    }
}
WITH_WORDS = copy.deepcopy(BODY)
"""The same, or words as JSON."""
WITH_WORDS["requestBody"]["description"] += " Or words, as JSON."
WITH_WORDS["requestBody"]["content"][JSON] = {"schema": schemas.TextQuery.model_json_schema()}
_PROBLEMS = (400, 403, 408, 413, 415, 422, 500, 502, 503)
MAX_LINES = 50
_NUMBER = r"-?[0-9]{1,6}(\.[0-9]{1,3})?"
_BOX = rf"^{_NUMBER}(,{_NUMBER}){{3}}$"
MAX_PAIRS = 250_000
"""Numbers of all `pairs` of an answer together, about 2 MB: a hundred receipts on maps of 7 x 7, or
six of 14 x 14."""
DRAWN_SIDE = 560

_ID = "Id of an image of the index"


def router(pipeline: Pipeline) -> APIRouter:
    """Return the three endpoints."""
    routes = APIRouter(tags=["queries"])
    maker, most = ReceiptMaker(pipeline), pipeline.limits.n_neighbors
    words_maker = WordsMaker(pipeline, maker.read)

    class SearchParameters(BaseModel):
        n_neighbors: int = Field(
            default=pipeline.n_neighbors, ge=1, le=most, description="Images that come back."
        )

    class ExplainParameters(SearchParameters):
        result: str | SkipJsonSchema[None] = Field(
            default=None, description="Id of one image: what in the picture matched this one."
        )
        rival: str | SkipJsonSchema[None] = Field(
            default=None,
            description="Id of another image, with `result`: what in the picture speaks for the "
            "result rather than for this one.",
        )
        detail: int = Field(
            default=pipeline.explainer.detail,
            ge=1,
            le=2,
            description="2 draws a finer map: the picture is shown to the network once more at "
            "twice the side, for about four more embeddings.",
        )
        signed: bool = Field(
            default=False,
            description="Of the JSON: the map before its ReLU, too, negative where the picture "
            "speaks against the results.",
        )
        map_size: int = Field(
            default=14, ge=1, le=MAX_CELLS, description="Of the JSON's map: cells a side at most."
        )
        picture_size: int = Field(
            default=512, ge=16, le=MAX_SIDE, description="Of an overlay: its longer side at most."
        )

    @routes.post(
        "/explain",
        **schemas.route(
            "Which images are like this picture, or answer these words, and why",
            schemas.ExplainAnswer | schemas.WordsExplained,
            *(404, 406, 501, *_PROBLEMS),
            parameters=ExplainParameters,
            drawn=(PNG, WEBP),
            said="The results and the maps as JSON; or the picture with its map over it (of words "
            "the pictures found, with theirs), where `Accept` asks for a picture.",
            body=WITH_WORDS,
        ),
    )
    async def explain(request: Request, asked: Annotated[ExplainParameters, Query()]) -> Response:
        kind = choose(request, (JSON, PNG, WEBP))
        side = None if kind == JSON else asked.picture_size

        def answer(picture: Prepared, why: Explanation) -> Response:
            if kind != JSON:
                drawn = overlaid(replace(picture.small, cam=why.cam))
                return schemas.response(drawn, kind, {"Vary": "Accept"})
            told = _explained(request, picture, why, asked.map_size, asked.signed)
            return schemas.response(told, kind, {"Vary": "Accept"})

        async def answer_words(upload: Upload) -> Response:
            await pipeline.holding(given(asked.result, asked.rival))
            for name in ("result", "rival"):
                if getattr(asked, name) is not None:
                    said = f"{name}: is of a picture as the query; leave it out"
                    raise HTTPProblem(422, "unusable_parameter", said)
            found = await words_maker.find(read_words(upload), asked.n_neighbors)
            why, kept = await words_maker.explain(*found)

            def tell() -> Response:
                if kind != JSON:
                    return schemas.response(why.plot(), kind, {"Vary": "Accept"})
                told = told_of_words(request, why, kept, asked.map_size, asked.signed)
                return schemas.response(told, kind, {"Vary": "Accept"})

            return await pipeline.in_thread(tell)

        wanted = (asked.n_neighbors, asked.result, asked.rival, asked.detail)
        async with pipeline.admitted(request, words=True) as upload:
            if upload.is_json:
                return await answer_words(upload)
            read = pipeline.reading(upload, side, asked.detail)
            return await pipeline.explain(wanted, read, answer)

    @routes.post(
        "/search",
        **schemas.route(
            "Which images are like this picture, or answer these words, without the why",
            schemas.SearchAnswer | schemas.WordsFound,
            *(501, *_PROBLEMS),
            parameters=SearchParameters,
            body=WITH_WORDS,
        ),
    )
    async def search(request: Request, asked: Annotated[SearchParameters, Query()]) -> Response:
        async with pipeline.admitted(request, words=True) as upload:
            if upload.is_json:
                words = read_words(upload)
                held, _, beside = await words_maker.find(words, asked.n_neighbors)
                found = matches(request, listed_results(held.index, beside))
                return schemas.response(schemas.WordsFound(text=words.text, neighbors=found))
            read = pipeline.reading(upload)
            picture, near = await pipeline.search(asked.n_neighbors, read)
        neighbors = matches(request, near)
        size = schemas.size_of(picture.size)
        return schemas.response(schemas.SearchAnswer(picture=size, neighbors=neighbors))

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
        box: (
            Annotated[str, Field(pattern=_BOX, examples=["40,32,180,200"])] | SkipJsonSchema[None]
        ) = Field(
            default=None,
            description="x0,y0,x1,y1 in pixels of the picture: what does that part match?",
        )
        centred: bool = Field(
            default=True, description="Put apart what the average image of the index shares."
        )
        lines: int = Field(
            default=10, ge=0, le=MAX_LINES, description="Channels with a line of their own."
        )
        links: int = Field(
            default=5, ge=0, le=MAX_LINES, description="Links between cells, at most."
        )

        def weights_of(self, query: Prepared, grid: Sequence[int]) -> np.ndarray | None:
            if self.box is None:
                return None
            box = [float(end) for end in self.box.split(",")]
            x0, y0, x1, y1 = query.extent
            try:
                return covered(box, query.size, (x0, y0, x1, y1), grid)
            except InputError as error:
                raise HTTPProblem(422, "unusable_box", str(error)) from None

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
        **schemas.route(
            "Why this picture and an image match, or why one image came above another",
            schemas.CompareAnswer,
            *(404, 406, 409, 501, *_PROBLEMS),
            parameters=CompareParameters,
            drawn=(PNG, WEBP),
            said="Receipts as JSON; or one drawn, where `Accept` asks for a picture.",
            body=BODY,
        ),
    )
    async def compare(request: Request, asked: Annotated[CompareParameters, Query()]) -> Response:
        kind, index, rival = choose(request, (JSON, PNG, WEBP)), pipeline.index, asked.rival
        ids = [*asked.result, *given(rival)]
        if kind != JSON and (len(asked.result) > 1 or asked.cell is not None):
            said = (
                "a picture shows the receipt of one result, or of it and a rival; ask for "
                "application/json for more"
            )
            raise HTTPProblem(422, "not_drawable", said)
        if asked.box is not None and rival is not None:
            said = "a box asks what a part matches in each result; leave out the rival or the box"
            raise HTTPProblem(422, "unusable_parameter", said)
        told: list[schemas.PairReceipt] = []
        kept: list[Receipt] = []
        left = MAX_PAIRS

        def tell(picture: Prepared, receipt: Receipt) -> schemas.PairReceipt:
            """Write a receipt, with its `pairs` while there is room."""
            nonlocal left
            numbers = receipt.query.cells.size * receipt.result.cells.size
            fits = all(one.direct for one in receipt.sides) and numbers <= left
            left -= numbers * fits
            shown = receipt.to_dict(asked.lines, asked.links)
            pairs = receipt.matrix().reshape(receipt.query.cells.size, -1) if fits else None
            return schemas.built(
                schemas.PairReceipt,
                {
                    **shown["result"],
                    **shown,
                    **schemas.lines_of(request, shown),
                },
                picture=schemas.size_of(picture.size),
                extent=picture.extent,
                query=schemas.built(schemas.Evidence, shown["query"]),
                result=schemas.built(schemas.Evidence, shown["result"]),
                pairs=None if pairs is None else rounded(pairs),
                point=asked.point_of(receipt),
            )

        async with pipeline.admitted(request) as upload:
            held = await pipeline.holding(ids)
            check_names(asked.result, rival)
            side = None if kind == JSON else DRAWN_SIDE
            read = pipeline.reading(upload, side)
            query, query_side = await pipeline.ask(maker.sides, index, read)

            def settle(name: str, picture: Prepared, its_side: Side) -> None:
                (label,) = held.index.select([find_live(held.index, name)]).labels
                try:
                    check_same(held.index, name, its_side)
                except ImageError:
                    raise _changed() from None
                receipt = make_receipt(
                    query_side,
                    its_side,
                    mean_of(index, asked.centred),
                    centred=asked.centred,
                    query_shown=Shown(query.small.image, query.small.extent),
                    result_shown=Shown(picture.small.image, picture.small.extent, name, label),
                    within=asked.weights_of(query, query_side.activations.shape[1:]),
                    known=maker.known(index),
                )
                if kind == JSON:
                    told.append(tell(picture, receipt))
                # Others are let go of: behind attention, one holds the graph of its picture's head.
                if kind != JSON or rival is not None:
                    kept.append(receipt)

            def answer() -> Response:
                # A pass of the head behind attention and the like.
                why, contrast = None, None
                if rival is not None:
                    why = make_comparison(query_side, kept[0], kept[1], index.metric)
                if kind != JSON:
                    lines = asked.lines
                    drawn = why.plot(lines=lines) if why else kept[0].plot(lines=lines)
                    return schemas.response(drawn, kind, {"Vary": "Accept"})
                if why is not None:
                    shown = why.to_dict(asked.lines)
                    cells = shown["query"]["cells"]
                    shown |= schemas.lines_of(request, shown)
                    contrast = schemas.built(schemas.Contrast, shown, query=cells)
                box = {"picture": schemas.size_of(query.size), "extent": query.extent}
                whole = schemas.built(schemas.CompareAnswer, box, receipts=told, contrast=contrast)
                return schemas.response(whole, kind, {"Vary": "Accept"})

            # No more at once than go through the network together, so that others come between.
            for start in range(0, len(ids), pipeline.batch):
                part = ids[start : start + pipeline.batch]
                reads = [partial(maker.read, held, name, side) for name in part]
                asked_of = (pipeline.ask(maker.sides, index, read) for read in reads)
                # Each is work by itself: a request that has taken too long ends with it.
                for name, found in zip(part, await asyncio.gather(*asked_of), strict=True):
                    await pipeline.in_thread(settle, name, *found)
            return await pipeline.in_thread(answer)

    return routes


def matches(request: Request, near: Sequence[Result]) -> list[schemas.Match]:
    """Return what came back as JSON."""
    return [
        schemas.built(schemas.Match, vars(one), **schemas.urls_of(request, one.id)) for one in near
    ]


def _explained(
    request: Request, picture: Prepared, why: Explanation, map_size: int, signed: bool
) -> schemas.ExplainAnswer:
    height, width = why.cam.shape
    shown = why.to_dict((min(map_size, height), min(map_size, width)), signed=signed)

    def neighbor(told: Json | None, one: Result | None) -> schemas.Neighbor | None:
        if told is None or one is None:
            return None
        urls = schemas.urls_of(request, one.id)
        return schemas.built(schemas.Neighbor, told, norm=one.norm, **urls)

    return schemas.built(
        schemas.ExplainAnswer,
        shown,
        picture=schemas.size_of(picture.size),
        extent=picture.extent,
        result=neighbor(shown["result"], why.asked),
        rival=neighbor(shown["rival"], why.rival),
        neighbors=list(map(neighbor, shown["neighbors"], why.neighbors())),
    )


def rounded(values: np.ndarray) -> list[list[float]]:
    """Return the numbers to four significant digits (whole ones from 1000 on), as lists."""
    values = np.asarray(values, np.float64)
    # Powers of ten are exact up to 22, so that the quotient is the number those digits name.
    digits = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros(values.shape)))
    powers = 10.0 ** np.clip(3 - digits, 0, 22)
    numbers: list[list[float]] = (np.rint(values * powers) / powers + 0.0).tolist()
    return numbers


class ReceiptMaker:
    """Makes sides of receipts: pictures read in the pool, forwards in the network's thread."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._pairs: PairExplainer | None = None

    def sides(self, index: Index, pictures: Sequence[Prepared]) -> list[Side]:
        """Return what the network makes of pictures, or raise HTTPProblem 501 without its head."""
        try:
            if self._pairs is None:
                names = self._pipeline.concept_names
                self._pairs = PairExplainer(self._pipeline.explainer, concept_names=names)
            self._pairs.maker.head(index)
        except InputError as error:
            # Of a file, or of another version of the index; what is wrong names files.
            logger.warning("no receipts: %s", error)
            said = (
                "receipts need the network's head by itself, which its ONNX file and this index do "
                "not tell; serve the network instead"
            )
            raise HTTPProblem(501, "no_receipts", said) from None
        return self._pairs.maker.sides(index, [one.inputs for one in pictures])

    def known(self, index: Index) -> Known:
        """Return what the index says of channels and concepts."""
        return NOTHING_KNOWN if self._pairs is None else self._pairs.known(index)

    def read(self, explainer: Explainer, name: str, side: int | None) -> Prepared:
        """Return an indexed image's picture, decoded and prepared; what fails names no file."""
        try:
            merged = explainer.index.manifest.is_compressed
            if merged and explainer.file_state(name) == "changed":
                raise _changed()  # no stored embedding is that picture's, so none would tell
            return prepare(explainer.picture(name), self._pipeline.preprocess, side)
        except EmbedcamError as error:
            logger.warning("an indexed image cannot be read: %s", error)
        said = "the picture of a result cannot be read any more, and a receipt needs it"
        raise HTTPProblem(404, "no_picture", f"{said}; leave it out")


def _changed() -> HTTPProblem:
    said = "the picture of a result has changed since it was indexed"
    return HTTPProblem(409, "changed_picture", f"{said}; index it again, or leave it out")
