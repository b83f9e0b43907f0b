"""Commands that make or change an index: build, add, remove, compact, compress; the demo."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .._files import refuse_device
from ..errors import InputError, RecipeError, printable, reason, short, show_json
from ..images.progress import progress_of
from .networks import named, network_of_index, network_options, refuse_nul, refuse_unknown
from .report import (
    counted,
    emit,
    fidelity_lines,
    found_images,
    listing_ids,
    naming_skip,
    note,
    size_text,
    some_of,
)

_RECIPE = (
    "method", "target", "norm", "sampling", "hinge", "margin", "seed", "layers", "fill",
    "encoding", "rank", "m", "by", "dtype", "faiss", "metric",
)  # fmt: skip
_IMAGES: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "labels": (str,),
    "on_unreadable": (str,),
    "exclude": (str, list),
    "max_pixels": (int,),
}
"""Entries of a recipe's table of images, and their types."""


def build(options: argparse.Namespace) -> None:
    """Build an index from images, or from features."""
    recipe, images, network = _recipe(options)
    kept = options.refit and not options.recipe and (Path(options.index) / "manifest.json").exists()
    if options.embeddings or options.pooled:
        report = _build_features(options, recipe, network)
    else:
        report = _build_images(options, recipe, images, network)
    _report(options, report, "built")
    if kept:
        note(
            options,
            f"note: the recipe was the index's (target {recipe.resolved_target}, method "
            f"{recipe.method}) but for what the command said; --recipe default begins anew",
        )


def add(options: argparse.Namespace) -> None:
    """Add images to an index."""
    from ..index import ADD_INSTEAD, Index
    from ..offline import BuildReport, add_images

    if options.update and options.skip_existing:
        raise InputError("--update looks at the existing images; leave out --skip-existing")
    source = found_images(options, options.images, options.labels or "auto")
    with Index.open(options.index) as index:
        index.refuse_prototypes(ADD_INSTEAD)  # before a network is loaded
        network = network_of_index(index.manifest, network_options(options))
        if options.skip_existing:
            source = _without_known(options, source, index)
            if not len(source):
                none = BuildReport(Path(options.index), 0, [], left_out=source.left_out)
                return _report(options, none, "added to")
    with naming_skip(options):
        report = add_images(
            source,
            named(network),
            options.index,
            update=options.update,
            batch_size=options.batch_size,
            workers=options.workers,
            on_unreadable=options.on_unreadable or "fail",
            scratch_gb=options.scratch_gb,
            progress=False if options.quiet else None,
        )
    _report(options, report, "added to")


def _without_known(options: argparse.Namespace, source: Any, index: Any) -> Any:
    """The images whose ids the index does not hold."""
    known = index.find_live(source.ids)
    if known:
        note(options, f"{counted(len(known), 'image')} left out: in the index already")
    return source.only([place for place, name in enumerate(source.ids) if name not in known])


def remove(options: argparse.Namespace) -> None:
    """Remove images by id."""
    from ..index import REMOVED, Index
    from ..index import remove as remove_ids

    ids = [*options.ids, *(_lines(options.file) if options.file else [])]
    if not ids:
        raise InputError("no id was given; name some, or give a file of them with --from")
    # A folder without an index is refused before a lock file appears in it.
    Index.open(options.index, with_faiss=False).close()
    try:
        with listing_ids(options.index):
            removed = remove_ids(options.index, ids)
    except InputError as error:
        known, gone, _ = str(error).partition(REMOVED)
        if not gone:
            raise
        step = "nothing to do" if len(ids) == 1 else "leave it out; nothing was removed"
        raise InputError(f"{known}{gone}; {step}") from error
    with Index.open(options.index, with_faiss=False) as index:
        left = len(index)
    emit(
        options,
        {"removed": removed, "images": left},
        f"{options.index}: {counted(removed, 'image')} removed, {left:,} left; "
        "`embedcam compact` drops their bytes",
    )


def compact(options: argparse.Namespace) -> None:
    """Drop the bytes of removed images."""
    from ..index import Index
    from ..index import compact as compact_parts

    Index.open(options.index, with_faiss=False).close()  # as in `remove`
    again = options.rebuild_faiss
    with progress_of("compacting", shown=False if options.quiet else None):
        dropped = compact_parts(options.index, rebuild_faiss=again is not None and (again or True))
    with Index.open(options.index, with_faiss=False) as index:
        left = len(index)
    emit(
        options,
        {"dropped": dropped, "images": left},
        f"{options.index}: compact; {counted(dropped, 'removed image')} dropped, {left:,} left",
    )


def compress(options: argparse.Namespace) -> None:
    """Write a small index of prototypes, and say what is lost."""
    from ..prototypes import compress as compress_index

    report = compress_index(
        options.index,
        options.output,
        options.prototypes,
        per_class=options.per_class,
        seed=options.seed,
        replace=options.replace,
        progress=False if options.quiet else None,
    )
    about = report.compressed
    lines = [
        f"{report.path}: {counted(report.n_prototypes, 'prototype')} of "
        f"{counted(report.n_images, 'image')} in {report.seconds:.1f} s; "
        f"{size_text(about['from_bytes'])} before, {size_text(report.bytes)} now",
        *(f"  {line}" for line in fidelity_lines(about)),
    ]
    emit(options, {**asdict(report), "path": str(report.path)}, *lines)


def calibrate(options: argparse.Namespace) -> None:
    """Calibrate match and trust for the images that an index holds."""
    from ..index import Index
    from ..offline import calibrate_index

    with Index.open(options.index, with_faiss=False) as index:
        network = None
        if not options.no_trust and index.manifest.network is not None:
            network = named(network_of_index(index.manifest, network_options(options)))
    found = calibrate_index(
        options.index,
        network,
        images=options.images,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=False if options.quiet else None,
    )
    told = ", ".join(f"{name} calibrated on {counted(n, 'image')}" for name, n in found.items())
    emit(options, found, f"{options.index}: {told}")
    if network is None and not options.no_trust:
        note(options, "note: built from features alone, so no pictures to calibrate trust with")


def demo(options: argparse.Namespace) -> None:
    """The main job, end to end, on handwritten digits."""
    from ..demo import run_demo

    shown = not (options.quiet or options.json)
    summary = run_demo(options.folder, seed=options.seed, progress=shown)
    if options.json:
        show_json(summary, indent=2)


def _build_images(
    options: argparse.Namespace, recipe: Any, images: dict[str, Any], network: dict[str, Any]
) -> Any:
    from ..images import MAX_PIXELS
    from ..index import Index
    from ..offline import build_index, indexed_images

    path = options.images or images.get("path")
    own_maps = not options.no_own_maps
    if options.refit and (path is None or (Path(options.index) / "manifest.json").exists()):
        # What is not said is as it was; without images, those that the index knows are taken.
        with Index.open(options.index) as index:
            if path is None:
                if options.exclude:
                    raise InputError("--exclude goes with IMAGES; name their folder, or remove ids")
                pixels = options.max_pixels or images.get("max_pixels", MAX_PIXELS)
                source = indexed_images(index, max_pixels=pixels)
            # An index from features had no maps to choose.
            if index.manifest.images is not None:
                own_maps &= index.manifest.layers[0].coarse_grid is not None
            if index.manifest.network is not None or not network.get("network"):
                network = network_of_index(index.manifest, network)
    elif path is None:
        raise InputError(
            "no images were given; name a folder or a CSV before the index, or set [images] path "
            "in the recipe"
        )
    if path is not None:
        kept = {name: images[name] for name in ("exclude", "max_pixels") if name in images}
        source = found_images(options, path, options.labels or images.get("labels", "auto"), **kept)
    loaded = named(network)
    if network.get("layer") is None:
        called = loaded.name or network["network"]
        note(options, f"{called}: explaining layer {loaded.layer} (--layer takes another)")
    triplets = _given_triplets(options)
    with naming_skip(options):
        return build_index(
            source,
            loaded,
            options.index,
            recipe,
            batch_size=options.batch_size,
            workers=options.workers,
            on_unreadable=options.on_unreadable or images.get("on_unreadable", "fail"),
            triplets=triplets,
            own_maps=own_maps,
            trust=not options.no_trust,
            scratch_gb=options.scratch_gb,
            replace=options.refit,
            progress=False if options.quiet else None,
        )


def _build_features(options: argparse.Namespace, recipe: Any, network: dict[str, Any]) -> Any:
    from ..offline.features import build_from_features, read_array, read_head

    if not (options.embeddings and options.pooled and options.grid):
        raise InputError(
            "an index from features needs --embeddings, --pooled and --grid; one is missing"
        )
    if options.images:
        raise InputError("give either IMAGES or --embeddings and --pooled, not both")
    pooled = read_array(options.pooled)
    embeddings = read_array(options.embeddings)
    ids, labels = _ids(options.ids)
    return build_from_features(
        embeddings,
        pooled,
        options.index,
        recipe,
        grid=options.grid,
        head=None if network.get("head") is None else read_head(network["head"]),
        normalize=network.get("normalize", True),
        ids=ids,
        labels=labels,
        positive_pooled=(
            None if options.positive_pooled is None else read_array(options.positive_pooled)
        ),
        triplets=_given_triplets(options),
        network=named(network) if network.get("network") else None,
        replace=options.refit,
        progress=False if options.quiet else None,
    )


def _recipe(options: argparse.Namespace) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The recipe with the command line's choices over it, and its images and network."""
    from ..recipe.recipe import Recipe, read_toml, shipped_recipe
    from ..targets import WHITENED

    recipe = Recipe()
    images: dict[str, Any] = {}
    network: dict[str, Any] = {}
    if options.recipe:
        recipe, images, network = read_toml(shipped_recipe(options.recipe))
    elif options.refit and (Path(options.index) / "manifest.json").exists():
        from ..index import Index

        with Index.open(options.index) as index:
            recipe = Recipe.of_index(index.manifest)
    changes = {n: getattr(options, n) for n in _RECIPE if getattr(options, n) is not None}
    if options.triplets is not None:
        if options.triplets.endswith(".npy"):
            changes["sampling"] = "given"
        else:
            try:
                changes["triplets"] = int(options.triplets)
            except ValueError:
                raise RecipeError(
                    f"--triplets {options.triplets}: give a number, or a .npy file of shape "
                    "[N S 2]; for every triplet there is use --sampling all"
                ) from None
    draws = changes.keys() & {"triplets", "hinge", "sampling"}
    if draws and "target" not in changes and recipe.target in WHITENED:
        changes["target"] = "auto"  # as a build without a target decides it for these draws
    refuse_unknown("[images]", images, _IMAGES)
    for name, value in images.items():
        if not isinstance(value, _IMAGES[name]) or isinstance(value, bool):
            kind = " or ".join(one.__name__ for one in _IMAGES[name])
            raise RecipeError(f"[images] {name} = {short(value)} should be of type {kind}")
        if isinstance(value, str):
            refuse_nul(f"[images] {name}", value)
    if options.labels == "numbers":
        changes["labels"] = "numbers"
    if options.option:
        changes["options"] = dict(options.option)
    if "encoding" not in changes and {"m", "by"} & changes.keys():
        changes["encoding"] = "top-m"
    changed = replace(recipe, **changes)
    _refuse_unused(changed, changes)
    return changed, images, {**network, **network_options(options)}


def _refuse_unused(recipe: Any, changes: dict[str, Any]) -> None:
    """Refuse an option that the other choices leave without a meaning, rather than ignore it."""
    hinged = recipe.hinge or recipe.sampling == "semihard"
    for name, option, used, needs in (
        ("m", "--top-m", recipe.encoding == "top-m", "--encoding top-m"),
        ("by", "--by", recipe.encoding == "top-m", "--encoding top-m"),
        ("rank", "--rank", recipe.encoding == "low-rank", "--encoding low-rank"),
        ("margin", "--margin", hinged, "--hinge or --sampling semihard"),
    ):
        if name in changes and not used:
            raise RecipeError(f"{option} means nothing here: it goes with {needs}")


def _given_triplets(options: argparse.Namespace) -> Any:
    if options.triplets is None or not options.triplets.endswith(".npy"):
        return None
    from ..offline.features import read_array

    return read_array(options.triplets)


def _ids(path: str | None) -> tuple[list[str] | None, list[str | None] | None]:
    """Ids and labels from a CSV with the columns id[,label]."""
    if path is None:
        return None, None
    from ..images.sources import csv_rows

    rows = [row for _, row in csv_rows(Path(path), ["id"], "id[,label]")]
    if not rows:
        raise InputError(f"{path}: has no lines below its header")
    labels = [row["label"] or None for row in rows] if "label" in rows[0] else None
    return [row["id"] for row in rows], labels


def _lines(path: str) -> list[str]:
    refuse_device(path)
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the ids cannot be read ({reason(error)})") from error
    # Only line ends divide: an id may hold whatever else `splitlines` takes for one.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _changes(options: argparse.Namespace, changes: Any) -> str:
    """What an update did."""
    if changes.n_unmarked:
        note(
            options,
            f"note: {counted(changes.n_unmarked, 'image')} of the index without a mark of the "
            "file, so whether one changed cannot be told; `embedcam build --refit` adds marks",
        )
    found = (("new", changes.new), ("changed", changes.changed), ("vanished", changes.vanished))
    told = [f"{len(ids):,} {what} ({some_of(ids)})" for what, ids in found if ids]
    same = f"{changes.n_same:,} as before"
    return f"{', '.join(told)}; {same}," if told else f"nothing to update, {same},"


def _report(options: argparse.Namespace, report: Any, verb: str) -> None:
    for name, why in report.skipped[:20]:
        # A reason begins with the file's path, which mostly ends in its id.
        path, _, rest = why.partition(": ")
        note(options, f"skipped {name}: {rest if path.endswith(printable(name)) else why}")
    if len(report.skipped) > 20:
        note(options, f"... and {len(report.skipped) - 20} more")
    # An image without a label is a class of its own where labels draw the positives.
    unlabelled = min(report.n_unlabelled, report.n_single)
    for number, what in (
        (report.n_single - unlabelled, "alone with a label"),
        (unlabelled, "without a label"),
    ):
        if number:
            note(
                options,
                f"{counted(number, 'image')} {what}: the nearest neighbours stand in as positives",
            )
    if report.n_without_triplets:
        note(
            options,
            f"{counted(report.n_without_triplets, 'image')} without evidence: every triplet was "
            "satisfied",
        )
    for text in report.taken():
        if text not in getattr(options, "said", ()):
            note(options, text)
    took = f"in {sum(report.seconds.values()):.1f} s"
    if report.changes is not None:
        text = f"{report.path}: {_changes(options, report.changes)} {took}"
    elif not report.n_images:
        text = f"{report.path}: holds these images already; nothing to do"
    elif verb == "built":
        text = f"{report.path}: built, {counted(report.n_images, 'image')} {took}"
    else:
        text = f"{report.path}: {counted(report.n_images, 'image')} added {took}"
    emit(options, {**asdict(report), "path": str(report.path)}, text)
