"""Maps, resizing, averaging and transfer: against loops, torch and scikit-learn, by their laws."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import KNeighborsRegressor

from embedcam.errors import InputError
from embedcam.ops import (
    area_average,
    cam,
    coefficients,
    joined,
    normalize,
    product,
    resize,
    signed_cam,
    transfer,
)

NUMBERS = st.floats(-8, 8, width=32)
SIDES = st.integers(1, 9)
MODES = ["mean", "distance"]
VALUES = st.one_of(st.just(0.0), st.floats(2**-10, 8, width=32), st.floats(-8, -(2**-10), width=32))
DISTANCES = st.one_of(st.just(0.0), st.floats(2**-14, 4, width=32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def maps() -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=NUMBERS)


def both(array: np.ndarray) -> list:
    return [array, torch.from_numpy(array)]


@pytest.mark.parametrize("shape", [(3, 4, 5), (10, 128, 205), (10, 128, 1280), (70, 64, 90)])
def test_a_product_in_pieces_is_the_product(rng, shape, monkeypatch) -> None:
    few, matrix = rng.standard_normal(shape[:2]), rng.standard_normal(shape[1:])
    expected = np.einsum("nr,rk->nk", few, matrix)  # no BLAS
    np.testing.assert_allclose(product(few, matrix), expected, rtol=1e-12, atol=1e-12)
    assert product(few.astype("f4"), matrix.astype("f4")).dtype == np.float32
    monkeypatch.setattr("embedcam.ops._ALONE", 1)  # a column at a time
    np.testing.assert_allclose(product(few, matrix), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(st.data())
def test_the_map_is_the_loop_over_channels(data) -> None:
    B, K, H, W = (data.draw(st.integers(1, 4)) for _ in range(4))
    w = data.draw(hnp.arrays(np.float64, (B, K), elements=NUMBERS))
    A = data.draw(hnp.arrays(np.float64, (B, K, H, W), elements=NUMBERS))
    got = cam(w, A)
    assert got.shape == (B, H, W)
    for b in range(B):
        np.testing.assert_allclose(got[b], oracles.cam(w[b], A[b]), atol=1e-10)
        np.testing.assert_allclose(cam(w[b], A[b]), got[b], atol=1e-12)
        signed = signed_cam(w[b], A[b])
        np.testing.assert_allclose(np.minimum(signed, 0), -oracles.cam(-w[b], A[b]), atol=1e-10)


def test_the_map_by_hand() -> None:
    # 2 * [1 0 -1] - 1 * [0 3 -4] = [2 -3 2], cut at zero
    A = np.array([[[1.0, 0.0, -1.0]], [[0.0, 3.0, -4.0]]], np.float32)
    for w, a in zip(both(np.array([2.0, -1.0], np.float32)), both(A), strict=True):
        got = cam(w, a)
        assert type(got) is type(a)
        assert got.dtype == a.dtype
        np.testing.assert_array_equal(np.asarray(got), [[2.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("w", "a"),
    [((3,), (4, 2, 2)), ((2, 3), (3, 2, 2)), ((2, 3), (4, 3, 2, 2)), ((), (2, 2)), ((3,), (3, 2))],
)
def test_shapes_that_do_not_belong_together_are_named(w, a) -> None:
    with pytest.raises(InputError) as caught:
        cam(np.zeros(w), np.zeros(a))
    for words in (str(list(w)), str(list(a)), "[B K] with [B K H W], or [K] with [K H W]"):
        assert words in str(caught.value)


@settings(max_examples=40)
@given(maps(), SIDES, SIDES)
def test_resizing_is_the_loop(image, height, width) -> None:
    wanted = oracles.bilinear(image, height, width)
    for given_ in both(image):
        got = resize(given_, (height, width))
        np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-5)
    np.testing.assert_allclose(resize(image.astype(float), (height, width)), wanted, atol=1e-12)


@settings(max_examples=40)
@given(maps(), st.data())
def test_area_averaging_is_the_loop_and_keeps_the_mean(image, data) -> None:
    h, w = image.shape
    size = data.draw(st.tuples(st.integers(1, h), st.integers(1, w)))
    wanted = oracles.area_average(image, *size)
    for given_ in both(image):
        np.testing.assert_allclose(np.asarray(area_average(given_, size)), wanted, atol=1e-4)
    got = area_average(image.astype(float), size)
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    np.testing.assert_allclose(got.mean(), image.astype(float).mean(), atol=1e-12)


def test_sizes_that_cannot_be_are_refused() -> None:
    for function in (resize, area_average):
        with pytest.raises(InputError, match=r"size \(0, 4\) has an empty side.*both >= 1"):
            function(np.zeros((5, 5)), (0, 4))
    with pytest.raises(InputError, match="2 x 3 map cannot be averaged to 3 x 3; use resize"):
        area_average(np.zeros((2, 3)), (3, 3))


def test_many_maps_at_once_are_each_their_own(rng) -> None:
    A = rng.random((2, 3, 5, 4))
    for function in (resize, area_average):
        whole = function(A, (3, 2))
        assert whole.shape == (2, 3, 3, 2)
        for index in np.ndindex(2, 3):
            np.testing.assert_allclose(whole[index], function(A[index], (3, 2)), atol=1e-12)
    whole = normalize(A)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(whole[index], oracles.min_max(A[index]), atol=1e-12)


@settings(max_examples=40)
@given(maps())
def test_min_max_is_the_loop(image) -> None:
    for given_ in both(image):
        got = np.asarray(normalize(given_))
        np.testing.assert_allclose(got, oracles.min_max(image), atol=1e-5)
        assert got.min() == 0.0
        assert got.max() in (0.0, pytest.approx(1.0))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 7.0])
def test_a_constant_map_normalises_to_zeros(value) -> None:
    for given_ in both(np.full((2, 3, 3), value, np.float32)):
        np.testing.assert_array_equal(np.asarray(normalize(given_)), np.zeros((2, 3, 3)))


def test_what_is_given_is_not_changed(rng) -> None:
    w, A = rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 4, 4))
    before = A.copy()
    cam(w, A)
    for function in (lambda a: resize(a, (2, 2)), lambda a: area_average(a, (2, 2)), normalize):
        function(A)
    np.testing.assert_array_equal(A, before)


def test_two_views_count_alike_in_the_units_of_the_coarse_one(rng) -> None:
    coarse, fine = 5 + 3 * rng.normal(size=(2, 3)), 40 * rng.normal(size=(4, 6)) - 7
    upper = resize(coarse, (4, 6))
    expected = upper - upper.mean() + upper.std() * (fine - fine.mean()) / fine.std()
    np.testing.assert_allclose(joined(coarse, fine), expected, atol=1e-12)
    scaled = joined(2 * coarse, 1e-3 * fine + 9)
    np.testing.assert_allclose(scaled, 2 * expected, atol=1e-9)


def test_a_view_without_contrast_adds_nothing(rng) -> None:
    coarse, fine = rng.normal(size=(2, 2)), rng.normal(size=(4, 4))
    assert not joined(np.ones((2, 2)), fine).any()
    upper = resize(coarse, (4, 4))
    np.testing.assert_allclose(joined(coarse, np.full((4, 4), 3.0)), upper - upper.mean())
    rounded = np.float32(3) + np.float32(3e-7) * (fine > 0)
    np.testing.assert_allclose(joined(coarse, rounded), upper - upper.mean())


# --- transfer ---


@settings(max_examples=60)
@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_transfer_is_the_loop(data, n, K) -> None:
    rows = data.draw(hnp.arrays(np.float32, (n, K), elements=VALUES))
    squared = data.draw(hnp.arrays(np.float32, n, elements=DISTANCES))
    mean, near = (transfer(rows, squared, mode) for mode in MODES)
    assert mean.dtype == near.dtype == np.float32
    np.testing.assert_allclose(mean, oracles.transfer_mean(rows), atol=1e-5)
    wanted = oracles.transfer_distance(rows, squared.tolist())
    np.testing.assert_allclose(near, wanted, atol=1e-5)


@pytest.mark.parametrize("with_match", [False, True])
def test_distance_is_scikit_learns_convention(rng, with_match) -> None:
    points, rows = rng.normal(size=(6, 3)), rng.normal(size=(6, 4))
    query = points[2] if with_match else rng.normal(size=3)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    regressor = KNeighborsRegressor(4, weights="distance", algorithm="brute").fit(points, units)
    wanted = regressor.predict(query[None])[0]
    euclidean, found = regressor.kneighbors(query[None])
    assert (euclidean[0, 0] == 0.0) == with_match
    got = transfer(rows[found[0]], euclidean[0] ** 2, "distance")
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_queries(rng, mode) -> None:
    rows, squared = rng.normal(size=(3, 4, 5)), rng.random((3, 4))
    squared[1, 2] = 0.0
    got = transfer(rows, squared, mode)
    for b in range(3):
        np.testing.assert_allclose(got[b], transfer(rows[b], squared[b], mode), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_coefficients_apply_to_what_the_weights_are_linear_in(rng, mode) -> None:
    """Codes averaged with the coefficients and decoded once are the transferred weights."""
    basis, offset = rng.normal(size=(3, 8)), rng.normal(size=8)
    codes, squared = rng.normal(size=(4, 3)), rng.random(4)
    rows = codes @ basis + offset
    c = coefficients(np.linalg.norm(rows, axis=1), squared, mode).astype(float)
    decoded = (c @ codes) @ basis + c.sum() * offset
    np.testing.assert_allclose(decoded, transfer(rows, squared, mode), atol=1e-6)


def test_errors_say_what_was_given() -> None:
    ones = np.ones(2)
    with pytest.raises(InputError, match=r"transfer = 'median' is unknown; .*mean, dist"):
        coefficients(ones, ones, "median")
    with pytest.raises(InputError, match=r"norms \[2\] and distances \[3\] must have one shape"):
        coefficients(ones, np.ones(3))
    with pytest.raises(InputError, match=r"\[0\].*at least one neighbour"):
        coefficients(np.ones(0), np.ones(0))
    for bad in (np.array([1.0, -1.0]), np.array([np.nan, 1.0])):
        for given_ in ((ones, bad), (bad, ones)):
            with pytest.raises(InputError, match="numbers >= 0; got a NaN or a negative value"):
                coefficients(*given_)
