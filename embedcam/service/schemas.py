"""The JSON of the service: answers are built as these models, which OpenAPI describes."""

import hashlib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import Depends, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..index.records import Json
from .errors import only
from .pictures import JSON, encoded

M = TypeVar("M", bound="Strict")
Described = dict[str, Any]
"""A part of an OpenAPI document, or what FastAPI takes to write one."""
BINARY = {"schema": {"type": "string", "format": "binary"}}


def _says(description: str, *examples: str | float | list[str]) -> Any:
    return Field(description=description, examples=list(examples) or None)


class Strict(BaseModel):
    """A part of an answer: no other fields, and no NaN, which is no JSON."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Rows = list[list[float]]
Count = Annotated[int, Field(ge=0)]
Length = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Cam = Annotated[
    list[list[Length]],
    _says("A map, row by row from the top; larger is more evidence, 0 is none."),
]
Extent = Annotated[
    list[float],
    Field(min_length=4, max_length=4),
    _says(
        "What the map covers, [x0, y0, x1, y1] in pixels of the upright picture. It may reach "
        "beyond it, where the network was shown padding."
    ),
]
File = Annotated[
    Literal["same", "changed", "missing"] | None,
    _says(
        "What became of the picture's file since it was indexed; null where the index keeps no "
        "mark of it. A changed picture is not the one that the map was made of.",
        "same",
    ),
]
Cells = Annotated[
    Rows, _says("Row by row from the top, on the layer's grid; positive speaks for it.")
]
Cell = Annotated[list[int], Field(min_length=2, max_length=2), _says("[row, column]")]
Sentence = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"\S")]
ImageUrl = Annotated[str, Field(examples=["/items/gulls/17.jpg/image"])]
CamUrl = Annotated[str, Field(examples=["/items/gulls/17.jpg/cam"])]


class Size(Strict):
    """A picture's size in pixels, upright."""

    width: int = Field(ge=1, examples=[640])
    height: int = Field(ge=1, examples=[480])


class Indexed(Strict):
    """An image of the index."""

    id: str = Field(examples=["gulls/17.jpg"])
    label: str | None = Field(examples=["gulls"])


class Match(Indexed):
    """An image of the index that came back."""

    distance: float = _says("Squared Euclidean: smaller is nearer.", 0.31)
    similarity: float = _says("Inner product: larger is nearer.", 0.845)
    image_url: ImageUrl
    cam_url: CamUrl


class Neighbor(Match):
    """An image that came back, with its own map from the index."""

    file: File
    cam: Cam | None = _says("Its own map, on the layer's grid; null where the index keeps none.")
    norm: Length | None = _says(
        "Length of its stored weights. Divide maps by it before they share a colour scale.", 0.42
    )


class TextQuery(Strict):
    """Words to search with, in place of a picture."""

    text: Sentence = _says("What to look for.", "a red car")
    above: Sentence | SkipJsonSchema[None] = Field(
        default=None,
        description="Other words: which places speak for the text, and which for these?",
        examples=["a blue car"],
    )


class WordsFound(Strict):
    """The images nearest to words, nearest first."""

    text: str
    neighbors: list[Match]


class Answering(Match):
    """An image that words found, and where it answers them."""

    file: File
    rival_similarity: float | None = _says("With `above`: the same with those words.", 0.2)
    picture: Size | None = _says("null where the picture cannot be read any more.")
    extent: Extent | None = _says("null where the picture cannot be read any more.")
    cam: Cam | None = _says("Where it answers; null where the picture cannot be read any more.")
    signed_cam: Rows | SkipJsonSchema[None] = Field(
        default=None,
        description="With `signed=true` or `above`: the map before its ReLU; negative where the "
        "picture speaks against the text, or for the words it is held against.",
    )


class WordsExplained(Strict):
    """The images nearest to words, and where each answers them."""

    text: str
    above: str | None
    centred: bool = _says(
        "What any words find in any picture was taken out; false where the index keeps no mean "
        "embedding of texts."
    )
    exact: bool = _says("Maps are exact: behind average pooling and an affine head all adds up.")
    neighbors: list[Answering]


class WordsOnPicture(Strict):
    """Where the picture that was sent answers words."""

    text: str
    above: str | None
    centred: bool = _says("As where words find pictures.")
    exact: bool = _says("As where words find pictures.")
    similarity: float = _says("Inner product with the text's embedding.", 0.24)
    rival_similarity: float | None = _says("With `above`: the same with those words.", 0.2)
    picture: Size
    extent: Extent
    cam: Cam
    signed_cam: Rows | SkipJsonSchema[None] = Field(
        default=None, description="With `signed=true` or `above`: the map before its ReLU."
    )


class SearchAnswer(Strict):
    """The nearest images, nearest first."""

    picture: Size
    neighbors: list[Match]


class ExplainAnswer(Strict):
    """The nearest images, and where in the query the reason is."""

    picture: Size
    cam: Cam
    signed_cam: Rows | SkipJsonSchema[None] = Field(
        default=None,
        description="With `signed=true`: the map before its ReLU, of the size of `cam`; negative "
        "where the picture speaks against the results.",
    )
    extent: Extent
    empty: bool = _says("Nothing in the query speaks for these results.")
    why_empty: str | None = _says("Why the map is empty, for people; null where it is not.")
    transfer: str = _says("How neighbours count.", "mean")
    match: Share | None = _says(
        "Probability that the first result is of the query's kind, whatever the map shows; null "
        "where the index holds no calibration.",
        0.93,
    )
    trust: Share | None = _says(
        "Expected correlation with a directly computed map; null where the index holds no "
        "calibration, and where a rival was named.",
        0.81,
    )
    trust_low: Share | None = _says("Correlation that nine in ten such maps reach.", 0.64)
    trusted: bool | None = _says(
        "Whether the map can be relied on: trust_low reaches the limit, or direct."
    )
    direct: bool = _says("The weights were computed on the query itself.")
    explained: list[str] = _says("Ids of the images whose weights drew the map.", ["gulls/17.jpg"])
    result: Neighbor | None = _says(
        "The one image that was asked for, which may be no neighbour; null where none was."
    )
    rival: Neighbor | None = _says(
        "The image that the result is told from: the map is drawn with the difference of their "
        "stored weights, each of length 1; null where none was named."
    )
    neighbors: list[Neighbor]


_PARTS = _says('What is neither of a cell nor of a channel, such as "the MLP", by name.')


class Evidence(Strict):
    """What one picture gives to a score: `cells`, `parts`, `shared` and `remainder` sum to it."""

    cells: Cells
    parts: dict[str, float] = _PARTS
    shared: float = _says("What the average image of the index has too.")
    outside: float = _says("What lies outside of the box that was asked about.")
    remainder: float = _says("What no cell or channel accounts for.")


_EXEMPLARS = _says("Where it answers most, best first; none where the index keeps none.")


class ExemplarOf(Strict):
    """An indexed image and the cell of it where a channel or concept answers most."""

    id: str
    row: Count
    column: Count
    value: float
    crop_url: str = _says("The cell and those around it.")


class Channel(Strict):
    """A channel of the network's layer, and what it gives."""

    channel: int = Field(ge=0, examples=[417])
    contribution: float = Field(examples=[0.031])
    exemplars: list[ExemplarOf] = _EXEMPLARS


class Concept(Strict):
    """A part that the layer's activations are made of, and what it gives."""

    concept: int = Field(ge=0, examples=[3])
    name: str = _says('What people call it, else "".')
    contribution: float = Field(examples=[0.031])
    exemplars: list[ExemplarOf] = _EXEMPLARS


class Region(Strict):
    """Cells of a picture that are joined."""

    box: tuple[float, float, float, float] = _says(
        "What encloses them: x0, y0, x1, y1 as shares of what the network saw of the picture."
    )
    cells: list[Cell]


class PlacePair(Strict):
    """A region of the query and one of the result that match."""

    query: Region
    result: Region
    contribution: float = Field(examples=[0.062])
    share: float | None = _says(
        "Of what the two have beyond `shared` and `remainder`, cells and parts; null where that is "
        "next to none.",
        0.31,
    )


class CellLink(Strict):
    """Two cells that match."""

    query: Cell
    result: Cell
    contribution: float


class PairReceipt(Indexed):
    """Why the query and one result match: `shared`, channels, parts and `remainder` sum to it."""

    picture: Size
    extent: Extent
    similarity: float = _says(
        "Inner product of the embeddings of both pictures; of a prototype, with the picture in "
        "its middle.",
        0.845,
    )
    exact: bool = _says(
        "Contributions are exact; otherwise of first order, and `remainder` holds what is not."
    )
    held: list[str] = _says("What was held at its values so that all adds up, in words.")
    centred: bool = _says("What both share with the average image was put apart.")
    shared: float = _says("What both share with the average image of the index.")
    remainder: float = _says("What no channel accounts for.")
    outside: float = _says("What the query gives outside of the box that was asked about.")
    places: list[PlacePair] = _says(
        "The pairs of regions that match and give most, most first. A region takes at most 15% of "
        "its picture, all together at most 40%."
    )
    channels: list[Channel] = _says("Those that give most, largest first.")
    other_channels: float = _says("What all the others give together.")
    concepts: list[Concept] = _says("Those that give most, largest first; none without concepts.")
    other_concepts: float = _says("What all the other concepts give together.")
    no_concept: float = _says("What no concept explains.")
    parts: dict[str, float] = _PARTS
    query: Evidence
    result: Evidence
    links: list[CellLink] = _says("The cells that match best.")
    pairs: Rows | None = _says(
        "What each cell of the query (rows) has with each cell of the result (columns), both "
        "counted row by row, to four digits; null where each takes a pass of the head, or where "
        "all together would be too many numbers: ask with `cell` then."
    )
    point: Cells | None = _says(
        "What the cell asked for matches, on the other picture's grid; null where none was asked "
        "for."
    )


class Contrast(Strict):
    """Why the first result is nearer than the second: channels, parts, remainder sum to `score`."""

    score: float = _says(
        "Half of the rival's squared distance less the result's; behind embeddings of length 1 the "
        "difference of the similarities.",
        0.12,
    )
    exact: bool
    remainder: float = _says(
        "What no channel accounts for; of embeddings that are not of length 1 their lengths, too, "
        "of which the shorter is nearer."
    )
    channels: list[Channel]
    other_channels: float
    concepts: list[Concept]
    other_concepts: float
    no_concept: float
    parts: dict[str, float] = _PARTS
    query: Cells = _says("Positive where the query speaks for the result, negative for the rival.")


class CompareAnswer(Strict):
    """Receipts of one query, in the order asked; the rival's is the last."""

    picture: Size
    extent: Extent
    receipts: list[PairReceipt]
    contrast: Contrast | None = _says("null where no rival was named.")


class WordsReceipt(Indexed):
    """Why words and an image match: `shared`, channels, parts and `remainder` sum to `score`."""

    picture: Size
    extent: Extent
    score: float = _says(
        "Inner product with the text's embedding; with `above` less that with those words.", 0.24
    )
    exact: bool
    held: list[str]
    centred: bool = _says("What the image shares with the average text was put apart.")
    shared: float = _says("What the image shares with the average text; 0 with `above`.")
    remainder: float = _says("What no channel accounts for.")
    channels: list[Channel]
    other_channels: float
    concepts: list[Concept]
    other_concepts: float
    no_concept: float
    parts: dict[str, float] = _PARTS
    cells: Cells


class WordsCompared(Strict):
    """Receipts of words with images, in the order asked."""

    text: str
    above: str | None
    receipts: list[WordsReceipt]


class ItemCam(Indexed):
    """An indexed image's own map."""

    cam: Cam
    norm: Length = _says("Length of its stored weights.", 0.42)
    file: File
    picture: Size | None = _says("null where the picture cannot be read any more.")
    extent: Extent | None = _says("null where the picture cannot be read any more.")


class Example(Indexed):
    """An indexed image whose picture can be searched with."""

    image_url: ImageUrl
    cam_url: CamUrl


class ExamplesAnswer(Strict):
    """A few indexed images."""

    items: list[Example]


class Health(Strict):
    """Whether the process answers."""

    status: str = Field(examples=["ok"])


class Readiness(Strict):
    """Whether pictures can be explained, and what of."""

    status: str = Field(examples=["ready"])
    words: bool = _says("Whether a query may be words: the network embeds texts, too.")
    images: Count | None = _says(
        "In the index, or in the store, counted within the last minute; null where a store does "
        "not say.",
        5000,
    )
    generation: Count = _says("Of the index; rises when it changes.", 1)
    digest: str = _says(
        "Of what rows of a store are read by: the generation that these name.", "3f9a0c52b1e47d68"
    )


class Problem(Strict):
    """What went wrong."""

    code: str = _says("For programs.", "too_many_pixels")
    message: str = _says(
        "For people: one sentence.",
        "the picture has more than 25000000 pixels, which is the limit; send another",
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
    501: "The network is an ONNX file, of which there are no receipts, or it embeds no words.",
    502: "The store of the images answered with what cannot be read.",
    503: "Too many requests at once, too slow an answer, or a store of images that cannot be asked "
    "now; `Retry-After` says when to retry.",
}


def route(
    summary: str,
    answer: type[Strict] | UnionType | None,
    *statuses: int,
    parameters: type[BaseModel] | None = None,
    drawn: Sequence[str] = (),
    said: str = "Successful Response",
    body: Described | None = None,
) -> Described:
    """Describe a route with HTTP errors of these `statuses` and no query parameters but these."""
    good: Described = {"description": said}
    if answer is not None:
        good["model"] = answer
    if drawn:
        good["content"] = dict.fromkeys(drawn, BINARY)
    errors = {one: {"model": ErrorAnswer, "description": _WHEN[one]} for one in sorted(statuses)}
    return {
        "summary": summary,
        "response_class": Response,
        "responses": {200: good, **errors},
        "dependencies": [] if parameters is None else [Depends(only(parameters))],
        "openapi_extra": body,
    }


def built(model: type[M], values: Mapping[str, Any], **more: Any) -> M:
    """Return a model of more, and of those values that it has a field for."""
    kept = {name: values[name] for name in model.model_fields if name in values}
    return model(**{**kept, **more})


def response(
    answer: Strict | Image.Image, kind: str = JSON, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer as JSON, without fields that were not set, or a picture as a file."""
    if isinstance(answer, Strict):
        return Response(answer.model_dump_json(exclude_unset=True), 200, headers, kind)
    return Response(encoded(answer, kind), 200, headers, kind)


def tag_of(content: bytes) -> str:
    """Return an ETag."""
    return f'"{hashlib.sha256(content).hexdigest()[:24]}"'


def is_known(request: Request, tag: str) -> bool:
    """Return whether the client has already what the tag is of."""
    known = request.headers.get("if-none-match", "").strip()
    return tag in known or known == "*"


def size_of(size: tuple[int, int]) -> Size:
    """Return (width, height) as JSON has it."""
    return Size(width=size[0], height=size[1])


def lines_of(request: Request, shown: Json) -> Json:
    """Return a receipt's channels and concepts, each exemplar with where its cell can be seen."""

    def seen(lines: Sequence[Json]) -> list[Json]:
        return [{**line, "exemplars": [*map(placed, line.get("exemplars", ()))]} for line in lines]

    def placed(one: Json) -> Json:
        image = urls_of(request, one["id"])["image_url"]
        return {**one, "crop_url": f"{image}?cell={one['row']},{one['column']}"}

    channels = shown["channels"]
    kept = shown.get("channel_exemplars", [()] * len(channels))
    lines = [{**line, "exemplars": some} for line, some in zip(channels, kept, strict=True)]
    return {
        "channels": seen(lines),
        "concepts": seen(shown.get("concepts", ())),
        "other_concepts": shown.get("other_concepts", 0.0),
        "no_concept": shown.get("no_concept", 0.0),
    }


def urls_of(request: Request, name: str) -> dict[str, str]:
    """Return where an image's picture and map lie, below a path that a proxy serves us under."""
    # Browsers resolve "." and "..", and proxies merge empty parts: such ids keep no slash.
    odd = any(part in ("", ".", "..") for part in name.split("/"))
    path = f"/items/{quote(name, safe='' if odd else '/', errors='replace')}"
    prefix = request.scope.get("root_path", "")
    return {"image_url": f"{prefix}{path}/image", "cam_url": f"{prefix}{path}/cam"}
