"""An index opened for reading: everything mapped, nothing read until it is asked for."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import whole
from ..errors import IndexFormatError, InputError
from . import manifest as manifest_file
from .encoding import Encoding
from .faiss_files import REBUILD
from .faiss_loading import FaissFile
from .files import broken
from .identity import Identity
from .layout import MARKS, Layer, make_layers, map_fitted, map_tombstones, of_layer
from .parts import Part
from .query import search_batch
from .records import Manifest
from .rows import Rows
from .search import SLACK, Neighbors, check_queries, join, threads
from .selection import Selection
from .strings import Strings, check_positions

if TYPE_CHECKING:
    from .verify import Progress

REMOVED = "is not in the index any more: it was removed"
"""How the message of a removed id goes on."""
_NEAR = 8
_FEW = 100_000
_COMPARED = 1000
_DEEP = 32


class Index:
    """An index on disk, opened by `Index.open(path)`; a context manager.

    It keeps what it opened: later changes by a writer are seen by opening again. Any number of
    threads may use one. In a child forked from the process that opened it, FAISS uses one thread,
    because those of the parent are not there; it is not pickled, open its path in each process.

    Attributes:
        path: the directory.
        manifest: what the index is, typed; `to_dict()` returns it as JSON has it.
        n_rows: rows, removed ones included; `len(index)` counts live ones.
        width: D of the embeddings.
        normalized: whether embeddings have unit length.
        metric: "l2" or "ip".
        ids, labels, paths: sequences over positions, decoded on demand.
        with_faiss, n_threads: as given to `open`.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        with_faiss: bool,
        n_threads: int | None = None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.n_rows, self.metric = manifest.counts.rows, manifest.metric
        self.width, self.normalized = manifest.embedding.width, manifest.embedding.normalized
        self.with_faiss, self.n_threads = with_faiss, n_threads
        self._process = os.getpid()
        self.fitted_files = map_fitted(path, manifest.raw)
        self._shared = of_layer(self.fitted_files, None)
        fitted = [of_layer(self.fitted_files, n) for n in range(len(manifest.layers))]
        self.layers: list[Layer] = make_layers(path, manifest.raw, fitted)
        parts = [Part(path, p, self.width, self.layers) for p in manifest.raw["parts"]]
        self._rows = Rows(path, parts, self.layers, self.width)
        self._removed = map_tombstones(path, manifest.raw)
        self.ids: Strings[str] = Strings(self.n_rows, self._rows.ids)
        self.paths: Strings[str] = Strings(self.n_rows, self._rows.paths)
        self.labels: Strings[str | None] = Strings(self.n_rows, self._rows.labels)
        used = with_faiss and manifest.faiss is not None
        self._faiss = FaissFile(path, manifest.raw) if used else None

    @classmethod
    def open(
        cls, path: str | Path, *, with_faiss: bool = True, n_threads: int | None = None
    ) -> "Index":
        """Open an index for reading.

        Args:
            path: its directory.
            with_faiss: False leaves the FAISS file alone; `search` then compares with every row.
            n_threads: OpenMP threads of a search for several queries, which may take as many again
                in each thread that searches; None leaves it to OpenMP. A single query takes one.

        Raises:
            IndexFormatError: no index, an unfinished one, or a broken file, which is named. Sizes,
                the manifest and the removed positions are checked here; checksums are `verify`'s.
            InputError: an impossible number of threads.
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
                if _still(root, place, manifest):
                    if isinstance(error, FileNotFoundError):
                        raise _missing(root, manifest, error) from None
                    raise
                continue
            # The link may have been led elsewhere meanwhile, and other files been opened there.
            if os.path.realpath(root) == place:
                return opened
            opened.close()

    def __len__(self) -> int:
        return self.n_rows - len(self._removed)

    def __repr__(self) -> str:
        return f"<Index {str(self.path)!r}: {len(self)} images, D = {self.width}>"

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise InputError(
            f"{self.path}: an open index is not pickled, for its files are mapped into this "
            "process; open it in each process with Index.open(path)"
        )

    def close(self) -> None:
        """Let go of files; arrays handed out before stay valid."""
        if self._faiss is not None:
            self._faiss.close()
        self._rows.close()

    def load(self) -> None:
        """Load the FAISS file now instead of with the first search; nothing without one.

        Raises:
            IndexFormatError: it is broken.
        """
        if self._faiss is not None:
            self._faiss.loaded()

    # Rows

    def select(self, positions: np.ndarray | Sequence[int]) -> Selection:
        """Some rows, to be fetched field by field; the cheapest way to several of their fields.

        Raises:
            InputError: positions that are not whole numbers `[n]` of this index.
        """
        return self._rows.select(check_positions(positions, self.n_rows))

    def embeddings(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Stored embeddings of rows, float32 `[n D]`."""
        return self.select(positions).embeddings

    def triplets_used(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Triplets that gave evidence for each row's weights, uint32 `[n]`."""
        return self.select(positions).triplets_used

    @property
    def marked(self) -> bool:
        """Whether it holds marks of the images' files, so that a replaced one is told."""
        return any(MARKS in part.arrays for part in self.parts)

    def encoding(self, layer: int = 0) -> Encoding:
        """How a layer's weights are kept."""
        return self._layer(layer).encoding

    def fitted(self, name: str) -> np.ndarray:
        """An array kept once for the whole index, such as "embedding_mean".

        What belongs to a layer's encoding is `encoding(layer).fitted`.
        """
        if name not in self._shared:
            known = ", ".join(sorted(self._shared)) or "none"
            raise InputError(f"the index keeps no array {name!r}; it keeps: {known}")
        return self._shared[name]

    def shared(self) -> dict[str, np.ndarray]:
        """The arrays kept once for the whole index, by name."""
        return dict(self._shared)

    def probe(self) -> dict[str, np.ndarray]:
        """The arrays of the network's probe, by name ("probe_...")."""
        return {n: a for n, a in self._shared.items() if n.startswith("probe_")}

    def rows(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> dict[str, np.ndarray]:
        """What the layer's encoding decodes: its fields, and "embedding" where it uses that."""
        self._layer(layer)
        return self.select(positions).fields(layer)

    def weights(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> np.ndarray:
        """Decoded channel weights of rows, float32 `[n K]`, or by position `[n K H W]`."""
        return self.encoding(layer).decode(self.rows(positions, layer))

    def coarse(self, positions: np.ndarray | Sequence[int], layer: int = 0) -> np.ndarray | None:
        """Coarse CAMs of rows, float32 `[n h w]`, or None where none are stored."""
        self._layer(layer)
        return self.select(positions).coarse(layer)

    def live(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """Which rows have not been removed, bool `[n]`."""
        return ~self._is_removed(check_positions(positions, self.n_rows))

    def live_positions(self) -> np.ndarray:
        """Positions of all live rows, int64 `[len(index)]`."""
        kept = np.ones(self.n_rows, bool)
        kept[np.asarray(self._removed, np.int64)] = False
        return np.flatnonzero(kept)

    # Ids

    def position(self, id: str) -> int:
        """Position of an image.

        Raises:
            InputError: unknown (with the nearest known ids) or removed.
        """
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
        """Positions of many images, int64 `[n]`; errors as `position`."""
        if isinstance(ids, str):
            raise InputError(f"expected a list of ids, got the string {ids!r}; use position()")
        if len(ids) * 16 < self.n_rows:
            return np.array([self.position(i) for i in ids], np.int64)
        # Many ids: one pass over all rows is cheaper than a bisection each.
        known = self.find_live(ids)
        return np.array([known[i] if i in known else self.position(i) for i in ids], np.int64)

    def find_live(self, ids: Sequence[str]) -> dict[str, int]:
        """Positions of those of the ids that the index holds live; the others are left out."""
        wanted, found = set(ids), {}
        if len(wanted) * 16 < self.n_rows:
            for text in wanted:
                for row in self._find(text):
                    if not self._is_removed(np.array([row]))[0]:
                        found[text] = row
            return found
        for part, start in zip(self.parts, self.starts, strict=False):
            for first in range(0, part.count, 65536):
                stop = min(first + 65536, part.count)
                alive = self.live(np.arange(start + first, start + stop))
                for row, text in enumerate(part.ids.tolist(first, stop)):
                    if text in wanted and alive[row]:
                        found[text] = int(start) + first + row
        return found

    # Search

    def search(
        self, queries: np.ndarray, n_neighbors: int, *, nprobe: int | None = None
    ) -> Neighbors:
        """Nearest live images of each query.

        FAISS (or, opened without it, brute force) finds candidates; the distances and similarities
        returned are exact, computed from the stored embeddings, and decide the order.

        Args:
            queries: `[B D]`, of unit length where the index is normalised.
            n_neighbors: k; where fewer images are live, all of them come back.
            nprobe: IVF lists to visit, all of them where there are fewer; None takes the
                manifest's.

        Raises:
            InputError: wrong shape, NaN, a number beyond `queries.LARGEST`, a vector that is not of
                unit length where the index is normalised, no FAISS in this index, no image left, or
                an `nprobe` that is no whole number from 1.
            IndexFormatError: the FAISS file is broken.
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
        loaded = None if self._faiss is None else self._faiss.loaded()
        alone = len(queries) == 1 or self._process != os.getpid()
        with threads(1 if alone else self.n_threads):
            step = max(1, (8 << 20) // ((k + SLACK) * self.width))
            found = [
                search_batch(self, loaded, queries[i : i + step], k, nprobe)
                for i in range(0, len(queries), step)
            ]
        return join(found, k)

    def verify(self, *, progress: "Progress | None" = None) -> list[str]:
        """Check every promise of the format; see `embedcam.index.verify`.

        Returns:
            The promises that were checked.

        Raises:
            IndexFormatError: the first one that does not hold.
        """
        from .verify import verify_open

        return verify_open(self, progress=progress).checks

    @property
    def identity(self) -> Identity | None:
        """The network that it was built with; None of an index made of features alone.

        Raises:
            IndexFormatError: it is not described as any network is.
        """
        described = self.manifest.raw["network"]
        return None if described is None else Identity.from_dict(described, self.probe())

    def refuse_prototypes(self, instead: str) -> None:
        """Refuse what needs the images themselves where rows are merged from several.

        Args:
            instead: what to do, as the end of a sentence.

        Raises:
            InputError: the index holds prototypes.
        """
        if self.manifest.is_compressed:
            raise InputError(
                f"{self.path}: holds prototypes, each merged from several images; {instead}"
            )

    # Inside

    @property
    def parts(self) -> list[Part]:
        """The mapped parts, in the order of their rows."""
        return self._rows.parts

    @property
    def starts(self) -> np.ndarray:
        """Position of each part's first row, and behind the last the number of rows."""
        return self._rows.starts

    @property
    def faiss_file(self) -> int | None:
        """Descriptor of the FAISS file; None without one, and when closed."""
        return None if self._faiss is None else self._faiss.descriptor

    @property
    def tombstones(self) -> np.ndarray:
        """Positions of removed rows, uint64, rising."""
        return self._removed

    def _is_removed(self, positions: np.ndarray) -> np.ndarray:
        if not len(self._removed):
            return np.zeros(positions.shape, bool)
        # One type on both sides: uint64 against int64 would compare as float64.
        removed = self._removed.view("<i8")
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
        """Known ids close to a misspelt one: looked for around it and around its beginning only."""
        pool: set[str] = set()
        for key in (id, id[: max(1, len(id) // 2)]):
            for part in self.parts:
                pool.update(part.neighbours(key.encode("utf-8", "replace"), _NEAR))
        ends = self._ending(id)
        if ends and id.endswith(f"/{ends[0]}"):
            return ends[:1]
        near = ends + get_close_matches(id, sorted(pool), 8, 0.4)
        return [text for text in dict.fromkeys(near) if text in self.find_live(near)][:3]

    def _ending(self, id: str) -> list[str]:
        """Ids that end as this one: without its first folders, else, in small sets, in others.

        Of those in other folders the ones that have most of the path's end in common.
        """
        names = id.split("/")
        shorter = ["/".join(names[start:]) for start in range(1, min(len(names), _DEEP))]
        live = self.find_live(shorter)
        if live:
            return [next(text for text in shorter if text in live)]
        if self.n_rows > _FEW:
            return []
        every = (text for part in self.parts for text in part.ids.tolist(0, part.count))
        alike = [(_common_end(text.split("/"), names), text) for text in every]
        most = max((common for common, _ in alike), default=0)
        ends = [text for common, text in alike if common == most > 0]
        return get_close_matches(id, ends[:_COMPARED], 3, 0)


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the last names of two paths are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _still(root: Path, place: str, manifest: Manifest) -> bool:
    """Whether the same version lies at the same place."""
    now = manifest_file.read(root).manifest_sha256
    return os.path.realpath(root) == place and now == manifest.manifest_sha256


def _missing(root: Path, manifest: Manifest, error: FileNotFoundError) -> IndexFormatError:
    faiss = manifest.faiss
    name = os.path.relpath(error.filename or root, root)
    if faiss is not None and name == faiss.file:
        return broken(root, name, "is missing", REBUILD)
    return broken(root, name, "is missing")
