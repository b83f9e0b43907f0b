"""Which triplets explain an anchor: sampling, and exact means over all of them. Arrays only.

Draws are made for fixed blocks of anchors from generators seeded by (seed, block), so that an
anchor's triplets do not depend on batches, on workers, or on where a killed build resumed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..images.number_labels import Values
from ..images.progress import Advance
from ..images.texts import LabelColumn
from ..index import Neighbors, nearest
from ..index.arrays import ArrayLike, scratch_array
from ..index.search import SLACK, in_batches, rank, without_itself
from ..recipe.recipe import Recipe

BLOCK = 1024
"""Anchors that share a generator."""
N_POSITIVES = 10
"""Without labels (or alone in a class): positives are drawn from this many nearest images."""
N_EXCLUDED = 100
"""Without labels: negatives are drawn from outside this many nearest images."""
N_HARD = 50
"""`hard`: negatives are drawn from this many nearest images of other labels."""
EXACT = 1 << 13
"""Images up to which every one is compared with all others for its nearest."""
LIST, PROBES, TRAINED, ROUNDS = 512, 16, 64, 10
"""Images a list, lists looked at, images a centroid is trained on, and rounds of it."""
SUMMED = 1 << 14
"""Images summed at once: fixed, and taken in order, so that whoever sums gives the same bytes."""
_ADDED = 1 << 14
_GATHERED = 1 << 20
"""Numbers of candidates' embeddings held at once."""

Nearest = Callable[[np.ndarray, int], np.ndarray]
"""(anchor positions [a], k) -> positions [a k] of each anchor's nearest other images, in order."""


def sample_of(ids: Sequence[str], seed: int, most: int) -> np.ndarray:
    """Choose which of n images stand for all: all, or `most` by a hash of their ids; rising places.

    An image's number is the first 8 bytes, big-endian, of BLAKE2b (of 8 bytes) over the seed in
    decimal, a zero byte and the id in UTF-8; the smallest are taken. So the same images are chosen
    in whatever order, and by however many processes, they are looked at.
    """
    n = len(ids)
    if n <= most:
        return np.arange(n)
    before, numbers = b"%d\0" % seed, np.empty(n, np.uint64)
    for start in range(0, n, SUMMED):
        names = ids[start : start + SUMMED]
        keys = (before + name.encode("utf-8", "surrogateescape") for name in names)
        digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
        numbers[start : start + len(names)] = np.frombuffer(digests, ">u8")
    last = np.partition(numbers, most - 1)[most - 1]
    below, equal = np.flatnonzero(numbers < last), np.flatnonzero(numbers == last)
    return np.sort(np.concatenate([below, equal[: most - len(below)]]))


class Classes:
    """Group images by label: `order` lists positions class by class.

    As in `Values`, `ranks` are the places in it of the images that share a label, -1 of others, and
    `near` is by rank the interval of its label, which is `far`, too: no negative lies in it.
    `shared` is each class's number among those of two images or more, -1 for an image alone.
    """

    def __init__(self, codes: np.ndarray) -> None:
        # The narrowest numbers: five for each image, held for a whole build.
        number = "int32" if len(codes) < 1 << 31 else "int64"
        self.codes = np.unique(codes, return_inverse=True)[1].astype(number)
        self.order = np.argsort(self.codes, kind="stable").astype(number)
        self.sizes = np.bincount(self.codes)
        ends = np.cumsum(self.sizes)
        of_rank = self.codes[self.order]
        intervals = np.stack([ends - self.sizes, ends], axis=1).astype(number)
        self.near = self.far = intervals[of_rank]
        self.ranks: np.ndarray = np.full(len(self.codes), -1, number)
        known = self.sizes[of_rank] > 1
        self.ranks[self.order[known]] = np.flatnonzero(known)
        self.shared = np.where(self.sizes > 1, np.cumsum(self.sizes > 1) - 1, -1)

    def sums(
        self,
        rows: Callable[[np.ndarray], np.ndarray],
        sums: np.ndarray,
        progressed: Advance = lambda _: None,
    ) -> np.ndarray:
        """Add `rows(positions)` `[b D]` to the `sums` of each shared class, `[C D]`."""
        # Images alone have none: a collection mostly without labels would take as many numbers as
        # its embeddings, in doubles.
        for start in range(0, len(self.codes), SUMMED):
            numbers = self.shared[self.codes[start : start + SUMMED]]
            if len(places := np.flatnonzero(numbers >= 0)):
                # One after the other, in order: the same sums for any division into blocks.
                np.add.at(sums, numbers[places], rows(start + places))
            progressed(len(numbers))
        return sums


def label_codes(labels: Sequence[str | None]) -> np.ndarray | None:
    """Return labels as integers `[N]`, one without a label a class of its own; None without any."""
    column = LabelColumn.of(labels).sorted()
    if not len(column.names):
        return None
    codes = column.codes.astype(np.int64)
    without = np.flatnonzero(codes < 0)
    codes[without] = len(column.names) + np.arange(len(without))
    return codes


def alone(labels: np.ndarray) -> np.ndarray:
    """Return which images are alone with their code, or have no number, `[N]` booleans."""
    return np.asarray(np.isnan(labels) if labels.dtype.kind == "f" else Classes(labels).ranks < 0)


class TripletSampler:
    """Draw a recipe's S triplets for each anchor, by labels `[N]` or, without them, by nearness.

    Labels are integer codes, or float numbers: near values are positives, far ones negatives, by
    the shares of `Values`. The sampling is "random" (with replacement), "semihard" (D(a,p) < D(a,n)
    < D(a,p) + margin, else the nearest beyond; Schroff et al. 2015), "hard" (negatives from the 50
    nearest images of other labels) or "all" (no draw: `mean_difference` is exact).

    Sums of all images that are known already are `statistics`, by name; sums that are too large to
    hold lie in a file in `folder`.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        labels: np.ndarray | None,
        nearest: Nearest,
        recipe: Recipe,
        statistics: Mapping[str, np.ndarray] | None = None,
        folder: Path | None = None,
    ) -> None:
        n, self._statistics, self._folder = len(embeddings), statistics or {}, folder
        if n < 3:
            raise InputError(
                f"{n} images are too few for triplets, which take an anchor, a positive and a "
                "negative; give at least 3, or use the target 'centred'"
            )
        self.embeddings, self.nearest, self.recipe = embeddings, nearest, recipe
        self.groups: Classes | Values
        if labels is not None and labels.dtype.kind == "f":
            self.groups = Values(labels, recipe.positives, recipe.negatives)
        else:
            # Without labels every image is alone in its class.
            self.groups = Classes(np.arange(n) if labels is None else labels)
            if len(self.groups.sizes) == 1:
                raise InputError(
                    f"all {n} images have one label, so there are no negatives; give images of at "
                    "least two labels, build without labels, or use the target 'centred'"
                )
        # Without any label small sets have smaller neighborhoods: at least half stay negatives.
        self._n_near = max(1, min(N_POSITIVES, (n - 1) // 3))
        self._n_excluded = max(self._n_near, min(N_EXCLUDED, (n - 1) // 2))
        if labels is not None:
            self._n_excluded = self._n_near

    def draw(self, anchors: np.ndarray) -> np.ndarray:
        """Draw (positive, negative) of S triplets, `[a S 2]`, the same for an anchor anywhere."""
        anchors = np.asarray(anchors, np.int64)
        uniform, groups = self._uniform(anchors), self.groups
        pairs = np.empty(uniform.shape, np.int64)
        positives, negatives = pairs[..., 0], pairs[..., 1]
        known = self.labelled(anchors)
        ranks = groups.ranks[anchors[known]]
        start, stop = np.split(groups.near[ranks], 2, axis=1)
        place = start + pick(uniform[known, :, 0], stop - start - 1)
        positives[known] = groups.order[place + (place >= ranks[:, None])]
        if not known.all():
            excluded = self.nearest(anchors[~known], self._n_excluded)
            near = excluded[:, : self._n_near]
            places = pick(uniform[~known, :, 0], near.shape[1])
            positives[~known] = np.take_along_axis(near, places, axis=1)
        if self.recipe.resolved_sampling in ("semihard", "hard"):
            self._mine(anchors, positives, negatives, uniform[..., 1])
            return pairs
        start, stop = np.split(groups.far[ranks], 2, axis=1)
        place = pick(uniform[known, :, 1], len(groups.order) - (stop - start))
        negatives[known] = groups.order[place + np.where(place >= start, stop - start, 0)]
        if not known.all():
            excluded = np.concatenate([anchors[~known][:, None], excluded], axis=1)
            negatives[~known] = outside(uniform[~known, :, 1], excluded, len(self.embeddings))
        return pairs

    def mean_difference(
        self, anchors: np.ndarray, borrowed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of f_p - f_n over *every* triplet, float32 `[a D]`, and their number.

        With `borrowed` = b the mean positive of an anchor in a class of n <= b images, 1 < n, is
        (b - n + 1) / 2b the mean of its nearest images, and the rest the class's.
        """
        anchors = np.asarray(anchors, np.int64)
        difference = np.empty((len(anchors), self.embeddings.shape[1]), np.float32)
        counts, known = np.empty(len(anchors), np.int64), self.labelled(anchors)
        if known.any():
            by_label = self._labelled_difference(anchors[known], borrowed)
            difference[known], counts[known] = by_label
        if not known.all():
            excluded = self.nearest(anchors[~known], self._n_excluded)
            near = excluded[:, : self._n_near]
            n_outside = len(self.embeddings) - 1 - excluded.shape[1]
            vectors = np.asarray(self.embeddings[anchors[~known]], np.float64)
            p_mean = self._gathered_mean(near)
            same = self._n_excluded == self._n_near
            mean = p_mean if same else self._gathered_mean(excluded)
            n_sum = self.total - vectors - excluded.shape[1] * mean
            difference[~known] = p_mean - n_sum / n_outside
            counts[~known] = near.shape[1] * n_outside
        return difference, counts

    def labelled(self, anchors: np.ndarray) -> np.ndarray:
        """Return which anchors have positives and negatives by their labels, `[a]` booleans."""
        return np.asarray(self.groups.ranks[anchors] >= 0)

    def labelled_counts(self, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many positives and negatives labelled anchors have, `[a]` each."""
        groups, ranks = self.groups, self.groups.ranks[anchors]
        near, far = (one[ranks].astype(np.int64) for one in (groups.near, groups.far))
        return near[:, 1] - near[:, 0] - 1, len(groups.order) - (far[:, 1] - far[:, 0])

    def _labelled_difference(
        self, anchors: np.ndarray, borrowed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        groups, (n_near, n_far) = self.groups, self.labelled_counts(anchors)
        if isinstance(groups, Classes):
            near_sum = far_sum = self.class_sums[groups.shared[groups.codes[anchors]]]
            total, few = self.total, n_near < borrowed
        else:
            sums, ranks = self._sums_below, groups.ranks[anchors]
            near_sum, far_sum = (
                sums[one[:, 1]] - sums[one[:, 0]] for one in (groups.near[ranks], groups.far[ranks])
            )
            total, few = np.asarray(sums[-1]), np.zeros(len(anchors), bool)
        p_mean = (near_sum - np.asarray(self.embeddings[anchors], np.float64)) / n_near[:, None]
        if few.any():
            share = ((borrowed - n_near[few]) / (2 * borrowed))[:, None]
            nearest = self._gathered_mean(self.nearest(anchors[few], self._n_near))
            p_mean[few] += share * (nearest - p_mean[few])
        difference = p_mean - (total - far_sum) / n_far[:, None]
        return difference.astype(np.float32), n_near * n_far

    def _negatives_of(self, anchor: int) -> np.ndarray:
        """Return all negatives of one anchor, rising."""
        rank = self.groups.ranks[anchor]
        if rank >= 0:
            return np.sort(np.delete(self.groups.order, slice(*self.groups.far[rank])))
        near = self.nearest(np.array([anchor]), self._n_excluded)[0]
        return np.delete(np.arange(len(self.embeddings)), [anchor, *near])

    def _uniform(self, anchors: np.ndarray) -> np.ndarray:
        """Return numbers in [0, 1), `[a S 2]`, from the generator of each anchor's block."""
        n_triplets = self.recipe.n_triplets
        uniform = np.empty((len(anchors), n_triplets, 2))
        blocks = anchors // BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            generator = np.random.Generator(np.random.Philox(key=[self.recipe.seed, int(block)]))
            # Anchor after anchor, so that the first rows do not depend on how many follow.
            last = int(anchors[here].max()) % BLOCK + 1
            uniform[here] = generator.random((last, n_triplets, 2))[anchors[here] % BLOCK]
        return uniform

    def _mine(
        self, anchors: np.ndarray, positives: np.ndarray, negatives: np.ndarray, uniform: np.ndarray
    ) -> None:
        """Fill in negatives `[a S]` that are chosen by distance."""
        for row, distances, candidates in self._candidates(anchors):
            to_negatives = distances[candidates]
            ranked = np.sort(to_negatives)
            first, count = np.zeros(1, np.int64), np.full(1, min(N_HARD, len(ranked)))
            if self.recipe.resolved_sampling == "semihard":
                # An empty window is widened to the nearest beyond; past the last, to the farthest.
                to_positives = distances[positives[row]]
                first = np.minimum(np.searchsorted(ranked, to_positives, "right"), len(ranked) - 1)
                beyond = np.searchsorted(ranked, to_positives + self.recipe.margin, "left")
                count = np.maximum(beyond - first, 1)
            ranks = first + pick(uniform[row], count)
            # Sorting numbers alone is many times faster than sorting places by them.
            values = ranked[ranks]
            tied = zip(values, ranks - np.searchsorted(ranked, values), strict=True)
            places = [np.flatnonzero(to_negatives == value)[k] for value, k in tied]
            negatives[row] = candidates[places]

    def _candidates(self, anchors: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each anchor's row, its squared distance to every image, and its negatives."""
        everything, squares = np.asarray(self.embeddings), self._squares
        for row, anchor in enumerate(anchors):
            # One product an anchor, so that its rounding does not depend on the others' company.
            distances = squares + squares[anchor] - 2 * (everything @ everything[anchor])
            yield row, np.maximum(distances, 0), self._negatives_of(anchor)

    def _gathered_mean(self, positions: np.ndarray) -> np.ndarray:
        """Return the mean of the embeddings at places `[a k]`, float64 `[a D]`."""
        means = np.empty((len(positions), self.embeddings.shape[1]))
        step = max(1, _GATHERED // max(1, positions.shape[1] * means.shape[1]))
        for start in range(0, len(positions), step):
            some = slice(start, start + step)
            means[some] = np.asarray(self.embeddings[positions[some]], np.float64).mean(axis=1)
        return means

    @cached_property
    def _squares(self) -> np.ndarray:
        squares = np.empty(len(self.embeddings), np.float32)
        for start in range(0, len(squares), SUMMED):
            block = np.asarray(self.embeddings[start : start + SUMMED])
            squares[start : start + SUMMED] = np.einsum("nd,nd->n", block, block)
        return squares

    @cached_property
    def total(self) -> np.ndarray:
        """The sum of all embeddings, float64 `[D]`."""
        known = self._statistics.get("total")
        return total_of(self.embeddings) if known is None else known

    @cached_property
    def class_sums(self) -> np.ndarray:
        """Sums over each label that images share, float64 `[C D]`."""
        known = self._statistics.get("class_sums")
        if known is not None:
            return known
        # As doubles at once: `np.add.at` is three times slower where it casts.
        return self.summed(lambda rows: np.asarray(self.embeddings[rows], np.float64))

    def summed(
        self, rows: Callable[[np.ndarray], np.ndarray], progressed: Advance = lambda _: None
    ) -> np.ndarray:
        """Sum `rows(positions)` `[b D]` over each label that images share, float64 `[C D]`."""
        assert isinstance(self.groups, Classes)
        shape = (int(self.groups.shared.max(initial=-1)) + 1, self.embeddings.shape[1])
        return self.groups.sums(rows, scratch_array(shape, "float64", self._folder), progressed)

    @cached_property
    def _sums_below(self) -> np.ndarray:
        """Sums over all images before each rank, float64 `[n + 1, D]`."""
        order = self.groups.order
        shape = (len(order) + 1, self.embeddings.shape[1])
        sums = scratch_array(shape, "float64", self._folder)
        for start in range(0, len(order), SUMMED):
            rows = np.asarray(self.embeddings[order[start : start + SUMMED]], np.float64)
            rows[0] += sums[start]  # what was summed goes on: the same for any division into blocks
            np.cumsum(rows, axis=0, out=sums[start + 1 : start + 1 + len(rows)])
        return sums


def total_of(embeddings: ArrayLike) -> np.ndarray:
    """Sum embeddings `[N D]` over fixed blocks in order, float64 `[D]`."""
    total = np.zeros(embeddings.shape[1])
    for start in range(0, embeddings.shape[0], SUMMED):
        total += np.sum(embeddings[start : start + SUMMED], axis=0, dtype=np.float64)
    return total


def squares_of(embeddings: ArrayLike) -> np.ndarray:
    """Sum f f^T of embeddings `[N D]` over fixed blocks in order, float64 `[D D]`."""
    squares = np.zeros((embeddings.shape[1],) * 2)
    for start in range(0, embeddings.shape[0], SUMMED):
        block = np.asarray(embeddings[start : start + SUMMED], np.float64)
        squares += block.T @ block
    return squares


class NearestOthers:
    """Find the nearest other images of images `[N D]`; the same for an image in any company.

    Exact among up to `exact` images. Among more an inverted file proposes candidates and exact
    distances rank them: now and then one of the k is missed, and a farther one stands in for it.
    """

    def __init__(self, embeddings: np.ndarray, exact: int = EXACT) -> None:
        self.embeddings, self.exact = embeddings, exact

    def __call__(self, anchors: np.ndarray, k: int) -> np.ndarray:
        """Return positions `[a k]` of the k nearest others, by squared distance and position."""
        anchors = np.asarray(anchors, np.int64)
        queries = np.ascontiguousarray(self.embeddings[anchors], np.float32)
        if len(self.embeddings) <= max(self.exact, k + 1):
            found = nearest(self.embeddings, queries, k + 1)
        else:
            step = max(1, _GATHERED // ((k + 1 + SLACK) * queries.shape[1]))
            found = in_batches(lambda some: self._proposed(some, k + 1), queries, step)
        return without_itself(found, anchors).positions

    def _proposed(self, queries: np.ndarray, k: int) -> Neighbors:
        """Return the k nearest of the inverted file's candidates; where too few, of all."""
        import faiss

        lists, before = self._lists, faiss.cvar.distance_compute_blas_threshold
        # Queries meet centroids one by one: products of many would round by their number.
        faiss.cvar.distance_compute_blas_threshold = 1 << 30
        try:
            candidates = lists.search(queries, k + SLACK)[1]
        finally:
            faiss.cvar.distance_compute_blas_threshold = before
        few = candidates[:, k - 1] < 0
        if few.any():
            candidates[few, :k] = nearest(self.embeddings, queries[few], k).positions
        # Where there are fewer than asked for, `rank` leaves out what is not there.
        vectors = np.asarray(self.embeddings[np.maximum(candidates, 0)])
        return rank(queries, candidates, vectors, k, "l2")

    @cached_property
    def _lists(self) -> Any:
        """Every embedding in eight bits a number, in lists by its nearest centroid."""
        import faiss

        n, width = self.embeddings.shape
        n_lists = max(1, n // LIST)
        lists: Any = faiss.index_factory(width, f"IVF{n_lists},SQ8")
        lists.cp.niter, lists.nprobe = ROUNDS, min(PROBES, n_lists)
        sample = np.sort(np.random.default_rng(0).permutation(n)[: TRAINED * n_lists])
        lists.train(np.ascontiguousarray(self.embeddings[sample], np.float32))
        for start in range(0, n, _ADDED):
            lists.add(np.ascontiguousarray(self.embeddings[start : start + _ADDED], np.float32))
        return lists


def check_given(pairs: np.ndarray, n_images: int) -> None:
    """Refuse the user's own (positive, negative) places unless they are `[N S 2]` and sensible."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 3 or pairs.shape[0] != n_images or pairs.shape[2] != 2 or not pairs.shape[1]:
        raise InputError(
            f"the triplets have shape {list(pairs.shape)}; expected [{n_images} S 2]: the "
            "positions of a positive and a negative for each of S triplets of every image"
        )
    if pairs.dtype.kind not in "iu" or pairs.min() < 0 or pairs.max() >= n_images:
        raise InputError(f"triplets must be whole numbers from 0 to {n_images - 1}")
    images = np.arange(n_images)[:, None, None]
    twice = (pairs == images).any((1, 2)) | (pairs[..., 0] == pairs[..., 1]).any(1)
    if twice.any():
        raise InputError(
            f"image {int(twice.argmax())} has a triplet that names one image twice; name two "
            "others, a positive and a negative"
        )


def pairs_digest(pairs: np.ndarray) -> str:
    """Return SHA-256 of given triplets `[N S 2]`, whatever type of whole numbers they have."""
    pairs = np.asarray(pairs)
    digest = hashlib.sha256(repr(pairs.shape).encode())
    for start in range(0, len(pairs), 1 << 14):
        digest.update(pairs[start : start + (1 << 14)].astype("<i8").tobytes())
    return digest.hexdigest()


def active(
    anchors: np.ndarray, pairs: np.ndarray, embeddings: np.ndarray, margin: float
) -> np.ndarray:
    """Return which triplets' hinge is *not* satisfied: D(a,p) - D(a,n) + margin > 0, `[a S]`."""
    # The others have zero gradient: they are no evidence and must not be averaged in.
    own, others = (np.asarray(embeddings[rows], np.float32) for rows in (anchors, pairs))
    apart = own[:, None, None] - others
    distances = np.einsum("...d,...d->...", apart, apart)
    return np.asarray(distances[..., 0] - distances[..., 1] + margin > 0)


def pick(uniform: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Turn uniform numbers in [0, 1) into whole numbers in 0 .. count - 1."""
    return np.asarray(np.minimum((uniform * count).astype(np.int64), np.asarray(count) - 1))


def outside(uniform: np.ndarray, excluded: np.ndarray, n: int) -> np.ndarray:
    """Pick from 0 .. n - 1 without each row's excluded positions."""
    excluded = np.sort(excluded, axis=1)
    picks = pick(uniform, n - excluded.shape[1])
    # The k-th free position is k plus the number of excluded ones at or before it.
    rows = zip(excluded - np.arange(excluded.shape[1]), picks, strict=True)
    return np.stack([pick + np.searchsorted(row, pick, side="right") for row, pick in rows])
