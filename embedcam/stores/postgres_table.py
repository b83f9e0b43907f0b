"""The table of a PostgreSQL store: made, or found and looked at, and how statements name its parts.

A table of embedcam's own has the columns of `row_batches` and the key (generation, id). To a table
that was there before columns are added, and its rows only get and lose what these hold. Which kind
a table is its column `generation` tells: in our own it cannot be null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import LiteralString

from ..errors import StoreError, short
from .postgres_link import NOTHING, Address, Link, identifier, sql
from .store import Table

ADDED = {"codes": "bytea", "scale": "real", "label": "text", "path": "text", "generation": "text"}
"""Columns that vectors which are there get beside them."""
READ = ("id", "embedding", *ADDED)
COMMA = sql.SQL(", ")
_OPERATORS = {"l2": sql.SQL("<->"), "ip": sql.SQL("<#>")}
_KINDS = {"float": "vector", "halffloat": "halfvec"}
_PRECISIONS = {"vector": "full", "halfvec": "half"}
_TEXT = re.compile(r"text|character varying(\(\d+\))?")
_VECTOR = re.compile(r"(?:.*\.)?(vector|halfvec)(?:\((\d+)\))?")
_ELSEWHERE = "write the rows into a table of their own (?table=)"

Columns = dict[str, tuple[str, bool]]
"""Each column's type, and whether it must have a value."""


@dataclass(frozen=True)
class Layout:
    """What statements are made of; `kind` is that of the vectors, `vector` or `halfvec`.

    `is_own` tells whether rows are embedcam's to insert and delete; `filled` are the columns that
    it writes beside id and embedding.
    """

    parts: dict[str, sql.Composable]
    kind: str
    is_own: bool
    filled: tuple[str, ...]

    def sql(self, text: LiteralString, **more: sql.Composable) -> sql.Composed:
        """Return a statement, for `r` as the table's alias."""
        return sql.SQL(text).format(**self.parts, **more)


def table_of(link: Link, address: Address, table: Table) -> Layout:
    """Find a table, make what is missing where rows are to be written, and check its columns.

    Raises
    ------
    StoreError
        It is missing, or does not fit the rows.
    """
    names, writes = address.names, table.schema is not None
    given = _given(table)
    plain = Layout(_parts(address, table), given or "", True, ())
    columns = _columns(link, plain)
    if not columns and given:
        _create(link, plain, table.width)
        columns = _columns(link, plain)
    table_kinds = "SELECT 1 FROM pg_class WHERE oid = to_regclass({name}) AND relkind IN ('r', 'p')"
    if columns and not link.rows(plain.sql(table_kinds)):
        advice = "name the table that its rows are in by ?table="
        raise _wrong(link, "is no table but a view, or lies on another server", advice)
    if not columns:
        raise _wrong(
            link,
            "there is no such table",
            "name one by ?table=, or write it: `embedcam rows INDEX --to postgresql://...`",
        )
    for name in ("id", "embedding"):
        if names[name] not in columns:
            found = short(list(columns), 200)
            advice = f"name one of {found} by &{name}="
            raise _wrong(link, f"has no column {short(names[name])}", advice)
    is_own = columns.get("generation", ("", False))[1]
    kind = _kind(link, columns[names["embedding"]][0], table.width, names["embedding"])
    filled = tuple(name for name in ADDED if is_own or name not in address.given)
    if given and not is_own:
        raise _wrong(
            link,
            "was there before, and its vectors are not written over",
            f"write codes beside them (--embedding none), or {_ELSEWHERE}",
        )
    if given and given != kind:
        advice = f"write them so, too: --embedding {_PRECISIONS[kind]}"
        raise _wrong(link, f"keeps its embeddings as {kind}", advice)
    if writes and not is_own:
        _add(link, plain, {names.get(name, name): name for name in filled}, columns)
        columns = _columns(link, plain)
    for name in ADDED:
        _check(link, names.get(name, name), columns, ADDED[name] if name in filled else None)
    return Layout({**plain.parts, **_read_as(columns, names, plain)}, kind, is_own, filled)


def sized(kind: str, width: int) -> sql.Composed:
    """Return the type of a vector."""
    return sql.SQL("{}({})").format(sql.SQL("halfvec" if kind == "halfvec" else "vector"), width)


def _given(table: Table) -> str | None:
    """Return how PostgreSQL calls the vectors that are to be written; None without any."""
    if table.schema is None or "embedding" not in table.schema.names:
        return None
    return _KINDS[str(table.schema.field("embedding").type.value_type)]


def _parts(address: Address, table: Table) -> dict[str, sql.Composable]:
    name = address.names["table"]
    quoted = sql.Identifier(name).as_string().replace("%", "%%")
    return {
        "name": sql.Literal(quoted),
        "table": identifier(name),
        "marks": identifier(f"{name}_written"),
        "batch": identifier(f"{name}_batch".replace("%", "_")),  # COPY takes no values
        **{column: identifier(address.names.get(column, column)) for column in READ},
        "is": sql.Literal(table.generation),
        "operator": _OPERATORS[table.metric],
    }


def _columns(link: Link, plain: Layout) -> Columns:
    """Return the table's columns; none where there is no table."""
    query = plain.sql(
        "SELECT attname::text, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
        "WHERE attrelid = to_regclass({name}) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    return {name: (kind, filled) for name, kind, filled in link.rows(query)}


def _create(link: Link, plain: Layout, width: int) -> None:
    """Make a table of our own; what is filtered and compared comes first in its rows."""
    if link.rows(sql.SQL("SELECT to_regtype('vector')::text").format()) == [(None,)]:
        raise _wrong(
            link,
            "its database has no type vector",
            "install pgvector there, and let the database's owner run CREATE EXTENSION vector",
        )
    with link.transaction() as connection:
        connection.execute(
            plain.sql(
                'CREATE TABLE IF NOT EXISTS {table} (generation text COLLATE "C" NOT NULL, '
                '{embedding} {kind} NOT NULL, {id} text COLLATE "C" NOT NULL, '
                "codes bytea NOT NULL, scale real, {label} text, {path} text, "
                "PRIMARY KEY (generation, {id}))",
                kind=sized(plain.kind, width),
            ),
            NOTHING,
        )
        connection.execute(plain.sql(_MARKS), NOTHING)


def _add(link: Link, plain: Layout, ours: dict[str, str], columns: Columns) -> None:
    """Add columns to a table that was there before; those of its own are left as they are."""
    if "codes" not in columns and (taken := [column for column in ours if column in columns]):
        advice = f"let it be read by &label= or &path=, or {_ELSEWHERE}"
        raise _wrong(link, f"has a column {short(taken[0])} of its own", advice)
    fields = [
        sql.SQL("ADD COLUMN IF NOT EXISTS {} {}").format(plain.parts[name], sql.SQL(ADDED[name]))
        for column, name in ours.items()
        if column not in columns
    ]
    with link.transaction() as connection:
        # Who waits for a table makes all who come after wait, too.
        connection.execute("SET LOCAL lock_timeout = '5s'")
        if fields:
            altered = plain.sql("ALTER TABLE {table} {fields}", fields=COMMA.join(fields))
            connection.execute(altered, NOTHING)
        connection.execute(plain.sql(_MARKS), NOTHING)


_MARKS: LiteralString = (
    "CREATE TABLE IF NOT EXISTS {marks} (generation text, part text, upto bigint NOT NULL, "
    "PRIMARY KEY (generation, part))"
)


def _kind(link: Link, said: str, width: int, name: str) -> str:
    """Return whether a column is of `vector` or `halfvec`."""
    found = _VECTOR.fullmatch(said)
    if found is None or int(found[2] or width) != width:
        raise _wrong(
            link,
            f"has the column {short(name)} of type {said}, and the model's embeddings have "
            f"{width} numbers",
            f"name another by &embedding=; expected vector({width}) or halfvec({width})",
        )
    return found[1]


def _check(link: Link, name: str, columns: Columns, expected: str | None) -> None:
    """Refuse a column that is missing, or of another type than expected."""
    if name not in columns and expected is None:
        advice = f"name one of {short(list(columns), 200)} by &label= or &path="
        raise _wrong(link, f"has no column {short(name)}", advice)
    if name not in columns:
        raise _wrong(
            link,
            f"has no column {short(name)}",
            "write codes beside its vectors: `embedcam rows INDEX --to postgresql://... "
            "--embedding none`",
        )
    if expected not in (None, columns[name][0]):
        raise _wrong(
            link,
            f"has the column {short(name)} of type {columns[name][0]}",
            f"expected {expected}: {_ELSEWHERE}",
        )


def _read_as(columns: Columns, names: dict[str, str], plain: Layout) -> dict[str, sql.Composable]:
    """Return what is selected, and the id as a text that is compared."""
    column = {name: sql.SQL("r.{}").format(plain.parts[name]) for name in READ}
    for name in ("id", "label", "path"):
        if not _TEXT.fullmatch(columns[names[name]][0]):
            column[name] += sql.SQL("::text")
    return {"key": column["id"], "selected": COMMA.join(column.values())}


def _wrong(link: Link, what: str, advice: str) -> StoreError:
    return StoreError(f"{link.name}: {what}; {advice}")
