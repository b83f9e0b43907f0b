"""The cotangent of each anchor under a recipe: from cached embeddings alone, no forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError
from ..images.number_labels import label_values
from ..recipe import WHITENED
from ..recipe.recipe import Recipe
from ..targets import (
    Whitened,
    centred_cotangent,
    margin_cotangent,
    whitened_cotangent,
    whitening,
    with_own,
)
from .triplets import Classes, NearestOthers, TripletSampler, active, check_given, label_codes

_BLOCK = 1 << 14


def coded_labels(
    recipe: Recipe, labels: Sequence[str | None], names: Sequence[str]
) -> np.ndarray | None:
    """Return integer codes of classes, or float64 numbers, `[N]`; `names` are for an InputError."""
    if recipe.labels == "numbers":
        return label_values(labels, names)
    return label_codes(list(labels))


@dataclass(frozen=True)
class Cotangents:
    """What a batch of anchors is differentiated along, at the embedding f.

    `values` are `[a D]`, the mean over the triplets that count, or `[a S D]`, one a triplet, with
    `used` `[a S]`; `counts` `[a]` are how many count; with the centred target 1.
    """

    values: np.ndarray
    used: np.ndarray | None
    counts: np.ndarray


class AnchorCotangents:
    """Cotangents of anchors under a recipe, from all embeddings f `[N D]` and their mean `[D]`.

    `labels` are as `coded_labels` gives them, `given` the user's own triplets `[N S 2]`.

    *Whitened* targets measure the margin where the collection is alike in all directions, as
    Fisher's discriminant does: with C the covariance of the embeddings and
    A = (C + r tr(C) / D I)^-1, an image's is A times its margin's cotangent, less a share j of what
    the norm's Jacobian takes away. With r, j and the other amounts from `Whitened`:

    - *discriminant*: the mean of these over the images of a label.
    - *distinctive*, the default: that mean at length 1, plus 0.2 of the image's own centered
      direction f - mean(f) at length 1. An image alone in its label or without one asks what its
      nearest images share, plus 1.5 of its own direction; small labels borrow from their nearest.

    Of labels that are numbers, the image's own stands in place of a label's mean. These cotangents
    are at the head already: nothing is taken through the norm again, see `Recipe.head_norm`. The
    numbers were chosen on three sets of photographs, see docs/results/frontier.md.
    """

    def __init__(
        self,
        recipe: Recipe,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        mean: np.ndarray,
        given: np.ndarray | None = None,
    ) -> None:
        self.recipe, self.embeddings, self.mean = recipe, embeddings, mean
        self._given, target = given, recipe.resolved_target
        # Sums of the whitened cotangents over the images of each shared label, `[L D]`.
        self._label_sums: np.ndarray | None = None
        if (given is not None) != (recipe.sampling == "given" and target == "margin"):
            raise InputError(
                "an array of triplets goes with target 'margin' and sampling 'given', and with "
                "nothing else; give both or neither"
            )
        if given is not None:
            # All of them, once: a look at every triplet for every batch would take hours.
            check_given(given, len(embeddings))
        elif target != "centred":
            self.sampler = TripletSampler(embeddings, labels, NearestOthers(embeddings), recipe)

    def of(self, anchors: np.ndarray) -> Cotangents:
        """Return the cotangents of the anchors at positions `[a]`."""
        anchors, target = np.asarray(anchors, np.int64), self.recipe.resolved_target
        if target == "centred":
            values = centred_cotangent(np.asarray(self.embeddings[anchors]), self.mean)
            return Cotangents(values, None, np.ones(len(anchors), np.int64))
        if self._given is not None:
            return self._of_pairs(anchors, np.asarray(self._given[anchors], np.int64))
        if target in WHITENED:
            return self._whitened(anchors)
        if self.recipe.resolved_sampling == "all":
            difference, counts = self.sampler.mean_difference(anchors)
            return Cotangents(2 * difference, None, counts)
        return self._of_pairs(anchors, self.sampler.draw(anchors))

    def _of_pairs(self, anchors: np.ndarray, pairs: np.ndarray) -> Cotangents:
        used = np.ones(pairs.shape[:2], bool)
        if self.recipe.hinge:
            used = active(anchors, pairs, self.embeddings, self.recipe.margin)
        counts = used.sum(1)
        positives, negatives = (np.asarray(self.embeddings[pairs[..., side]]) for side in (0, 1))
        if self.recipe.per_triplet:
            return Cotangents(margin_cotangent(positives, negatives), used, counts)
        share = (used / np.maximum(counts, 1)[:, None]).astype(positives.dtype)[:, None]
        means = (share @ positives)[:, 0], (share @ negatives)[:, 0]
        return Cotangents(margin_cotangent(*means), None, counts)

    def _whitened(self, anchors: np.ndarray) -> Cotangents:
        counts = np.empty(len(anchors), np.int64)
        values = np.empty((len(anchors), self.embeddings.shape[1]))
        labelled = self.sampler.labelled(anchors)
        for shared in np.unique(labelled):
            rows, amounts = labelled == shared, self._amounts(labelled=bool(shared))
            places, of = anchors[rows], self._of_labels if shared else self._margins
            values[rows], counts[rows] = of(places, amounts)
            if self.recipe.resolved_target == "distinctive":
                centred = centred_cotangent(np.asarray(self.embeddings[places]), self.mean)
                values[rows] = with_own(values[rows], centred, amounts.own)
        return Cotangents(values.astype(np.float32), None, counts)

    def _of_labels(self, anchors: np.ndarray, amounts: Whitened) -> tuple[np.ndarray, np.ndarray]:
        """Return what images of each anchor's label share, `[a D]`, and of how many triplets."""
        classes = self.sampler.groups
        if not isinstance(classes, Classes):
            return self._margins(anchors, amounts)
        if self._label_sums is None:
            width = self.embeddings.shape[1]
            self._label_sums = classes.sums(lambda some: self._margins(some, amounts)[0], width)
        codes = classes.codes[anchors]
        means = self._label_sums[classes.shared[codes]] / classes.sizes[codes][:, None]
        return means, self.sampler.mean_difference(anchors)[1]

    def _amounts(self, *, labelled: bool) -> Whitened:
        return Whitened.of(self.recipe.resolved_target, self.recipe.norm, labelled)

    def _margins(self, places: np.ndarray, amounts: Whitened) -> tuple[np.ndarray, np.ndarray]:
        """Return A times the margin's cotangent, `[n D]` float64, and of how many triplets."""
        difference, counts = self.sampler.mean_difference(places, amounts.borrowed)
        own = np.asarray(self.embeddings[places])
        return whitened_cotangent(2 * difference, own, self._matrix, amounts.jacobian), counts

    @cached_property
    def _matrix(self) -> np.ndarray:
        """A of all embeddings, `[D D]`."""
        n, width = self.embeddings.shape
        total, squares = np.zeros(width), np.zeros((width, width))
        for start in range(0, n, _BLOCK):
            block = np.asarray(self.embeddings[start : start + _BLOCK], np.float64)
            total += block.sum(0)
            squares += block.T @ block
        return whitening(squares / n, total / n, self._amounts(labelled=True).ridge)
