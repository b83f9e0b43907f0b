"""Rows in Qdrant's embedded engine: a point for each row, in a folder that one process has open.

Points are numbered by UUIDs, which are made of generation and id; all else of a row is payload,
codes as base64. Each batch is flushed before its mark is written. Vectors are not indexed.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, uuid5
from weakref import finalize

import numpy as np

from .._files import read_regular, remove_tree, sync_folder, write_whole
from ..errors import StoreError
from ..index.in_memory import Row, Rows
from .local import check_kind, in_words, kind_of, locked, no_search, place_of
from .store import Table

if TYPE_CHECKING:
    import pyarrow as pa

_SHARD: Final = "shard"
_ABOUT: Final = "embedcam.json"
_MOST: Final = 1 << 26
_ROWS: Final = 1000


def open_store(url: str, table: Table, seconds: float | None) -> Qdrant:
    """Open `qdrant:FOLDER`. The engine has no time limit, so `seconds` changes nothing."""
    folder, _ = place_of(url, "qdrant")
    return Qdrant(folder, table)


class Qdrant:
    """A store in a folder of Qdrant's embedded engine, see `embedcam.stores.Store`."""

    def __init__(self, folder: str, table: Table) -> None:
        self.name, self._table, self._place = folder, table, Path(folder, _ABOUT)
        with ExitStack() as stack, self._in_words("opening it"):
            import qdrant_edge

            self._engine: Any = qdrant_edge
            if table.schema is None and not self._place.exists():
                raise StoreError(
                    f"{folder}: holds no rows; write rows to it first: `embedcam rows INDEX --to "
                    f"qdrant:{folder}`"
                )
            stack.enter_context(locked(folder))
            if not self._place.exists():
                self._create(kind_of(table.schema))
            self._about = json.loads(read_regular(Path(folder), _ABOUT, _MOST))
            check_kind(folder, self._about["embedding"], table)
            if self._about["metric"] != table.metric:
                raise StoreError(
                    f"{folder}: was made for the metric {self._about['metric']}, and this index "
                    f"compares by {table.metric}; write its rows to another folder"
                )
            self._shard = qdrant_edge.EdgeShard.load(str(self._place.with_name(_SHARD)))
            stack.callback(self._shard.close)
            self._closing = finalize(self, stack.pop_all().close)
        self._mine = self._of(table.generation)

    def _create(self, kind: str | None) -> None:
        """Make an empty shard; what a killed process began is made anew."""
        engine, shard = self._engine, self._place.with_name(_SHARD)
        datatype = engine.VectorStorageDatatype
        vectors = engine.EdgeVectorParams(
            size=self._table.width,
            distance=engine.Distance.Dot if self._table.metric == "ip" else engine.Distance.Euclid,
            datatype=datatype.Float16 if kind and "float16" in kind else datatype.Float32,
        )
        # Vectors are not indexed, and of what was removed `optimize` leaves nothing.
        optimizers = engine.EdgeOptimizersConfig(
            deleted_threshold=0.0, vacuum_min_vector_number=0, indexing_threshold=0
        )
        remove_tree(shard)
        shard.mkdir()
        # A log would keep what was removed; without one a batch is there once it is flushed.
        config = engine.EdgeConfig(vectors=vectors, optimizers=optimizers, wal_enabled=False)
        made = engine.EdgeShard.create(str(shard), config)
        keyword = engine.PayloadSchemaType.Keyword
        made.update(engine.UpdateOperation.create_field_index("generation", keyword))
        made.flush()
        made.close()
        sync_folder(shard.parent)
        self._about = {"embedding": kind, "metric": self._table.metric, "marks": {}}
        self._save()

    def _save(self) -> None:
        write_whole(self._place, json.dumps(self._about))

    # Reading

    def search(self, embedding: np.ndarray, n: int) -> Rows:
        """Return the n nearest rows."""
        if self._about["embedding"] is None:
            raise no_search(self.name)
        engine, query = self._engine, np.asarray(embedding, np.float32).tolist()
        with self._in_words("a search"):
            asked = engine.SearchRequest(
                engine.Query.Nearest(query), n, filter=self._mine,
                params=engine.SearchParams(exact=True), with_vector=True, with_payload=True,
            )  # fmt: skip
            return [_row(point) for point in self._shard.search(asked)]

    def fetch(self, ids: Sequence[str]) -> Rows:
        """Return the rows of these ids that there are."""
        with self._in_words("a fetch"):
            return [_row(point) for point in self._shard.retrieve(self._points(ids), True, True)]

    def _points(self, ids: Sequence[str]) -> list[Any]:
        return [
            uuid5(NAMESPACE_URL, f"{self._table.generation} {one}") for one in dict.fromkeys(ids)
        ]

    def _of(self, generation: str) -> Any:
        match = self._engine.MatchValue(generation)
        return self._engine.Filter(must=[self._engine.FieldCondition("generation", match=match)])

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of this generation, in batches."""
        after, more = None, True
        while more:
            with self._in_words("reading ids"):
                points, after = self._shard.scroll(
                    self._engine.ScrollRequest(after, _ROWS, self._mine, ["id"], False)
                )
            if points:
                yield [point.payload["id"] for point in points if point.payload]
            more = after is not None

    def generations(self) -> dict[str, int]:
        """Return how many rows of each generation there are."""
        with self._in_words("counting rows"):
            asked = self._engine.FacetRequest("generation", _ROWS, exact=True)
            return {str(hit.value): hit.count for hit in self._shard.facet(asked).hits if hit.count}

    def written(self) -> dict[str, int]:
        """Return the marks of this generation."""
        return dict(self._about["marks"].get(self._table.generation, {}))

    # Writing

    def write(self, batch: pa.RecordBatch, part: str, upto: int) -> int:
        """Put rows in, flush them, and then write the mark of their part."""
        with self._in_words("writing rows"):
            rows = batch.to_pylist()
            numbers = self._points([row["id"] for row in rows])
            points = []
            for number, row in zip(numbers, rows, strict=True):
                vector = row.pop("embedding", {})
                payload = {**row, "codes": b64encode(row["codes"]).decode()}
                points.append(self._engine.Point(number, vector, payload))
            self._update("upsert_points", points)
            self._about["marks"].setdefault(self._table.generation, {})[part] = upto
            self._save()
        return 0

    def _update(self, operation: str, given: Any) -> None:
        self._shard.update(getattr(self._engine.UpdateOperation, operation)(given))
        self._shard.flush()

    def remove(self, ids: Sequence[str]) -> int:
        """Remove rows of this generation; return how many there were."""
        with self._in_words("removing rows"):
            there = [point.id for point in self._shard.retrieve(self._points(ids), False, False)]
            self._update("delete_points", there)
        return len(there)

    def drop(self, generation: str) -> int:
        """Remove all rows and marks of a generation; return how many rows there were."""
        which = self._of(generation)
        with self._in_words("removing rows"):
            if self._about["marks"].pop(generation, None) is not None:
                self._save()
            count = self._shard.count(self._engine.CountRequest(True, which))
            self._update("delete_points_by_filter", which)
        return int(count)

    def finish(self) -> None:
        """Write the files anew that hold what was removed."""
        with self._in_words("packing it"):
            self._shard.optimize()
            self._shard.flush()

    def close(self) -> None:
        """Let go of it, and of its lock."""
        self._closing()

    def _in_words(self, doing: str) -> AbstractContextManager[None]:
        return in_words(self.name, "qdrant", doing)


def _row(point: Any) -> Row:
    row: dict[str, Any] = {**point.payload, "embedding": point.vector or None}
    if row["scale"] is not None:  # read from its JSON it is a last digit of float64 off
        row["scale"] = float(np.float32(row["scale"]))
    return row
