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
    resize,
    signed_cam,
    transfer,
)

RNG = np.random.default_rng(0)
NUMBERS = st.floats(-8, 8, width=32)
SIDES = st.integers(1, 9)
MODES = ["mean", "distance"]
VALUES = st.one_of(st.just(0.0), st.floats(2**-10, 8, width=32), st.floats(-8, -(2**-10), width=32))
DISTANCES = st.one_of(st.just(0.0), st.floats(2**-14, 4, width=32))


@pytest.fixture(autouse=True)
def _fresh_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)


def maps() -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=NUMBERS)


def both(array: np.ndarray) -> list:
    return [array, torch.from_numpy(array)]


@settings(max_examples=40, deadline=None)
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


def test_a_map_scales_with_its_weights_and_adds_only_before_the_cut() -> None:
    w, v, A = RNG.normal(size=5), RNG.normal(size=5), RNG.normal(size=(5, 3, 3))
    np.testing.assert_allclose(cam(3.0 * w, A), 3.0 * cam(w, A), rtol=1e-12)
    # Linear before the ReLU: f(w) - f(-w) is the signed sum.
    signed = lambda x: cam(x, A) - cam(-x, A)  # noqa: E731
    np.testing.assert_allclose(signed(w + v), signed(w) + signed(v), atol=1e-12)
    # The ReLU itself is not linear: a map of two vectors is not the sum of their maps.
    assert not np.allclose(cam(w, A) + cam(-w, A), cam(w - w, A))


@pytest.mark.parametrize(
    ("w", "a"),
    [((3,), (4, 2, 2)), ((2, 3), (3, 2, 2)), ((2, 3), (4, 3, 2, 2)), ((), (2, 2)), ((3,), (3, 2))],
)
def test_shapes_that_do_not_belong_together_are_named(w, a) -> None:
    with pytest.raises(InputError) as caught:
        cam(np.zeros(w), np.zeros(a))
    message = str(caught.value)
    assert str(list(w)) in message
    assert str(list(a)) in message
    assert "[B K] with [B K H W], or [K] with [K H W]" in message


@settings(max_examples=40, deadline=None)
@given(maps(), SIDES, SIDES)
def test_resizing_is_the_loop(image, height, width) -> None:
    wanted = oracles.bilinear(image, height, width)
    for given_ in both(image):
        got = resize(given_, (height, width))
        np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-5)
    np.testing.assert_allclose(resize(image.astype(float), (height, width)), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [(224, 224), (7, 7), (10, 3), (1, 1), (5, 300)])
def test_resizing_is_torchs_without_aligned_corners(size) -> None:
    A = torch.from_numpy(RNG.random((2, 7, 7)))
    wanted = torch.nn.functional.interpolate(A[None], size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(A, size).numpy(), wanted[0].numpy(), atol=1e-12)
    assert resize(A.float(), size).dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(maps(), SIDES, SIDES)
def test_resizing_stays_within_the_maps_range_and_keeps_constants(image, height, width) -> None:
    got = resize(image, (height, width))
    slack = 1e-5 * (1 + np.abs(image).max())
    assert got.min() >= image.min() - slack
    assert got.max() <= image.max() + slack
    constant = resize(np.full_like(image, 3.5), (height, width))
    np.testing.assert_allclose(constant, 3.5, rtol=1e-6)
    np.testing.assert_allclose(resize(image, image.shape), image, atol=1e-6)


@settings(max_examples=40, deadline=None)
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


def test_area_averaging_refuses_to_enlarge() -> None:
    with pytest.raises(InputError, match="2 x 3 map cannot be averaged to 3 x 3; use resize"):
        area_average(np.zeros((2, 3)), (3, 3))


@pytest.mark.parametrize("function", [resize, area_average])
def test_an_empty_size_is_refused(function) -> None:
    with pytest.raises(InputError, match=r"size \(0, 4\) has an empty side.*both >= 1"):
        function(np.zeros((5, 5)), (0, 4))


def test_many_maps_at_once_are_each_their_own() -> None:
    A = RNG.random((2, 3, 5, 4))
    for function in (resize, area_average):
        whole = function(A, (3, 2))
        assert whole.shape == (2, 3, 3, 2)
        for index in np.ndindex(2, 3):
            np.testing.assert_allclose(whole[index], function(A[index], (3, 2)), atol=1e-12)
    whole = normalize(A)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(whole[index], oracles.min_max(A[index]), atol=1e-12)


@settings(max_examples=40, deadline=None)
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


def test_what_is_given_is_not_changed() -> None:
    w, A = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 3, 4, 4))
    before = A.copy()
    cam(w, A)
    for function in (lambda a: resize(a, (2, 2)), lambda a: area_average(a, (2, 2)), normalize):
        function(A)
    np.testing.assert_array_equal(A, before)


def test_two_views_count_alike_in_the_units_of_the_coarse_one() -> None:
    generator = np.random.default_rng(3)
    coarse, fine = 5 + 3 * generator.normal(size=(2, 3)), 40 * generator.normal(size=(4, 6)) - 7
    upper = resize(coarse, (4, 6))
    expected = np.zeros((4, 6))
    for y in range(4):
        for x in range(6):
            first = (upper[y, x] - upper.mean()) / upper.std()
            second = (fine[y, x] - fine.mean()) / fine.std()
            expected[y, x] = upper.std() * (first + second)
    np.testing.assert_allclose(joined(coarse, fine), expected, atol=1e-12)
    scaled = joined(2 * coarse, 1e-3 * fine + 9)
    np.testing.assert_allclose(scaled, 2 * expected, atol=1e-9)


def test_a_view_without_contrast_adds_nothing() -> None:
    fine = np.random.default_rng(4).normal(size=(4, 4))
    assert not joined(np.ones((2, 2)), fine).any()
    coarse = np.random.default_rng(5).normal(size=(2, 2))
    upper = resize(coarse, (4, 4))
    np.testing.assert_allclose(joined(coarse, np.full((4, 4), 3.0)), upper - upper.mean())
    rounded = np.float32(3) + np.float32(3e-7) * (fine > 0)
    np.testing.assert_allclose(joined(coarse, rounded), upper - upper.mean())


# --- transfer ---


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
@given(neighbours(least=2), st.floats(0.125, 16, width=32), st.integers(0, 4), st.randoms())
def test_order_length_and_unit_do_not_matter(mode, given_, factor, which, random) -> None:
    rows, squared = given_
    wanted = transfer(rows, squared, mode)
    order = list(range(len(rows)))
    random.shuffle(order)
    longer = rows.copy()
    longer[which % len(rows)] *= np.float32(factor)
    for changed in (
        (rows[order], squared[order]),
        (longer, squared),
        (rows, squared * np.float32(factor)),
    ):
        np.testing.assert_allclose(transfer(*changed, mode), wanted, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(neighbours(least=2))
def test_transferred_weights_are_no_longer_than_one(mode, given_) -> None:
    assert np.linalg.norm(transfer(*given_, mode)) <= 1 + 1e-5


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
