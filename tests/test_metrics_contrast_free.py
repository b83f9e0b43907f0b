"""Contrast-free metrics by their laws; the loops are in test_oracles_metrics.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import (
    average_precision,
    energy_share,
    equal_area_share,
    hottest_precision,
    pixel_auc,
)

LEVELS = st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0])


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    maps = draw(hnp.arrays(np.float64, shape, elements=LEVELS))
    return maps, draw(hnp.arrays(np.bool_, shape))


CONTRAST = {
    "offset": lambda m: m - 0.7,
    "scale": lambda m: m * 3.5,
    "power": lambda m: np.sign(m) * np.abs(m) ** 3,
    "exponential": np.exp,
    "threshold that keeps the order": lambda m: m + 10 * (m > 0),
}


@pytest.mark.parametrize("change", CONTRAST.values(), ids=CONTRAST.keys())
@settings(max_examples=30)
@given(cases())
def test_a_change_of_contrast_changes_nothing(change, case) -> None:
    maps, inside = case
    changed = change(maps)
    for score in (pixel_auc, average_precision, hottest_precision):
        np.testing.assert_allclose(score(changed, inside), score(maps, inside), atol=1e-12)
    halves = inside, ~inside & (maps > -3)
    np.testing.assert_allclose(pixel_auc(changed, *halves), pixel_auc(maps, *halves), atol=1e-12)


def test_a_change_of_contrast_raises_the_energy_and_the_equal_area_share() -> None:
    """What the others are there to tell."""
    maps = np.array([[[4.0, 3.0, 2.0, 1.0]]])
    inside = np.array([[[True, True, False, False]]])
    assert energy_share(np.maximum(maps - 2, 0), inside) > energy_share(maps, inside)
    sharper = equal_area_share(np.maximum(maps - 2, 0), inside, ~inside)
    assert sharper > equal_area_share(maps, inside, ~inside)


@settings(max_examples=30)
@given(cases())
def test_laws(case) -> None:
    maps, inside = case
    np.testing.assert_allclose(pixel_auc(-maps, inside), 1 - pixel_auc(maps, inside))
    np.testing.assert_allclose(pixel_auc(maps, ~inside), 1 - pixel_auc(maps, inside))
    constant = np.full_like(maps, -2.0)
    chance = inside.mean((1, 2))
    np.testing.assert_allclose(pixel_auc(constant, inside), 0.5)
    np.testing.assert_allclose(average_precision(constant, inside), chance, atol=1e-12)
    np.testing.assert_allclose(hottest_precision(constant, inside, 0.3), chance, atol=1e-12)
    np.testing.assert_allclose(hottest_precision(inside, inside), inside.any((1, 2)))
    drawn = np.maximum(maps, 0)
    one, other = equal_area_share(drawn, inside, ~inside), equal_area_share(drawn, ~inside, inside)
    np.testing.assert_allclose(one + other, 1)


def test_a_larger_object_does_not_win_by_its_size() -> None:
    inside = np.zeros((1, 4, 10), bool)
    inside[..., :8] = True
    assert equal_area_share(np.ones((1, 4, 10)), inside, ~inside).tolist() == [0.5]
    assert energy_share(np.ones((1, 4, 10)), inside).tolist() == [0.8]


@pytest.mark.parametrize(
    ("maps", "inside", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), r"both be \[B H W\] of one size"),
        (np.zeros((1, 2, 3)), np.zeros((1, 3, 2)), r"both be \[B H W\] of one size"),
        (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)), "maps must be finite"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), "mask of 255 must be divided by 255"),
    ],
)
def test_what_is_refused(maps, inside, message) -> None:
    for score in (pixel_auc, average_precision, hottest_precision):
        with pytest.raises(InputError, match=message):
            score(maps, inside)


def test_what_is_refused_of_one_alone() -> None:
    maps = np.zeros((1, 2, 2))
    with pytest.raises(InputError, match="fraction = 0; it must lie in"):
        hottest_precision(maps, maps, 0)
    with pytest.raises(InputError, match="not a signed map"):
        equal_area_share(maps - 1, maps, maps)
