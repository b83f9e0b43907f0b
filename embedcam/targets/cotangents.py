"""Cotangents of the targets an index is built with, and the norm's two ways.

Arrays only: plain arithmetic that works on NumPy arrays and on tensors alike. A cotangent is the
gradient of the target y with respect to the anchor's embedding f, everything else held constant.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..recipe import WHITENED

Array = TypeVar("Array")

_UNIT = 4e-3
"""How far from 1 the squared length of a normalised embedding may be."""


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


@dataclass(frozen=True)
class Whitened:
    """How much of what a whitened target takes.

    Args:
        ridge: r of A = (C + r tr(C) / D I)^-1; the larger, the less is whitened.
        jacobian: share of the norm's Jacobian: 1 is through the norm, 0 around it.
        own: length of the image's own centred part beside its kind's, which has length 1.
        borrowed: labels of so many images and fewer take part of their positives from each image's
            nearest ones.
    """

    ridge: float
    jacobian: float
    own: float = 0.0
    borrowed: int = 0

    @classmethod
    def of(cls, target: str, norm: str, labelled: bool) -> "Whitened":
        """Of a target in `WHITENED`, for images that share a label or for one that has none."""
        through = norm == "through"
        if target == "discriminant":
            return cls(1.0, float(through))
        if labelled:
            return cls(10.0, 0.5 * through, 0.2, 10)
        return cls(10.0, float(through), 1.5)


def whitening(squares: np.ndarray, mean: np.ndarray, ridge: float) -> np.ndarray:
    """A = (C + ridge tr(C) / D I)^-1, `[D D]`; without any spread the identity.

    Args:
        squares: mean of f f^T over the embeddings, float64 `[D D]`; C is it less mean mean^T.
        mean: of the embeddings, float64 `[D]`.
        ridge: see `Whitened`.
    """
    width = len(mean)
    covariance = squares - np.outer(mean, mean)
    spread = float(np.trace(covariance)) / width
    if spread <= 1e-12 * float(np.trace(squares)) / width:
        return np.eye(width)
    found: np.ndarray = np.linalg.inv(covariance + ridge * spread * np.eye(width))
    return found


def whitened_cotangent(
    margin: np.ndarray, embeddings: np.ndarray, matrix: np.ndarray, jacobian: float
) -> np.ndarray:
    """c = A m less `jacobian` of its part along f: c - jacobian f (f . c), `[n D]` float64.

    What is not of unit length was not normalised and keeps all of it.

    Args:
        margin: m, cotangents of the margin, `[n D]`.
        embeddings: f, `[n D]`.
        matrix: A, see `whitening`.
        jacobian: from 0, around the norm, to 1, through it.
    """
    return _partly_through(margin.astype(np.float64) @ matrix, embeddings, jacobian)


def query_cotangent(
    target: str, norm: str, own: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> np.ndarray:
    """Cotangent of a target at a query, which has no label: its neighbours stand for its kind.

    The margin against other images, or the whitened one as for an image that shares its label;
    both together stand for the collection where a target asks for its mean or covariance.

    Args:
        target: one of `TARGETS`.
        norm: "through" or "around", which a whitened target takes here.
        own: f of the query, `[D]`.
        positives: of its neighbours, `[P D]`.
        negatives: of other images, `[Q D]`.

    Returns:
        float32 `[D]`.
    """
    others = np.concatenate([positives, negatives]).astype(np.float64)
    mean = others.mean(0)
    if target == "centred":
        found = centred_cotangent(own, mean)
    else:
        found = margin_cotangent(positives.mean(0), negatives.mean(0))
    if target in WHITENED:
        amounts = Whitened.of(target, norm, labelled=True)
        margin = _whitened_by_few(found, others - mean, amounts.ridge)
        kind = _partly_through(margin[None], own[None], amounts.jacobian)
        found = with_own(kind, (own - mean)[None], amounts.own)[0]
    return found.astype(np.float32)


def _whitened_by_few(margin: np.ndarray, centred: np.ndarray, ridge: float) -> np.ndarray:
    """A m `[D]`, see `whitening`, for the covariance of a few rows `[n D]` of mean 0.

    By Woodbury's identity: a matrix `[D D]` takes hundreds of times longer.
    """
    n, width = centred.shape
    shift = ridge * float((centred * centred).sum()) / n / width
    if shift <= 0:
        return margin
    within = np.linalg.solve(n * shift * np.eye(n) + centred @ centred.T, centred @ margin)
    found: np.ndarray = (margin - centred.T @ within) / shift
    return found


def _partly_through(cotangents: np.ndarray, embeddings: np.ndarray, jacobian: float) -> np.ndarray:
    """Take a share of the norm's Jacobian: c - jacobian f (f . c), `[n D]` float64."""
    if not jacobian:
        return cotangents
    own = np.asarray(embeddings, np.float64)
    unit = np.abs((own * own).sum(-1, keepdims=True) - 1) < _UNIT
    return cotangents - jacobian * unit * own * (own * cotangents).sum(-1, keepdims=True)


def with_own(kind: np.ndarray, centred: np.ndarray, own: float) -> np.ndarray:
    """kind / |kind| + own centred / |centred|, `[n D]`; a zero vector adds nothing."""
    return _unit(kind) + own * _unit(centred)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    found: np.ndarray = rows / np.where(lengths > 0, lengths, 1)
    return found


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
