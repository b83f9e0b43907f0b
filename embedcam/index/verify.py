"""Every promise of the format, checked: checksums, structure, values, and the FAISS file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from ..errors import IndexFormatError, short
from .arrays import Column, blocks, broken, sha256_of, wrong_values
from .faiss_files import REBUILD
from .reader import Index
from .rows import STRINGS, Part, StringTable

Progress = Callable[[int, int], None]
_SAMPLE = 32
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
    steps: list[tuple[str, Iterator[IndexFormatError]]] = [
        ("the checksum of every file", _checksums(index, progress)),
        (
            "embeddings: finite, and of unit length where promised",
            _values(index, index.columns["embeddings"]),
        ),
        ("weights: finite, channels distinct and in range", _weights(index)),
        ("ids, paths and labels: offsets, UTF-8, order", _strings(index)),
        ("tombstones: rising and in range", iter(())),  # seen when the index was opened
        ("ids: not empty, unique among live images", _unique(index)),
        ("FAISS: size, width, metric, and distances of a sample", _faiss(index)),
    ]
    for name, problems in steps:
        before = len(report.problems)
        try:
            for problem in problems:
                if not collect:
                    raise problem
                report.problems.append(str(problem))
        except IndexFormatError as error:  # that a step raised itself
            if not collect:
                raise
            report.problems.append(str(error))
        if len(report.problems) == before:
            report.checks.append(name)
        elif name == steps[0][0]:
            break  # what follows would only find the same damage again
    return report


def check_fitted(index: Index) -> None:
    """Compare what was fitted once with its checksums, before it is copied into another index."""
    check_files(index, index.fitted_files, index.manifest.fitted.directory)


def check_parts(index: Index, first: int = 0) -> None:
    """Compare the parts from `first` on with their checksums, before their rows are rewritten.

    The new files get checksums of their own, which would vouch for flipped bits copied along.
    """
    for part in index.parts[first:]:
        check_files(index, part.arrays, part.directory)


def check_tombstones(index: Index) -> None:
    """Compare the tombstones with their checksum, before they are merged or rows are dropped."""
    entry = index.manifest.tombstones
    if entry is not None:
        check_files(index, {entry.file: index.tombstones})


def check_files(index: Index, arrays: dict[str, np.ndarray], folder: str = "") -> None:
    """Compare mapped files by name with their checksums; the first that differs is an error."""
    files = index.manifest.files
    for name, array in arrays.items():
        place = f"{folder}/{name}" if folder else name
        if sha256_of(array) != files[place].sha256:
            raise broken(index.path, place, "does not match its checksum")


def _checksums(index: Index, progress: Progress | None) -> Iterator[IndexFormatError]:
    contents: dict[str, np.ndarray | int] = {
        f"{part.directory}/{name}": array
        for part in index.parts
        for name, array in part.arrays.items()
    }
    folder = index.manifest.fitted.directory
    contents |= {f"{folder}/{name}": array for name, array in index.fitted_files.items()}
    if index.manifest.tombstones is not None:
        contents[index.manifest.tombstones.file] = index.tombstones
    faiss = index.faiss_file
    if index.manifest.faiss is not None and faiss is not None and faiss.descriptor is not None:
        contents[index.manifest.faiss.file] = faiss.descriptor
    files = index.manifest.files
    total, done = sum(files[name].bytes for name in contents), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, content in contents.items():
        if sha256_of(content, tell) != files[name].sha256:
            remedy = (REBUILD,) if name.startswith("faiss-") else ()
            yield broken(index.path, name, "does not match its checksum", *remedy)


def _weights(index: Index) -> Iterator[IndexFormatError]:
    for layer in index.layers:
        yield from _values(index, *layer.fields.values(), *(layer.coarse or ()))
    for name, array in index.fitted_files.items():
        if (what := wrong_values(array)) is not None:
            yield broken(index.path, f"{index.manifest.fitted.directory}/{name}", what)


def _values(index: Index, *columns: Column) -> Iterator[IndexFormatError]:
    for part, column in product(index.parts, columns):
        for start, block in blocks(part.arrays[column.file]) if column.wrong else ():
            if column.wrong and (what := column.wrong(block)) is not None:
                where = f"in rows from {start} on, " if start else ""
                yield broken(index.path, f"{part.directory}/{column.file}", where + what)
                break


def _strings(index: Index) -> Iterator[IndexFormatError]:
    for part in index.parts:
        for name, what in _wrong_strings(part):
            yield broken(index.path, f"{part.directory}/{name}", what)


def _wrong_strings(part: Part) -> Iterator[tuple[str, str]]:
    """Yield files of a part's strings and what is wrong with each."""
    for stem in STRINGS:
        table: StringTable = getattr(part, stem)
        if (what := _wrong_offsets(table)) is not None:
            yield f"{stem}.offsets.u64", what
            return
        if (row := _not_utf8(table)) is not None:
            yield f"{stem}.utf8", f"string {row} is not UTF-8"
            return
    vocabulary = [part.labels.raw(row) for row in range(len(part.labels))]
    if any(a >= b for a, b in pairwise(vocabulary)):
        yield "labels.utf8", "the labels are not sorted, each once"
    codes = part.codes
    if len(codes) and (codes.min() < -1 or codes.max() >= len(vocabulary)):
        yield "labels.codes.i32", f"a code lies outside -1 .. {len(vocabulary) - 1}"
    if (what := _wrong_order(part)) is not None:
        yield next(name for name in part.arrays if name.startswith("ids.order.")), what


def _wrong_offsets(table: StringTable) -> str | None:
    offsets, size = np.asarray(table.offsets), len(table.blob)
    if offsets[0] != 0 or offsets[-1] != size:
        return f"the offsets run from {offsets[0]} to {offsets[-1]} where the text has 0 to {size}"
    if (offsets[1:] < offsets[:-1]).any():
        return f"the offsets fall at string {int(np.argmax(offsets[1:] < offsets[:-1]))}"
    return None


def _not_utf8(table: StringTable) -> int | None:
    """Return the first string that is not UTF-8 by itself."""
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
    keys = [(part.ids.raw(row), row) for row in order.tolist()]
    for earlier, later in pairwise(keys):
        if earlier > later:
            return f"the ids are not sorted at {short(later[0].decode('utf-8', 'replace'))}"
    return None


def _unique(index: Index) -> Iterator[IndexFormatError]:
    alive = iter(index.live(np.arange(index.n_rows)).tolist())
    seen: set[str] = set()
    for part in index.parts:
        where = f"{part.directory}/ids.utf8"
        for row, text in enumerate(part.ids.tolist()):
            is_live = next(alive)
            if not text:
                yield broken(index.path, where, f"the id of row {row} is empty")
                return
            if is_live and text in seen:
                yield broken(index.path, where, f"the id {short(text)} is live twice")
                return
            if is_live:
                seen.add(text)


def _faiss(index: Index) -> Iterator[IndexFormatError]:
    entry = index.manifest.faiss
    if entry is None or index.faiss_file is None:
        return
    loaded = index.faiss_file.read()
    if not index.n_rows:
        return
    rows = np.unique(np.linspace(0, index.n_rows - 1, _SAMPLE).astype(np.int64))
    queries = index.embeddings(rows)
    scores, positions = loaded.search(queries, 1)
    nearest = positions[:, 0]
    if nearest.max() >= index.n_rows:
        yield broken(index.path, entry.file, "returns rows out of range", REBUILD)
        return
    if type(loaded).__name__ not in _EXACT:
        return
    hit = nearest >= 0
    near = index.embeddings(nearest[hit]).astype(np.float64)
    asked = queries[hit].astype(np.float64)
    ip = index.metric == "ip"
    true = (near * asked).sum(axis=1) if ip else ((near - asked) ** 2).sum(axis=1)
    # FAISS expands |a - b|^2 in float32: its error scales with the vectors, not with the distance.
    scale = (asked**2).sum(axis=1) + (near**2).sum(axis=1)
    if (np.abs(scores[hit, 0] - true) > 1e-4 * scale + 1e-30).any():
        yield broken(index.path, entry.file, "was made from other embeddings", REBUILD)
