"""Rows that a store returned, as an index in memory: searched, transferred, compared as any other.

A row is a mapping (a dictionary, a payload, a row of a cursor), and all of them may be an Arrow
table or record batch; the columns are those of `row_batches`. They come from elsewhere: nothing of
them is believed before it was looked at.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .._checks import LARGEST, whole
from ..errors import InputError, cut, short
from ..images.texts import LabelColumn, Texts
from .reader import Index, Positions
from .row_batches import CONTROL, SCALE, codes_type, packed_columns
from .rows import MARKS, Part
from .search import Neighbors, check_queries, rank


class _Listed(Texts):
    """Strings that are there already, a handful."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.offsets = list(strings), np.empty(len(strings) + 1, np.uint8)

    def raw(self, row: int) -> bytes:
        return self.strings[row].encode()

    def take(self, rows: np.ndarray) -> list[str]:
        return [self.strings[row] for row in rows.tolist()]

    def tolist(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.strings[start:stop]


class ArrowRows(Protocol):
    """An Arrow table or record batch."""

    num_rows: int
    schema: Any

    def column(self, name: str) -> Any: ...  # noqa: D102


Row = Mapping[str, Any]
Rows = Sequence[Row] | ArrowRows
Columns = Mapping[str, Sequence[Any]]
_READ = ("id", "embedding", "codes", "scale", "label", "path", "generation", "distance",
         "similarity")  # fmt: skip
MOST_ROWS = 10_000
"""For one query."""
MOST_TEXT = 4096
_ROUNDED = 1e-2
"""How far a store's distances, of half precision maybe, may be from what they are."""
_TEXT = f"expected a text of at most {MOST_TEXT:,} characters"
_AGAIN = "write the rows again with `embedcam rows INDEX --to ...`"
_TAKE = "take the model of the rows' generation, or leave these rows out of the search"


class RowsIndex(Index):
    """Rows of a model's generation, in the order given; made by `index_of_rows`.

    `distances` and `similarities` `[n]` are the store's own where rows came without embeddings.
    """

    is_whole, in_memory = False, True

    def __init__(
        self, model: Index, part: Part, compared: tuple[np.ndarray, np.ndarray] | None
    ) -> None:
        if isinstance(model, RowsIndex):
            raise InputError("these are rows already; give the model, or the index, they are of")
        vars(self).update(vars(model))
        self.faiss_file, self.tombstones = None, np.empty(0, np.uint64)
        self._compared, self.has_embeddings = compared, compared is None
        self._hold([part])

    @property
    def marked(self) -> bool:
        """Whether rows hold marks of the images' files, so that a replaced one is told."""
        return bool(self.parts[0].arrays[self.columns[MARKS].file].any())

    def search(
        self, queries: np.ndarray, n_neighbors: int, *, nprobe: int | None = None
    ) -> Neighbors:
        """Return the nearest rows of each query; see `Index.search`."""
        queries = check_queries(queries, self.width, self.normalized)
        return self.ranked(queries, whole("n_neighbors", n_neighbors, 1))

    def ranked(self, queries: np.ndarray, n_neighbors: int) -> Neighbors:
        """Return the nearest rows of queries `[B D]` float32, which were looked at before."""
        k, every = min(n_neighbors, self.n_rows), np.arange(self.n_rows)
        if self._compared is not None:
            distances, similarities = self._compared
            near = np.lexsort((every, distances if self.metric == "l2" else -similarities))[:k]
            values = near, distances[near], similarities[near]
            return Neighbors.of(*(np.tile(one, (len(queries), 1)) for one in values))
        vectors = self.parts[0].arrays[self.columns["embeddings"].file]
        if len(queries) > 1:
            vectors = np.broadcast_to(vectors, (len(queries), *vectors.shape))
            every = np.broadcast_to(every, vectors.shape[:2])
        shape = len(queries), self.n_rows
        return rank(queries, every.reshape(shape), vectors.reshape(*shape, -1), k, self.metric)

    def embeddings(self, positions: Positions) -> np.ndarray:
        """Return embeddings of rows, float32 `[n D]`, or raise InputError where none came."""
        if not self.has_embeddings:
            raise InputError(
                'the rows came without embeddings, which this needs; select them as "embedding"'
            )
        return super().embeddings(positions)

    def beside(self, positions: np.ndarray, embedding: np.ndarray) -> Neighbors:
        """Return rows beside a query `[D]`, in this order."""
        if self._compared is None:
            return super().beside(positions, embedding)
        return Neighbors.of(positions, *(values[positions] for values in self._compared))


def index_of_rows(model: Index, rows: Rows) -> RowsIndex:
    """Return an index of what a store returned, in its order, checked against its model.

    Raises
    ------
    InputError
        Too many rows, or the first that cannot be read, by its id and what is wrong with it.
    """
    columns = _columns(rows)
    ids = columns["id"]
    if not ids:
        raise InputError(
            f"no row came back of generation {model.generation}; write the index's rows to the "
            "store with `embedcam rows`, or ask for more"
        )
    for row, name in enumerate(ids):
        if not name or not _is_text(name):
            raise InputError(f"the row {row} of the store has the id {short(name)}; {_TEXT}")
    if len(set(ids)) < len(ids):
        twice = next(name for row, name in enumerate(ids) if name in ids[:row])
        raise _wrong(twice, "came back twice", "ask the store for each id once")
    _check_generations(model, columns)
    labels, paths = _texts(columns, "label", ids), _texts(columns, "path", ids)
    arrays = _numbers(model, columns, ids)
    embeddings = _embeddings(model, columns["embedding"], ids)
    compared = None
    if embeddings is None:
        if any(layer.encoding.uses_embedding for layer in model.layers):
            raise InputError(
                "the rows came without embeddings, of which this model makes the weights; select "
                'their column as "embedding", too'
            )
        compared = _compared(model, columns, ids)
    else:
        arrays[model.columns["embeddings"].file] = embeddings
    for column in model.columns.values():
        if column.wrong is None or column.file not in arrays:
            continue
        if (what := column.wrong(arrays[column.file])) is not None:
            number, _, said = what.removeprefix("row ").partition(" ")
            raise _wrong(ids[int(number)], f"is broken ({column.stem}: {said})", _AGAIN)
    named = LabelColumn.of(labels)
    strings = [_Listed(one) for one in (ids, [path or "" for path in paths], named.names)]
    order = np.array(sorted(range(len(ids)), key=lambda row: ids[row].encode()), np.int64)
    return RowsIndex(model, Part("", arrays, strings, named.codes, order), compared)


def listed(rows: Rows) -> list[Row]:
    """Return rows as a list of mappings, an Arrow table's too."""
    if isinstance(rows, Sequence):
        return list(rows)
    columns = _columns(rows)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Rows) -> Columns:
    """Return the columns that are read, each `[n]`; None where a row has nothing."""
    if not isinstance(rows, Sequence):
        if not hasattr(rows, "num_rows"):
            raise _no_rows(rows)
        if rows.num_rows > MOST_ROWS:
            raise _many()
        known = set(rows.schema.names)
        return {
            name: (
                [None] * rows.num_rows
                if name not in known
                else rows.column(name).to_numpy(zero_copy_only=False).tolist()
                if name == "embedding"
                else rows.column(name).to_pylist()
            )
            for name in _READ
        }
    if isinstance(rows, str | bytes):
        raise _no_rows(rows)
    if len(rows) > MOST_ROWS:
        raise _many()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(
                f"the row {number} is a {type(row).__name__}; expected a mapping with 'id', "
                "'codes' and 'generation' (psycopg: row_factory=dict_row)"
            )
    return {name: [row.get(name) for row in rows] for name in _READ}


def _check_generations(model: Index, columns: Columns) -> None:
    for name, said in zip(columns["id"], columns["generation"], strict=True):
        if said != model.generation:
            of = "no generation" if said is None else f"the generation {short(said)}"
            raise _wrong(name, f"has {of}, and {model.path} reads {model.generation!r}", _TAKE)


def _texts(columns: Columns, column: str, ids: Sequence[str]) -> list[str | None]:
    values = list(columns[column])
    for name, value in zip(ids, values, strict=True):
        if value is not None and not _is_text(value):
            raise _wrong(name, f"has the {column} {short(value)}", _TEXT)
        if column == "label" and value is not None and CONTROL.search(value):
            said = f"has the label {short(value)}, with control characters"
            raise _wrong(name, said, "name the class otherwise")
    return values


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        return False
    return value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value)


def _numbers(model: Index, columns: Columns, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what `codes` and `scale` hold, by the names that files would have."""
    packed = packed_columns(model.layers, model.columns)
    kind = codes_type(packed)
    pieces = []
    for name, codes in zip(ids, columns["codes"], strict=True):
        content = _bytes_of(name, codes)
        if len(content) != kind.itemsize:
            said = (
                f"has {len(content):,} bytes of codes, where its generation has {kind.itemsize:,}"
            )
            raise _wrong(name, said, _AGAIN)
        pieces.append(content)
    unpacked = np.frombuffer(b"".join(pieces), kind)
    arrays = {column.file: unpacked[column.stem] for column in packed}
    if SCALE in model.columns:
        scales = np.empty(len(ids), np.float32)
        for row, (name, value) in enumerate(zip(ids, columns["scale"], strict=True)):
            scales[row] = _number(name, "scale", value)
        arrays[model.columns[SCALE].file] = scales
    return arrays


def _bytes_of(name: str, codes: object) -> bytes:
    if isinstance(codes, str):
        try:
            return base64.b64decode(codes, validate=True)
        except (binascii.Error, ValueError):
            raise _wrong(name, "has codes that are no base64", _AGAIN) from None
    if isinstance(codes, bytes | bytearray | memoryview):
        return bytes(codes)
    said = "has no codes" if codes is None else f"has codes of type {type(codes).__name__}"
    advice = "expected bytes, or base64 as text; rows of images that the index does not hold have"
    raise _wrong(name, said, f"{advice} none: `embedcam add`, then `embedcam rows`")


def _embeddings(model: Index, values: Sequence[Any], ids: Sequence[str]) -> np.ndarray | None:
    """Return embeddings float32 `[n D]`; None where no row has one."""
    if all(value is None for value in values):
        return None
    vectors = np.empty((len(values), model.width), np.float32)
    for row, (name, value) in enumerate(zip(ids, values, strict=True)):
        try:
            # As text pgvector has it, to a program that does not know its type.
            vector = np.asarray(json.loads(value) if isinstance(value, str) else value)
            if vector.shape == (model.width,) and vector.dtype.kind in "fiu":
                vectors[row] = vector
                continue
            said = f"has an embedding of shape {list(vector.shape)} and type {vector.dtype}"
        except (ValueError, TypeError):
            said = f"has the embedding {short(value)}"
        raise _wrong(name, said, f"expected {model.width} numbers")
    return vectors


def _compared(model: Index, columns: Columns, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distances and similarities `[n]`, as the store said them."""
    values = {}
    for column in ("distance", "similarity"):
        if any(value is not None for value in columns[column]):
            pairs = zip(ids, columns[column], strict=True)
            values[column] = np.array([_number(name, column, value) for name, value in pairs])
    if not values:
        raise InputError(
            "the rows came without embeddings, and without distances; select the vector as "
            '"embedding", or the squared Euclidean distance as "distance"'
        )
    if model.normalized and len(values) == 1:  # |a - b|^2 = 2 - 2 a.b
        for column, other in (("distance", "similarity"), ("similarity", "distance")):
            if column in values:
                twice = values[column]
                values[other] = 1 - twice / 2 if column == "distance" else 2 - 2 * twice
                break
    if len(values) < 2:
        raise InputError(
            "the rows came without embeddings, which are not of unit length here; select both "
            '"distance" (squared Euclidean) and "similarity" (inner product), or the embeddings'
        )
    distances, similarities = values["distance"], values["similarity"]
    wrong = distances < -_ROUNDED
    if model.normalized:
        wrong |= (distances > 4 + _ROUNDED) | (abs(distances + 2 * similarities - 2) > _ROUNDED)
    if wrong.any():
        row = int(wrong.argmax())
        said = f"has the distance {distances[row]:.6g} and the similarity {similarities[row]:.6g}"
        advice = (
            'expected the squared Euclidean distance and the inner product; select the vector as "'
            'embedding", and neither is needed'
        )
        raise _wrong(ids[row], said, advice)
    # A store's rounding leaves the nearest below nothing.
    return np.maximum(distances, 0), similarities


def _number(name: str, column: str, value: object) -> float:
    if isinstance(value, int | float | np.number) and abs(value) <= LARGEST:  # type: ignore[operator]
        return float(value)
    raise _wrong(name, f"has the {column} {short(value)}", "expected a finite number")


def _wrong(name: str, what: str, advice: str) -> InputError:
    return InputError(f"the row {cut(name, 100)!r} of the store {what}; {advice}")


def _no_rows(rows: object) -> InputError:
    return InputError(
        f"rows are {short(rows)}; expected a list of rows, each a mapping, or an Arrow table"
    )


def _many() -> InputError:
    return InputError(
        f"more than {MOST_ROWS:,} rows for one query; give those of its nearest images, a LIMIT "
        "of some tens"
    )
