"""The matrix of a head by an index: what an ONNX file does not hold by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..index.encoding import LowRank

if TYPE_CHECKING:
    from ..index import Index


def matrix_of(index: Index) -> np.ndarray:
    """Return W `[D K]` of z = W p + b, by an index whose encoding has the origin "head".

    Raises:
        InputError: the encoding is another, or the number of positions is not known.
    """
    encoding = index.encoding()
    if not isinstance(encoding, LowRank) or encoding.origin != "head":
        raise InputError(
            "receipts need the head's matrix, which neither the ONNX file nor the index's "
            f"encoding ({encoding.name}) holds; give the network instead of its ONNX file"
        )
    # The basis is dz/dA: the matrix divided by the number of positions.
    positions = index.manifest.layers[0].cells
    if positions is None:
        raise InputError(
            "receipts need the number of the layer's positions, which this index does not hold; "
            "give the network instead of its ONNX file"
        )
    basis: np.ndarray = encoding.fitted["basis"]
    return basis * np.float32(positions)
