"""Search with what explains beside search alone in a store, and explaining its rows.

A store's section holds two tables of the same vectors: one of ids and vectors, as it was before,
and one with embedcam's columns. *Search alone* asks for ids and distances.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np

from embedcam import Explainer, Index, Recipe
from embedcam.index.encoding import LowRank
from embedcam.index.model import write_model
from embedcam.stores import Store, Table, copy_rows, open_store

from ..postgres_server import PostgresServer
from .cases import HEAD_WIDTH, TRUST, near, write_index
from .timing import Case, alternate, compared, section, verdict

CHANNELS, RANK, GRID, NEIGHBORS = 2048, 128, (7, 7), 10
SEARCH_BAR, EXPLAIN_BAR = 1.10, 1.0
Search = Callable[[np.ndarray], object]


class Subject:
    """An index of `rows` images, low-rank codes of rank 128, its model, and queries near them."""

    def __init__(self, rows: int, queries: int, folder: Path) -> None:
        rng = np.random.default_rng(2)
        basis = np.linalg.qr(rng.standard_normal((CHANNELS, RANK)))[0].T.astype(np.float32)
        encoding = LowRank(np.ascontiguousarray(basis), np.zeros(CHANNELS, np.float32), "pca")
        recipe = Recipe(faiss="none")
        self.path = write_index(folder / "rows", near(rows, 0), encoding, recipe, GRID, trust=TRUST)
        self.index = Index.open(self.path)
        self.model = write_model(self.index, folder / "rows.embedcam")
        self.queries = near(queries, 1)
        self.activations = rng.random((50, CHANNELS, *GRID), np.float32)

    def close(self) -> None:
        """Remove what was written."""
        self.index.close()
        shutil.rmtree(self.path)
        self.model.unlink()


def by_turns(subject: Subject, cases: dict[str, Search], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of single searches, each of a query that no case has had before."""
    turns = cycle(subject.queries)
    asked = {name: Case(run, lambda: next(turns)) for name, run in cases.items()}
    return alternate(asked, rounds, warmup=10, control=True)


def explaining(subject: Subject, store: Store, rounds: int) -> str:
    """One line: milliseconds of `explain_rows` of what a store returned, the search apart."""
    found = [store.search(query, NEIGHBORS) for query in subject.queries[:50]]
    turns = cycle(zip(subject.queries, subject.activations, found, strict=False))
    with Explainer.from_model(subject.model) as explainer:
        case = Case(lambda asked: explainer.explain_rows(*asked), lambda: next(turns))
        took = 1e3 * alternate({"explain_rows": case}, rounds, warmup=10)["explain_rows"]
    middle, late = np.percentile(took, [50, 99])
    return (
        f"\n`explain_rows` of {NEIGHBORS} rows, trust included, without drawing: {middle:.2f} ms "
        f"(p50; p99 {late:.2f}; {verdict(float(middle), EXPLAIN_BAR)}).\n"
    )


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a database on a server of its own."""
    memory = {"shared_buffers": "1GB", "maintenance_work_mem": "1GB"}
    server = PostgresServer(**memory, max_parallel_maintenance_workers="0")
    try:
        yield server.make()
    finally:
        server.remove()


def lancedb_report(rows: int, rounds: int, folder: Path) -> str:
    """Every row compared, without an index; a table of ids and vectors alone beside it."""
    import lancedb

    with closing(Subject(rows, 50 * rounds, folder)) as subject:
        place = folder / "rows.lance"
        with closing(open_store(str(place), Table.of(subject.index, "full"))) as store:
            start = time.perf_counter()
            copy_rows(subject.index, store)
            load = time.perf_counter() - start
        whole = lancedb.connect(place).open_table("embedcam_rows")
        plain = lancedb.connect(folder / "plain.lance").create_table(
            "plain", whole.search().select(["id", "embedding"]).to_arrow()
        )

        def alone(table: "lancedb.table.Table", only: str | None) -> Search:
            def run(vector: np.ndarray) -> object:
                found = table.search(vector, vector_column_name="embedding").limit(NEIGHBORS)
                found = found.where(only, prefilter=True) if only else found
                return found.select(["id", "_distance"]).to_arrow()

            return run

        with closing(open_store(str(place), Table.of(subject.index))) as store:
            cases: dict[str, Search] = {
                "search alone": alone(whole, f"generation = '{subject.index.generation}'"),
                "with codes": lambda vector: store.search(vector, NEIGHBORS),
                "without codes": alone(plain, None),
            }
            took = by_turns(subject, cases, 40 * rounds)
            explained = explaining(subject, store, 50 * rounds)
        before, after = (
            sum(file.stat().st_size for file in at.rglob("*") if file.is_file())
            for at in (folder / "plain.lance", place)
        )
        for at in (folder / "plain.lance", place):
            shutil.rmtree(at)
    return (
        section(
            f"LanceDB, {rows:,} rows x {HEAD_WIDTH}",
            f"In this process, {NEIGHBORS} neighbours, no index, warm, single searches of queries "
            "that none had before; milliseconds. *Search alone* asks for ids and distances of the "
            "generation, *with codes* is `store.search`. *Without codes* is a table of ids and "
            f"vectors alone, all of it searched ({before / 1e6:.0f} MB; with embedcam's columns "
            f"{after / 1e6:.0f}). {rows:,} rows were written in {load:.1f} s.",
            ["case", "ms", "ratio", "bar"],
            compared(took, "", {"with codes": SEARCH_BAR}),
        )
        + explained
    )


def pgvector_report(rows: int, rounds: int, folder: Path) -> str:
    """Every row compared, then an HNSW index; the table of a team that has no codes beside both."""
    import psycopg

    tables = ("plain", "embedcam_rows")
    with (
        closing(Subject(rows, 50 * rounds, folder)) as subject,
        postgres() as url,
        psycopg.connect(url, autocommit=True) as own,
    ):
        with closing(open_store(url, Table.of(subject.index, "full"))) as store:
            start = time.perf_counter()
            copy_rows(subject.index, store)
            load = time.perf_counter() - start
        own.execute(f"CREATE TABLE plain (id text PRIMARY KEY, embedding vector({HEAD_WIDTH}))")
        own.execute("INSERT INTO plain SELECT id, embedding FROM embedcam_rows")
        own.execute("VACUUM ANALYZE")
        lines = _pgvector_lines(subject, url, "every row compared: ", 10 * rounds)
        for table in tables:
            own.execute(f"CREATE INDEX ON {table} USING hnsw (embedding vector_l2_ops)".encode())
        own.execute("VACUUM ANALYZE")
        lines += _pgvector_lines(subject, url, "HNSW: ", 50 * rounds)
        with closing(open_store(url, Table.of(subject.index))) as store:
            explained = explaining(subject, store, 50 * rounds)
        size = own.execute("SELECT pg_table_size('plain'), pg_table_size('embedcam_rows')")
        before, after = size.fetchone() or (0, 0)
    return (
        section(
            f"pgvector, {rows:,} rows x {HEAD_WIDTH}",
            f"PostgreSQL on the same machine, one connection, {NEIGHBORS} neighbours, warm, single "
            "searches of queries that none had before; milliseconds. *Search alone* asks for ids "
            "and distances, *with codes* is `store.search`. *Without codes* is a table of ids and "
            f"vectors alone ({before / 1e6:.0f} MB; with embedcam's columns {after / 1e6:.0f}). "
            f"{rows:,} rows were written in {load:.1f} s.",
            ["case", "ms", "ratio", "bar"],
            lines,
        )
        + explained
    )


def _pgvector_lines(subject: Subject, url: str, before: str, rounds: int) -> list[list[object]]:
    from embedcam.stores.postgres import PostgresStore, packed

    def alone(table: str) -> Search:
        asked = f"SELECT id, embedding <-> %(query)s AS far FROM {table} ORDER BY far LIMIT "
        query = f"{asked}{NEIGHBORS}".encode()
        return lambda vector: store._link.rows(query, {"query": packed(vector[None], "vector")[0]})

    of = f"embedcam_rows WHERE generation = '{subject.index.generation}'"
    with closing(PostgresStore(url, Table.of(subject.index), None)) as store:
        cases: dict[str, Search] = {
            "search alone": alone(of),
            "with codes": lambda vector: store.search(vector, NEIGHBORS),
            "without codes": alone("plain"),
        }
        took = by_turns(subject, cases, rounds)
    return compared(took, before, {"with codes": SEARCH_BAR})
