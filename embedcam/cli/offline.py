"""Commands that make or change an index, or files from one; the demo."""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import refuse_device
from .._options import Values, checked_values, chosen, settings_of
from ..errors import InputError, RecipeError, printable, reason, show_json
from ..images.places import shard_of
from ..images.progress import Advance, progress_of
from ..recipe import WHITENED, Recipe
from ..recipe.recipe import read_toml, shipped_recipe
from .networks import (
    ImageSettings,
    NetworkSettings,
    load_named,
    loading_of_file,
    network_again,
    network_of_index,
    run_by,
    runtime_of,
    torch_network,
)
from .output import counted, emit, fidelity_lines, images_of, note, size_text, some_of

if TYPE_CHECKING:
    import numpy as np

    from ..images import ImageSource
    from ..images.texts import LabelColumn, Texts
    from ..index import RunEntry
    from ..network import EmbeddingNetwork
    from ..offline import BuildReport, RayEngine
    from ..offline.report import Changes

_TOLD = 1 << 10
"""Lines read between two looks at how far it is."""


def build(options: Namespace) -> None:
    """Build an index from images, or from features."""
    again = options.refit and (Path(options.index) / "manifest.json").exists()
    engine = _engine(options)
    recipe, images, network = _choices(options, again)
    if options.embeddings or options.pooled:
        if engine is not None:
            raise InputError("features need no engine to look at images; leave out --engine")
        report = _build_features(options, recipe, network)
    else:
        report = _build_images(options, recipe, images, network, again, engine)
    _report(options, report, "built")
    if again and not options.recipe:
        note(
            options,
            f"note: the recipe was the index's (target {recipe.resolved_target}, method "
            f"{recipe.method}) but for what the command said; --recipe default begins anew",
        )


def _work(options: Namespace, on_unreadable: str = "fail") -> Values:
    """Return how work is done, for `build_index` and `add_images`."""
    names = ("batch_size", "workers", "scratch_gb", "progress")
    asked = {name: getattr(options, name) for name in names}
    return {**asked, "on_unreadable": options.on_unreadable or on_unreadable}


def _engine(options: Namespace) -> "RayEngine | None":
    """Return what looks at the images in place of this process."""
    about = ("ray_address", "ray_workers", "num_gpus", "job")
    if options.engine is None:
        for name in about:
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with --engine ray")
        return None
    from ..offline import RayEngine

    return RayEngine(*(getattr(options, name) for name in about))


def add(options: Namespace) -> None:
    """Add images to an index."""
    from ..offline import BuildReport, add_images

    engine = _engine(options)
    source, network, earlier = _additions(options, options.index)
    if options.skip_existing and not len(source):
        report = BuildReport(Path(options.index), 0, [], left_out=source.left_out)
        return _report(options, report, "added")
    with run_by(options, load_named(network), earlier) as loaded:
        work = _work(options)
        how = {"update": options.update, "engine": engine, **work}
        report = add_images(source, loaded, options.index, **how)
    _report(options, report, "added")


def plan(options: Namespace) -> None:
    """Divide a build, or an addition, into pieces, and write the job to a folder."""
    from ..offline import plan_job

    work = _work(options)
    del work["workers"], work["progress"]
    _refuse_unused(options)
    if options.add_to:
        source, named, earlier = _additions(options, options.add_to)
        if not len(source):
            raise InputError(
                f"{options.add_to} holds these images already; there is nothing to add"
            )
        where = {"add_to": options.add_to, **work}
        with run_by(options, load_named(named), earlier) as network:
            report = plan_job(source, network, options.job, pieces=options.pieces, **where)
    else:
        options.index = options.refit
        again = bool(options.refit)
        recipe, images, named = _choices(options, again)
        source, loaded, own_maps, earlier = _inputs(options, recipe, images, named, again)
        work["on_unreadable"] = options.on_unreadable or images.get("on_unreadable", "fail")
        with run_by(options, loaded, earlier) as network:
            work["batch_size"] = work["batch_size"] or network.repeat_run(earlier)
            report = plan_job(
                source,
                network,
                options.job,
                recipe,
                pieces=options.pieces,
                triplets=_given_triplets(options),
                prompts=_prompts(options),
                own_maps=own_maps,
                trust=not options.no_trust,
                replace=again,
                **work,
            )
    if report.not_taken:
        note(options, f"not taken: {report.not_taken}")
    for text in report.notes:
        note(options, text)
    last, times = report.n_pieces - 1, ("", ", twice", ", three times")[report.rounds - 1]
    numbers = f"I = 0 to {last:,}" if last else "I = 0"
    lines = [
        f"{report.path}: {counted(report.n_images, 'image')} in "
        f"{counted(report.n_pieces, 'piece')}",
        f"  do each piece{times}: embedcam shard {report.path} I, {numbers}",
        f"  then: embedcam merge {report.path} {options.add_to or options.refit or 'INDEX'}",
    ]
    emit(options, {**asdict(report), "path": str(report.path)}, *lines)


def _refuse_unused(options: Namespace) -> None:
    """Refuse options of a plan that would be ignored."""
    if not options.add_to:
        if options.skip_existing:
            raise InputError("--skip-existing goes with --add INDEX; give both, or neither")
        return
    flags = [settings_of(Recipe)[name].flag or name for name in chosen(options, Recipe)]
    flags += [
        name for name in ("recipe", "no_own_maps", "no_trust", "prompts") if getattr(options, name)
    ]
    if flags:
        named = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        raise InputError(
            f"--add takes images in by the recipe of {options.add_to}; leave out {named}, or plan "
            "the index anew with --refit"
        )


def shard(options: Namespace) -> None:
    """Do what can be done of a piece of a job now."""
    from ..offline import run_shard

    work = {"workers": options.workers, "progress": options.progress}
    report = run_shard(options.job, options.piece, options.of, _network_of_job(options), **work)
    _skipped(options, report.skipped)
    which = f"{report.path}: piece {report.piece:,} of {report.of:,}"
    waits = f"piece{'s' * (len(report.waits_for) > 1)} {numbers_of(report.waits_for)}"
    if report.done == report.rounds:
        text = "done" if report.n_images else "nothing in it, as pieces are whole chunks"
    elif report.waits_for:
        steps = ("embedded", "weighed")[report.done - 1]
        text = f"{steps}; do it again once {waits} is {steps} too, or leave the rest to the merge"
        text = text.replace(f"{waits} is", f"{waits} are") if len(report.waits_for) > 1 else text
    else:
        text = "embedded; do it again, or leave the rest to the merge"
    images = counted(report.n_images, "image")
    emit(options, {**asdict(report), "path": str(report.path)}, f"{which}, {images}: {text}")


def numbers_of(pieces: "Sequence[int]") -> str:
    """Return "0, 3, 4, ..." of a job's pieces."""
    return ", ".join(f"{one:,}" for one in pieces[:10]) + (", ..." if len(pieces) > 10 else "")


def merge(options: Namespace) -> None:
    """Make an index from the pieces of a job, or add them to one."""
    from ..errors import PiecesMissing
    from ..offline import merge_job, missing_pieces
    from ..offline.job import read_choices

    kind = read_choices(Path(options.job)).kind
    work = {"workers": options.workers, "progress": options.progress}
    try:
        if missing := missing_pieces(options.job):  # before a network is loaded
            raise PiecesMissing(options.job, missing, read_choices(Path(options.job)).n_pieces)
        report = merge_job(options.job, options.index, _network_of_job(options), **work)
    except PiecesMissing as error:
        if options.json:
            show_json({"path": options.job, "missing": error.pieces}, indent=2)
        raise
    _report(options, report, "added" if kind == "add" else "built")


def _network_of_job(options: Namespace) -> "EmbeddingNetwork":
    """Return the network of a job as it was planned, but for what the options say."""
    from ..offline.job import read_choices

    loading = read_choices(Path(options.job)).loading or {}
    return load_named(network_again(loading, chosen(options, NetworkSettings), "job", "planned"))


def _additions(options: Namespace, path: str) -> tuple["ImageSource", Values, "RunEntry | None"]:
    """Return the images to add to an index, how its network is loaded, and how it was run."""
    from ..index import ADD_INSTEAD, Index

    source = images_of(options, options.images)
    with Index.open(path) as index:
        index.refuse_prototypes(ADD_INSTEAD)  # before a network is loaded
        network = network_of_index(index.manifest, chosen(options, NetworkSettings))
        earlier = index.manifest.run
        known = index.find_live(source.ids) if options.skip_existing else ()
    if known:
        note(options, f"{counted(len(known), 'image')} left out: in the index already")
        source = source.only([row for row, name in enumerate(source.ids) if name not in known])
    runtime_of(options, earlier)
    return source, network, earlier


def remove(options: Namespace) -> None:
    """Remove images by id."""
    from ..index import REMOVED
    from ..index import remove as remove_ids

    ids = [*options.ids, *(_lines_of(options.file) if options.file else [])]
    if not ids:
        raise InputError("no id was given; name some, or give a file of them with --from")
    before = _n_images(options.index)
    try:
        removed = remove_ids(options.index, ids)
    except InputError as error:
        known, gone, _ = str(error).partition(REMOVED)
        if not gone:
            raise
        step = "nothing to do" if len(ids) == 1 else "leave it out; nothing was removed"
        raise InputError(f"{known}{gone}; {step}") from error
    left = before - removed
    told = f"{counted(removed, 'image')} removed, {left:,} left; `embedcam compact` drops their"
    emit(options, {"removed": removed, "images": left}, f"{options.index}: {told} bytes")


def _n_images(path: str) -> int:
    """Count images; a folder without an index is refused before a lock file appears in it."""
    from ..index import Index

    with Index.open(path, with_faiss=False) as index:
        return len(index)


def _lines_of(path: str) -> list[str]:
    refuse_device(path)
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the ids cannot be read ({reason(error)})") from error
    # Only line ends divide: an id may hold whatever else `splitlines` takes for one.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def compact(options: Namespace) -> None:
    """Drop the bytes of removed images."""
    from ..index import compact as compact_parts
    from ..index.faiss_build import choice_note
    from ..index.manifest import read

    images, asked = _n_images(options.index), options.rebuild_faiss
    shown = partial(progress_of, shown=options.progress)
    dropped = compact_parts(options.index, rebuild_faiss=asked, stage=shown)
    text = f"compact; {counted(dropped, 'removed image')} dropped, {images:,} left"
    entry = read(Path(options.index)).faiss
    if isinstance(asked, str) and entry is not None:
        note = choice_note(asked, entry.factory, images)
        text += "" if note is None else f"; {note}"
    emit(options, {"dropped": dropped, "images": images}, f"{options.index}: {text}")


def compress(options: Namespace) -> None:
    """Write a small index of prototypes, and say what is lost."""
    from ..prototypes import compress as compress_index

    asked = {name: getattr(options, name) for name in ("per_class", "seed", "replace")}
    places = options.index, options.output, options.prototypes
    report = compress_index(*places, **asked, progress=options.progress)
    about = report.compressed
    lines = [
        f"{report.path}: {counted(report.n_prototypes, 'prototype')} of "
        f"{counted(report.n_images, 'image')} in {report.seconds:.1f} s; "
        f"{size_text(about['from_bytes'])} before, {size_text(report.bytes)} now",
        *(f"  {line}" for line in fidelity_lines(about)),
    ]
    emit(options, {**asdict(report), "path": str(report.path)}, *lines)


def calibrate(options: Namespace) -> None:
    """Calibrate match and trust for the images that an index holds."""
    from ..index import Index
    from ..offline import calibrate_index

    with Index.open(options.index, with_faiss=False) as index:
        loads = not options.no_trust and index.manifest.network is not None
        network = torch_network(options, index.manifest) if loads else None
    counts = calibrate_index(
        options.index,
        network,
        images=options.images,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=options.progress,
    )
    told = ", ".join(f"{name} calibrated on {counted(n, 'image')}" for name, n in counts.items())
    emit(options, counts, f"{options.index}: {told}")
    if network is None and not options.no_trust:
        note(options, "note: built from features alone, so no pictures to calibrate trust with")


def export(options: Namespace) -> None:
    """Write an index's network as one ONNX file, checked against torch."""
    from ..export import check_packages, check_target, export_onnx
    from ..index import Index

    check_packages()  # before the network is loaded, as what cannot be written
    check_target(options.output)
    with Index.open(options.index, with_faiss=False) as index:
        network = torch_network(options, index.manifest)
        report = export_onnx(index, network, options.output, progress=options.progress)
    text = f"{size_text(report.bytes)}, layer {', '.join(report.layers)}, {report.head} head"
    text += f"; off from torch by {report.difference:.1g}; {report.seconds:.1f} s"
    emit(options, {**asdict(report), "path": str(report.path)}, f"{report.path}: {text}")


def demo(options: Namespace) -> None:
    """Run the main job, end to end, on handwritten digits."""
    from ..demo import run_demo

    shown = options.progress is None and not options.json
    summary = run_demo(options.folder, seed=options.seed, progress=shown)
    if options.json:
        show_json(summary, indent=2)


def _choices(options: Namespace, again: bool) -> tuple[Recipe, Values, Values]:
    """Return the recipe with the command line's choices over it, and its images and network.

    The recipe is the one named, or, where an index is built `again`, its own.
    """
    recipe, images, network = Recipe(), Values(), Values()
    if options.recipe:
        recipe, images, network = read_toml(shipped_recipe(options.recipe))
        images = checked_values(ImageSettings, images, "[images]")
    elif again:
        from ..index import Index

        with Index.open(options.index) as index:
            recipe = Recipe.of_index(index.manifest)
    changes = chosen(options, Recipe)
    if options.labels == "numbers":
        changes["labels"] = "numbers"
    if isinstance(changes.get("triplets"), str):
        del changes["triplets"]
        changes["sampling"] = "given"
    draws = changes.keys() & {"triplets", "hinge", "sampling"}
    if draws and "target" not in changes and recipe.target in WHITENED:
        changes["target"] = "auto"  # as a build without a target decides it for these draws
    if "encoding" not in changes and {"m", "by"} & changes.keys():
        changes["encoding"] = "top-m"
    changed = replace(recipe, **changes)
    # An option that the other choices leave without a meaning is refused rather than ignored.
    hinged = changed.hinge or changed.sampling == "semihard"
    for name, option, used, needs in (
        ("m", "--top-m", changed.encoding == "top-m", "--encoding top-m"),
        ("by", "--by", changed.encoding == "top-m", "--encoding top-m"),
        ("rank", "--rank", changed.encoding == "low-rank", "--encoding low-rank"),
        ("margin", "--margin", hinged, "--hinge or --sampling semihard"),
    ):
        if name in changes and not used:
            raise RecipeError(f"{option} means nothing here: it goes with {needs}")
    return changed, images, {**network, **chosen(options, NetworkSettings)}


def _build_images(
    options: Namespace,
    recipe: Recipe,
    images: Values,
    network: Values,
    again: bool,
    engine: "RayEngine | None",
) -> "BuildReport":
    from ..offline import build_index

    source, loaded, own_maps, earlier = _inputs(options, recipe, images, network, again)
    work = _work(options, images.get("on_unreadable", "fail"))
    with run_by(options, loaded, earlier) as run:
        work["batch_size"] = work["batch_size"] or run.repeat_run(earlier)
        return build_index(
            source,
            run,
            options.index,
            recipe,
            triplets=_given_triplets(options),
            prompts=_prompts(options),
            own_maps=own_maps,
            trust=not options.no_trust,
            replace=options.refit,
            engine=engine,
            **work,
        )


def _inputs(
    options: Namespace, recipe: Recipe, images: Values, network: Values, again: bool
) -> tuple["ImageSource", "EmbeddingNetwork", bool, "RunEntry | None"]:
    """Return the images to build from, the network, whether own maps are kept, an earlier run."""
    from ..images import MAX_PIXELS
    from ..index import Index
    from ..network import read_by
    from ..offline import indexed_images

    path = options.images or images.get("path")
    own_maps, earlier = not options.no_own_maps, None
    if again or (options.refit and path is None):
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
            earlier = index.manifest.run
    elif path is None:
        raise InputError(
            "no images were given; name a folder or a CSV before the index, or set [images] path "
            "in the recipe"
        )
    if path is not None:
        kept = ("labels", "exclude", "max_pixels")
        source = images_of(options, path, **{k: images[k] for k in kept if k in images})
    runtime_of(options, earlier)
    if options.onnx is not None and not network.get("network"):
        network = loading_of_file(options.onnx, network)
    loaded = load_named(network)
    loaded = read_by(loaded, recipe.entry.reading)
    if network.get("layer") is None:
        name = loaded.name or network["network"]
        note(options, f"{name}: explaining layer {loaded.layer} (--layer takes another)")
    return source, loaded, own_maps, earlier


def _build_features(options: Namespace, recipe: Recipe, network: Values) -> "BuildReport":
    from ..index.arrays import read_array
    from ..offline.features import build_from_features, read_head

    if not (options.embeddings and options.pooled and options.grid):
        raise InputError(
            "an index from features needs --embeddings, --pooled and --grid; one is missing"
        )
    if options.onnx or options.runtime:
        raise InputError("features were made elsewhere: leave out --onnx and --runtime")
    if options.images:
        raise InputError("give either IMAGES or --embeddings and --pooled, not both")
    pooled, embeddings = read_array(options.pooled), read_array(options.embeddings)
    ids, labels = None, None
    if options.ids:
        with progress_of("read", len(embeddings), "lines", shown=options.progress) as progressed:
            ids, labels = _ids_of(options.ids, progressed)
    positive = options.positive_pooled
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
        positive_pooled=None if positive is None else read_array(positive),
        triplets=_given_triplets(options),
        prompts=_prompts(options),
        network=load_named(network) if network.get("network") else None,
        replace=options.refit,
        progress=options.progress,
    )


def _given_triplets(options: Namespace) -> "np.ndarray | None":
    if not isinstance(options.triplets, str):
        return None
    from ..index.arrays import read_array

    return read_array(options.triplets)


def _prompts(options: Namespace) -> list[str] | None:
    if options.prompts is None:
        return None
    from ..offline.prompts import read_prompts

    return read_prompts(options.prompts)


def _ids_of(path: str, progressed: Advance) -> "tuple[Texts, LabelColumn]":
    """Return ids and labels from a CSV with the columns id[,label], or from tables."""
    from ..images import find_images, is_collection
    from ..images.lists import csv_rows
    from ..images.sources import Item, Listing

    if not path.lower().endswith(".csv") and is_collection(path):
        source = find_images(path)
        progressed(len(source))
        return source.ids, source.labels

    def items() -> Iterator[Item]:
        count = 0
        for count, (_, row) in enumerate(csv_rows(Path(path), ["id"], "id[,label]"), 1):
            if count % _TOLD == 0:
                progressed(_TOLD)
            yield Item(row["id"], row["id"], row.get("label") or None)
        progressed(count % _TOLD)

    listed = Listing.of(items())
    if not len(listed):
        raise InputError(f"{path}: has no lines below its header")
    return listed.ids, listed.labels


def _skipped(options: Namespace, skipped: "Sequence[tuple[str, str]]") -> None:
    for name, why in skipped[:20]:
        # A reason begins with the file's path, which mostly ends in its id.
        path, _, rest = why.partition(": ")
        note(options, f"skipped {name}: {rest if path.endswith(printable(name)) else why}")
    if len(skipped) > 20:
        note(options, f"... and {len(skipped) - 20} more")
    shards = Counter(filter(None, (shard_of(why) for _, why in skipped)))
    if shards:
        counts = [f"{n:,} of {Path(shard).name}" for shard, n in shards.most_common(20)]
        counts += [f"others of {len(shards) - 20} more"] * (len(shards) > 20)
        note(options, f"skipped by shard: {', '.join(counts)}")


def _report(options: Namespace, report: "BuildReport", verb: str) -> None:
    _skipped(options, report.skipped)
    # An image without a label is a class of its own where labels draw the positives.
    unlabelled = min(report.n_unlabelled, report.n_single)
    nearest = "the nearest neighbours stand in as positives"
    for number, what in (
        (report.n_single - unlabelled, f"alone with a label: {nearest}"),
        (unlabelled, f"without a label: {nearest}"),
        (report.n_without_triplets, "without evidence: every triplet was satisfied"),
    ):
        if number:
            note(options, f"{counted(number, 'image')} {what}")
    for text in report.taken():
        if text not in getattr(options, "said", ()):
            note(options, text)
    took = f"in {sum(report.seconds.values()):.1f} s"
    if report.changes is not None:
        text = f"{_changes(options, report.changes)} {took}"
    elif not report.n_images:
        text = "holds these images already; nothing to do"
    else:
        images = counted(report.n_images, "image")
        text = f"{f'built, {images}' if verb == 'built' else f'{images} added'} {took}"
    emit(options, {**asdict(report), "path": str(report.path)}, f"{report.path}: {text}")


def _changes(options: Namespace, changes: "Changes") -> str:
    """Return what an update did."""
    if changes.n_unmarked:
        note(
            options,
            f"note: {counted(changes.n_unmarked, 'image')} of the index without a mark of the "
            "file, so whether one changed cannot be told; `embedcam build --refit` adds marks",
        )
    kinds = {"new": changes.new, "changed": changes.changed, "vanished": changes.vanished}
    told = [f"{len(ids):,} {what} ({some_of(ids)})" for what, ids in kinds.items() if ids]
    same = f"{changes.n_same:,} as before"
    return f"{', '.join(told)}; {same}," if told else f"nothing to update, {same},"
