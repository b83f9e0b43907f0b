"""Words in place of a picture: read from JSON, looked up, and explained on the pictures found."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import Request
from pydantic import ValidationError

from ..errors import EmbedcamError
from ..explain.explainer import Explainer
from ..explain.explanation import rounded
from ..explain.side_maker import SideMaker, SlopeSide
from ..explain.sides import PooledSide, Side
from ..explain.text_explanation import TextExplanation, TextResult
from ..explain.texts import Answers, Words, cells_of, embedded_words, explained, explained_on
from ..images import is_url
from ..images.places import inside, stamp_of
from ..index import Index, Neighbors
from ..index.records import Json
from ..ops import area_average
from ..preprocess import Extent
from . import schemas
from .errors import HTTPProblem
from .pictures import Prepared, Upload
from .pipeline import Pipeline, logger

MOST_BODY = 1 << 16
MOST_CELLS = 256
"""Positions of a picture that are kept behind a head that is not pooled and affine, where each
costs a pass through the head; of more the head is asked anew for every text."""


def read_words(upload: Upload) -> schemas.TextQuery:
    """Return the words of a body, or raise HTTPProblem."""
    if len(upload.body) > MOST_BODY:
        said = f"words take {MOST_BODY} bytes at most; send fewer"
        raise HTTPProblem(413, "body_too_long", said)
    try:
        return schemas.TextQuery.model_validate_json(upload.body)
    except ValidationError as error:
        told = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in told["loc"])[:64] or "the body"
        said = f"{where}: {told['msg'][:1].lower()}{told['msg'][1:]}"
        raise HTTPProblem(422, "unusable_text", said[:300].replace("\n", " ")) from None


@dataclass(frozen=True)
class Kept:
    """An indexed picture: what each position gives to its embedding, `[H W D]`, and its size."""

    vectors: np.ndarray | None
    cells: Answers
    size: tuple[int, int]
    extent: Extent

    @property
    def bytes(self) -> int:
        """What it takes, about."""
        return 500 + (0 if self.vectors is None else self.vectors.nbytes)


class Shelf:
    """The pictures last asked about, of at most so many bytes together; threads may share it."""

    def __init__(self, most: int) -> None:
        self._most, self.bytes = most, 0
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable) -> Kept | None:
        """Return what is kept, as the one used last."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, kept: Kept) -> None:
        """Keep it, and let go of those used longest ago."""
        with self._lock:
            before = self._kept.pop(key, None)
            self.bytes -= 0 if before is None else before.bytes
            if kept.vectors is None or kept.bytes > self._most:
                return
            self._kept[key] = kept
            self.bytes += kept.bytes
            while self.bytes > self._most:
                self.bytes -= self._kept.popitem(last=False)[1].bytes


class WordsMaker:
    """Looks up words, and tells where the pictures found answer them."""

    def __init__(
        self,
        pipeline: Pipeline,
        read: Callable[[Explainer, str, int | None], Prepared],
    ) -> None:
        self._pipeline, self._read = pipeline, read
        self._maker, self._shelf = SideMaker(pipeline.network), Shelf(pipeline.limits.kept_bytes)

    async def find(
        self, asked: schemas.TextQuery, n_neighbors: int
    ) -> tuple[Explainer, Words, Neighbors]:
        """Return an explainer that holds the pictures nearest to words, and these."""
        self._check()
        return await self._pipeline.near_words(self._embedded, asked, n_neighbors)

    async def embedded(self, asked: schemas.TextQuery) -> Words:
        """Return the embeddings of words."""
        self._check()
        return (await self._pipeline.ask(self._embedded, None, lambda: asked))[1]

    async def explain_on(
        self, asked: schemas.TextQuery, read: Callable[[], Prepared]
    ) -> tuple[Prepared, TextExplanation]:
        """Return a picture that was sent, and where it answers words."""
        words, explainer = await self.embedded(asked), self._pipeline.explainer
        snapshot, maker = explainer.snapshot, self._maker

        def explain_each(_: None, pictures: Sequence[Prepared]) -> list[TextExplanation]:
            of = explainer, snapshot, maker, [words]
            return [explained_on(*of, one.inputs, one.small.image)[0] for one in pictures]

        return await self._pipeline.ask(explain_each, None, read)

    def _check(self) -> None:
        if self._pipeline.network.texts is None:
            said = "this service's network embeds pictures alone, so words find nothing here"
            raise HTTPProblem(501, "no_words", f"{said}; send a picture")

    def _embedded(self, _: None, asked: Sequence[schemas.TextQuery]) -> list[Words]:
        """Embed what several requests ask together. Called in the network's thread."""
        return embedded_words(self._pipeline.explainer, [(one.text, one.above) for one in asked])

    async def explain(
        self, held: Explainer, words: Words, near: Neighbors
    ) -> tuple[TextExplanation, dict[str, Kept]]:
        """Return where the pictures found answer the words, and what is kept of each."""
        index, shown = held.index, dict[str, Kept]()
        ids, missing = index.ids[near.positions], list[tuple[str, Hashable]]()
        keys = await self._pipeline.in_thread(lambda: [self._key(held, name) for name in ids])
        for name, key in zip(ids, keys, strict=True):
            kept = self._shelf.find(key)
            if kept is None:
                missing.append((name, key))
            else:
                shown[name] = kept
        for start in range(0, len(missing), self._pipeline.batch):
            part = missing[start : start + self._pipeline.batch]
            asked = (
                self._pipeline.ask(self._sides, index, partial(self._read, held, name, None))
                for name, _ in part
            )
            found = await asyncio.gather(*asked, return_exceptions=True)
            for (name, key), one in zip(part, found, strict=True):
                if isinstance(one, BaseException):
                    if not isinstance(one, HTTPProblem | EmbedcamError):
                        raise one
                    logger.warning("%s comes without a map: %s", name, one)
                else:
                    shown[name] = one[1]
                    self._shelf.put(key, one[1])
        answers = {name: kept.cells for name, kept in shown.items()}
        exact = self._maker.head(index) is not None
        snapshot, most = held.snapshot, held.max_pixels
        explain = partial(explained, snapshot, words, near, answers, exact, most)
        if all(kept.vectors is not None for kept in shown.values()):
            return await self._pipeline.in_thread(explain), shown
        # What is not kept goes through the head again.

        def explain_each(_: None, asked: Sequence[None]) -> list[TextExplanation]:
            return [explain() for _ in asked]

        return (await self._pipeline.ask(explain_each, None, lambda: None))[1], shown

    def _key(self, held: Explainer, name: str) -> Hashable:
        """Return what tells a picture from all others, and from itself before a change."""
        place, stamp = held.picture_place(name), None
        if place is not None and not is_url(place):
            within = inside(place)
            stamp = stamp_of(place if within is None else within.file)
        return held.index.manifest.manifest_sha256, name, place, stamp

    def _sides(self, index: Index, pictures: Sequence[Prepared]) -> list[Kept]:
        """Return what is kept of pictures. Called in the network's thread."""
        sides = self._maker.map_sides(index, [one.inputs for one in pictures])
        return [
            kept_of(side, one.size, one.extent) for side, one in zip(sides, pictures, strict=True)
        ]


def kept_of(side: Side | SlopeSide, size: tuple[int, int], extent: Extent) -> Kept:
    """Return what a picture's positions answer to any words, without its activations."""
    grid = side.activations.shape[1:]
    count = int(np.prod(grid))
    costly = not isinstance(side, PooledSide) and count > MOST_CELLS
    if costly or isinstance(side, SlopeSide):
        return Kept(None, partial(cells_of, side), size, extent)
    vectors = np.asarray(side.cell_vectors(range(count)), np.float32).reshape(*grid, -1)
    return Kept(vectors, lambda direction: vectors.astype(np.float64) @ direction, size, extent)


def told_of_words(
    request: Request, why: TextExplanation, kept: Mapping[str, Kept], map_size: int, signed: bool
) -> schemas.WordsExplained:
    """Return an explanation as JSON."""

    def told(one: TextResult) -> schemas.Answering:
        of = {name: value for name, value in vars(one).items() if name != "signed_cam"}
        urls, file = schemas.urls_of(request, one.id), {"file": why.state(one)}
        picture = _maps_of(why, one, kept.get(one.id), map_size, signed)
        return schemas.built(schemas.Answering, {**of, **file, **urls, **picture})

    values = {name: getattr(why, name) for name in ("text", "above", "centred", "exact")}
    return schemas.built(schemas.WordsExplained, values, neighbors=[told(o) for o in why.results])


def told_on_picture(
    why: TextExplanation, picture: Prepared, map_size: int, signed: bool
) -> schemas.WordsOnPicture:
    """Return where a picture that was sent answers words, as JSON."""
    (one,) = why.results
    scores = {name: getattr(one, name) for name in ("similarity", "rival_similarity")}
    maps = _maps_of(why, one, picture, map_size, signed)
    return schemas.built(schemas.WordsOnPicture, {**vars(why), **scores, **maps})


def _maps_of(
    why: TextExplanation, one: TextResult, of: Kept | Prepared | None, map_size: int, signed: bool
) -> Json:
    """Return the maps of a picture, none where it could not be read, and what they cover."""
    told: Json = dict.fromkeys(("picture", "extent", "cam"))
    told |= {"signed_cam": None} if signed or why.above is not None else {}
    if of is None or one.signed_cam is None or one.cam is None:
        return told
    height, width = one.signed_cam.shape
    small = (min(map_size, height), min(map_size, width))
    maps = {"cam": rounded(area_average(one.cam, small))}
    maps["signed_cam"] = rounded(area_average(one.signed_cam, small))
    told |= {name: maps[name] for name in maps if name in told}
    return told | {"picture": schemas.size_of(of.size), "extent": list(of.extent)}
