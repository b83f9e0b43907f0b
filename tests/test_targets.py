"""Targets: the sign, the cotangents and the norm's two ways, against numerical derivatives."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.recipe import NORMS
from embedcam.targets import centred_cotangent, head_cotangent, margin_cotangent, through_norm

WIDTH = st.shared(st.integers(2, 6), key="D")
FLOATS = st.floats(-4, 4, width=32)
VECTORS = WIDTH.flatmap(lambda d: hnp.arrays(np.float64, (3, d), elements=FLOATS))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@settings(max_examples=50, deadline=None)
@given(VECTORS)
def test_the_margins_cotangent_is_its_numerical_gradient_and_minus_the_losss(vectors) -> None:
    a, p, n = vectors
    c = margin_cotangent(p, n)
    np.testing.assert_allclose(c, oracles.margin_gradient(a, p, n), atol=1e-6)
    # The sign: a step along the cotangent lowers the triplet loss, wherever it is not yet zero.
    step = 1e-3 * c
    delta = 1.0 + oracles.margin(a, p, n) + 100 * float(c @ step)
    before, after = (oracles.triplet_loss(x, p, n, delta) for x in (a, a + step))
    if np.linalg.norm(c) > 1e-3:
        assert after < before
    assert before - after == pytest.approx(float(c @ step), abs=1e-9)


def test_the_margins_cotangent_is_linear_in_the_triplets() -> None:
    p, n = numbers(2, 50, 7)
    mean, triplets = margin_cotangent(p.mean(0), n.mean(0)), [(i, 50 + i) for i in range(50)]
    np.testing.assert_allclose(margin_cotangent(p, n).mean(0), mean, atol=1e-14)
    expected = oracles.mean_cotangent(np.concatenate([p, n]), triplets)
    np.testing.assert_allclose(mean, expected, atol=1e-14)


def test_the_centred_cotangent_is_the_loop() -> None:
    embeddings = numbers(9, 4)
    expected = [oracles.centred_target(embeddings, i) for i in range(9)]
    got = centred_cotangent(embeddings, embeddings.mean(0))
    np.testing.assert_allclose(got, expected, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(VECTORS, st.floats(0.125, 16))
def test_through_the_norm_is_the_numerical_gradient(vectors, length) -> None:
    z, c, _ = vectors
    if np.linalg.norm(z) < 0.1:
        return
    z = unit(z) * length
    got = through_norm(c, unit(z), np.asarray(length))
    step = 1e-5 * length
    wanted = []
    for i in range(len(z)):
        away = np.zeros_like(z)
        away[i] = step
        wanted.append((c @ unit(z + away) - c @ unit(z - away)) / (2 * step))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(VECTORS, st.floats(0.125, 16))
def test_through_the_norm_nothing_is_left_along_the_embedding(vectors, length) -> None:
    """y does not change when z is scaled: what makes positive and negative areas equal."""
    f, c, d = vectors
    if np.linalg.norm(f) < 0.1:
        return
    f, length = unit(f), np.asarray(length)
    got = through_norm(c, f, length)
    assert float(got @ f) == pytest.approx(0, abs=1e-10)
    # Linear in the cotangent, and shorter for a longer z.
    both = 2 * got + through_norm(d, f, length)
    np.testing.assert_allclose(through_norm(2 * c + d, f, length), both, atol=1e-10)
    np.testing.assert_allclose(through_norm(c, f, 2 * length), got / 2, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalized", [True, False])
def test_the_heads_cotangent_goes_the_way_that_was_named(norm, normalized) -> None:
    (f, c), length = numbers(2, 4), np.asarray(3.0)
    f = unit(f)
    got = head_cotangent(c, f, length, norm, normalized)
    if normalized and norm == "through":
        assert not np.allclose(got, c)
        np.testing.assert_array_equal(got, through_norm(c, f, length))
    else:
        np.testing.assert_array_equal(got, c)


def test_tensors_and_batches_give_what_arrays_and_rows_give() -> None:
    z, c = numbers(2, 3, 5, 4)
    length = np.linalg.norm(z, axis=-1)
    f = z / length[..., None]
    got = through_norm(c, f, length)
    for i in np.ndindex(3, 5):
        np.testing.assert_allclose(got[i], through_norm(c[i], f[i], length[i]), atol=1e-14)
    tensors = through_norm(*(torch.from_numpy(x) for x in (c, f, length)))
    np.testing.assert_allclose(tensors.numpy(), got, atol=1e-14)
    tensors = margin_cotangent(torch.from_numpy(z), torch.from_numpy(c))
    np.testing.assert_array_equal(tensors.numpy(), margin_cotangent(z, c))
