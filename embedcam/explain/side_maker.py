"""Sides made of pictures: what each position gives to an embedding, by the network's head."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_array, check_outputs, stacked
from ..errors import EmbeddingError
from .sides import HeldSide, PooledSide, Side, matrix_of

if TYPE_CHECKING:
    from ..index import Index
    from ..preprocess import HeadMatrix, Network
    from .queries import Inputs


class SideMaker:
    """Makes sides of pictures by one network.

    Behind average pooling and an affine head all is exact and needs neither a gradient nor torch;
    behind another head each picture is one head pass.
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
