"""Intervals and paired differences by their laws and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import bootstrap_interval, paired_difference

VALUES = hnp.arrays(np.float64, (2, 9), elements=st.integers(-4, 4))


def test_the_bootstrap_interval_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
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


@settings(max_examples=40)
@given(VALUES)
def test_a_difference_turned_around(pair) -> None:
    a, b = pair
    got, turned = (paired_difference(*x, draws=100) for x in [(a, b), (b, a)])
    assert got.mean == -turned.mean
    assert got.low == pytest.approx(-turned.high)
    assert got.high == pytest.approx(-turned.low)
    assert got.win_rate + turned.win_rate == pytest.approx(1)
    assert (a - b).min() <= got.low <= got.high <= (a - b).max()
    assert paired_difference(a * 2 + 1, b * 2 + 1, draws=100).mean == pytest.approx(2 * got.mean)


def test_differences_in_closed_form() -> None:
    same = paired_difference([1.0, 5.0, 2.0], [1.0, 5.0, 2.0])
    assert same == (0.0, 0.0, 0.0, 0.5)
    better = paired_difference([3.0, 4.0, 9.0], [1.0, 2.0, 7.0])
    assert better == (2.0, 2.0, 2.0, 1.0)
    assert paired_difference([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 9.0]).win_rate == 0.625


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    a, b = hard + 1 + rng.normal(0, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    found = paired_difference(a, b)
    assert 0.9 < found.low < found.mean < found.high < 1.1
    alone = bootstrap_interval(a)
    assert alone[1] - alone[0] > 10 * (found.high - found.low)
    assert paired_difference(a, b, seed=1) != found
    assert paired_difference(a, b, level=0.5).low > found.low


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), r"values \[0\] must be \[N\] with no empty axis"),
        (lambda: bootstrap_interval([1.0, np.nan]), "values must be finite; got a NaN"),
        (lambda: bootstrap_interval([1.0], level=95), "level = 95; give a number between 0 and 1"),
        (lambda: bootstrap_interval([1.0], draws=0), "draws = 0; give a whole number of at least "),
        (lambda: paired_difference([1.0], [1.0, 2.0]), r"values have shapes \[1\] and \[2\]; give"),
        (lambda: paired_difference([[1.0]], [[2.0]]), r"values \[1, 1\] must be \[N\]"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
