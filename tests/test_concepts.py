"""Concepts and exemplars: values against literal loops, sums, what a build keeps, bad arrays."""

from itertools import permutations

import numpy as np
import pytest
import torch
from build_samples import CHANNELS, activations_of, built, pictures, quicken, toy
from hypothesis import given
from hypothesis import strategies as st
from index_samples import CHANNELS as K
from index_samples import GRID, encoding_of, header_of, part
from oracles_concepts import amounts_in, factorised, largest, shares_in

import embedcam.offline.concepts as offline
from embedcam import Explainer, PairExplainer, Recipe, add_images
from embedcam.errors import IndexFormatError, InputError
from embedcam.images import find_images
from embedcam.index import Index, compact, create, remove, verify
from embedcam.index.concepts import ARRAYS, EXEMPLARS, Best, Concepts, arrays_of, read_names
from embedcam.index.in_memory import index_of_rows
from embedcam.index.model import write_model
from embedcam.pairs.lines import MOST_LINES, Line, in_words
from embedcam.prototypes import compress


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(offline, "LEAST_IMAGES", 4)
    monkeypatch.setattr(offline, "LEAST_CHANNELS", 4)


def of_parts(parts: np.ndarray) -> Concepts:
    return Concepts(parts.astype(np.float32), ("",) * len(parts))


def shares_of(concepts: Concepts, activations: np.ndarray) -> np.ndarray:
    """Return the share of each part in each channel, `[P K]`: of 1 that it gives, alone."""
    alone = np.eye(len(activations))
    return np.stack([concepts.divide(one, activations)[0] for one in alone], axis=1)


# Dividing


@pytest.mark.parametrize("signed", [False, True])
def test_shares_are_those_of_the_literal_loops(signed: bool) -> None:
    rng = np.random.default_rng(3)
    parts = rng.random((3, 10 if signed else 5)) * (rng.random((3, 1)) + 0.5)
    parts[:, 4] = 0  # of which no part has any
    if signed:
        parts[:, 9] = 0
    activations = (rng.random((5, 2, 3)) - 0.4 * signed).astype(np.float32)
    sums = np.maximum(activations, 0).sum((1, 2))
    if signed:
        sums = np.concatenate([sums, np.maximum(-activations, 0).sum((1, 2))])
    concepts = of_parts(parts)
    amounts = amounts_in(sums.astype(float), parts)
    np.testing.assert_allclose(concepts.amounts(activations) * sums.max(), amounts, atol=1e-3)
    expected = shares_in(activations, parts, amounts)
    shares = shares_of(concepts, activations)
    np.testing.assert_allclose(shares, expected, atol=2e-3)
    np.testing.assert_allclose(shares.sum(0), [1, 1, 1, 1, 0], atol=1e-6)
    channels = rng.normal(size=5)
    lines, rest = concepts.divide(channels, activations)
    np.testing.assert_allclose(lines, expected @ channels, atol=5e-3)
    assert rest == pytest.approx(channels[4], abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_lines_and_rest_add_up(seed: int, n: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.random((n, 8 if signed else 4)) * (rng.random((n, 1)) < 0.8)
    activations = (rng.normal(size=(4, 2, 2)) * 10.0 ** rng.integers(-20, 20)).astype(np.float32)
    concepts, channels = of_parts(parts), rng.normal(size=4)
    shares = shares_of(concepts, activations)
    lines, rest = concepts.divide(channels, activations)
    assert lines.sum() + rest == pytest.approx(channels.sum(), abs=1e-6)
    assert (shares >= 0).all()
    assert (shares.sum(0) <= 1 + 1e-6).all()


def test_a_picture_of_other_channels_is_refused() -> None:
    with pytest.raises(InputError, match=r"5 channels.* 4"):
        of_parts(np.ones((2, 4))).divide(np.ones(5), np.ones((5, 1, 1), np.float32))


@given(st.lists(st.floats(-1, 1, width=32), max_size=40), st.integers(0, 10))
def test_what_all_others_give_is_never_the_largest(amounts: list[float], n: int) -> None:
    given_to = np.array(amounts, float)
    told = in_words("channel", given_to, n)
    assert sum(number for _, number in told) == pytest.approx(given_to.sum(), abs=1e-9)
    assert len(told) <= n + 2
    others = [abs(number) for words, number in told if "other" in words]
    rest = [abs(number) for words, number in told if "other" not in words]
    assert not others or others[0] <= max(rest, default=0) + 1e-12


def test_others_follow_where_they_are_many() -> None:
    told = in_words("concept", np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), 1, ["wheel"] * 7)
    assert [words for words, _ in told] == ["wheel", "the next concept", "5 other concepts"]
    np.testing.assert_allclose([number for _, number in told], [0.5, 0.1, 0.5])
    assert [words for words, _ in in_words("channel", np.array([3.0, 2.0, 1.0]), 2)] == [
        "channel 0", "channel 1", "1 other channel",
    ]  # fmt: skip


# Fitting


def test_parts_that_were_mixed_are_found_again() -> None:
    rng = np.random.default_rng(0)
    parts = np.kron(np.eye(4), [3, 1, 2, 1]) + 0.01
    amounts = rng.random((400, 4)) * (rng.random((400, 4)) < 0.5) * [4, 3, 2, 1]
    found, given_to = offline.fit_parts((amounts @ parts).astype(np.float32), 4, 0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    units = parts / np.linalg.norm(parts, axis=1, keepdims=True)
    assert np.diag(found @ units.T).min() > 0.99  # the one with most comes first
    for one, other in zip(given_to.T, amounts.T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.99


def test_the_factorisation_is_as_good_as_multiplicative_updates() -> None:
    sample = np.random.default_rng(1).random((60, 12)).astype(np.float32)
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    parts, amounts = offline.fit_parts(sample, 4, 0)
    assert ((sample - amounts @ parts) ** 2).sum() < 1.05 * factorised(sample, 4)


def test_signed_activations_are_taken_apart() -> None:
    sample = np.random.default_rng(1).normal(size=(80, 6)).astype(np.float32)
    parts, amounts = offline.fit_parts(sample, 3, 0)
    assert parts.shape == (3, 12)
    assert (parts >= 0).all()
    assert amounts.shape == (80, 3)
    assert offline.fit_parts(np.zeros((9, 6), np.float32), 3, 0) is None


@given(st.integers(0, 2**32 - 1))
def test_batches_may_be_merged_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    activations = rng.integers(0, 3, (7, 2, 2, 2)).astype(np.float32)  # many are equal
    pieces = [
        offline.best_of(torch.from_numpy(activations[rows]), np.array(rows))
        for rows in ([0, 1], [2, 3, 4], [5, 6])
    ]
    for one, two, three in permutations(pieces):
        best = one.merged(two.merged(three, offline.KEPT), offline.KEPT)
        for channel in range(2):
            told = zip(*(values[channel].tolist() for values in best), strict=True)
            assert [*told] == largest(activations, channel, offline.KEPT)


def test_exemplars_of_concepts_are_different_pictures() -> None:
    amounts = np.array([[3, 0], [2, 1], [5, 1], [0, 4]], np.float32)
    places, cells = np.array([7, 7, 9, 8]), np.array([0, 3, 1, 2])
    best = offline.best_positions(amounts, places, cells)
    assert best.places.tolist() == [[9, 7, 8], [8, 7, 9]]
    assert best.cells.tolist() == [[1, 0, 2], [2, 3, 1]]
    assert best.values.tolist() == [[5, 3, 0], [4, 1, 1]]


def test_no_more_is_kept_than_a_megabyte() -> None:
    best = Best(
        np.ones((2048, 5), np.float32), np.arange(10240).reshape(2048, 5), np.zeros((2048, 5))
    )
    arrays = arrays_of(best, None, None, [f"{n:0100}" for n in range(10240)])
    assert 2**18 < sum(array.nbytes for array in arrays.values()) <= 2**20
    assert arrays["channel_values"].shape[1] < 5
    assert arrays_of(best, None, None, [f"{n:0500}" for n in range(10240)]) == {}


# What a build keeps


@pytest.fixture
def index(tmp_path):
    made, source = toy("affine"), pictures(tmp_path / "p")
    return built(source, made, tmp_path / "i"), made, source


def test_a_build_keeps_where_every_channel_answers_most(index) -> None:
    path, made, source = index
    activations = activations_of(made, source).numpy()
    with Index.open(path) as opened:
        concepts = opened.concepts()
        assert concepts.parts.shape == (CHANNELS // 2, CHANNELS)
        for channel in range(CHANNELS):
            expected = largest(activations, channel, 5)
            told = opened.exemplars("channel", channel, 5)
            assert [one.id for one in told] == [source.ids[image] for _, image, _ in expected]
            assert [(one.row, one.column) for one in told] == [
                divmod(cell, activations.shape[3]) for _, _, cell in expected
            ]
            np.testing.assert_allclose([one.value for one in told], [v for v, *_ in expected])
        assert len(opened.exemplars("concept", 0)) == 3
        assert "concepts and exemplars: parts, ids, positions" in opened.verify()
        with pytest.raises(InputError, match="number = 99"):
            opened.exemplars("channel", 99)
        with pytest.raises(InputError, match="kind = 'part'"):
            opened.exemplars("part", 0)


def test_a_picture_that_is_gone_or_replaced_is_shown_no_more(index, tmp_path) -> None:
    path, made, _ = index

    def shown(where=path) -> list[str]:
        with Index.open(where) as opened:
            return [one.id for one in opened.exemplars("channel", 0, 5)]

    first, *others = shown()
    remove(path, [first])
    assert shown() == others
    compact(path)
    assert shown() == others
    folder = tmp_path / "again"
    pictures(folder)
    again = find_images(folder)
    add_images(again.only([again.ids.tolist().index(first)]), made.network, path, progress=False)
    with Index.open(path) as opened:
        assert opened.position(first) >= opened.manifest.fit.rows
    assert shown() == others


def test_concepts_change_neither_generation_nor_recipe(index, tmp_path) -> None:
    path, made, source = index
    bare = built(source, made, tmp_path / "bare", Recipe(concepts=0))
    assert "concepts" not in Recipe().to_dict()
    with Index.open(path) as one, Index.open(bare) as other:
        assert other.concepts() is None
        assert other.exemplars("concept", 0) == []
        assert other.exemplars("channel", 0) == one.exemplars("channel", 0)
        assert one.manifest.recipe_sha256 != other.manifest.recipe_sha256
        model = write_model(one, tmp_path / "model.embedcam")
        rows = [row for batch in one.rows() for row in batch.to_pylist()]
        expected = one.exemplars("channel", 0, 5)
        parts = one.concepts().parts
    with Index.open(model) as known:
        np.testing.assert_array_equal(known.concepts().parts, parts)
        assert known.exemplars("channel", 0) == []  # it has no pictures
        assert known.exemplar_ids("channel", 0) == [one.id for one in expected]
        some = index_of_rows(known, [row for row in rows if row["id"] != expected[0].id])
        assert known.exemplars("channel", 0, 5, among=some) == expected[1:]


def test_prototypes_keep_the_parts_and_no_pictures(index, tmp_path) -> None:
    with Index.open(index[0]) as whole:
        compress(whole, tmp_path / "small", 4)
        with Index.open(tmp_path / "small") as small:
            np.testing.assert_array_equal(small.concepts().parts, whole.concepts().parts)
            assert not small.shared().keys() & {*EXEMPLARS}


def test_receipts_divide_among_concepts_and_outlive_the_index(index, tmp_path) -> None:
    path, made, source = index
    names = tmp_path / "concepts.toml"
    names.write_text('[concepts]\n1 = "wheel"\n', encoding="utf-8")
    with Index.open(path) as opened:
        pairs = PairExplainer(Explainer(opened, made.network), concept_names=names)
        receipt = pairs.receipt(source.open(0), source.ids[4])
        above = pairs.above(source.open(0), source.ids[4], source.ids[5])
        parts = opened.concepts()
        words = pairs.text_receipt("a wheel", source.ids[4], texts=np.ones((1, opened.width)))
        for one in (receipt, above, words):  # beside each line are its exemplars, cut out
            drawn, told = one.plot().tobytes(), dict(one.amounts())
            for line in filter(lambda line: line.words in told, one.concepts()):
                crops = [np.asarray(crop) for crop in one.known.crops(line.exemplars)]
                assert len(crops) == len(line.exemplars) > 0
                assert all(crop[26, 8:44].tobytes() in drawn for crop in crops)
    for one, total in ((receipt, receipt.similarity), (above, above.score)):
        assert sum(number for _, number in one.amounts()) == pytest.approx(total, abs=1e-5)
        assert len(one.amounts()) <= MOST_LINES
        told = one.to_dict()
        lines = sum(line["contribution"] for line in told["concepts"])
        among = lines + told["other_concepts"] + told["no_concept"]
        assert among == pytest.approx(one.channels.sum(), abs=1e-6)
        assert {line["concept"]: line["name"] for line in told["concepts"]}[1] == "wheel"
        assert len(told["channel_exemplars"][0]) == 3
        assert one.reasons() == one.concepts()
        assert all(len(line.exemplars) > 0 for line in one.concepts())
    of = [
        shares_of(parts, side.activations) @ side_given.channels
        for side, side_given in zip(receipt.sides, (receipt.query, receipt.result), strict=True)
    ]
    np.testing.assert_allclose(receipt.divided[0], (of[0] + of[1]) / 2, atol=1e-9)
    assert receipt.lines(1)[0].words.startswith("channel ")
    assert Line("concept", 3, 0.5).words == "concept 3"


def test_names_of_concepts_that_are_not_there_are_refused(index) -> None:
    path, made, _ = index
    with Index.open(path) as opened, pytest.raises(InputError, match=r"concept 44.*counted from 0"):
        PairExplainer(Explainer(opened, made.network), concept_names={44: "wheel"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[concepts", "no TOML file"),
        ("[names]", "expected one table"),
        ("concepts = 3", "expected one table"),
        ('[concepts]\n-1 = "a"', "expected a concept's number"),
        ("[concepts]\n1 = 2", "expected a concept's number"),
        (f'[concepts]\n1 = "{"x" * 101}"', "at most 100"),
        ('[concepts]\n1 = "a\\u0007"', "expected a concept's number"),
    ],
)
def test_a_file_of_names_that_says_something_else(tmp_path, text: str, says: str) -> None:
    (tmp_path / "n.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        read_names(tmp_path / "n.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_names(tmp_path / "none.toml")


# What a file says, which nothing believes


def arrays(**changes: object) -> dict[str, np.ndarray]:
    best = Best(np.ones((K, 2)), np.tile([0, 1], (K, 1)), np.zeros((K, 2)))
    some = Best(*(one[:3] for one in best))
    names = ["image-0000", "image-0001"]
    made = arrays_of(best, some, np.ones((3, K), np.float32), names)
    return {name: one for name, one in {**made, **changes}.items() if one is not None}


def written(path, shared: dict[str, np.ndarray]):
    encoding = encoding_of("dense")
    return create(path, header_of(encoding), [encoding.fitted], shared, part(0, 4, encoding))


def with_one(name: str, place: tuple[int, ...], value: int) -> dict[str, np.ndarray]:
    changed = arrays()[name].copy()
    changed[place] = value
    return {name: changed}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"concept_parts": np.ones((3, K + 1), "f4")}, "concept_parts holds float32"),
        ({"concept_parts": np.ones((3, K))}, "concept_parts holds float64"),
        ({"concept_parts": None}, "without concept_parts"),
        ({"channel_values": None}, "not as many"),
        ({"channel_exemplars": np.zeros((K, 2, 3), "u4")}, "channel_exemplars holds"),
        ({"exemplar_offsets": None}, "without the ids"),
        ({"exemplar_ids": np.zeros((3, 3), "u1")}, "exemplar_ids holds"),
    ],
)
def test_arrays_of_another_shape_do_not_open(tmp_path, changes, says: str) -> None:
    with pytest.raises(IndexFormatError, match=says):
        written(tmp_path / "i", arrays(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"concept_parts": -np.ones((3, K), "f4")}, "negative"),
        (with_one("channel_exemplars", (0, 0, 0), 2), "beyond the 2"),
        (with_one("concept_exemplars", (0, 0, 1), GRID[0] * GRID[1]), "outside the grid"),
        (with_one("exemplar_offsets", (1,), 99), "do not rise"),
        (with_one("exemplar_offsets", (2,), 99), "do not run"),
        (with_one("exemplar_offsets", (0,), 3), "do not run"),
        (with_one("exemplar_ids", (0,), 255), "not UTF-8"),
    ],
)
def test_verify_finds_what_does_not_hold_together(tmp_path, changes, says: str) -> None:
    written(tmp_path / "i", arrays(**changes))
    report = verify(tmp_path / "i", collect=True)
    assert len(report.problems) == 1
    assert says in report.problems[0]
    with Index.open(tmp_path / "i") as index:
        if "concept_parts" in changes:
            with pytest.raises(IndexFormatError, match=says):
                index.concepts()
        elif "beyond" in says or "UTF-8" in says or "rise" in says:
            with pytest.raises(IndexFormatError, match="exemplars"):
                index.exemplars("channel", 0)


def test_good_arrays_are_all_that_the_format_names(tmp_path) -> None:
    assert arrays().keys() == ARRAYS
    written(tmp_path / "i", arrays())
    assert verify(tmp_path / "i").ok
