"""Cotangents of anchors under a recipe, against loops over their triplets."""

import numpy as np
import oracles
import pytest

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
    sampler = TripletSampler(table(), LABELS, NearestOthers(table()), Recipe(**choices))
    return sampler.draw(np.arange(N))


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
