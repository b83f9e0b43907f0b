"""Rows that stores have to keep, and what is explained of them beside the index's own."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from build_samples import SIDE, built, pictures, toy
from hypothesis import strategies as st

from embedcam import Explainer
from embedcam.index import Index
from embedcam.index.model import write_model
from embedcam.network import EmbeddingNetwork
from embedcam.pairs import PairExplainer
from embedcam.stores import Store, Table

QUERIES = 200
WIDTH = 8
TEXTS = [
    "a'b", "''", "'; DROP TABLE rows; --", '"id"', "a\\", "\\'", "%", "_", "$1", "?", "{}", "a;b",
    "\n\r\t", "\x01\x7f", "\u202e gnp", "\U0001f600", " ", "NULL", "1", "-- ", "/*", "é" * 9,
]  # fmt: skip
"""Ids, labels and paths that some language takes for its own; no NUL, which PostgreSQL refuses."""
FIELDS = (
    "cam", "signed_cam", "weights", "features", "neighbor_cams", "neighbor_norms", "marks", "ids",
    "labels", "paths", "explained",
)  # fmt: skip
COMPARED = ("distances", "similarities", "trust", "trust_low", "match")
"""These come of the distances, too, which in half precision are others."""


class Sample(NamedTuple):
    """An index of 48 pictures with all that is calibrated, its model, and its network."""

    index: Path
    model: Path
    network: EmbeddingNetwork


def sample(folder: Path) -> Sample:
    made_of = toy("affine")
    source = pictures(folder / "photos", n=48, classes=4)
    path = built(source, made_of, folder / "index")
    with Index.open(path) as index:
        model = write_model(index, folder / "model.embedcam")
    return Sample(path, model, made_of.network)


def queries(count: int = QUERIES) -> np.ndarray:
    """Inputs of the sample's network `[n 3 H W]`."""
    return np.random.default_rng(9).random((count, 3, SIDE, SIDE), np.float32)


def differing(found: Any, expected: Any, fields: Sequence[str] = FIELDS + COMPARED) -> list[str]:
    """Names of the attributes in which two answers differ by as little as a bit."""
    return [
        name for name in fields if not _same(getattr(found, name, None), getattr(expected, name))
    ]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected, equal_nan=True)
    return type(found) is type(expected) and found == expected


def check_answers(of: Sample, store: Store, *, exact: bool = True, count: int = QUERIES) -> None:
    """Hold what is explained of a store's rows beside what its index explains, query by query.

    Rows without their full precision, not `exact`, may come in another order where two are as near.
    """
    same = 0
    with Explainer(of.index, of.network) as whole, Explainer.from_model(of.model, of.network) as by:
        for query in queries(count):
            expected = whole.explain(query)
            rows = store.search(whole.network.embed(query[None])[0][0], 10)
            found = by.explain(query, rows=rows)
            if exact or found.ids == expected.ids:
                same += 1
                assert differing(found, expected, FIELDS if not exact else FIELDS + COMPARED) == []
            for name in COMPARED:
                values = getattr(found, name), getattr(expected, name)
                np.testing.assert_allclose(*values, rtol=0, atol=0 if exact else 2e-2)
        assert same >= count * 0.9
        held = by.with_rows(rows)
        receipts_of, ids = PairExplainer(held), set(held.index.ids)
        for name in found.ids:
            told = receipts_of.receipt(query, name).to_dict()
            expected = PairExplainer(whole).receipt(query, name).to_dict()
            # Rows show the exemplars that are among them.
            few, _ = (one.pop("channel_exemplars") for one in (told, expected))
            assert told == expected
            assert {one["id"] for some in few for one in some} <= ids


def table_of(embedding: str = "full", generation: str = "0" * 16, metric: str = "l2") -> Table:
    """A table of rows that are of no index, with 20 bytes of codes."""
    kinds = {"full": pa.float32(), "half": pa.float16()}
    vector = [("embedding", pa.list_(kinds[embedding], WIDTH))] if embedding != "none" else []
    texts = [(name, pa.string()) for name in ("label", "path", "generation")]
    fields = [("id", pa.string()), *vector, ("codes", pa.binary()), ("scale", pa.float32()), *texts]
    return Table(generation, WIDTH, metric, pa.schema(fields))


Row = Mapping[str, Any]


def batch_of(table: Table, rows: Sequence[Row]) -> pa.RecordBatch:
    """Rows as `row_batches` hands them out."""
    assert table.schema is not None
    columns = []
    for field in table.schema:
        values = [row[field.name] for row in rows]
        if field.name == "embedding":
            flat = np.array(values, field.type.value_type.to_pandas_dtype()).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), WIDTH))
        else:
            columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=table.schema)


def made_rows(count: int, start: int = 0, generation: str = "0" * 16) -> list[Row]:
    """Rows that depend on their number alone, in half precision as in full."""
    rows = []
    for number in range(start, start + count):
        rng = np.random.default_rng([5, number])
        vector = rng.standard_normal(WIDTH).astype(np.float16)
        rows.append(
            {
                "id": f"image {number:05d}",
                "embedding": vector.astype(float).tolist(),
                "codes": rng.bytes(20),
                "scale": float(np.float32(rng.random())) if number % 3 else None,
                "label": f"class {number % 4}" if number % 5 else None,
                "path": f"folder/{number}.jpg",
                "generation": generation,
            }
        )
    return rows


def any_rows(generation: str = "0" * 16, most: int = 6) -> st.SearchStrategy[list[Row]]:
    """Rows of any text and number that an index can hold, each id once."""
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    texts = st.sampled_from(TEXTS) | st.text(letters, min_size=1, max_size=20)
    row = st.fixed_dictionaries(
        {
            "id": texts,
            "embedding": st.lists(st.floats(-6e4, 6e4, width=16), min_size=WIDTH, max_size=WIDTH),
            "codes": st.binary(min_size=20, max_size=20),
            "scale": st.none() | st.floats(0, 2.0**99, width=32),
            "label": st.none() | texts | st.just(""),
            "path": texts,
            "generation": st.just(generation),
        }
    )
    return st.lists(row, min_size=1, max_size=most, unique_by=lambda one: one["id"])


def read_back(rows: Any) -> dict[str, Row]:
    """What a store returned by id, in plain values; codes that were base64 are bytes again."""
    if not isinstance(rows, list):
        rows = rows.to_pylist()
    kept = {}
    for row in rows:
        assert row["id"] not in kept, row["id"]
        row = {name: row.get(name) for name in table_of().schema.names}
        if isinstance(row["codes"], str):
            row["codes"] = base64.b64decode(row["codes"], validate=True)
        row["codes"] = bytes(row["codes"])
        if row["embedding"] is not None:
            row["embedding"] = [float(value) for value in row["embedding"]]
        kept[row["id"]] = row
    return kept


def expected_of(rows: Sequence[Row], embedding: str = "full") -> dict[str, Row]:
    """What has to come back of rows that were written."""
    vector = {} if embedding != "none" else {"embedding": None}
    return {row["id"]: {**row, **vector} for row in rows}
