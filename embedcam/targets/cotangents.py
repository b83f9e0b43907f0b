"""Cotangents of the targets an index is built with, through the L2 norm or around it.

Plain arithmetic that works on NumPy arrays and on tensors alike. A cotangent is the gradient of the
target y with respect to the anchor's embedding f, everything else held constant.
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
"""How far from 1 the squared length of a normalized embedding may be."""


def margin_cotangent(positives: Array, negatives: Array) -> Array:
    """Return the cotangent of the triplet margin y = D(a, n) - D(a, p): 2 (f_p - f_n), `[... D]`.

    D is squared Euclidean; minus the gradient of the triplet loss (Chen et al., WACV 2020, eq. 1):
    positive where more of a channel makes the anchor more like its positives and less like its
    negatives. y is linear in f_p and f_n, so means over the same triplets do.
    """
    return 2 * (positives - negatives)


def centred_cotangent(reference: Array, mean: Array) -> Array:
    """Return the cotangent of the centered target y = f . (f_r - mean(f)): f_r - mean(f).

    Needs neither labels nor sampling. In an index the reference f_r `[... D]` of an image is the
    image itself, and `mean` `[D]` that of the images the index was fitted on.
    """
    return reference - mean


def through_norm(cotangent: Array, embedding: Array, length: Array) -> Array:
    """Return dy/dz for f = z / |z|: (c - f (f . c)) / |z|, the gradient *through* the L2 norm.

    c `[... D]` is the cotangent at f, `length` |z| > 0, `[...]`. *Around* the norm dy/dz = c.
    """
    along = (embedding * cotangent).sum(-1)[..., None]
    through: Array = (cotangent - embedding * along) / length[..., None]
    return through


def head_cotangent(
    cotangent: Array, embedding: Array, length: Array, norm: str, normalized: bool
) -> Array:
    """Return dy/dz of the head's output, shaped as the cotangent c at f.

    c is `[B D]`, or `[B S D]`, one a triplet; f is `[B D]` and |z| `[B]`. Around the norm, and
    where f is not normalized, dy/dz is c.
    """
    if not normalized or norm == "around":
        return cotangent
    if cotangent.ndim == 3:
        embedding, length = embedding[:, None], length[:, None]
    return through_norm(cotangent, embedding, length)


@dataclass(frozen=True)
class Whitened:
    """How much of what a whitened target takes."""

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

    C is `squares`, the mean of f f^T over the embeddings, float64 `[D D]`, less mean mean^T.
    """
    width = len(mean)
    covariance = squares - np.outer(mean, mean)
    spread = float(np.trace(covariance)) / width
    if spread <= 1e-12 * float(np.trace(squares)) / width:
        return np.eye(width)
    inverse: np.ndarray = np.linalg.inv(covariance + ridge * spread * np.eye(width))
    return inverse


def whitened_cotangent(
    margin: np.ndarray, embeddings: np.ndarray, matrix: np.ndarray, jacobian: float
) -> np.ndarray:
    """Return c = A m less `jacobian` of its part along f: c - jacobian f (f . c), `[n D]` float64.

    m are cotangents of the margin, f the embeddings, both `[n D]`, A as `whitening` gives it. An f
    that is not of unit length was not normalized and keeps all of c.
    """
    return _partly_through(margin.astype(np.float64) @ matrix, embeddings, jacobian)


def query_cotangent(
    target: str, norm: str, query: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> np.ndarray:
    """Return the cotangent, float32 `[D]`, of a target in `TARGETS` at a query f `[D]`.

    A query has no label: its neighbors, `positives` `[P D]`, stand for its kind. The margin against
    other images, `negatives` `[Q D]`, or the whitened one as for an image that shares its label;
    both together stand for the collection where a target asks for its mean or covariance.
    """
    others = np.concatenate([positives, negatives]).astype(np.float64)
    mean = others.mean(0)
    if target == "centred":
        cotangent = centred_cotangent(query, mean)
    else:
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
    """Return A m `[D]`, see `whitening`, for the covariance of a few rows `[n D]` of mean 0.

    By Woodbury's identity: a matrix `[D D]` takes hundreds of times longer.
    """
    n, width = centered.shape
    shift = ridge * float((centered * centered).sum()) / n / width
    if shift <= 0:
        return margin
    within = np.linalg.solve(n * shift * np.eye(n) + centered @ centered.T, centered @ margin)
    whitened: np.ndarray = (margin - centered.T @ within) / shift
    return whitened


def _partly_through(cotangents: np.ndarray, embeddings: np.ndarray, jacobian: float) -> np.ndarray:
    """Take a share of the norm's Jacobian: c - jacobian f (f . c), `[n D]` float64."""
    if not jacobian:
        return cotangents
    f = np.asarray(embeddings, np.float64)
    unit = np.abs((f * f).sum(-1, keepdims=True) - 1) < _UNIT
    through: np.ndarray = cotangents - jacobian * unit * f * (f * cotangents).sum(-1, keepdims=True)
    return through


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: np.ndarray = rows / np.where(lengths > 0, lengths, 1)
    return unit
