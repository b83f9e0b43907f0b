"""Triplets: what may be drawn, that all of it is drawn, and that company does not matter."""

import itertools
import re
from collections import Counter

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam.errors import InputError
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import (
    NearestOthers,
    TripletSampler,
    active,
    check_given,
    label_codes,
    pairs_digest,
)
from embedcam.recipe.recipe import Recipe

DRAWN = ["random", "semihard", "hard"]


def points(n: int, seed: int = 0, D: int = 3) -> np.ndarray:
    """Embeddings on a grid: every squared distance is exact in single precision."""
    return np.random.default_rng(seed).integers(-40, 41, (n, D)).astype(np.float32) / 8


def sampler(embeddings: np.ndarray, labels, **choices) -> TripletSampler:
    def nearest(anchors: np.ndarray, k: int) -> np.ndarray:
        everyone = range(len(embeddings))
        return np.array([oracles.nearest(embeddings, int(a), everyone, k) for a in anchors])

    codes = None if labels is None else np.asarray(labels)
    recipe = Recipe(**{"target": "margin", "sampling": "random", **choices})
    return TripletSampler(embeddings, codes, nearest, recipe)


@st.composite
def collections(draw) -> tuple[np.ndarray, list[int]]:
    """Embeddings and labels of at least two classes, classes of one image among them."""
    n = draw(st.integers(3, 16))
    labels = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    if len(set(labels)) == 1:
        labels[draw(st.integers(0, n - 1))] += 1
    return points(n, draw(st.integers(0, 2**32 - 1))), labels


@pytest.mark.parametrize("sampling", DRAWN)
@settings(max_examples=40, deadline=None)
@given(collections(), st.integers(0, 99))
def test_positives_share_the_label_and_negatives_do_not(sampling, given_, seed) -> None:
    embeddings, labels = given_
    n = len(labels)
    drawn = sampler(embeddings, labels, sampling=sampling, triplets=7, seed=seed).draw(np.arange(n))
    assert (drawn.shape, drawn.dtype) == ((n, 7, 2), np.int64)
    for a in range(n):
        alone = labels.count(labels[a]) == 1
        for p, neg in drawn[a]:
            assert len({a, p, neg}) == 3
            assert labels[neg] != labels[a]
            assert alone or labels[p] == labels[a]


@settings(max_examples=40, deadline=None)
@given(collections(), st.integers(0, 99), st.sampled_from([0.05, 0.5, 4.0, 30.0]))
def test_semihard_negatives_lie_in_the_window_or_nearest_beyond(given_, seed, margin) -> None:
    embeddings, labels = given_
    one = sampler(embeddings, labels, sampling="semihard", triplets=9, seed=seed, margin=margin)
    drawn = one.draw(np.arange(len(labels)))
    for a, pairs in enumerate(drawn.tolist()):
        for p, n in pairs if labels.count(labels[a]) > 1 else ():
            assert oracles.semihard_allows(embeddings, labels, a, p, n, margin)


def test_semihard_by_hand() -> None:
    embeddings = np.array([[0.0], [1.0], [0.5], [1.25], [1.5], [9.0]], np.float32)
    labels = [0, 0, 1, 1, 2, 1]
    # D(a, p) = 1; negatives at 0.25, 1.5625, 2.25, 81; the window is open at both ends.
    for margin, wanted in ((0.1, {3}), (1.25, {3}), (1.5, {3, 4}), (100.0, {3, 4, 5})):
        one = sampler(embeddings, labels, sampling="semihard", triplets=200, margin=margin)
        drawn = one.draw(np.array([0]))
        assert set(drawn[0, :, 0]) == {1}
        assert set(drawn[0, :, 1]) == wanted
    # Every negative nearer than the positive: the one that is farthest.
    labels = [0, 1, 1, 1, 1, 0]
    drawn = sampler(embeddings, labels, sampling="semihard").draw(np.array([0]))
    assert set(drawn[0, :, 1]) == {4}


def test_hard_negatives_are_the_fifty_nearest_of_other_labels() -> None:
    embeddings = points(140, D=6)
    labels = [i % 2 for i in range(140)]
    drawn = sampler(embeddings, labels, sampling="hard", triplets=600).draw(np.arange(3))
    for a in range(3):
        others = [i for i in range(140) if labels[i] != labels[a]]
        assert set(drawn[a, :, 1]) == set(oracles.nearest(embeddings, a, others, 50))
        assert set(drawn[a, :, 0]) == set(range(140)) - {*others, a}


def is_uniform(found, allowed) -> bool:
    """Within six standard deviations of a binomial."""
    counts, share = Counter(found), 1 / len(allowed)
    n = counts.total()
    slack = 6 * np.sqrt(n * share * (1 - share))
    return set(counts) == allowed and all(abs(c - n * share) <= slack for c in counts.values())


def test_random_draws_are_uniform_over_everything_allowed() -> None:
    labels = [0, 1, 0, 2, 0, 1, 3]
    drawn = sampler(points(7), labels, triplets=6000).draw(np.array([2, 5]))
    for row, own, others in ((0, {0, 4}, {1, 3, 5, 6}), (1, {1}, {0, 2, 3, 4, 6})):
        for found, allowed in ((drawn[row, :, 0], own), (drawn[row, :, 1], others)):
            assert is_uniform(found.tolist(), allowed)
        pairs = set(itertools.product(own, others))  # drawn independently
        assert is_uniform(map(tuple, drawn[row].tolist()), pairs)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("sampling", DRAWN)
def test_an_anchors_triplets_do_not_depend_on_its_company(sampling, labelled, monkeypatch) -> None:
    n, block = 40, 18
    monkeypatch.setattr("embedcam.offline.triplets.BLOCK", block)
    labels = [i % 3 for i in range(n - 1)] + [9] if labelled else None

    def draw(anchors: np.ndarray, seed: int = 0) -> np.ndarray:
        choices = {"sampling": sampling, "triplets": 5, "margin": 30.0, "seed": seed}
        return sampler(points(n), labels, **choices).draw(anchors)

    whole = draw(np.arange(n))
    for anchors in (np.arange(n)[::-1], np.arange(7), np.array([19, 0, 36, 18, 17])):
        np.testing.assert_array_equal(draw(anchors), whole[anchors])
    # The same place in another block is another draw, and so is another seed.
    assert (whole[0, :, 1] != whole[block, :, 1]).any()
    assert (draw(np.arange(n), 1) != whole).any((1, 2)).all()


@pytest.mark.parametrize(("labels", "excluded"), [(None, 100), ([9] + [0, 1] * 129 + [0], 10)])
def test_without_its_like_the_near_are_positives_and_the_far_negatives(labels, excluded) -> None:
    embeddings = points(260, D=8)
    drawn = sampler(embeddings, labels, triplets=4000).draw(np.array([0]))
    near = oracles.nearest(embeddings, 0, range(260), excluded)
    assert set(drawn[0, :, 0]) == set(near[:10])
    assert set(drawn[0, :, 1]) == set(range(1, 260)) - set(near)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), st.sampled_from(DRAWN), st.integers(0, 99))
def test_small_sets_without_labels_keep_near_and_far_apart(n, sampling, seed) -> None:
    embeddings = points(n, seed)
    drawn = sampler(embeddings, None, sampling=sampling, triplets=20, seed=seed).draw(np.arange(n))
    for a in range(n):
        order = oracles.nearest(embeddings, a, range(n), n - 1)
        nearness = {i: rank for rank, i in enumerate(order)}
        assert a not in drawn[a]
        farthest = max(nearness[p] for p in drawn[a, :, 0])
        assert farthest < min(10, *(nearness[i] for i in drawn[a, :, 1]))


def every_triplet(embeddings: np.ndarray, labels, a: int) -> list[tuple[int, int]]:
    """What "all" is the mean over, also of an image alone in its class and without labels."""
    n = len(embeddings)
    if labels is not None and labels.count(labels[a]) > 1:
        return oracles.every_triplet(labels, a)
    near = oracles.nearest(embeddings, a, range(n), max(1, min(10, (n - 1) // 3)))
    far = near
    if labels is None:
        far = oracles.nearest(embeddings, a, range(n), max(1, min(100, (n - 1) // 2)))
    return [(p, o) for p in near for o in range(n) if o != a and o not in far]


def check_exact_mean(embeddings: np.ndarray, labels, anchors: list[int], atol: float) -> None:
    one = sampler(embeddings, labels, sampling="all")
    got, counts = one.mean_difference(np.array(anchors))
    for row, a in enumerate(anchors):
        every = every_triplet(embeddings, labels, a)
        assert counts[row] == len(every)
        expected = oracles.mean_cotangent(embeddings, every)
        np.testing.assert_allclose(2 * got[row], expected, atol=atol)
        alone, count = one.mean_difference(np.array([a]))
        np.testing.assert_array_equal(alone[0], got[row])
        assert count[0] == counts[row]


@settings(max_examples=40, deadline=None)
@given(collections())
def test_the_exact_mean_is_the_loop_over_every_triplet(given_) -> None:
    check_exact_mean(*given_, list(range(len(given_[1]))), 1e-5)


def test_the_exact_mean_is_the_loop_without_labels_and_at_a_large_offset() -> None:
    for n in (3, 20, 230):
        check_exact_mean(points(n), None, [0, 2, n - 1], 1e-5)
    embeddings = np.random.default_rng(0).normal(1000.0, 1.0, (30, 3)).astype(np.float32)
    check_exact_mean(embeddings, [i % 4 for i in range(29)] + [7], list(range(30)), 1e-6)


@settings(max_examples=40, deadline=None)
@given(collections(), st.sampled_from([0.125, 0.5, 8.0]))
def test_a_satisfied_hinge_is_not_counted(given_, margin) -> None:
    embeddings, labels = given_
    drawn = sampler(embeddings, labels, triplets=6).draw(np.arange(len(labels)))
    got = active(np.arange(len(labels)), drawn, embeddings, margin)
    for a, row in enumerate(embeddings):
        for (p, n), counted in zip(drawn[a], got[a], strict=True):
            assert counted != oracles.hinge_is_satisfied(row, embeddings[p], embeddings[n], margin)
    # Exactly at its border it is satisfied: D = 1 and 4.
    line, triplet = np.array([[0.0], [1.0], [2.0]], np.float32), np.array([[[1, 2]]])
    assert not active(np.array([0]), triplet, line, 3.0)
    assert active(np.array([0]), triplet, line, 3.25)


def test_labels_become_codes_and_missing_ones_classes_of_their_own() -> None:
    codes = label_codes(["b", None, "a", "b", None])
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4
    assert label_codes([None, None]) is None


def test_a_digest_tells_given_triplets_apart_and_not_their_type() -> None:
    pairs = np.arange(40000 * 2).reshape(20000, 2, 2)
    assert pairs_digest(pairs) == pairs_digest(np.asfortranarray(pairs.astype(np.int32)))
    assert pairs_digest(pairs) != pairs_digest(pairs.reshape(10000, 4, 2))
    other = pairs.copy()
    other[-1, 1, 1] += 1
    assert pairs_digest(pairs) != pairs_digest(other)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        *((np.zeros(shape, int), re.escape(f"shape {list(shape)}; expected [4 S 2]"))
          for shape in ((3, 1, 2), (4, 0, 2), (4, 2), (4, 1, 3))),
        *((np.full((4, 1, 2), value), "whole numbers from 0 to 3") for value in (4, -1, 0.5)),
        (np.array([[[1, 2]], [[0, 2]], [[3, 3]], [[0, 1]]]), "image 2 .* names one image twice"),
    ],
)  # fmt: skip
def test_given_triplets_that_cannot_be_used(pairs, says) -> None:
    with pytest.raises(InputError, match=says):
        check_given(pairs, 4)


@pytest.mark.parametrize("sampling", [*DRAWN, "all"])
def test_a_single_class_and_too_few_images_get_a_sentence(sampling) -> None:
    says = "^all 5 images have one label, so .* no negatives.*two labels.*without labels.*'centred'"
    with pytest.raises(InputError, match=says):
        sampler(points(5), [3] * 5, sampling=sampling)
    for n in range(3):
        for labels in (list(range(n)), None):
            with pytest.raises(InputError, match=f"^{n} images are too few .*at least 3"):
                sampler(points(n), labels, sampling=sampling)


@pytest.mark.parametrize("choices", [{}, {"target": "centred"}, {"sampling": "given"}], ids=str)
def test_triplets_given_without_being_asked_for_and_the_other_way_round(choices) -> None:
    rows, given_ = points(6), None if "sampling" in choices else np.zeros((6, 1, 2), int)
    with pytest.raises(InputError, match="goes with target 'margin' and sampling 'given'"):
        AnchorCotangents(Recipe(**choices), rows, np.arange(6) % 2, rows[0], given_)


def test_the_nearest_others_are_the_loops_also_among_duplicates() -> None:
    rows = points(24)
    rows[7:19] = rows[3]  # more copies than neighbours asked for
    for k in (1, 5, 23):
        found = NearestOthers(rows)(np.arange(24), k)
        for a in range(24):
            assert len({a, *found[a].tolist()}) == k + 1
            near = oracles.nearest(rows, a, range(24), k)
            assert apart(rows, a, found[a]) == apart(rows, a, near)


def apart(rows: np.ndarray, a: int, others) -> list[float]:
    return [oracles.squared_distance(rows[a], rows[i]) for i in others]


def test_among_many_images_an_inverted_file_finds_them_the_same_in_any_company() -> None:
    generator = np.random.default_rng(5)
    centres = generator.normal(size=(40, 16))
    rows = centres[generator.integers(40, size=3000)] + 0.3 * generator.normal(size=(3000, 16))
    rows = rows.astype(np.float32)
    rows[100:140] = rows[99]  # copies push an image out of its own list
    finder, anchors = NearestOthers(rows, exact=1000), np.arange(80, 160)
    found = finder(anchors, 10)
    for at, anchor in enumerate(anchors.tolist()):
        assert len({anchor, *found[at].tolist()}) == 11
        assert finder(anchors[at : at + 1], 10).tolist() == found[at : at + 1].tolist()
    literal = [apart(rows, a, oracles.nearest(rows, a, range(3000), 10)) for a in anchors[:10]]
    own = [apart(rows, a, found[at]) for at, a in enumerate(anchors[:10])]
    assert (np.array(own) == np.array(literal)).mean() > 0.9
