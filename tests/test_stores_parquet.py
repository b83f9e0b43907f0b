"""Rows in one Parquet file: written as a whole, resumed, left alone where it is the same."""

import os
import shutil
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_samples import encoding_of, make, part
from store_samples import Sample, check_answers, sample

import embedcam.stores.parquet as parquet
from embedcam.errors import InputError, StoreError
from embedcam.index import Index, append, remove
from embedcam.stores import Copied, Table, copy_rows, open_store

pytestmark = pytest.mark.usefixtures("quick_disk")
N = 30


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of thirty rows, of which batches hold four."""
    monkeypatch.setattr(parquet, "_ROWS", 4)
    make(tmp_path / "index", N, "low-rank")
    return tmp_path / "index"


def copy(path: Path, file: Path, embedding: str = "full") -> Copied:
    with (
        Index.open(path) as index,
        closing(open_store(str(file), Table.of(index, embedding))) as store,
    ):
        return copy_rows(index, store, embedding=embedding)


@contextmanager
def reading(path: Path, file: Path, **options: Any):
    with (
        Index.open(path) as index,
        closing(open_store(f"duckdb:{file}", Table.of(index), **options)) as store,
    ):
        yield index, store


def literal(path: Path, embedding: str = "full") -> pa.Table:
    with Index.open(path) as index:
        return pa.Table.from_batches(index.rows(embedding=embedding))


@pytest.mark.parametrize("embedding", ["full", "half", "none"])
def test_the_file_holds_the_rows_and_duckdb_reads_them(index, tmp_path, embedding) -> None:
    file = tmp_path / "it's [1]*.parquet"
    assert copy(index, file, embedding) == Copied(written=N)
    assert sorted(os.listdir(tmp_path)) == ["index", file.name]
    rows = literal(index, embedding)
    assert pq.read_table(str(file)).cast(rows.schema).equals(rows)
    with reading(index, file) as (opened, store):
        names = list(opened.ids)
        assert store.fetch([names[7], "'", "nowhere"]) == rows.slice(7, 1).to_pylist()
        assert [name for some in store.ids() for name in some] == names
        assert store.generations() == {opened.generation: N}
        if embedding == "none":
            with pytest.raises(StoreError, match="holds no embeddings, so it cannot search"):
                store.search(np.zeros(8), 3)
        else:
            query = opened.embeddings([3])[0]
            expected = opened.search(query[None], 6).positions[0].tolist()
            assert [row["id"] for row in store.search(query, 6)] == [names[at] for at in expected]


@pytest.mark.parametrize("embedding", ["full", pytest.param("half", marks=pytest.mark.peers)])
def test_answers_are_the_indexs_own(tmp_path, embedding) -> None:
    of: Sample = sample(tmp_path)
    copy(of.index, tmp_path / "rows.parquet", embedding)
    with reading(of.index, tmp_path / "rows.parquet") as (_, store):
        check_answers(of, store, exact=embedding == "full")


def test_the_inner_product_is_the_largest_first(tmp_path) -> None:
    make(tmp_path / "index", N, metric="ip", normalized=False)
    copy(tmp_path / "index", tmp_path / "r.parquet")
    with reading(tmp_path / "index", tmp_path / "r.parquet") as (index, store):
        vectors = index.embeddings(range(N))
        query = 3 * vectors[5] + vectors[2]
        expected = [index.ids[at] for at in np.argsort(-vectors @ query)[:5].tolist()]
        assert [row["id"] for row in store.search(query, 5)] == expected


def test_it_is_written_again_after_a_change_alone(index, tmp_path) -> None:
    file = tmp_path / "rows.parquet"
    copy(index, file)
    before = file.stat().st_ino
    assert copy(index, file) == Copied(kept=N)
    assert file.stat().st_ino == before
    with reading(index, file) as (_, store):
        remove(index, ["image-0007"])
        append(index, part(N, N + 5, encoding_of("low-rank")))
        assert copy(index, file) == Copied(written=N + 4)
        assert store.fetch(["image-0007"]) == []  # the file that lies there now
        assert len(store.fetch(["image-0032"])) == 1
    assert pq.read_table(str(file)).equals(literal(index))
    assert copy(index, file, "half") == Copied(written=N + 4)


def test_it_goes_on_behind_the_batches_that_are_there(index, tmp_path, monkeypatch) -> None:
    file, written = tmp_path / "rows.parquet", parquet.written

    def full(path: Path):
        if path.name.startswith("000003"):
            raise OSError(28, "No space left on device")
        return written(path)

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "written", full)
        said = r"No space left on device.*; 12 of 30 rows are there: run the same command again"
        with pytest.raises(StoreError, match=said):
            copy(index, file)
    assert not file.exists()
    assert copy(index, file) == Copied(written=N - 12, kept=12)
    assert pq.read_table(str(file)).equals(literal(index))


def test_batches_of_another_index_are_not_gone_on_with(index, tmp_path, monkeypatch) -> None:
    file = tmp_path / "rows.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_join", lambda *_: 1 / 0)
        with pytest.raises(StoreError, match="division"):
            copy(index, file)
    remove(index, ["image-0000"])
    assert copy(index, file) == Copied(written=N - 1)
    assert pq.read_table(str(file)).equals(literal(index))


def test_what_embedcam_did_not_write_is_left_alone(index, tmp_path) -> None:
    file = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"id": ["a"]}), str(file))
    content = file.read_bytes()
    with pytest.raises(InputError, match="was not written by embedcam, so it is left alone"):
        copy(index, file)
    assert file.read_bytes() == content
    with pytest.raises(StoreError, match="has no column 'codes'"), reading(index, file):
        pass
    file.write_bytes(content[:-9])
    with pytest.raises(StoreError, match="reading it failed"):
        copy(index, file)


def test_a_file_holds_one_generation(index, tmp_path) -> None:
    file, other = tmp_path / "rows.parquet", tmp_path / "other"
    make(other, 5, "top-m")
    copy(index, file)
    with pytest.raises(InputError, match=r"holds rows of the generation .*--drop-generation"):
        copy(other, file)
    with Index.open(index) as opened, Index.open(other) as second:
        store = open_store(str(file), Table.of(second, "full"))
        assert store.drop(second.generation) == 0
        assert store.drop(opened.generation) == N
    for refused in (store.written, lambda: store.remove(["a"])):
        with pytest.raises(StoreError, match="is written as a whole"):
            refused()
    assert not file.exists()
    with pytest.raises(StoreError, match="write rows to it first"), reading(index, file):
        pass


def test_one_process_writes(index, tmp_path) -> None:
    with (
        parquet.locked(str(tmp_path / "rows.parquet.building")),
        pytest.raises(StoreError, match="another process has it open"),
    ):
        copy(index, tmp_path / "rows.parquet")


def test_a_search_that_takes_too_long_ends(index, tmp_path, monkeypatch) -> None:
    file = tmp_path / "rows.parquet"
    copy(index, file)
    endless = (
        "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range = -b.range"
    )
    with reading(index, file, seconds=0.05) as (_, store):
        monkeypatch.setattr(store, "_ask", lambda cursor, *_, **__: cursor.execute(endless))
        with pytest.raises(StoreError, match=r"a search took longer than 0.05 seconds; allow"):
            store.search(np.zeros(8), 3)
        monkeypatch.undo()
        assert len(store.search(np.zeros(8), 3)) == 3


def test_a_file_that_goes_away(index, tmp_path) -> None:
    file = tmp_path / "rows.parquet"
    copy(index, file)
    with reading(index, file) as (_, store):
        shutil.move(file, tmp_path / "away.parquet")
        with pytest.raises(StoreError, match=r"a search failed .*; see that it is there"):
            store.search(np.zeros(8), 3)
