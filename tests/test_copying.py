"""Rows copied into a store: what is written again, what gives way, and what is refused."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from index_samples import make

from embedcam.errors import InputError
from embedcam.index import Index
from embedcam.stores import copy_rows

pytestmark = pytest.mark.usefixtures("quick_disk")


class Kept:
    """A store in memory; with `vectors` a team's table, whose rows are there and hold one code."""

    name = "kept"

    def __init__(self, generation: str, vectors: dict[str, np.ndarray] | None = None) -> None:
        self.generation, self.vectors = generation, vectors
        self.rows: dict[str, dict] = {}
        self.marks: dict[str, int] = {}
        self.asked: list[str] = []

    def search(self, embedding: np.ndarray, n: int) -> list[dict]:
        raise NotImplementedError

    def fetch(self, ids: Sequence[str]) -> list[dict]:
        return [self.rows[name] for name in ids if name in self.rows]

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        rows = batch.to_pylist()
        self.asked += [row["id"] for row in rows]
        self.marks[part] = upto
        for row in rows:
            if self.vectors is None:
                self.rows[row["id"]] = row
            elif row["id"] in self.vectors:
                self.rows[row["id"]] = {**row, "embedding": self.vectors[row["id"]]}
        return 0 if self.vectors is None else sum(row["id"] not in self.vectors for row in rows)

    def written(self) -> dict[str, int]:
        return dict(self.marks)

    def remove(self, ids: Sequence[str]) -> int:
        return sum(self.rows.pop(name, None) is not None for name in ids)

    def ids(self) -> Iterator[list[str]]:
        yield [name for name, row in self.rows.items() if row["generation"] == self.generation]

    def generations(self) -> dict[str, int]:
        return dict(Counter(row["generation"] for row in self.rows.values()))

    def drop(self, generation: str) -> int:
        raise NotImplementedError

    def finish(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def index(tmp_path: Path) -> Index:
    make(tmp_path / "index", 30, "low-rank")
    return Index.open(tmp_path / "index")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcam.stores.copying.BATCH_ROWS", 12)


def vectors_of(index: Index, scale: float = 1.0) -> dict[str, np.ndarray]:
    return dict(zip(index.ids, scale * index.embeddings(range(30)), strict=True))


def test_rows_that_somebody_removed_are_written_again_and_no_others(index: Index) -> None:
    store, told = Kept(index.generation), list[int]()
    assert copy_rows(index, store).written == 30
    store.asked.clear()
    done = copy_rows(index, store, progress=told.append)
    assert (done.written, done.kept, store.asked, sum(told)) == (0, 30, [], 30)
    for name in ("image-0003", "image-0017"):
        del store.rows[name]
    done = copy_rows(index, store, progress=told.append)
    assert (done.written, done.kept, sum(told)) == (2, 28, 60)
    assert store.asked == ["image-0003", "image-0017"]
    assert len(store.rows) == 30
    store.rows.clear()  # the marks are still there
    assert copy_rows(index, store).written == 30


def test_a_row_that_the_team_deleted_is_asked_for_alone(index: Index) -> None:
    vectors = vectors_of(index)
    del vectors["image-0011"]
    store = Kept(index.generation, vectors)
    done = copy_rows(index, store, embedding="none")
    assert (done.written, done.unplaced, store.marks) == (30, 1, dict.fromkeys(store.marks, 30))
    store.asked.clear()
    done = copy_rows(index, store, embedding="none")
    assert (done.written, done.unplaced, {*store.asked}) == (1, 1, {"image-0011"})


def test_vectors_are_compared_where_the_first_rows_have_no_place(index: Index) -> None:
    vectors = dict(list(vectors_of(index, 2.0).items())[20:])
    with pytest.raises(InputError, match=r"the vector of 'image-0020' there is not the index's"):
        copy_rows(index, Kept(index.generation, vectors), embedding="none")


@pytest.mark.parametrize("wrong", [5.0, -1.0, 1.05])
def test_codes_are_not_left_beside_other_vectors(index: Index, wrong: float) -> None:
    store = Kept(index.generation, vectors_of(index, wrong))
    said = r"kept: the vector of 'image-0000' there is not the index's: they are .* apart, of leng"
    with pytest.raises(InputError, match=said):
        copy_rows(index, store, embedding="none")
    assert store.rows == {}
    assert len(store.asked) == 10  # the rows of no other batch lost what they had
    half = {name: row.astype(np.float16) for name, row in vectors_of(index).items()}
    assert copy_rows(index, Kept(index.generation, half), embedding="none").written == 30


def test_what_gave_its_place_is_told(index: Index, tmp_path: Path) -> None:
    store = Kept(index.generation, vectors_of(index))
    copy_rows(index, store, embedding="none")
    make(tmp_path / "other", 30, "top-m")
    with Index.open(tmp_path / "other") as other:
        store.generation = other.generation
        done = copy_rows(other, store, embedding="none")
        assert (done.replaced, done.others) == ({index.generation: 30}, {})
