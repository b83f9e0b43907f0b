"""Pictures in tables: Parquet, Arrow and Feather files, and Lance data sets, a row read alone.

A table has a column of pictures (bytes, or Hugging Face's `{bytes, path}`) or of paths or addresses
of pictures; see `COLUMNS` for the names that are looked for. `status` of img2dataset leaves out
rows that it could not fetch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final, Literal, NamedTuple

from .._files import ProcessLock
from ..errors import ImageError, InputError, cut, ran_out, reason, short
from .places import MAX_BYTES, stamp_of
from .reading import is_url
from .remote import filesystem

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ENDINGS: Final = (".parquet", ".arrow", ".feather", ".lance")
_BYTES: Final = (
    "image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes",
)  # fmt: skip
_PATHS: Final = (
    "image_path", "path", "file_path", "filepath", "file_name", "filename", "image", "url",
    "image_url", "img_url",
)  # fmt: skip
_IDS: Final = ("id", "key", "__key__", "image_id", "uid")
_LABELS: Final = ("label", "labels", "class", "cls", "fine_label")
COLUMNS: Final = {"picture": _BYTES, "path": _PATHS, "id": _IDS, "label": _LABELS}
"""Names of columns by what they are, whatever their case; the first there is of a fitting type."""
_RUN: Final = 1 << 10
_CELLS: Final = 64
"""Rows read at once for the cell of one."""
_AT_ONCE: Final = 8 << 20
_OPEN: Final = 8
"""Tables kept open."""


class Row(NamedTuple):
    """What a row says of its picture: its path is "" where it lies in the row itself.

    The id is "" of a row that has neither an id nor a picture.
    """

    number: int
    id: str
    path: str
    label: str | None


class Table:
    """An open table: its columns by what they are, and its pictures a row at a time."""

    def __init__(
        self,
        name: str,
        schema: pa.Schema,
        scan: Callable[[list[str]], Iterator[pa.RecordBatch]],
        starts: Sequence[int],
        cells: Callable[[int, str], Iterator[pa.Array]],
    ) -> None:
        """Take the rows that groups of rows begin with, the end last, and what reads a group."""
        self.name, self._schema, self._scan = name, schema, scan
        self._starts, self._cells = starts, cells
        self.picture = self._column(_BYTES, _is_picture)
        self.path = None if self.picture else self._column(_PATHS, _is_text)
        self.id, self.label = (self._column(one, _is_plain) for one in (_IDS, _LABELS))
        if not self.picture and not self.path:
            columns = cut(", ".join(schema.names), 120)
            raise InputError(
                f"{name}: has the columns {columns}; one has to hold pictures (bytes, called "
                f"{_BYTES[0]}) or where they lie (called {_PATHS[0]}, path or url)"
            )
        self._lock = threading.Lock()
        self._group, self._next, self._rest = -1, 0, iter(())
        self._kept: list[tuple[int, pa.Array]] = []

    def _column(self, names: Iterable[str], fits: Callable[[pa.DataType], bool]) -> str | None:
        known = {name.lower(): name for name in reversed(self._schema.names)}
        there = (known[name] for name in names if name in known)
        return next((name for name in there if fits(self._schema.field(name).type)), None)

    def rows(self, *, labelled: bool = True) -> Iterator[Row]:
        """Yield the rows with a picture; one without an id has the digest of its picture's."""
        status = next((n for n in self._schema.names if n == "status"), None)
        status = status if status and _is_text(self._schema.field(status).type) else None
        label = self.label if labelled else None
        hashed = self.picture is not None and self.id is None
        wanted = {self.id, self.path, label, status, self.picture if hashed else None}
        names, number = self._class_names(label), 0
        columns = sorted(filter(None, wanted))
        with _in_words(self.name):
            for batch in self._scan(columns):
                held = {name: batch.column(name) for name in columns}
                texts = {n: a.to_pylist() for n, a in held.items() if n != self.picture}
                for place in range(batch.num_rows):
                    if status is None or texts[status][place] in (None, "success"):
                        yield self._row(number, place, texts, held, label, names)
                    number += 1

    def _row(
        self,
        number: int,
        place: int,
        texts: dict[str, list[object]],
        held: dict[str, pa.Array],
        label: str | None,
        names: Sequence[str] | None,
    ) -> Row:
        where = f"{self.name}, row {number}"
        path = "" if self.path is None else _text_of(texts[self.path][place], where, "path")
        if self.path is not None and not path:
            raise InputError(f"{where}: the {self.path} is empty; leave such rows out")
        if self.id is not None:
            id = _text_of(texts[self.id][place], where, "id")
            if not id:
                raise InputError(f"{where}: the {self.id} is empty; fill it, or drop the column")
        elif self.picture is None:
            id = path
        else:
            data = _bytes_of(held[self.picture][place])
            id = hashlib.blake2b(data, digest_size=16).hexdigest() if data else ""
        of = None if label is None else _label_of(texts[label][place], names, where)
        return Row(number, id, path, of)

    def _class_names(self, label: str | None) -> Sequence[str] | None:
        """Return the names that Hugging Face's metadata give to numbers."""
        if label is None:
            return None
        try:
            about = json.loads((self._schema.metadata or {}).get(b"huggingface", b"{}"))
            names = about["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        fits = isinstance(names, list) and all(isinstance(one, str) for one in names)
        return names if fits else None

    def cell(self, row: int) -> bytes:
        """Return the bytes of a row's picture, or raise ImageError.

        Rows that follow each other cost one pass: the last runs of rows are kept.
        """
        if self.picture is None:
            raise ImageError("its table holds no pictures now; list its images again")
        if not 0 <= row < self._starts[-1]:
            raise ImageError(f"its table has {self._starts[-1]:,} rows now; list its images again")
        with self._lock, _in_words(self.name):
            array, place = self._find(row)
            data = _bytes_of(array[place])
        if not data:
            raise ImageError("the row holds no picture")
        if len(data) > MAX_BYTES:
            raise ImageError(
                f"has {len(data):,} bytes, and of one picture at most {MAX_BYTES:,} are read"
            )
        return data

    def _find(self, row: int) -> tuple[pa.Array, int]:
        for first, array in self._kept:
            if first <= row < first + len(array):
                return array, row - first
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._next:
            self._group, self._next = group, self._starts[group]
            self._rest = self._cells(group, self.picture or "")
        for array in self._rest:
            first, self._next = self._next, self._next + len(array)
            if row < self._next:
                self._kept = [*self._kept[-1:], (first, array)]
                return array, row - first
        self._group, self._kept = -1, []
        raise ImageError("its table has fewer rows than it says; it is broken")


def cell(file: str, row: int) -> bytes:
    """Return the bytes of the picture in a row of a table; tables stay open for the next."""
    return _kept_open(file).cell(row)


_tables: OrderedDict[tuple[str, str], Table] = OrderedDict()
_guard = ProcessLock()


def _kept_open(file: str) -> Table:
    # What lies elsewhere is not asked at each row whether it is another file now.
    stamp = str(time.monotonic() // 60) if is_url(file) else stamp_of(file)
    key = file, f"{os.getpid()} {stamp}"  # a forked child opens its own, and finds no lock taken
    with _guard:
        table = _tables.get(key) or open_table(file)
        _tables[key] = table
        _tables.move_to_end(key)
        while len(_tables) > _OPEN:
            _tables.popitem(last=False)
        return table


def open_table(file: str) -> Table:
    """Open a table that lies at a path or an address."""
    ending = os.path.splitext(file)[1].lower()
    with _in_words(file):
        if ending == ".lance":
            return _lance(file)
        if ending == ".parquet":
            return _parquet(file)
        return _arrow(file)


def _source(file: str) -> str | IO[bytes]:
    """Return what pyarrow opens: a regular file's path, or an open file."""
    if is_url(file):
        system, path = filesystem(file)
        stream: IO[bytes] = system.open(path, "rb")
        return stream
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a named pipe would wait for ever
        raise InputError(f"{file}: is no regular file")
    return file


def _parquet(file: str) -> Table:
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(_source(file), pre_buffer=False, buffer_size=1 << 20)
    about = opened.metadata
    starts = [0]
    for group in range(about.num_row_groups):
        starts.append(starts[-1] + about.row_group(group).num_rows)

    def scan(columns: list[str]) -> Iterator[pa.RecordBatch]:
        if columns:
            yield from opened.iter_batches(_RUN, columns=columns, use_threads=False)

    def cells(group: int, column: str) -> Iterator[pa.Array]:
        rows = _rows_at_once(about, group, column)
        batches = opened.iter_batches(rows, [group], [column], use_threads=False)
        return (batch.column(0) for batch in batches)

    return Table(file, opened.schema_arrow, scan, starts, cells)


def _rows_at_once(about: pq.FileMetaData, group: int, column: str) -> int:
    """Return how many rows to read at once, by what their group says it takes."""
    of = about.row_group(group)
    chunks = [of.column(place) for place in range(of.num_columns)]
    mine = [one for one in chunks if one.path_in_schema.split(".")[0] == column]
    each = int(sum(one.total_uncompressed_size for one in mine)) // max(int(of.num_rows), 1)
    return min(_CELLS, max(1, _AT_ONCE // max(each, 1)))


def _arrow(file: str) -> Table:
    import pyarrow as pa

    source = _source(file)
    stream = pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, "r")
    try:
        batches = pa.ipc.open_file(stream)
        n_batches, get, schema = batches.num_record_batches, batches.get_batch, batches.schema
    except pa.ArrowInvalid:  # as a stream, which Hugging Face's cache holds
        stream.seek(0)
        whole = pa.ipc.open_stream(stream)
        held, schema = list(whole), whole.schema
        n_batches, get = len(held), held.__getitem__
    starts = [0]
    for number in range(n_batches):
        starts.append(starts[-1] + get(number).num_rows)

    def scan(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for number in range(n_batches):
            batch = get(number).select(columns)
            batch.validate(full=True)  # offsets that a stranger wrote may lead anywhere
            yield batch

    def cells(group: int, column: str) -> Iterator[pa.Array]:
        array = get(group).column(column)
        array.validate(full=True)
        return iter([array])

    return Table(file, schema, scan, starts, cells)


def _lance(file: str) -> Table:
    import lance

    opened = lance.dataset(file)

    def scan(columns: list[str]) -> Iterator[pa.RecordBatch]:
        return iter(opened.to_batches(columns=columns, batch_size=_RUN))

    n_rows = opened.count_rows()

    def cells(group: int, column: str) -> Iterator[pa.Array]:
        taken = opened.take([group], columns=[column]).column(column)
        return iter([taken.combine_chunks()])

    # Each row is a group of its own: it is taken by its number.
    return Table(file, opened.schema, scan, range(n_rows + 1), cells)


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """Tell what pyarrow or Lance raise in one sentence."""
    try:
        yield
    except (InputError, FileNotFoundError, PermissionError):
        raise
    except ImportError as error:
        extra = "lance" if name.lower().endswith(".lance") else "parquet"
        raise InputError(
            f'{cut(name, 200)}: is read by {reason(error)}; pip install "embedcam[{extra}]"'
        ) from None
    except Exception as error:
        if ran_out(error):
            raise
        raise InputError(
            f"{cut(name, 200)}: cannot be read as a table ({reason(error)})"
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_picture(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_binary(kind.field(place).type)
    return _is_binary(kind)


def _is_plain(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _bytes_of(value: pa.Scalar) -> bytes | None:
    held = value.as_py()
    if isinstance(held, dict):
        held = held.get("bytes")
    return held if isinstance(held, bytes) else None


def _text_of(value: object, where: str, what: Literal["id", "path"]) -> str:
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    raise InputError(f"{where}: the {what} is {short(value)}, no text and no whole number")


def _label_of(value: object, names: Sequence[str] | None, where: str) -> str | None:
    if isinstance(value, float) and math.isnan(value):
        return None
    if names is None or not isinstance(value, int):
        return None if value is None else str(value) or None
    if value == -1:
        return None
    if not 0 <= value < len(names):
        raise InputError(f"{where}: the label is {value}, and {len(names)} classes are named")
    return names[value]
