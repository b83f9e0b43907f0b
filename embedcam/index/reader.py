"""An index opened for reading: everything mapped, nothing read until it is asked for."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import whole
from ..errors import IndexFormatError, InputError
from . import manifest as manifest_file
from .arrays import broken, check_positions
from .encoding import Encoding
from .faiss_files import REBUILD, FaissFile, threads
from .identity import Identity
from .manifest import Manifest
from .rows import (
    MARKS,
    Layer,
    Part,
    Rows,
    Selection,
    Strings,
    columns_of,
    fitted_of,
    make_layers,
    map_fitted,
    map_tombstones,
)
from .search import SLACK, Neighbors, check_queries, in_batches, search_batch

if TYPE_CHECKING:
    from .verify import Progress

REMOVED = "is not in the index any more: it was removed"
"""How the message of a removed id goes on."""
_NEAR, _FEW, _COMPARED, _DEEP = 8, 100_000, 1000, 32
_RUN = 1 << 16


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
    """

    def __init__(
        self, path: Path, manifest: Manifest, with_faiss: bool, n_threads: int | None = None
    ) -> None:
        self.path, self.manifest = path, manifest
        self.n_rows, self.metric = manifest.counts.rows, manifest.metric
        self.width, self.normalized = manifest.embedding.width, manifest.embedding.normalized
        self.with_faiss, self.n_threads = with_faiss, n_threads
        self._process = os.getpid()
        self.fitted_files = map_fitted(path, manifest)
        self._shared = fitted_of(self.fitted_files, None)
        fitted = [fitted_of(self.fitted_files, n) for n in range(len(manifest.layers))]
        self.layers = make_layers(path, manifest.layers, fitted, self.width)
        self.columns = columns_of(self.width, self.normalized, self.layers)
        self._rows = Rows(path, manifest, self.layers, self.columns)
        self._tombstones = map_tombstones(path, manifest)
        self.ids: Strings[str] = Strings(self._rows, "ids")
        self.paths: Strings[str] = Strings(self._rows, "paths")
        self.labels: Strings[str | None] = Strings(self._rows, "labels")
        used = with_faiss and manifest.faiss is not None
        self._faiss = FaissFile(path, manifest) if used else None

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
        if n_threads is not None and (type(n_threads) is not int or n_threads < 1):
            raise InputError(f"n_threads = {n_threads!r}; give a whole number from 1, or None")
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

    def select(self, positions: np.ndarray | Sequence[int]) -> Selection:
        """Return some rows, to be fetched field by field; the cheapest way to several fields."""
        return Selection(self._rows, check_positions(positions, self.n_rows))

    def embeddings(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return stored embeddings of rows, float32 `[n D]`."""
        return self.select(positions).embeddings

    def triplets_used(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return how many triplets gave evidence for each row's weights, uint32 `[n]`."""
        return self.select(positions).triplets_used

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

    def rows(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> dict[str, np.ndarray]:
        """Return what the layer's encoding decodes, with "embedding" where it uses that."""
        self._layer(layer)
        return self.select(positions).fields(layer)

    def weights(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> np.ndarray:
        """Return decoded channel weights of rows, float32 `[n K]`, or by position `[n K H W]`."""
        return self.encoding(layer).decode(self.rows(positions, layer))

    def coarse(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> np.ndarray | None:
        """Return coarse maps of rows, float32 `[n h w]`, or None where none are stored."""
        self._layer(layer)
        return self.select(positions).coarse(layer)

    def live(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return which rows have not been removed, bool `[n]`."""
        return ~self._is_removed(check_positions(positions, self.n_rows))

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
        alive = [row for row in rows if not self._is_removed(np.array([row]))[0]]
        if not alive:
            raise InputError(f"the image {id!r} {REMOVED}; add it again first")
        return alive[0]

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
        wanted, live = set(ids), {}
        if len(wanted) * 16 < self.n_rows:
            for text in wanted:
                for row in self._find(text):
                    if not self._is_removed(np.array([row]))[0]:
                        live[text] = row
            return live
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
        queries = check_queries(queries, self.width, self.normalized)
        k = min(whole("n_neighbors", n_neighbors, 1), len(self))
        if self.manifest.faiss is None:
            raise InputError(
                "this index was built without FAISS; give neighbors= ids that your own search "
                "found, or give it one with `embedcam compact --rebuild-faiss Flat`"
            )
        if nprobe is not None:
            nprobe = whole("nprobe", nprobe, 1)
        if k == 0:
            raise InputError("every image of this index has been removed; add images first")
        loaded = None if self.faiss_file is None else self.faiss_file.loaded()
        alone = len(queries) == 1 or self._process != os.getpid()
        with threads(1 if alone else self.n_threads):
            step = max(1, (8 << 20) // ((k + SLACK) * self.width))
            return in_batches(
                lambda batch: search_batch(self, loaded, batch, k, nprobe), queries, step, k
            )

    def verify(self, *, progress: "Progress | None" = None) -> list[str]:
        """Check every promise of the format, and return those that were checked.

        The first one that does not hold is an `IndexFormatError`; see `embedcam.index.verify`.
        """
        from .verify import verify_open

        return verify_open(self, progress=progress).checks

    # Inside

    @property
    def parts(self) -> list[Part]:
        """The mapped parts, in the order of their rows."""
        return self._rows.parts

    @property
    def faiss_file(self) -> FaissFile | None:
        """The FAISS file; None where there is none or it was left alone."""
        return self._faiss

    @property
    def tombstones(self) -> np.ndarray:
        """Positions of removed rows, uint64, rising."""
        return self._tombstones

    @property
    def starts(self) -> np.ndarray:
        """Position of each part's first row, and behind the last the number of rows."""
        return self._rows.starts

    def _is_removed(self, positions: np.ndarray) -> np.ndarray:
        if not len(self.tombstones):
            return np.zeros(positions.shape, bool)
        # One type on both sides: uint64 against int64 would compare as float64.
        removed = self.tombstones.view("<i8")
        at = np.minimum(np.searchsorted(removed, positions), len(removed) - 1)
        return np.asarray(removed[at] == positions)

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
        pool: set[str] = set()
        for key in (id, id[: max(1, len(id) // 2)]):
            for part in self.parts:
                pool.update(part.ids_around(key.encode("utf-8", "replace"), _NEAR))
        ends = self._ending(id)
        if ends and id.endswith(f"/{ends[0]}"):
            return ends[:1]
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
