"""POST /compare: receipts of an uploaded picture with results, and why one came above another."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..errors import ImageError, InputError
from ..pairs import Comparison, PairExplainer, Receipt
from .errors import Refused
from .explain import BODY, JSON, REFUSALS, size_of
from .parameters import only
from .pictures import Query as Picture
from .pipeline import Pipeline
from .schemas import CompareAnswer, refusals
from .upload import read_upload

MAX_RESULTS, MAX_LINES = 10, 50
MAX_PAIRS = 250_000
"""Numbers of all receipts' `matrix` together: four megabytes of JSON."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of pairs; of one batch all ask the same.

    results: ids; rival: an id or None; centred: see `PairExplainer.receipt`; cell: (row, column) of
    the query whose matches are wanted, or None; matrix: those of every cell; lines, links: how
    many channels and links.
    """

    results: tuple[str, ...]
    rival: str | None
    centred: bool
    cell: tuple[int, int] | None
    matrix: bool
    lines: int
    links: int


def router(pipeline: Pipeline) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(tags=["queries"])
    try:
        pairs: PairExplainer | None = PairExplainer(pipeline.explainer)
    except InputError:
        pairs = None
    known = ("result", "rival", "centred", "cell", "matrix", "lines", "links")

    def compared(wanted: Wanted, inputs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        assert pairs is not None  # or it was refused
        return [_compared(pairs, wanted, one) for one in inputs]

    @routes.post(
        "/compare",
        operation_id="compare",
        summary="Why this picture and these results match, as sums that add up to the similarity",
        response_class=Response,
        responses={200: {"model": CompareAnswer}, **refusals(404, 501, *REFUSALS)},
        openapi_extra=BODY,
        dependencies=[Depends(only(*known, repeated=("result",)))],
    )
    async def compare(
        request: Request,
        result: Annotated[
            list[str],
            Query(min_length=1, max_length=MAX_RESULTS, description="Ids; may be repeated."),
        ],
        rival: Annotated[
            str | SkipJsonSchema[None],
            Query(description="Id of an image: why the one result came above this one."),
        ] = None,
        centred: Annotated[
            bool, Query(description="Put apart what the average image of the index shares.")
        ] = True,
        cell: Annotated[
            Annotated[str, Field(pattern=r"^[0-9]{1,3},[0-9]{1,3}$")] | SkipJsonSchema[None],
            Query(description="Row and column of a cell of the query's grid: what it matches."),
        ] = None,
        matrix: Annotated[
            bool, Query(description="What every cell of the query matches in each result.")
        ] = False,
        lines: Annotated[
            int, Query(ge=0, le=MAX_LINES, description="Channels with a line of their own.")
        ] = 10,
        links: Annotated[
            int, Query(ge=0, le=MAX_LINES, description="Best matching pairs of cells.")
        ] = 5,
    ) -> Response:
        if pairs is None:
            raise Refused(
                501,
                "no_receipts",
                "receipts need the network's head by itself, which its ONNX file and this index do "
                "not tell; serve the network instead",
            )
        row, _, column = (cell or "").partition(",")
        at = None if cell is None else (int(row), int(column))
        wanted = Wanted(tuple(result), rival, centred, at, matrix, lines, links)
        with pipeline.gate.admitted():
            pipeline.find_live(*wanted.results, *([] if rival is None else [rival]))
            _check_ids(wanted)
            upload = await read_upload(request, pipeline.limits)
            async with pipeline.deadline():
                query, made = await pipeline.ask(upload, wanted, compared)
                body = await pipeline.in_thread(_dumped, query, made)
        return Response(body, media_type=JSON)

    return routes


def _check_ids(wanted: Wanted) -> None:
    if len(set(wanted.results)) < len(wanted.results):
        raise Refused(422, "repeated_parameter", "result: an id was given twice; name each once")
    if wanted.rival is None:
        return
    if len(wanted.results) > 1:
        raise Refused(422, "several_results", "a rival is compared with one result; name one")
    if wanted.rival in wanted.results:
        raise Refused(422, "same_image", "the result and its rival are one image; name two")


def _compared(pairs: PairExplainer, wanted: Wanted, inputs: np.ndarray) -> dict[str, Any]:
    """In the network's thread: one forward pass of the query and its results."""
    above: Comparison | None = None
    try:
        if wanted.rival is None:
            receipts = pairs.receipts(inputs, wanted.results, centred=wanted.centred)
        else:
            above = pairs.above(inputs, wanted.results[0], wanted.rival, centred=wanted.centred)
            receipts = [above.result]
    except ImageError as error:
        # The query has been read by now. The message names a file of the server.
        raise Refused(
            404,
            "no_picture",
            "the picture of a result cannot be read any more, or has changed since it was indexed",
        ) from error
    _check_pairs(receipts, wanted)
    return {
        "receipts": [_receipt(receipt, wanted) for receipt in receipts],
        "above": None if above is None else above.to_dict(wanted.lines),
    }


def _check_pairs(receipts: Sequence[Receipt], wanted: Wanted) -> None:
    asked = sum(one.query.cells.size * one.result.cells.size for one in receipts)
    if wanted.matrix and asked > MAX_PAIRS:
        raise Refused(
            422,
            "too_many_pairs",
            f"the results have {asked} pairs of cells, the limit is {MAX_PAIRS}; name fewer "
            "results, or a cell in place of matrix",
        )


def _receipt(receipt: Receipt, wanted: Wanted) -> dict[str, Any]:
    return {
        **receipt.to_dict(wanted.lines, wanted.links),
        "matched": None if wanted.cell is None else _floats(_matched(receipt, *wanted.cell)),
        "matrix": _floats(receipt.matrix()) if wanted.matrix else None,
    }


def _matched(receipt: Receipt, row: int, column: int) -> np.ndarray:
    try:
        return receipt.point(row, column)
    except InputError as error:
        raise Refused(404, "unknown_cell", str(error)) from None


def _floats(values: np.ndarray) -> list[Any]:
    """With the digits that are worth sending."""
    # Six of them: a map of signed contributions, drawn in 256 colours.
    rounded = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values)
    found: list[Any] = rounded.tolist()
    return found


def _dumped(query: Picture, made: dict[str, Any]) -> bytes:
    for one in [*made["receipts"], *([] if made["above"] is None else [made["above"]])]:
        one["query"].update(id=None, extent=list(query.extent))
    whole = {"picture": size_of(query), **made}
    return json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()
