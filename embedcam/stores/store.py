"""A store: a database that keeps the rows of an index, and the address that opens it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ..errors import InputError, cut
from ..index.in_memory import Rows

if TYPE_CHECKING:
    import pyarrow as pa

    from ..index import Index
    from .copying import Copied


@dataclass(frozen=True)
class Table:
    """What the rows of one generation look like; `schema` is of those to be written."""

    generation: str
    width: int
    metric: str  # "l2" or "ip"
    schema: pa.Schema | None = None

    @classmethod
    def of(cls, index: Index, embedding: str | None = None) -> Table:
        """Return the table of an index or a model; `embedding` is how rows are written, if any."""
        from ..index.row_batches import schema

        written = None if embedding is None else schema(index, embedding)
        return cls(index.generation, index.width, index.metric, written)


class Store(Protocol):
    """Rows of one generation in a database, see `embedcam.index.row_batches`.

    Any number of threads may search and fetch. What fails is a `StoreError` of one sentence.
    """

    name: str
    """What messages call it: its address without a password."""

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n rows nearest to a query `[D]`, in one round trip.

        With their embeddings, where the store has them, so that distances are the index's own.
        """
        ...

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids; those that it does not know are left out."""
        ...

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        """Put rows in place of those of the same id and generation, and remember how far it is.

        That the rows of `part` before `upto` are written is remembered together with them, where
        the store can. Returns how many had no place, where only rows that are there get codes.
        """
        ...

    def written(self) -> dict[str, int]:
        """Return before which row each part is written."""
        ...

    def remove(self, ids: Sequence[str]) -> int:
        """Remove rows of this generation; return how many there were."""
        ...

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of this generation, in batches."""
        ...

    def generations(self) -> dict[str, int]:
        """Return how many rows of each generation it holds."""
        ...

    def drop(self, generation: str) -> int:
        """Remove all rows of a generation, and what is remembered of it; return how many."""
        ...

    def finish(self) -> None:
        """End a copy: make searches quick, and leave nothing of what was removed where it can."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class WholeStore(Store, Protocol):
    """A store that is written anew or not at all, such as a file."""

    def copy_whole(
        self, index: Index, embedding: str, done: Copied, progress: Callable[[int], object]
    ) -> None:
        """Make it hold all rows of an index and no others, and say in `done` what that took."""
        ...


KINDS = (
    (r"postgres(?:ql)?://.+", "postgres"),
    (r"lance:.+|[^:?]+\.lance(?:/)?(?:\?.*)?", "lance"),
    (r"qdrant:.+", "qdrant"),
    (r"(?:duckdb:)?[^?]+\.parquet", "parquet"),
)
"""Addresses, and the module of each that has a function `open_store`."""
_PASSWORD = re.compile(r"(?<=://).*@", re.DOTALL)
"""With the name before it: in a password that is not escaped both may have any letter."""


def open_store(url: str, table: Table, *, seconds: float | None = None) -> Store:
    """Open a store for the rows of one generation.

    Parameters
    ----------
    url : `postgresql://...`, `FOLDER.lance`, `qdrant:FOLDER` or `FILE.parquet`.
    table : what its rows are, see `Table.of`.
    seconds : the longest that a search or a fetch may take; None for no limit.

    Raises
    ------
    InputError
        An address of no kind that is known, or a package that is missing.
    StoreError
        It cannot be reached.
    """
    for pattern, module in KINDS:
        if re.fullmatch(pattern, url, re.DOTALL):
            opened: Callable[..., Store] = import_module(f".{module}", __package__).open_store
            return opened(url, table, seconds)
    raise InputError(
        f"{name_of(url)}: is the address of no store that is known; expected postgresql://..., "
        "FOLDER.lance, qdrant:FOLDER or FILE.parquet"
    )


def name_of(url: str) -> str:
    """Return an address as messages name it, without a password."""
    return cut(_PASSWORD.sub("", url), 200)
