"""Rows in one Parquet file, which is written as a whole and which DuckDB reads.

Batches become files in FILE.building until all are there, and are joined row group by row group;
the file gets its name last. What was killed goes on behind the last batch that is there.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from .._files import read_regular, remove_files, remove_tree, sync_folder, write_whole, written
from ..errors import InputError, StoreError
from ..index.in_memory import Row, Rows
from ..index.row_batches import BATCH_ROWS, row_batches, schema
from .local import COLUMNS, check_columns, in_words, locked, no_search, place_of
from .store import Table

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection as Cursor

    from ..index import Index
    from .copying import Copied

_NEAR: Final = {"l2": "list_distance", "ip": "list_negative_inner_product"}
_THREADS: Final = 4
_CONFIG: Final[dict[str, Any]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "temp_directory": "",  # nothing is left in the folder that a process runs in
}
_ABOUT: Final = b"embedcam"
_JOB: Final = "job.json"
_BATCH: Final = re.compile(r"(\d{6})-([0-9a-f]{16})-(\d+)\.arrow")
_OURS: Final = re.compile(r".*\.(arrow|tmp|json)")
_ROWS: Final = BATCH_ROWS
"""Of a batch, which is a row group of the file."""


def open_store(url: str, table: Table, seconds: float | None) -> Parquet:
    """Open `FILE.parquet` or `duckdb:FILE.parquet`."""
    path, _ = place_of(url, "duckdb")
    return Parquet(path, table, seconds)


class Parquet:
    """A store in one file, see `embedcam.stores.Store`: what is written is all of an index."""

    def __init__(self, path: str, table: Table, seconds: float | None) -> None:
        self.name, self._table, self._seconds = path, table, seconds
        self._columns, self._searches = list[str](), False
        with self._in_words("opening it"):
            if table.schema is None:
                self._open()

    def _open(self) -> None:
        import duckdb
        import pyarrow.parquet as pq

        if not os.path.isfile(self.name):
            raise StoreError(
                f"{self.name}: is no file; write rows to it first: `embedcam rows INDEX --to "
                f"{self.name}`"
            )
        found = pq.read_schema(self.name)
        self._searches = check_columns(self.name, found, self._table)
        self._columns = [one for one in found.names if one in (*COLUMNS, "embedding")]
        threads = min(_THREADS, os.cpu_count() or 1)
        self._database = duckdb.connect(":memory:", config={**_CONFIG, "threads": threads})

    # Reading

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n nearest rows."""
        if not self._searches:
            raise no_search(self.name)
        near = f"{_NEAR[self._table.metric]}(embedding::FLOAT[], $query::FLOAT[])"
        query = np.asarray(embedding, np.float32).tolist()
        return self._rows("a search", f"ORDER BY {near} LIMIT $n", query=query, n=n)

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids that there are."""
        return self._rows("a fetch", "AND id IN (SELECT unnest($ids::VARCHAR[]))", ids=list(ids))

    def _rows(self, doing: str, rest: str, **values: Any) -> list[Row]:
        with self._in_words(doing), self._cursor() as cursor:
            found = self._ask(cursor, ", ".join(self._columns), rest, **values).fetchall()
        return [dict(zip(self._columns, row, strict=True)) for row in found]

    def _ask(self, cursor: Cursor, columns: str, rest: str = "", **values: Any) -> Any:
        asked = f"SELECT {columns} FROM read_parquet($path) WHERE generation = $mine {rest}"
        # A name is no pattern to DuckDB, whatever letters are in it.
        place = {"path": escape(self.name), "mine": self._table.generation}
        return cursor.execute(asked, {**place, **values})

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        """Open a connection of its own for a thread, interrupted when the time is over."""
        done = threading.Event()
        with self._database.cursor() as cursor:
            watch = threading.Thread(target=_interrupt, args=(cursor, self._seconds, done))
            if self._seconds is not None:
                watch.start()
            try:
                yield cursor
            finally:
                done.set()
                if self._seconds is not None:
                    watch.join()

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of this generation, in batches."""
        with self._in_words("reading ids"), self._cursor() as cursor:
            found = self._ask(cursor, "id")
            while some := found.fetchmany(_ROWS):
                yield [row[0] for row in some]

    def generations(self) -> dict[str, int]:
        """Return how many rows of which generation it holds."""
        about = self._about()
        return {about["generation"]: about["rows"]} if about else {}

    def _about(self) -> dict[str, Any]:
        """Return what the file says of itself; nothing where there is none."""
        import pyarrow.parquet as pq

        if not os.path.exists(self.name):
            return {}
        with self._in_words("reading it"):
            said = json.loads((pq.read_schema(self.name).metadata or {}).get(_ABOUT, b"{}"))
        if not isinstance(said, dict) or "generation" not in said:
            raise InputError(
                f"{self.name}: was not written by embedcam, so it is left alone; give another name"
            )
        return said

    # Writing

    def copy_whole(
        self, index: Index, embedding: str, done: Copied, progress: Callable[[int], object]
    ) -> None:
        """Write all rows of an index, unless the file holds just these."""
        rows, about = len(index), self._about()
        said = {"generation": index.generation, "rows": rows, "embedding": embedding,
                "manifest": index.manifest.manifest_sha256}  # fmt: skip
        if about.get("generation", index.generation) != index.generation:
            raise InputError(
                f"{self.name}: holds rows of the generation {about['generation']}, and these are "
                f"of {index.generation}; give another name, or first remove the old ones: "
                f"--drop-generation {about['generation']}"
            )
        building = Path(f"{self.name}.building")
        if about == said:
            remove_tree(building)
            done.kept = rows
            progress(rows)
            return
        with self._in_words("writing it"), locked(str(building)):
            for count in _batches(index, embedding, building, said, done):
                progress(count)
            _join(building, Path(self.name), schema(index, embedding), said)
            remove_tree(building)

    def drop(self, generation: str) -> int:
        """Delete the file if it is of this generation; return how many rows it held."""
        about = self._about()
        if about.get("generation") != generation:
            return 0
        with self._in_words("removing it"):
            os.unlink(self.name)
            sync_folder(Path(self.name).absolute().parent)
        return int(about["rows"])

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        """Refuse: the file is written as a whole, by `copy_whole`."""
        self._refuse()

    def written(self) -> dict[str, int]:
        """Refuse as `write`."""
        self._refuse()

    def remove(self, ids: Sequence[str]) -> int:
        """Refuse as `write`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(
            f"{self.name}: a file is written as a whole; change the index and write it again"
        )

    def finish(self) -> None:
        """Do nothing: a file is whole."""

    def close(self) -> None:
        """Let go of DuckDB."""
        if self._table.schema is None:
            self._database.close()

    def _in_words(self, doing: str) -> AbstractContextManager[None]:
        return in_words(self.name, "duckdb", doing, self._seconds)


def _batches(
    index: Index, embedding: str, building: Path, said: dict[str, Any], done: Copied
) -> Iterator[int]:
    """Write the batches that are missing in a folder; yield the rows of those that are there."""
    import pyarrow as pa

    job = json.dumps({**said, "batch": _ROWS}, sort_keys=True).encode()
    if not (building / _JOB).exists() or read_regular(building, _JOB, 1 << 16) != job:
        remove_files(building, _OURS)
        write_whole(building / _JOB, job)
    start = dict[str, int]()
    there = _there(building)
    for path, part, upto in there:
        start[part] = upto
        with pa.ipc.open_file(str(path)) as opened:
            done.kept += opened.get_batch(0).num_rows
    yield done.kept
    number = len(there)
    for part, upto, rows in row_batches(index, embedding, _ROWS, start):
        if rows.num_rows:
            name = f"{number:06d}-{part}-{upto}.arrow"
            with written(building / name) as file, pa.ipc.new_file(file, rows.schema) as writer:
                writer.write_batch(rows)
            number += 1
            done.written += rows.num_rows
            yield rows.num_rows


def _there(building: Path) -> list[tuple[Path, str, int]]:
    """Return the batches in a folder, in order: file, part, and before which row it ends."""
    found = sorted((name, _BATCH.fullmatch(name)) for name in os.listdir(building))
    return [(building / name, fits[2], int(fits[3])) for name, fits in found if fits]


def _join(building: Path, target: Path, kind: pa.Schema, said: dict[str, Any]) -> None:
    """Write the batches of a folder as one file, each a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = kind.with_metadata({_ABOUT: json.dumps(said, sort_keys=True).encode()})
    options = {
        "compression": "zstd",
        "use_dictionary": ["label", "generation"],
        "write_statistics": ["id", "generation"],
    }
    with written(target) as file, pq.ParquetWriter(file, kind, **options) as to:
        for path, _, _ in _there(building):
            with pa.ipc.open_file(str(path)) as opened:
                to.write_batch(opened.get_batch(0))
            pa.default_memory_pool().release_unused()  # some tens of MB otherwise


def _interrupt(cursor: Cursor, seconds: float, done: threading.Event) -> None:
    if not done.wait(seconds):
        while not done.wait(0.01):  # once more, should it not have begun
            cursor.interrupt()
