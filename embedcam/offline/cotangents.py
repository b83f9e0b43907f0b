"""The cotangent of each anchor under a recipe: from cached embeddings alone, no forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..images.number_labels import label_values
from ..images.progress import SILENT, Advance, Stage, in_passes
from ..index.arrays import Told
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
    Classes,
    NearestOthers,
    TripletSampler,
    active,
    check_given,
    label_codes,
    squares_of,
)


def coded_labels(
    recipe: Recipe, labels: Sequence[str | None], names: Sequence[str]
) -> np.ndarray | None:
    """Return integer codes of classes, or float64 numbers, `[N]`; `names` are for an InputError."""
    if recipe.labels == "numbers":
        return label_values(labels, names)
    return label_codes(labels)


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

    What is reduced over all images is `statistics()`, which another process may have computed: with
    it, an anchor that needs no neighbors is looked at alone. Sums that are too large to hold lie in
    a file in `folder`.
    """

    def __init__(
        self,
        recipe: Recipe,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        mean: np.ndarray,
        given: np.ndarray | None = None,
        statistics: Mapping[str, np.ndarray] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.recipe, self.embeddings, self.mean = recipe, embeddings, mean
        self._given, target = given, recipe.resolved_target
        if (given is not None) != (recipe.sampling == "given" and target == "margin"):
            raise InputError(
                "an array of triplets goes with target 'margin' and sampling 'given', and with "
                "nothing else; give both or neither"
            )
        if given is not None:
            # All of them, once: a look at every triplet for every batch would take hours.
            check_given(given, len(embeddings))
        elif target != "centred":
            of = (embeddings, labels, NearestOthers(embeddings), recipe)
            self.sampler = TripletSampler(*of, statistics, folder)
        self._statistics = {} if statistics is None else dict(statistics)
        if statistics is not None:
            shapes = {name: array.shape for name, array in statistics.items()}
            if shapes != (expected := self._shapes()):
                raise InputError(
                    f"the statistics have the shapes {shapes}; those of these images have "
                    f"{expected}: reduce them again"
                )

    def statistics(self, stage: Stage = SILENT) -> dict[str, np.ndarray]:
        """Return what anchors need of all images, by name; computed where it was not given.

        Of the embeddings f: "total" `[D]`, their sum; "squares" `[D D]`, that of f f^T;
        "class_sums" `[C D]`, over the images of each label that several share; and "label_sums"
        `[C D]`, of whitened cotangents over the same. All float64, over fixed blocks of images in
        order: the same bytes wherever they are computed. What a recipe does not need is left out.
        """
        if not (shapes := self._shapes()):
            return {}
        with stage("reduce", len(self.embeddings)) as progressed:
            each = in_passes(progressed, len(shapes))
            return {name: self._reduced(name, each) for name in shapes}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the statistics that the recipe needs."""
        target, drawn = self.recipe.resolved_target, self.recipe.resolved_sampling != "all"
        whitened = target in WHITENED
        if self._given is not None or target == "centred" or (drawn and not whitened):
            return {}
        width, groups = self.embeddings.shape[1], self.sampler.groups
        shapes: dict[str, tuple[int, ...]] = {"total": (width,)}
        if whitened:
            shapes["squares"] = (width, width)
        if isinstance(groups, Classes):
            n_shared = int(groups.shared.max(initial=-1)) + 1
            names = ("class_sums", "label_sums") if whitened else ("class_sums",)
            shapes |= dict.fromkeys(names, (n_shared, width))
        return shapes

    def _reduced(self, name: str, progressed: Advance = lambda _: None) -> np.ndarray:
        if name not in self._statistics:
            if name == "squares":
                self._statistics[name] = squares_of(Told(self.embeddings, progressed))
            elif name == "label_sums":
                amounts = self._amounts(labelled=True)
                sums = self.sampler.summed(lambda some: self._margins(some, amounts)[0], progressed)
                self._statistics[name] = sums
            else:
                self._statistics[name] = getattr(self.sampler, name)
                progressed(len(self.embeddings))
        return self._statistics[name]

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
        codes, sums = classes.codes[anchors], self._reduced("label_sums")
        means = sums[classes.shared[codes]] / classes.sizes[codes][:, None]
        n_near, n_far = self.sampler.labelled_counts(anchors)
        return means, n_near * n_far

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
        n, ridge = len(self.embeddings), self._amounts(labelled=True).ridge
        return whitening(self._reduced("squares") / n, self._reduced("total") / n, ridge)
