"""Stores: a row written and read is the row, and what is explained of it is the index's own."""

import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from index_samples import make
from store_samples import (
    TEXTS,
    Sample,
    any_rows,
    batch_of,
    check_answers,
    expected_of,
    made_rows,
    read_back,
    sample,
    table_of,
)  # fmt: skip

from embedcam.errors import InputError, StoreError
from embedcam.index import Index, remove
from embedcam.stores import Store, Table, copy_rows, open_store

pytestmark = pytest.mark.usefixtures("quick_disk")
URLS = {"lance": "lance:{}/rows", "qdrant": "qdrant:{}/rows"}
OTHER = "f" * 16


ALL = ["lance", pytest.param("qdrant", marks=pytest.mark.peers)]


@pytest.fixture(params=ALL)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return URLS[request.param].format(tmp_path)


@contextmanager
def opened(url: str, table: Table, **options: float) -> Iterator[Store]:
    with closing(open_store(url, table, **options)) as store:
        yield store


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return sample(tmp_path_factory.mktemp("sample"))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("embedding", ["full", "half", "none"])
def test_a_row_written_and_read_is_the_row(
    kind: str, embedding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, table = tmp_path_factory.mktemp("any"), table_of(embedding)
    with opened(URLS[kind].format(folder), table) as store:

        @settings(max_examples=25)
        @given(any_rows())
        def check(rows: list[dict]) -> None:
            names = [row["id"] for row in rows]
            assert store.write(batch_of(table, rows), "part", 3) == 0
            assert read_back(store.fetch([*names, "nowhere"])) == expected_of(rows, embedding)
            assert sorted(name for ids in store.ids() for name in ids) == sorted(names)
            assert store.generations() == {table.generation: len(rows)}
            assert store.remove([*names[1:], "nowhere"]) == len(rows) - 1
            assert read_back(store.fetch(names)) == expected_of(rows[:1], embedding)
            assert store.drop(table.generation) == 1
            assert (store.generations(), store.written()) == ({}, {})

        check()
    shutil.rmtree(folder)


def test_the_same_id_is_written_over_and_generations_lie_side_by_side(url: str) -> None:
    table, other = table_of(), table_of(generation=OTHER)
    before, after = made_rows(9), made_rows(9, 20)
    after = [{**new, "id": old["id"]} for old, new in zip(before, after, strict=True)]
    with opened(url, table) as store:
        store.write(batch_of(table, before), "a", 9)
        store.write(batch_of(table, after[:4]), "a", 4)
        store.write(batch_of(table, []), "b", 2)
        assert read_back(store.fetch([row["id"] for row in before])) == {
            **expected_of(before), **expected_of(after[:4])
        }  # fmt: skip
        assert store.written() == {"a": 4, "b": 2}
    mine = made_rows(3, generation=OTHER)
    with opened(url, other) as store:
        assert (store.written(), list(store.ids())) == ({}, [])
        store.write(batch_of(other, mine), "a", 3)
        assert read_back(store.search(np.zeros(8), 20)) == expected_of(mine)
        assert store.remove([before[8]["id"]]) == 0
        assert store.generations() == {"0" * 16: 9, OTHER: 3}
        assert store.drop("0" * 16) == 9
        store.finish()
        assert read_back(store.fetch([row["id"] for row in before])) == expected_of(mine)
        assert store.written() == {"a": 3}


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("embedding", ["full", "half"])
def test_the_nearest_come_back(url: str, embedding: str, metric: str) -> None:
    table, rows = table_of(embedding, metric=metric), made_rows(60)
    others = [{**row, "embedding": [0.0] * 8, "generation": OTHER} for row in rows]
    another = table_of(embedding, OTHER, metric)
    with opened(url, another) as store:
        store.write(batch_of(another, others), "a", 60)
    with opened(url, table) as store:
        store.write(batch_of(table, rows), "a", 60)
        store.finish()
        vectors = np.array([row["embedding"] for row in rows])
        for query in np.random.default_rng(1).standard_normal((20, 8)):
            apart = ((vectors - query) ** 2).sum(1) if metric == "l2" else -vectors @ query
            nearest = {rows[place]["id"]: rows[place] for place in np.argsort(apart)[:7]}
            assert read_back(store.search(query.astype(np.float32), 7)) == nearest
        assert len(read_back(store.search(vectors[0], 100))) == 60


def test_without_embeddings_a_store_cannot_search(url: str) -> None:
    table = table_of("none")
    with opened(url, table) as store:
        store.write(batch_of(table, made_rows(3)), "a", 3)
        with pytest.raises(StoreError, match="holds no embeddings, so it cannot search"):
            store.search(np.zeros(8), 3)


def test_another_table_is_refused(url: str) -> None:
    full = table_of("full")
    with opened(url, full) as store:
        store.write(batch_of(full, made_rows(3)), "a", 3)
    for other, what in (("half", "float16"), ("none", "none are to be written")):
        with pytest.raises(StoreError, match=what), opened(url, table_of(other)):
            pass
    wider = Table(full.generation, 9, "l2")
    with pytest.raises(StoreError, match="the model's have 9 numbers"), opened(url, wider):
        pass
    with opened(url, Table(full.generation, 8, "l2")) as store:
        assert read_back(store.fetch([*TEXTS, "image 00002"])) == expected_of(made_rows(1, 2))


def test_one_process_writes(url: str) -> None:
    with (
        opened(url, table_of()),
        pytest.raises(StoreError, match="another process has it open; wait until it is done"),
        opened(url, table_of()),
    ):
        pass


def test_a_store_that_is_not_there(url: str) -> None:
    with (
        pytest.raises(StoreError, match="write rows to it first"),
        opened(url, Table("0", 8, "l2")),
    ):
        pass


@pytest.mark.parametrize("embedding", ["full", pytest.param("half", marks=pytest.mark.peers)])
def test_answers_are_the_indexs_own(of: Sample, url: str, embedding: str) -> None:
    with Index.open(of.index) as index:
        with opened(url, Table.of(index, embedding)) as store:
            assert copy_rows(index, store, embedding=embedding).written == 48
        with opened(url, Table.of(index)) as store:
            check_answers(of, store, exact=embedding == "full")


def test_a_removed_picture_is_gone(of: Sample, url: str, tmp_path: Path) -> None:
    """Of an image that an index does not hold any more no byte is left in the store's files."""
    path = tmp_path / "index"
    shutil.copytree(of.index, path)
    with Index.open(path) as index, opened(url, Table.of(index, "full")) as store:
        copy_rows(index, store)
        gone = index.ids[[7, 30]]
        vectors = index.embeddings([7, 30])
        kept = index.embeddings([8])[0].tobytes()
    remove(path, gone)
    with Index.open(path) as index:
        with opened(url, Table.of(index, "full")) as store:
            assert copy_rows(index, store).removed == 2
        with opened(url, Table.of(index, "full")) as store:
            assert copy_rows(index, store).removed == 0
            assert len(store.fetch(gone)) == 0
    files = [file.read_bytes() for file in (tmp_path / "rows").rglob("*") if file.is_file()]
    assert any(kept in content for content in files)
    for secret in [one.encode() for one in gone] + [one.tobytes() for one in vectors]:
        assert not any(secret in content for content in files)


def test_a_folder_that_goes_away_loses_nothing_and_says_where_it_was(url: str, tmp_path) -> None:
    path = tmp_path / "index"
    make(path, 40)
    with Index.open(path) as index:
        kind = Table.of(index, "full")
        with opened(url, kind) as store, pytest.raises(StoreError) as told:
            copy_rows(index, store, progress=lambda _: shutil.rmtree(tmp_path / "rows"))
        assert re.search("of 40 rows are there: run the same command again", str(told.value))
        assert "\n" not in str(told.value)
        with opened(url, kind) as store:
            assert copy_rows(index, store).written == 40
        with opened(url, Table.of(index)) as store:
            assert len(read_back(store.fetch(list(index.ids)))) == 40


def test_a_search_that_takes_too_long_ends(tmp_path: Path) -> None:
    url, table = URLS["lance"].format(tmp_path), table_of()
    with opened(url, table) as store:
        store.write(batch_of(table, made_rows(9)), "a", 9)
    with (
        opened(url, table, seconds=1e-6) as store,
        pytest.raises(StoreError, match="a search took longer than 1e-06 seconds; allow it more"),
    ):
        store.search(np.zeros(8), 3)


def test_who_searches_goes_on_while_files_are_joined(tmp_path: Path) -> None:
    url, table = URLS["lance"].format(tmp_path), table_of()
    rows = made_rows(200)
    with opened(url, table) as store:
        store.write(batch_of(table, rows[:100]), "a", 100)
        with opened(url, Table(table.generation, 8, "l2")) as reader, ThreadPoolExecutor(2) as pool:
            ended = Event()

            def search() -> int:
                count = 0
                while not ended.is_set():
                    found = read_back(reader.search(np.zeros(8), 20))
                    assert len(found) == 20
                    count += 1
                return count

            searches = [pool.submit(search) for _ in range(2)]
            try:
                for start in range(100, 200, 10):
                    store.write(batch_of(table, rows[start : start + 10]), "a", start + 10)
                    store.remove([rows[start - 100]["id"]])
                    store.finish()
            finally:
                ended.set()
            assert all(one.result() > 3 for one in searches)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("lance", "lancedb", "lance"), ("qdrant", "qdrant_edge", "qdrant"), ("", "duckdb", "duckdb")],
)
def test_a_missing_package_is_told_by_its_extra(
    kind, package, extra, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    url = URLS[kind].format(tmp_path) if kind else str(tmp_path / "r.parquet")
    (tmp_path / "rows").mkdir()
    (tmp_path / "r.parquet").touch()
    with pytest.raises(InputError, match=rf'pip install "embedcam\[{extra}\]"'):
        open_store(url, Table("0" * 16, 8, "l2"))


@pytest.mark.parametrize(
    ("given", "said"),
    [("lance:{}/a?tabel=b", "has 'tabel'; expected lance:PATH; it takes table"),
     ("lance:{}/a?table=../b", "'../b' is no name of a table"),
     ("qdrant:{}/a?x=1", "has 'x'; expected qdrant:PATH")],
)  # fmt: skip
def test_an_address_that_cannot_be(given: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        open_store(given.format(tmp_path), table_of())
    assert not list(tmp_path.iterdir())


def test_an_index_made_by_hand_is_used_and_kept_and_a_tag_is_told(tmp_path: Path) -> None:
    import lancedb
    from lancedb.index import IvfFlat

    url, table = URLS["lance"].format(tmp_path), table_of()
    rows = made_rows(300)
    with opened(url, table) as store:
        store.write(batch_of(table, rows[:290]), "a", 290)
        store.finish()
        own = lancedb.connect(tmp_path / "rows").open_table("embedcam_rows")
        config = IvfFlat(distance_type="l2", num_partitions=1)
        own.create_index("embedding", config=config)
        store.write(batch_of(table, rows[290:]), "a", 300)
        store.remove([rows[0]["id"]])
        store.finish()
        own.checkout_latest()
        assert len(own.list_indices()) == 1
        for row in (rows[7], rows[295]):
            found = read_back(store.search(np.array(row["embedding"]), 1))
            assert found == expected_of([row])
        assert len(read_back(store.search(np.zeros(8), 500))) == 299
        own.tags.create("kept", own.version)
        store.remove([rows[1]["id"]])
        with pytest.raises(StoreError, match=r"delete the following tag.*kept"):
            store.finish()
        own.tags.delete("kept")
        store.finish()
