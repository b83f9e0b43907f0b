"""Cotangents of anchors under a recipe, against loops over their triplets."""

import numpy as np
import oracles
import pytest

from embedcam.errors import InputError
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import NearestOthers, TripletSampler
from embedcam.recipe.recipe import Recipe

N, D = 24, 4
LABELS = np.array([*(i % 3 for i in range(N - 1)), 9])


def table() -> np.ndarray:
    """Embeddings on a grid, of length about 1: distances are exact in single precision."""
    return np.random.default_rng(0).integers(-8, 9, (N, D)).astype(np.float32) / 16


def cotangents(given: np.ndarray | None = None, labels=LABELS, **choices) -> AnchorCotangents:
    rows = table()
    return AnchorCotangents(Recipe(**choices), rows, labels, rows.mean(0), given=given)


def drawn(**choices):
    recipe = Recipe(**choices)
    sampler = TripletSampler(
        table(), LABELS, NearestOthers(table()), sampling=recipe.resolved_sampling,
        n_triplets=recipe.triplets, margin=recipe.margin, seed=recipe.seed,
    )  # fmt: skip
    found = sampler.draw(np.arange(N))
    return np.stack([found.positives, found.negatives], axis=-1)


@pytest.mark.parametrize("sampling", ["random", "semihard", "hard"])
def test_grad_cam_gets_the_mean_over_the_triplets(sampling) -> None:
    choices = {"sampling": sampling, "triplets": 7, "seed": 3}
    got = cotangents(**choices).of(np.arange(N))
    assert got.used is None
    assert got.counts.tolist() == [7] * N
    for a, pairs in enumerate(drawn(**choices)):
        wanted = oracles.mean_cotangent(table(), pairs.tolist())
        np.testing.assert_allclose(got.values[a], wanted, atol=1e-6)


@pytest.mark.parametrize("margin", [0.05, 0.2, 5.0])
def test_a_satisfied_hinge_is_left_out_of_the_mean_and_of_the_count(margin) -> None:
    choices = {"triplets": 7, "hinge": True, "margin": margin}
    got = cotangents(**choices).of(np.arange(N))
    each = cotangents(method="gradcam++", **choices).of(np.arange(N))
    assert each.used is not None
    rows = table()
    for a, pairs in enumerate(drawn(**choices)):
        left = [
            (p, n)
            for p, n in pairs.tolist()
            if not oracles.hinge_is_satisfied(rows[a], rows[p], rows[n], margin)
        ]
        assert got.counts[a] == each.counts[a] == each.used[a].sum() == len(left)
        wanted = oracles.mean_cotangent(rows, left) if left else np.zeros(D)
        np.testing.assert_allclose(got.values[a], wanted, atol=1e-6)


def test_grad_cam_plus_plus_gets_one_cotangent_a_triplet() -> None:
    got = cotangents(method="gradcam++", triplets=7).of(np.arange(N))
    assert got.used is not None
    assert got.used.all()
    for a, pairs in enumerate(drawn(triplets=7)):
        for s, pair in enumerate(pairs.tolist()):
            wanted = oracles.mean_cotangent(table(), [pair])
            np.testing.assert_allclose(got.values[a, s], wanted, atol=1e-6)


def test_centred_is_the_image_less_the_mean_without_labels_or_sampling() -> None:
    for labels in (LABELS, None, np.zeros(N, int)):
        got = cotangents(labels=labels, target="centred", norm="around").of(np.arange(N))
        wanted = [oracles.centred_target(table(), a) for a in range(N)]
        np.testing.assert_allclose(got.values, wanted, atol=1e-6)
        assert got.counts.tolist() == [1] * N


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_given_triplets_are_used_as_they_are(method) -> None:
    pairs = np.array([[[(a + 1) % N, (a + 2) % N], [(a + 3) % N, (a + 5) % N]] for a in range(N)])
    got = cotangents(pairs, sampling="given", method=method).of(np.array([4, 1]))
    assert got.counts.tolist() == [2, 2]
    for row, a in enumerate((4, 1)):
        values = got.values[row] if method == "gradcam" else got.values[row].mean(0)
        wanted = oracles.mean_cotangent(table(), pairs[a].tolist())
        np.testing.assert_allclose(values, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "choices",
    [
        {"triplets": 7},
        {"triplets": 7, "method": "gradcam++", "hinge": True},
        {"sampling": "hard"},
        {"sampling": "semihard"},
        {"sampling": "all"},
        {"target": "centred"},
    ],
    ids=str,
)
def test_an_anchors_cotangent_does_not_depend_on_its_company(choices) -> None:
    whole = cotangents(**choices).of(np.arange(N))
    for start in range(0, N, 5):
        part = cotangents(**choices).of(np.arange(start, min(start + 5, N)))
        rows = slice(start, start + 5)
        np.testing.assert_allclose(part.values, whole.values[rows], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(part.counts, whole.counts[rows])
        if whole.used is not None:
            assert part.used is not None
            np.testing.assert_array_equal(part.used, whole.used[rows])


def test_the_nearest_others_are_the_loops_also_among_duplicates() -> None:
    rows = table()
    rows[7:19] = rows[3]  # more copies than neighbours asked for
    for k in (1, 5, N - 1):
        found = NearestOthers(rows)(np.arange(N), k)
        assert found.shape == (N, k)
        for a in range(N):
            assert a not in found[a]
            assert len(set(found[a].tolist())) == k
            got = [oracles.squared_distance(rows[a], rows[i]) for i in found[a]]
            wanted = oracles.nearest(rows, a, range(N), k)
            assert got == [oracles.squared_distance(rows[a], rows[i]) for i in wanted]


def test_triplets_given_without_being_asked_for_and_the_other_way_round() -> None:
    pairs = np.zeros((N, 1, 2), int)
    for given, choices in (
        (pairs, {}),
        (pairs, {"sampling": "given", "target": "centred"}),
        (None, {"sampling": "given"}),
    ):
        with pytest.raises(InputError, match="goes with target 'margin' and sampling 'given'"):
            cotangents(given, **choices)


def test_among_many_images_an_inverted_file_finds_them_the_same_in_any_company() -> None:
    generator = np.random.default_rng(5)
    centres = generator.normal(size=(40, 16))
    rows = centres[generator.integers(40, size=3000)] + 0.3 * generator.normal(size=(3000, 16))
    rows = rows.astype(np.float32)
    rows[100:140] = rows[99]  # copies push an image out of its own list
    finder = NearestOthers(rows, exact=1000)
    anchors = np.arange(80, 160)
    found = finder(anchors, 10)
    for at, anchor in enumerate(anchors):
        assert anchor not in found[at]
        assert len(set(found[at].tolist())) == 10
        assert finder(anchors[at : at + 1], 10).tolist() == found[at : at + 1].tolist()
    again = NearestOthers(rows, exact=1000)(anchors[::-1], 10)[::-1]
    np.testing.assert_array_equal(found, again)
    literal = [oracles.nearest(rows, a, range(3000), 10) for a in anchors[:10]]
    distances = [
        [oracles.squared_distance(rows[a], rows[i]) for i in found[at]]
        for at, a in enumerate(anchors[:10])
    ]
    wanted = [
        [oracles.squared_distance(rows[a], rows[i]) for i in literal[at]]
        for at, a in enumerate(anchors[:10])
    ]
    assert (np.array(distances) == np.array(wanted)).mean() > 0.9
