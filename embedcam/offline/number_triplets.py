"""Triplets of images whose labels are numbers: near ones are positives, far ones negatives."""

from functools import cached_property

import numpy as np

from ..images.number_labels import Values
from .triplets import Nearest, TripletSampler, outside, pick


class NumberSampler(TripletSampler):
    """Draws triplets, or takes the mean over all of them, by numbers in place of classes.

    Images without a number stand in no other image's triplets, and have their own as an image alone
    in its class does: the nearest images are their positives.

    Args:
        embeddings: `[N D]`.
        values: numbers `[N]`, NaN without one.
        nearest: finds neighbours, for images without a number.
        positives, negatives: shares of the labelled images, see `number_labels.Values`.
        sampling, n_triplets, margin, seed: as for `TripletSampler`.

    Raises:
        InputError: too few images, or fewer than two different numbers.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        values: np.ndarray,
        nearest: Nearest,
        *,
        positives: float,
        negatives: float,
        sampling: str = "random",
        n_triplets: int = 50,
        margin: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            embeddings, None, nearest,
            sampling=sampling, n_triplets=n_triplets, margin=margin, seed=seed,
        )  # fmt: skip
        self.values = Values(values, positives, negatives)

    def labelled(self, anchors: np.ndarray) -> np.ndarray:
        """See `TripletSampler.labelled`."""
        found: np.ndarray = self.values.ranks[anchors] >= 0
        return found

    def mean_difference(
        self, anchors: np.ndarray, borrowed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `TripletSampler.mean_difference`; from sums over intervals, nothing borrowed."""
        anchors = np.asarray(anchors, np.int64)
        found = np.empty((len(anchors), self.embeddings.shape[1]), np.float32)
        counts = np.empty(len(anchors), np.int64)
        known = self.labelled(anchors)
        if not known.all():
            found[~known], counts[~known] = self._lonely_difference(anchors[~known])
        ranks = self.values.ranks[anchors[known]]
        near, far = self.values.near[ranks], self.values.far[ranks]
        n_near = near[:, 1] - near[:, 0] - 1
        n_far = len(self.values.order) - (far[:, 1] - far[:, 0])
        p_sum = self._between(near) - np.asarray(self.embeddings[anchors[known]], np.float64)
        n_sum = self._sums[-1] - self._between(far)
        found[known] = p_sum / n_near[:, None] - n_sum / n_far[:, None]
        counts[known] = n_near * n_far
        return found, counts

    def _positives(self, anchors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        known, chosen = self.labelled(anchors), np.empty(uniform.shape, np.int64)
        ranks = self.values.ranks[anchors[known]][:, None]
        start, stop = np.split(self.values.near[ranks[:, 0]], 2, axis=1)
        place = start + pick(uniform[known], stop - start - 1)
        chosen[known] = self.values.order[place + (place >= ranks)]
        if not known.all():
            near = self._lonely_positives(anchors[~known])
            places = pick(uniform[~known], near.shape[1])
            chosen[~known] = np.take_along_axis(near, places, axis=1)
        return chosen

    def _random_negatives(self, anchors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        known, chosen = self.labelled(anchors), np.empty(uniform.shape, np.int64)
        start, stop = np.split(self.values.far[self.values.ranks[anchors[known]]], 2, axis=1)
        place = pick(uniform[known], len(self.values.order) - (stop - start))
        chosen[known] = self.values.order[place + np.where(place >= start, stop - start, 0)]
        if not known.all():
            near = self._lonely_positives(anchors[~known])
            excluded = np.concatenate([anchors[~known][:, None], near], axis=1)
            chosen[~known] = outside(uniform[~known], excluded, len(self.embeddings))
        return chosen

    def _negatives_of(self, anchor: np.ndarray) -> np.ndarray:
        rank = self.values.ranks[anchor[0]]
        if rank < 0:
            own = [anchor, self._lonely_positives(anchor)[0]]
            return np.setdiff1d(np.arange(len(self.embeddings)), np.concatenate(own))
        start, stop = self.values.far[rank]
        return np.sort(np.delete(self.values.order, slice(start, stop)))

    def _between(self, interval: np.ndarray) -> np.ndarray:
        """Sums of the embeddings whose ranks lie in each interval `[a 2]`, float64 `[a D]`."""
        found: np.ndarray = self._sums[interval[:, 1]] - self._sums[interval[:, 0]]
        return found

    @cached_property
    def _sums(self) -> np.ndarray:
        """Sums of the embeddings of all images before each rank, float64 `[n + 1, D]`."""
        ordered = np.asarray(self.embeddings[self.values.order])
        sums = np.zeros((len(ordered) + 1, ordered.shape[1]))
        np.cumsum(ordered, axis=0, dtype=np.float64, out=sums[1:])
        return sums
