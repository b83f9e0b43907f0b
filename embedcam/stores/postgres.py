"""Rows in PostgreSQL with pgvector: in a table of their own, or beside vectors that are there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, LiteralString

import numpy as np

from ..errors import StoreError, short
from ..index.in_memory import Row, Rows
from .postgres_link import NOTHING, Connection, Link, Vector, read_address, sql, storable
from .postgres_table import ADDED, COMMA, READ, sized, table_of
from .store import Table

if TYPE_CHECKING:
    import pyarrow as pa

IDS = 10_000
_NUMBERS = {"vector": ">f4", "halfvec": ">f2"}


def open_store(url: str, table: Table, seconds: float | None = None) -> PostgresStore:
    """Open a table at `postgresql://...?table=NAME`; see `embedcam.stores.open_store`."""
    return PostgresStore(url, table, seconds)


class PostgresStore:
    """Rows of one generation in one table, see `Store`.

    Marks of what is written lie in a table beside it, named with `_written` at the end.
    """

    def __init__(self, url: str, table: Table, seconds: float | None) -> None:
        address = read_address(url)
        self._link, self._width = Link(address, seconds), table.width
        self.name = self._link.name
        self._searches: dict[int, bytes] = {}
        try:
            self._layout = table_of(self._link, address, table)
        except BaseException:
            self.close()
            raise
        self._sql = self._layout.sql

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n rows nearest to a query `[D]`, in one round trip."""
        if n not in self._searches:
            self._searches[n] = self._searching(n)
        (query,) = packed(np.asarray(embedding)[None], self._layout.kind)
        return self._read(self._link.rows(self._searches[n], {"query": query}))

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids; those that it does not know are left out."""
        query = self._sql(
            "SELECT {selected} FROM {table} r WHERE r.generation = {is} AND {key} = ANY(%(ids)s)"
        )
        return self._read(self._link.rows(query, {"ids": [one for one in ids if storable(one)]}))

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        """Put rows in place of those of the same id and generation, and their mark, together.

        Returns how many had no place, where codes are written beside vectors.
        """
        columns = [name for name in READ if name in batch.schema.names and name != "generation"]
        with self._link.transaction() as connection:
            self._copy(connection, batch, columns)
            placed = (self._insert if "embedding" in columns else self._update)(connection, columns)
            connection.execute(
                self._sql(
                    "INSERT INTO {marks} VALUES ({is}, %(part)s, %(upto)s) "
                    "ON CONFLICT (generation, part) DO UPDATE SET upto = excluded.upto"
                ),
                {"part": part, "upto": upto},
            )
        return int(batch.num_rows) - placed

    def written(self) -> dict[str, int]:
        """Return before which row each part is written."""
        return dict(
            self._link.rows(self._sql("SELECT part, upto FROM {marks} WHERE generation = {is}"))
        )

    def remove(self, ids: Sequence[str]) -> int:
        """Remove rows of this generation; beside vectors that are the team's, what was added."""
        with self._link.transaction() as connection:
            return self._clear(
                connection,
                "r.generation = {is} AND {key} = ANY(%(ids)s)",
                {"ids": [one for one in ids if storable(one)]},
            )

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of this generation, in batches."""
        with self._link.transaction() as connection, connection.cursor("ids") as cursor:
            cursor.execute(
                self._sql("SELECT {key} FROM {table} r WHERE generation = {is}"), NOTHING
            )
            while rows := cursor.fetchmany(IDS):
                yield [name for (name,) in rows]

    def generations(self) -> dict[str, int]:
        """Return how many rows of each generation the table holds."""
        query = self._sql(
            "SELECT generation, count(*) FROM {table} WHERE generation IS NOT NULL GROUP BY 1"
        )
        return dict(self._link.rows(query))

    def drop(self, generation: str) -> int:
        """Remove all rows of a generation and its marks; return how many there were."""
        values = {"of": generation}
        with self._link.transaction() as connection:
            connection.execute(self._sql("DELETE FROM {marks} WHERE generation = %(of)s"), values)
            return self._clear(connection, "r.generation = %(of)s", values)

    def finish(self) -> None:
        """Let the planner see how many rows each generation has."""
        with self._link.transaction() as connection:
            connection.execute(self._sql("ANALYZE {table}"), NOTHING)

    def close(self) -> None:
        """Close the connections."""
        self._link.close()

    def _searching(self, n: int) -> bytes:
        """Return the statement that finds the n nearest rows."""
        # Generation and n are text, not values: a plan for any of these would use no index.
        limit = sql.Literal(int(n))
        # Of pgvector's indexes PostgreSQL cannot tell; of others it says no.
        ordered = self._sql(
            "SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = to_regclass({name}) "
            "AND pg_index_column_has_property(indexrelid, 1, 'distance_orderable') IS NOT FALSE)"
        )
        if self._link.rows(ordered) == [(True,)]:
            found = self._sql(
                "SELECT {selected} FROM {table} r WHERE r.generation = {is} "
                "ORDER BY r.{embedding} {operator} %(query)s LIMIT {n}",
                n=limit,
            )
        else:  # rows that are far are only compared; codes are read of the nearest, by their places
            found = self._sql(
                "SELECT {selected} FROM (SELECT tableoid AS part, ctid AS place, "
                "{embedding} {operator} %(query)s AS far FROM {table} "
                "WHERE generation = {is} ORDER BY far LIMIT {n}) near "
                "JOIN {table} r ON r.ctid = near.place AND r.tableoid = near.part "
                "ORDER BY near.far",
                n=limit,
            )
        return found.as_bytes()

    def _copy(self, connection: Connection, batch: pa.RecordBatch, columns: Sequence[str]) -> None:
        """Send a batch into a table that is gone when the transaction ends."""
        kinds: dict[str, sql.Composable] = {name: sql.SQL(kind) for name, kind in ADDED.items()}
        kinds |= {"id": sql.SQL("text"), "embedding": sized(self._layout.kind, self._width)}
        fields = [sql.SQL("{} {}").format(sql.Identifier(one), kinds[one]) for one in columns]
        made = self._sql(
            "CREATE TEMP TABLE {batch} ({fields}) ON COMMIT DROP", fields=COMMA.join(fields)
        )
        connection.execute(made, NOTHING)
        copied = self._sql("COPY {batch} FROM STDIN (FORMAT BINARY)")
        with connection.cursor().copy(copied) as copy:
            for row in zip(*(self._values(batch, name) for name in columns), strict=True):
                copy.write_row(row)

    def _values(self, batch: pa.RecordBatch, name: str) -> Sequence[str | bytes | None]:
        """Return a column as it is sent: numbers as the bytes that they are."""
        column = batch.column(name)
        if name == "embedding":
            numbers = column.flatten().to_numpy().reshape(-1, self._width)
            return packed(numbers, self._layout.kind)
        values = column.to_pylist()
        if name == "scale":
            return [None if one is None else struct.pack(">f", one) for one in values]
        if name != "codes" and (wrong := [one for one in values if one and "\0" in one]):
            raise StoreError(
                f"{self.name}: the {name} {short(wrong[0])} has a NUL character, which PostgreSQL "
                "keeps in no text; give the image another"
            )
        return values  # type: ignore[no-any-return]

    def _insert(self, connection: Connection, columns: Sequence[str]) -> int:
        """Insert the batch, in place of rows with the same key; return how many these are."""
        targets = [self._layout.parts[name] for name in columns]
        changed = [sql.SQL("{0} = excluded.{0}").format(target) for target in targets]
        inserted = self._sql(
            "INSERT INTO {table} (generation, {targets}) SELECT {is}, {sources} FROM {batch} "
            "ON CONFLICT (generation, {id}) DO UPDATE SET {changed}",
            targets=COMMA.join(targets),
            sources=COMMA.join(map(sql.Identifier, columns)),
            changed=COMMA.join(changed),
        )
        return int(connection.execute(inserted, NOTHING).rowcount)

    def _update(self, connection: Connection, columns: Sequence[str]) -> int:
        """Give rows that are there their codes; return how many of the batch there are."""
        changed = [
            sql.SQL("{} = b.{}").format(self._layout.parts[name], sql.Identifier(name))
            for name in columns
            if name in self._layout.filled
        ]
        # A row of the team's has one place for codes, whatever generation they are of.
        same = "AND r.generation = {is} " if self._layout.is_own else ""
        updated = self._sql(
            "WITH placed AS (UPDATE {table} r SET generation = {is}, {changed} FROM {batch} b "
            "WHERE {key} = b.id " + same + "RETURNING b.id) SELECT count(DISTINCT id) FROM placed",
            changed=COMMA.join(changed),
        )
        ((placed,),) = connection.execute(updated, NOTHING).fetchall()
        return int(placed)

    def _clear(
        self, connection: Connection, where: LiteralString, values: Mapping[str, object]
    ) -> int:
        emptied = [sql.SQL("{} = NULL").format(self._layout.parts[o]) for o in self._layout.filled]
        cleared = self._sql("UPDATE {table} r SET {emptied}", emptied=COMMA.join(emptied))
        if self._layout.is_own:
            cleared = self._sql("DELETE FROM {table} r")
        query = cleared + sql.SQL(" WHERE ") + self._sql(where)
        return int(connection.execute(query, values).rowcount)

    def _read(self, rows: Sequence[tuple[Any, ...]]) -> list[Row]:
        numbers = _NUMBERS[self._layout.kind]
        return [
            {
                "id": name,
                "embedding": vector and np.frombuffer(vector, numbers, offset=_HEADER),
                "codes": codes,
                "scale": scale,
                "label": label,
                "path": path,
                "generation": generation,
            }
            for name, vector, codes, scale, label, path, generation in rows
        ]


_HEADER = 4


def packed(vectors: np.ndarray, kind: str) -> list[Vector]:
    """Return vectors `[n D]` as pgvector reads them: their width and, big-endian, their numbers."""
    count, width = vectors.shape
    fields = [("width", ">u2"), ("unused", ">u2"), ("numbers", _NUMBERS[kind], (width,))]
    packed = np.zeros(count, fields)
    packed["width"], packed["numbers"] = width, vectors
    size, content = packed.itemsize, packed.tobytes()
    return [Vector(content[row * size : (row + 1) * size]) for row in range(count)]
