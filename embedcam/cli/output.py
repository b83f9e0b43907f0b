"""How things are printed; and the commands that only tell: info and verify."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    EmbeddingError,
    ImageError,
    InputError,
    NetworkError,
    as_json,
    sentence,
    show,
    show_json,
)
from ..images.progress import progress_of
from ..recipe import METHODS
from .command_line import note

if TYPE_CHECKING:
    from ..images import ImageSource
    from ..images.sources import Labels
    from ..index import Index, Manifest
    from ..preprocess import AnyPreprocess

_LABEL, _CELL = 12, 400
_PIECE = 1 << 16


def emit(options: Namespace, values: Mapping[str, Any], *lines: str) -> None:
    """Print JSON where asked for, else the lines."""
    if options.json:
        show_json(values, indent=2)
    else:
        show(*lines)


def counted(number: int, what: str) -> str:
    """Return "1 image", "2,000 images"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


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


@contextmanager
def naming_skip(options: Namespace) -> Iterator[None]:
    """Let errors of a broken image among many name the option that leaves it out."""
    try:
        yield
    except (ImageError, EmbeddingError) as error:
        # Of a probe picture, which is no file, there is nothing to leave out.
        of_probe = isinstance(error, EmbeddingError) and not error.is_named
        if options.on_unreadable == "skip" or of_probe or "run the build again" in str(error):
            raise
        kind = ImageError if isinstance(error, ImageError) else NetworkError
        raise kind(f"{error}; --on-unreadable skip leaves such files out") from error


@contextmanager
def listing_ids(index: str) -> Iterator[None]:
    """Let errors of ids name the command that lists them, not what Python has for it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        if not text.startswith("the index has no image"):
            raise
        text = text.removesuffix("; see `index.ids`")
        raise InputError(f"{text}; `embedcam info {index} --ids` lists those it has") from error


def images_of(
    options: Namespace, path: str | Path, labels: "Labels", **otherwise: Any
) -> "ImageSource":
    """Return the images of a folder or a CSV, and say at once what looks wrong.

    `otherwise` are arguments of `find_images` for which the options are silent.
    """
    from ..images import find_images

    asked = {"exclude": options.exclude, "max_pixels": options.max_pixels}
    asked = {name: value for name, value in asked.items() if value is not None}
    source = find_images(path, labels, **{**otherwise, **asked})
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
    "libraries", "compressed",
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
    bytes_all, bytes_image, bytes_mark = _bytes(manifest)
    raw = manifest.to_dict()
    summary = {key: raw.get(key) for key in _TOLD}
    size = {"bytes": bytes_all, "bytes_an_image": bytes_image, "bytes_a_mark": bytes_mark}
    summary |= {**evidence, **size}
    emit(options, summary, options.index, *_lines(manifest, evidence, size))


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

    shown = False if options.quiet else None
    with Index.open(options.index) as index, progress_of("verifying", shown=shown):
        checks = index.verify()
        n_live = len(index)
    emit(
        options,
        {"whole": True, "images": n_live, "checks": checks},
        f"{options.index}: whole; {counted(n_live, 'image')}, {len(checks)} checks",
    )


def _evidence(index: "Index") -> dict[str, int]:
    """Count labels, images alone in their class, and images without a triplet that counted."""
    live = index.live_positions()
    sizes, numbers = Counter(index.labels[live]), index.manifest.near_share is not None
    unlabelled = sizes.pop(None, 0)
    return {
        "labels": len(sizes),
        "unlabelled_images": unlabelled,
        # A number needs no other image that has it.
        "labels_of_one_image": sum(size == 1 for size in sizes.values()) * (not numbers),
        "images_without_evidence": int((index.triplets_used(live) == 0).sum()),
    }


def _bytes(manifest: "Manifest") -> tuple[int, float, float]:
    """Return all bytes; an image's, beyond id, label, path, embedding, mark; and its mark's."""
    parts = [file for part in manifest.parts for file in part.files.items()]
    known = ("ids.", "labels.", "paths.", "embeddings.", "marks.")
    kept = sum(entry.bytes for name, entry in parts if not name.startswith(known))
    marks = sum(entry.bytes for name, entry in parts if name.startswith("marks."))
    rows = max(manifest.counts.rows, 1)
    return manifest.named_bytes, round(kept / rows, 1), round(marks / rows, 1)


def _lines(
    manifest: "Manifest", evidence: Mapping[str, int], size: Mapping[str, float]
) -> list[str]:
    layer, network = manifest.layers[0], manifest.network
    normalized = "L2-normalised" if manifest.embedding.normalized else "not normalised"
    coarse = layer.coarse_grid
    libraries = ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())
    merged = []
    if manifest.compressed is not None:
        compressed = asdict(manifest.compressed)
        merged = [_merged_line(compressed), *fidelity_lines(compressed)]
    shown = [
        ("images", _images_line(manifest, evidence)),
        ("", _evidence_line(manifest, evidence)),
        *(("" if number else "prototypes", line) for number, line in enumerate(merged)),
        ("network", _network_line(network)),
        *(
            ("" if number else "layer",
             f"{one.name}: {one.channels:,} channels{_on(one.grid)}"
             f"{'; what follows does not pool' if one.uses_positions else ''}")
            for number, one in enumerate(manifest.layers)
        ),
        ("input", _input_line(network.preprocess if network else None)),
        ("embedding", f"{manifest.embedding.width:,} numbers, {normalized}"),
        ("weights", _weights_line(manifest)),
        ("stored as", _encoding_line(layer.encoding)),
        ("own maps", "none" if coarse is None else f"{coarse[0]} x {coarse[1]}"),
        ("trust", _trust_line(manifest)),
        ("match", _match_line(manifest.match_calibration)),
        ("search", _search_line(manifest)),
        ("size", f"{size_text(size['bytes'])}; {size['bytes_an_image']:g} bytes an image beyond "
                 "id, label, path and embedding"),
        ("files", _files_line(manifest.images, size["bytes_a_mark"])),
        ("recipe", manifest.recipe_sha256[:16]),
        ("made with", f"{libraries}; generation {manifest.generation}"),
    ]  # fmt: skip
    lines = [f"  {name:<{_LABEL}}{sentence(value)}" for name, value in shown if value]
    if manifest.counts.added_after_fit:
        lines += ["", "  `embedcam build --refit` fits again on all images."]
    return lines


def _match_line(match: Mapping[str, Any] | None) -> str:
    if not match:
        return "not calibrated; `embedcam calibrate INDEX --no-trust` does, without pictures"
    one = next(iter(match.values()))
    return f"calibrated on {counted(one.images, 'image')}"


def _trust_line(manifest: "Manifest") -> str:
    trust, added = manifest.trust_calibration, manifest.counts.added_after_fit
    if not trust:
        return "not calibrated; `embedcam calibrate INDEX` does"
    one = next(iter(trust.values()))
    when = f"; {counted(added, 'image')} more came after the build" if added else ""
    worth = ", ".join(
        f"{values.correlations[0]:.2f} to {values.correlations[-1]:.2f} from "
        f"{counted(values.neighbors, 'neighbour')}"
        for values in sorted(trust.values(), key=lambda values: values.neighbors)
    )
    return f"{worth}; calibrated on {counted(one.images, 'image')} that queried it{when}"


def _images_line(manifest: "Manifest", evidence: Mapping[str, int]) -> str:
    counts, labels = manifest.counts, evidence["labels"]
    what = "label" if manifest.near_share is None else "number"
    line = f"{counts.live:,}, " + (counted(labels, what) if labels else "no labels")
    removed = counts.rows - counts.live
    if removed:
        line += f"; {removed:,} removed, not yet compacted"
    if counts.added_after_fit:
        line += f"; {counts.added_after_fit:,} added after the fit"
    return line


def _evidence_line(manifest: "Manifest", evidence: Mapping[str, int]) -> str:
    sentences = []
    # An image without a label among labelled ones is a class of its own.
    alone = evidence["labels_of_one_image"] + evidence["unlabelled_images"]
    # Where labels draw the positives: not for the centred target, nor for given triplets.
    drawn = manifest.target != "centred" and manifest.triplets.sampling != "given"
    drawn &= not manifest.is_compressed  # a prototype alone is no image alone
    if drawn and evidence["labels"] and alone:
        unlabelled = evidence["unlabelled_images"]
        without = f" ({unlabelled:,} of them without a label)" if unlabelled else ""
        sentences.append(
            f"{counted(alone, 'image')} alone in {'its' if alone == 1 else 'their'} class{without},"
            " with nearest neighbours as positives"
        )
    if evidence["images_without_evidence"]:
        sentences.append(
            f"{counted(evidence['images_without_evidence'], 'image')} without evidence: every "
            "triplet was satisfied"
        )
    return "; ".join(sentences)


def _merged_line(compressed: Mapping[str, Any]) -> str:
    each = " for each label" if compressed["per_class"] else ""
    return (
        f"{compressed['prototypes']:,}{each} asked for, {compressed['rows']:,} made of "
        f"{counted(compressed['from_rows'], 'image')}, seed {compressed['seed']}"
    )


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


def _network_line(network: Any) -> str:
    if network is None:
        return "not known: built from features"
    loading = network.loading or {}
    known = [network.name or "not named"]
    weights = loading.get("weights")
    if weights is not None:
        known.append("random weights" if weights == "random" else f"weights {weights}")
    if loading.get("head") is not None:
        known.append(f"head {loading['head']}")
    return ", ".join(known)


def _input_line(preprocess: "AnyPreprocess | None") -> str:
    if preprocess is None:
        return ""
    from ..preprocess import Preprocess

    if not isinstance(preprocess, Preprocess):
        return f"the caller's own {preprocess.name}"
    (height, width), crop = preprocess.size, preprocess.resize == "crop"
    return f"{height} x {width}, " + ("centre crop" if crop else "whole picture squashed")


def _weights_line(manifest: "Manifest") -> str:
    entry, triplets = METHODS.get(manifest.method), manifest.triplets
    method = manifest.method if entry is None else entry.title
    if entry is not None and not entry.targeted:
        return f"{method}, which ignores targets: what stands out, not what matches"
    named = {name: f"{name} target" for name in ("centred", "discriminant", "distinctive")}
    target = named.get(manifest.target, "triplet margin")
    norm = "" if entry is not None and entry.scored else f", {manifest.norm} the norm"
    line = f"{method} of the {target}{norm}"
    if manifest.target == "centred":
        return line
    count, sampling = triplets.count, triplets.sampling
    drawn = {
        "all": "the exact mean of all triplets",
        "given": "triplets of the user's own",
    }.get(sampling, f"{count} {sampling} triplets an image, seed {triplets.seed}")
    hinge = f", hinge at {triplets.margin:g}" if triplets.hinge else ""
    return f"{line}; {drawn}{hinge}"


def _encoding_line(encoding: Any) -> str:
    if encoding.name == "dense":
        return f"dense, all channels, {encoding.dtype}"
    if encoding.name == "top-m":
        by = "value" if encoding.by == "signed" else "magnitude"
        return f"top {encoding.m} channels by {by}, {encoding.dtype}"
    if encoding.name == "by-position":
        return f"by position, {encoding.rank} principal components, {encoding.dtype}"
    origin = "the head's own basis" if encoding.origin == "head" else "basis by PCA"
    stored = "" if encoding.codes == "stored" else ", codes derived from the embedding"
    return f"low-rank {encoding.rank}, {origin}{stored}, {encoding.dtype}"


def _search_line(manifest: "Manifest") -> str:
    if manifest.faiss is None:
        return "none; neighbours are named by the caller"
    metric = {"l2": "squared L2", "ip": "inner product"}[manifest.metric]
    return f"FAISS {manifest.faiss.factory}, {metric}"


def _files_line(images: Any, bytes_mark: float) -> str:
    if bytes_mark:
        return f"marked, {bytes_mark:g} bytes an image more: a picture that was replaced is told"
    return "" if images is None else "not marked: whether a picture was replaced cannot be told"


def _on(grid: Any) -> str:
    return "" if grid is None else f" on a grid of {grid[0]} x {grid[1]}"
