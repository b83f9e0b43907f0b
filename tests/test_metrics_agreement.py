"""Agreement of weights and of maps by its laws and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import correlations, cosines, map_iou, rank_correlations

PAIRS = hnp.arrays(np.float64, (2, 2, 3, 5), elements=st.sampled_from([-1.5, 0.0, 0.1, 1.0, 2.0]))
OF_MAPS = [correlations, rank_correlations, lambda a, b: map_iou(a, b, 0.3)]


def flat(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(len(maps), -1)


@settings(max_examples=60)
@given(PAIRS)
def test_symmetry_and_range(pair) -> None:
    a, b = pair
    for agreement in [*OF_MAPS, lambda a, b: cosines(flat(a), flat(b))]:
        got = agreement(a, b)
        np.testing.assert_allclose(agreement(b, a), got, atol=1e-15)
        assert ((got >= -1) & (got <= 1)).all()
        itself = agreement(a, a)
        for value, one in zip(itself, a, strict=True):
            varies = one.max() > one.min()
            if agreement in OF_MAPS:
                assert value == (pytest.approx(1, abs=1e-12) if varies else 0.0)
            else:
                assert value == (pytest.approx(1, abs=1e-12) if one.any() else 0.0)


@settings(max_examples=60)
@given(PAIRS, st.sampled_from([0.25, 2.0, 2.0**-1000, 2.0**1000]))
def test_what_each_does_not_see(pair, scale) -> None:
    a, b = pair
    # Scale, for all; a shift, for maps; any increasing change, for ranks and top pixels.
    np.testing.assert_allclose(cosines(flat(a) * scale, flat(b)), cosines(flat(a), flat(b)))
    for agreement in OF_MAPS:
        np.testing.assert_allclose(agreement(a * scale, b), agreement(a, b), atol=1e-12)
    np.testing.assert_allclose(correlations(a * 2 + 3, b), correlations(a, b), atol=1e-12)
    np.testing.assert_allclose(correlations(-a, b), -correlations(a, b), atol=1e-12)
    for agreement in OF_MAPS[1:]:
        np.testing.assert_array_equal(agreement(np.exp(a), b), agreement(a, b))


@pytest.mark.parametrize("level", [0.0, 0.1, -3.3, 5e-324, 1e308])
def test_what_does_not_vary_agrees_with_nothing(level) -> None:
    constant = np.full((2, 3, 7), level)
    other = np.random.default_rng(0).random((2, 3, 7))
    for agreement in OF_MAPS:
        for a, b in [(constant, other), (other, constant), (constant, constant)]:
            assert agreement(a, b).tolist() == [0.0, 0.0]
    assert cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


def test_closed_forms() -> None:
    assert cosines([[3, 4], [1, 0], [1, 2]], [[4, 3], [0, 5], [-2, -4]]).tolist() == pytest.approx(
        [24 / 25, 0, -1]
    )
    ramp = np.arange(6.0).reshape(1, 2, 3)
    assert correlations(ramp, -ramp).tolist() == pytest.approx([-1])
    assert rank_correlations(ramp, np.exp(ramp)).tolist() == pytest.approx([1])
    assert correlations(ramp, np.exp(ramp))[0] < 0.9
    # Half of the pixels each, one of three in both.
    assert map_iou(ramp, [[[0, 9, 8], [0, 0, 7]]], 0.5).tolist() == [0.2]
    # The zeros of two sparse maps are no agreement, however many are asked for.
    assert map_iou([[[5, 0, 0, 0]]], [[[0, 0, 0, 5]]], 0.75).tolist() == [0.0]


ONES = np.ones((1, 3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosines(ONES, ONES), r"weights \[1, 3, 3\] must be \[B K\] with no empty axis"),
        (lambda: cosines(ONES[0], ONES[0, :1]), r"weights have shapes \[3, 3\] and \[1, 3\]; give"),
        (lambda: correlations(ONES, ONES[:, :1]), r"maps have shapes \[1, 3, 3\] and \[1, 1, 3\]"),
        (lambda: correlations(ONES[:0], ONES[:0]), r"maps \[0, 3, 3\] must be \[B H W\]"),
        (lambda: rank_correlations(ONES, ONES * np.nan), "maps must be finite; got a NaN"),
        (lambda: map_iou(ONES, ONES, 0.0), r"fraction = 0.0; it must lie in \(0, 1"),
        (lambda: map_iou(ONES, ONES[0], 0.5), r"maps \[3, 3\] must be \[B H W\]"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
