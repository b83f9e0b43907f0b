"""Every promise of the format, checked: checksums, structure, values, and the FAISS file."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import IndexFormatError, short
from .content import wrong_embeddings, wrong_field, wrong_scales, wrong_values
from .faiss_files import REBUILD, load_faiss
from .files import blocks, broken, sha256_of
from .parts import Part
from .reader import Index
from .strings import StringTable

Progress = Callable[[int, int], None]
SAMPLE = 32
_EXACT = ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat")


@dataclass
class Report:
    """What `verify` did.

    Attributes:
        checks: the promises that were checked and hold.
        problems: one sentence for each that does not; empty unless problems are collected.
    """

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return not self.problems


def verify(path: str | Path, *, collect: bool = False, progress: Progress | None = None) -> Report:
    """Check every promise of the format.

    Args:
        path: the index directory.
        collect: list all problems in the report instead of raising the first one.
        progress: called with (bytes done, bytes in all) while files are read.

    Raises:
        IndexFormatError: one sentence that names the file and what is wrong (not with `collect`).
    """
    try:
        index = Index.open(path)
    except IndexFormatError as error:
        if not collect:
            raise
        return Report(problems=[str(error)])
    with index:
        return verify_open(index, collect=collect, progress=progress)


def verify_open(index: Index, *, collect: bool = False, progress: Progress | None = None) -> Report:
    """`verify` for an index that is open."""
    report = Report(["the manifest and the size of every file"])
    steps: list[tuple[str, Iterator[IndexFormatError]]] = [
        ("the checksum of every file", _checksums(index, progress)),
        ("embeddings: finite, and of unit length where promised", _embeddings(index)),
        ("weights: finite, channels distinct and in range", _weights(index)),
        ("ids, paths and labels: offsets, UTF-8, order", _strings(index)),
        ("tombstones: rising and in range", iter(())),  # seen when the index was opened
        ("ids: not empty, unique among live images", _unique(index)),
        ("FAISS: size, width, metric, and distances of a sample", _faiss(index)),
    ]
    for name, found in steps:
        before = len(report.problems)
        try:
            for problem in found:
                if not collect:
                    raise problem
                report.problems.append(str(problem))
        except IndexFormatError as error:
            if not collect:
                raise
            report.problems.append(str(error))
        if len(report.problems) == before:
            report.checks.append(name)
        elif name == steps[0][0]:
            break  # what follows would only find the same damage again
    return report


def _checksums(index: Index, progress: Progress | None) -> Iterator[IndexFormatError]:
    manifest = index.manifest.raw
    fitted = manifest["fitted"]
    files: list[tuple[str, np.ndarray | int, str]] = []
    for part, entry in zip(index.parts, manifest["parts"], strict=True):
        for name, line in entry["files"].items():
            files.append((f"{part.directory}/{name}", part.arrays[name], line["sha256"]))
    for name, line in fitted["files"].items():
        files.append((f"{fitted['directory']}/{name}", index.fitted_files[name], line["sha256"]))
    if manifest["tombstones"] is not None:
        line = manifest["tombstones"]
        files.append((line["file"], index.tombstones, line["sha256"]))
    if manifest["faiss"] is not None and index.faiss_file is not None:
        line = manifest["faiss"]
        files.append((line["file"], index.faiss_file, line["sha256"]))
    total = sum(f.nbytes if isinstance(f, np.ndarray) else os.fstat(f).st_size for _, f, _ in files)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, content, expected in files:
        if sha256_of(content, tell) != expected:
            remedy = (REBUILD,) if name.startswith("faiss-") else ()
            yield broken(index.path, name, "does not match its checksum", *remedy)


def _embeddings(index: Index) -> Iterator[IndexFormatError]:
    for part in index.parts:
        name = "embeddings.f32"
        yield from _blockwise(
            index, part, name, lambda block: wrong_embeddings(block, index.normalized)
        )


def _weights(index: Index) -> Iterator[IndexFormatError]:
    for layer in index.layers:
        for part in index.parts:
            for name in layer.encoding.fields:
                yield from _blockwise(
                    index,
                    part,
                    layer.file(name),
                    partial(wrong_field, layer, name),
                )
            if layer.coarse_grid is not None:
                yield from _blockwise(index, part, layer.coarse_files[1], wrong_scales)
    for name, array in index.fitted_files.items():
        if (what := wrong_values(array)) is not None:
            yield broken(index.path, f"{index.manifest.raw['fitted']['directory']}/{name}", what)


def _blockwise(
    index: Index, part: Part, name: str, wrong: Callable[[np.ndarray], str | None]
) -> Iterator[IndexFormatError]:
    for start, block in blocks(part.arrays[name]):
        if (what := wrong(block)) is not None:
            where = f"in rows from {start} on, " if start else ""
            yield broken(index.path, f"{part.directory}/{name}", where + what)
            return


def _strings(index: Index) -> Iterator[IndexFormatError]:
    for part in index.parts:

        def bad(name: str, what: str, part: Part = part) -> IndexFormatError:
            return broken(index.path, f"{part.directory}/{name}", what)

        tables = {"ids": part.ids, "paths": part.paths, "labels": part.labels}
        for stem, table in tables.items():
            if (what := _wrong_offsets(table)) is not None:
                yield bad(f"{stem}.offsets.u64", what)
                return
            if (row := _not_utf8(table)) is not None:
                yield bad(f"{stem}.utf8", f"string {row} is not UTF-8")
                return
        vocabulary = [part.labels.raw(row) for row in range(len(part.labels))]
        if any(a >= b for a, b in pairwise(vocabulary)):
            yield bad("labels.utf8", "the labels are not sorted, each once")
        codes = part.codes
        if len(codes) and (codes.min() < -1 or codes.max() >= len(vocabulary)):
            yield bad("labels.codes.i32", f"a code lies outside -1 .. {len(vocabulary) - 1}")
        if (what := _wrong_order(part)) is not None:
            name = next(n for n in part.arrays if n.startswith("ids.order."))
            yield bad(name, what)


def _wrong_offsets(table: StringTable) -> str | None:
    offsets, size = np.asarray(table.offsets), len(table.blob)
    if offsets[0] != 0 or offsets[-1] != size:
        return f"the offsets run from {offsets[0]} to {offsets[-1]} where the text has 0 to {size}"
    if (offsets[1:] < offsets[:-1]).any():
        return f"the offsets fall at string {int(np.argmax(offsets[1:] < offsets[:-1]))}"
    return None


def _not_utf8(table: StringTable) -> int | None:
    """The first string that is not UTF-8 by itself."""
    try:
        table.blob.tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return int(np.searchsorted(table.offsets, np.uint64(error.start), side="right")) - 1
    # A valid whole can still be cut inside a character: a string begins with no continuation byte.
    starts = np.asarray(table.offsets[:-1])
    starts = starts[starts < len(table.blob)].astype(np.int64)
    cut = np.flatnonzero((table.blob[starts] & 0xC0) == 0x80)
    return int(cut[0]) if len(cut) else None


def _wrong_order(part: Part) -> str | None:
    order = np.asarray(part.order).astype(np.int64)
    if not len(order):
        return None
    if order.max() >= part.count or (np.bincount(order, minlength=part.count) != 1).any():
        return "is no permutation of the rows"
    raw = [part.ids.raw(row) for row in range(part.count)]
    keys = [(raw[row], row) for row in order.tolist()]
    for earlier, later in pairwise(keys):
        if earlier > later:
            return f"the ids are not sorted at {short(later[0].decode('utf-8', 'replace'))}"
    return None


def _unique(index: Index) -> Iterator[IndexFormatError]:
    removed = np.asarray(index.tombstones, np.int64)
    alive = np.ones(index.n_rows, bool)
    alive[removed] = False
    seen: dict[str, str] = {}
    for part, start in zip(index.parts, index.starts, strict=False):
        where = f"{part.directory}/ids.utf8"
        for row, text in enumerate(part.ids.tolist()):
            if not text:
                yield broken(index.path, where, f"the id of row {row} is empty")
                return
            if alive[int(start) + row] and text in seen:
                yield broken(index.path, where, f"the id {short(text)} is live twice")
                return
            if alive[int(start) + row]:
                seen[text] = where


def _faiss(index: Index) -> Iterator[IndexFormatError]:
    entry = index.manifest.raw["faiss"]
    if entry is None or index.faiss_file is None:
        return
    loaded = load_faiss(index.path, index.manifest.raw, index.faiss_file)
    if not index.n_rows:
        return
    rows = np.unique(np.linspace(0, index.n_rows - 1, SAMPLE).astype(np.int64))
    queries = index.embeddings(rows)
    scores, found = loaded.search(queries, 1)
    name, found = entry["file"], found[:, 0]
    if found.max() >= index.n_rows:
        yield broken(index.path, name, "returns rows out of range", REBUILD)
        return
    if type(loaded).__name__ not in _EXACT:
        return
    hit = found >= 0
    near = index.embeddings(found[hit]).astype(np.float64)
    given = queries[hit].astype(np.float64)
    ip = index.metric == "ip"
    true = (near * given).sum(axis=1) if ip else ((near - given) ** 2).sum(axis=1)
    # FAISS expands |a - b|^2 in float32: its error scales with the vectors, not with the distance.
    scale = (given**2).sum(axis=1) + (near**2).sum(axis=1)
    if (np.abs(scores[hit, 0] - true) > 1e-4 * scale + 1e-30).any():
        yield broken(index.path, name, "was made from other embeddings", REBUILD)
