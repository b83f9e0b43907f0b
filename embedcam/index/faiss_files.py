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
from typing import Any

import numpy as np

from .._files import fresh, replace
from ..errors import InputError, cut, short
from .files import ArrayLike, blocks, broken, open_checked, sha256_of
from .search import metric_code, threads

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
    """Refuse a factory string that cannot serve so many images, before anything is computed.

    Raises:
        InputError: not a FAISS factory string, or one that needs more images for its training.
    """
    _refuse_few(factory, _training_need(_make(factory, width, metric, n_images)), n_images)


def build(
    factory: str,
    embeddings: Any,
    metric: str,
    training: np.ndarray | None = None,
) -> tuple[Any, int]:
    """A FAISS index over embeddings `[N D]`, the same bytes every time.

    Args:
        factory: FAISS's factory string.
        embeddings: every row, numbered by position.
        metric: "l2" or "ip".
        training: rows that may be trained on; None for all of them.

    Returns:
        The index, and how many rows it was trained on (0 where it needs no training).
    """
    total, width = embeddings.shape
    rows = np.arange(total) if training is None else training
    index = _make(factory, width, metric, len(rows))
    trained_on = 0
    with threads(1), _as_input_error(factory):
        if not index.is_trained:
            check_factory(factory, width, len(rows), metric)
            sample = _sample(rows, max(1 << 16, 256 * _training_need(index)))
            index.train(np.asarray(embeddings[sample], np.float32))
            trained_on = len(sample)
        add(index, embeddings)
    if index.ntotal != total:
        raise InputError(f"the FAISS factory {factory!r} keeps {index.ntotal} of {total} rows")
    return index, trained_on


def add(index: Any, embeddings: ArrayLike) -> None:
    """Add rows, in blocks; graphs that cannot grow (NSG) need all of them at once."""
    if "NSG" in type(index).__name__ or "NNDescent" in type(index).__name__:
        if len(everything := np.asarray(embeddings[:], np.float32)):
            index.add(np.ascontiguousarray(everything))
        return
    for _, block in blocks(embeddings):
        index.add(np.ascontiguousarray(block, np.float32))


def grow(index: Any, embeddings: ArrayLike, start: int, factory: str) -> None:
    """Add the rows from `start` on to an index that holds those before; training stays."""

    class Tail:
        shape = (embeddings.shape[0] - start, *embeddings.shape[1:])
        dtype = embeddings.dtype

        def __getitem__(self, rows: slice) -> np.ndarray:
            low, high, _ = rows.indices(self.shape[0])
            return embeddings[start + low : start + high]

    with threads(1), _as_input_error(factory):
        if "NSG" in type(index).__name__:
            index.reset()
            add(index, embeddings)
        else:
            add(index, Tail())


def refill(index: Any, embeddings: ArrayLike, factory: str) -> None:
    """Replace every row, keeping what was trained."""
    with threads(1), _as_input_error(factory):
        index.reset()
        add(index, embeddings)


def search_settings(index: Any) -> dict[str, int]:
    """Sensible search parameters, to be recorded: nprobe for IVF, ef for HNSW."""
    settings = {}
    for piece in _pieces(index):
        name = type(piece).__name__
        if "IVF" in name:
            settings["nprobe"] = min(int(piece.nlist), max(8, int(piece.nlist) // 32))
        elif "HNSW" in name:
            settings["ef_search"] = EF_SEARCH
    return settings


def parameters(index: Any, nprobe: int, ef_search: int) -> Any:
    """FAISS search parameters for an index and what it wraps; None where it takes none."""
    import faiss

    options: Any = faiss  # its keyword arguments are added at run time, unseen by type checkers
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(index.index, nprobe, ef_search)
        return None if inner is None else options.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = parameters(index.base_index, nprobe, ef_search)
        return options.IndexRefineSearchParameters(k_factor=2.0, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return options.SearchParametersIVF(nprobe=min(nprobe, int(index.nlist)))
    if isinstance(index, faiss.IndexHNSW):
        return options.SearchParametersHNSW(efSearch=ef_search)
    return None


def write_faiss(root: Path, index: Any, name: str) -> dict[str, Any]:
    """Write a FAISS file durably; returns its size and checksum.

    Raises:
        OSError: it cannot be written whole, as on a full disk; nothing has its name then.
    """
    import faiss

    callbacks: Any = faiss  # made at run time, unseen by type checkers
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
            faiss.write_index(index, callbacks.PyCallbackIOWriter(put))
        except RuntimeError as error:
            reason = f"FAISS cannot write its file ({_brief(error)})"
            raise OSError(errno.EIO, reason, str(unfinished)) from error
        file.flush()
        if (found := os.fstat(file.fileno()).st_size) != written:
            reason = f"holds {found} of {written} bytes after writing"
            raise OSError(errno.EIO, reason, str(unfinished))
    replace(unfinished, root / name)
    return {"file": name, "bytes": written, "sha256": digest.hexdigest()}


def open_faiss(root: Path, manifest: dict[str, Any]) -> int:
    """A descriptor of the FAISS file, its size and header checked; it survives a `compact`."""
    entry = manifest["faiss"]
    descriptor = open_checked(root, entry["file"], entry["bytes"], REBUILD)
    try:
        _check_header(root, manifest, os.pread(descriptor, _HEADER.size + 8, 0))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def load_faiss(root: Path, manifest: dict[str, Any], descriptor: int, mapped: bool = True) -> Any:
    """Read a checked FAISS file; Flat and IVF are mapped, so that a million rows load at once.

    Args:
        root: the index directory.
        manifest: of the index.
        descriptor: from `open_faiss`.
        mapped: False reads all of it, for a change; its checksum is then always compared, because
            what is written next gets a checksum of its own.

    Raises:
        IndexFormatError: the file is not the one that the manifest describes.
    """
    import faiss

    entry = manifest["faiss"]
    kind = os.pread(descriptor, 4, 0)
    # Sizes inside a file other than Flat cannot be checked from outside, so its bytes are.
    if (kind not in _FLAT or not mapped) and sha256_of(descriptor) != entry["sha256"]:
        raise broken(root, entry["file"], "does not match its checksum", REBUILD)
    flags = 0
    if mapped and kind in _MAPPED:
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    try:
        # By descriptor: `compact` may have taken the name away since the index was opened.
        index = faiss.read_index(f"/dev/fd/{descriptor}", flags)
    except RuntimeError as error:
        raise broken(root, entry["file"], f"FAISS refuses it ({_brief(error)})", REBUILD) from error
    width, rows = manifest["embedding"]["width"], manifest["counts"]["rows"]
    if (index.d, index.ntotal, index.metric_type) != (width, rows, metric_code(manifest["metric"])):
        raise broken(
            root,
            entry["file"],
            f"holds {index.ntotal} vectors of width {index.d}; the index has {rows} of {width}",
            REBUILD,
        )
    return index


def _check_header(root: Path, manifest: dict[str, Any], head: bytes) -> None:
    name, size = manifest["faiss"]["file"], manifest["faiss"]["bytes"]
    width, rows = manifest["embedding"]["width"], manifest["counts"]["rows"]
    if len(head) < _HEADER.size:
        raise broken(root, name, f"is no FAISS file with its {size} bytes", REBUILD)
    kind, found_width, found_rows, _, _, trained, metric = _HEADER.unpack_from(head)
    if not re.fullmatch(rb"I[A-Za-z0-9]{3}", kind):
        raise broken(root, name, f"begins with {kind!r}, so it is no FAISS index", REBUILD)
    if (found_width, found_rows) != (width, rows):
        raise broken(
            root,
            name,
            f"holds {found_rows} vectors of width {found_width}; the index has {rows} of {width}",
            REBUILD,
        )
    if metric != metric_code(manifest["metric"]) or trained != 1:
        raise broken(root, name, f"was not made for the metric {manifest['metric']}", REBUILD)
    if kind in _FLAT:
        numbers = struct.unpack_from("<Q", head, _HEADER.size)[0] if len(head) > 44 else -1
        if (
            _FLAT[kind] != metric
            or numbers != width * rows
            or size != _HEADER.size + 8 + 4 * numbers
        ):
            raise broken(root, name, "its header does not go with its size", REBUILD)


def _make(factory: str, width: int, metric: str, n_images: int) -> Any:
    import faiss

    _refuse_huge(factory)
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
    return index


def _refuse_huge(factory: str) -> None:
    """Refuse what FAISS takes memory for before it looks at it, or the stack: numbers, lengths."""
    if len(factory) > _MOST_LETTERS:
        raise InputError(
            f"the FAISS factory {short(factory)} cannot be used ({len(factory):,} letters are more "
            f"than {_MOST_LETTERS}); 'Flat' always can"
        )
    for kind, digits in re.findall(r"(HNSW|NSG|NNDescent)?([0-9]+)", factory):
        most = _MOST_LINKS if kind else _MOST
        if len(digits) > 9 or int(digits) > most:
            raise InputError(
                f"the FAISS factory {short(factory)} cannot be used ({kind}{cut(digits, 20)} is "
                f"more than {kind}{most}); 'Flat' always can"
            )


def _refuse_many(factory: str, n_images: int) -> None:
    """Refuse lists and codes that so few images cannot fill, before FAISS takes gigabytes."""
    lists = [int(digits) for digits in re.findall(r"IVF([0-9]+)", factory)]
    codes = [1 << int(bits) for bits in re.findall(r"(?<![A-Z])PQ[0-9]+x([0-9]{1,2})", factory)]
    _refuse_few(factory, max([0, *lists, *codes]), n_images)
    for number, bits in re.findall(r"IMI([0-9]{1,3})x([0-9]{1,3})", factory):
        if 1 << int(number) * int(bits) > max(_MOST_EMPTY, 16 * n_images):
            raise InputError(
                f"the FAISS factory {short(factory)} cannot be used (2^{int(number) * int(bits)} "
                f"lists are too many for {n_images} images); 'Flat' always can"
            )


def _refuse_few(factory: str, needed: int, n_images: int) -> None:
    if needed > n_images:
        raise InputError(
            f"the FAISS factory {short(factory)} needs at least {needed} images to train, and "
            f"there are {n_images}; use 'Flat', or one with fewer lists or codes"
        )


def _pieces(index: Any) -> Iterator[Any]:
    """The index and those it wraps, outermost first."""
    import faiss

    index = faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index"):
        if isinstance(inner := getattr(index, name, None), faiss.Index):
            yield from _pieces(inner)


def _training_need(index: Any) -> int:
    """Fewest vectors that the index can be trained on."""
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


def _sample(rows: np.ndarray, most: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


@contextlib.contextmanager
def _as_input_error(factory: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        why = "it takes more memory than there is" if isinstance(error, MemoryError) else None
        raise InputError(
            f"the FAISS factory {short(factory)} cannot be used ({why or _brief(error)}); 'Flat' "
            "always can"
        ) from error


def _brief(error: Exception) -> str:
    """FAISS's reason without the function signature and source line before it."""
    text = " ".join(str(error).split())
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", text)[:200]
