"""What is said where something is refused or fails: one sentence, and nothing of the server's own.

Messages of the first half of `KINDS` are about what the client sent, and are passed on. The others
name files of the server: they go to the log, and the client is told a sentence of ours.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

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
"""The first class that fits an error gives the status, the code and, where set, the sentence."""

_HTTP: dict[int, tuple[str, str]] = {
    404: ("unknown_path", "there is nothing at this address; /openapi.json lists what there is"),
    405: ("unknown_method", "this address does not take this method; `Allow` lists those it takes"),
}


class Refused(Exception):  # noqa: N818 - reads as the fact it states
    """A request that is not answered, with its status, code and sentence."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})


def response_of(error: Exception) -> Response:
    """The answer to a request that met this error; what the client may not see is logged."""
    if isinstance(error, Refused):
        return _body(error.status, error.code, error.message, error.headers)
    if isinstance(error, RequestValidationError):
        return _body(422, "unusable_parameter", _what_is_wrong(error.errors()))
    if isinstance(error, HTTPException):
        code, sentence = _HTTP.get(error.status_code, ("refused", "the request was refused"))
        return _body(error.status_code, code, sentence, error.headers)
    found = next(known for kind, known in KINDS.items() if isinstance(error, kind))
    status, code, fixed = found
    if fixed is not None:
        unexpected = not isinstance(error, EmbedcamError)
        logger.error("%s: %s", code, error, exc_info=error if unexpected else None)
    return _body(status, code, fixed or str(error))


async def handle(_: Request, error: Exception) -> Response:
    """`response_of` as FastAPI calls it."""
    return response_of(error)


def _body(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers=headers)


def _what_is_wrong(errors: Sequence[Any]) -> str:
    """The first of pydantic's complaints as a sentence; what was given is not repeated."""
    first = errors[0]
    # Where it was given ("query"), its name, and what pydantic knows of its type.
    name = str(first["loc"][:2][-1]) if first["loc"] else "the request"
    said = str(first["msg"])
    return f"{name}: {said[:1].lower()}{said[1:]}"
