"""Transfer: against loops, against scikit-learn, and by its laws."""

import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import KNeighborsRegressor

from embedcam.errors import InputError
from embedcam.ops import coefficients, transfer

RNG = np.random.default_rng(0)
MODES = ["mean", "distance"]
VALUES = st.one_of(st.just(0.0), st.floats(2**-10, 8, width=32), st.floats(-8, -(2**-10), width=32))
DISTANCES = st.one_of(st.just(0.0), st.floats(2**-14, 4, width=32))


@pytest.fixture(autouse=True)
def _fresh_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)


@st.composite
def neighbours(draw, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    n, K = draw(st.integers(least, 5)), draw(st.integers(1, 6))
    rows = draw(hnp.arrays(np.float32, (n, K), elements=VALUES))
    return rows, draw(hnp.arrays(np.float32, n, elements=DISTANCES))


def oracle(rows: np.ndarray, squared: np.ndarray, mode: str) -> np.ndarray:
    if mode == "mean":
        return oracles.transfer_mean(rows)
    return oracles.transfer_distance(rows, squared.tolist())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(neighbours())
def test_transfer_is_the_loop(mode, given_) -> None:
    rows, squared = given_
    got = transfer(rows, squared, mode)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, oracle(rows, squared, mode), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours(), st.randoms(use_true_random=False))
def test_the_order_of_the_neighbours_does_not_matter(mode, given_, random) -> None:
    rows, squared = given_
    order = list(range(len(rows)))
    random.shuffle(order)
    np.testing.assert_allclose(
        transfer(rows[order], squared[order], mode), transfer(rows, squared, mode), atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours())
def test_one_neighbour_hands_on_its_weights_unscaled(mode, given_) -> None:
    rows, squared = given_
    got = transfer(rows[:1], squared[:1], mode)
    np.testing.assert_array_equal(got, rows[0])


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours(least=2), st.floats(0.125, 16, width=32), st.integers(0, 4))
def test_the_length_of_a_neighbours_weights_does_not_matter(mode, given_, factor, which) -> None:
    rows, squared = given_
    longer = rows.copy()
    longer[which % len(rows)] *= np.float32(factor)
    np.testing.assert_allclose(
        transfer(longer, squared, mode), transfer(rows, squared, mode), atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours(least=2), st.floats(0.125, 16, width=32))
def test_the_unit_of_the_distances_does_not_matter(mode, given_, unit) -> None:
    rows, squared = given_
    np.testing.assert_allclose(
        transfer(rows, squared * np.float32(unit), mode), transfer(rows, squared, mode), atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours(least=2))
def test_transferred_weights_are_no_longer_than_one(mode, given_) -> None:
    assert np.linalg.norm(transfer(*given_, mode)) <= 1 + 1e-5


@settings(max_examples=40, deadline=None)
@given(neighbours(least=2))
def test_exact_matches_take_all(given_) -> None:
    rows, squared = given_
    assume(np.linalg.norm(rows, axis=1).all())
    squared = np.maximum(squared, 0.25)
    squared[0] = 0.0
    wanted = rows[0] / np.linalg.norm(rows[0])
    np.testing.assert_allclose(transfer(rows, squared, "distance"), wanted, atol=1e-5)
    # Two of them share it.
    squared[1] = 0.0
    wanted = (wanted + rows[1] / np.linalg.norm(rows[1])) / 2
    np.testing.assert_allclose(transfer(rows, squared, "distance"), wanted, atol=1e-5)


@pytest.mark.parametrize("with_match", [False, True])
def test_distance_is_scikit_learns_convention(with_match) -> None:
    points, rows = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 4))
    query = points[2] if with_match else RNG.normal(size=3)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    regressor = KNeighborsRegressor(4, weights="distance", algorithm="brute").fit(points, units)
    wanted = regressor.predict(query[None])[0]
    euclidean, found = regressor.kneighbors(query[None])
    if with_match:
        assert euclidean[0, 0] == 0.0
    got = transfer(rows[found[0]], euclidean[0] ** 2, "distance")
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_mean_by_hand() -> None:
    rows = np.array([[3.0, 4.0], [0.0, -2.0]], np.float32)
    np.testing.assert_allclose(transfer(rows, np.array([1.0, 9.0])), [0.3, -0.1], rtol=1e-6)
    # Euclidean distances 1 and 3: shares 3/4 and 1/4
    np.testing.assert_allclose(
        transfer(rows, np.array([1.0, 9.0]), "distance"), [0.45, 0.35], rtol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_neighbour_without_evidence_takes_no_share(mode) -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], np.float32)
    squared = np.array([1.0, 0.0, 1.0])
    np.testing.assert_allclose(transfer(rows, squared, mode), [0.3, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(transfer(rows[[1, 1]], squared[[0, 1]], mode), [0.0, 0.0])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_queries(mode) -> None:
    rows, squared = RNG.normal(size=(3, 4, 5)), RNG.random((3, 4))
    squared[1, 2] = 0.0
    got = transfer(rows, squared, mode)
    for b in range(3):
        np.testing.assert_allclose(got[b], transfer(rows[b], squared[b], mode), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_coefficients_apply_to_what_the_weights_are_linear_in(mode) -> None:
    """Codes averaged with the coefficients and decoded once are the transferred weights."""
    basis, offset = RNG.normal(size=(3, 8)), RNG.normal(size=8)
    codes, squared = RNG.normal(size=(4, 3)), RNG.random(4)
    rows = codes @ basis + offset
    c = coefficients(np.linalg.norm(rows, axis=1), squared, mode).astype(float)
    np.testing.assert_allclose(
        (c @ codes) @ basis + c.sum() * offset, transfer(rows, squared, mode), atol=1e-6
    )


def test_errors_say_what_was_given() -> None:
    ones = np.ones(2)
    with pytest.raises(InputError, match=r"transfer = 'median' is unknown; .*mean, dist"):
        coefficients(ones, ones, "median")
    with pytest.raises(InputError, match=r"norms \[2\] and distances \[3\] must have one shape"):
        coefficients(ones, np.ones(3))
    with pytest.raises(InputError, match=r"\[0\].*at least one neighbour"):
        coefficients(np.ones(0), np.ones(0))
    for bad in (np.array([1.0, -1.0]), np.array([np.nan, 1.0])):
        with pytest.raises(InputError, match="numbers >= 0; got a NaN or a negative value"):
            coefficients(ones, bad)
        with pytest.raises(InputError, match="numbers >= 0; got a NaN or a negative value"):
            coefficients(bad, ones)
