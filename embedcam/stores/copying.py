"""The rows of an index copied into a store: resumed where they ended, removed ones removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, StoreError, short
from ..images.texts import hashes_of
from ..index.in_memory import listed
from ..index.model import digest_of_part
from ..index.row_batches import BATCH_ROWS, RowBatch, removed_ids, row_batches
from .store import WholeStore

if TYPE_CHECKING:
    import pyarrow as pa

    from ..index import Index
    from .store import Store

_COMPARED, _SAME = 10, 0.02
"""Vectors that are compared, and how far apart one may be, of its length: half precision is less.
"""


@dataclass
class Copied:
    """What was done: rows `written`, found there before (`kept`), without a place, and removed.

    `pruned` were in the store and unknown to the index; `others` are the rows of the store's other
    generations, and `replaced` those that have given their place to these.
    """

    written: int = 0
    kept: int = 0
    unplaced: int = 0
    removed: int = 0
    pruned: int = 0
    unknown: int = 0
    others: dict[str, int] | None = None
    replaced: dict[str, int] | None = None


def copy_rows(
    index: Index,
    store: Store,
    *,
    embedding: str = "full",
    prune: bool = False,
    progress: Callable[[int], object] = lambda more: None,
) -> Copied:
    """Bring the rows of a store's generation up to those of an index.

    What was written before is not written again. Ids that were removed from the index are removed
    from the store; those that it never knew are counted, and removed with `prune`.

    Raises
    ------
    StoreError
        The store fails: what was written stays, and the same call goes on behind it.
    InputError
        Codes alone are written, and the store's vectors are not the index's embeddings.
    """
    done = Copied()
    try:
        if isinstance(store, WholeStore):
            store.copy_whole(index, embedding, done, progress)
            return done
        before, is_checked = store.generations(), embedding != "none"
        for part, upto, rows in _left(index, store, embedding, before, done, progress):
            is_checked = is_checked or _check_vectors(index, store, rows, part)
            done.unplaced += store.write(rows, part, upto)
            done.written += rows.num_rows
            progress(rows.num_rows)
        for ids in removed_ids(index):
            done.removed += store.remove(ids)
        for unknown in _unknown(index, store):
            done.unknown += len(unknown)
            if prune:
                done.pruned += store.remove(unknown)
        store.finish()
        done.others = store.generations()
        lost = {name: rows - done.others.get(name, 0) for name, rows in before.items()}
        done.replaced = {n: rows for n, rows in lost.items() if rows > 0 and n != index.generation}
        done.others.pop(index.generation, None)
    except StoreError as error:
        raise StoreError(
            f"{error}; {done.kept + done.written:,} of {len(index):,} rows are there: run the same "
            "command again, and it goes on behind them"
        ) from error
    return done


def _left(
    index: Index,
    store: Store,
    embedding: str,
    generations: dict[str, int],
    done: Copied,
    progress: Callable[[int], object],
) -> Iterator[RowBatch]:
    """Yield the batches that are to be written; those written before only as far as rows lack."""
    start = store.written()
    for entry, first in zip(index.manifest.parts, index.starts.tolist(), strict=False):
        upto = min(start.get(digest_of_part(entry.files), 0), entry.count)
        done.kept += int(index.live(np.arange(first, first + upto)).sum())
    if generations.get(index.generation, 0) >= done.kept:
        progress(done.kept)
        yield from row_batches(index, embedding, BATCH_ROWS, start)
        return
    # Somebody removed rows there, or the whole table.
    there = np.sort(np.concatenate([np.empty(0, np.int64), *map(hashes_of, store.ids())]))
    for part, upto, rows in row_batches(index, embedding, BATCH_ROWS):
        if upto <= start.get(part, 0):
            hashes = hashes_of(rows.column("id").to_pylist())
            absent = ~np.isin(hashes, there)
            progress(rows.num_rows - int(absent.sum()))
            rows = rows.filter(absent)
            done.kept -= rows.num_rows
        if rows.num_rows or upto > start.get(part, 0):
            yield RowBatch(part, upto, rows)


def _check_vectors(index: Index, store: Store, rows: pa.RecordBatch, part: str) -> bool:
    """Refuse vectors that are not the index's, by a few rows; return whether there were any.

    These are written first, for a store reads rows with codes alone; others keep what they have.
    """
    few = rows.slice(0, _COMPARED)
    ids = few.column("id").to_pylist()
    store.write(few, part, 0)
    fetched = listed(store.fetch(ids))
    for row in fetched:
        if row.get("embedding") is None:
            return True
        here = index.embeddings([index.position(row["id"])])[0].astype(np.float64)
        there = np.asarray(row["embedding"], np.float64)
        away = float(np.linalg.norm(here - there))
        if away > _SAME * float(np.linalg.norm(here)):
            store.remove(ids)
            lengths = " and ".join(f"{np.linalg.norm(one):.4g}" for one in (there, here))
            raise InputError(
                f"{store.name}: the vector of {short(row['id'])} there is not the index's: they "
                f"are {away:.3g} apart, of lengths {lengths}; build the index with the network, "
                "preprocessing and normalization of those vectors, or write rows with embeddings "
                "to a table of their own"
            )
    return bool(fetched)


def _unknown(index: Index, store: Store) -> Iterator[Sequence[str]]:
    for ids in store.ids():
        known = index.find_live(ids)
        if unknown := [name for name in ids if name not in known]:
            yield unknown
