"""Metrics against loops and by their laws."""

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import bootstrap_interval, box_mask, energy_share, recall_at_k

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _fresh_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_energy_share_is_the_loop(data) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    maps = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.5, 2.0, 3.25])))
    masks = data.draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 1.0])))
    got = energy_share(maps, masks)
    wanted = [oracles.energy_in_mask(m, i) for m, i in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_allclose(got + energy_share(maps, 1 - masks), 1, atol=1e-12)
    np.testing.assert_allclose(energy_share(maps * 4, masks), got, atol=1e-12)


def test_a_map_without_energy_scores_chance() -> None:
    inside = np.zeros((1, 4, 4), bool)
    inside[0, :1] = True
    assert energy_share(np.zeros((1, 4, 4)), inside).tolist() == [0.25]
    assert energy_share(np.ones((1, 4, 4)), inside).tolist() == [0.25]


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.floats(-3, 9, width=32)] * 4), st.integers(1, 6), st.integers(1, 6))
def test_a_box_is_the_covered_part_of_each_pixel(box, height, width) -> None:
    got = box_mask(box, (height, width))
    np.testing.assert_allclose(got, oracles.box_mask(box, height, width), atol=1e-12)


def test_a_box_of_whole_pixels_covers_them_and_no_other() -> None:
    got = box_mask((1, 0, 3, 2), (3, 4))
    np.testing.assert_array_equal(got, [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert box_mask((0.25, 0, 3, 2.5), (9, 9)).sum() == pytest.approx(2.75 * 2.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.data())
def test_recall_is_the_loop(seed, n, data) -> None:
    rng = np.random.default_rng(seed)
    embeddings, labels = rng.normal(size=(n, 3)), rng.integers(0, 3, n)
    k = data.draw(st.integers(1, n - 1))
    assert recall_at_k(embeddings, labels, k) == pytest.approx(
        oracles.recall_at(embeddings, labels.tolist(), k)
    )
    if k > 1:
        assert recall_at_k(embeddings, labels, k) >= recall_at_k(embeddings, labels, k - 1)


def test_recall_over_more_images_than_one_block() -> None:
    labels = np.repeat(np.arange(600), 2)
    embeddings = np.stack([labels * 10.0, np.tile([0.0, 1.0], 600)], axis=1)
    assert recall_at_k(embeddings, labels) == 1.0
    assert recall_at_k(embeddings, np.arange(1200)) == 0.0
    # Only the last class is torn apart: 2 of 1200 miss.
    embeddings[-1] = [-5.0, 0.0]
    assert recall_at_k(embeddings, labels) == pytest.approx(1198 / 1200)


def test_recall_never_counts_the_image_itself() -> None:
    assert recall_at_k(np.zeros((3, 2)), np.arange(3), 2) == 0.0


def test_string_labels_are_labels() -> None:
    embeddings = np.array([[0.0], [1.0], [5.0], [6.5]])
    assert recall_at_k(embeddings, np.array(["a", "a", "b", "b"])) == 1.0


def test_errors_say_what_was_given() -> None:
    shapes = r"maps \[2, 3, 3\] and regions \[1, 3, 3\] must both be \[B H W\]"
    with pytest.raises(InputError, match=shapes):
        energy_share(np.zeros((2, 3, 3)), np.zeros((1, 3, 3)))
    with pytest.raises(InputError, match=r"must be >= 0 everywhere; got a NaN or a negative"):
        energy_share(np.full((1, 2, 2), -1.0), np.ones((1, 2, 2)))
    with pytest.raises(InputError, match=r"must be >= 0 everywhere; got a NaN or a negative"):
        energy_share(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)))
    with pytest.raises(InputError, match="k = 3 with 3 images; k must be 1 to N - 1"):
        recall_at_k(np.zeros((3, 2)), np.zeros(3), 3)
    with pytest.raises(InputError, match="k = 0 with 3 images"):
        recall_at_k(np.zeros((3, 2)), np.zeros(3), 0)


def test_the_bootstrap_interval_of_a_normal_mean() -> None:
    values = RNG.normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_takes_another_statistic_and_constants() -> None:
    assert bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)
    low, high = bootstrap_interval(np.arange(101.0), np.median)
    assert 35 < low < 50 < high < 65
