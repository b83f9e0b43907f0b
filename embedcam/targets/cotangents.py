"""Cotangents of the targets an index is built with, and the norm's two ways.

Arrays only: plain arithmetic that works on NumPy arrays and on tensors alike. A cotangent is the
gradient of the target y with respect to the anchor's embedding f, everything else held constant.
"""

from typing import TypeVar

Array = TypeVar("Array")

TARGETS = ("margin", "centred", "discriminant")
NORMS = ("through", "around")


def margin_cotangent(positives: Array, negatives: Array) -> Array:
    """Cotangent of the triplet margin y = D(a, n) - D(a, p), D squared Euclidean: 2 (f_p - f_n).

    Minus the gradient of the triplet loss (Chen et al., WACV 2020, eq. 1): positive where more of a
    channel makes the anchor more like its positives and less like its negatives.

    Args:
        positives: f_p, or its mean over the triplets (y is linear in it), `[... D]`.
        negatives: f_n, or its mean over the same triplets, `[... D]`.
    """
    return 2 * (positives - negatives)  # type: ignore[operator]


def centred_cotangent(reference: Array, mean: Array) -> Array:
    """Cotangent of the centred target y = f . (f_r - mean(f)): f_r - mean(f).

    Needs neither labels nor sampling. In an index the reference of an image is the image itself.

    Args:
        reference: f_r, `[... D]`.
        mean: mean embedding of the images the index was fitted on, `[D]`.
    """
    return reference - mean  # type: ignore[operator]


def through_norm(cotangent: Array, embedding: Array, length: Array) -> Array:
    """dy/dz for f = z / |z|: (c - f (f . c)) / |z|, the gradient *through* the L2 norm.

    The other way, *around* it, is the cotangent itself: dy/dz = c.

    Args:
        cotangent: c at f, `[... D]`.
        embedding: f, unit length, `[... D]`.
        length: |z|, `[...]`, > 0.
    """
    along = (embedding * cotangent).sum(-1)[..., None]  # type: ignore[operator]
    return (cotangent - embedding * along) / length[..., None]  # type: ignore[index]


def head_cotangent(
    cotangent: Array, embedding: Array, length: Array, norm: str, normalized: bool
) -> Array:
    """dy/dz of the head's output, by the norm's way; without normalisation both are c.

    Args:
        cotangent: c at f, `[B D]`, or `[B S D]`, one a triplet.
        embedding: f, `[B D]`.
        length: |z|, `[B]`.
        norm: "through" or "around".
        normalized: whether f = z / |z|.

    Returns:
        dy/dz, shaped as the cotangent.
    """
    if not normalized or norm == "around":
        return cotangent
    if cotangent.ndim == 3:  # type: ignore[attr-defined]
        embedding, length = embedding[:, None], length[:, None]  # type: ignore[index]
    return through_norm(cotangent, embedding, length)
