"""Triplets: what may be drawn, that all of it is drawn, and that company does not matter."""

from collections import Counter

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam.errors import InputError
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import (
    BLOCK,
    N_EXCLUDED,
    N_HARD,
    N_POSITIVES,
    NearestOthers,
    TripletSampler,
    active,
    alone,
    check_given,
    label_codes,
    pairs_digest,
)
from embedcam.recipe.recipe import Recipe

DRAWN = ["random", "semihard", "hard"]


def points(n: int, seed: int = 0, D: int = 3) -> np.ndarray:
    """Embeddings on a grid: every squared distance is exact in single precision."""
    return np.random.default_rng(seed).integers(-40, 41, (n, D)).astype(np.float32) / 8


def brute_force(embeddings: np.ndarray):
    """The neighbour finder the sampler is handed: literal, ties to the lower position."""

    def nearest(anchors: np.ndarray, k: int) -> np.ndarray:
        everyone = range(len(embeddings))
        return np.array([oracles.nearest(embeddings, int(a), everyone, k) for a in anchors])

    return nearest


def sampler(embeddings: np.ndarray, labels, **choices) -> TripletSampler:
    codes = None if labels is None else np.asarray(labels)
    recipe = Recipe(**{"target": "margin", "sampling": "random", **choices})
    return TripletSampler(embeddings, codes, brute_force(embeddings), recipe)


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
            assert p != a
            assert neg != a
            assert p != neg
            assert labels[neg] != labels[a]
            assert alone or labels[p] == labels[a]


@settings(max_examples=40, deadline=None)
@given(collections(), st.integers(0, 99), st.sampled_from([0.05, 0.5, 4.0, 30.0]))
def test_semihard_negatives_lie_in_the_window_or_nearest_beyond(given_, seed, margin) -> None:
    embeddings, labels = given_
    drawn = sampler(
        embeddings, labels, sampling="semihard", triplets=9, seed=seed, margin=margin
    ).draw(np.arange(len(labels)))
    for a in range(len(labels)):
        if labels.count(labels[a]) == 1:
            continue
        for p, n in drawn[a]:
            assert oracles.semihard_allows(embeddings, labels, a, int(p), int(n), margin)


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
        allowed = oracles.nearest(embeddings, a, others, N_HARD)
        assert len(others) > len(allowed) == 50
        assert set(drawn[a, :, 1]) == set(allowed)
        own = [i for i in range(140) if labels[i] == labels[a] and i != a]
        assert set(drawn[a, :, 0]) == set(own)


def test_random_draws_are_uniform_over_everything_allowed() -> None:
    labels = [0, 1, 0, 2, 0, 1, 3]
    drawn = sampler(points(7), labels, triplets=6000).draw(np.array([2, 5]))
    for row, own, others in ((0, {0, 4}, {1, 3, 5, 6}), (1, {1}, {0, 2, 3, 4, 6})):
        for found, allowed in ((drawn[row, :, 0], own), (drawn[row, :, 1], others)):
            counts = Counter(found.tolist())
            assert set(counts) == allowed
            # Six standard deviations of a binomial.
            share = 1 / len(allowed)
            slack = 6 * np.sqrt(6000 * share * (1 - share))
            assert all(abs(count - 6000 * share) <= slack for count in counts.values())


@pytest.mark.parametrize("sampling", DRAWN)
def test_positives_and_negatives_are_drawn_independently(sampling) -> None:
    embeddings = np.array([[0.0], [1.0], [2.0], [5.0], [6.0], [7.0]], np.float32)
    one = sampler(embeddings, [0, 0, 0, 1, 1, 1], sampling=sampling, triplets=4000, margin=99.0)
    drawn = one.draw(np.array([0]))
    pairs = Counter(map(tuple, drawn[0].tolist()))
    assert len(pairs) == 6
    assert max(pairs.values()) - min(pairs.values()) < 6 * np.sqrt(4000 / 6)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("sampling", DRAWN)
def test_an_anchors_triplets_do_not_depend_on_its_company(sampling, labelled) -> None:
    n = 40
    labels = [i % 3 for i in range(n - 1)] + [9] if labelled else None
    make = lambda seed=0: sampler(  # noqa: E731
        points(n), labels, sampling=sampling, triplets=5, margin=30.0, seed=seed
    )
    whole = make().draw(np.arange(n))
    for chunk in (1, 7, 16):
        for start in range(0, n, chunk):
            anchors = np.arange(start, min(start + chunk, n))
            np.testing.assert_array_equal(make().draw(anchors), whole[anchors])
    backwards = make().draw(np.arange(n)[::-1])
    np.testing.assert_array_equal(backwards[::-1], whole)
    other = make(1).draw(np.arange(n))
    assert (other != whole).any((0, 1)).all()


def test_blocks_of_anchors_have_draws_of_their_own() -> None:
    n = 2 * BLOCK + 10
    labels = np.arange(n) % 2
    one = sampler(points(n), labels, triplets=3)
    edges = np.array([BLOCK + 1, 0, 2 * BLOCK, BLOCK, BLOCK - 1])
    whole = one.draw(np.arange(n))
    part = one.draw(edges)
    np.testing.assert_array_equal(part, whole[edges])
    # The same place in another block is not the same draw.
    assert (whole[0, :, 1] != whole[BLOCK, :, 1]).any()


def test_without_labels_the_near_are_positives_and_the_far_are_negatives() -> None:
    n = 260
    embeddings = points(n, D=8)
    drawn = sampler(embeddings, None, triplets=1500).draw(np.array([0, 7]))
    for row, a in enumerate((0, 7)):
        near = oracles.nearest(embeddings, a, range(n), N_EXCLUDED)
        assert set(drawn[row, :, 0]) == set(near[:N_POSITIVES])
        assert set(drawn[row, :, 1]) == set(range(n)) - set(near) - {a}


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
        assert farthest < min(N_POSITIVES, *(nearness[i] for i in drawn[a, :, 1]))


def test_an_image_alone_in_its_class_takes_its_nearest_as_positives() -> None:
    n = 60
    embeddings = points(n)
    labels = [99] + [i % 2 for i in range(n - 1)]
    one = sampler(embeddings, labels, triplets=800)
    assert alone(np.array(labels)).tolist() == [True] + [False] * (n - 1)
    drawn = one.draw(np.array([0]))
    near = oracles.nearest(embeddings, 0, range(n), N_POSITIVES)
    assert set(drawn[0, :, 0]) == set(near)
    assert set(drawn[0, :, 1]) == set(range(1, n)) - set(near)


@pytest.mark.parametrize("labels", [None, [0, 0, 1], [0, 1, 2]])
@pytest.mark.parametrize("sampling", DRAWN)
def test_three_images_are_enough(sampling, labels) -> None:
    drawn = sampler(points(3), labels, sampling=sampling, triplets=4).draw(np.arange(3))
    for a in range(3):
        assert {a, *drawn[a].ravel()} == {0, 1, 2}


@settings(max_examples=40, deadline=None)
@given(collections())
def test_the_exact_mean_is_the_loop_over_every_triplet(given_) -> None:
    embeddings, labels = given_
    n = len(labels)
    got, counts = sampler(embeddings, labels, sampling="all").mean_difference(np.arange(n))
    for a in range(n):
        every = oracles.every_triplet(labels, a)
        if labels.count(labels[a]) == 1:
            near = oracles.nearest(embeddings, a, range(n), max(1, min(10, (n - 1) // 3)))
            every = [(p, o) for p in near for o in range(n) if o != a and o not in near]
        assert counts[a] == len(every)
        np.testing.assert_allclose(2 * got[a], oracles.mean_cotangent(embeddings, every), atol=1e-5)


@pytest.mark.parametrize("n", [3, 20, 230])
def test_the_exact_mean_without_labels_is_the_loop(n) -> None:
    embeddings = points(n)
    one = sampler(embeddings, None, sampling="all")
    anchors = np.array([0, 2, n - 1])
    got, counts = one.mean_difference(anchors)
    for row, a in enumerate(anchors.tolist()):
        near = oracles.nearest(embeddings, a, range(n), max(1, min(10, (n - 1) // 3)))
        far = oracles.nearest(embeddings, a, range(n), max(1, min(100, (n - 1) // 2)))
        rest = [i for i in range(n) if i != a and i not in far]
        every = [(p, o) for p in near for o in rest]
        assert counts[row] == len(every)
        np.testing.assert_allclose(
            2 * got[row], oracles.mean_cotangent(embeddings, every), atol=1e-5
        )


def test_the_exact_mean_does_not_depend_on_its_company_or_a_large_offset() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(1000.0, 1.0, (30, 3)).astype(np.float32)
    labels = [i % 4 for i in range(29)] + [7]
    one = sampler(embeddings, labels, sampling="all")
    whole, counts = one.mean_difference(np.arange(30))
    for a in range(30):
        alone, count = one.mean_difference(np.array([a]))
        np.testing.assert_array_equal(alone[0], whole[a])
        assert count[0] == counts[a]
    for a in range(29):
        wanted = oracles.mean_cotangent(embeddings, oracles.every_triplet(labels, a))
        np.testing.assert_allclose(2 * whole[a], wanted, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(collections(), st.sampled_from([0.125, 0.5, 8.0]))
def test_a_satisfied_hinge_is_not_counted(given_, margin) -> None:
    embeddings, labels = given_
    drawn = sampler(embeddings, labels, triplets=6).draw(np.arange(len(labels)))
    got = active(np.arange(len(labels)), drawn, embeddings, margin)
    for a in range(len(labels)):
        for s in range(6):
            p, n = drawn[a, s]
            assert got[a, s] == (
                not oracles.hinge_is_satisfied(embeddings[a], embeddings[p], embeddings[n], margin)
            )


def test_a_hinge_exactly_at_its_border_is_satisfied() -> None:
    embeddings = np.array([[0.0], [1.0], [2.0]], np.float32)  # D = 1 and 4
    triplets = np.array([0]), np.array([[[1, 2]]])
    assert active(*triplets, embeddings, 3.0).tolist() == [[False]]
    assert active(*triplets, embeddings, 3.25).tolist() == [[True]]


def test_labels_become_codes_and_missing_ones_classes_of_their_own() -> None:
    codes = label_codes(["b", None, "a", "b", None])
    assert codes is not None
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4
    assert label_codes([None, None]) is None


def test_a_digest_tells_given_triplets_apart_and_not_their_type() -> None:
    pairs = np.arange(40000 * 2).reshape(20000, 2, 2)
    assert pairs_digest(pairs) == pairs_digest(pairs.astype(np.int32))
    assert pairs_digest(pairs) == pairs_digest(np.asfortranarray(pairs))
    assert pairs_digest(pairs) != pairs_digest(pairs.reshape(10000, 4, 2))
    other = pairs.copy()
    other[-1, 1, 1] += 1
    assert pairs_digest(pairs) != pairs_digest(other)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (np.zeros((3, 1, 2), int), r"shape \[3, 1, 2\]; expected \[4 S 2\]"),
        (np.zeros((4, 0, 2), int), r"shape \[4, 0, 2\]; expected \[4 S 2\]"),
        (np.zeros((4, 2), int), r"shape \[4, 2\]; expected \[4 S 2\]"),
        (np.zeros((4, 1, 3), int), r"shape \[4, 1, 3\]; expected \[4 S 2\]"),
        (np.full((4, 1, 2), 4), "whole numbers from 0 to 3"),
        (np.full((4, 1, 2), -1), "whole numbers from 0 to 3"),
        (np.full((4, 1, 2), 0.5), "whole numbers from 0 to 3"),
        (np.tile([[0, 3]], (4, 1, 1)), "image 0 has a triplet that names one image twice; name"),
        (
            np.array([[[1, 2]], [[0, 2]], [[3, 3]], [[0, 1]]]),
            "image 2 has a triplet that names one",
        ),
    ],
)
def test_given_triplets_that_cannot_be_used(pairs, says) -> None:
    with pytest.raises(InputError, match=says):
        check_given(pairs, 4)


@pytest.mark.parametrize("sampling", [*DRAWN, "all"])
def test_a_single_class_gets_a_sentence(sampling) -> None:
    with pytest.raises(InputError) as caught:
        sampler(points(5), [3] * 5, sampling=sampling)
    message = str(caught.value)
    assert message.startswith("all 5 images have one label, so there are no negatives")
    assert "at least two labels" in message
    assert "without labels" in message
    assert "'centred'" in message


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_too_few_images_get_a_sentence(n, labelled) -> None:
    with pytest.raises(InputError, match=rf"^{n} images are too few for triplets.*at least 3"):
        sampler(points(n), list(range(n)) if labelled else None)


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
        assert found.shape == (24, k)
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
    again = NearestOthers(rows, exact=1000)(anchors[::-1], 10)[::-1]
    np.testing.assert_array_equal(found, again)
    literal = [apart(rows, a, oracles.nearest(rows, a, range(3000), 10)) for a in anchors[:10]]
    own = [apart(rows, a, found[at]) for at, a in enumerate(anchors[:10])]
    assert (np.array(own) == np.array(literal)).mean() > 0.9
