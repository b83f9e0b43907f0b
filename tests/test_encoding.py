"""Encodings: rows of bytes and back, against loops, and what each promises to keep."""

import json

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.index.encoding import Dense, Encoding, LowRank, TopM, fit_pca, from_spec

RNG = np.random.default_rng(0)
# Embedding gradients are about 1e-4: plain half precision would keep few of their bits.
SIZES = st.sampled_from([1e-9, 1e-4, 1.0, 3e4, 1e12])


@pytest.fixture(autouse=True)
def _fresh_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)


@st.composite
def vectors(draw, width: int | None = None) -> np.ndarray:
    n, K = draw(st.integers(1, 4)), width or draw(st.integers(1, 12))
    unit = draw(hnp.arrays(np.float32, (n, K), elements=st.floats(-1, 1, width=32)))
    return unit * np.float32(draw(SIZES))


def random_rows(n: int = 30, K: int = 9, size: float = 1e-4) -> np.ndarray:
    mixing = RNG.normal(size=(K, K)) * np.linspace(1, 0.05, K)[:, None]
    return ((RNG.normal(size=(n, K)) + 0.5) @ mixing * size).astype(np.float32)


def every_encoding(dtype: str) -> list[Encoding]:
    basis, offset = RNG.normal(size=(3, 9)), RNG.normal(size=9)
    return [
        Dense(9, dtype),
        TopM(9, 4, "signed", dtype),
        TopM(9, 4, "magnitude", dtype),
        fit_pca(random_rows(), 3, dtype),
        LowRank(basis, offset, "head", "stored", dtype),
        LowRank(basis, offset, "head", "embedding", dtype),
    ]


def rows_of(encoding: Encoding, n: int = 5) -> dict[str, np.ndarray]:
    if isinstance(encoding, LowRank) and encoding.origin == "head":
        codes = RNG.normal(size=(n, encoding.rank)).astype(np.float32)
        rows = encoding.encode_codes(codes)
        return {**rows, "embedding": codes} if encoding.uses_embedding else rows
    return encoding.encode(random_rows(n, encoding.n_channels))


def case(encoding: Encoding) -> str:
    extra = getattr(encoding, "by", getattr(encoding, "codes", ""))
    return f"{encoding.name}-{extra}-{encoding.dtype}"


ALL = [e for dtype in ("float16", "float32") for e in every_encoding(dtype)]


@settings(max_examples=60)
@given(vectors())
def test_half_precision_keeps_eleven_bits_at_any_size_and_single_all(w) -> None:
    half, single = Dense(w.shape[1]), Dense(w.shape[1], "float32")
    np.testing.assert_array_equal(single.decode(single.encode(w)), w)
    got = half.decode(half.encode(w))
    assert got.dtype == np.float32
    for there, here in zip(w, got, strict=True):
        assert (np.abs(there.astype(float) - here) <= oracles.half_bound(there)).all()


def test_half_precision_is_the_ieee_rounding_of_the_quotient() -> None:
    w = random_rows()
    rows = Dense(9).encode(w)
    for row, values, scale in zip(w, rows["values"], rows["scales"], strict=True):
        assert scale == max(abs(float(v)) for v in row)
        assert values.tolist() == [oracles.half(float(np.float32(v) / scale)) for v in row]


@pytest.mark.parametrize("encoding", [Dense(9), TopM(9, 4), Dense(9, "float32")], ids=case)
def test_zero_weights_come_back_as_zero(encoding) -> None:
    got = encoding.decode(encoding.encode(np.zeros((2, 9), np.float32)))
    np.testing.assert_array_equal(got, np.zeros((2, 9)))


@pytest.mark.parametrize("by", ["signed", "magnitude"])
@settings(max_examples=60)
@given(vectors(), st.data())
def test_top_m_is_the_loop(by, w, data) -> None:
    m = data.draw(st.integers(1, w.shape[1]))
    encoding = TopM(w.shape[1], m, by, "float32")
    got = encoding.decode(encoding.encode(w))
    np.testing.assert_array_equal(got, [oracles.top_m(row, m, by) for row in w])


def test_ties_fall_to_the_lower_channel() -> None:
    assert TopM(4, 2).encode([[1.0, 2.0, 2.0, 2.0]])["channels"].tolist() == [[1, 2]]


def test_many_channels_take_wider_numbers() -> None:
    for K, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        encoding, w = TopM(K, 1), np.zeros((1, K), np.float32)
        w[0, -1] = 2.0
        assert encoding.fields["channels"].dtype == dtype
        assert encoding.decode(encoding.encode(w))[0, -1] == 2.0


@settings(max_examples=40)
@given(st.data())
def test_low_rank_decodes_as_the_loop(data) -> None:
    R, K = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    numbers = st.floats(-4, 4, width=32)
    basis = data.draw(hnp.arrays(np.float32, (R, K), elements=numbers))
    offset = data.draw(hnp.arrays(np.float32, K, elements=numbers))
    codes = data.draw(hnp.arrays(np.float32, (3, R), elements=numbers))
    wanted = [oracles.low_rank_decode(code, basis, offset) for code in codes]
    stored = LowRank(basis, offset, "head", "stored", "float32")
    np.testing.assert_allclose(stored.decode(stored.encode_codes(codes)), wanted, atol=1e-4)
    derived = LowRank(basis, offset, "head", "embedding")
    assert derived.fields == {}
    assert derived.encode_codes(codes) == {}
    np.testing.assert_allclose(derived.decode({"embedding": codes}), wanted, atol=1e-4)


def test_the_heads_own_matrix_loses_nothing() -> None:
    """Behind pooling and an affine head the weights are W^T c / Z: D numbers hold all channels."""
    W, Z = RNG.normal(size=(4, 9)), 49
    cotangents = RNG.normal(size=(6, 4)) * 1e-2
    weights = cotangents @ W / Z
    for dtype, rounding in (("float32", 1e-6), ("float16", 1e-3)):
        encoding = LowRank(W / Z, np.zeros(9), "head", dtype=dtype)
        got = encoding.decode(encoding.encode_codes(cotangents))
        assert np.abs(got - weights).max() <= rounding * np.abs(weights).max()


def test_what_the_embedding_determines_is_derived_from_it() -> None:
    """Centred, around: the code is embedding - mean; the mean goes into the offset."""
    W, Z = RNG.normal(size=(4, 9)), 49
    embeddings = RNG.normal(size=(6, 4)).astype(np.float32)
    centred = [oracles.centred_target(embeddings, i) for i in range(6)]
    offset = -embeddings.mean(0, dtype=np.float64) @ W / Z
    encoding = LowRank(W / Z, offset, "head", "embedding")
    got = encoding.decode({"embedding": embeddings})
    np.testing.assert_allclose(got, centred @ W / Z, atol=1e-6)
    assert encoding.bytes_per_image() == 0


@pytest.mark.parametrize("n", [40, 5])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_principal_components_leave_the_least_error(rank, n) -> None:
    """Eckart-Young, also where there are fewer vectors than channels."""
    rows = random_rows(n, 6, size=1.0)
    encoding = fit_pca(rows, rank, "float32")
    left = ((encoding.decode(encoding.encode(rows)).astype(float) - rows) ** 2).sum()
    offset = rows.mean(0, dtype=np.float64)
    assert left == pytest.approx(oracles.best_rank_error(rows, offset, rank), rel=1e-4, abs=1e-9)
    # Any other basis of that rank leaves more.
    other, _ = np.linalg.qr(RNG.normal(size=(6, rank)))
    centred = rows - offset
    assert ((centred - centred @ other @ other.T) ** 2).sum() > left


@pytest.mark.parametrize("n", [40, 5])
def test_principal_components_are_orthonormal_with_the_mean_as_offset(n) -> None:
    rows = random_rows(n, 6)
    encoding = fit_pca(rows, 4)
    basis = encoding.fitted["basis"].astype(float)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(encoding.fitted["offset"], rows.mean(0), rtol=1e-5, atol=1e-9)
    # Deterministic, signs included.
    np.testing.assert_array_equal(fit_pca(rows, 4).fitted["basis"], encoding.fitted["basis"])
    np.testing.assert_allclose(np.abs(fit_pca(-rows, 4).fitted["basis"]), np.abs(basis), atol=1e-6)
    assert (basis[np.arange(4), np.abs(basis).argmax(1)] > 0).all()


def test_components_stop_where_the_sample_does() -> None:
    rows = random_rows(40, 6)
    full, fresh = fit_pca(rows, 99, "float32"), random_rows(3, 6)
    assert full.rank == 6
    np.testing.assert_allclose(full.decode(full.encode(fresh)), fresh, atol=1e-9)
    # Three vectors span two directions around their mean.
    few = fit_pca(rows[:3], 99, "float32")
    assert few.rank == 2
    np.testing.assert_allclose(few.decode(few.encode(rows[:3])), rows[:3], atol=1e-9)
    # Weights that are W^T c with D = 2 need no third component.
    flat = RNG.normal(size=(40, 2)) @ RNG.normal(size=(2, 6))
    assert fit_pca(flat, 5).rank == 2


@pytest.mark.parametrize("rows", [np.zeros((4, 3)), np.ones((4, 3)), np.ones((1, 3))])
def test_a_sample_without_spread_is_its_mean(rows) -> None:
    encoding = fit_pca(rows, 2, "float32")
    assert encoding.rank == 1
    assert np.isfinite(encoding.fitted["basis"]).all()
    np.testing.assert_allclose(encoding.decode(encoding.encode(rows)), rows, atol=1e-6)


@pytest.mark.parametrize("encoding", ALL, ids=case)
def test_rows_are_the_fields_promised_and_a_description_gives_the_encoding_back(encoding) -> None:
    rows = rows_of(encoding)
    again = from_spec(json.loads(json.dumps(encoding.spec())), 9, encoding.fitted)
    assert (type(again), again.spec()) == (type(encoding), encoding.spec())
    np.testing.assert_array_equal(again.decode(rows), encoding.decode(rows))
    rows.pop("embedding", None)
    stored = {name: (row.dtype, row.shape[1:]) for name, row in rows.items()}
    assert stored == {name: (field.dtype, field.shape) for name, field in again.fields.items()}
    assert encoding.bytes_per_image() == sum(row[:1].nbytes for row in rows.values())


@pytest.mark.parametrize("encoding", ALL, ids=case)
def test_combining_is_decoding_and_adding(encoding) -> None:
    rows = rows_of(encoding)
    decoded = encoding.decode(rows).astype(float)
    c, unpacked = RNG.normal(size=5), encoding.unpack(rows)
    got = encoding.combine(unpacked, c)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, c @ decoded, atol=2e-6 * np.abs(decoded).max() * 10)
    lengths = [oracles.l2_norm(row) for row in decoded]
    np.testing.assert_allclose(encoding.norms(unpacked), lengths, rtol=1e-6)
    for i in range(5):  # a row does not depend on its company
        alone = encoding.decode({name: values[i : i + 1] for name, values in rows.items()})
        np.testing.assert_allclose(alone[0], decoded[i], rtol=1e-5, atol=1e-9)


def test_the_bytes_of_the_two_small_encodings_stay_within_the_promise() -> None:
    for small in (TopM(2048), LowRank(np.zeros((128, 2048)), np.zeros(2048))):
        assert small.bytes_per_image() + 7 * 7 + 4 + 4 <= 320  # with a coarse map
    assert Dense(1280).bytes_per_image() == 2 * 1280 + 4


ZEROS, PCA = np.zeros((2, 3)), fit_pca(np.eye(3), 2)
LARGER = {**PCA.spec(), "rank": 4}


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: TopM(9, 10), "m = 10 channels of 9: m must be 1 to 9"),
        (lambda: TopM(9, 0), "m = 0 channels of 9"),
        (lambda: TopM(9, 2, "size"), "by = 'size' is unknown; .*known: signed, magnitude"),
        (lambda: Dense(9, "float64"), "dtype = 'float64' is unknown; .*known: float16, float32"),
        (lambda: Dense(0), "n_channels = 0; give a whole number of at least 1"),
        (lambda: Dense(9).encode(np.zeros((2, 8))), r"shape \[2, 8\]; expected \[n 9\]"),
        (lambda: LowRank(ZEROS, np.zeros(4)), r"basis \[2, 3\] and offset \[4\] do not belong tog"),
        (lambda: LowRank(ZEROS, np.zeros(3), "magic"), "origin = 'magic' is unknown; known: head"),
        (lambda: LowRank(ZEROS, np.zeros(3), "head").encode(ZEROS), "give them to encode_codes"),
        (lambda: fit_pca(np.ones((3, 3)), 0), "rank = 0; give a whole number of at least 1"),
        (lambda: from_spec({"name": "sparse"}, 9, {}), "'sparse' is unknown; known: top-m, low-ra"),
        (lambda: from_spec(PCA.spec(), 8, PCA.fitted), r"\[2, 3\]; the description says \[2 8\]"),
        (lambda: from_spec(LARGER, 3, PCA.fitted), r"shape \[2, 3\]; the description says \[4 3\]"),
    ],
)
def test_errors_say_what_was_given_and_what_is_expected(attempt, message) -> None:
    with pytest.raises(InputError, match=message):
        attempt()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("encoding", [Dense(3), TopM(3, 2), PCA], ids=case)
def test_weights_that_are_not_numbers_are_refused_with_their_row(encoding, bad) -> None:
    rows = np.ones((4, 3))
    rows[2, 1] = bad
    with pytest.raises(InputError, match="row 2 holds a NaN or an infinity"):
        encoding.encode(rows)
