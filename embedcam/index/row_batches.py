"""Rows of an index as Arrow record batches, for databases that keep the vectors themselves.

id          string
embedding   fixed-size list [D] of float32 or float16, or no such column
codes       binary, the numbers of all layers, coarse maps and the mark: see `codes_type`
scale       float32, what the first layer's codes are multiplied by; null where nothing is
label       string, null without one
path        string, where the picture lies
generation  string, 16 hexadecimal digits, see `model.generation_of`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._checks import one_of
from ..errors import InputError, reason, short
from .arrays import Column, forget
from .model import digest_of_part
from .rows import MARKS, Layer

if TYPE_CHECKING:
    import pyarrow as pa

    from .reader import Index

BATCH_ROWS = 4096
SCALE = "layer0.scales"
CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")
"""What a label must not hold: it is shown wherever a result is."""
EMBEDDINGS = {"full": "float32", "half": "float16", "none": None}


class RowBatch(NamedTuple):
    """Live rows of a `part`, whose rows before `upto` are in this batch or earlier ones."""

    part: str
    upto: int
    rows: pa.RecordBatch


def packed_columns(layers: Sequence[Layer], columns: dict[str, Column]) -> list[Column]:
    """Return the columns that `codes` hold, in their order."""
    packed: list[Column] = []
    for layer in layers:
        packed += [*layer.fields.values(), *(layer.coarse or ())]
    return [*(one for one in packed if one.stem != SCALE), columns[MARKS]]


def codes_type(columns: Sequence[Column]) -> np.dtype[np.void]:
    """Return the type of one image's `codes`: its columns one after the other, little-endian."""
    fields = [(one.stem, np.dtype(one.dtype).newbyteorder("<"), one.shape) for one in columns]
    return np.dtype(fields)


def schema(index: Index, embedding: str = "full") -> pa.Schema:
    """Return the columns of an index's rows, with embeddings in "full" or "half", or "none".

    Raises InputError for another word, embeddings in half precision where weights are made of
    them, or where pyarrow is missing.
    """
    pa = _arrow()
    precision = EMBEDDINGS[one_of("embedding", embedding, tuple(EMBEDDINGS))]
    if precision == "float16" and any(layer.encoding.uses_embedding for layer in index.layers):
        raise InputError(
            "this index makes weights of its embeddings, which in half precision are others; "
            'write them with embedding="full" (--embedding full)'
        )
    kinds = {"float32": pa.float32(), "float16": pa.float16()}
    vector = [("embedding", pa.list_(kinds[precision], index.width))] if precision else []
    text = pa.string()
    fields = [("id", text), *vector, ("codes", pa.binary()), ("scale", pa.float32())]
    fields += [("label", text), ("path", text), ("generation", text)]
    empty = {"scale", "label"}
    return pa.schema([pa.field(name, kind, nullable=name in empty) for name, kind in fields])


def row_batches(
    index: Index,
    embedding: str = "full",
    size: int = BATCH_ROWS,
    start: dict[str, int] | None = None,
) -> Iterator[RowBatch]:
    """Return the live rows in batches, part by part, each part from its row in `start` on."""
    columns = packed_columns(index.layers, index.columns)
    # Arrow counts the bytes of a batch's codes in 31 bits.
    size = min(size, (1 << 30) // codes_type(columns).itemsize)
    return _batches(index, schema(index, embedding), columns, size, start or {})


def _batches(
    index: Index, kind: pa.Schema, columns: Sequence[Column], size: int, start: dict[str, int]
) -> Iterator[RowBatch]:
    entries = zip(index.manifest.parts, index.starts.tolist(), index.parts, strict=False)
    for entry, first, mapped in entries:
        part = digest_of_part(entry.files)
        for row in range(start.get(part, 0), entry.count, size):
            upto = min(row + size, entry.count)
            positions = np.arange(first + row, first + upto)
            positions = positions[index.live(positions)]
            yield RowBatch(part, upto, _batch(index, kind, columns, positions))
            for array in mapped.arrays.values():  # all is read once
                forget(array)


def _batch(
    index: Index, kind: pa.Schema, columns: Sequence[Column], positions: np.ndarray
) -> pa.RecordBatch:
    pa, rows, count = _arrow(), index.select(positions), len(positions)
    packed = np.zeros(count, codes_type(columns))
    for column in columns:
        packed[column.stem] = rows.array(column)
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(packed.itemsize)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(packed)]
    scale = pa.nulls(count, pa.float32())
    if SCALE in index.columns:
        scale = pa.array(rows.array(index.columns[SCALE]))
    labels = rows.labels
    if (bad := next(filter(CONTROL.search, filter(None, set(labels))), None)) is not None:
        raise InputError(
            f"{index.path}: holds the label {short(bad)}, with control characters, which no row "
            "may have; name the class otherwise, and build the index again"
        )
    values = {
        "id": pa.array(rows.ids, pa.string()),
        "codes": pa.Array.from_buffers(pa.binary(), count, buffers),
        "scale": scale,
        "label": pa.array(labels, pa.string()),
        "path": pa.array(rows.paths, pa.string()),
        "generation": pa.repeat(pa.scalar(index.generation), count),
    }
    if "embedding" in kind.names:
        of = kind.field("embedding").type
        with np.errstate(over="ignore"):
            flat = rows.embeddings.astype(of.value_type.to_pandas_dtype(), copy=False).reshape(-1)
        if not np.isfinite(flat).all():
            raise InputError(
                f"{index.path}: holds embeddings beyond half precision (65,504); write them with "
                'embedding="full" (--embedding full)'
            )
        values["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=of)
    return pa.record_batch([values[name] for name in kind.names], schema=kind)


def removed_ids(index: Index, size: int = BATCH_ROWS) -> Iterator[list[str]]:
    """Yield ids of removed rows that no live row has, in batches."""
    for start in range(0, len(index.tombstones), size):
        ids = index.ids[index.tombstones[start : start + size].astype(np.int64)]
        known = index.find_live(ids)
        if unknown := [name for name in dict.fromkeys(ids) if name not in known]:
            yield unknown


def _arrow() -> ModuleType:
    try:
        return import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            f'rows are made by pyarrow ({reason(error)}); pip install "embedcam[parquet]"'
        ) from None
