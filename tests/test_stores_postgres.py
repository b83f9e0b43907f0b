"""PostgreSQL with pgvector, a real one: rows, tables that were there before, and a bad day."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from photo_samples import CROP, Pooled, picture
from PIL import Image
from store_samples import (
    FIELDS,
    Sample,
    any_rows,
    batch_of,
    check_answers,
    differing,
    expected_of,
    made_rows,
    read_back,
    sample,
    table_of,
)  # fmt: skip
from toys import seeded

from embedcam import EmbeddingNetwork, Explainer
from embedcam.cli import main
from embedcam.errors import InputError, StoreError
from embedcam.index import Index
from embedcam.stores import Store, Table, copy_rows, open_store
from scripts.postgres_server import PostgresServer

ROOT = Path(__file__).parents[1]
OTHER = "f" * 16
PHOTOS = "?table=photos&id=photo_id&embedding=vec"
Run = Callable[..., list[tuple]]


@contextmanager
def opened(url: str, table: Table | None = None, seconds: float | None = None) -> Iterator[Store]:
    with closing(open_store(url, table or table_of(), seconds=seconds)) as store:
        yield store


def reading(generation: str = "0" * 16) -> Table:
    return Table(generation, 8, "l2")


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def run(postgres: PostgresServer, database: str) -> Run:
    return lambda statement, *values: postgres.run(database, statement, *values)


@pytest.fixture
def photos(run: Run, database: str) -> str:
    """A team's table of twenty photos, with a column of theirs and the vectors of `made_rows`."""
    run(
        "CREATE TABLE photos (photo_id bigint PRIMARY KEY, vec vector(8), category varchar(20), "
        "owner text NOT NULL)"
    )
    vectors = [str(row["embedding"]) for row in made_rows(20)]
    run(
        "INSERT INTO photos SELECT n - 1, v::vector, 'kind ' || mod(n - 1, 2), 'ann' "
        "FROM unnest(%s::text[]) WITH ORDINALITY AS made (v, n)",
        vectors,
    )
    return database + PHOTOS


def numbered(count: int, start: int = 0) -> list[dict]:
    """Rows whose ids are the numbers of `photos`."""
    rows = enumerate(made_rows(count, start), start)
    return [{**row, "id": str(number)} for number, row in rows]


# Rows.


@pytest.mark.parametrize("embedding", ["full", pytest.param("half", marks=pytest.mark.peers)])
def test_a_row_written_and_read_is_the_row(database: str, embedding: str) -> None:
    table = table_of(embedding)
    with opened(database, table) as store:

        @settings(max_examples=60)
        @given(any_rows())
        def check(rows: list[dict]) -> None:
            names = [row["id"] for row in rows]
            assert store.write(batch_of(table, rows), "part", 3) == 0
            assert read_back(store.fetch([*names, "nowhere", "\0", "\ud800"])) == expected_of(rows)
            assert sorted(name for ids in store.ids() for name in ids) == sorted(names)
            assert store.remove([*names[1:], "\0"]) == len(rows) - 1
            assert read_back(store.search(np.ones(8, np.float32), 10)) == expected_of(rows[:1])
            assert store.drop(table.generation) == 1
            assert (store.generations(), store.written()) == ({}, {})

        check()


def test_rows_are_written_over_and_generations_lie_side_by_side(database: str) -> None:
    before, other = made_rows(9), table_of(generation=OTHER)
    after = [{**new, "id": old["id"]} for new, old in zip(made_rows(9, 20), before, strict=True)]
    mine = [{**row, "generation": OTHER} for row in after]
    with opened(database) as store, opened(database, other) as newer:
        store.write(batch_of(table_of(), before), "a", 9)
        store.write(batch_of(table_of(), after[:4]), "a", 4)
        store.write(batch_of(table_of(), []), "b", 2)
        newer.write(batch_of(other, mine), "a", 7)
        now = expected_of([*after[:4], *before[4:]])
        assert read_back(store.search(np.zeros(8, np.float32), 20)) == now
        assert read_back(newer.search(np.zeros(8, np.float32), 20)) == expected_of(mine)
        assert (store.written(), newer.written()) == ({"a": 4, "b": 2}, {"a": 7})
        assert newer.remove([before[0]["id"]]) == 1
        assert store.generations() == {"0" * 16: 9, OTHER: 8}
        assert newer.drop("0" * 16) == 9
        assert (store.written(), newer.written()) == ({}, {"a": 7})
        assert read_back(newer.fetch([row["id"] for row in before])) == expected_of(mine[1:])


@pytest.mark.parametrize("embedding", ["full", "half"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("index", ["", "none", "partial"])
def test_the_nearest_come_back(
    run: Run, database: str, embedding: str, metric: str, index: str
) -> None:
    """In order, from an HNSW index, too: more than it looks at, and of one generation alone."""
    table, rows = table_of(embedding, metric=metric), made_rows(60)
    others = [{**row, "embedding": [0.0] * 8} for row in rows]
    if index:  # which tables of this size do not need
        run("ALTER ROLE postgres SET enable_seqscan = off")
        run("ALTER ROLE postgres SET enable_sort = off")
        run("ALTER ROLE postgres SET hnsw.ef_search = 4")
    with ExitStack() as stack:
        stack.callback(run, "ALTER ROLE postgres RESET ALL")
        store = stack.enter_context(opened(database, table))
        older = table_of(embedding, OTHER, metric)
        stack.enter_context(opened(database, older)).write(batch_of(older, others), "a", 60)
        store.write(batch_of(table, rows), "a", 60)
        if index:
            of = f"{'half' if embedding == 'half' else ''}vec{'tor' * (embedding == 'full')}"
            of = f"hnsw (embedding {of}_{metric}_ops)"
            where = f"WHERE generation = '{'0' * 16}'" if index == "partial" else ""
            run(f"CREATE INDEX searched ON embedcam_rows USING {of} {where}")
        vectors = np.array([row["embedding"] for row in rows])
        for query in np.random.default_rng(1).standard_normal((20, 8)).astype(np.float16):
            query = query.astype(np.float32)
            apart = ((vectors - query) ** 2).sum(1) if metric == "l2" else -vectors @ query
            nearest = [rows[place]["id"] for place in np.argsort(apart)]
            assert [row["id"] for row in store.search(query, 7)] == nearest[:7]
        assert [row["id"] for row in store.search(query, 100)] == nearest
    if index:
        run("SELECT pg_stat_force_next_flush()")
        used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'searched'"
        assert run(used) == [(21,)]


@pytest.mark.parametrize("embedding", ["full", pytest.param("half", marks=pytest.mark.peers)])
def test_answers_are_the_indexs_own(of: Sample, database: str, embedding: str) -> None:
    with Index.open(of.index) as index:
        with opened(database, Table.of(index, embedding)) as store:
            assert copy_rows(index, store, embedding=embedding).written == 48
        with opened(database, Table.of(index), 5) as store:
            check_answers(of, store, exact=embedding == "full")


def test_threads_search_at_once_and_connections_are_lent_again(run: Run, database: str) -> None:
    rows = made_rows(40)
    with opened(database) as store:
        store.write(batch_of(table_of(), rows), "a", 40)
        wrong: list[object] = []

        def search(row: dict) -> None:
            for _ in range(20):
                (found,) = store.search(np.array(row["embedding"], np.float32), 1)
                wrong.extend([found["id"]] if found["id"] != row["id"] else [])

        for _ in range(3):
            threads = [threading.Thread(target=search, args=(row,)) for row in rows[:4]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        assert run(count)[0][0] - 1 <= 4
    assert wrong == []


FORKED = """
import os, sys
import numpy as np
from embedcam.stores import Table, open_store

store = open_store(sys.argv[1], Table("0" * 16, 8, "l2"))
assert len(store.search(np.zeros(8), 5)) == 5
if (child := os.fork()) == 0:
    os._exit(len(store.search(np.zeros(8), 4)))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
assert len(store.search(np.zeros(8), 3)) == 3
store.close()
"""


def test_a_forked_process_has_connections_of_its_own(database: str) -> None:
    with opened(database) as store:
        store.write(batch_of(table_of(), made_rows(5)), "a", 5)
    # In a process of its own: others import what does not bear it.
    subprocess.run([sys.executable, "-c", FORKED, database], check=True)


# A table that was there before.


def test_codes_lie_beside_vectors_that_are_there(run: Run, photos: str) -> None:
    table, rows = table_of("none"), numbered(30, 5)
    before = run("SELECT photo_id, vec::text, category, owner FROM photos ORDER BY 1")
    with opened(f"{photos}&label=category", table) as store:
        assert store.write(batch_of(table, rows[:10]), "a", 10) == 0
        assert store.write(batch_of(table, rows[10:]), "a", 30) == 15
        assert (store.written(), store.generations()) == ({"a": 30}, {"0" * 16: 15})
        assert sorted(next(store.ids())) == sorted(row["id"] for row in rows[:15])
        assert store.write(batch_of(table, rows[:15]), "a", 30) == 0
    theirs = [{**row, "label": f"kind {int(row['id']) % 2}"} for row in rows[:15]]
    with opened(f"{photos}&label=category", reading()) as store:
        assert read_back(store.search(np.zeros(8), 99)) == expected_of(theirs)
        assert read_back(store.fetch(["7", "1", "99", "x"])) == expected_of(theirs[2:3])
        assert store.remove(["7", "1"]) == 1
        assert len(store.search(np.zeros(8), 99)) == 14
        assert store.drop("0" * 16) == 14
    left = "SELECT count(*) FROM photos WHERE num_nonnulls(codes, scale, path, generation) > 0"
    assert run(left) == [(0,)]
    assert run("SELECT photo_id, vec::text, category, owner FROM photos ORDER BY 1") == before


def test_codes_of_another_generation_are_written_over(photos: str) -> None:
    """A row of the team's has one place for them."""
    table, newer = table_of("none"), table_of("none", OTHER)
    with opened(photos, table) as store:
        store.write(batch_of(table, numbered(5)), "a", 5)
    rows = [{**row, "generation": OTHER} for row in numbered(3)]
    with opened(photos, newer) as store:
        assert store.write(batch_of(newer, rows), "a", 3) == 0
        assert store.generations() == {"0" * 16: 2, OTHER: 3}
        assert read_back(store.search(np.zeros(8), 9)) == expected_of(rows)
        assert store.drop("0" * 16) == 2
        assert store.generations() == {OTHER: 3}


def test_our_own_rows_get_codes_anew(database: str) -> None:
    """Those of this generation, and the same images' of another keep theirs."""
    full, none, other, rows = table_of(), table_of("none"), table_of(generation=OTHER), made_rows(4)
    with opened(database, full) as store, opened(database, other) as older:
        store.write(batch_of(full, rows[:2]), "a", 2)
        older.write(batch_of(other, rows), "a", 4)
        newer = [{**row, "codes": bytes(20), "label": "new"} for row in rows]
        with opened(database, none) as again:
            assert again.write(batch_of(none, newer), "a", 4) == 2
            assert read_back(again.search(np.zeros(8), 9)) == expected_of(newer[:2])
        kept = [{**row, "generation": OTHER} for row in rows]
        assert read_back(older.search(np.zeros(8), 9)) == expected_of(kept)


def test_a_table_in_partitions_is_searched(run: Run, database: str) -> None:
    """Rows of two partitions have the same place in them."""
    run("CREATE TABLE photos (photo_id text, vec vector(8)) PARTITION BY HASH (photo_id)")
    for part in range(3):
        values = f"FOR VALUES WITH (MODULUS 3, REMAINDER {part})"
        run(f"CREATE TABLE p{part} PARTITION OF photos {values}")
    rows, table = made_rows(20), table_of("none")
    for row in rows:
        run("INSERT INTO photos VALUES (%s, %s)", row["id"], str(row["embedding"]))
    with opened(database + PHOTOS, table) as store:
        assert store.write(batch_of(table, rows), "a", 20) == 0
        vector = np.array(rows[3]["embedding"], np.float32)
        assert read_back(store.search(vector, 1)) == expected_of([rows[3]])
        assert read_back(store.search(vector, 50)) == expected_of(rows)


@pytest.mark.parametrize(
    ("statement", "parameters", "table", "message"),
    [
        ("", PHOTOS, table_of(), "was there before, and its vectors are not written over; write"),
        ("", PHOTOS, reading(), "has no column 'codes'; write codes beside its vectors"),
        ("", "?table=nix", reading(), "there is no such table; name one by ?table=, or write"),
        ("", "?table=nix", table_of("none"), "there is no such table"),
        ("", "?table=photos", reading(), "has no column 'id'; name one of ['photo_id', 'vec',"),
        ("", PHOTOS, Table("0" * 16, 9, "l2"), "the column 'vec' of type vector(8), and the model"),
        ("", PHOTOS + "&embedding=owner", reading(), "'owner' of type text, and the model's emb"),
        ("", PHOTOS + "&label=no", table_of("none"), "has no column 'no'"),
        ("ALTER TABLE photos ADD label text", PHOTOS, table_of("none"), "'label' of its own; let"),
        ("ALTER TABLE photos ADD codes text", PHOTOS, table_of("none"), "'codes' of type text; ex"),
        ("CREATE VIEW seen AS SELECT * FROM photos", "?table=seen&id=photo_id&embedding=vec",
         table_of("none"), "is no table but a view"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit(
    run: Run, photos: str, statement: str, parameters: str, table: Table, message: str
) -> None:
    if statement:
        run(statement)
    url = photos.removesuffix(PHOTOS) + parameters
    with pytest.raises(StoreError, match=re.escape(message)), opened(url, table):
        pass


def test_precisions_are_not_mixed(database: str) -> None:
    with opened(database, table_of("half")), opened(f"{database}?table=full"):
        pass
    for url, embedding, kind, other in (
        (database, "full", "halfvec", "half"),
        (f"{database}?table=full", "half", "vector", "full"),
    ):
        with (
            pytest.raises(StoreError, match=f"as {kind}; write them so, too: --embedding {other}"),
            opened(url, table_of(embedding)),
        ):
            pass


# Addresses, and names that mean something to SQL.


@pytest.mark.parametrize(
    "name",
    ['"', 'a"; DROP TABLE photos; --', "50%", "%s", "%(query)s", "{}", "select", "É b", "n" * 55],
)
def test_any_name_is_a_name(run: Run, database: str, name: str) -> None:
    asked = f"?table={quote(name)}&id={quote(name + '1')}&label={quote(name + '2')}"
    rows = made_rows(3)
    with opened(database + asked) as store:
        store.write(batch_of(table_of(), rows), "a", 3)
        assert read_back(store.search(np.zeros(8), 9)) == expected_of(rows)
        assert read_back(store.fetch([rows[1]["id"]])) == expected_of(rows[1:2])
        assert next(store.ids()) == [row["id"] for row in rows]
        assert (store.remove([rows[0]["id"]]), store.drop("0" * 16)) == (1, 2)
    tables = run("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    assert tables == sorted([(name,), (f"{name}_written",)])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:se/cret@host/db", "is ambiguous"),
        ("postgresql://u:se?cret@host/db", "is ambiguous"),
        ("postgresql://u:se@cret@host/db", "is ambiguous"),
        ("postgresql://u@host/db?password=se@cret", "is ambiguous"),
        ("postgresql://u:secret@host/db?tabel=a", 'invalid URI query parameter: "tabel"'),
        ("postgresql://u:secret@host/db?table=", "has table=''; expected a name of 1 to 55 bytes"),
        ("postgresql://u:secret@host/db?table=" + "n" * 56, "expected a name of 1 to 55 bytes"),
        ("postgresql://u:secret@host/db?id=\udcff", "has id='\\udcff'; expected a name"),
        ("postgresql://u:secret@h\udcff/db", "cannot be read ("),
        ("postgresql://u:secret@host/db?id=%00", "has id='\\x00'; expected a name"),
    ],
)
def test_an_address_that_cannot_be_read(url: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused, opened(url):
        pass
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("secret", ["postgres:se%2Fcret@", "postgres@"])
def test_a_server_that_is_not_there(tmp_path: Path, secret: str) -> None:
    url = f"postgresql://{secret}/db?password=se%2Fcret&host={quote(str(tmp_path), safe='')}"
    with pytest.raises(StoreError, match="cannot be reached") as refused, opened(url):
        pass
    text = str(refused.value)
    assert text.startswith(f"postgresql://postgres@{tmp_path}/db?table=embedcam_rows: cannot be")
    assert "cret" not in text
    assert text.count("\n") == 0


def test_a_database_without_pgvector(run: Run, database: str) -> None:
    run("DROP EXTENSION vector")
    with pytest.raises(StoreError, match="has no type vector; install pgvector"), opened(database):
        pass


# A bad day.


def test_a_text_that_postgresql_cannot_keep(database: str) -> None:
    rows = made_rows(3)
    rows[1] = {**rows[1], "label": "a\0b"}
    with opened(database) as store:
        with pytest.raises(StoreError, match=r"the label 'a\\x00b' has a NUL character"):
            store.write(batch_of(table_of(), rows), "a", 3)
        assert (store.generations(), store.written()) == ({}, {})


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_ends_while_rows_are_copied(
    of: Sample, postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch, how: int
) -> None:
    """What is written stays, the message says how much, and the same call goes on behind it."""
    monkeypatch.setattr("embedcam.stores.copying.BATCH_ROWS", 10)
    with Index.open(of.index) as index, opened(database, Table.of(index, "full")) as store:
        insert, done = store._insert, []

        def failing(*given: object) -> int:
            done.append(1)
            if len(done) == 3:
                postgres.stop(how)
            return insert(*given)

        monkeypatch.setattr(store, "_insert", failing)
        with pytest.raises(StoreError) as stopped:
            copy_rows(index, store)
        assert str(stopped.value).endswith(
            "; 20 of 48 rows are there: run the same command again, and it goes on behind them"
        )
        with pytest.raises(StoreError, match="cannot be reached"):
            store.written()
        postgres.start()
        again = copy_rows(index, store)
        assert (again.kept, again.written) == (20, 28)
        assert sorted(next(store.ids())) == sorted(index.ids)
        assert copy_rows(index, store).kept == 48


def test_connections_that_were_cut_are_opened_anew(postgres: PostgresServer, database: str) -> None:
    with opened(database) as store:
        store.write(batch_of(table_of(), made_rows(4)), "a", 4)
        postgres.stop()
        postgres.start()
        assert len(store.search(np.zeros(8), 9)) == 4


def test_who_answers_too_late_is_not_waited_for(
    postgres: PostgresServer, run: Run, database: str
) -> None:
    import psycopg

    query = np.zeros(8)
    with opened(database) as store:
        store.write(batch_of(table_of(), made_rows(4)), "a", 4)
    with opened(database, seconds=0.2) as store, psycopg.connect(database) as other:
        assert len(store.search(query, 9)) == 4
        other.execute("LOCK TABLE embedcam_rows")
        with pytest.raises(StoreError, match=r"gave no answer within 0\.2 s; give it an index"):
            store.search(query, 9)
        other.rollback()
        # A server that does not even say that it is late.
        ((process,),) = run("SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT r.%'")
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(StoreError, match=r"gave no answer within 0\.2 s"):
                store.search(query, 9)
        finally:
            os.kill(process, signal.SIGCONT)
        assert len(store.search(query, 9)) == 4
        assert store.drop("0" * 16) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("codes = substr(codes, 2)", "bytes of codes, where its generation has"),
        ("scale = 'NaN'", "has the scale nan; expected a finite number"),
        ("scale = -1", "is broken"),
        ("label = repeat('x', 5000)", "expected a text of at most 4,096 characters"),
        ("codes = decode(repeat('ff', length(codes)), 'hex')", "is broken"),
    ],
)
def test_rows_that_somebody_broke(
    of: Sample, run: Run, database: str, change: str, message: str
) -> None:
    with Index.open(of.index) as index:
        with opened(database, Table.of(index, "full")) as store:
            copy_rows(index, store)
        run(f"UPDATE embedcam_rows SET {change} WHERE id = %s", index.ids[0])
        with (
            opened(database, Table.of(index)) as store,
            Explainer.from_model(of.model, of.network) as explainer,
        ):
            rows = store.search(index.embeddings([0])[0], 5)
            with pytest.raises(InputError, match=message) as refused:
                explainer.with_rows(rows)
    assert str(refused.value).isprintable()


# The page.


def test_the_page_is_true(
    postgres: PostgresServer,
    run: Run,
    database: str,
    cli_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (ROOT / "docs" / "stores" / "pgvector.md").read_text(encoding="utf-8")
    (beside, own), (code,), (columns, *indexes) = (
        re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
        for language in ("sh", "python", "sql")
    )
    assert beside.count("\n") <= 15  # from a table and its pictures to maps
    known = features_of_the_team(run)

    def sh(lines: str) -> None:
        for line in lines.splitlines():
            words = shlex.split(os.path.expandvars(as_here(line)))
            if words[0] == "export":
                monkeypatch.setenv(*words[1].split("=", 1))
            elif words[0] == "psql":
                postgres.psql(*words[1:])
            else:
                assert main(words[1:]) == 0, line

    def as_here(line: str) -> str:
        return (
            line.replace("postgresql://me@localhost/shop", database)
            .replace("net:make", "cli_toy_network:make")
            .replace("--layer trunk", "--layer relu")
        )

    sh(beside)
    exec(compile(code, "pgvector.md", "exec"), known)
    why = known["why"]
    with Explainer("photos.index") as whole:
        features = known["embedding"], known["activations"]
        expected = whole.explain_features(*features, neighbors=why.ids)
        apart = whole.index.embeddings(range(12)) - known["embedding"]
        assert why.ids == whole.index.ids[np.argsort((apart**2).sum(1))[:5]]
    assert differing(why, expected, FIELDS) == []
    assert Path("why.png").stat().st_size > 5_000
    sh(own)
    described = (
        "SELECT attname, atttypid, attcollation, attnotnull, pg_get_indexdef(indexrelid, 1, true) "
        "FROM pg_attribute JOIN pg_index ON attrelid = indrelid "
        "WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"
    )
    made = run(described, "photo_rows")
    run(columns.replace("photo_rows", "documented"))
    assert run(described, "documented") == made
    for statement in indexes:
        run(statement)


def features_of_the_team(run: Run) -> dict[str, object]:
    """Fill the page's table, and return what its Python takes for known."""
    network = EmbeddingNetwork(seeded(Pooled, 4), "relu", preprocess=CROP)
    picture(1, 99).save("query.jpg")
    run("CREATE TABLE photos (photo_id int PRIMARY KEY, file text, category text, vec vector(5))")
    files = sorted(Path("photos").rglob("*.png"))
    inputs = np.stack([CROP(Image.open(file)) for file in [*files, Path("query.jpg")]])
    embeddings, _, (activations,) = network.embed(inputs)
    for number, file in enumerate(files):
        values = number, str(file), file.parent.name, str(embeddings[number].tolist())
        run("INSERT INTO photos VALUES (%s, %s, %s, %s)", *values)
    return {"embedding": embeddings[-1], "activations": activations[-1]}
