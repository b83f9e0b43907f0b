"""Cotangents of the targets an index is built with, through the L2 norm or around it.

A cotangent is the gradient of the target y with respect to the anchor's embedding f. NumPy arrays
and tensors alike.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..recipe import WHITENED

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[np.floating], "Tensor")
"""A NumPy array or a torch tensor; what comes in is what goes out."""

_UNIT = 4e-3
"""Distance from 1 that the squared length of a normalized embedding may be."""


def margin_cotangent(positives: Array, negatives: Array) -> Array:
    """Return 2 (f_p - f_n) `[... D]` of y = D(a, n) - D(a, p) (Chen et al., WACV 2020, eq. 1)."""
    return 2 * (positives - negatives)


def centred_cotangent(reference: Array, mean: Array) -> Array:
    """Return f_r - mean(f) `[... D]` of the centered target y = f . (f_r - mean(f))."""
    return reference - mean


def through_norm(cotangent: Array, embedding: Array, length: Array) -> Array:
    """Return dy/dz = (c - f (f . c)) / |z| for f = z / |z|, c `[... D]` at f, `length` |z|."""
    along = (embedding * cotangent).sum(-1)[..., None]
    through: Array = (cotangent - embedding * along) / length[..., None]
    return through


def head_cotangent(
    cotangent: Array, embedding: Array, length: Array, norm: str, normalized: bool
) -> Array:
    """Return dy/dz of the head's output for c `[B D]` or `[B S D]` at f `[B D]`, |z| `[B]`.

    Around the norm, and where f is not normalized, dy/dz is c.
    """
    if not normalized or norm == "around":
        return cotangent
    if cotangent.ndim == 3:
        embedding, length = embedding[:, None], length[:, None]
    return through_norm(cotangent, embedding, length)


@dataclass(frozen=True)
class Whitened:
    """Amounts of its parts that a whitened target takes."""

    ridge: float
    """r of A = (C + r tr(C) / D I)^-1; the larger, the less is whitened."""
    jacobian: float
    """Share of the norm's Jacobian: 1 is through the norm, 0 around it."""
    own: float = 0.0
    """Length of the image's own centered part beside its kind's, which has length 1."""
    borrowed: int = 0
    """Labels of so many images and fewer borrow positives from each image's nearest ones."""

    @classmethod
    def of(cls, target: str, norm: str, labelled: bool) -> "Whitened":
        """Return those of a target in `WHITENED`, for images that share a label or have none."""
        through = norm == "through"
        if target == "discriminant":
            return cls(1.0, float(through))
        if labelled:
            return cls(10.0, 0.5 * through, 0.2, 10)
        return cls(10.0, float(through), 1.5)


def whitening(squares: np.ndarray, mean: np.ndarray, ridge: float) -> np.ndarray:
    """Return A = (C + ridge tr(C) / D I)^-1, `[D D]`; without any spread the identity.

    C is `squares`, the mean of f f^T, float64 `[D D]`, less mean mean^T.
    """
    width = len(mean)
    covariance = squares - np.outer(mean, mean)
    spread = float(np.trace(covariance)) / width
    if spread <= 1e-12 * float(np.trace(squares)) / width:
        return np.eye(width)
    return np.asarray(np.linalg.inv(covariance + ridge * spread * np.eye(width)))


def whitened_cotangent(
    margin: np.ndarray, embeddings: np.ndarray, matrix: np.ndarray, jacobian: float
) -> np.ndarray:
    """Return c - `jacobian` f (f . c), c = A m of margins' cotangents, `[n D]` float64.

    An f that is not of unit length was not normalized and keeps all of c.
    """
    return _partly_through(margin.astype(np.float64) @ matrix, embeddings, jacobian)


def query_cotangent(
    target: str, norm: str, query: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> np.ndarray:
    """Return the cotangent, float32 `[D]`, of a target in `TARGETS` at a query f `[D]`.

    Its neighbors `[P D]` stand for the label it has none of, other images `[Q D]` for the rest.
    """
    others = np.concatenate([positives, negatives]).astype(np.float64)
    mean = others.mean(0)
    cotangent = query - mean
    if target != "centred":
        cotangent = margin_cotangent(positives.mean(0), negatives.mean(0))
    if target in WHITENED:
        amounts = Whitened.of(target, norm, labelled=True)
        margin = _whitened_by_few(cotangent, others - mean, amounts.ridge)
        kind = _partly_through(margin[None], query[None], amounts.jacobian)
        cotangent = with_own(kind, (query - mean)[None], amounts.own)[0]
    return np.asarray(cotangent, np.float32)


def with_own(kind: np.ndarray, centered: np.ndarray, own: float) -> np.ndarray:
    """Return kind / |kind| + own centered / |centered|, `[n D]`; a zero vector adds nothing."""
    return _unit(kind) + own * _unit(centered)


def _whitened_by_few(margin: np.ndarray, centered: np.ndarray, ridge: float) -> np.ndarray:
    """Return A m `[D]` for the covariance of few rows `[n D]`, by Woodbury's identity."""
    n, width = centered.shape
    shift = ridge * float((centered * centered).sum()) / n / width
    if shift <= 0:
        return margin
    within = np.linalg.solve(n * shift * np.eye(n) + centered @ centered.T, centered @ margin)
    return np.asarray((margin - centered.T @ within) / shift)


def _partly_through(cotangents: np.ndarray, embeddings: np.ndarray, jacobian: float) -> np.ndarray:
    if not jacobian:
        return cotangents
    f = np.asarray(embeddings, np.float64)
    unit = np.abs(np.einsum("nd,nd->n", f, f) - 1) < _UNIT
    along = jacobian * unit * np.einsum("nd,nd->n", f, cotangents)
    return np.asarray(cotangents - along[:, None] * f)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1))
