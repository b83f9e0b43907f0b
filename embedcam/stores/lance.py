"""Rows in LanceDB: a table of rows and a table of marks in one folder.

Rows go in by `merge_insert` and their mark after them, so that what a killed process left is only
written again. No index is made: each search compares with all rows of the generation.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

import numpy as np

from ..errors import InputError, StoreError, short
from ..index.in_memory import Rows
from .local import COLUMNS, check_columns, in_words, locked, no_search, place_of
from .store import Table

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.table import Table as LanceTable

_METRICS: Final = {"l2": "l2", "ip": "dot"}
_KEYS: Final = ["id", "generation"]
_ROWS: Final = 10_000
_TRIES: Final = 5
_NAME: Final = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def open_store(url: str, table: Table, seconds: float | None) -> Lance:
    """Open `FOLDER.lance` or `lance:FOLDER`, both with `?table=NAME` behind it if need be."""
    folder, options = place_of(url, "lance", "table")
    name = options.get("table", "embedcam_rows")
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{folder}: {short(name)} is no name of a table; use letters, digits, _, - and ."
        )
    return Lance(folder, name, table, seconds)


class Lance:
    """A store in a folder of LanceDB, see `embedcam.stores.Store`; locked where it is written."""

    def __init__(self, folder: str, name: str, table: Table, seconds: float | None) -> None:
        self.name, self._seconds = folder, seconds
        self._limit = None if seconds is None else timedelta(seconds=seconds)
        self._metric, self._generation = _METRICS[table.metric], table.generation
        self._mine = _is_in("generation", [table.generation])
        with ExitStack() as stack, self._in_words("opening it"):
            if table.schema is not None:
                stack.enter_context(locked(folder))
            self._rows = self._open(name, table.schema)
            schema = self._rows.schema
            self._searches = check_columns(f"{folder}, table {name}", schema, table)
            self._columns = [one for one in schema.names if one in (*COLUMNS, "embedding")]
            self._closing = finalize(self, stack.pop_all().close)

    def _open(self, name: str, schema: pa.Schema | None) -> LanceTable:
        import lancedb
        import pyarrow as pa

        rows = None
        if os.path.isdir(self.name):
            # At each search it looks for what another process wrote meanwhile.
            database = lancedb.connect(self.name, read_consistency_interval=timedelta(0))
            with suppress(ValueError):  # no such table
                rows = database.open_table(name)
        if schema is None and rows is None:
            raise StoreError(
                f"{self.name}: holds no table {name}; write rows to it first: `embedcam rows INDEX "
                f"--to lance:{self.name}`"
            )
        if schema is not None:
            marks = pa.schema({"generation": pa.string(), "part": pa.string(), "upto": pa.int64()})
            self._marks = database.create_table(f"{name}_marks", schema=marks, exist_ok=True)
        return database.create_table(name, schema=schema) if rows is None else rows

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n nearest rows, an Arrow table."""
        if not self._searches:
            raise no_search(self.name)
        query = np.asarray(embedding, np.float32)

        def near() -> Any:
            found: Any = self._rows.search(query, vector_column_name="embedding")
            found = found.distance_type(self._metric).where(self._mine, prefilter=True).limit(n)
            return found.select([*self._columns, "_distance"])

        return self._read("a search", near)

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids that there are, an Arrow table."""

        def these() -> Any:
            found = self._rows.search().where(self._these(ids)).limit(max(len(ids), 1))
            return found.select(self._columns)

        return self._read("a fetch", these)

    def _read(self, doing: str, ask: Callable[[], Any]) -> Rows:
        with self._in_words(doing):
            for more in range(_TRIES, -1, -1):
                try:
                    table: Rows = ask().to_arrow(timeout=self._limit)
                    break
                except Exception as error:
                    # Whoever writes deleted the files of the version that it began with.
                    if not more or "not found" not in str(error).lower():
                        raise
        return table

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        """Put rows in, and then the mark of their part."""
        import pyarrow as pa

        with self._in_words("writing rows"):
            _merge(self._rows, _KEYS, batch)
            mark = {"generation": [self._generation], "part": [part], "upto": [upto]}
            _merge(self._marks, ["generation", "part"], pa.table(mark, self._marks.schema))
        return 0

    def written(self) -> dict[str, int]:
        """Return the marks of this generation."""
        with self._in_words("reading marks"):
            marks = self._marks.search().where(self._mine).to_arrow().to_pylist()
        return {mark["part"]: mark["upto"] for mark in marks}

    def remove(self, ids: Sequence[str]) -> int:
        """Remove rows of this generation; return how many there were."""
        with self._in_words("removing rows"):
            there = self._rows.search().where(self._these(ids)).select(["id"]).to_arrow()
            # A version for nothing would keep the ids that were asked for.
            if there.num_rows:
                self._rows.delete(self._these(there["id"].to_pylist()))
            return int(there.num_rows)

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of this generation, in batches."""
        with self._in_words("reading ids"):
            found = self._rows.search().where(self._mine).select(["id"])
            for batch in found.to_batches(_ROWS):
                yield batch.column(0).to_pylist()

    def generations(self) -> dict[str, int]:
        """Return how many rows of each generation there are."""
        counts = Counter[str]()
        with self._in_words("counting rows"):
            for batch in self._rows.search().select(["generation"]).to_batches(_ROWS):
                counts.update(batch.column(0).to_pylist())
        return dict(counts)

    def drop(self, generation: str) -> int:
        """Remove all rows and marks of a generation; return how many rows there were."""
        which = _is_in("generation", [generation])
        with self._in_words("removing rows"):
            self._marks.delete(which)
            count = self._rows.count_rows(which)
            self._rows.delete(which)
            return int(count)

    def finish(self) -> None:
        """Join the files of many batches, and delete those that hold what was removed."""
        with self._in_words("packing it"):
            for table in (self._rows, self._marks):
                files = table.to_lance()
                # By default it leaves files of which less than a tenth was removed.
                files.optimize.compact_files(materialize_deletions_threshold=0.0)
                # The lock says that nobody is writing, so whatever no version names is a leftover.
                files.cleanup_old_versions(timedelta(0), delete_unverified=True)

    def close(self) -> None:
        """Let go of it, and of its lock."""
        self._closing()

    def _these(self, ids: Sequence[str]) -> str:
        return f"{self._mine} AND {_is_in('id', ids)}"

    def _in_words(self, doing: str) -> AbstractContextManager[None]:
        return in_words(self.name, "lance", doing, self._seconds)


def _merge(table: LanceTable, keys: list[str], rows: pa.RecordBatch | pa.Table) -> None:
    merge = table.merge_insert(keys).when_matched_update_all().when_not_matched_insert_all()
    merge.execute(rows)


def _is_in(column: str, values: Sequence[str]) -> str:
    """Return a condition in SQL; within a text of SQL a quote is the one letter that is special."""
    texts = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({texts})" if texts else "false"
