"""Imputation: what linear interpolation must give, the noise, and a peer where there is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam.errors import InputError
from embedcam.metrics import noisy_linear_imputation

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 2, 9, 7))
MASKS = RNG.random((3, 9, 7)) < 0.7


def test_what_was_not_removed_stays_bit_for_bit() -> None:
    for kind in (np.float16, np.float32, np.float64):
        images = IMAGES.astype(kind)
        before = images.copy()
        filled = noisy_linear_imputation(images, MASKS)
        assert filled.dtype == kind
        np.testing.assert_array_equal(images, before)
        keep = np.broadcast_to(~MASKS[:, None], images.shape)
        np.testing.assert_array_equal(filled[keep], images[keep])
        assert (filled[~keep] != images[~keep]).mean() > 0.9
    nothing = noisy_linear_imputation(IMAGES, np.zeros_like(MASKS))
    np.testing.assert_array_equal(nothing, IMAGES)


def test_a_ramp_is_filled_as_the_ramp_away_from_the_border() -> None:
    ramp = (np.arange(9)[:, None] * 0.5 - np.arange(7))[None, None]
    mask = np.zeros((1, 9, 7), bool)
    mask[0, 2:7, 1:6] = True
    np.testing.assert_allclose(noisy_linear_imputation(ramp, mask, noise=0), ramp, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 6))
def test_laws_of_a_weighted_mean(seed, height, width) -> None:
    rng = np.random.default_rng(seed)
    images, masks = rng.normal(size=(2, 2, height, width)), rng.random((2, height, width)) < 0.8
    masks[:, 0, 0] = False
    filled = noisy_linear_imputation(images, masks, noise=0)
    for image, out, mask in zip(images, filled, masks, strict=True):
        for before, after in zip(image, out, strict=True):
            known = before[~mask]
            assert after.min() >= known.min() - 1e-9
            assert after.max() <= known.max() + 1e-9
    twice = noisy_linear_imputation(images * 2 + 1, masks, noise=0)
    np.testing.assert_allclose(twice, filled * 2 + 1, atol=1e-9)
    turned = noisy_linear_imputation(images[..., ::-1], masks[..., ::-1], noise=0)
    np.testing.assert_allclose(turned[..., ::-1], filled, atol=1e-9)
    constant = noisy_linear_imputation(np.full_like(images, 3.0), masks, noise=0)
    np.testing.assert_allclose(constant, 3.0, atol=1e-12)


def test_batches_of_any_size_give_the_same() -> None:
    masks = MASKS.copy()
    masks[2] = masks[0]
    together = noisy_linear_imputation(IMAGES, masks, seed=5)
    alone = [noisy_linear_imputation(IMAGES[i : i + 1], masks[i : i + 1], seed=5) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-9)
    assert (noisy_linear_imputation(IMAGES, masks, seed=6) != together).any()


def test_the_noise_is_gaussian_and_as_large_as_said() -> None:
    images, masks = np.zeros((1, 3, 40, 40)), np.ones((1, 40, 40), bool)
    masks[0, 0, 0] = False
    noise = noisy_linear_imputation(images, masks, noise=0.25)[:, :, masks[0]].ravel()
    assert noise.mean() == pytest.approx(0, abs=4 * 0.25 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.25, rel=0.04)
    assert (np.abs(noise) < 0.25).mean() == pytest.approx(0.683, abs=0.03)


@pytest.mark.peers
def test_it_is_what_the_peer_computes() -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    filled = noisy_linear_imputation(IMAGES, MASKS, noise=0)
    # Its system alone: what it does around it mixes tensors and arrays, which NumPy 2 warns about.
    for image, mask, got in zip(IMAGES, MASKS, filled, strict=True):
        system = road.NoisyLinearImputer.setup_sparse_system
        matrix, right = system((~mask).astype(float), image, road.neighbors_weights)
        wanted = np.linalg.solve(matrix.toarray(), right).T
        np.testing.assert_allclose(got[:, mask], wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noisy_linear_imputation(IMAGES[0], MASKS), r"images \[2, 9, 7\] must be "),
        (lambda: noisy_linear_imputation(IMAGES.astype(np.uint8), MASKS), "of type uint8 must be "),
        (lambda: noisy_linear_imputation(IMAGES * np.nan, MASKS), "images must be finite"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS[:1]), r"masks \[1, 9, 7\] of type bool wit"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS * 1.0), "of type float64 .* give booleans"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS | True), "removes the whole picture, .* le"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS, noise=-1), "noise = -1; it must be a stan"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS, noise=np.nan), "noise = nan; it must be"),
        (lambda: noisy_linear_imputation(IMAGES, MASKS, seed=-1), "seed = -1; give a whole num"),
        (lambda: noisy_linear_imputation(IMAGES[:0], MASKS[:0]), r"images \[0, 2, 9, 7\] must be"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
