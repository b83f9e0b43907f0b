"""Receipts of queries against the images of an index."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import EmbedcamError, EmbeddingError, ImageError, InputError
from ..explain.queries import query_name
from ..explain.side_maker import SideMaker
from ..explain.sides import Shown, Side
from ..explain.texts import Texts, words_of
from ..index.concepts import Concepts, Exemplar, read_names
from ..index.in_memory import index_of_rows, listed
from ..render import window
from .lines import N_EXEMPLARS, Kind, Known
from .places import covered
from .receipt import Comparison, Receipt, keep_exemplars, make_comparison, make_receipt
from .texts import TextReceipt, make_text_receipt

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..explain.queries import Inputs, QueryLike
    from ..index import Index

_SAME = 0.99
"""Cosine with the stored embedding from which a picture counts as the one that was indexed."""


class PairExplainer:
    """Explains pairs: a query and one of its results, or two results of one query.

    Behind average pooling and an affine head a receipt is exact and needs neither a gradient nor
    torch; behind another head each picture is one head pass.

    Parameters
    ----------
    explainer
        With its network; its index says where the results' pictures lie.
    concept_names
        What a user calls concepts of the index: a TOML file (`concepts.read_names`), or names by
        number.

    Raises
    ------
    InputError
        The explainer has no network, or one in an ONNX file whose head is not known; names of
        concepts that the index does not have.
    """

    def __init__(
        self, explainer: Explainer, *, concept_names: str | Path | Mapping[int, str] | None = None
    ) -> None:
        if explainer.network is None:
            raise InputError(
                "receipts need the activations of both pictures, and this Explainer has no "
                "network; give it one: Explainer(index, network)"
            )
        self.explainer, self.maker = explainer, SideMaker(explainer.network)
        if not explainer.network.differentiable:
            self.maker.head(explainer.index)
        given = concept_names or {}
        self._names = given if isinstance(given, Mapping) else read_names(given)
        self._concepts: tuple[weakref.ref[Index], Concepts | None] | None = None
        self.known(explainer.index)

    def known(self, index: Index) -> Known:
        """Return what an index of the explainer says of channels and concepts."""
        if self._concepts is None or self._concepts[0]() is not index:
            self._concepts = weakref.ref(index), named_concepts(index, self._names)
        # Of this index: the explainer may move on to another version.
        find, crop = partial(self._exemplars, index), partial(self._crop, index)
        return Known(self._concepts[1], find, crop)

    def _exemplars(self, index: Index, kind: Kind, numbers: Sequence[int]) -> list[list[Exemplar]]:
        there = None
        if self.explainer.store is not None:  # it knows which pictures are still there
            names = (index.exemplar_ids(kind, number) for number in numbers)
            asked = [*dict.fromkeys(chain.from_iterable(names))]
            rows = listed(self.explainer.store.fetch(asked)) if asked else []
            if not rows:
                return [[] for _ in numbers]
            there = index_of_rows(index, rows)
        return [index.exemplars(kind, number, N_EXEMPLARS, among=there) for number in numbers]

    def _crop(self, index: Index, exemplar: Exemplar) -> Image.Image | None:
        grid, preprocess = index.manifest.layers[0].grid, self.explainer.preprocess
        if grid is None or preprocess is None:
            return None
        try:
            picture = self.explainer.of_ids([exemplar.id]).picture(exemplar.id)
        except EmbedcamError:  # moved, or replaced by what is none: the line does without
            return None
        return window(picture, preprocess.extent(*picture.size), grid, exemplar[1:3])

    def receipt(
        self,
        query: QueryLike,
        result: QueryLike,
        *,
        centred: bool = True,
        box: Sequence[float] | None = None,
    ) -> Receipt:
        """Return why the query and one result match.

        Of an index of prototypes the result is the picture in the prototype's middle, and the
        similarity is that picture's.

        Parameters
        ----------
        query
            A picture or the network's input, as `Explainer.explain` takes it.
        result
            Id of an image of the index (a `str`), or a picture as the query.
        centred
            Put what the average image of the index shares apart.
        box
            (x0, y0, x1, y1) in pixels of the query (upright, or of the network's input where that
            was given): what *that part* matches.

        Raises
        ------
        ImageError, InputError
            A picture that cannot be read or is not the one indexed; an unknown or removed id.
        """
        return self.receipts(query, [result], centred=centred, box=box)[0]

    def receipts(
        self,
        query: QueryLike,
        results: Sequence[QueryLike],
        *,
        centred: bool = True,
        box: Sequence[float] | None = None,
    ) -> list[Receipt]:
        """Return the receipts of one query with several results; arguments as for `receipt`."""
        if isinstance(results, str | bytes | Path):
            raise InputError("expected a list of results, got one; use receipt()")
        index = self.explainer.index
        of = self.explainer.of_ids([one for one in results if isinstance(one, str)])
        opened = [self._open(query), *(self._open(result, of) for result in results)]
        try:
            ours, *theirs = self.maker.sides(index, [inputs for _, inputs in opened])
        except EmbeddingError as error:
            names = [query_name(one, row) for row, one in enumerate([query, *results])]
            raise error.named(names) from None
        mean, known = mean_of(index, centred), self.known(index)
        for result, side in zip(results, theirs, strict=True):
            if isinstance(result, str):
                check_same(of.index, result, side)
        shown, within = [picture for picture, _ in opened], None
        if box is not None:
            picture, (height, width) = shown[0].image, opened[0][1].shape[-2:]
            size = (width, height) if picture is None else picture.size
            seen = shown[0].extent or (0, 0, *size)
            within = covered(box, size, seen, ours.activations.shape[1:])
        receipts = [
            make_receipt(
                ours,
                side,
                mean,
                centred=centred,
                query_shown=shown[0],
                result_shown=picture,
                within=within,
                known=known,
            )
            for side, picture in zip(theirs, shown[1:], strict=True)
        ]
        if receipts:
            keep_exemplars(receipts)
        return receipts

    def above(
        self, query: QueryLike, result: QueryLike, rival: QueryLike, *, centred: bool = True
    ) -> Comparison:
        """Return why the result came above the rival; arguments and errors as for `receipt`."""
        if isinstance(result, str) and result == rival:
            raise InputError(f"the result and its rival are both {result!r}; name two images")
        first, second = self.receipts(query, [result, rival], centred=centred)
        why = make_comparison(first.sides[0], first, second, self.explainer.index.metric)
        keep_exemplars([why])
        return why

    def text_receipt(
        self,
        text: str,
        picture: QueryLike,
        *,
        texts: Texts | None = None,
        above: str | None = None,
    ) -> TextReceipt:
        """Return why words and one picture match, or why it answers them rather than `above`.

        Parameters
        ----------
        text, texts, above
            As `Explainer.explain_text` takes them.
        picture
            Id of an image of the index (a `str`), or a picture as the query of a `receipt`.

        Raises
        ------
        ImageError, InputError, NetworkError
            As `receipt`; words that cannot be used, or a network without a tower for texts.
        """
        of = self.explainer.of_ids([picture] if isinstance(picture, str) else [])
        snapshot = of.snapshot
        (words,) = words_of(snapshot, [text], above, texts)
        shown, inputs = self._open(picture, of)
        (side,) = self.maker.sides(snapshot.index, [inputs])
        if isinstance(picture, str):
            check_same(snapshot.index, picture, side)
        known = self.known(self.explainer.index)
        receipt = make_text_receipt(snapshot.index, words, side, shown, known)
        keep_exemplars([receipt])
        return receipt

    def _open(self, image: QueryLike, of: Explainer | None = None) -> tuple[Shown, Inputs]:
        """Return how a picture is drawn, and the input `[3 H W]`; a text names an image `of`."""
        name, label = "", None
        if of is not None and isinstance(image, str):
            index = of.index
            name, label = image, index.labels[index.position(image)]
            if index.manifest.is_compressed and of.file_state(image) == "changed":
                raise ImageError(
                    f"{name}: the picture in the middle of this prototype was replaced since it "
                    "was indexed; index it again, and compress that"
                )
            image = of.picture(image)
        picture, inputs = self.explainer.prepared(image)
        extent = None
        if picture is not None and self.explainer.preprocess is not None:
            extent = self.explainer.preprocess.extent(*picture.size)
        return Shown(picture, extent, name, label), inputs


def named_concepts(index: Index, names: Mapping[int, str]) -> Concepts | None:
    """Return an index's concepts, if it has any, with names; InputError of names it lacks."""
    concepts = index.concepts()
    if names and concepts is None:
        raise InputError(
            f"{index.path}: has no concepts, so names of concepts mean nothing; build it again, or "
            "leave them out"
        )
    return None if concepts is None else concepts.named(names)


def mean_of(index: Index, centred: bool) -> np.ndarray:
    """Return the mean embedding that receipts put apart, `[D]`; zeros where they do not."""
    if not centred:
        return np.zeros(index.width)
    if "embedding_mean" not in index.shared():
        raise InputError(
            "this index keeps no mean embedding, so what the average image shares cannot be put "
            "apart; ask for receipts that are not centred"
        )
    return np.asarray(index.fitted("embedding_mean"), np.float64)


def check_same(index: Index, name: str, side: Side) -> None:
    """Refuse the picture of an image that is another than was indexed, by its embedding."""
    # A prototype's embedding is a mean, no picture's; rows of a store may come without.
    if index.manifest.is_compressed or not index.has_embeddings:
        return
    stored = index.embeddings([index.position(name)])[0].astype(np.float64)
    lengths = np.linalg.norm(stored) * np.linalg.norm(side.embedding)
    cosine = float(stored @ side.embedding / lengths) if lengths > 0 else 1.0
    if cosine < _SAME:
        raise ImageError(
            f"{name}: the picture has changed since it was indexed (its embedding has a cosine "
            f"of {cosine:.3f} with the stored one); index it again"
        )
