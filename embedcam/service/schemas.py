"""The JSON of the service: answers are built as these models, which OpenAPI describes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import Depends
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from .errors import only

M = TypeVar("M", bound="Strict")
BINARY = {"schema": {"type": "string", "format": "binary"}}

Cam = Annotated[
    list[list[Annotated[float, Field(ge=0)]]],
    Field(description="A map, row by row from the top; larger is more evidence, 0 is none."),
]
Extent = Annotated[
    list[float],
    Field(
        min_length=4,
        max_length=4,
        description="What the map covers, [x0, y0, x1, y1] in pixels of the upright picture. "
        "It may reach beyond it, where the network was shown padding.",
    ),
]


class Strict(BaseModel):
    """A part of an answer: no other fields, and no NaN, which is no JSON."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Size(Strict):
    """A picture's size in pixels, upright."""

    width: int = Field(ge=1, examples=[640])
    height: int = Field(ge=1, examples=[480])


class Match(Strict):
    """An image of the index that came back."""

    id: str = Field(examples=["gulls/17.jpg"])
    label: str | None = Field(examples=["gulls"])
    distance: float = Field(description="Squared Euclidean: smaller is nearer.", examples=[0.31])
    similarity: float = Field(description="Inner product: larger is nearer.", examples=[0.845])
    image_url: str = Field(examples=["/items/gulls/17.jpg/image"])
    cam_url: str = Field(examples=["/items/gulls/17.jpg/cam"])


File = Annotated[
    Literal["same", "changed", "missing"] | None,
    Field(
        description="What became of the picture's file since it was indexed; null where the index "
        "keeps no mark of it. A changed picture is not the one that the map was made of.",
        examples=["same"],
    ),
]


class Neighbor(Match):
    """An image that came back, with its own map from the index."""

    file: File
    cam: Cam | None = Field(
        description="Its own map, on the layer's grid; null where the index keeps none."
    )
    norm: float | None = Field(
        ge=0,
        description="Length of its stored weights. Divide maps by it before they share a colour "
        "scale.",
        examples=[0.42],
    )


class SearchAnswer(Strict):
    """The nearest images, nearest first."""

    picture: Size
    neighbors: list[Match]


class ExplainAnswer(Strict):
    """The nearest images, and where in the query the reason is."""

    picture: Size
    cam: Cam
    signed_cam: list[list[float]] | SkipJsonSchema[None] = Field(
        default=None,
        description="With `signed=true`: the map before its ReLU, of the size of `cam`; negative "
        "where the picture speaks against the results.",
    )
    extent: Extent
    empty: bool = Field(description="Nothing in the query speaks for these results.")
    why_empty: str | None = Field(
        description="Why the map is empty, for people; null where it is not."
    )
    transfer: str = Field(description="How neighbours count.", examples=["mean"])
    match: float | None = Field(
        ge=0,
        le=1,
        description="Probability that the first result is of the query's kind, whatever the map "
        "shows; null where the index holds no calibration.",
        examples=[0.93],
    )
    trust: float | None = Field(
        ge=0,
        le=1,
        description="Expected correlation with a directly computed map; null where the index holds "
        "no calibration, and where a rival was named.",
        examples=[0.81],
    )
    trust_low: float | None = Field(
        ge=0, le=1, description="Correlation that nine in ten such maps reach.", examples=[0.64]
    )
    trusted: bool | None = Field(
        description="Whether the map can be relied on: trust_low reaches the limit, or direct."
    )
    direct: bool = Field(description="The weights were computed on the query itself.")
    explained: list[str] = Field(
        description="Ids of the images whose weights drew the map.", examples=[["gulls/17.jpg"]]
    )
    result: Neighbor | None = Field(
        description="The one image that was asked for, which may be no neighbour; null where none "
        "was."
    )
    rival: Neighbor | None = Field(
        description="The image that the result is told from: the map is drawn with the difference "
        "of their stored weights, each of length 1; null where none was named."
    )
    neighbors: list[Neighbor]


Cells = Annotated[
    list[list[float]],
    Field(description="Row by row from the top, on the layer's grid; positive speaks for it."),
]
Cell = Annotated[list[int], Field(min_length=2, max_length=2, description="[row, column]")]


class Evidence(Strict):
    """What one picture gives to a score: `cells`, `shared` and `remainder` sum to it."""

    cells: Cells
    shared: float = Field(description="What the average image of the index has too.")
    remainder: float = Field(description="What no cell or channel accounts for.")


class Channel(Strict):
    """A channel of the network's layer, and what it gives."""

    channel: int = Field(ge=0, examples=[417])
    contribution: float = Field(examples=[0.031])


class CellLink(Strict):
    """Two cells that match."""

    query: Cell
    result: Cell
    contribution: float


class PairReceipt(Strict):
    """Why the query and one result match: `shared`, the channels and `remainder` sum to it."""

    id: str = Field(examples=["gulls/17.jpg"])
    label: str | None = Field(examples=["gulls"])
    picture: Size
    extent: Extent
    similarity: float = Field(
        description="Inner product of the embeddings of both pictures; of a prototype, with the "
        "picture in its middle.",
        examples=[0.845],
    )
    exact: bool = Field(
        description="Contributions are exact; otherwise of first order, and `remainder` holds "
        "what is not."
    )
    centred: bool = Field(description="What both share with the average image was put apart.")
    shared: float = Field(description="What both share with the average image of the index.")
    remainder: float = Field(description="What no channel accounts for.")
    channels: list[Channel] = Field(description="Those that give most, largest first.")
    other_channels: float = Field(description="What all the others give together.")
    query: Evidence
    result: Evidence
    links: list[CellLink] = Field(description="The cells that match best.")
    pairs: list[list[float]] | None = Field(
        description="What each cell of the query (rows) has with each cell of the result "
        "(columns), both counted row by row, to four digits; null where the receipt is not exact, "
        "or where all together would be too many numbers: ask with `cell` then."
    )
    point: Cells | None = Field(
        description="What the cell asked for matches, on the other picture's grid; null where "
        "none was asked for."
    )


class Contrast(Strict):
    """Why the first result is nearer than the second: channels and remainder sum to `score`."""

    score: float = Field(
        description="Half of the rival's squared distance less the result's; behind embeddings of "
        "length 1 the difference of the similarities.",
        examples=[0.12],
    )
    exact: bool
    remainder: float = Field(
        description="What no channel accounts for; of embeddings that are not of length 1 their "
        "lengths, too, of which the shorter is nearer."
    )
    channels: list[Channel]
    other_channels: float
    query: Cells = Field(
        description="Positive where the query speaks for the result, negative for the rival."
    )


class CompareAnswer(Strict):
    """Receipts of one query, in the order asked; the rival's is the last."""

    picture: Size
    extent: Extent
    receipts: list[PairReceipt]
    contrast: Contrast | None = Field(description="null where no rival was named.")


class ItemCam(Strict):
    """An indexed image's own map."""

    id: str = Field(examples=["gulls/17.jpg"])
    label: str | None = Field(examples=["gulls"])
    cam: Cam
    norm: float = Field(ge=0, description="Length of its stored weights.", examples=[0.42])
    file: File
    picture: Size | None = Field(description="null where the picture cannot be read any more.")
    extent: Extent | None = Field(description="null where the picture cannot be read any more.")


class Example(Strict):
    """An indexed image whose picture can be searched with."""

    id: str = Field(examples=["gulls/17.jpg"])
    label: str | None = Field(examples=["gulls"])
    image_url: str = Field(examples=["/items/gulls/17.jpg/image"])
    cam_url: str = Field(examples=["/items/gulls/17.jpg/cam"])


class ExamplesAnswer(Strict):
    """A few indexed images."""

    items: list[Example]


class Health(Strict):
    """Whether the process answers."""

    status: str = Field(examples=["ok"])


class Readiness(Strict):
    """Whether pictures can be explained, and what of."""

    status: str = Field(examples=["ready"])
    images: int = Field(ge=0, description="In the index.", examples=[5000])
    generation: int = Field(ge=0, description="Of the index; rises when it changes.", examples=[1])


class Problem(Strict):
    """What went wrong."""

    code: str = Field(description="For programs.", examples=["too_many_pixels"])
    message: str = Field(
        description="For people: one sentence.",
        examples=["the picture has more than 25000000 pixels, which is the limit; send another"],
    )


class ErrorAnswer(Strict):
    """What every refusal looks like."""

    error: Problem


_WHEN = {
    400: "The request is broken.",
    403: "The Host header names another machine.",
    404: "No image of this id, no picture of it, or no such cell.",
    406: "None of the types asked for is on offer.",
    408: "The body arrived too slowly.",
    409: "The picture of an image has changed since it was indexed.",
    413: "The body, or the picture in it, is too large.",
    415: "The body is of a type that holds no picture.",
    422: "A parameter or a picture that cannot be used.",
    500: "The service failed.",
    501: "The network is an ONNX file, of whose pairs there are no receipts.",
    503: "Too many requests at once, or too slow an answer; `Retry-After` says when to retry.",
}


def route(
    summary: str,
    answer: type[Strict] | None,
    *statuses: int,
    parameters: type[BaseModel] | None = None,
    drawn: Sequence[str] = (),
    said: str = "Successful Response",
    **more: Any,
) -> dict[str, Any]:
    """Return how FastAPI describes a route that writes its answer, or a picture, itself.

    `statuses` are its HTTP errors; query parameters are those of `parameters` and no others.
    """
    described: dict[str, Any] = {"description": said}
    if answer is not None:
        described["model"] = answer
    if drawn:
        described["content"] = {kind: BINARY for kind in drawn}
    errors = {one: {"model": ErrorAnswer, "description": _WHEN[one]} for one in sorted(statuses)}
    return {
        "summary": summary,
        "response_class": Response,
        "responses": {200: described, **errors},
        "dependencies": [] if parameters is None else [Depends(only(parameters))],
        **more,
    }


def built(model: type[M], values: Mapping[str, Any], **more: Any) -> M:
    """Return a model of more, and of those values that it has a field for."""
    kept = {name: values[name] for name in model.model_fields if name in values}
    return model(**{**kept, **more})


def written(answer: Strict) -> bytes:
    """Return an answer as JSON, without fields that were not set."""
    return answer.model_dump_json(exclude_unset=True).encode()


def size_of(size: tuple[int, int]) -> Size:
    """Return (width, height) as JSON has it."""
    return Size(width=size[0], height=size[1])


def shown_box(size: tuple[int, int], extent: Sequence[float]) -> dict[str, Any]:
    """Return a picture's (width, height) and the crop box in it, as answers have them."""
    return {"picture": size_of(size), "extent": list(extent)}


def urls_of(prefix: str, name: str) -> dict[str, str]:
    """Return where an image's picture and map lie, below a path that a proxy serves us under."""
    # Browsers resolve "." and "..", and proxies merge empty parts: such ids keep no slash.
    odd = any(part in ("", ".", "..") for part in name.split("/"))
    path = f"{prefix}/items/{quote(name, safe='' if odd else '/', errors='replace')}"
    return {"image_url": f"{path}/image", "cam_url": f"{path}/cam"}
