"""Collections that do not fit into memory: blocks, columns and files, and the same results."""

import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
from build_samples import everything
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam import Index, Recipe
from embedcam.errors import InputError
from embedcam.images import texts
from embedcam.images.texts import LabelColumn, Texts, first_twice, sorted_order
from embedcam.index import arrays, nearest, remove
from embedcam.offline import triplets
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.features import build_from_features
from embedcam.offline.triplets import label_codes, sample_of, squares_of, total_of
from scripts.benchmarks import scale

IDS = st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=30)
BYTES = st.lists(st.text(alphabet="\0\1aab\x7f\xe9\U0001f600", max_size=20), max_size=30)


# Samples


@given(IDS, st.integers(0, 1 << 70), st.integers(1, 12), st.integers(1, 9))
def test_a_sample_is_of_the_smallest_hashes(ids, seed, most, block) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triplets, "SUMMED", block)
        chosen = sample_of(ids, seed, most)
        assert sample_of(Texts.of(ids), seed, most).tolist() == chosen.tolist()
    assert chosen.tolist() == oracles.sample(ids, seed, most)


@given(IDS, st.randoms(use_true_random=False), st.integers(1, 12), st.integers(1, 30))
def test_a_sample_depends_on_no_order_and_on_no_grouping(ids, random, most, cut) -> None:
    def of(names: list[str]) -> set[str]:
        return {names[place] for place in sample_of(names, 3, most)}

    mixed = random.sample(ids, len(ids))
    assert of(mixed) == of(ids)
    # The sample of all is among the samples of any groups of them.
    groups = [mixed[start : start + cut] for start in range(0, len(mixed), cut)]
    assert of([name for group in groups for name in sorted(of(group))]) == of(ids)


def test_another_seed_is_another_sample_and_one_hash_is_known() -> None:
    ids = [f"{row}.png" for row in range(1000)]
    first, second = (set(sample_of(ids, seed, 100).tolist()) for seed in (0, 1))
    assert len(first) == len(second) == 100
    assert 0 < len(first & second) < 30
    assert sample_of(["a", "b", "c"], 0, 2).tolist() == oracles.sample(["a", "b", "c"], 0, 2)
    assert sample_of(["a", "b"], 0, 2).tolist() == [0, 1]


# Reductions


def collection(labelled: int = 37) -> tuple[np.ndarray, list[str | None]]:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = ["cat", "dog", "owl"]
    return vectors, [names[row % 3] if row < labelled else None for row in range(50)]


class Guarded:
    """Embeddings that are read at some places alone."""

    def __init__(self, vectors: np.ndarray, allowed: np.ndarray) -> None:
        self._vectors, self.allowed = vectors, set(allowed.tolist())
        self.shape, self.dtype = vectors.shape, vectors.dtype

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        assert self.allowed.issuperset(rows.tolist())
        return self._vectors[rows]


RECIPES = [
    Recipe(),
    Recipe(target="discriminant", norm="around"),
    Recipe(target="margin", sampling="all"),
    Recipe(target="centred", norm="around"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.resolved_target)
def test_with_the_statistics_an_anchor_is_looked_at_alone(recipe: Recipe, tmp_path: Path) -> None:
    vectors, labels = collection()
    of, mean = (recipe, vectors, label_codes(labels)), vectors.mean(0)
    whole = AnchorCotangents(*of, mean)
    for name, array in whole.statistics().items():
        np.save(tmp_path / f"{name}.npy", array)
    read = {file.stem: np.load(file) for file in tmp_path.glob("*.npy")}
    mine = np.array([3, 14, 7])
    alone = AnchorCotangents(recipe, Guarded(vectors, mine), of[2], mean, statistics=read)
    np.testing.assert_array_equal(alone.of(mine).values, whole.of(mine).values)
    assert alone.of(mine).counts.tolist() == whole.of(mine).counts.tolist()
    again = alone.statistics()
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in whole.statistics().items()
    }
    assert not read or "total" in read


def test_statistics_are_literal_sums() -> None:
    vectors, labels = collection()
    anchors = AnchorCotangents(Recipe(), vectors, label_codes(labels), vectors.mean(0))
    found = anchors.statistics()
    total, squares = np.zeros(6), np.zeros((6, 6))
    classes = {name: np.zeros(6) for name in ("cat", "dog", "owl")}
    for vector, label in zip(vectors.astype(float), labels, strict=True):
        total += vector
        squares += np.outer(vector, vector)
        if label is not None:
            classes[label] += vector
    np.testing.assert_allclose(found["total"], total, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["squares"], squares, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["class_sums"], [*classes.values()], rtol=1e-12, atol=1e-12)
    # In Recipe(), a label's mean whitened cotangent is this sum over its images.
    amounts = anchors._amounts(labelled=True)
    for number, name in enumerate(classes):
        rows = np.array([row for row, label in enumerate(labels) if label == name])
        expected = sum(anchors._margins(np.array([row]), amounts)[0][0] for row in rows)
        np.testing.assert_allclose(found["label_sums"][number], expected, rtol=1e-9, atol=1e-9)


def test_sums_over_labels_and_values_are_the_same_for_any_blocks(monkeypatch) -> None:
    """One row after the other; sums over all are of fixed blocks, for a product has no order."""
    vectors, labels = collection()
    values = np.where(np.arange(50) < 40, np.arange(50) % 17 / 3, np.nan)
    numbers = Recipe(labels="numbers", target="margin", sampling="all")

    def made() -> list[bytes]:
        classes = AnchorCotangents(Recipe(), vectors, label_codes(labels), vectors.mean(0))
        near = AnchorCotangents(numbers, vectors, values, vectors.mean(0))
        sums = classes.sampler.class_sums, near.sampler._sums_below
        return [one.tobytes() for one in sums]

    usual = made()
    for block in (1, 7, 49):
        monkeypatch.setattr(triplets, "SUMMED", block)
        assert made() == usual
        np.testing.assert_allclose(total_of(vectors), vectors.astype(float).sum(0), rtol=1e-12)
        np.testing.assert_allclose(squares_of(vectors), vectors.T.astype(float) @ vectors, 1e-6)


def test_statistics_of_other_images_are_refused() -> None:
    vectors, labels = collection()
    of = Recipe(), vectors, label_codes(labels), vectors.mean(0)
    known = AnchorCotangents(*of).statistics()
    for wrong in ({}, {**known, "total": np.zeros(5)}, {**known, "more": np.zeros(2)}):
        with pytest.raises(InputError, match=r"statistics have the shapes .* reduce them again"):
            AnchorCotangents(*of, statistics=wrong)


# Columns


@settings(max_examples=300)
@given(BYTES)
def test_strings_are_ordered_by_their_bytes(strings: list[str]) -> None:
    kept = Texts.of(strings)
    expected = sorted(range(len(strings)), key=lambda row: strings[row].encode())
    assert sorted_order(kept).tolist() == expected
    rows = np.array(expected[::-1], np.int64)
    assert list(kept.select(rows)) == [strings[row] for row in expected[::-1]]


@given(st.lists(st.sampled_from("abcdefghijk"), max_size=9))
def test_the_first_that_comes_twice(strings: list[str]) -> None:
    twice = next((row for row in range(len(strings)) if strings[row] in strings[:row]), None)
    expected = None if twice is None else (strings.index(strings[twice]), twice)
    assert first_twice(strings) == first_twice(Texts.of(strings)) == expected


def test_two_ids_of_one_hash_are_not_the_same(monkeypatch) -> None:
    monkeypatch.setattr(texts, "hash", len, raising=False)
    assert first_twice(["a", "b", "cc"]) is None
    assert first_twice(["a", "b", "cc", "b"]) == (1, 3)


@given(st.lists(st.one_of(st.none(), st.sampled_from(["cat", "dog", "", "owl"])), max_size=20))
def test_labels_are_numbered_and_counted(labels: list[str | None]) -> None:
    column = LabelColumn.of(labels)
    in_order = column.sorted()
    assert list(in_order) == labels
    assert in_order.names == sorted({label for label in labels if label is not None})
    assert column.counts() == ({name: labels.count(name) for name in in_order.names},
                               labels.count(None))  # fmt: skip
    odd = np.arange(1, len(labels), 2)
    some = column.take(odd).sorted()
    assert list(some) == labels[1::2]
    assert some.names == sorted({label for label in labels[1::2] if label is not None})
    codes = label_codes(labels)
    if not in_order.names:
        assert codes is None
    else:
        known = {name: number for number, name in enumerate(in_order.names)}
        free = iter(range(len(known), 99))
        assert codes.tolist() == [next(free) if s is None else known[s] for s in labels]


def test_blank_strings_take_no_room() -> None:
    blank = Texts.blank(3)
    assert list(blank) == ["", "", ""]
    assert blank.offsets.strides == (0,)
    assert sorted_order(blank).tolist() == [0, 1, 2]
    assert list(Texts.blank(0)) == []


# Indexes


def features(n: int = 60) -> dict[str, object]:
    rng = np.random.default_rng(2)
    pooled = rng.normal(size=(n, 8)).astype(np.float32)
    return {
        "embeddings": pooled / np.linalg.norm(pooled, axis=1, keepdims=True),
        "pooled": pooled,
        "ids": [f"b{row % 7}/{row}" for row in range(n)],
        "labels": [None if row % 9 == 0 else f"kind {row % 4}" for row in range(n)],
        "grid": (2, 2),
        "progress": False,
    }


@pytest.mark.parametrize("choices", [{}, {"target": "centred", "norm": "around"}, {"rank": 4}])
def test_what_lies_in_files_gives_the_same_bytes(tmp_path, monkeypatch, choices) -> None:
    given_ = features()
    recipe = Recipe(**choices)
    build_from_features(path=tmp_path / "held", recipe=recipe, **given_)
    monkeypatch.setattr(arrays, "HELD", 0)
    monkeypatch.setattr(texts, "_IN_MEMORY", 0)
    monkeypatch.setattr(texts, "_RUN", 7)
    given_["embeddings"] = given_["embeddings"].astype(np.float64)  # stored in a file of their own
    build_from_features(path=tmp_path / "files", recipe=recipe, **given_)
    assert everything(tmp_path / "files") == everything(tmp_path / "held")
    assert {one.name for one in tmp_path.iterdir()} == {"held", "files"}


def test_many_ids_are_found_in_one_pass_as_they_are_one_by_one(tmp_path, monkeypatch) -> None:
    build_from_features(path=tmp_path / "index", **features())
    remove(tmp_path / "index", ["b0/0", "b1/8"])
    with Index.open(tmp_path / "index") as index:
        asked = [f"b{row % 7}/{row}" for row in range(0, 70, 2)] + ["b0/0", "nothing"]
        one_by_one = {name: row for name in asked for row in index.find_live([name]).values()}
        found = index.find_live(asked)
        assert found == one_by_one
        assert len(found) == 28
        monkeypatch.setattr(texts, "hash", len, raising=False)
        assert index.find_live(asked) == one_by_one


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_many_queries_find_what_literal_sorting_finds(monkeypatch, metric) -> None:
    """Whole numbers, so that many are equally near: the lower position counts."""
    rows = np.random.default_rng(0).integers(-2, 3, (300, 3)).astype(np.float32)
    queries, expected = rows[:40] + np.float32(0.5), []
    for query in queries.astype(float):
        apart = [float(((row - query) ** 2).sum()) for row in rows.astype(float)]
        alike = [float(row @ query) for row in rows.astype(float)]
        score = apart if metric == "l2" else [-one for one in alike]
        expected.append(sorted(range(300), key=lambda row: (score[row], row))[:9])
    for numbers, n_bytes in ((1 << 21, 1 << 24), (40 * 7, 12 * 50), (1, 12)):
        monkeypatch.setattr("embedcam.index.search._SCORED", numbers)
        monkeypatch.setattr(arrays, "BLOCK_BYTES", n_bytes)
        assert nearest(rows, queries, 9, metric).positions.tolist() == expected
    everything_ = nearest(rows[:12], queries, 30, metric).positions
    assert np.sort(everything_, axis=1).tolist() == [list(range(12))] * 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_an_image_is_bounded(tmp_path: Path) -> None:
    """Anonymous memory of a labelled build from features, FAISS apart."""
    peaks = []
    for n in (20_000, 100_000):
        options = scale.write_features(tmp_path / str(n), n, labels=50, width=16)
        command = ["build", str(tmp_path / f"{n}.index"), *options, "--faiss", "none"]
        peaks.append(scale.run(command, tmp_path).peak)
    assert (peaks[1] - peaks[0]) / 80_000 < 200
