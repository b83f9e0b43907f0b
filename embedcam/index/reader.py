"""An index opened for reading: everything mapped, nothing read until it is asked for."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Never, TypeVar, overload

import numpy as np

from .._checks import whole
from ..errors import IndexFormatError, InputError
from ..images.texts import hashes_of
from . import manifest as manifest_file
from . import search as searching
from .arrays import Column, broken
from .concepts import PARTS, Concepts, Exemplar, Exemplars
from .encoding import Encoding
from .faiss_files import REBUILD, FaissFile
from .identity import Identity
from .manifest import FaissFileEntry, Manifest
from .model import generation_of, read_model
from .row_batches import BATCH_ROWS, row_batches
from .rows import (
    MARKS,
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
if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
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
    tombstones : positions of removed rows, uint64, rising.
    starts : position of each part's first row, and behind the last the number of rows.
    faiss_file : the FAISS file; None where there is none or it was left alone.
    with_faiss, n_threads : as given to `open`.
    """

    faiss_file: FaissFile | None = None
    starts = np.zeros(1, np.int64)
    tombstones = np.empty(0, np.uint64)

    is_whole, has_embeddings, in_memory = True, True, False
    """Whether all of its images are in it, not those alone that a search returned, whether their
    embeddings are, and whether it has no files."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        fitted: Mapping[str, np.ndarray] | None = None,
        *,
        with_faiss: bool = False,
        n_threads: int | None = None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.metric = manifest.metric
        self.width, self.normalized = manifest.embedding.width, manifest.embedding.normalized
        self.with_faiss, self.n_threads, self.process = with_faiss, n_threads, os.getpid()
        self.fitted_files = map_fitted(path, manifest, fitted)
        self._shared = fitted_of(self.fitted_files)
        of_layers = [
            fitted_of(self.fitted_files, f"layer{n}.") for n in range(len(manifest.layers))
        ]
        self.layers = make_layers(path, manifest.layers, of_layers, self.width)
        self.columns = columns_of(self.width, self.normalized, self.layers)
        self._hold([Part.map(path, part, self.columns) for part in manifest.parts])
        self.tombstones = map_tombstones(path, manifest)
        if with_faiss and manifest.faiss is not None:
            self.faiss_file = FaissFile(path, manifest, manifest.faiss)

    @classmethod
    def open(
        cls, path: str | Path, *, with_faiss: bool = True, n_threads: int | None = None
    ) -> "Index":
        """Open an index for reading, or a model: an index without rows.

        Parameters
        ----------
        path : its directory, or the file that `embedcam model` wrote.
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
        if root.is_file():
            return cls(root, *read_model(root), n_threads=n_threads)
        while True:
            place, manifest = os.path.realpath(root), manifest_file.read(root)
            try:
                opened = cls(root, manifest, with_faiss=with_faiss, n_threads=n_threads)
            except (FileNotFoundError, IndexFormatError) as error:
                # A writer may have swept this generation between our two steps.
                now = manifest_file.read(root).manifest_sha256
                if (os.path.realpath(root), now) != (place, manifest.manifest_sha256):
                    continue
                if isinstance(error, FileNotFoundError):
                    raise missing(root, manifest, error) from None
                raise
            # The link may have been led elsewhere meanwhile, and other files been opened there.
            if os.path.realpath(root) == place:
                return opened
            opened.close()

    def _hold(self, parts: list[Part]) -> None:
        self._rows = _Rows(self.path, self.layers, self.columns, parts)
        self.starts, self.n_rows = self._rows.starts, int(self._rows.starts[-1])
        self._there: dict[str, bool] = {}  # of exemplars, which are few
        self.ids: Strings[str] = Strings(self._rows, Part.ids_of)
        self.paths: Strings[str] = Strings(self._rows, Part.paths_of)
        self.labels: Strings[str | None] = Strings(self._rows, Part.labels_of)

    def __len__(self) -> int:
        return self.n_rows - len(self.tombstones)

    def __repr__(self) -> str:
        return f"<Index {str(self.path)!r}: {len(self)} images, D = {self.width}>"

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Never:
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
        rows = every if first is None else Selection(self._rows, every.positions[:first])
        texts = every.gather(Part.texts_of)
        fields = [rows.fields(number) for number in range(len(self.layers))]
        ids, paths = [text[0] for text in texts[:first]], [text[1] for text in texts[:first]]
        return Stored(ids, paths, [text[2] for text in texts], rows.coarse(), rows.marks, fields)

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
        return self._rows.layer(layer).encoding

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

    @cached_property
    def _exemplars(self) -> Exemplars:
        return Exemplars(self._shared, (self.manifest.layers[0].grid or (1, 1))[1])

    def concepts(self) -> Concepts | None:
        """Return the parts that the activations are made of, or None where none were fitted."""
        if PARTS not in self._shared:
            return None
        parts = self._shared[PARTS]
        if not (np.isfinite(parts).all() and (parts >= 0).all()):
            what = "holds a number that is negative or not finite"
            raise broken(self.path, f"{self.manifest.fitted.directory}/{PARTS}.f32", what)
        return Concepts(parts, ("",) * len(parts))

    def exemplars(
        self, kind: str, number: int, n: int = 3, *, among: "Index | None" = None
    ) -> list[Exemplar]:
        """Return indexed pictures and positions where a line answers most, best first.

        Of a "channel" or a "concept" by number, n of those that were kept. Pictures that were
        removed or replaced since are left out, by this index, or `among` rows of a store.
        """
        index = self if among is None else among
        there = (one for one in self._kept_exemplars(kind, number) if index._is_there(one.id))
        return list(islice(there, whole("n", n)))

    def exemplar_ids(self, kind: str, number: int) -> list[str]:
        """Return the ids of all exemplars that were kept, of removed pictures too."""
        return [one.id for one in self._kept_exemplars(kind, number)]

    def _kept_exemplars(self, kind: str, number: int) -> Iterator[Exemplar]:
        try:
            yield from self._exemplars.of(kind, number)
        except ValueError as error:  # also of an id that is not UTF-8
            if isinstance(error, InputError):
                raise
            what = f"the exemplars {error}"
            raise broken(self.path, self.manifest.fitted.directory, what) from None

    def _is_there(self, id: str) -> bool:
        if (there := self._there.get(id)) is None:
            # What was added later under the same id is another picture.
            most = self.manifest.fit.rows if self.is_whole else self.n_rows
            there = any(row < most and self.live([row])[0] for row in self._find(id))
            self._there[id] = there
        return there

    def probe(self) -> dict[str, np.ndarray]:
        """Return the arrays of the network's probe, by name ("probe_...")."""
        return {n: a for n, a in self._shared.items() if n.startswith("probe_")}

    @cached_property
    def generation(self) -> str:
        """What its rows, kept elsewhere, can be read by: see `embedcam.index.model`."""
        return generation_of(self.manifest)

    @property
    def identity(self) -> Identity | None:
        """The network that it was built with; None of an index made of features alone."""
        described = self.manifest.raw["network"]
        return None if described is None else Identity.from_dict(described, self.probe())

    @overload
    def rows(self, positions: Positions, layer: int = 0) -> dict[str, np.ndarray]: ...

    @overload
    def rows(
        self, *, embedding: str = "full", batch_rows: int = ...
    ) -> "Iterator[pa.RecordBatch]": ...

    def rows(
        self,
        positions: Positions | None = None,
        layer: int = 0,
        *,
        embedding: str = "full",
        batch_rows: int = BATCH_ROWS,
    ) -> "dict[str, np.ndarray] | Iterator[pa.RecordBatch]":
        """Return all live rows as Arrow record batches, as `embedcam rows` writes them.

        See `row_batches.schema`; needs pyarrow, `embedcam[parquet]`. Of `positions` it returns what
        the `layer`'s encoding decodes, with "embedding" where it uses that.

        Parameters
        ----------
        embedding : "full", "half" or "none": float32, float16 or no embeddings.
        batch_rows : rows of a batch, at most.
        """
        if positions is not None:
            return self.select(positions).fields(layer)
        batches = row_batches(self, embedding, whole("batch_rows", batch_rows, 1))
        return (one.rows for one in batches if one.rows.num_rows)

    def weights(self, positions: Positions, layer: int = 0) -> np.ndarray:
        """Return decoded channel weights of rows, float32 `[n K]`, or by position `[n K H W]`."""
        return self.encoding(layer).decode(self.rows(positions, layer))

    def coarse(self, positions: Positions, layer: int = 0) -> np.ndarray | None:
        """Return coarse maps of rows, float32 `[n h w]`, or None where none are stored."""
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
        if live := [row for row in rows if self.live([row])[0]]:
            return live[0]
        if rows:
            raise InputError(f"the image {id!r} {REMOVED}; add it again first")
        near = self._near(id)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `index.ids`"
        raise InputError(f"the index has no image {id!r}; {hint}")

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Return positions of many images, int64 `[n]`; errors as `position`."""
        if isinstance(ids, str):
            raise InputError(f"expected a list of ids, got the string {ids!r}; use position()")
        known = self.find_live(ids)
        return np.array([known[i] if i in known else self.position(i) for i in ids], np.int64)

    def find_live(self, ids: Sequence[str]) -> dict[str, int]:
        """Return positions of those of the ids that the index holds live; others are left out."""
        found: list[tuple[int, str]] = []
        if len(ids) * 16 < self.n_rows:
            found = [(row, text) for text in dict.fromkeys(ids) for row in self._find(text)]
        elif len(ids):  # one pass over all rows is cheaper than a bisection each
            wanted = np.sort(hashes_of(ids))
            for start in range(0, self.n_rows, _RUN):
                texts = self.ids[start : start + _RUN]
                hashes = hashes_of(texts)
                at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
                alike = np.flatnonzero(wanted[at] == hashes).tolist()
                found += [(start + row, texts[row]) for row in alike]
            known = {text for _, text in found}
            asked = {text for text in ids if text in known}
            found = [(row, text) for row, text in found if text in asked]
        alive = self.live([row for row, _ in found]).tolist()
        return {text: row for (row, text), is_live in zip(found, alive, strict=True) if is_live}

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
        return searching.search(self, queries, whole("n_neighbors", n_neighbors, 1), nprobe)

    def ranked(self, queries: np.ndarray, n_neighbors: int) -> Neighbors:
        """Return the nearest live images of queries `[B D]`, looked at before; see `search`."""
        return searching.search(self, queries, n_neighbors)

    def beside(self, positions: np.ndarray, embedding: np.ndarray) -> Neighbors:
        """Return some rows beside a query `[D]`, in the order of their positions `[n]`."""
        stored = self.embeddings(positions).astype(np.float64)
        difference = stored - embedding
        distances = np.einsum("nd,nd->n", difference, difference)
        return Neighbors.of(positions, distances, stored @ embedding)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Check every promise of the format, and return those that were checked.

        The first one that does not hold is an `IndexFormatError`; see `embedcam.index.verify`.
        """
        from .verify import verify_open

        return verify_open(self, progress=progress).checks

    # Inside

    def _find(self, id: str) -> list[int]:
        if not isinstance(id, str):
            raise InputError(f"an id is a string; got {id!r}")
        key = id.encode("utf-8", "replace")
        pairs = zip(self.parts, self.starts.tolist(), strict=False)
        return [start + row for part, start in pairs for row in part.find(key)]

    def _near(self, id: str) -> list[str]:
        """Return known ids close to a misspelt one: that end as it, or stand around it."""
        names = id.split("/")
        shorter = ["/".join(names[start:]) for start in range(1, min(len(names), _DEEP))]
        live = self.find_live(shorter)
        if live:  # in folders of its own
            return [next(text for text in shorter if text in live)]
        every = self.ids if self.n_rows <= _FEW else ()
        ends = [text for text in every if text.split("/")[-1] == names[-1]][:_COMPARED]
        keys = [key.encode("utf-8", "replace") for key in (id, id[: max(1, len(id) // 2)])]
        pool = {near for part in self.parts for key in keys for near in part.ids_around(key, _NEAR)}
        near = get_close_matches(id, ends, 3, 0) + get_close_matches(id, sorted(pool), 8, 0.7)
        live = self.find_live(near)
        return [text for text in dict.fromkeys(near) if text in live][:3]


def missing(root: Path, manifest: Manifest, error: FileNotFoundError) -> IndexFormatError:
    """Return the error about a file that the manifest names and that is not there."""
    name = os.path.relpath(error.filename or root, root)
    derived = isinstance(manifest.files.get(name), FaissFileEntry)
    return broken(root, name, "is missing", *([REBUILD] if derived else []))


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
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        given = f"positions of shape {list(rows.shape)} and type {rows.dtype}"
        raise InputError(f"{given}; expected whole numbers [n]")
    # A query's handful: Python compares it sooner than NumPy's reductions are set up.
    ends = sorted(rows.tolist()) if len(rows) <= _HANDFUL else [rows.min(), rows.max()]
    if ends[0] < 0 or ends[-1] >= total:
        bad = ends[0] if ends[0] < 0 else ends[-1]
        raise InputError(f"position {bad} is outside the index, which has rows 0 to {total - 1}")
    return rows.astype(np.int64, copy=False)


class _Rows:
    """The mapped parts of an open index, in the order of their rows, until they are closed.

    Apart from `Index`, so that `index.ids` and the others refer to this and not to the index: an
    index that nobody holds any more is then let go at once, not when garbage is collected.
    """

    def __init__(
        self, root: Path, layers: list[Layer], columns: dict[str, Column], parts: list[Part]
    ) -> None:
        self.root, self.layers, self.columns = root, layers, columns
        self._parts: list[Part] | None = parts
        self.starts = np.cumsum([0, *(part.count for part in parts)])

    @property
    def parts(self) -> list[Part]:
        parts = self._parts
        if parts is None:
            raise InputError(f"{self.root}: the index is closed; open it again")
        return parts

    def close(self) -> None:
        self._parts = None

    def layer(self, number: int) -> Layer:
        if not 0 <= number < len(self.layers):
            raise InputError(f"layer {number} of an index of {len(self.layers)} layers")
        return self.layers[number]

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
        return self.gather(Part.ids_of)

    @property
    def paths(self) -> list[str]:
        """Where the images were read, `[n]`."""
        return self.gather(Part.paths_of)

    @property
    def labels(self) -> list[str | None]:
        """Labels, None for images without one, `[n]`."""
        return self.gather(Part.labels_of)

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
        of = self._rows.layer(layer)
        fields = {name: self.array(column) for name, column in of.fields.items()}
        if "channels" in fields and fields["channels"].max(initial=0) >= of.channels:
            what = f"names a channel beyond {of.channels}"
            raise broken(self._rows.root, of.fields["channels"].file, what)
        if of.encoding.uses_embedding:
            fields["embedding"] = self.embeddings
        return fields

    def coarse(self, layer: int = 0) -> np.ndarray | None:
        """Return coarse maps, float32 `[n h w]`, or None where none are stored."""
        columns = self._rows.layer(layer).coarse
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

    def gather(self, read: Callable[[Part, np.ndarray], list[T]]) -> list[T]:
        """Return what `read` finds in each part, `[n]`."""
        if len(self._pieces) == 1:
            part, _, rows = self._pieces[0]
            return read(part, rows)
        found: dict[int, T] = {}
        for part, where, rows in self._pieces:
            found |= zip(np.arange(len(self))[where].tolist(), read(part, rows), strict=True)
        return [found[place] for place in range(len(self))]


class Strings(Sequence[T_co], Generic[T_co]):
    """One string (or None) for every position: `s[7]`, `s[2:5]`, `s[array([3, 1])]`."""

    def __init__(self, rows: _Rows, read: Callable[[Part, np.ndarray], list[T_co]]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return int(self._rows.starts[-1])

    @overload
    def __getitem__(self, where: int) -> T_co: ...

    @overload
    def __getitem__(self, where: slice | np.ndarray | list[int]) -> list[T_co]: ...

    def __getitem__(self, where: int | slice | np.ndarray | list[int]) -> T_co | list[T_co]:
        total = len(self)
        if isinstance(where, (int, np.integer)):
            row = int(where) + total if where < 0 else int(where)
            if not 0 <= row < total:
                raise IndexError(f"position {where} of an index of {total} rows")
            return self[[row]][0]
        if isinstance(where, slice):
            rows = np.arange(*where.indices(total))
        else:
            rows = check_positions(where, total)
        return Selection(self._rows, rows).gather(self._read)

    def __iter__(self) -> Iterator[T_co]:
        for start in range(0, len(self), _RUN):
            yield from self[start : start + _RUN]

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"
