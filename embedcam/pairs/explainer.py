"""Receipts of queries against the images of an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ImageError, InputError
from ..queries import stacked
from .receipt import Comparison, Receipt, Shown, make_comparison, make_receipt
from .sides import DifferentiatedSide, PooledSide, Side

if TYPE_CHECKING:
    from ..explain import Explainer

_SAME = 0.99
"""Cosine with the stored embedding from which a picture counts as the one that was indexed."""


class PairExplainer:
    """Explains pairs: a query and one of its results, or two results of one query.

    The pictures of both are forwarded together. Behind average pooling and an affine head a receipt
    is exact and needs no gradient; behind another head each picture is one head pass.

    Args:
        explainer: with its network; its index says where the results' pictures lie.

    Raises:
        InputError: the explainer has no network.
    """

    def __init__(self, explainer: Explainer) -> None:
        if explainer.network is None:
            raise InputError(
                "receipts need the activations of both pictures, and this Explainer has no "
                "network; give it one: Explainer(index, network)"
            )
        self.explainer, self.network = explainer, explainer.network

    def receipt(self, query: Any, result: Any, *, centred: bool = True) -> Receipt:
        """Why the query and one result match.

        Args:
            query: a picture or the network's input, as `Explainer.explain` takes it.
            result: id of an image of the index (a `str`), or a picture as the query.
            centred: put what the average image of the index shares apart.

        Raises:
            ImageError: a picture that cannot be read, or is not the one that was indexed.
            InputError: an unknown or removed id.
        """
        return self.receipts(query, [result], centred=centred)[0]

    def receipts(
        self, query: Any, results: Sequence[Any], *, centred: bool = True
    ) -> list[Receipt]:
        """The receipts of one query with several results; arguments as for `receipt`."""
        if isinstance(results, str | bytes | Path):
            raise InputError("expected a list of results, got one; use receipt()")
        given = [self._given(query), *(self._given(result, True) for result in results)]
        sides = self.sides([inputs for _, inputs in given])
        mean = np.asarray(self.explainer.index.fitted("embedding_mean"), np.float64)
        found = []
        for result, (shown, _), side in zip(results, given[1:], sides[1:], strict=True):
            if isinstance(result, str):
                self.check_same(result, side)
            made = make_receipt(
                sides[0], side, mean, centred=centred, query_shown=given[0][0], result_shown=shown
            )
            found.append(made)
        return found

    def above(self, query: Any, result: Any, rival: Any, *, centred: bool = True) -> Comparison:
        """Why the result came above the rival; arguments as for `receipt`.

        Raises:
            as `receipt`; InputError: both are the same image.
        """
        if isinstance(result, str) and result == rival:
            raise InputError(f"the result and its rival are both {result!r}; name two images")
        first, second = self.receipts(query, [result, rival], centred=centred)
        return make_comparison(first.sides[0], first, second, self.explainer.index.metric)

    def sides(self, inputs: Sequence[Any]) -> list[Side]:
        """What receipts are made of, by `make_receipt`: pictures, forwarded.

        Args:
            inputs: the network's, `[3 H W]` each; those of one size are forwarded together.
        """
        kind = self.network.head_kind
        if not kind.affine:
            return [self._differentiated(one) for one in inputs]
        matrix = None if kind.identity else kind.matrix
        found: dict[int, Side] = {}
        shapes = {tuple(one.shape) for one in inputs}
        for shape in shapes:
            places = [place for place, one in enumerate(inputs) if tuple(one.shape) == shape]
            features = self.network.forward(stacked([inputs[place] for place in places]))
            embeddings, maps, norms = (
                np.asarray(values)
                for values in (features.embedding, features.activations, features.norm)
            )
            for row, place in enumerate(places):
                norm = float(norms[row]) if self.network.normalize else 1.0
                found[place] = PooledSide(maps[row], embeddings[row], norm, matrix)
        return [found[place] for place in range(len(inputs))]

    def check_same(self, name: str, side: Side) -> None:
        """Refuse a picture that is another than was indexed: its receipt would be of another.

        Args:
            name: id of the image.
            side: of the picture that lies at its path now.

        Raises:
            ImageError: the embeddings differ.
        """
        index = self.explainer.index
        stored = index.embeddings([index.position(name)])[0].astype(np.float64)
        lengths = np.linalg.norm(stored) * np.linalg.norm(side.embedding)
        cosine = float(stored @ side.embedding / lengths) if lengths > 0 else 1.0
        if cosine < _SAME:
            raise ImageError(
                f"{name}: the picture has changed since it was indexed (its embedding has a cosine "
                f"of {cosine:.3f} with the stored one); index it again"
            )

    def _given(self, image: Any, by_id: bool = False) -> tuple[Shown, Any]:
        """How a picture is drawn, and the network's input `[3 H W]`."""
        name, label = "", None
        if by_id and isinstance(image, str):
            index = self.explainer.index
            name, label = image, index.labels[index.position(image)]
            image = self.explainer.picture(image)
        picture, inputs = self.explainer.prepared(image)
        extent = None
        if picture is not None and self.explainer.preprocess is not None:
            extent = self.explainer.preprocess.extent(*picture.size)
        return Shown(picture, extent, name, label), inputs

    def _differentiated(self, inputs: Any) -> Side:
        return DifferentiatedSide(
            self.network.head_pass(stacked([inputs]), twice=True), self.network.normalize
        )
