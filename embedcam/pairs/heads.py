"""The head behind the activations of a pair, where everything follows from their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..index.encoding import LowRank

if TYPE_CHECKING:
    from ..index import Index


@dataclass(frozen=True, eq=False)
class PooledHead:
    """z = W p + b of the mean p of the activations over positions.

    matrix: W `[D K]`, None for the identity; bias: b `[D]`, None where it is not known.
    """

    matrix: np.ndarray | None
    bias: np.ndarray | None = None

    def norm(self, activations: np.ndarray) -> float:
        """|z| of activations `[K H W]`; the bias must be known."""
        pooled = activations.mean((1, 2), dtype=np.float64)
        z = pooled if self.matrix is None else self.matrix @ pooled
        return float(np.linalg.norm(z if self.bias is None else z + self.bias))


def pooled_head(network: Any, index: Index) -> PooledHead | None:
    """The head of a network; None where it is not average pooling and affine.

    An ONNX file holds no head by itself: it says what the head is, and the matrix is taken from the
    index where its encoding keeps it.

    Raises:
        InputError: an ONNX network whose head cannot be known.
    """
    if hasattr(type(network), "head_kind"):
        kind = network.head_kind
        return PooledHead(None if kind.identity else kind.matrix) if kind.affine else None
    head, name = getattr(network, "head", None), getattr(network, "path", "this network")
    if head is None or head.kind == "other":
        raise InputError(
            f"receipts need the head by itself, and {name} has none that is average pooling "
            "and affine; give the network instead of its ONNX file"
        )
    if head.kind == "identity":
        return PooledHead(None, head.bias)
    encoding = index.encoding()
    if not isinstance(encoding, LowRank) or encoding.origin != "head":
        raise InputError(
            f"receipts need the head's matrix, which neither {name} nor the index's "
            f"encoding ({encoding.name}) holds; give the network instead of its ONNX file"
        )
    # The basis is dz/dA: the matrix divided by the number of positions.
    cells = index.manifest.layers[0].cells
    if cells is None:
        raise InputError(
            "receipts need the number of the layer's positions, which this index does not hold; "
            "give the network instead of its ONNX file"
        )
    return PooledHead(encoding.fitted["basis"] * np.float32(cells), head.bias)
