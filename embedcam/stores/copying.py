"""The rows of an index copied into a store: resumed where they ended, removed ones removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StoreError
from ..index.model import digest_of_part
from ..index.row_batches import BATCH_ROWS, removed_ids, row_batches
from .store import WholeStore

if TYPE_CHECKING:
    from ..index import Index
    from .store import Store


@dataclass
class Copied:
    """What was done: rows `written`, found there before (`kept`), without a place, and removed.

    `pruned` were in the store and unknown to the index; `others` are the store's other generations.
    """

    written: int = 0
    kept: int = 0
    unplaced: int = 0
    removed: int = 0
    pruned: int = 0
    unknown: int = 0
    others: dict[str, int] | None = None


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
    """
    done = Copied()
    try:
        if isinstance(store, WholeStore):
            store.copy_whole(index, embedding, done, progress)
            return done
        start = _start(index, store, done)
        progress(done.kept)
        for part, upto, rows in row_batches(index, embedding, BATCH_ROWS, start):
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
        done.others.pop(index.generation, None)
    except StoreError as error:
        raise StoreError(
            f"{error}; {done.kept + done.written:,} of {len(index):,} rows are there: run the same "
            "command again, and it goes on behind them"
        ) from error
    return done


def _start(index: Index, store: Store, done: Copied) -> dict[str, int]:
    """Return up to where each part is written already; nowhere where rows are missing."""
    start, live = store.written(), 0
    for entry, first in zip(index.manifest.parts, index.starts.tolist(), strict=False):
        upto = min(start.get(digest_of_part(entry.files), 0), entry.count)
        live += int(index.live(np.arange(first, first + upto)).sum())
    if store.generations().get(index.generation, 0) < live:
        return {}  # somebody removed rows there, or the whole table
    done.kept = live
    return start


def _unknown(index: Index, store: Store) -> Iterator[Sequence[str]]:
    for ids in store.ids():
        known = index.find_live(ids)
        if unknown := [name for name in ids if name not in known]:
            yield unknown
