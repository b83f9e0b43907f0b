"""How things are printed; and the commands that only tell: info and verify."""

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Plain, as_json, printable, say, sentence, show, show_json
from ..images.progress import progress_of
from ..recipe import METHODS
from .command_line import for_command_line

if TYPE_CHECKING:
    from ..images import ImageSource
    from ..index import Index, Manifest
    from ..preprocess import Network

_JOBS = ("embedcam.offline.shard", "embedcam.progress")
"""Loggers that say how far a job is."""
_CELL = 400
_PIECE = 1 << 16


def note(options: Namespace, text: str) -> None:
    """Print something worth knowing on the error stream, so that output stays clean."""
    if options.progress is None:
        say(for_command_line(text))


def say_run(options: Namespace, network: "Network | None", batch_size: int | None) -> None:
    """Note how forward passes are run, `batch_size` None in the usual batches."""
    if network is not None:
        usual = network.usual_run
        note(options, str(replace(usual, batch_size=batch_size or usual.batch_size)))


@contextmanager
def attached(handler: logging.Handler, levels: Mapping[str, int]) -> Iterator[None]:
    """Let a handler have embedcam's log, and loggers other levels, meanwhile."""
    log, before = logging.getLogger("embedcam"), {}
    log.addHandler(handler)
    for name, level in levels.items():
        before[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def logged_as_notes(options: Namespace) -> AbstractContextManager[None]:
    """Print warnings, and how far a job is, as notes; a service's log has all of it already."""
    if options.command == "serve":
        return nullcontext()
    return attached(_Notes(options), dict.fromkeys(_JOBS, logging.INFO))


class _Notes(logging.Handler):
    def __init__(self, options: Namespace) -> None:
        super().__init__(logging.INFO)
        self._options = options

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is a warning or of a job."""
        return record.levelno >= logging.WARNING or record.name in _JOBS

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, and remember that it was said."""
        self._options.said = (*getattr(self._options, "said", ()), record.getMessage())
        note(self._options, record.getMessage())


def emit(options: Namespace, values: Mapping[str, Plain], *lines: str) -> None:
    """Print JSON where asked for, else the lines."""
    if options.json:
        show_json(values, indent=2)
    else:
        show(*lines)


def counted(number: int, what: str) -> str:
    """Return "1 image", "2,000 images", "3 queries"."""
    several = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else several}"


def some_of(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def size_text(n_bytes: float) -> str:
    """Return "296 kB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while n_bytes >= 1000 and len(units) > 1:
        n_bytes /= 1000
        units.pop(0)
    return f"{n_bytes:.3g} {units[0]}"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows of cells as lines with columns of one width; `right` are set flush right."""
    # What is escaped takes more room, so cells are made printable here.
    rows = [[sentence(cell, _CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def images_of(options: Namespace, path: str | Path, **otherwise: Any) -> "ImageSource":
    """Return the images of a folder or a CSV, and say at once what looks wrong.

    `otherwise` are arguments of `find_images` for which the options are silent.
    """
    from ..images import find_images

    for name in ("labels", "exclude", "max_pixels"):
        if getattr(options, name) is not None:
            otherwise[name] = getattr(options, name)
    source = find_images(path, **otherwise)
    options.said = source.notes
    for text in source.notes:
        note(options, f"note: {text}")
    left_out = str(source.left_out)
    if left_out and options.command not in ("build", "add"):  # which end with it
        note(options, f"not taken: {left_out}")
    return source


_TOLD = (
    "format_version", "generation", "counts", "recipe", "recipe_sha256", "sign", "method", "target",
    "norm", "triplets", "images", "network", "embedding", "metric", "layers", "fit", "faiss",
    "libraries", "compressed", "run",
)  # fmt: skip
"""Entries of the manifest that `info --json` repeats."""


def info(options: Namespace) -> None:
    """Tell what an index holds."""
    from ..index import Index

    with Index.open(options.index, with_faiss=False) as index:
        if options.ids:
            return _list_ids(options, index)
        manifest = index.manifest
        evidence = _evidence(index)
    summary = {**manifest.entries(*_TOLD), **evidence}
    emit(options, summary, options.index, *_lines(manifest, evidence))


def _list_ids(options: Namespace, index: "Index") -> None:
    """Print the ids of all live images, one a line, or one JSON list; a piece at a time."""
    live = index.live_positions()
    if options.json:
        show("[" if len(live) else "[]")
    for start in range(0, len(live), _PIECE):
        for place, name in enumerate(index.ids[live[start : start + _PIECE]], start + 1):
            show(f"  {as_json(name)}{',' if place < len(live) else ''}" if options.json else name)
    if options.json and len(live):
        show("]")


def verify(options: Namespace) -> None:
    """Check every promise of an index; the error names the file and what is wrong."""
    from ..index import Index

    shown = options.progress
    with Index.open(options.index) as index, progress_of("verifying", shown=shown):
        checks = index.verify()
        n_live = len(index)
    emit(
        options,
        {"whole": True, "images": n_live, "checks": checks},
        f"{options.index}: whole; {counted(n_live, 'image')}, {len(checks)} checks",
    )


def _evidence(index: "Index") -> dict[str, float]:
    """Count labels, images alone in their class, and those without a triplet that counted; bytes.

    An image's bytes are those beyond id, label, path, embedding and mark.
    """
    live, manifest = index.live_positions(), index.manifest
    sizes, numbers = Counter(index.labels[live]), manifest.near_share is not None
    unlabelled = sizes.pop(None, 0)
    parts = [file for part in manifest.parts for file in part.files.items()]
    known = ("ids.", "labels.", "paths.", "embeddings.", "marks.")
    kept = sum(entry.bytes for name, entry in parts if not name.startswith(known))
    marks = sum(entry.bytes for name, entry in parts if name.startswith("marks."))
    rows, shared = max(manifest.counts.rows, 1), index.shared()
    shown = shared.get("channel_values")
    return {
        "labels": len(sizes),
        "unlabelled_images": unlabelled,
        # A number needs no other image that has it.
        "labels_of_one_image": sum(size == 1 for size in sizes.values()) * (not numbers),
        "images_without_evidence": int((index.triplets_used(live) == 0).sum()),
        "concepts": len(shared.get("concept_parts", ())),
        "exemplars": 0 if shown is None else shown.shape[1],
        "text_mean": "text_mean" in shared,
        "bytes": manifest.named_bytes,
        "bytes_an_image": round(kept / rows, 1),
        "bytes_a_mark": round(marks / rows, 1),
    }


def _lines(manifest: "Manifest", numbers: Mapping[str, float]) -> list[str]:
    """Return what templates/info.txt says of an index; what it holds cannot break a line."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable("" if value is None else str(value)),
    )
    env.filters |= {"counted": counted, "size_text": size_text}
    merged = manifest.compressed
    text = env.get_template("info.txt").render(
        index=manifest,
        method=METHODS.get(manifest.method),
        fidelity=[] if merged is None else fidelity_lines(asdict(merged)),
        **numbers,
    )
    return [sentence(line) for line in text.rstrip("\n").split("\n")]


def fidelity_lines(compressed: Mapping[str, Any]) -> list[str]:
    """Return what an index of prototypes lost, as a table."""
    fidelity = compressed["fidelity"]
    cosine = {f"cosine of weights from {n}": one for n, one in fidelity["cosine"].items()}
    measured = {**cosine, "Recall@1": fidelity["recall_at_1"]}
    rows = [
        [what, *(f"{one[key]:.3f}" for key in ("prototypes", "index", "loss"))]
        for what, one in measured.items()
        if one is not None
    ]
    if not rows:
        return ["what is lost cannot be measured here: no image has another to be compared with"]
    title = f"{counted(fidelity['images'], 'image')} left out in turn"
    lines = columns([[title, "prototypes", "all images", "lost"], *rows], right=(1, 2, 3))
    known = [one["prototypes"] for one in fidelity["cosine"].values() if one is not None]
    if known and known[0] > known[-1]:
        lines.append("The nearest prototype alone tells more than several: explain with -n 1.")
    return lines
