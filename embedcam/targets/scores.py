"""Targets as objects: a score y for every embedding, in place of the class score of a classifier.

A reference `[D]` serves every image of a batch; given as `[B D]` each image has its own. Scores and
cotangents come in the library, precision and place of the embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from .._checks import one_of, whole
from ..errors import InputError
from .cotangents import Array, through_norm

if TYPE_CHECKING:
    from torch import Tensor

    Given = ArrayLike | Tensor


class Target(ABC):
    """A score of an embedding, and its derivative.

    Subclasses name in `single` how many axes a reference has for one image; one axis more is one an
    image. They implement `cotangent`, or `cotangents` where there are several an image.
    """

    single: ClassVar[dict[str, int]] = {}
    holds_norm: ClassVar[bool] = False
    """Whether |z| is a constant: dy/dz is then c / |z|, neither through the norm nor around it."""
    parts: int = 1
    """S, how many triplets the score is a mean of; 1 for other targets."""

    @abstractmethod
    def score(self, embeddings: Array) -> Array:
        """Return y `[B]` of embeddings f `[B D]`."""

    def cotangent(self, embeddings: Array) -> Array:
        """Return dy/df at embeddings `[B D]`, `[B D]`."""
        raise NotImplementedError

    def cotangents(self, embeddings: Array) -> tuple[Array, np.ndarray | None]:
        """Return dy/df of each triplet, `[B S D]`, and which count, `[B S]` (None: all)."""
        return self.cotangent(embeddings)[:, None], None

    def at(self, row: int | slice) -> Self:
        """Return the target of one image of the batch, or of a run of them."""
        one = object.__new__(type(self))
        one.__dict__.update(self.__dict__)
        for name, axes in self.single.items():
            value = getattr(self, name)
            if value is not None and value.ndim > axes:
                setattr(one, name, value[row])
        return one

    def check(self, batch: int, width: int | None) -> None:
        """Refuse references that do not fit embeddings `[batch width]`; None: not known yet."""
        for name, axes in self.single.items():
            value = getattr(self, name)
            if name == "used":
                continue
            fits = value.ndim == axes or (value.ndim == axes + 1 and len(value) == batch)
            if not fits or width not in (None, value.shape[-1]):
                expected = ("S " if axes == 2 else "") + str(width or "D")
                embeds = "" if width is None else f"this network embeds in {width} numbers, so "
                raise InputError(
                    f"{type(self).__name__}: {name} has shape {list(value.shape)}; {embeds}give "
                    f"[{expected}], or [{batch} {expected}], one for each of the {batch} images"
                )


class TripletMargin(Target):
    """y = mean over S triplets of D(f, f_n) - D(f, f_p), D squared Euclidean.

    Chen et al., WACV 2020, eq. 1, with the sign turned: evidence *for* the match, no hinge.

    Parameters
    ----------
    positives, negatives
        f_p and f_n, `[D]`, `[S D]`, or `[B S D]`, one set an image.
    """

    single: ClassVar[dict[str, int]] = {"positives": 2, "negatives": 2}

    def __init__(self, positives: Given, negatives: Given) -> None:
        self.positives = np.atleast_2d(_reference("positives", positives))
        self.negatives = np.atleast_2d(_reference("negatives", negatives))
        if self.positives.shape != self.negatives.shape:
            raise InputError(
                f"positives {list(self.positives.shape)} and negatives "
                f"{list(self.negatives.shape)} must have one shape: a triplet has one of each"
            )
        self.parts = self.positives.shape[-2]

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`."""
        to_positive = embeddings[:, None] - _like(self.positives, embeddings)
        to_negative = embeddings[:, None] - _like(self.negatives, embeddings)
        score: Array = ((to_negative**2).sum(-1) - (to_positive**2).sum(-1)).mean(-1)
        return score

    def cotangents(self, embeddings: Array) -> tuple[Array, None]:
        """Return 2 (f_p - f_n) of each triplet, `[B S D]`."""
        each = 2 * (_like(self.positives, embeddings) - _like(self.negatives, embeddings))
        return _one_each(each, embeddings), None


class Direction(Target):
    """y = f . c, the mean over the directions that count: any target that is linear in f.

    Parameters
    ----------
    directions
        c, `[D]`, `[S D]` or `[B S D]`.
    used
        Which directions count, booleans `[S]` or `[B S]`; None: all.
    """

    single: ClassVar[dict[str, int]] = {"directions": 2, "used": 1}

    def __init__(self, directions: Given, used: ArrayLike | None = None) -> None:
        self.directions = np.atleast_2d(_reference("directions", directions))
        self.used = None if used is None else np.asarray(used, bool)
        self.parts = self.directions.shape[-2]

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`; 0 where no direction counts."""
        each = _dot(embeddings[:, None], _like(self.directions, embeddings))
        if self.used is None:
            mean: Array = each.mean(-1)
            return mean
        counted = _like(self.used.astype(np.float64), embeddings)
        total = counted.sum(-1)
        weighted: Array = _dot(each, counted) / (total + (total == 0))
        return weighted

    def cotangents(self, embeddings: Array) -> tuple[Array, np.ndarray | None]:
        """Return the directions, `[B S D]`."""
        each = _one_each(_like(self.directions, embeddings), embeddings)
        if self.used is None:
            return each, None
        return each, np.array(np.broadcast_to(self.used, tuple(each.shape[:2])))


class _Referenced(Target):
    """y = f . f_r of one reference f_r, `[D]` or `[B D]`."""

    single: ClassVar[dict[str, int]] = {"reference": 1}
    reference: np.ndarray

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`."""
        return _dot(embeddings, _like(self.reference, embeddings))

    def cotangent(self, embeddings: Array) -> Array:
        """Return f_r for each embedding."""
        return _like(self.reference, embeddings) + 0 * embeddings


class Similarity(_Referenced):
    """y = f . f_r, or its cosine.

    Parameters
    ----------
    reference
        f_r, `[D]` or `[B D]`.
    kind
        "cosine" or "dot".
    """

    def __init__(self, reference: Given, kind: str = "cosine") -> None:
        self.kind = one_of("similarity", kind, ("cosine", "dot"))
        self.reference = _reference("reference", reference)
        if kind == "cosine":
            self.reference = _unit("reference", self.reference)

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`."""
        dot = super().score(embeddings)
        return dot if self.kind == "dot" else dot / _lengths(embeddings)

    def cotangent(self, embeddings: Array) -> Array:
        """Return f_r; of the cosine (f_r - f^ (f^ . f_r)) / |f|, f^ = f / |f| and |f_r| = 1."""
        reference = super().cotangent(embeddings)
        if self.kind == "dot":
            return reference
        lengths = _lengths(embeddings)
        return through_norm(reference, embeddings / lengths[:, None], lengths)


class NegativeDistance(_Referenced):
    """y = -D(f, f_r), D squared Euclidean.

    Parameters
    ----------
    reference
        f_r, `[D]` or `[B D]`.
    """

    def __init__(self, reference: Given) -> None:
        self.reference = _reference("reference", reference)

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`, at most 0."""
        apart = embeddings - _like(self.reference, embeddings)
        distance: Array = (apart**2).sum(-1)
        return -distance

    def cotangent(self, embeddings: Array) -> Array:
        """Return 2 (f_r - f)."""
        return 2 * (_like(self.reference, embeddings) - embeddings)


class ClassProxy(_Referenced):
    """y = f . p_c, p_c the normalized mean of the class's normalized embeddings.

    EmbeddingCAM (arXiv 2402.00909); a single point is its own proxy.

    Parameters
    ----------
    points
        Embeddings of the class, `[n D]` or `[D]`.
    """

    def __init__(self, points: Given) -> None:
        points = _reference("points", points)
        if points.ndim > 2:
            raise InputError(f"points have shape {list(points.shape)}; expected [n D] or [D]")
        several = _unit("points", np.atleast_2d(points))
        self.reference = self.proxy = _unit("the mean of points", several.mean(0))


class PairContribution(Similarity):
    """y = z . z' / (|z| |z'|) with both norms held constant: contributions that add up to y.

    Behind plain pooling channel k contributes z_k z'_k / (|z| |z'|): they add up to the mean of
    CAM's map before its ReLU. Through the norm they would sum to zero.

    Parameters
    ----------
    reference
        z' (or f', which is z' / |z'|), `[D]` or `[B D]`.
    """

    holds_norm: ClassVar[bool] = True

    def __init__(self, reference: Given) -> None:
        super().__init__(reference)

    def cotangent(self, embeddings: Array) -> Array:
        """Return z' / (|z'| |f|)."""
        return _like(self.reference, embeddings) / _lengths(embeddings)[:, None]


class Coordinate(Target):
    """y = f_i, one number of the embedding.

    Parameters
    ----------
    index
        i, from 0; negative counts from the end.
    """

    def __init__(self, index: int) -> None:
        self.index = whole("index", index, -(10**9), 10**9)

    def check(self, batch: int, width: int | None) -> None:
        """Refuse a coordinate beyond the embedding."""
        if width is not None and not -width <= self.index < width:
            raise InputError(
                f"coordinate {self.index} of an embedding of {width} numbers; give 0 to {width - 1}"
            )

    def score(self, embeddings: Array) -> Array:
        """Return y `[B]`."""
        return embeddings[:, self.index]

    def cotangent(self, embeddings: Array) -> Array:
        """Return the unit vector e_i."""
        unit = np.zeros(embeddings.shape[-1])
        unit[self.index] = 1
        return _like(unit, embeddings) + 0 * embeddings


def _reference(name: str, values: Given) -> np.ndarray:
    """Return references as a float array: finite, at least one."""
    if (detach := getattr(values, "detach", None)) is not None:
        tensor = detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers ({error})") from error
    if array.ndim not in (1, 2, 3) or 0 in array.shape:
        raise InputError(f"{name} has shape {list(array.shape)}; expected embeddings such as [D]")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds a NaN or an infinity")
    return array


def _unit(name: str, vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (lengths > 0).all():
        raise InputError(f"{name} holds a vector of length 0, which points nowhere")
    return np.asarray(vectors / lengths)


def _like(reference: np.ndarray, embeddings: Array) -> Array:
    if isinstance(embeddings, np.ndarray):
        return np.asarray(reference, embeddings.dtype)
    return embeddings.new_tensor(reference)


def _one_each(triplets: Array, embeddings: Array) -> Array:
    each: Array = triplets + 0 * embeddings[:, None]
    return each


def _dot(a: Array, b: Array) -> Array:
    product: Array = (a * b).sum(-1)
    return product


def _lengths(embeddings: Array) -> Array:
    lengths: Array = _dot(embeddings, embeddings) ** 0.5
    divisors: Array = lengths + (lengths == 0)
    return divisors
