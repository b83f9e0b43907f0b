"""The cotangent of each anchor under a recipe: from cached embeddings alone, no forward pass."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import InputError
from .index import nearest
from .recipe import Recipe
from .targets import centred_cotangent, margin_cotangent
from .triplets import Nearest, Triplets, TripletSampler, active, given_triplets

_BLOCK = 1 << 14
_UNIT = 4e-3
"""How far from 1 the squared length of a normalised embedding may be."""


@dataclass(frozen=True)
class Cotangents:
    """What a batch of anchors is differentiated along, at the embedding f.

    Args:
        values: `[a D]`, the mean over the triplets that count, or `[a S D]`, one a triplet.
        used: with `[a S D]`, the triplets that count, `[a S]` booleans.
        counts: triplets that count, `[a]`; with the centred target 1.
    """

    values: np.ndarray
    used: np.ndarray | None
    counts: np.ndarray


class AnchorCotangents:
    """Cotangents of anchors under a recipe.

    Args:
        recipe: target, method, sampling, hinge and seed.
        embeddings: f of every image, `[N D]`.
        labels: integer labels `[N]`, or None.
        mean: mean embedding `[D]`, for the centred target.

    The *discriminant* target measures the margin where the collection is alike in all directions,
    as Fisher's discriminant does, and asks what the images of a label share: with C the covariance
    of the embeddings and A = (C + tr(C) / D I)^-1, each image's is A times its margin's cotangent,
    taken through the norm at that image, and a label's the mean of its images'. These are at the
    head already: nothing is taken through the norm again, see `Recipe.head_norm`.
        given: the user's own triplets `[N S 2]`, with sampling "given".
    """

    def __init__(
        self,
        recipe: Recipe,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        mean: np.ndarray,
        given: np.ndarray | None = None,
    ) -> None:
        self.recipe, self.embeddings, self.mean, self.given = recipe, embeddings, mean, given
        self.sampler: TripletSampler | None = None
        takes = recipe.sampling == "given" and recipe.resolved_target == "margin"
        if (given is not None) != takes:
            raise InputError(
                "an array of triplets goes with target 'margin' and sampling 'given', and with "
                "nothing else; give both or neither"
            )
        if given is not None:
            # All of them, once: a look at every triplet for every batch would take hours.
            given_triplets(np.arange(0), given, len(embeddings))
        if recipe.resolved_target in ("margin", "discriminant") and given is None:
            self.sampler = TripletSampler(
                embeddings,
                labels,
                nearest_others(embeddings),
                sampling=recipe.resolved_sampling,
                n_triplets=recipe.n_triplets,
                margin=recipe.margin,
                seed=recipe.seed,
            )

    def of(self, anchors: np.ndarray) -> Cotangents:
        """Cotangents of the anchors at positions `[a]`."""
        anchors = np.asarray(anchors, np.int64)
        if self.recipe.resolved_target == "centred":
            values = centred_cotangent(np.asarray(self.embeddings[anchors]), self.mean)
            return Cotangents(values, None, np.ones(len(anchors), np.int64))
        if self.recipe.resolved_target == "discriminant":
            return self._shared(anchors)
        if self.sampler is not None and self.recipe.resolved_sampling == "all":
            difference, counts = self.sampler.mean_difference(anchors)
            return Cotangents(2 * difference, None, counts)
        return self._of_triplets(self._triplets(anchors))

    def _shared(self, anchors: np.ndarray) -> Cotangents:
        """The discriminant target: what the images of each anchor's label share."""
        assert self.sampler is not None
        classes = self.sampler.classes
        counts = self.sampler.mean_difference(anchors)[1]
        if classes is None:
            return Cotangents(self._whitened(anchors).astype(np.float32), None, counts)
        codes = classes.codes[anchors]
        sizes = classes.sizes[codes]
        values = np.empty((len(anchors), self.embeddings.shape[1]))
        shared = sizes > 1
        sums = self._class_sums[classes.shared[codes[shared]]]
        values[shared] = sums / sizes[shared][:, None]
        values[~shared] = self._whitened(anchors[~shared])
        return Cotangents(values.astype(np.float32), None, counts)

    def _whitened(self, places: np.ndarray) -> np.ndarray:
        """A times the margin's cotangent, through the norm where there is one, `[n D]` float64."""
        assert self.sampler is not None
        difference = self.sampler.mean_difference(places)[0].astype(np.float64)
        found: np.ndarray = 2 * difference @ self._whitening
        if self.recipe.norm == "around":
            return found
        own = np.asarray(self.embeddings[places], np.float64)
        lengths = (own * own).sum(1, keepdims=True)
        unit = np.abs(lengths - 1) < _UNIT
        return found - unit * own * (own * found).sum(1, keepdims=True)

    @cached_property
    def _class_sums(self) -> np.ndarray:
        """Sums of the whitened cotangents over the images of each shared label, `[L D]`."""
        assert self.sampler is not None
        assert self.sampler.classes is not None
        return self.sampler.classes.sums(self._whitened, self.embeddings.shape[1])

    @cached_property
    def _whitening(self) -> np.ndarray:
        """A = (C + tr(C) / D I)^-1, `[D D]`; without any spread the identity."""
        n, width = self.embeddings.shape
        total, squares = np.zeros(width), np.zeros((width, width))
        for start in range(0, n, _BLOCK):
            block = np.asarray(self.embeddings[start : start + _BLOCK], np.float64)
            total += block.sum(0)
            squares += block.T @ block
        covariance = squares / n - np.outer(total, total) / n**2
        spread = float(np.trace(covariance)) / width
        if spread <= 1e-12 * float(np.trace(squares)) / n / width:
            return np.eye(width)
        return np.linalg.inv(covariance + spread * np.eye(width))

    def _triplets(self, anchors: np.ndarray) -> Triplets:
        if self.sampler is not None:
            return self.sampler.draw(anchors)
        assert self.given is not None
        pairs = np.asarray(self.given[anchors], np.int64)
        return Triplets(anchors, pairs[..., 0], pairs[..., 1])

    def _of_triplets(self, triplets: Triplets) -> Cotangents:
        used = np.ones(triplets.positives.shape, bool)
        if self.recipe.hinge:
            used = active(triplets, self.embeddings, self.recipe.margin)
        counts = used.sum(1)
        positives = np.asarray(self.embeddings[triplets.positives])
        negatives = np.asarray(self.embeddings[triplets.negatives])
        if self.recipe.per_triplet:
            return Cotangents(margin_cotangent(positives, negatives), used, counts)
        share = (used / np.maximum(counts, 1)[:, None]).astype(positives.dtype)[:, None]
        return Cotangents(
            margin_cotangent((share @ positives)[:, 0], (share @ negatives)[:, 0]), None, counts
        )


def nearest_others(embeddings: np.ndarray) -> Nearest:
    """Finds the nearest images of anchors among embeddings `[N D]`, themselves left out."""

    def find(anchors: np.ndarray, k: int) -> np.ndarray:
        found = nearest(embeddings, np.asarray(embeddings[anchors]), k + 1).positions
        # A duplicate may stand before the anchor itself, or push it out of the list.
        rows = zip(anchors, found, strict=True)
        return np.stack([row[row != anchor][:k] for anchor, row in rows])

    return find
