"""Every promise of the format, checked: checksums, structure, values, and the FAISS file."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from ..errors import IndexFormatError, short
from ..images.texts import Texts, first_twice, in_runs, sorted_order
from . import faiss_build
from .arrays import Column, blocks, broken, file_name, sha256_of, wrong_values
from .concepts import ARRAYS, wrong_arrays
from .faiss_files import REBUILD
from .reader import Index
from .rows import Part, order_dtype

Progress = Callable[[int, int], None]
_SAMPLE, _RUN = 32, 1 << 14
_EXACT = ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat")


@dataclass
class Verification:
    """What `verify` did.

    Attributes
    ----------
    checks : the promises that were checked and hold.
    problems : one sentence for each that does not; empty unless problems are collected.
    """

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return not self.problems


def verify(
    path: str | Path, *, collect: bool = False, progress: Progress | None = None
) -> Verification:
    """Check every promise of the format.

    Parameters
    ----------
    path : the index directory.
    collect : list all problems in the report instead of raising the first one.
    progress : called with (bytes done, bytes in all) while files are read.

    Raises
    ------
    IndexFormatError
        One sentence that names the file and what is wrong (not with `collect`).
    """
    try:
        index = Index.open(path)
    except IndexFormatError as error:
        if not collect:
            raise
        return Verification(problems=[str(error)])
    with index:
        return verify_open(index, collect=collect, progress=progress)


def verify_open(
    index: Index, *, collect: bool = False, progress: Progress | None = None
) -> Verification:
    """Check every promise of an index that is open."""
    report = Verification(["the manifest and the size of every file"])
    embeddings = _values(index, index.columns["embeddings"])
    steps: dict[str, Iterable[IndexFormatError]] = {
        "the checksum of every file": _checksums(index, progress),
        "embeddings: finite, and of unit length where promised": embeddings,
        "weights: finite, channels distinct and in range": _weights(index),
        "ids, paths and labels: offsets, UTF-8, order": (
            broken(index.path, f"{part.directory}/{name}", what)
            for part in index.parts
            for name, what in _wrong_strings(part)
        ),
        "concepts and exemplars: parts, ids, positions": _concepts(index),
        "tombstones: rising and in range": (),  # seen when the index was opened
        "ids: not empty, unique among live images": _unique(index),
        "FAISS: size, width, metric, and distances of a sample": _faiss(index),
    }
    if not ARRAYS & index.shared().keys():
        del steps["concepts and exemplars: parts, ids, positions"]
    for name, problems in steps.items():
        before = len(report.problems)
        for problem in _yielded(problems):
            if not collect:
                raise problem
            report.problems.append(str(problem))
        if len(report.problems) == before:
            report.checks.append(name)
        elif len(report.checks) == 1:
            break  # of checksums: what follows would only find the same damage again
    return report


def _yielded(problems: Iterable[IndexFormatError]) -> Iterator[IndexFormatError]:
    try:
        yield from problems
    except IndexFormatError as error:  # that a step raised itself
        yield error


def check_files(index: Index, *beginnings: str) -> None:
    """Compare mapped files whose names begin so with their checksums; the first wrong is an error.

    Before their rows are written anew: the new files get checksums of their own, which would vouch
    for flipped bits copied along.
    """
    some = {name: array for name, array in _mapped(index).items() if name.startswith(beginnings)}
    for problem in _differing(index, some):
        raise problem


def _mapped(index: Index) -> dict[str, np.ndarray]:
    """Return the arrays of all files but FAISS's, by the files' names in the manifest."""
    tombstones, folders = index.manifest.tombstones, [(p.directory, p.arrays) for p in index.parts]
    folders.append((index.manifest.fitted.directory, index.fitted_files))
    alone = {} if tombstones is None else {tombstones.file: index.tombstones}
    return alone | {f"{of}/{name}": array for of, files in folders for name, array in files.items()}


def _differing(
    index: Index,
    contents: Mapping[str, np.ndarray | int],
    tell: Callable[[int], None] | None = None,
) -> Iterator[IndexFormatError]:
    files = index.manifest.files
    for name, content in contents.items():
        if sha256_of(content, tell) != files[name].sha256:
            remedy = (REBUILD,) if name.startswith("faiss-") else ()
            yield broken(index.path, name, "does not match its checksum", *remedy)


def _checksums(index: Index, progress: Progress | None) -> Iterator[IndexFormatError]:
    contents: dict[str, np.ndarray | int] = {**_mapped(index)}
    first = index.faiss_file
    for one in () if first is None else (first, *first.more):
        if one.descriptor is not None:
            contents[one.entry.file] = one.descriptor
    total, done = sum(index.manifest.files[name].bytes for name in contents), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return _differing(index, contents, tell)


def _weights(index: Index) -> Iterator[IndexFormatError]:
    for layer in index.layers:
        yield from _values(index, *layer.fields.values(), *(layer.coarse or ()))
    for name, array in index.fitted_files.items():
        if (what := wrong_values(array)) is not None:
            yield broken(index.path, f"{index.manifest.fitted.directory}/{name}", what)


def _concepts(index: Index) -> Iterator[IndexFormatError]:
    grid = index.manifest.layers[0].grid if index.manifest.layers else None
    for name, what in wrong_arrays(index.shared(), grid):
        yield broken(index.path, f"{index.manifest.fitted.directory}/{name}", what)


def _values(index: Index, *columns: Column) -> Iterator[IndexFormatError]:
    for part, column in product(index.parts, columns):
        for start, block in blocks(part.arrays[column.file]) if column.wrong else ():
            if column.wrong and (what := column.wrong(block)) is not None:
                where = f"in rows from {start} on, " if start else ""
                yield broken(index.path, f"{part.directory}/{column.file}", where + what)
                break


def _wrong_strings(part: Part) -> Iterator[tuple[str, str]]:
    """Yield files of a part's strings and what is wrong with each."""
    for stem, table in (("ids", part.ids), ("paths", part.paths), ("labels", part.labels)):
        offsets, size = np.asarray(table.offsets), len(table.blob)
        what = row = None
        if offsets[0] != 0 or offsets[-1] != size:
            what = f"run from {offsets[0]} to {offsets[-1]} where the text has 0 to {size}"
        elif (falls := offsets[1:] < offsets[:-1]).any():
            what = f"fall at string {int(falls.argmax())}"
        elif (row := _not_utf8(table)) is not None:
            yield f"{stem}.utf8", f"string {row} is not UTF-8"
            return
        if what is not None:
            yield f"{stem}.offsets.u64", f"the offsets {what}"
            return
    vocabulary = [part.labels.raw(row) for row in range(len(part.labels))]
    if any(a >= b for a, b in pairwise(vocabulary)):
        yield "labels.utf8", "the labels are not sorted, each once"
    codes = part.codes
    if len(codes) and (codes.min() < -1 or codes.max() >= len(vocabulary)):
        yield "labels.codes.i32", f"a code lies outside -1 .. {len(vocabulary) - 1}"
    if (what := _wrong_order(part)) is not None:
        yield file_name("ids.order", order_dtype(part.count)), what


def _not_utf8(table: Texts) -> int | None:
    """Return the first string that is not UTF-8 by itself."""
    for first in range(0, len(table), _RUN):
        bounds = np.asarray(table.offsets[first : first + _RUN + 1]).astype(np.int64)
        piece = table.blob[bounds[0] : bounds[-1]]
        bounds -= bounds[0]
        try:
            piece.tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            return first + int(np.searchsorted(bounds, error.start, side="right")) - 1
        # A valid whole can still be cut inside a character: no string begins with a continuation.
        starts = bounds[:-1][bounds[:-1] < len(piece)]
        cut = np.flatnonzero((piece[starts] & 0xC0) == 0x80)
        if len(cut):
            return first + int(cut[0])
    return None


def _wrong_order(part: Part) -> str | None:
    order, expected = np.asarray(part.order), sorted_order(part.ids)
    if np.array_equal(order, expected):
        return None
    if not np.array_equal(np.sort(order), np.arange(part.count)):
        return "is no permutation of the rows"
    keys = ((part.ids.raw(row), row) for row in map(int, order))
    wrong = next(later for earlier, later in pairwise(keys) if earlier > later)
    return f"the ids are not sorted at {short(wrong[0].decode('utf-8', 'replace'))}"


def _unique(index: Index) -> Iterator[IndexFormatError]:
    for part in index.parts:
        if len(empty := np.flatnonzero(part.ids.offsets[1:] == part.ids.offsets[:-1])):
            what = f"the id of row {empty[0]} is empty"
            yield broken(index.path, f"{part.directory}/ids.utf8", what)
            return
    live = index.live_positions()
    ids = Texts.of(in_runs(index.ids, live))
    if (twice := first_twice(ids)) is not None:
        part = index.parts[int(np.searchsorted(index.starts, live[twice[1]], side="right")) - 1]
        what = f"the id {short(ids[twice[1]])} is live twice"
        yield broken(index.path, f"{part.directory}/ids.utf8", what)


def _faiss(index: Index) -> Iterator[IndexFormatError]:
    if index.faiss_file is None:
        return
    loaded = index.faiss_file.joined()
    if not index.n_rows:
        return
    rows = np.unique(np.linspace(0, index.n_rows - 1, _SAMPLE).astype(np.int64))
    queries = index.embeddings(rows)
    scores, positions = loaded.search(queries, 1)
    nearest = positions[:, 0]
    if nearest.max() >= index.n_rows:
        yield index.faiss_file.broken("returns rows out of range")
        return
    if type(faiss_build.first_of(loaded)).__name__ not in _EXACT:
        return
    hit = nearest >= 0
    near = index.embeddings(nearest[hit]).astype(np.float64)
    asked = queries[hit].astype(np.float64)
    ip = index.metric == "ip"
    true = (near * asked).sum(axis=1) if ip else ((near - asked) ** 2).sum(axis=1)
    # FAISS expands |a - b|^2 in float32: its error scales with the vectors, not with the distance.
    scale = (asked**2).sum(axis=1) + (near**2).sum(axis=1)
    if (np.abs(scores[hit, 0] - true) > 1e-4 * scale + 1e-30).any():
        yield index.faiss_file.broken("was made from other embeddings")
