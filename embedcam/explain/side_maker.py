"""Sides made of pictures: what each position gives to an embedding, by the network's head."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_array, check_outputs, stacked
from ..errors import EmbeddingError
from ..preprocess import HeadMatrix
from .sides import HeldSide, PooledSide, Products, Side, matrix_of

if TYPE_CHECKING:
    from ..index import Index
    from ..network.gradients import HeadPass
    from ..preprocess import Network
    from .queries import Inputs


class SlopeSide:
    """A picture, and what its positions give by the head's derivative where they stand.

    To first order and all of it, attention weights too: what positions give need not add up.
    """

    def __init__(self, passed: HeadPass, normalize: bool) -> None:
        features = passed.features
        self.activations = as_array(features.activations, np.float32)[0]
        self.embedding = as_array(features.embedding)[0].astype(np.float64)
        self._norm, self._passed = float(features.norm[0]) if normalize else 1.0, passed

    def products(self, direction: np.ndarray) -> Products:
        """Return what channels `[K]` and positions `[H W]` give to f . direction."""
        slopes = as_array(self._passed.vjp((direction / self._norm)[None]))[0]
        product = slopes.astype(np.float64) * self.activations
        return product.sum((1, 2)), product.sum(0), {}


class SideMaker:
    """Makes sides of pictures by one network.

    Behind average pooling and an affine head, perhaps with a norm, all is exact and needs neither a
    gradient nor torch; behind another head each picture is one head pass.
    """

    def __init__(self, network: Network) -> None:
        self.network: Any = network
        self._head: tuple[weakref.ref[Index], HeadMatrix | None] | None = None

    def head(self, index: Index) -> HeadMatrix | None:
        """Return the head by an index of the explainer; None where it is not pooled and affine."""
        known = self._head
        if known is None or known[0]() is not index:  # Another version may keep it otherwise.
            head = self.network.affine_head(lambda: matrix_of(index))
            known = self._head = (weakref.ref(index), head)
        return known[1]

    def sides(self, index: Index, inputs: Sequence[Inputs]) -> list[Side]:
        """Return the sides of inputs `[3 H W]`; those of one size go together."""
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

    def map_sides(self, index: Index, inputs: Sequence[Inputs]) -> list[Side | SlopeSide]:
        """Return sides that maps are drawn of: those of receipts, see `sides`.

        But of a layer read inside an attention, whose positions do not make the embedding. Values
        lie in the embedding's own space (MaskCLIP) and need no derivative; others take one.
        """
        _, at, reading = str(self.network.layer).rpartition("@")
        if not at:
            return [*self.sides(index, inputs)]
        made: list[Side | SlopeSide] = []
        for one in inputs:
            if reading == "value":
                made += self._pooled(HeadMatrix(None), one[None])
            else:
                made.append(SlopeSide(self.network.head_pass(one[None]), self.network.normalize))
        return made

    def _of_batch(self, head: HeadMatrix | None, batch: Inputs) -> list[Side]:
        if head is None:
            passed = self.network.held_pass(batch)
            features = passed.features
            check_outputs(as_array(features.embedding), as_array(features.activations))
            return [HeldSide(passed, self.network.normalize)]
        return [*self._pooled(head, batch)]

    def _pooled(self, head: HeadMatrix, batch: Inputs) -> list[PooledSide]:
        embeddings, norms, (maps,) = self.network.embed(batch)
        check_outputs(embeddings, maps)
        if not self.network.normalize:
            norms = np.ones(len(maps))
        elif norms is None:
            norms = [head.norm(one) for one in maps]
        return [
            PooledSide(one, embedding, float(norm), head.matrix, head.held)
            for one, embedding, norm in zip(maps, embeddings, norms, strict=True)
        ]
