"""An index opened for reading: everything mapped, nothing read until it is asked for."""

import os
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from .._checks import whole
from ..errors import IndexFormatError, InputError
from . import manifest as manifest_file
from . import search as searching
from .arrays import Column, broken
from .encoding import Encoding
from .faiss_files import REBUILD, FaissFile
from .identity import Identity
from .manifest import Manifest
from .rows import (
    MARKS,
    STRINGS,
    Layer,
    Part,
    columns_of,
    fitted_of,
    make_layers,
    map_fitted,
    map_tombstones,
)
from .search import Neighbors

REMOVED = "is not in the index any more: it was removed"
"""How the message of a removed id goes on."""
_NEAR, _FEW, _COMPARED, _DEEP = 8, 100_000, 1000, 32
_RUN, _HANDFUL = 1 << 16, 100
T_co = TypeVar("T_co", covariant=True)
Positions = np.ndarray | Sequence[int]


class Index:
    """An index on disk, opened by `Index.open(path)`; a context manager.

    It keeps what it opened: later changes by a writer are seen by opening again. Any number of
    threads may use one. In a child forked from the process that opened it, FAISS uses one thread,
    because those of the parent are not there; it is not pickled, open its path in each process.

    Attributes
    ----------
    path : the directory.
    manifest : what the index is, typed; `to_dict()` returns it as JSON has it.
    n_rows : rows, removed ones included; `len(index)` counts live ones.
    width : D of the embeddings.
    normalized : whether embeddings have unit length.
    metric : "l2" or "ip".
    ids, labels, paths : sequences over positions, decoded on demand.
    with_faiss, n_threads : as given to `open`.
    starts : position of each part's first row, and behind the last `n_rows`.
    tombstones : positions of removed rows, uint64, rising.
    """

    def __init__(
        self, path: Path, manifest: Manifest, with_faiss: bool, n_threads: int | None = None
    ) -> None:
        self.path, self.manifest = path, manifest
        self.n_rows, self.metric = manifest.counts.rows, manifest.metric
        self.width, self.normalized = manifest.embedding.width, manifest.embedding.normalized
        self.with_faiss, self.n_threads, self.process = with_faiss, n_threads, os.getpid()
        self.fitted_files = map_fitted(path, manifest)
        self._shared = fitted_of(self.fitted_files, None)
        fitted = [fitted_of(self.fitted_files, n) for n in range(len(manifest.layers))]
        self.layers = make_layers(path, manifest.layers, fitted, self.width)
        self.columns = columns_of(self.width, self.normalized, self.layers)
        self._rows = _Rows(path, manifest, self.layers, self.columns)
        self.starts = self._rows.starts
        self.tombstones = map_tombstones(path, manifest)
        self.ids: Strings[str] = Strings(self._rows, "ids")
        self.paths: Strings[str] = Strings(self._rows, "paths")
        self.labels: Strings[str | None] = Strings(self._rows, "labels")
        used = with_faiss and manifest.faiss is not None
        self.faiss_file = FaissFile(path, manifest) if used else None

    @classmethod
    def open(
        cls, path: str | Path, *, with_faiss: bool = True, n_threads: int | None = None
    ) -> "Index":
        """Open an index for reading.

        Parameters
        ----------
        path : its directory.
        with_faiss : False leaves the FAISS file alone; `search` then compares with every row.
        n_threads : OpenMP threads of a search for several queries, which may take as many again in
            each thread that searches; None leaves it to OpenMP. A single query takes one.

        Raises
        ------
        IndexFormatError
            No index, an unfinished one, or a broken file, which is named. Sizes, the manifest and
            the removed positions are checked here; checksums are `verify`'s.
        InputError
            An impossible number of threads.
        """
        root = Path(path)
        if n_threads is not None:
            n_threads = whole("n_threads", n_threads, 1)
        while True:
            place, manifest = os.path.realpath(root), manifest_file.read(root)
            try:
                opened = cls(root, manifest, with_faiss, n_threads)
            except (FileNotFoundError, IndexFormatError) as error:
                # A writer may have swept this generation between our two steps.
                if not _still(root, place, manifest):
                    continue
                if not isinstance(error, FileNotFoundError):
                    raise
                name = os.path.relpath(error.filename or root, root)
                derived = manifest.faiss is not None and name == manifest.faiss.file
                raise broken(root, name, "is missing", *([REBUILD] if derived else [])) from None
            # The link may have been led elsewhere meanwhile, and other files been opened there.
            if os.path.realpath(root) == place:
                return opened
            opened.close()

    def __len__(self) -> int:
        return self.n_rows - len(self.tombstones)

    def __repr__(self) -> str:
        return f"<Index {str(self.path)!r}: {len(self)} images, D = {self.width}>"

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise InputError(
            f"{self.path}: an open index is not pickled, for its files are mapped into this "
            "process; open it in each process with Index.open(path)"
        )

    def close(self) -> None:
        """Let go of files; arrays handed out before stay valid."""
        if self.faiss_file is not None:
            self.faiss_file.close()
        self._rows.close()

    def load(self) -> None:
        """Load the FAISS file now instead of with the first search; nothing without one."""
        if self.faiss_file is not None:
            self.faiss_file.loaded()

    # Rows

    def select(self, positions: Positions) -> "Selection":
        """Return some rows, to be fetched field by field; the cheapest way to several fields."""
        return Selection(self._rows, check_positions(positions, self.n_rows))

    def fetch(self, positions: Positions, first: int | None = None) -> "Stored":
        """Return all that is kept of the `first` rows (None: of all) but embeddings; all labels."""
        every = self.select(positions)
        ids, paths, labels = every.texts(*STRINGS)
        rows = every if first is None else Selection(self._rows, every.positions[:first])
        fields = [rows.fields(number) for number in range(len(self.layers))]
        return Stored(ids[:first], paths[:first], labels, rows.coarse(), rows.marks, fields)

    def embeddings(self, positions: Positions) -> np.ndarray:
        """Return stored embeddings of rows, float32 `[n D]`."""
        return self.select(positions).embeddings

    def triplets_used(self, positions: Positions) -> np.ndarray:
        """Return how many triplets gave evidence for each row's weights, uint32 `[n]`."""
        return self.select(positions).triplets_used

    @property
    def parts(self) -> list[Part]:
        """The mapped parts, in the order of their rows."""
        return self._rows.parts

    @property
    def marked(self) -> bool:
        """Whether it holds marks of the images' files, so that a replaced one is told."""
        return any(self.columns[MARKS].file in part.arrays for part in self.parts)

    def encoding(self, layer: int = 0) -> Encoding:
        """Return how a layer's weights are kept."""
        return self._layer(layer).encoding

    def fitted(self, name: str) -> np.ndarray:
        """Return an array kept once for the whole index, such as "embedding_mean".

        What belongs to a layer's encoding is `encoding(layer).fitted`.
        """
        if name not in self._shared:
            known = ", ".join(sorted(self._shared)) or "none"
            raise InputError(f"the index keeps no array {name!r}; it keeps: {known}")
        return self._shared[name]

    def shared(self) -> dict[str, np.ndarray]:
        """Return the arrays kept once for the whole index, by name."""
        return dict(self._shared)

    def probe(self) -> dict[str, np.ndarray]:
        """Return the arrays of the network's probe, by name ("probe_...")."""
        return {n: a for n, a in self._shared.items() if n.startswith("probe_")}

    @property
    def identity(self) -> Identity | None:
        """The network that it was built with; None of an index made of features alone."""
        described = self.manifest.raw["network"]
        return None if described is None else Identity.from_dict(described, self.probe())

    def rows(self, positions: Positions, layer: int = 0) -> dict[str, np.ndarray]:
        """Return what the layer's encoding decodes, with "embedding" where it uses that."""
        self._layer(layer)
        return self.select(positions).fields(layer)

    def weights(self, positions: Positions, layer: int = 0) -> np.ndarray:
        """Return decoded channel weights of rows, float32 `[n K]`, or by position `[n K H W]`."""
        return self.encoding(layer).decode(self.rows(positions, layer))

    def coarse(self, positions: Positions, layer: int = 0) -> np.ndarray | None:
        """Return coarse maps of rows, float32 `[n h w]`, or None where none are stored."""
        self._layer(layer)
        return self.select(positions).coarse(layer)

    def live(self, positions: Positions) -> np.ndarray:
        """Return which rows have not been removed, bool `[n]`."""
        rows = check_positions(positions, self.n_rows)
        if not len(self.tombstones):
            return np.ones(rows.shape, bool)
        # One type on both sides: uint64 against int64 would compare as float64.
        removed = self.tombstones.view("<i8")
        at = np.minimum(np.searchsorted(removed, rows), len(removed) - 1)
        return np.asarray(removed[at] != rows)

    def live_positions(self) -> np.ndarray:
        """Return positions of all live rows, int64 `[len(index)]`."""
        kept = np.ones(self.n_rows, bool)
        kept[np.asarray(self.tombstones, np.int64)] = False
        return np.flatnonzero(kept)

    def refuse_prototypes(self, instead: str) -> None:
        """Refuse what needs the images themselves where rows are merged from several.

        `instead` says what to do, as the end of a sentence.
        """
        if self.manifest.is_compressed:
            raise InputError(
                f"{self.path}: holds prototypes, each merged from several images; {instead}"
            )

    # Ids

    def position(self, id: str) -> int:
        """Return the position of an image; unknown ids are told the nearest known ones."""
        rows = self._find(id)
        if not rows:
            near = self._near(id)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `index.ids`"
            raise InputError(f"the index has no image {id!r}; {hint}")
        for row in rows:
            if self.live([row])[0]:
                return row
        raise InputError(f"the image {id!r} {REMOVED}; add it again first")

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Return positions of many images, int64 `[n]`; errors as `position`."""
        if isinstance(ids, str):
            raise InputError(f"expected a list of ids, got the string {ids!r}; use position()")
        if len(ids) * 16 < self.n_rows:
            return np.array([self.position(i) for i in ids], np.int64)
        # Many ids: one pass over all rows is cheaper than a bisection each.
        known = self.find_live(ids)
        return np.array([known[i] if i in known else self.position(i) for i in ids], np.int64)

    def find_live(self, ids: Sequence[str]) -> dict[str, int]:
        """Return positions of those of the ids that the index holds live; others are left out."""
        wanted = set(ids)
        live: dict[str, int] = {}
        if len(wanted) * 16 < self.n_rows:
            rows = {row: text for text in wanted for row in self._find(text)}
            return {text: row for row, text in rows.items() if self.live([row])[0]}
        for part, start in zip(self.parts, self.starts.tolist(), strict=False):
            for first in range(0, part.count, _RUN):
                stop = min(first + _RUN, part.count)
                alive = self.live(np.arange(start + first, start + stop))
                for row, text in enumerate(part.ids.tolist(first, stop)):
                    if text in wanted and alive[row]:
                        live[text] = start + first + row
        return live

    # Search

    def search(
        self, queries: np.ndarray, n_neighbors: int, *, nprobe: int | None = None
    ) -> Neighbors:
        """Find the nearest live images of each query.

        FAISS (or, opened without it, brute force) finds candidates; the distances and similarities
        returned are exact, computed from the stored embeddings, and decide the order.

        Parameters
        ----------
        queries : `[B D]`, of unit length where the index is normalized.
        n_neighbors : k; where fewer images are live, all of them come back.
        nprobe : IVF lists to visit, all where there are fewer; None takes the manifest's.

        Raises
        ------
        InputError
            Wrong shape, NaN, too large numbers, a vector that is not of unit length where the index
            is normalized, no FAISS in this index, no image left, or an impossible `nprobe`.
        IndexFormatError
            The FAISS file is broken.
        """
        return searching.search(self, queries, n_neighbors, nprobe)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Check every promise of the format, and return those that were checked.

        The first one that does not hold is an `IndexFormatError`; see `embedcam.index.verify`.
        """
        from .verify import verify_open

        return verify_open(self, progress=progress).checks

    # Inside

    def _layer(self, number: int) -> Layer:
        if not 0 <= number < len(self.layers):
            raise InputError(f"layer {number} of an index of {len(self.layers)} layers")
        return self.layers[number]

    def _find(self, id: str) -> list[int]:
        if not isinstance(id, str):
            raise InputError(f"an id is a string; got {id!r}")
        key = id.encode("utf-8", "replace")
        return [
            int(start) + row
            for part, start in zip(self.parts, self.starts, strict=False)
            for row in part.find(key)
        ]

    def _near(self, id: str) -> list[str]:
        """Return known ids close to a misspelt one, among those around it and its beginning."""
        ends = self._ending(id)
        if ends and id.endswith(f"/{ends[0]}"):
            return ends[:1]
        keys = [key.encode("utf-8", "replace") for key in (id, id[: max(1, len(id) // 2)])]
        pool = {near for part in self.parts for key in keys for near in part.ids_around(key, _NEAR)}
        near = ends + get_close_matches(id, sorted(pool), 8, 0.4)
        return [text for text in dict.fromkeys(near) if text in self.find_live(near)][:3]

    def _ending(self, id: str) -> list[str]:
        """Return ids that end as this one, in its own last folders or, in small sets, in others."""
        names = id.split("/")
        shorter = ["/".join(names[start:]) for start in range(1, min(len(names), _DEEP))]
        live = self.find_live(shorter)
        if live:
            return [next(text for text in shorter if text in live)]
        if self.n_rows > _FEW:
            return []
        every = (text for part in self.parts for text in part.ids.tolist(0, part.count))
        common = [(_common_end(text.split("/"), names), text) for text in every]
        most = max((count for count, _ in common), default=0)
        ends = [text for count, text in common if count == most > 0]
        return get_close_matches(id, ends[:_COMPARED], 3, 0)


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _still(root: Path, place: str, manifest: Manifest) -> bool:
    """Return whether the same version lies at the same place."""
    now = manifest_file.read(root).manifest_sha256
    return os.path.realpath(root) == place and now == manifest.manifest_sha256


class Stored(NamedTuple):
    """What an index keeps of rows, fetched at once by `Index.fetch`.

    Coarse `maps` float32 `[n h w]` (None: none are stored), `marks` uint32 `[n 4]` (zeros: none was
    taken), and of each layer the `fields` that its encoding decodes.
    """

    ids: list[str]
    paths: list[str]
    labels: list[str | None]
    maps: np.ndarray | None
    marks: np.ndarray
    fields: list[dict[str, np.ndarray]]


def check_positions(positions: object, total: int) -> np.ndarray:
    """Return positions as int64 `[n]`, refused unless whole numbers of an index of `total` rows."""
    rows = np.asarray(positions)
    if rows.size == 0:
        return np.empty(0, np.int64)
    if rows.ndim == 1 and rows.dtype == np.int64 and len(rows) <= _HANDFUL:
        # A query's handful: Python compares it sooner than NumPy's reductions are set up.
        few = rows.tolist()
        if min(few) >= 0 and max(few) < total:
            return rows
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise InputError(
            f"positions of shape {list(rows.shape)} and type {rows.dtype}; expected whole "
            "numbers [n]"
        )
    if rows.min() < 0 or rows.max() >= total:
        bad = rows[(rows < 0) | (rows >= total)][0]
        raise InputError(f"position {bad} is outside the index, which has rows 0 to {total - 1}")
    return rows.astype(np.int64)


class _Rows:
    """The mapped parts of an open index, in the order of their rows, until they are closed.

    Apart from `Index`, so that `index.ids` and the others refer to this and not to the index: an
    index that nobody holds any more is then let go at once, not when garbage is collected.
    """

    def __init__(
        self, root: Path, manifest: Manifest, layers: list[Layer], columns: dict[str, Column]
    ) -> None:
        self.root, self.layers, self.columns = root, layers, columns
        self._parts: list[Part] | None = [Part(root, part, columns) for part in manifest.parts]
        self.starts = np.cumsum([0, *(part.count for part in self._parts)])

    @property
    def parts(self) -> list[Part]:
        parts = self._parts
        if parts is None:
            raise InputError(f"{self.root}: the index is closed; open it again")
        return parts

    def close(self) -> None:
        self._parts = None

    def pieces(self, positions: np.ndarray) -> "list[tuple[Part, np.ndarray | slice, np.ndarray]]":
        """Return parts, the places among `positions` that lie in each, and their rows there."""
        parts = self.parts
        if len(positions) == 0:
            return []
        if len(parts) == 1:
            return [(parts[0], slice(None), positions)]
        home = np.searchsorted(self.starts, positions, side="right") - 1
        return [
            (parts[number], where, positions[where] - self.starts[number])
            for number in np.unique(home).tolist()
            for where in [np.flatnonzero(home == number)]
        ]


class Selection:
    """Rows of an index in the order they were asked for; made by `Index.select`.

    They are found in their parts once, then fetched field by field, also of a closed index.
    """

    def __init__(self, rows: _Rows, positions: np.ndarray) -> None:
        self.positions, self._rows = positions, rows
        self._pieces = rows.pieces(positions)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def ids(self) -> list[str]:
        """Stable ids, `[n]`."""
        return self.texts("ids")[0]

    @property
    def paths(self) -> list[str]:
        """Where the images were read, `[n]`."""
        return self.texts("paths")[0]

    @property
    def labels(self) -> list[str | None]:
        """Labels, None for images without one, `[n]`."""
        return self.texts("labels")[0]

    @property
    def embeddings(self) -> np.ndarray:
        """Stored embeddings, float32 `[n D]`."""
        return self.array(self._rows.columns["embeddings"])

    @property
    def triplets_used(self) -> np.ndarray:
        """Triplets that gave evidence for each row's weights, uint32 `[n]`."""
        return self.array(self._rows.columns["triplets_used"])

    @property
    def marks(self) -> np.ndarray:
        """Marks of the images' files, uint32 `[n 4]`; zeros where none was taken."""
        return self.array(self._rows.columns[MARKS])

    def fields(self, layer: int = 0) -> dict[str, np.ndarray]:
        """Return what the layer's encoding decodes, with "embedding" where it uses that."""
        of = self._rows.layers[layer]
        fields = {name: self.array(column) for name, column in of.fields.items()}
        if "channels" in fields and fields["channels"].max(initial=0) >= of.channels:
            what = f"names a channel beyond {of.channels}"
            raise broken(self._rows.root, of.fields["channels"].file, what)
        if of.encoding.uses_embedding:
            fields["embedding"] = self.embeddings
        return fields

    def coarse(self, layer: int = 0) -> np.ndarray | None:
        """Return coarse maps, float32 `[n h w]`, or None where none are stored."""
        columns = self._rows.layers[layer].coarse
        if columns is None:
            return None
        maps, scales = (self.array(column) for column in columns)
        if not np.isfinite(scales).all():
            raise broken(self._rows.root, columns[1].file, "holds a NaN or an infinity")
        return maps * (scales[:, None, None] / np.float32(255))

    def array(self, column: Column) -> np.ndarray:
        """Return rows of a column, `[n ...]`; zeros where a part lacks it."""
        if len(self._pieces) == 1:
            part, _, rows = self._pieces[0]
            if column.file in part.arrays:
                only: np.ndarray = part.arrays[column.file][rows]
                return only
        values = np.zeros((len(self), *column.shape), column.dtype)
        for part, where, rows in self._pieces:
            if column.file in part.arrays:
                values[where] = part.arrays[column.file][rows]
        return values

    def texts(self, *kinds: str) -> list[list[Any]]:
        """Return a list `[n]` for each kind of text: "ids", "paths" or "labels"."""
        if len(self._pieces) == 1:
            part, _, rows = self._pieces[0]
            return part.texts(rows, *kinds)
        lists: list[list[Any]] = [[None] * len(self) for _ in kinds]
        for part, where, rows in self._pieces:
            slots = np.arange(len(self))[where].tolist()
            for texts, some in zip(lists, part.texts(rows, *kinds), strict=True):
                for slot, text in zip(slots, some, strict=True):
                    texts[slot] = text
        return lists


class Strings(Sequence[T_co], Generic[T_co]):
    """One string (or None) for every position: `s[7]`, `s[2:5]`, `s[array([3, 1])]`."""

    def __init__(self, rows: _Rows, kind: str) -> None:
        self._rows, self._kind = rows, kind

    def __len__(self) -> int:
        return int(self._rows.starts[-1])

    def _lookup(self, positions: np.ndarray) -> list[T_co]:
        return Selection(self._rows, positions).texts(self._kind)[0]

    @overload
    def __getitem__(self, where: int) -> T_co: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[T_co]: ...

    def __getitem__(self, where: int | slice | np.ndarray | list[int]) -> T_co | list[T_co]:
        total = len(self)
        if isinstance(where, slice):
            return self._lookup(np.arange(*where.indices(total)))
        if isinstance(where, (int, np.integer)):
            row = int(where) + total if where < 0 else int(where)
            if not 0 <= row < total:
                raise IndexError(f"position {where} of an index of {total} rows")
            return self._lookup(np.array([row]))[0]
        return self._lookup(check_positions(where, total))

    def __iter__(self) -> Iterator[T_co]:
        for start in range(0, len(self), _RUN):
            yield from self._lookup(np.arange(start, min(start + _RUN, len(self))))

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"
