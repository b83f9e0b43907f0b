"""A PostgreSQL server: its address, connections that are lent, and what it says in one sentence."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from ..errors import InputError, StoreError, cut, reason, short

try:
    import psycopg
except ImportError as error:
    raise InputError(
        f'postgresql:// is read by psycopg ({reason(error)}); pip install "embedcam[postgres]"'
    ) from error
from psycopg import adapt, conninfo, pq, waiting
from psycopg import sql as sql

OURS = {"table": "embedcam_rows", "id": "id", "embedding": "embedding", "label": "label",
        "path": "path"}  # fmt: skip
"""Parameters of an address that are embedcam's own, and what holds without them."""
LONGEST_NAME = 63
"""PostgreSQL cuts off what is longer."""
NOTHING: Mapping[str, object] = {}
"""Values of a statement without any: given all the same, for only then `%%` is a percent sign."""
GRACE = 0.3
"""Seconds that the server has beyond the limit to say itself that it is reached."""
_TICK = 0.1
_AS_PERCENT = (
    "write postgresql://USER:PASSWORD@HOST/DATABASE, special characters of its parts as %XX "
    "(a / as %2F, an @ as %40)"
)


@dataclass(frozen=True)
class Address:
    """Where a table is: what libpq connects to, the names in it, and which of them were given."""

    connect: dict[str, Any]
    names: dict[str, str]
    given: frozenset[str]

    @property
    def shown(self) -> str:
        """The address as messages name it: without a password, in the one order."""
        at = {name: self.connect.get(name) for name in ("user", "host", "port", "dbname")}
        user, port = at["user"] and f"{at['user']}@", at["port"] and f":{at['port']}"
        server = f"{user or ''}{at['host'] or ''}{port or ''}/{at['dbname'] or ''}"
        return cut(f"postgresql://{server}?table={self.names['table']}", 200)


def read_address(url: str) -> Address:
    """Return the parts of an address, or raise InputError, which repeats nothing of a password."""
    before, _, query = url.partition("?")
    server = re.match(r"[^/]*//[^/]*", before)
    # A password in which these are not escaped would be taken for a host, and told.
    if server is None or url.count("@") > ("@" in server[0]):
        raise InputError(f"the address of the PostgreSQL store is ambiguous; {_AS_PERCENT}")
    pairs = parse_qsl(query, keep_blank_values=True)
    given = {name: value for name, value in pairs if name in OURS}
    try:
        rest = urlencode([pair for pair in pairs if pair[0] not in OURS], quote_via=quote)
        connect = conninfo.conninfo_to_dict(f"{before}?{rest}" if rest else before)
    except (psycopg.Error, UnicodeError) as error:
        known = f"embedcam's own parameters are {', '.join(OURS)}"
        advice = known if "parameter" in reason(error) else _AS_PERCENT
        raise InputError(
            f"the address of the PostgreSQL store cannot be read ({reason(error)}); {advice}"
        ) from None
    for name, value in given.items():
        longest = LONGEST_NAME - len("_written") if name == "table" else LONGEST_NAME
        if not 0 < len(value.encode(errors="replace")) <= longest or not storable(value):
            raise InputError(
                f"the address of the PostgreSQL store has {name}={short(value)}; expected a name "
                f"of 1 to {longest} bytes"
            )
    return Address(connect, OURS | given, frozenset(given))


def identifier(name: str) -> sql.Identifier:
    """Return a name quoted for a statement with values."""
    return sql.Identifier(name.replace("%", "%%"))


def storable(text: str) -> bool:
    """Return whether PostgreSQL can keep a text: it knows neither NUL nor halves of characters."""
    return "\0" not in text and text == text.encode(errors="ignore").decode()


class Vector(bytes):
    """A vector as pgvector sends and receives it."""


class _VectorDumper(adapt.Dumper):
    """Leaves the type to the server, which knows what stands on the other side of an operator."""

    format = pq.Format.BINARY

    def dump(self, obj: Vector) -> bytes:
        return bytes(obj)


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """One that waits until a time, also for a server that says nothing at all."""

    until = math.inf

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for what a generator waits for, until then."""
        if self.until == math.inf:
            return super().wait(gen, *args, **kwargs)
        # In Python: what waits in C told nobody of the time before psycopg 3.3.
        return waiting.wait_selector(self._limited(gen), self.pgconn.socket, _TICK)

    def _limited(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Pass on what a generator waits for; nothing is ready every `_TICK` seconds."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and monotonic() > self.until:
                    raise _TooLate
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value


class _TooLate(psycopg.OperationalError):
    pass


class Link:
    """Connections to one server, lent to threads; `seconds` limits what `rows` asks."""

    def __init__(self, address: Address, seconds: float | None) -> None:
        self.name, self._connect, self._seconds = address.shown, address.connect, seconds
        # A process that was forked opens its own.
        self._idle: dict[int, deque[Connection]] = {}

    def rows(
        self, query: sql.Composed | bytes, values: Mapping[str, object] = NOTHING
    ) -> list[tuple[Any, ...]]:
        """Return what one statement returns, in binary; asked once more where a connection was cut.

        The statement is prepared: only what has few forms may be part of its text.
        """
        until = math.inf if self._seconds is None else monotonic() + self._seconds + GRACE
        with self._said():
            while True:
                connection, is_new = self._lend()
                connection.until = until
                try:
                    cursor = connection.cursor(binary=True)
                    return cursor.execute(query, values, prepare=True).fetchall()
                except psycopg.OperationalError:
                    # Cut while it was idle, as by a server that was started again.
                    if is_new or not connection.closed:
                        raise
                finally:
                    self._give_back(connection)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Lend a connection for statements that hold together or not at all, without a limit."""
        with self._said():
            connection, _ = self._lend()
            connection.until = math.inf
            try:
                with connection.transaction():
                    connection.execute("SET LOCAL statement_timeout = 0")
                    yield connection
            finally:
                self._give_back(connection)

    def close(self) -> None:
        """Close what is not lent."""
        idle = self._idle.pop(os.getpid(), ())
        for connection in idle:
            connection.close()

    def _lend(self) -> tuple[Connection, bool]:
        """Return a connection, and whether it was opened just now."""
        try:
            return self._idle[os.getpid()].pop(), False
        except LookupError:
            return self._open(), True

    def _give_back(self, connection: Connection) -> None:
        if connection.info.transaction_status != pq.TransactionStatus.IDLE:
            connection.close()  # cut, or left while the server was at work
        else:
            self._idle.setdefault(os.getpid(), deque()).append(connection)

    def _open(self) -> Connection:
        limits: dict[str, int] = {}
        if self._seconds is not None:  # libpq takes less than two seconds for two
            limits["connect_timeout"] = max(2, math.ceil(self._seconds))
        try:
            connection = Connection.connect(
                **self._connect | limits, autocommit=True, client_encoding="utf8"
            )
        except psycopg.Error as error:
            said, advice = reason(error), "start the server, or correct the address"
            if "password" in said:
                advice = "give the user's password in the address, or as PGPASSWORD"
            raise StoreError(f"{self.name}: cannot be reached ({said}); {advice}") from error
        connection.adapters.register_dumper(Vector, _VectorDumper)
        try:
            if self._seconds is not None:
                limit = str(math.ceil(1000 * self._seconds))
                connection.execute("SELECT set_config('statement_timeout', %s, false)", (limit,))
            # An HNSW index then goes on where a filter or a high LIMIT leaves too few of what it
            # found; pgvector before 0.8 does not know it.
            with suppress(psycopg.ProgrammingError):
                connection.execute("SET hnsw.iterative_scan = strict_order")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Tell an error of PostgreSQL's in one sentence."""
        try:
            yield
        except (_TooLate, psycopg.errors.QueryCanceled) as error:
            raise StoreError(
                f"{self.name}: gave no answer within {self._seconds or 0:g} s; give it an index "
                "of the vectors (docs/stores/pgvector.md), or more time"
            ) from error
        except psycopg.Error as error:
            raise StoreError(f"{self.name}: {reason(error)}") from error
