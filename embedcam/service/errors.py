"""HTTP errors, one sentence and nothing of the server's own; and what a request's head asks for."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .._checks import nearest_of
from ..errors import (
    EmbedcamError,
    ImageError,
    ImageTooLarge,
    IndexFormatError,
    InputError,
    NetworkError,
)

logger = logging.getLogger("embedcam.service")

KINDS: dict[type[Exception], tuple[int, str, str | None]] = {
    ImageTooLarge: (413, "too_many_pixels", None),
    ImageError: (422, "unreadable_image", None),
    InputError: (422, "unusable_input", None),
    NetworkError: (
        422,
        "no_embedding",
        "the network makes no usable embedding of this picture; send one that shows something",
    ),
    IndexFormatError: (500, "damaged_index", "the index cannot be read; the server's log says why"),
    Exception: (500, "failed", "the service failed on this request; the server's log says why"),
}
"""The first class that fits an error gives the status, the code and, where set, the sentence.

Messages without a sentence are about what the client sent, and are passed on. The others name files
of the server: they go to the log.
"""

_NUMBER = r"-?[0-9]{1,6}(\.[0-9]{1,3})?"
BOX: Final = rf"^{_NUMBER}(,{_NUMBER}){{3}}$"
CELL: Final = r"^[0-9]{1,3},[0-9]{1,3}$"
_SHAPES: Final = {
    BOX: "give four numbers x0,y0,x1,y1 in pixels of the picture, such as 40,32,180,200",
    CELL: "give a row and a column, from 0, such as 2,5",
}
"""What parameters of a pattern look like, for people."""

_HTTP: dict[int, tuple[str, str]] = {
    404: ("unknown_path", "there is nothing at this address; /openapi.json lists what there is"),
    405: ("unknown_method", "this address does not take this method; `Allow` lists those it takes"),
}


class HTTPProblem(HTTPException):
    """A request that is not answered, with its status, code and sentence."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code


def response_of(error: Exception) -> Response:
    """Return the answer to a request that met this error; log what the client may not see."""
    headers = error.headers if isinstance(error, HTTPException) else None
    if isinstance(error, HTTPProblem):
        status, code, said = error.status_code, error.code, error.detail
    elif isinstance(error, HTTPException):
        status = error.status_code
        code, said = _HTTP.get(status, ("refused", "the request was refused"))
    elif isinstance(error, RequestValidationError):
        # pydantic's first complaint, as a sentence; what was given is not repeated.
        first = error.errors()[0]
        name, told = first["loc"][1], first["msg"]
        told = _SHAPES.get(first.get("ctx", {}).get("pattern", ""), told)
        status, code, said = 422, "unusable_parameter", f"{name}: {told[:1].lower()}{told[1:]}"
    else:
        status, code, fixed = next(row for kind, row in KINDS.items() if isinstance(error, kind))
        if fixed is not None:
            unexpected = not isinstance(error, EmbedcamError)
            logger.error("%s: %s", code, error, exc_info=error if unexpected else None)
        said = fixed or str(error)
    return JSONResponse({"error": {"code": code, "message": said}}, status, headers)


async def handle(_: Request, error: Exception) -> Response:
    """Return `response_of`, as FastAPI calls it."""
    return response_of(error)


def only(parameters: type[BaseModel]) -> Callable[[Request], None]:
    """Return a dependency that refuses query parameters of other names, or given twice."""
    fields = parameters.model_fields
    single = {name for name, field in fields.items() if field.annotation != list[str]}

    def check(request: Request) -> None:
        seen = [name for name, _ in request.query_params.multi_items()]
        for name in seen:
            if name not in fields:
                said = f"a query parameter means nothing here; {nearest_of(name[:64], fields)}"
                raise HTTPProblem(422, "unknown_parameter", said)
            if name in single and seen.count(name) > 1:
                raise HTTPProblem(422, "repeated_parameter", f"{name}: given twice; give it once")

    return check


def choose(request: Request, offers: Sequence[str]) -> str:
    """Return the offer that `Accept` likes best (RFC 9110, 12.5.1), among equals the first.

    Raises HTTPProblem 406 where none will do.
    """
    ranges = []
    for part in (request.headers.get("accept") or "*/*").lower().split(","):
        main, _, sub = part.partition(";")[0].strip().partition("/")
        given = re.search(r";\s*q\s*=([^;]*)", part)
        weight = "1" if given is None else given[1].strip()
        # What is no number from 0 to 1 counts as 0, for it asks for nothing.
        number = re.fullmatch(r"[0-9]{1,5}|[0-9]{1,3}\.[0-9]{0,3}|\.[0-9]{1,4}", weight)
        ranges.append((main, sub, min(float(weight), 1.0) if number else 0.0))

    def quality(offer: str) -> float:
        """Return that of the most specific range that covers the offer."""
        main, sub = offer.split("/")
        covering = [
            (2 * (its_sub != "*") + (its_main != "*"), its_quality)
            for its_main, its_sub, its_quality in ranges
            if its_main in (main, "*") and its_sub in (sub, "*")
        ]
        return max(covering, default=(0, 0.0))[1]

    best = max(offers, key=quality)  # among equals the first
    if quality(best) <= 0:
        said = f"this is answered as {' or '.join(offers)}; ask for one of them"
        raise HTTPProblem(406, "no_such_type", said)
    return best
