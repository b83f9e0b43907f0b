"""POST /explain, /search and /compare: a picture goes in, what it is like and why comes out."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..errors import ImageError, InputError
from ..explain.explainer import Explainer
from ..explain.explanation import Explanation, Result
from ..explain.sides import Shown, Side
from ..explain.texts import Words
from ..index.records import Json
from ..pairs import (
    Receipt,
    TextReceipt,
    check_same,
    covered,
    make_comparison,
    make_receipt,
    make_text_receipt,
    mean_of,
)
from . import schemas
from .errors import BOX, CELL, HTTPProblem, choose
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
)
from .pipeline import Pipeline, check_names, find_live, given, listed_results
from .receipts import ReceiptMaker, Told, changed, four_digits, told_of_receipt
from .texts import WordsMaker, read_words, told_of_words, told_on_picture

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
        text: schemas.Sentence | SkipJsonSchema[None] = Field(
            default=None,
            description="Words, beside a picture: where does it answer them? With words "
            "as the body it has no meaning.",
        )
        above: schemas.Sentence | SkipJsonSchema[None] = Field(
            default=None,
            description="With `text`: which places speak for it, and which for these words?",
        )
        picture_size: int = Field(
            default=512, ge=16, le=MAX_SIDE, description="Of an overlay: its longer side at most."
        )

    @routes.post(
        "/explain",
        **schemas.route(
            "Which images are like this picture, or answer these words, and why",
            schemas.ExplainAnswer | schemas.WordsExplained | schemas.WordsOnPicture,
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

        async def refuse_named() -> None:
            if named := given(asked.result, asked.rival):
                await pipeline.holding(named)
                name = "rival" if asked.result is None else "result"
                said = f"{name}: is of a picture as the query; leave it out, or the words"
                raise HTTPProblem(422, "unusable_parameter", said)

        async def answer_words(upload: Upload) -> Response:
            await refuse_named()
            found = await words_maker.find(read_words(upload), asked.n_neighbors)
            why, kept = await words_maker.explain(*found)

            def tell() -> Response:
                if kind != JSON:
                    return schemas.response(why.plot(), kind, {"Vary": "Accept"})
                told = told_of_words(request, why, kept, asked.map_size, asked.signed)
                return schemas.response(told, kind, {"Vary": "Accept"})

            return await pipeline.in_thread(tell)

        async def answer_on(text: str, read: Callable[[], Prepared]) -> Response:
            await refuse_named()
            words = schemas.TextQuery(text=text, above=asked.above)
            picture, why = await words_maker.explain_on(words, read)

            def tell() -> Response:
                if kind != JSON:
                    return schemas.response(why.plot(), kind, {"Vary": "Accept"})
                told = told_on_picture(why, picture, asked.map_size, asked.signed)
                return schemas.response(told, kind, {"Vary": "Accept"})

            return await pipeline.in_thread(tell)

        wanted = (asked.n_neighbors, asked.result, asked.rival, asked.detail)
        async with pipeline.admitted(request, words=True) as upload:
            if upload.is_json:
                return await answer_words(upload)
            read = pipeline.reading(upload, side, asked.detail)
            if asked.text is not None:
                return await answer_on(asked.text, read)
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
        cell: Annotated[str, Field(pattern=CELL, examples=["2,5"])] | SkipJsonSchema[None] = Field(
            default=None,
            description="Row and column of a cell, from 0: what does it match?",
        )
        of: Literal["query", "result"] = Field(default="query", description="Whose cell it is.")
        box: (
            Annotated[str, Field(pattern=BOX, examples=["40,32,180,200"])] | SkipJsonSchema[None]
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
            if self.rival is not None:
                said = "a box asks what a part matches in each result; leave out the rival or it"
                raise HTTPProblem(422, "unusable_parameter", said)
            box = [float(end) for end in self.box.split(",")]
            x0, y0, x1, y1 = query.extent
            try:
                return covered(box, query.size, (x0, y0, x1, y1), grid)
            except InputError as error:
                raise HTTPProblem(404, "unknown_box", str(error)) from None

        def point_of(self, receipt: Receipt) -> list[list[float]] | None:
            if self.cell is None:
                return None
            row, _, column = self.cell.partition(",")
            try:
                point = receipt.point(int(row), int(column), self.of)
            except InputError as error:
                raise HTTPProblem(404, "unknown_cell", str(error)) from None
            return four_digits(point)

    async def pictures_of(
        held: Explainer,
        ids: Sequence[str],
        side: int | None,
        settle: Callable[[str, Prepared, Side], None],
    ) -> None:
        """Settle each image with what the network makes of it."""
        index = pipeline.index

        def settle_same(name: str, picture: Prepared, side: Side) -> None:
            try:
                check_same(held.index, name, side)
            except ImageError:
                raise changed() from None
            settle(name, picture, side)

        # No more at once than go through the network together, so that others come between.
        for start in range(0, len(ids), pipeline.batch):
            part = ids[start : start + pipeline.batch]
            reads = [partial(maker.read, held, name, side) for name in part]
            asked_of = (pipeline.ask(maker.sides, index, read) for read in reads)
            # Each is work by itself: a request that has taken too long ends with it.
            for name, found in zip(part, await asyncio.gather(*asked_of), strict=True):
                await pipeline.in_thread(settle_same, name, *found)

    async def compare_words(
        request: Request, asked: CompareParameters, kind: str, words: Words
    ) -> Response:
        """Answer with the receipts of words and images."""
        held, index = await pipeline.holding([*asked.result, *given(asked.rival)]), pipeline.index
        if asked.rival is not None:
            said = "rival: is of a picture as the query; leave it out, or the words"
            raise HTTPProblem(422, "unusable_parameter", said)
        check_names(asked.result, None)
        made: list[tuple[Prepared, TextReceipt]] = []

        def settle(name: str, picture: Prepared, side: Side) -> None:
            (label,) = held.index.select([find_live(held.index, name)]).labels
            shown = Shown(picture.small.image, picture.small.extent, name, label)
            receipt = make_text_receipt(index, words, side, shown, maker.known(index))
            made.append((picture, receipt))

        def answer() -> Response:
            if kind != JSON:
                drawn = made[0][1].plot(lines=asked.lines)
                return schemas.response(drawn, kind, {"Vary": "Accept"})
            told = [told_of_receipt(request, *one, asked.lines) for one in made]
            whole = schemas.WordsCompared(text=words.text, above=words.above, receipts=told)
            return schemas.response(whole, kind, {"Vary": "Accept"})

        await pictures_of(held, asked.result, None if kind == JSON else DRAWN_SIDE, settle)
        return await pipeline.in_thread(answer)

    @routes.post(
        "/compare",
        **schemas.route(
            "Why this picture, or words, and an image match, or why one image came above another",
            schemas.CompareAnswer | schemas.WordsCompared,
            *(404, 406, 409, 501, *_PROBLEMS),
            parameters=CompareParameters,
            drawn=(PNG, WEBP),
            said="Receipts as JSON; or one drawn, where `Accept` asks for a picture.",
            body=WITH_WORDS,
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
        told = Told(request, asked.lines, asked.links)
        kept: list[Receipt] = []

        async with pipeline.admitted(request, words=True) as upload:
            if upload.is_json:
                words = await words_maker.embedded(read_words(upload))
                return await compare_words(request, asked, kind, words)
            held = await pipeline.holding(ids)
            check_names(asked.result, rival)
            side = None if kind == JSON else DRAWN_SIDE
            read = pipeline.reading(upload, side)
            query, query_side = await pipeline.ask(maker.sides, index, read)
            known = await pipeline.in_thread(maker.known, index)

            def settle(name: str, picture: Prepared, its_side: Side) -> None:
                (label,) = held.index.select([find_live(held.index, name)]).labels
                receipt = make_receipt(
                    query_side,
                    its_side,
                    mean_of(index, asked.centred),
                    centred=asked.centred,
                    query_shown=Shown(query.small.image, query.small.extent),
                    result_shown=Shown(picture.small.image, picture.small.extent, name, label),
                    within=asked.weights_of(query, query_side.activations.shape[1:]),
                    known=known,
                )
                if kind == JSON:
                    told.add(picture, receipt, asked.point_of(receipt))
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
                whole = schemas.built(
                    schemas.CompareAnswer, box, receipts=told.receipts, contrast=contrast
                )
                return schemas.response(whole, kind, {"Vary": "Accept"})

            await pictures_of(held, ids, side, settle)
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
