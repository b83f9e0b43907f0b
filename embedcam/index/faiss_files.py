"""FAISS files: written durably as a stream, loaded only after checks."""

import errno
import hashlib
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import ProcessLock, fresh, replace
from ..errors import IndexFormatError, InputError
from .arrays import BLOCK_BYTES, ArrayLike, block_rows, broken, open_checked, sha256_of
from .faiss_build import brief, candidates, is_mergeable, metric_code
from .faiss_layout import FLAT, HEADER, MAPPED, is_bounded
from .manifest import FAISS_BLOCK, MOST_FAISS_BLOCKS, FaissEntry, FurtherFaissEntry, Manifest
from .records import Json

if TYPE_CHECKING:
    import faiss

REBUILD = "the file is derived, make it again with `embedcam compact --rebuild-faiss`"
_SAMPLED = 8
"""Blocks compared before a file is used: the first, the last, and some between."""


# Writing


class _Stream:
    """A file that is being written, and the digests of what it got."""

    def __init__(self, file: Any) -> None:
        self._file, self._whole, self._block = file, hashlib.sha256(), _digest()
        self.written, self._digests = 0, list[str]()

    def put(self, data: bytes | memoryview) -> int:
        """Write some bytes, and return how many, as FAISS wants it."""
        self._file.write(data)
        self._whole.update(data)
        view = memoryview(data)
        while len(view):
            piece = view[: FAISS_BLOCK - self.written % FAISS_BLOCK]
            self._block.update(piece)
            self.written += len(piece)
            view = view[len(piece) :]
            if self.written % FAISS_BLOCK == 0:
                self._end_block()
        return len(data)

    def entry(self) -> Json:
        """Return what the manifest says of the bytes; of too many blocks, nothing of each."""
        if self.written % FAISS_BLOCK:
            self._end_block()
        sha256 = self._whole.hexdigest()
        told: Json = {"bytes": self.written, "sha256": sha256, "blocks": None}
        if len(self._digests) <= MOST_FAISS_BLOCKS:
            told["blocks"] = {"of": sha256, "blake2b": "".join(self._digests)}
        return told

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = _digest()


def _digest() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=8)


@contextmanager
def _stream(root: Path, name: str, entry: Json) -> Iterator[_Stream]:
    """Write a FAISS file durably and fill in its entry; nothing has its name where that fails."""
    import faiss

    unfinished = root / f"{name}.tmp"
    # FAISS only prints a failing fclose and goes on, so that its last bytes can be lost unseen.
    with fresh(unfinished) as file:
        stream = _Stream(file)
        yield stream
        file.flush()
        if (size := os.fstat(file.fileno()).st_size) != stream.written:
            reason = f"holds {size} of {stream.written} bytes after writing"
            raise OSError(errno.EIO, reason, str(unfinished))
    replace(unfinished, root / name)
    entry |= {"file": name, **stream.entry(), "version": faiss.__version__}


def write_faiss(root: Path, index: "faiss.Index", name: str) -> Json:
    """Write a FAISS file durably, and return its entry; nothing has its name where that fails."""
    import faiss

    entry: Json = {}
    with _stream(root, name, entry) as stream:
        try:
            made_at_run_time: Any = faiss  # unseen by type checkers
            faiss.write_index(index, made_at_run_time.PyCallbackIOWriter(stream.put))
        except RuntimeError as error:
            reason = f"FAISS cannot write its file ({brief(error)})"
            raise OSError(errno.EIO, reason, str(root / f"{name}.tmp")) from error
    return entry


def write_flat(
    root: Path,
    name: str,
    embeddings: ArrayLike,
    metric: str,
    before: "FaissFile | None" = None,
    start: int = 0,
    stop: int | None = None,
) -> Json:
    """Write what FAISS would of a Flat index over rows of embeddings `[N D]`, block by block.

    Those are `start` to `stop`, behind the rows of the file `before`, which are copied, its
    checksum compared on the way.
    """
    width, stop = embeddings.shape[1], embeddings.shape[0] if stop is None else stop
    rows = stop - start + (0 if before is None else before.rows)
    code = metric_code(metric)
    kind = next(kind for kind, of in FLAT.items() if of == code)
    entry: Json = {}
    with _stream(root, name, entry) as stream:
        stream.put(HEADER.pack(kind, width, rows, 1 << 20, 1 << 20, 1, code))
        stream.put(struct.pack("<Q", rows * width))
        if before is not None:
            before.copy(stream.put)
        for first in range(start, stop, step := block_rows(embeddings)):
            block = np.ascontiguousarray(embeddings[first : min(first + step, stop)], "<f4")
            if block.size:
                stream.put(block.reshape(-1).view(np.uint8).data)
    return entry


def read_shard(root: Path, entry: Json) -> "faiss.Index":
    """Read what `write_faiss` wrote for another process, all of its bytes compared."""
    import faiss

    name = str(entry["file"])
    remedy = "make that piece again"
    with open(open_checked(root, name, int(entry["bytes"]), remedy), "rb") as file:
        if sha256_of(file.fileno()) != entry["sha256"]:
            raise broken(root, name, "does not match its checksum", remedy)
        return faiss.read_index(f"/dev/fd/{file.fileno()}")


# Reading


class FaissFile:
    """The FAISS file of an index: checked when it is opened, loaded by whoever first needs it.

    Loaded once for all threads. The descriptor survives a `compact` and is closed with it. The
    first of several files has the others, which hold the rows behind its own, in `more`.
    """

    descriptor: int | None = None
    times = 1
    """Of the loaded file: `faiss_build.candidates`, which takes longer to find out than to keep."""
    more: Sequence["FaissFile"] = ()

    def __init__(
        self, root: Path, manifest: Manifest, entry: FaissEntry | FurtherFaissEntry
    ) -> None:
        self._root, self._manifest, self.entry = root, manifest, entry
        further = entry.more if isinstance(entry, FaissEntry) else ()
        self.rows = (
            manifest.counts.rows - sum(one.rows for one in further)
            if isinstance(entry, FaissEntry)
            else entry.rows
        )
        self._lock = ProcessLock()
        self._loaded: faiss.Index | None = None
        self.descriptor = open_checked(root, entry.file, entry.bytes, REBUILD)
        self._check_header(os.pread(self.descriptor, HEADER.size + 8, 0))
        self.more = [FaissFile(root, manifest, one) for one in further]
        for one in self.more:
            if one.kind() != self.kind():
                raise one.broken("is of another type than the file of the first rows")

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter the modules that closing uses may be gone before.
        if self.descriptor is not None and not ending():
            self.close()

    def loaded(self) -> "faiss.Index":
        """Return the FAISS index; Flat and IVF are mapped, so that a million rows load at once."""
        loaded = self._loaded
        if loaded is None:
            with self._lock:
                loaded = self.joined() if self._loaded is None else self._loaded
                self.times, self._loaded = candidates(loaded), loaded
        return loaded

    def joined(self) -> "faiss.Index":
        """Return one search over the file and those behind it, read anew."""
        import faiss

        if not self.more:
            return self.read()
        options: Any = faiss  # its arguments are read at run time, unseen by type checkers
        shards: faiss.IndexShards = options.IndexShards(self._shape()[0], False, True)
        for one in (self, *self.more):  # one after the other, rows counted on
            if not is_mergeable(index := one.read()):
                raise one.broken("is of a type that is in one file")
            shards.add_shard(index)
        return shards

    def close(self) -> None:
        """Let go of the file; a search that has begun ends with what it took."""
        # Under the lock: a number closed while another thread loads may come to name another file.
        with self._lock:
            descriptor, self.descriptor, self._loaded = self.descriptor, None, None
            if descriptor is not None:
                os.close(descriptor)
        for one in self.more:
            one.close()

    def kind(self) -> bytes:
        """Return the four letters that FAISS names its type by."""
        return os.pread(self._open(), 4, 0)

    def is_flat(self) -> bool:
        """Return whether it is nothing but the vectors."""
        return self.kind() in FLAT

    def read(self, mapped: bool = True) -> "faiss.Index":
        """Read the file anew; all of it, its checksum compared, where it is not to be `mapped`.

        What is written next gets a checksum of its own, and FAISS aborts the process where a mapped
        index is added to.
        """
        import faiss

        descriptor, kind = self._open(), self.kind()
        if not (mapped and self._is_sampled(kind)) and sha256_of(descriptor) != self.entry.sha256:
            raise self.broken("does not match its checksum")
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mapped and kind in MAPPED else 0
        try:
            # By descriptor: `compact` may have taken the name away since the index was opened.
            index = faiss.read_index(f"/dev/fd/{descriptor}", flags)
        except (RuntimeError, MemoryError) as error:
            raise self.broken(f"FAISS refuses it ({brief(error)})") from error
        self._check(index.d, index.ntotal, index.metric_type)
        return index

    def copy(self, put: Any) -> None:
        """Hand on the vectors of a Flat file in blocks, and compare its checksum."""
        descriptor, whole, at = self._open(), hashlib.sha256(), 0
        begin = HEADER.size + 8
        while piece := os.pread(descriptor, BLOCK_BYTES, at):
            whole.update(piece)
            put(memoryview(piece)[max(0, begin - at) :])
            at += len(piece)
        if whole.hexdigest() != self.entry.sha256:
            raise self.broken("does not match its checksum")

    def _is_sampled(self, kind: bytes) -> bool:
        """Return whether the file may be used after a look at a sample of its blocks alone.

        Its sizes inside must be those of its bytes: FAISS believes what it reads. Of other types
        all bytes are to be compared, and of files of an earlier writer, which named no blocks.
        """
        descriptor, told, size = self._open(), self.entry.blocks, self.entry.bytes
        if told is None or told.of != self.entry.sha256:
            return kind in FLAT
        if not (kind in FLAT or is_bounded(descriptor, size, *self._shape())):
            return False
        count = -(-size // FAISS_BLOCK)
        # By a set: `np.unique` imports for longer than the blocks take.
        for number in sorted({int(at) for at in np.linspace(0, count - 1, _SAMPLED)}):
            block = os.pread(descriptor, FAISS_BLOCK, number * FAISS_BLOCK)
            digest = _digest()
            digest.update(block)
            if digest.hexdigest() != told.blake2b[16 * number : 16 * number + 16]:
                raise self.broken("does not match its checksum")
        return True

    def _shape(self) -> tuple[int, int, int]:
        return self._manifest.embedding.width, self.rows, metric_code(self._manifest.metric)

    def _open(self) -> int:
        if self.descriptor is None:
            raise InputError(f"{self._root}: the index is closed; open it again")
        return self.descriptor

    def _check_header(self, head: bytes) -> None:
        size = self.entry.bytes
        if len(head) < HEADER.size:
            raise self.broken(f"is no FAISS file with its {size} bytes")
        kind, width, rows, _, _, trained, metric = HEADER.unpack_from(head)
        if not re.fullmatch(rb"I[A-Za-z0-9]{3}", kind):
            raise self.broken(f"begins with {kind!r}, so it is no FAISS index")
        self._check(width, rows, metric if trained == 1 else -1)
        if kind in FLAT:
            numbers = struct.unpack_from("<Q", head, HEADER.size)[0] if len(head) > 44 else -1
            fits = numbers == width * rows and size == HEADER.size + 8 + 4 * numbers
            if FLAT[kind] != metric or not fits:
                raise self.broken("its header does not go with its size")

    def _check(self, width: int, rows: int, metric: int) -> None:
        expected_width, expected_rows, expected_metric = self._shape()
        if (width, rows) != (expected_width, expected_rows):
            whole = expected_rows == self._manifest.counts.rows
            of = "the index" if whole else "its part of the index"
            known = f"{of} has {expected_rows} of {expected_width}"
            raise self.broken(f"holds {rows} vectors of width {width}; {known}")
        if metric != expected_metric:
            raise self.broken(f"was not made for the metric {self._manifest.metric}")

    def broken(self, what: str) -> IndexFormatError:
        """Return the error about the file, and how it is made again."""
        return broken(self._root, self.entry.file, what, REBUILD)
