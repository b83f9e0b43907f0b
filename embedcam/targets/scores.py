"""Targets as objects: a score y for every embedding, in place of the class score of a classifier.

A target is asked two things: the score of embeddings `[B D]`, and dy/df at them. References that
are given once, `[D]`, serve every image of a batch; given as `[B D]` each image has its own, and
`at(row)` is the target of one image alone: a batch means what one at a time means. Scores and
cotangents come in the library, precision and place of the embeddings.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import InputError

Array = Any
"""A NumPy array or a torch tensor; what comes in is what goes out."""


class Target(ABC):
    """A score of an embedding, and its derivative.

    Subclasses name in `single` how many axes each of their references has for one image; one axis
    more is one reference an image of the batch.
    """

    single: ClassVar[dict[str, int]] = {}
    holds_norm: ClassVar[bool] = False
    """Whether |z| is a constant: dy/dz is then c / |z|, neither through the norm nor around it."""

    @property
    def parts(self) -> int:
        """S, how many triplets the score is a mean of; 1 for other targets."""
        return 1

    @abstractmethod
    def score(self, embeddings: Array) -> Array:
        """y `[B]` of embeddings f `[B D]`."""

    @abstractmethod
    def cotangents(self, embeddings: Array) -> tuple[Array, Array | None]:
        """dy/df at embeddings `[B D]`: `[B S D]`, S = 1 but for triplets, whose mean is y's own.

        Returns:
            The cotangents, and which of them count, booleans `[B S]` (None: all).
        """

    def at(self, row: int | slice) -> Self:
        """The target of one image of the batch, or of a run of them."""
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__)
        for name, axes in self.single.items():
            value = getattr(self, name)
            if value is not None and value.ndim > axes:
                setattr(own, name, value[row])
        return own

    def check(self, batch: int, width: int | None) -> None:
        """Refuse references that do not fit a batch of embeddings `[batch width]`.

        Args:
            batch: B.
            width: D, or None where it is not known yet.

        Raises:
            InputError: with both shapes.
        """
        for name, axes in self.single.items():
            value = getattr(self, name)
            if value is None or name == "used":
                continue
            fits = value.ndim == axes or (value.ndim == axes + 1 and len(value) == batch)
            if not fits or width not in (None, value.shape[-1]):
                expected = " ".join(["S"] * (axes - 1) + [str(width or "D")])
                embeds = "" if width is None else f"this network embeds in {width} numbers, so "
                raise InputError(
                    f"{type(self).__name__}: {name} has shape {list(value.shape)}; {embeds}give "
                    f"[{expected}] for every image, or [{batch} {expected}], one for each of the "
                    f"{batch} images"
                )


class _Direct(Target):
    """A target with one cotangent an image."""

    @abstractmethod
    def cotangent(self, embeddings: Array) -> Array:
        """dy/df at embeddings `[B D]`, `[B D]`."""

    def cotangents(self, embeddings: Array) -> tuple[Array, Array | None]:
        return self.cotangent(embeddings)[:, None], None


class TripletMargin(Target):
    """y = mean over S triplets of D(f, f_n) - D(f, f_p), D squared Euclidean.

    Chen et al., WACV 2020, eq. 1, with the sign turned: evidence *for* the match, no hinge.

    Args:
        positives: f_p, `[D]`, `[S D]`, or `[B S D]`, one set an image.
        negatives: f_n, the same.
    """

    single: ClassVar[dict[str, int]] = {"positives": 2, "negatives": 2}

    def __init__(self, positives: Any, negatives: Any) -> None:
        self.positives, self.negatives = (
            _reference("positives", positives),
            _reference("negatives", negatives),
        )
        if self.positives.shape != self.negatives.shape:
            raise InputError(
                f"positives {list(self.positives.shape)} and negatives "
                f"{list(self.negatives.shape)} must have one shape: a triplet has one of each"
            )
        if self.positives.ndim == 1:
            self.positives, self.negatives = self.positives[None], self.negatives[None]

    @property
    def parts(self) -> int:
        """S."""
        return int(self.positives.shape[-2])

    def score(self, embeddings: Array) -> Array:
        """y `[B]`."""
        to_positive = embeddings[:, None] - _like(self.positives, embeddings)
        to_negative = embeddings[:, None] - _like(self.negatives, embeddings)
        return ((to_negative**2).sum(-1) - (to_positive**2).sum(-1)).mean(-1)

    def cotangents(self, embeddings: Array) -> tuple[Array, Array | None]:
        """2 (f_p - f_n) of each triplet, `[B S D]`."""
        each = 2 * (_like(self.positives, embeddings) - _like(self.negatives, embeddings))
        return each + 0 * embeddings[:, None], None


class Direction(Target):
    """y = f . c, the mean over the directions that count: any target that is linear in f.

    The margin of any set of triplets is one, up to a constant: c = 2 (mean f_p - mean f_n).

    Args:
        directions: c, `[D]`, `[S D]` or `[B S D]`.
        used: which directions count, booleans `[S]` or `[B S]`; None: all.
    """

    single: ClassVar[dict[str, int]] = {"directions": 2, "used": 1}

    def __init__(self, directions: Any, used: Any = None) -> None:
        self.directions = _reference("directions", directions)
        if self.directions.ndim == 1:
            self.directions = self.directions[None]
        self.used = None if used is None else np.asarray(used, bool)

    @property
    def parts(self) -> int:
        """S."""
        return int(self.directions.shape[-2])

    def score(self, embeddings: Array) -> Array:
        """y `[B]`; 0 where no direction counts."""
        each = (embeddings[:, None] * _like(self.directions, embeddings)).sum(-1)
        if self.used is None:
            return each.mean(-1)
        counted = _like(self.used.astype(np.float64), embeddings)
        total = counted.sum(-1)
        return (each * counted).sum(-1) / (total + (total == 0))

    def cotangents(self, embeddings: Array) -> tuple[Array, Array | None]:
        """The directions, `[B S D]`."""
        each = _like(self.directions, embeddings) + 0 * embeddings[:, None]
        if self.used is None:
            return each, None
        return each, np.array(np.broadcast_to(self.used, tuple(each.shape[:2])))


class Similarity(_Direct):
    """y = f . f_r, or its cosine.

    Args:
        reference: f_r, `[D]` or `[B D]`.
        kind: "cosine" or "dot".
    """

    single: ClassVar[dict[str, int]] = {"reference": 1}

    def __init__(self, reference: Any, kind: str = "cosine") -> None:
        if kind not in ("cosine", "dot"):
            raise InputError(f"similarity {kind!r} is unknown; use 'cosine' or 'dot'")
        self.reference, self.kind = _reference("reference", reference), kind
        if kind == "cosine":
            self.reference = _unit("reference", self.reference)

    def score(self, embeddings: Array) -> Array:
        """y `[B]`."""
        dot = (embeddings * _like(self.reference, embeddings)).sum(-1)
        return dot if self.kind == "dot" else dot / _lengths(embeddings)

    def cotangent(self, embeddings: Array) -> Array:
        """f_r; of the cosine (f_r - f^ (f^ . f_r)) / |f|, f^ = f / |f| and |f_r| = 1."""
        reference = _like(self.reference, embeddings) + 0 * embeddings
        if self.kind == "dot":
            return reference
        lengths = _lengths(embeddings)[:, None]
        unit = embeddings / lengths
        return (reference - unit * (unit * reference).sum(-1)[:, None]) / lengths


class NegativeDistance(_Direct):
    """y = -D(f, f_r), D squared Euclidean.

    Args:
        reference: f_r, `[D]` or `[B D]`.
    """

    single: ClassVar[dict[str, int]] = {"reference": 1}

    def __init__(self, reference: Any) -> None:
        self.reference = _reference("reference", reference)

    def score(self, embeddings: Array) -> Array:
        """y `[B]`, at most 0."""
        return -((embeddings - _like(self.reference, embeddings)) ** 2).sum(-1)

    def cotangent(self, embeddings: Array) -> Array:
        """2 (f_r - f)."""
        return 2 * (_like(self.reference, embeddings) - embeddings)


class ClassProxy(_Direct):
    """y = f . p_c, p_c the normalised mean of the class's normalised embeddings.

    EmbeddingCAM (arXiv 2402.00909); a single point is its own proxy.

    Args:
        points: embeddings of the class, `[n D]` or `[D]`.
    """

    single: ClassVar[dict[str, int]] = {"proxy": 1}

    def __init__(self, points: Any) -> None:
        points = _reference("points", points)
        if points.ndim > 2:
            raise InputError(f"points have shape {list(points.shape)}; expected [n D] or [D]")
        several = _unit("points", points if points.ndim == 2 else points[None])
        self.proxy = _unit("the mean of points", several.mean(0))

    def score(self, embeddings: Array) -> Array:
        """y `[B]`."""
        return (embeddings * _like(self.proxy, embeddings)).sum(-1)

    def cotangent(self, embeddings: Array) -> Array:
        """p_c."""
        return _like(self.proxy, embeddings) + 0 * embeddings


class PairContribution(_Direct):
    """y = z . z' / (|z| |z'|) with both norms held constant: contributions that add up to y.

    The idea of SFAM (arXiv 2506.01636), not its printed formula. Where the embedding is the pooled
    vector itself, channel k contributes z_k z'_k / (|z| |z'|); they add up to the mean of CAM's map
    (the sum of Grad-CAM's) before its ReLU. Through the norm the contributions of a cosine would
    sum to zero instead.

    Args:
        reference: z' (or f', which is z' / |z'|), `[D]` or `[B D]`.
    """

    single: ClassVar[dict[str, int]] = {"reference": 1}
    holds_norm: ClassVar[bool] = True

    def __init__(self, reference: Any) -> None:
        self.reference = _unit("reference", _reference("reference", reference))

    def score(self, embeddings: Array) -> Array:
        """y `[B]`: the cosine."""
        return (embeddings * _like(self.reference, embeddings)).sum(-1) / _lengths(embeddings)

    def cotangent(self, embeddings: Array) -> Array:
        """z' / (|z'| |f|)."""
        return _like(self.reference, embeddings) / _lengths(embeddings)[:, None]


class Coordinate(_Direct):
    """y = f_i, one number of the embedding.

    Args:
        index: i, from 0; negative counts from the end.
    """

    def __init__(self, index: int) -> None:
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise InputError(f"a coordinate is a whole number; given {index!r}")
        self.index = int(index)

    def check(self, batch: int, width: int | None) -> None:
        """Refuse a coordinate beyond the embedding."""
        if width is not None and not -width <= self.index < width:
            raise InputError(
                f"coordinate {self.index} of an embedding of {width} numbers; give 0 to {width - 1}"
            )

    def score(self, embeddings: Array) -> Array:
        """y `[B]`."""
        return embeddings[:, self.index]

    def cotangent(self, embeddings: Array) -> Array:
        """The unit vector e_i."""
        unit = np.zeros(embeddings.shape[-1])
        unit[self.index] = 1
        return _like(unit, embeddings) + 0 * embeddings


def _reference(name: str, values: Any) -> np.ndarray:
    """References as a float array: finite, at least one."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers ({error})") from error
    if found.ndim not in (1, 2, 3) or 0 in found.shape:
        raise InputError(f"{name} has shape {list(found.shape)}; expected embeddings such as [D]")
    if not np.isfinite(found).all():
        raise InputError(f"{name} holds a NaN or an infinity")
    return found


def _unit(name: str, vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (lengths > 0).all():
        raise InputError(f"{name} holds a vector of length 0, which points nowhere")
    unit: np.ndarray = vectors / lengths
    return unit


def _like(reference: np.ndarray, embeddings: Array) -> Array:
    """The reference in the embeddings' library, precision and place."""
    if isinstance(embeddings, np.ndarray):
        return reference.astype(embeddings.dtype, copy=False)
    return embeddings.new_tensor(reference)


def _lengths(embeddings: Array) -> Array:
    """|f| `[B]`, and 1 for a vector of zeros, which is like nothing: its cosine is 0."""
    lengths = (embeddings * embeddings).sum(-1) ** 0.5
    return lengths + (lengths == 0)
