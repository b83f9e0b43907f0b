"""FAISS files: built the same way every time, written durably, loaded only after checks.

FAISS is imported when it is first needed. Everything that builds runs on one OpenMP thread, because
graphs (HNSW, NSG) and OPQ give other bytes with another number of threads.
"""

import contextlib
import errno
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import one_of
from .._files import ProcessLock, fresh, replace
from ..errors import IndexFormatError, InputError, cut, short
from .arrays import ArrayLike, block_rows, broken, open_checked, sha256_of
from .manifest import FaissEntry, Manifest
from .records import Json

if TYPE_CHECKING:
    import faiss

REBUILD = "the file is derived, make it again with `embedcam compact --rebuild-faiss`"
EF_SEARCH = 64
_FLAT = {b"IxF2": 1, b"IxFI": 0}
_MAPPED = {*_FLAT, b"IwFl", b"IwSq", b"IwPQ"}
_HEADER = struct.Struct("<4siqqqBi")
_MOST, _MOST_LINKS, _MOST_LETTERS = 1 << 24, 1024, 200
"""Of a number in a factory string; of a graph's links a row, usually 4 to 64; of its letters."""
_MOST_EMPTY = 1 << 20
"""Lists of a multi-index, however few the images: about 300 bytes each."""


def check_factory(factory: str, width: int, n_images: int, metric: str = "l2") -> None:
    """Refuse a factory string that cannot serve so many images, before anything is computed."""
    _make(factory, width, metric, n_images)


def build(
    factory: str, embeddings: ArrayLike, metric: str, rows: np.ndarray
) -> tuple["faiss.Index", int]:
    """Return a FAISS index over embeddings `[N D]`, and how many rows it was trained on.

    The same bytes every time; `rows` are those that may be trained on.
    """
    total, width = embeddings.shape
    index = _make(factory, width, metric, len(rows))
    trained_on = 0
    with threads(1), _as_input_error(factory):
        if not index.is_trained:
            if len(rows) > (most := max(1 << 16, 256 * _training_need(index))):
                drawn = np.random.default_rng(0).choice(len(rows), most, replace=False)
                rows = rows[np.sort(drawn)]
            index.train(np.asarray(embeddings[rows], np.float32))
            trained_on = len(rows)
        _add(index, embeddings)
    if index.ntotal != total:
        raise InputError(f"the FAISS factory {factory!r} keeps {index.ntotal} of {total} rows")
    return index, trained_on


def grow(index: "faiss.Index", embeddings: ArrayLike, start: int, factory: str) -> None:
    """Add the rows from `start` on to an index, which keeps those before; training stays."""
    with threads(1), _as_input_error(factory):
        if start == 0 or "NSG" in type(index).__name__:  # a graph that cannot grow
            index.reset()
            start = 0
        _add(index, embeddings, start)


def _add(index: "faiss.Index", embeddings: ArrayLike, start: int = 0) -> None:
    # In blocks; graphs that cannot grow need all of them at once.
    total, name = embeddings.shape[0], type(index).__name__
    at_once = "NSG" in name or "NNDescent" in name
    step = max(total - start, 1) if at_once else block_rows(embeddings)
    for first in range(start, total, step):
        rows = embeddings[first : min(first + step, total)]
        index.add(np.ascontiguousarray(rows, np.float32))


def search_settings(index: "faiss.Index") -> dict[str, int]:
    """Return sensible search parameters, to be recorded: nprobe for IVF, ef for HNSW."""
    settings = {}
    for piece in _pieces(index):
        name = type(piece).__name__
        if "IVF" in name:
            settings["nprobe"] = min(int(piece.nlist), max(8, int(piece.nlist) // 32))
        elif "HNSW" in name:
            settings["ef_search"] = EF_SEARCH
    return settings


def parameters(
    index: "faiss.Index", nprobe: int, ef_search: int
) -> "faiss.SearchParameters | None":
    """Return FAISS search parameters for an index and what it wraps; None where it takes none."""
    import faiss

    options: Any = faiss  # its keyword arguments are added at run time, unseen by type checkers
    index = faiss.downcast_index(index)
    made: faiss.SearchParameters | None = None
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(index.index, nprobe, ef_search)
        made = inner and options.SearchParametersPreTransform(index_params=inner)
    elif isinstance(index, faiss.IndexRefine):
        inner = parameters(index.base_index, nprobe, ef_search)
        made = options.IndexRefineSearchParameters(k_factor=2.0, base_index_params=inner)
    elif isinstance(index, faiss.IndexIVF):
        made = options.SearchParametersIVF(nprobe=min(nprobe, int(index.nlist)))
    elif isinstance(index, faiss.IndexHNSW):
        made = options.SearchParametersHNSW(efSearch=ef_search)
    return made


def write_faiss(root: Path, index: "faiss.Index", name: str) -> Json:
    """Write a FAISS file durably, and return its entry; nothing has its name where that fails."""
    import faiss

    unfinished, digest, written = root / f"{name}.tmp", hashlib.sha256(), 0
    # FAISS only prints a failing fclose and goes on, so that its last bytes can be lost unseen.
    with fresh(unfinished) as file:

        def put(data: bytes) -> int:
            nonlocal written
            file.write(data)
            digest.update(data)
            written += len(data)
            return len(data)

        try:
            made_at_run_time: Any = faiss  # unseen by type checkers
            faiss.write_index(index, made_at_run_time.PyCallbackIOWriter(put))
        except RuntimeError as error:
            reason = f"FAISS cannot write its file ({_brief(error)})"
            raise OSError(errno.EIO, reason, str(unfinished)) from error
        file.flush()
        if (size := os.fstat(file.fileno()).st_size) != written:
            reason = f"holds {size} of {written} bytes after writing"
            raise OSError(errno.EIO, reason, str(unfinished))
    replace(unfinished, root / name)
    entry = {"file": name, "bytes": written, "sha256": digest.hexdigest()}
    return {**entry, "version": faiss.__version__}


class FaissFile:
    """The FAISS file of an index: checked when it is opened, loaded by whoever first needs it.

    Loaded once for all threads. The descriptor survives a `compact` and is closed with it.
    """

    descriptor: int | None = None

    def __init__(self, root: Path, manifest: Manifest, entry: FaissEntry) -> None:
        self._root, self._manifest, self.entry = root, manifest, entry
        self._lock = ProcessLock()
        self._loaded: faiss.Index | None = None
        self.descriptor = open_checked(root, entry.file, entry.bytes, REBUILD)
        self._check_header(os.pread(self.descriptor, _HEADER.size + 8, 0))

    def __del__(self) -> None:
        if self.descriptor is not None:
            self.close()

    def loaded(self) -> "faiss.Index":
        """Return the FAISS index; Flat and IVF are mapped, so that a million rows load at once."""
        loaded = self._loaded
        if loaded is None:
            with self._lock:
                loaded = self._loaded = self.read() if self._loaded is None else self._loaded
        return loaded

    def close(self) -> None:
        """Let go of the file; a search that has begun ends with what it took."""
        # Under the lock: a number closed while another thread loads may come to name another file.
        with self._lock:
            descriptor, self.descriptor, self._loaded = self.descriptor, None, None
            if descriptor is not None:
                os.close(descriptor)

    def read(self, mapped: bool = True) -> "faiss.Index":
        """Read the file anew; all of it, its checksum compared, where it is not to be `mapped`.

        What is written next gets a checksum of its own, and FAISS aborts the process where a mapped
        index is added to.
        """
        import faiss

        descriptor = self.descriptor
        if descriptor is None:
            raise InputError(f"{self._root}: the index is closed; open it again")
        kind = os.pread(descriptor, 4, 0)
        # Sizes inside a file other than Flat cannot be checked from outside, so its bytes are.
        if (kind not in _FLAT or not mapped) and sha256_of(descriptor) != self.entry.sha256:
            raise self.broken("does not match its checksum")
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mapped and kind in _MAPPED else 0
        try:
            # By descriptor: `compact` may have taken the name away since the index was opened.
            index = faiss.read_index(f"/dev/fd/{descriptor}", flags)
        except RuntimeError as error:
            raise self.broken(f"FAISS refuses it ({_brief(error)})") from error
        self._check(index.d, index.ntotal, index.metric_type)
        return index

    def _check_header(self, head: bytes) -> None:
        size = self.entry.bytes
        if len(head) < _HEADER.size:
            raise self.broken(f"is no FAISS file with its {size} bytes")
        kind, width, rows, _, _, trained, metric = _HEADER.unpack_from(head)
        if not re.fullmatch(rb"I[A-Za-z0-9]{3}", kind):
            raise self.broken(f"begins with {kind!r}, so it is no FAISS index")
        self._check(width, rows, metric if trained == 1 else -1)
        if kind in _FLAT:
            numbers = struct.unpack_from("<Q", head, _HEADER.size)[0] if len(head) > 44 else -1
            fits = numbers == width * rows and size == _HEADER.size + 8 + 4 * numbers
            if _FLAT[kind] != metric or not fits:
                raise self.broken("its header does not go with its size")

    def _check(self, width: int, rows: int, metric: int) -> None:
        of = self._manifest
        if (width, rows) != (of.embedding.width, of.counts.rows):
            known = f"the index has {of.counts.rows} of {of.embedding.width}"
            raise self.broken(f"holds {rows} vectors of width {width}; {known}")
        if metric != metric_code(of.metric):
            raise self.broken(f"was not made for the metric {of.metric}")

    def broken(self, what: str) -> IndexFormatError:
        """Return the error about the file, and how it is made again."""
        return broken(self._root, self.entry.file, what, REBUILD)


def metric_code(metric: str) -> int:
    """Return FAISS's number for a metric."""
    return ("ip", "l2").index(one_of("metric", metric, ("l2", "ip")))


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run FAISS on `count` OpenMP threads (None: as it is), put back afterwards.

    OpenMP keeps the number for each thread that computes, so no other thread sees it change.
    """
    import faiss

    before = faiss.omp_get_max_threads()
    if count is not None:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _make(factory: str, width: int, metric: str, n_images: int) -> "faiss.Index":
    import faiss

    _refuse_many(factory, n_images)
    with _as_input_error(factory):
        index = faiss.index_factory(width, factory, metric_code(metric))
    if "IDMap" in type(index).__name__:
        raise InputError(f"the FAISS factory {factory!r} numbers its rows itself; drop IDMap")
    for piece in _pieces(index):
        for holder in (piece, getattr(piece, "pq", None)):
            if holder is not None and hasattr(holder, "cp"):
                # Few images a centroid is the user's choice; FAISS would print a line for each.
                holder.cp.min_points_per_centroid = 1
    _refuse_few(factory, _training_need(index), n_images)
    return index


def _refused(factory: str, why: str) -> InputError:
    return InputError(
        f"the FAISS factory {short(factory)} cannot be used ({why}); 'Flat' always can"
    )


def _refuse_many(factory: str, n_images: int) -> None:
    # What FAISS takes memory for before it looks at it, or the stack.
    if len(factory) > _MOST_LETTERS:
        raise _refused(factory, f"{len(factory):,} letters are more than {_MOST_LETTERS}")
    for kind, digits in re.findall(r"(HNSW|NSG|NNDescent)?([0-9]+)", factory):
        most = _MOST_LINKS if kind else _MOST
        if len(digits) > 9 or int(digits) > most:
            raise _refused(factory, f"{kind}{cut(digits, 20)} is more than {kind}{most}")

    # Lists and codes that so few images cannot fill, before FAISS takes gigabytes.
    lists = [int(digits) for digits in re.findall(r"IVF([0-9]+)", factory)]
    codes = [1 << int(bits) for bits in re.findall(r"(?<![A-Z])PQ[0-9]+x([0-9]{1,2})", factory)]
    _refuse_few(factory, max([0, *lists, *codes]), n_images)
    for number, bits in re.findall(r"IMI([0-9]{1,3})x([0-9]{1,3})", factory):
        if 1 << int(number) * int(bits) > max(_MOST_EMPTY, 16 * n_images):
            lists_of = f"2^{int(number) * int(bits)} lists are too many for {n_images} images"
            raise _refused(factory, lists_of)


def _refuse_few(factory: str, needed: int, n_images: int) -> None:
    if needed > n_images:
        raise InputError(
            f"the FAISS factory {short(factory)} needs at least {needed} images to train, and "
            f"there are {n_images}; use 'Flat', or one with fewer lists or codes"
        )


def _pieces(index: "faiss.Index") -> Iterator[Any]:
    """Yield the index and those it wraps, outermost first."""
    import faiss

    index = faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index"):
        if isinstance(inner := getattr(index, name, None), faiss.Index):
            yield from _pieces(inner)


def _training_need(index: "faiss.Index") -> int:
    # The fewest vectors that the index can be trained on.
    import faiss

    if index.is_trained:
        return 0
    need = 1
    for piece in _pieces(index):
        if "IVF" in type(piece).__name__:
            coarse = type(faiss.downcast_index(piece.quantizer)).__name__
            # A product quantizer's lists are combinations: far fewer vectors train it.
            need = max(need, 1 if "MultiIndex" in coarse else int(piece.nlist))
        quantizer = getattr(piece, "pq", None)
        if quantizer is not None and not piece.is_trained:
            need = max(need, int(quantizer.ksub))
    return need


@contextlib.contextmanager
def _as_input_error(factory: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        why = "it takes more memory than there is" if isinstance(error, MemoryError) else None
        raise _refused(factory, why or _brief(error)) from error


def _brief(error: Exception) -> str:
    # FAISS's reason without the function signature and source line before it.
    text = " ".join(str(error).split())
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", text)[:200]
