"""The cotangent of each anchor under a recipe: from cached embeddings alone, no forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from .triplets import (
    NearestOthers,
    NumberSampler,
    Triplets,
    TripletSampler,
    active,
    check_given,
    label_codes,
)

_BLOCK = 1 << 14


def coded_labels(
    recipe: Recipe, labels: Sequence[str | None], names: Sequence[str]
) -> np.ndarray | None:
    """Return integer codes of classes `[N]`, or numbers, float64 `[N]`, as the recipe takes them.

    `names` are the images', for the InputError of a label that should be a number and is none.
    """
    if recipe.labels == "numbers":
        return label_values(labels, names)
    return label_codes(list(labels))


@dataclass(frozen=True)
class Cotangents:
    """What a batch of anchors is differentiated along, at the embedding f.

    `values` are `[a D]`, the mean over the triplets that count, or `[a S D]`, one a triplet, with
    `used` `[a S]`; `counts` are the triplets that count, `[a]`; with the centred target 1.
    """

    values: np.ndarray
    used: np.ndarray | None
    counts: np.ndarray


class AnchorCotangents:
    """Cotangents of anchors under a recipe, from all embeddings f `[N D]` and their mean `[D]`.

    `labels` are as `coded_labels` gives them, `given` the user's own triplets `[N S 2]`.

    The *whitened* targets measure the margin where the collection is alike in all directions, as
    Fisher's discriminant does: with C the covariance of the embeddings and
    A = (C + r tr(C) / D I)^-1, an image's is A times its margin's cotangent, less a share j of what
    the norm's Jacobian takes away (j = 1 is through the norm, 0 around it).

    - *discriminant*: r = 1, j = 1, and the mean of these over the images of a label.
    - *distinctive*, the default: r = 10, j = 1/2, the mean over the images of a label scaled to
      length 1, plus 0.2 of the image's own centred direction f - mean(f) at length 1, so that
      every image has an answer of its own. An image alone in its label or without one asks what its
      nearest images share, at j = 1, plus 1.5 of its own direction. A label of n <= 10 images
      borrows: its images' positives are (10 - n + 1) / 20 their nearest images, whatever those are.

    Of labels that are numbers no two images need share one: in place of a label's mean stands the
    image's own, of the images near it and far from it in value.

    Norm "around" sets j to 0. These cotangents are at the head already: nothing is taken through
    the norm again, see `Recipe.head_norm`. The numbers were chosen on three sets of photographs,
    see docs/results/frontier.md.
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
        self._of: Callable[[np.ndarray], Cotangents]
        target = recipe.resolved_target
        if (given is not None) != (recipe.sampling == "given" and target == "margin"):
            raise InputError(
                "an array of triplets goes with target 'margin' and sampling 'given', and with "
                "nothing else; give both or neither"
            )
        if target == "centred":
            self._of = self._centred
        elif given is not None:
            # All of them, once: a look at every triplet for every batch would take hours.
            check_given(given, len(embeddings))
            self._pairs, self._of = given, self._of_given
        else:
            self.sampler = _sampler(recipe, embeddings, labels)
            if target in WHITENED:
                self._of = self._whitened
            else:
                exact = recipe.resolved_sampling == "all"
                self._of = self._of_all if exact else self._of_drawn

    def of(self, anchors: np.ndarray) -> Cotangents:
        """Return the cotangents of the anchors at positions `[a]`."""
        return self._of(np.asarray(anchors, np.int64))

    def _centred(self, anchors: np.ndarray) -> Cotangents:
        values = centred_cotangent(np.asarray(self.embeddings[anchors]), self.mean)
        return Cotangents(values, None, np.ones(len(anchors), np.int64))

    def _of_all(self, anchors: np.ndarray) -> Cotangents:
        difference, counts = self.sampler.mean_difference(anchors)
        return Cotangents(2 * difference, None, counts)

    def _of_drawn(self, anchors: np.ndarray) -> Cotangents:
        return self._of_triplets(self.sampler.draw(anchors))

    def _of_given(self, anchors: np.ndarray) -> Cotangents:
        pairs = np.asarray(self._pairs[anchors], np.int64)
        return self._of_triplets(Triplets(anchors, pairs[..., 0], pairs[..., 1]))

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

    def _whitened(self, anchors: np.ndarray) -> Cotangents:
        counts = np.empty(len(anchors), np.int64)
        values = np.empty((len(anchors), self.embeddings.shape[1]))
        labelled = self.sampler.labelled(anchors)
        if labelled.any():
            values[labelled], counts[labelled] = self._of_labels(anchors[labelled])
        alone = self._amounts(labelled=False)
        values[~labelled], counts[~labelled] = self._margins(anchors[~labelled], alone)
        if self.recipe.resolved_target == "distinctive":
            centred = centred_cotangent(np.asarray(self.embeddings[anchors]), self.mean)
            for of_label in (True, False):
                rows = labelled == of_label
                share = self._amounts(labelled=of_label).own
                values[rows] = with_own(values[rows], centred[rows], share)
        return Cotangents(values.astype(np.float32), None, counts)

    def _of_labels(self, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what images of each anchor's label share, `[a D]`, and of how many triplets."""
        if not self.sampler.by_class:
            return self._margins(anchors, self._amounts(labelled=True))
        classes = self.sampler.classes
        codes = classes.codes[anchors]
        sums = self._class_sums[classes.shared[codes]]
        counts = self.sampler.mean_difference(anchors)[1]
        return sums / classes.sizes[codes][:, None], counts

    def _amounts(self, *, labelled: bool) -> Whitened:
        return Whitened.of(self.recipe.resolved_target, self.recipe.norm, labelled)

    def _margins(self, places: np.ndarray, amounts: Whitened) -> tuple[np.ndarray, np.ndarray]:
        """Return A times the margin's cotangent, `[n D]` float64, and of how many triplets."""
        difference, counts = self.sampler.mean_difference(places, amounts.borrowed)
        own = np.asarray(self.embeddings[places])
        return whitened_cotangent(2 * difference, own, self._matrix, amounts.jacobian), counts

    @cached_property
    def _class_sums(self) -> np.ndarray:
        """Sums of the whitened cotangents over the images of each shared label, `[L D]`."""
        amounts = self._amounts(labelled=True)
        return self.sampler.classes.sums(
            lambda places: self._margins(places, amounts)[0], self.embeddings.shape[1]
        )

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


def _sampler(recipe: Recipe, embeddings: np.ndarray, labels: np.ndarray | None) -> TripletSampler:
    sampling: dict[str, Any] = {
        "sampling": recipe.resolved_sampling,
        "n_triplets": recipe.n_triplets,
        "margin": recipe.margin,
        "seed": recipe.seed,
    }
    nearest = NearestOthers(embeddings)
    if labels is None or recipe.labels == "classes":
        return TripletSampler(embeddings, labels, nearest, **sampling)
    shares = {"positives": recipe.positives, "negatives": recipe.negatives}
    return NumberSampler(embeddings, labels, nearest, **shares, **sampling)
