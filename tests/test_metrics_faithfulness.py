"""Removal orders, curves, ranks and drops by their laws and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import (
    average_drop,
    average_increase,
    curve_area,
    deletion_steps,
    leaves_top,
    rank_drop,
    rank_of,
    removal_masks,
    score_drops,
)

MAPS = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.5, 2.0, 3.25]))
)
SCORES = hnp.arrays(np.float64, (3, 7), elements=st.floats(-1e3, 1e3, width=32))


@settings(max_examples=40)
@given(MAPS, st.data())
def test_the_order_of_removal(maps, data) -> None:
    steps = data.draw(st.integers(1, maps[0].size))
    order, masks = deletion_steps(maps, steps)
    assert masks.shape == (len(maps), steps + 1, *maps.shape[1:])
    assert masks.dtype == bool
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    # Each holds the one before it, and all maps lose the same number at a time.
    assert (masks[:, 1:] >= masks[:, :-1]).all()
    counts = masks.sum((2, 3))
    np.testing.assert_array_equal(counts, np.broadcast_to(counts[0], counts.shape))
    assert np.abs(counts[0] - np.arange(steps + 1) * maps[0].size / steps).max() <= 0.5
    values = np.take_along_axis(maps.reshape(len(maps), -1), order, axis=1)
    assert (np.diff(values, axis=1) <= 0).all()
    assert (np.sort(order, axis=1) == np.arange(maps[0].size)).all()
    # Any increasing change of the values leaves the order alone.
    for changed in (np.sqrt(maps), maps * 1e-300, maps**3 + 1):
        np.testing.assert_array_equal(deletion_steps(changed, steps)[0], order)
    for j in range(1, steps + 1):
        if counts[0, j]:
            np.testing.assert_array_equal(
                removal_masks(maps, counts[0, j] / maps[0].size), masks[:, j]
            )


def test_ties_go_by_position() -> None:
    order, masks = deletion_steps([[[0, 2, 1], [2, 0, 2]]], 2)
    assert order.tolist() == [[1, 3, 5, 2, 0, 4]]
    assert masks[0, 1].tolist() == [[False, True, False], [True, False, True]]
    assert deletion_steps(np.zeros((1, 2, 2)), 4)[0].tolist() == [[0, 1, 2, 3]]


def test_a_fraction_takes_at_least_one_pixel() -> None:
    assert removal_masks(np.eye(10)[None], 1e-9).sum() == 1
    assert removal_masks(np.eye(10)[None], 0.29).sum() == 29
    assert removal_masks(np.eye(10)[None], 1).all()


@settings(max_examples=40)
@given(hnp.arrays(np.float64, (2, 6), elements=st.floats(-1e3, 1e3, width=32)), st.floats(-50, 50))
def test_the_area_of_a_curve(scores, level) -> None:
    area = curve_area(scores)
    assert ((area >= scores.min(1)) & (area <= scores.max(1))).all()
    np.testing.assert_allclose(curve_area(scores + level), area + level, atol=1e-9)
    np.testing.assert_allclose(curve_area(-scores), -area, atol=1e-12)
    np.testing.assert_allclose(curve_area(scores[:, ::-1]), area, atol=1e-9)
    assert curve_area(np.full((1, 9), level)).tolist() == [level]


def test_curves_in_closed_form() -> None:
    assert curve_area([[1.0, 0.0]]).tolist() == [0.5]
    np.testing.assert_allclose(curve_area([np.linspace(3, -1, 11)]), 1.0, atol=1e-15)
    assert curve_area([[1e308] * 4]).tolist() == [1e308]


def test_a_perfect_fall() -> None:
    before, after = rank_of([[9, 1, 2, 3]], [0]), rank_of([[0, 1, 2, 3]], [0])
    assert (before.tolist(), after.tolist()) == ([1.0], [4.0])
    assert rank_drop(before, after).tolist() == [3.0]
    assert rank_drop(after, before).tolist() == [-3.0]
    assert leaves_top(before, after, 3).tolist() == [True]
    assert leaves_top(before, after, 4).tolist() == [False]
    # What was not there cannot leave.
    assert leaves_top([5.0, 2.0], [9.0, 1.0], 2).tolist() == [False, False]


@settings(max_examples=40)
@given(hnp.arrays(np.int64, (2, 5), elements=st.integers(-2, 2)), st.permutations(range(5)))
def test_ranks_know_no_storage_order(scores, moved) -> None:
    ranks = np.stack([rank_of(scores, [item] * 2) for item in range(5)], axis=1)
    assert ((ranks >= 1) & (ranks <= 5)).all()
    np.testing.assert_allclose(ranks.sum(1), 15)
    np.testing.assert_array_equal(rank_of(scores**3 * 2.0 - 1, [3, 3]), ranks[:, 3])
    again = np.stack([rank_of(scores[:, moved], [item] * 2) for item in range(5)], axis=1)
    np.testing.assert_array_equal(again, ranks[:, moved])


@settings(max_examples=60)
@given(SCORES, st.sampled_from([1.0, 2.0, 0.125]), st.integers(-4, 4))
def test_a_drop_knows_neither_unit_nor_zero(scores, scale, level) -> None:
    y, masked, base = np.round(scores)
    drops, counted = score_drops(y, masked, base)
    assert ((drops >= 0) & (drops <= 1)).all()
    np.testing.assert_array_equal(counted, y > base)
    moved = score_drops(y * scale + level, masked * scale + level, base * scale + level)
    np.testing.assert_allclose(moved[0], drops, atol=1e-12)
    np.testing.assert_array_equal(moved[1], counted)
    # Masking into the base loses all there is, keeping the score loses nothing.
    np.testing.assert_array_equal(score_drops(y, base, base)[0], counted)
    assert not score_drops(y, y, base)[0].any()
    if counted.any():
        assert average_drop(y, masked, base) == pytest.approx(drops[counted].mean())


def test_probabilities_drop_as_in_the_paper() -> None:
    y, masked = np.array([0.8, 0.5, 0.9, 0.4]), np.array([0.2, 0.6, 0.9, 0.0])
    wanted = np.mean(np.maximum(0, y - masked) / y)
    assert average_drop(y, masked, np.zeros(4)) == pytest.approx(wanted)
    assert average_increase(y, masked) == 0.25


def test_what_has_nothing_to_lose_is_not_counted() -> None:
    drops, counted = score_drops([-1.0, -3.0, 2.0], [-2.0, -9.0, 5.0], [-3.0, -3.0, 4.0])
    assert drops.tolist() == [0.5, 0.0, 0.0]
    assert counted.tolist() == [True, False, False]
    assert average_drop([-1.0, -3.0, 2.0], [-2.0, -9.0, 5.0], [-3.0, -3.0, 4.0]) == 0.5


def test_extreme_scores_are_still_shares() -> None:
    drops, _ = score_drops([1e308, 5e-324], [0.0, 0.0], [-1e308, 0.0])
    np.testing.assert_allclose(drops, [0.5, 1.0])


@settings(max_examples=30)
@given(SCORES)
def test_an_increase_survives_any_increasing_change(scores) -> None:
    y, masked, _ = np.round(scores)
    share = average_increase(y, masked)
    assert 0 <= share <= 1
    assert average_increase(y * 8 - 3, masked * 8 - 3) == pytest.approx(share)
    np.testing.assert_allclose(share + average_increase(masked, y) + (y == masked).mean(), 1)


ONES = np.ones((1, 3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deletion_steps(ONES[0], 2), r"maps \[3, 3\] must be \[B H W\] with no empty axis"),
        (lambda: deletion_steps(-ONES, 2), "must be >= 0 everywhere.*give it as ReLU leaves it"),
        (lambda: deletion_steps(ONES, 10), "steps = 10; give a whole number from 1 to 9"),
        (lambda: deletion_steps(ONES, 0), "steps = 0; give a whole number from 1 to 9"),
        (lambda: deletion_steps(ONES, 2.5), "steps = 2.5; give a whole number"),  # type: ignore[arg-type]
        (lambda: deletion_steps(ONES, True), "steps = True; give a whole number"),
        (lambda: removal_masks(ONES, 0.0), r"fraction = 0.0; it must lie in \(0, 1\]: 0.2 means"),
        (lambda: removal_masks(ONES * np.nan, 0.5), "got a NaN or a negative value"),
        (lambda: curve_area([[1.0]]), r"scores \[B 1\] are no curve; give the score before and"),
        (lambda: curve_area([1.0, 2.0]), r"scores \[2\] must be \[B S\+1\]"),
        (lambda: curve_area([[1.0, np.nan]]), "scores must be finite; got a NaN or an infinity: l"),
        (lambda: rank_of([[1.0, 2.0]], [2]), "items 2 to 2 of a gallery of 2; give places from 0 "),
        (lambda: rank_of([[1.0, 2.0]], [-1]), "items -1 to -1 of a gallery of 2"),
        (lambda: rank_of([[1.0, 2.0]], [0.0]), "of type float64 .* give one whole number a query"),
        (lambda: rank_of([[1.0, 2.0]], [0, 1]), r"items \[2\] of type int64 with scores \[1, 2\]"),
        (lambda: rank_drop([1.0], [1.0, 2.0]), r"ranks before and after have shapes \[1\] and "),
        (lambda: rank_drop([0.0], [1.0]), "a rank of 0; ranks begin at 1, as `rank_of` counts"),
        (lambda: leaves_top([1.0], [2.0], 0), "k = 0; give a whole number of at least 1"),
        (lambda: score_drops([1.0], [1.0, 2.0], [0.0]), r"full and masked scores have shapes "),
        (lambda: score_drops([1.0], [1.0], [0.0, 0.0]), "full and base scores have shapes"),
        (lambda: average_drop([], [], []), r"scores \[0\] must be \[B\] with no empty axis"),
        (lambda: average_drop([1.0], [0.0], [2.0]), "none of 1 images .* give other images or ano"),
        (lambda: average_increase([1.0], [np.inf]), "scores must be finite"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
