"""Receipts: the sides that a request's pictures make, and what comes back of them as JSON."""

from collections.abc import Sequence

import numpy as np
from fastapi import Request

from ..errors import EmbedcamError, InputError
from ..explain.explainer import Explainer
from ..explain.sides import Side
from ..index import Index
from ..pairs import NOTHING_KNOWN, Known, PairExplainer, Receipt, TextReceipt
from . import schemas
from .errors import HTTPProblem
from .pictures import Prepared, prepare
from .pipeline import Pipeline, logger

MAX_PAIRS = 250_000
"""Numbers of all `pairs` of an answer together, about 2 MB: a hundred receipts on maps of 7 x 7, or
six of 14 x 14."""


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
                raise changed()  # no stored embedding is that picture's, so none would tell
            return prepare(explainer.picture(name), self._pipeline.preprocess, side)
        except EmbedcamError as error:
            logger.warning("an indexed image cannot be read: %s", error)
        said = "the picture of a result cannot be read any more, and a receipt needs it"
        raise HTTPProblem(404, "no_picture", f"{said}; leave it out")


class Told:
    """The receipts of one answer as JSON, with their `pairs` while there is room."""

    def __init__(self, request: Request, lines: int, links: int) -> None:
        self.receipts: list[schemas.PairReceipt] = []
        self._request, self._lines, self._links, self._left = request, lines, links, MAX_PAIRS

    def add(self, picture: Prepared, receipt: Receipt, point: list[list[float]] | None) -> None:
        """Write a receipt of an indexed picture, and what the point asked about matches there."""
        n_pairs = receipt.query.cells.size * receipt.result.cells.size
        fits = all(one.direct for one in receipt.sides) and n_pairs <= self._left
        self._left -= n_pairs * fits
        shown = receipt.to_dict(self._lines, self._links)
        pairs = receipt.matrix().reshape(receipt.query.cells.size, -1) if fits else None
        self.receipts.append(
            schemas.built(
                schemas.PairReceipt,
                {**shown["result"], **shown, **schemas.lines_of(self._request, shown)},
                picture=schemas.size_of(picture.size),
                extent=picture.extent,
                query=schemas.built(schemas.Evidence, shown["query"]),
                result=schemas.built(schemas.Evidence, shown["result"]),
                pairs=None if pairs is None else four_digits(pairs),
                point=point,
            )
        )


def told_of_receipt(
    request: Request, picture: Prepared, receipt: TextReceipt, lines: int
) -> schemas.WordsReceipt:
    """Return the receipt of words and an indexed picture as JSON."""
    shown = receipt.to_dict(lines)
    side = {name: shown["picture"].pop(name) for name in ("id", "label", "cells", "remainder")}
    size = {"picture": schemas.size_of(picture.size), "extent": picture.extent}
    values = {**shown, **side, **size, **schemas.lines_of(request, shown)}
    return schemas.built(schemas.WordsReceipt, values)


def four_digits(values: np.ndarray) -> list[list[float]]:
    """Return the numbers to four significant digits (whole ones from 1000 on), as lists."""
    values = np.asarray(values, np.float64)
    # Powers of ten are exact up to 22, so that the quotient is the number those digits name.
    digits = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros(values.shape)))
    powers = 10.0 ** np.clip(3 - digits, 0, 22)
    numbers: list[list[float]] = (np.rint(values * powers) / powers + 0.0).tolist()
    return numbers


def changed() -> HTTPProblem:
    """Return the error for a picture that is another than was indexed."""
    said = "the picture of a result has changed since it was indexed"
    return HTTPProblem(409, "changed_picture", f"{said}; index it again, or leave it out")
