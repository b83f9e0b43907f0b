"""Which triplets explain an anchor: sampling, and exact means over all of them. Arrays only.

Draws are made for fixed blocks of anchors from generators seeded by (seed, block), so that an
anchor's triplets do not depend on batches, on workers, or on where a killed build resumed.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError, RecipeError
from ..recipe.choices import SAMPLINGS
from .classes import Classes

BLOCK = 1024
"""Anchors that share a generator."""
N_POSITIVES = 10
"""Without labels (or alone in a class): positives are drawn from this many nearest images."""
N_EXCLUDED = 100
"""Without labels: negatives are drawn from outside this many nearest images."""
N_HARD = 50
"""`hard`: negatives are drawn from this many nearest images of other labels."""

Nearest = Callable[[np.ndarray, int], np.ndarray]
"""(anchor positions [a], k) -> positions [a k] of each anchor's nearest other images, in order."""


@dataclass(frozen=True)
class Triplets:
    """Positions of positives and negatives, `[a S]` int64 each, for the anchors `[a]`."""

    anchors: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray


class TripletSampler:
    """Draws S triplets for each anchor.

    Args:
        embeddings: `[N D]` of every image that may be drawn.
        labels: integer labels `[N]`, or None: then nearness stands in for them.
        sampling: "random" (with replacement), "semihard" (D(a,p) < D(a,n) < D(a,p) + margin, else
            the nearest beyond; Schroff et al. 2015), "hard" (negatives from the 50 nearest images
            of other labels) or "all" (no draw: `mean_difference` is exact).
        n_triplets: S, >= 1.
        margin: of semihard.
        seed: of every draw.
        nearest: finds neighbours; asked only where needed.

    Raises:
        InputError: too few images, or a single class.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        nearest: Nearest,
        *,
        sampling: str = "random",
        n_triplets: int = 50,
        margin: float = 0.2,
        seed: int = 0,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise RecipeError(
                f"sampling {sampling!r} is unknown; use one of {', '.join(SAMPLINGS)}"
            )
        if n_triplets < 1:
            raise InputError(f"{n_triplets} triplets an image: give at least 1")
        if len(embeddings) < 3:
            raise InputError(
                f"{len(embeddings)} images are too few for triplets, which take an anchor, a "
                "positive and a negative; give at least 3, or use the target 'centred'"
            )
        if labels is not None and np.shape(labels) != (len(embeddings),):
            raise InputError(
                f"{len(embeddings)} embeddings came with labels of shape {list(np.shape(labels))}; "
                f"expected [{len(embeddings)}]"
            )
        self.embeddings, self.nearest = embeddings, nearest
        self.sampling, self.n_triplets = sampling, n_triplets
        self.margin, self.seed = margin, seed
        self.classes = None if labels is None else Classes(np.asarray(labels))
        if self.classes is not None and len(self.classes.sizes) == 1:
            raise InputError(
                f"all {len(embeddings)} images have one label, so there are no negatives; give "
                "images of at least two labels, build without labels, or use the target 'centred'"
            )

    def draw(self, anchors: np.ndarray) -> Triplets:
        """S triplets for each anchor position `[a]`; the same for an anchor in whatever company."""
        anchors = np.asarray(anchors, np.int64)
        uniform = self._uniform(anchors)
        positives = self._positives(anchors, uniform[..., 0])
        if self.sampling == "semihard":
            negatives = self._semihard(anchors, positives, uniform[..., 1])
        elif self.sampling == "hard":
            negatives = self._hard(anchors, uniform[..., 1])
        else:
            negatives = self._random_negatives(anchors, uniform[..., 1])
        return Triplets(anchors, positives, negatives)

    def mean_difference(
        self, anchors: np.ndarray, borrowed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean of f_p - f_n over *every* possible triplet, in closed form from class sums.

        Args:
            anchors: positions `[a]`.
            borrowed: b: the mean positive of an anchor in a label of n <= b images, 1 < n, is
                (b - n + 1) / 2b the mean of its nearest images, and the rest the label's.

        Returns:
            The means `[a D]` float32, and how many triplets each stands for, `[a]` int64.
        """
        anchors = np.asarray(anchors, np.int64)
        total = self._total
        n = len(self.embeddings)
        if self.classes is None:
            near, far = self._neighbourhoods(anchors)
            outside = n - 1 - far.shape[1]
            own = np.asarray(self.embeddings[anchors], np.float64)
            p_mean = self._gathered_mean(near)
            n_sum = total - own - far.shape[1] * self._gathered_mean(far)
            counts = np.full(len(anchors), near.shape[1] * outside)
            return (p_mean - n_sum / outside).astype(np.float32), counts
        codes = self.classes.codes[anchors]
        sizes = self.classes.sizes[codes]
        own = np.asarray(self.embeddings[anchors], np.float64)
        sums, shared = own.copy(), sizes > 1
        sums[shared] = self._class_sums[self.classes.shared[codes[shared]]]
        p_mean = np.divide(
            sums - own, (sizes - 1)[:, None], out=np.zeros_like(own), where=sizes[:, None] > 1
        )
        few = (sizes > 1) & (sizes <= borrowed)
        if few.any():
            share = ((borrowed - sizes[few] + 1) / (2 * borrowed))[:, None]
            near = self._gathered_mean(self._lonely_positives(anchors[few]))
            p_mean[few] += share * (near - p_mean[few])
        n_count = n - sizes
        found = (p_mean - (total - sums) / n_count[:, None]).astype(np.float32)
        counts = (sizes - 1) * n_count
        alone = sizes == 1
        if alone.any():
            found[alone], counts[alone] = self._lonely_difference(anchors[alone])
        return found, counts

    def labelled(self, anchors: np.ndarray) -> np.ndarray:
        """Which anchors have positives and negatives by their labels, `[a]` booleans."""
        if self.classes is None:
            return np.zeros(len(anchors), bool)
        found: np.ndarray = self.classes.sizes[self.classes.codes[anchors]] > 1
        return found

    def _lonely_difference(self, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`mean_difference` of images that no label gives positives."""
        near = self._lonely_positives(anchors)
        p_mean, count = self._gathered_mean(near), near.shape[1]
        outside = len(self.embeddings) - 1 - count
        own = np.asarray(self.embeddings[anchors], np.float64)
        n_sum = self._total - own - count * p_mean
        return (p_mean - n_sum / outside).astype(np.float32), np.full(len(near), count * outside)

    def _uniform(self, anchors: np.ndarray) -> np.ndarray:
        """Numbers in [0, 1), `[a S 2]`, from the generator of each anchor's block."""
        drawn = np.empty((len(anchors), self.n_triplets, 2))
        blocks = anchors // BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            generator = np.random.Generator(np.random.Philox(key=[self.seed, int(block)]))
            # Anchor after anchor, so that the first rows do not depend on how many follow.
            last = int(anchors[here].max()) % BLOCK + 1
            rows = generator.random((last, self.n_triplets, 2))
            drawn[here] = rows[anchors[here] % BLOCK]
        return drawn

    def _positives(self, anchors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        if self.classes is None:
            near, _ = self._neighbourhoods(anchors)
            return np.take_along_axis(near, pick(uniform, near.shape[1]), axis=1)
        codes = self.classes.codes[anchors]
        others = self.classes.sizes[codes] - 1
        step = pick(uniform, np.maximum(others, 1)[:, None])
        step += step >= self.classes.ranks[anchors][:, None]
        step = np.minimum(step, others[:, None])
        positives = self.classes.order[self.classes.starts[codes][:, None] + step]
        alone = others == 0
        if alone.any():
            near = self._lonely_positives(anchors[alone])
            chosen = np.take_along_axis(near, pick(uniform[alone], near.shape[1]), axis=1)
            positives[alone] = chosen
        return positives

    def _random_negatives(self, anchors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        n = len(self.embeddings)
        if self.classes is None:
            _, far = self._neighbourhoods(anchors)
            return outside(uniform, np.concatenate([anchors[:, None], far], axis=1), n)
        codes = self.classes.codes[anchors]
        start, size = self.classes.starts[codes][:, None], self.classes.sizes[codes][:, None]
        step = pick(uniform, n - size)
        negatives = self.classes.order[step + np.where(step >= start, size, 0)]
        alone = size[:, 0] == 1
        if alone.any():
            near = self._lonely_positives(anchors[alone])
            excluded = np.concatenate([anchors[alone][:, None], near], axis=1)
            negatives[alone] = outside(uniform[alone], excluded, n)
        return negatives

    def _hard(self, anchors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        negatives = np.empty(uniform.shape, np.int64)
        for row, distances, candidates in self._candidates(anchors):
            count = min(N_HARD, len(candidates))
            nearest = _nearest_of(distances[candidates], count)
            negatives[row] = candidates[nearest][pick(uniform[row], count)]
        return negatives

    def _semihard(
        self, anchors: np.ndarray, positives: np.ndarray, uniform: np.ndarray
    ) -> np.ndarray:
        negatives = np.empty(uniform.shape, np.int64)
        for row, distances, candidates in self._candidates(anchors):
            to_negatives = distances[candidates]
            to_positives = distances[positives[row]]
            ranked = np.sort(to_negatives)
            first = np.searchsorted(ranked, to_positives, side="right")
            beyond = np.searchsorted(ranked, to_positives + self.margin, side="left")
            # An empty window is widened to the nearest beyond; past the last, to the farthest.
            first = np.minimum(first, len(ranked) - 1)
            width = np.maximum(beyond - first, 1)
            ranks = first + pick(uniform[row], width)
            negatives[row] = candidates[_at_rank(to_negatives, ranked, ranks)]
        return negatives

    def _candidates(self, anchors: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each anchor: its row, its squared distance to every image, and its negatives."""
        everything = np.asarray(self.embeddings)
        for row, anchor in enumerate(anchors):
            # One product an anchor, so that its rounding does not depend on the others' company.
            squares = self._squares
            distances = squares + squares[anchor] - 2 * (everything @ everything[anchor])
            yield row, np.maximum(distances, 0), self._negatives_of(anchors[row : row + 1])

    def _negatives_of(self, anchor: np.ndarray) -> np.ndarray:
        """All negatives of one anchor `[1]`, rising."""
        keep = np.ones(len(self.embeddings), bool)
        keep[anchor] = False
        if self.classes is None:
            keep[self._neighbourhoods(anchor)[1][0]] = False
        elif not self.labelled(anchor)[0]:
            keep[self._lonely_positives(anchor)[0]] = False
        else:
            keep &= self.classes.codes != self.classes.codes[anchor[0]]
        return np.flatnonzero(keep)

    def _neighbourhoods(self, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without labels: the images positives come from, and those no negative comes from.

        Small sets have smaller neighbourhoods: at least half of the other images stay negatives.
        """
        n = len(self.embeddings)
        near = max(1, min(N_POSITIVES, (n - 1) // 3))
        far = max(near, min(N_EXCLUDED, (n - 1) // 2))
        found = self.nearest(anchors, far)
        return found[:, :near], found

    def _lonely_positives(self, anchors: np.ndarray) -> np.ndarray:
        """Positives of an image alone in its class: its nearest images, whatever their label."""
        n = len(self.embeddings)
        return self.nearest(anchors, max(1, min(N_POSITIVES, (n - 1) // 3)))

    def _gathered_mean(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self.embeddings[positions], np.float64).mean(axis=1)

    @cached_property
    def _squares(self) -> np.ndarray:
        return np.einsum("nd,nd->n", self.embeddings, self.embeddings)

    @cached_property
    def _total(self) -> np.ndarray:
        return self.embeddings.sum(axis=0, dtype=np.float64)

    @cached_property
    def _class_sums(self) -> np.ndarray:
        assert self.classes is not None
        return self.classes.sums(lambda rows: self.embeddings[rows], self.embeddings.shape[1])


def given_triplets(anchors: np.ndarray, pairs: np.ndarray, n_images: int) -> Triplets:
    """Triplets from the user's own array.

    Args:
        anchors: positions `[a]`.
        pairs: `[N S 2]` positions of (positive, negative) for every image.
        n_images: N.

    Raises:
        InputError: wrong shape, positions out of range, or an anchor that is its own positive or
            negative.
    """
    pairs = np.asarray(pairs)
    if pairs.ndim != 3 or pairs.shape[0] != n_images or pairs.shape[2] != 2 or not pairs.shape[1]:
        raise InputError(
            f"the triplets have shape {list(pairs.shape)}; expected [{n_images} S 2]: the "
            "positions of a positive and a negative for each of S triplets of every image"
        )
    if pairs.dtype.kind not in "iu" or pairs.min() < 0 or pairs.max() >= n_images:
        raise InputError(f"triplets must be whole numbers from 0 to {n_images - 1}")
    if (pairs == np.arange(n_images)[:, None, None]).any():
        own = int(np.flatnonzero((pairs == np.arange(n_images)[:, None, None]).any((1, 2)))[0])
        raise InputError(f"image {own} is its own positive or negative; name two other images")
    if (same := (pairs[..., 0] == pairs[..., 1]).any(1)).any():
        raise InputError(
            f"image {int(np.flatnonzero(same)[0])} has a triplet whose positive is its negative, "
            "which says nothing; name two different images"
        )
    chosen = pairs[anchors].astype(np.int64)
    return Triplets(np.asarray(anchors, np.int64), chosen[..., 0], chosen[..., 1])


def pairs_digest(pairs: np.ndarray) -> str:
    """SHA-256 of given triplets `[N S 2]`, whatever type of whole numbers they are kept in."""
    pairs = np.asarray(pairs)
    digest = hashlib.sha256(repr(pairs.shape).encode())
    for start in range(0, len(pairs), 1 << 14):
        digest.update(pairs[start : start + (1 << 14)].astype("<i8").tobytes())
    return digest.hexdigest()


def active(triplets: Triplets, embeddings: np.ndarray, margin: float) -> np.ndarray:
    """Triplets whose hinge is *not* satisfied: D(a,p) - D(a,n) + margin > 0, `[a S]` booleans.

    The others have zero gradient; they are no evidence and must not be averaged in.
    """
    anchors = np.asarray(embeddings[triplets.anchors])[:, None]
    to_positives = _squared(anchors, np.asarray(embeddings[triplets.positives]))
    to_negatives = _squared(anchors, np.asarray(embeddings[triplets.negatives]))
    return to_positives - to_negatives + margin > 0


def pick(uniform: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) to whole numbers in 0 .. count - 1."""
    return np.minimum((uniform * count).astype(np.int64), np.asarray(count) - 1)


def _nearest_of(distances: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` smallest distances, ties by place, without sorting the others."""
    kth = np.partition(distances, count - 1)[count - 1]
    within = np.flatnonzero(distances <= kth)
    return within[np.argsort(distances[within], kind="stable")[:count]]


def _at_rank(distances: np.ndarray, ranked: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Places of the distances of these ranks, ties by place, `ranked` being all of them sorted."""
    values = ranked[ranks]
    # Sorting numbers alone is many times faster than sorting places by them.
    tied = ranks - np.searchsorted(ranked, values, side="left")
    pairs = zip(values, tied, strict=True)
    return np.array([np.flatnonzero(distances == value)[k] for value, k in pairs], np.int64)


def outside(uniform: np.ndarray, excluded: np.ndarray, n: int) -> np.ndarray:
    """Uniform picks from 0 .. n - 1 without each row's excluded positions."""
    excluded = np.sort(excluded, axis=1)
    picks = pick(uniform, n - excluded.shape[1])
    # The k-th free position is k plus the number of excluded ones at or before it.
    free_before = excluded - np.arange(excluded.shape[1])
    jumps = np.stack(
        [
            np.searchsorted(row, pick, side="right")
            for row, pick in zip(free_before, picks, strict=True)
        ]
    )
    return picks + jumps


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
    return np.einsum("...d,...d->...", difference, difference)
