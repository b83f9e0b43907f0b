"""What the values in a part must be: checked before they are written, and again by verify."""

import numpy as np

from .._checks import UNIT_TOLERANCE, wrong_number
from .encoding import TopM
from .layout import Layer


def wrong_embeddings(block: np.ndarray, normalized: bool) -> str | None:
    """What is wrong with embeddings `[b D]`, or None."""
    wrong = wrong_number(block)
    if wrong is not None:
        return f"row {wrong[0]} {wrong[1]}"
    if normalized:
        norms = np.linalg.norm(block.astype(np.float64), axis=1)
        bad = _first(np.abs(norms - 1) > UNIT_TOLERANCE)
        if bad is not None:
            return f"row {bad} has length {norms[bad]:.6g} where unit vectors are promised"
    return None


def wrong_field(layer: Layer, field: str, block: np.ndarray) -> str | None:
    """What is wrong with rows of one of the encoding's fields, or None."""
    if isinstance(layer.encoding, TopM) and field == "channels":
        # Sorting by row shows repeats as equal neighbours.
        ordered = np.sort(block.astype(np.int64), axis=1)
        bad = _first(ordered[:, -1] >= layer.channels)
        if bad is not None:
            return f"row {bad} names channel {ordered[bad, -1]} of {layer.channels}"
        bad = _first((np.diff(ordered, axis=1) == 0).any(axis=1))
        return None if bad is None else f"row {bad} names a channel twice"
    return wrong_scales(block) if field == "scales" else wrong_values(block)


def wrong_values(block: np.ndarray) -> str | None:
    """What is wrong with numbers that must be finite, or None."""
    if block.dtype.kind != "f":
        return None
    bad = _first(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
    return None if bad is None else f"row {bad} holds a NaN or an infinity"


def wrong_scales(block: np.ndarray) -> str | None:
    """What is wrong with scales, which are finite and not negative, or None."""
    bad = _first(~(np.isfinite(block) & (block >= 0)))
    return None if bad is None else f"row {bad} has the scale {block[bad]}"


def _first(mask: np.ndarray) -> int | None:
    where = np.flatnonzero(mask)
    return int(where[0]) if len(where) else None
