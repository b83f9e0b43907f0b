"""POST /compare: why a picture and its results match, as receipts that add up."""

import json
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..errors import InputError
from ..pairs import Receipt
from .accept import choose
from .errors import Refused
from .explain import BINARY, BODY, JSON, PNG, REFUSALS, WEBP
from .parameters import only
from .pictures import Query as Picture
from .pictures import encoded
from .pipeline import Pipeline, check_apart
from .receipts import ReceiptMaker, Receipts
from .schemas import CompareAnswer, refusals
from .upload import read_upload

KNOWN = ("result", "rival", "cell", "of", "centred", "lines", "links")
MAX_LINES = 50
MAX_PAIRS = 250_000
"""Numbers of all `pairs` of an answer together, about 2 MB: a hundred receipts on maps of 7 x 7, or
six of 14 x 14."""
DRAWN_SIDE = 560

CELL = Annotated[str, Field(pattern=r"^[0-9]{1,3},[0-9]{1,3}$", examples=["2,5"])]
Point = tuple[int, int, Literal["query", "result"]]
_ID = "Id of an image of the index"


def router(pipeline: Pipeline) -> APIRouter:
    """The one endpoint."""
    routes = APIRouter(tags=["queries"])
    maker, most = ReceiptMaker(pipeline), pipeline.limits.n_neighbors

    @routes.post(
        "/compare",
        operation_id="compare",
        summary="Why this picture and an image match, or why one image came above another",
        response_class=Response,
        responses={
            200: {
                "model": CompareAnswer,
                "description": "Receipts as JSON; or one drawn, where `Accept` asks for a picture.",
                "content": {PNG: BINARY, WEBP: BINARY},
            },
            **refusals(404, 406, 409, 501, *REFUSALS),
        },
        openapi_extra=BODY,
        dependencies=[Depends(only(*KNOWN, repeated=("result",)))],
    )
    async def compare(
        request: Request,
        result: Annotated[
            list[str], Query(min_length=1, max_length=most, description=f"{_ID}; once for each.")
        ],
        rival: Annotated[
            str | SkipJsonSchema[None],
            Query(description=f"{_ID}: why did the one result come above it?"),
        ] = None,
        cell: Annotated[
            CELL | SkipJsonSchema[None],
            Query(description="Row and column of a cell, from 0: what does it match?"),
        ] = None,
        of: Annotated[Literal["query", "result"], Query(description="Whose cell it is.")] = "query",
        centred: Annotated[
            bool, Query(description="Put apart what the average image of the index shares.")
        ] = True,
        lines: Annotated[
            int, Query(ge=0, le=MAX_LINES, description="Channels with a line of their own.")
        ] = 10,
        links: Annotated[
            int, Query(ge=0, le=MAX_LINES, description="Links between cells, at most.")
        ] = 5,
    ) -> Response:
        maker.check()
        kind = choose(request.headers.get("accept"), (JSON, PNG, WEBP))
        pipeline.find_live(*result, *([] if rival is None else [rival]))
        ids = _checked_ids(result, rival)
        point = _point_of(cell, of)
        if kind != JSON:
            _check_drawable(result, point)
        with pipeline.gate.admitted():
            upload = await read_upload(request, pipeline.limits)
            async with pipeline.deadline():
                side = None if kind == JSON else DRAWN_SIDE
                chosen: dict[str, Any] = {
                    "compared": rival is not None,
                    "centred": centred,
                    "side": side,
                }
                if kind == JSON:
                    writer = _Writer(point, lines, links)
                    made = await maker.receipts(upload, ids, writer.receipt, **chosen)
                    body = await pipeline.in_thread(_written, made, lines)
                else:
                    drawn = await maker.receipts(upload, ids, _itself, **chosen)
                    body = await pipeline.in_thread(_drawn, drawn, kind, lines, links)
        return Response(body, media_type=kind, headers={"Vary": "Accept"})

    return routes


def _checked_ids(results: list[str], rival: str | None) -> list[str]:
    if len(set(results)) < len(results):
        raise Refused(422, "repeated_result", "result: names an image twice; name each once")
    if rival is None:
        return results
    if len(results) > 1:
        raise Refused(
            422, "too_many_results", "rival: goes with one result; leave the other results out"
        )
    check_apart(results[0], rival)
    return [*results, rival]


def _point_of(cell: str | None, of: Literal["query", "result"]) -> Point | None:
    if cell is None:
        return None
    row, _, column = cell.partition(",")
    return int(row), int(column), of


def _check_drawable(results: list[str], point: Point | None) -> None:
    if len(results) > 1 or point is not None:
        raise Refused(
            422,
            "not_drawable",
            "a picture shows the receipt of one result, or of it and a rival; ask for "
            "application/json for more",
        )


def _itself(_: Picture, receipt: Receipt) -> Receipt:
    return receipt


def _drawn(made: Receipts[Receipt], kind: str, lines: int, links: int) -> bytes:
    if made.comparison is not None:
        return encoded(made.comparison.plot(lines=lines), kind)
    return encoded(made.told[0].plot(lines=lines, links=links), kind)


class _Writer:
    """Writes the receipts of one answer, one after the other; `pairs` while there is room."""

    def __init__(self, point: Point | None, lines: int, links: int) -> None:
        self._point, self._lines, self._links = point, lines, links
        self._left = MAX_PAIRS

    def receipt(self, picture: Picture, receipt: Receipt) -> dict[str, Any]:
        """One receipt of the answer."""
        numbers = receipt.query.cells.size * receipt.result.cells.size
        fits = receipt.exact and numbers <= self._left
        self._left -= numbers * fits
        found = _receipt(receipt.to_dict(self._lines, self._links), picture)
        found["pairs"] = _pairs(receipt) if fits else None
        found["point"] = None if self._point is None else _point(receipt, self._point)
        return found


def _written(made: Receipts[dict[str, Any]], lines: int) -> bytes:
    contrast = None if made.comparison is None else _contrast(made.comparison.to_dict(lines))
    body = {**_picture(made.query), "receipts": made.told, "contrast": contrast}
    # A NaN is no JSON: it would be a fault of ours, and is to be seen as one.
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _receipt(shown: dict[str, Any], picture: Picture) -> dict[str, Any]:
    kept = (
        "similarity", "exact", "centred", "shared", "remainder", "channels", "other_channels",
        "links",
    )  # fmt: skip
    return {
        "id": shown["result"]["id"],
        "label": shown["result"]["label"],
        **_picture(picture),
        **{name: shown[name] for name in kept},
        "query": _evidence(shown["query"]),
        "result": _evidence(shown["result"]),
    }


def _contrast(shown: dict[str, Any]) -> dict[str, Any]:
    kept = ("score", "exact", "remainder", "channels", "other_channels")
    return {**{name: shown[name] for name in kept}, "query": shown["query"]["cells"]}


def _evidence(shown: dict[str, Any]) -> dict[str, Any]:
    return {name: shown[name] for name in ("cells", "shared", "remainder")}


def _picture(picture: Picture) -> dict[str, Any]:
    width, height = picture.size
    return {"picture": {"width": width, "height": height}, "extent": list(picture.extent)}


def _point(receipt: Receipt, point: Point) -> list[list[float]]:
    row, column, of = point
    try:
        found = receipt.point(row, column, of)
    except InputError as error:
        raise Refused(404, "unknown_cell", str(error)) from None
    return rounded(found)


def _pairs(receipt: Receipt) -> list[list[float]]:
    return rounded(receipt.matrix().reshape(receipt.query.cells.size, -1))


def rounded(values: np.ndarray) -> Any:
    """The numbers to four significant digits (whole ones from 1000 on), as lists."""
    values = np.asarray(values, np.float64)
    # Powers of ten are exact up to 22, so that the quotient is the number those digits name.
    digits = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros(values.shape)))
    powers = 10.0 ** np.clip(3 - digits, 0, 22)
    found: Any = (np.rint(values * powers) / powers + 0.0).tolist()
    return found
