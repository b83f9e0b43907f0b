"""Receipts of queries against the images of an index."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_array, check_outputs, stacked
from ..errors import EmbeddingError, ImageError, InputError
from ..explain.queries import query_name
from .receipt import Comparison, Receipt, make_comparison, make_receipt
from .sides import HeldSide, PooledSide, Shown, Side, matrix_of

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..explain.queries import Inputs, QueryLike
    from ..index import Index
    from ..preprocess import HeadMatrix

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

    Raises
    ------
    InputError
        The explainer has no network, or one in an ONNX file whose head is not known.
    """

    def __init__(self, explainer: Explainer) -> None:
        if explainer.network is None:
            raise InputError(
                "receipts need the activations of both pictures, and this Explainer has no "
                "network; give it one: Explainer(index, network)"
            )
        self.explainer = explainer
        self.network: Any = explainer.network
        self._head: tuple[weakref.ref[Index], HeadMatrix | None] | None = None
        if not self.network.differentiable:
            self.head(explainer.index)

    def receipt(self, query: QueryLike, result: QueryLike, *, centred: bool = True) -> Receipt:
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

        Raises
        ------
        ImageError, InputError
            A picture that cannot be read or is not the one indexed; an unknown or removed id.
        """
        return self.receipts(query, [result], centred=centred)[0]

    def receipts(
        self, query: QueryLike, results: Sequence[QueryLike], *, centred: bool = True
    ) -> list[Receipt]:
        """Return the receipts of one query with several results; arguments as for `receipt`."""
        if isinstance(results, str | bytes | Path):
            raise InputError("expected a list of results, got one; use receipt()")
        index = self.explainer.index
        of = self.explainer.of_ids([one for one in results if isinstance(one, str)])
        opened = [self._open(query), *(self._open(result, of) for result in results)]
        try:
            ours, *theirs = self.sides(index, [inputs for _, inputs in opened])
        except EmbeddingError as error:
            names = [query_name(one, row) for row, one in enumerate([query, *results])]
            raise error.named(names) from None
        mean = mean_of(index, centred)
        for result, side in zip(results, theirs, strict=True):
            if isinstance(result, str):
                check_same(of.index, result, side)
        shown = [picture for picture, _ in opened]
        return [
            make_receipt(
                ours, side, mean, centred=centred, query_shown=shown[0], result_shown=picture
            )
            for side, picture in zip(theirs, shown[1:], strict=True)
        ]

    def above(
        self, query: QueryLike, result: QueryLike, rival: QueryLike, *, centred: bool = True
    ) -> Comparison:
        """Return why the result came above the rival; arguments and errors as for `receipt`."""
        if isinstance(result, str) and result == rival:
            raise InputError(f"the result and its rival are both {result!r}; name two images")
        first, second = self.receipts(query, [result, rival], centred=centred)
        return make_comparison(first.sides[0], first, second, self.explainer.index.metric)

    def head(self, index: Index) -> HeadMatrix | None:
        """Return the head by an index of the explainer; None where it is not pooled and affine."""
        known = self._head
        if known is None or known[0]() is not index:  # Another version may keep it otherwise.
            head = self.network.affine_head(lambda: matrix_of(index))
            known = self._head = (weakref.ref(index), head)
        return known[1]

    def sides(self, index: Index, inputs: Sequence[Inputs]) -> list[Side]:
        """Return what receipts are made of, of inputs `[3 H W]`; those of one size go together."""
        head, sides = self.head(index), dict[int, Side]()
        together: dict[object, list[int]] = {}
        for place, one in enumerate(inputs):
            together.setdefault(place if head is None else tuple(one.shape), []).append(place)
        for places in together.values():
            try:
                made = self._of_batch(head, stacked([inputs[place] for place in places]))
            except EmbeddingError as error:
                error.rows = [places[row] for row in error.rows]
                raise
            sides.update(zip(places, made, strict=True))
        return [sides[place] for place in range(len(inputs))]

    def _of_batch(self, head: HeadMatrix | None, batch: Inputs) -> list[Side]:
        if head is None:
            passed = self.network.held_pass(batch)
            features = passed.features
            check_outputs(as_array(features.embedding), as_array(features.activations))
            return [HeldSide(passed, self.network.normalize)]
        embeddings, norms, (maps,) = self.network.embed(batch)
        check_outputs(embeddings, maps)
        if not self.network.normalize:
            norms = np.ones(len(maps))
        elif norms is None:
            norms = [head.norm(one) for one in maps]
        return [
            PooledSide(one, embedding, float(norm), head.matrix)
            for one, embedding, norm in zip(maps, embeddings, norms, strict=True)
        ]

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
