"""The jobs: build an index, add images to one, and calibrate one. Each is plan, shard, merge."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..images import MAX_PIXELS, ImageSource, Item, load_batches
from ..index import (
    ADD_INSTEAD,
    Index,
    IndexRows,
    append,
    check_target,
    create,
    lock,
    put_calibrations,
    remove,
    sweep,
)
from ..index.arrays import ArrayLike
from ..index.identity import Identity
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe
from .checkpoint import Checkpoint, finished_job, remove_checkpoint
from .cotangents import AnchorCotangents, coded_labels
from .match import LEAST_MATCH, calibrate_match
from .merge import (
    EmbeddedImages,
    calibrate_build,
    encode,
    fit_encodings,
    gather,
    grid_of,
    header,
    layer_entry,
)
from .plan import (
    Plan,
    check_addable,
    check_amounts,
    check_method,
    check_new,
    check_norm,
    check_options,
    disk_errors,
    files_digest,
    head_note,
    job_digest,
    layers_of,
    same_index,
    warn_of_norm,
)
from .report import BuildReport, Changes, Stages, changes_since, report_of
from .shard import embed_chunks, weigh_chunks
from .strategies import Layers, is_exact, strategy_for
from .triplets import pairs_digest
from .trust import LEAST, calibrate_trust, forwarded, trust_rows

log = logging.getLogger(__name__)

SCRATCH_GB = 50.0
"""Activations cached between the passes, at most; beyond it stored maps cost one more forward."""
_CHECKPOINT = ".building"


def build_index(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    on_unreadable: str = "fail",
    triplets: np.ndarray | None = None,
    own_maps: bool = True,
    trust: bool = True,
    scratch_gb: float = SCRATCH_GB,
    replace: bool = False,
    progress: bool | None = None,
) -> BuildReport:
    """Build an index of CAM weights; run again after an interruption, it goes on.

    Parameters
    ----------
    source
        The images, from `find_images` or `from_dataset`.
    network
        The network to explain, with its preprocessing.
    path
        Folder of the index; created where missing.
    recipe
        The choices; None takes the defaults, which are what measured best.
    batch_size
        Images a forward pass; changes nothing beyond float rounding.
    workers
        Threads that decode images; None takes one for each core.
    on_unreadable
        "fail" at an image that cannot be read, or "skip" and report it.
    triplets
        With sampling "given": places in the source of (positive, negative), `[N S 2]`.
    own_maps
        Keep each image's own coarse map, so that results need no forward pass.
    trust
        Calibrate how far transfers and first results can be trusted.
    scratch_gb
        Disk that cached activations may take during the build; changes nothing else.
    replace
        Redo a finished index instead of refusing.
    progress
        Bars; None shows them on a terminal or in a notebook, else logs how far it is.

    Returns
    -------
    BuildReport
        What was done. The index itself is opened with `Index.open(path)`.

    Raises
    ------
    RecipeError
        Choices that do not go together.
    ImageError
        An unreadable image, with on_unreadable="fail".
    InputError
        No images, too few, a single label, or a folder that holds something else.
    EmbedcamError
        The disk is full or cannot be written; what is finished is used again.
    """
    recipe, path = recipe or Recipe(), Path(path)
    if source.numbers:
        recipe = dataclasses.replace(recipe, labels="numbers")
    check_options(source, network, batch_size, on_unreadable, scratch_gb)
    network.check(gradients=not recipe.entry.scored)
    check_norm(recipe, network)
    warn_of_norm(recipe, network.normalize or network.already_normalized, 2)
    check_target(path, replace=True)
    layers = layers_of(network, recipe)
    check_method(recipe, network)
    identity = network.identity()
    width, n_channels = len(identity.probe_embedding), len(identity.probe_pooled)
    check_amounts(recipe, source.ids, source.labels, width, n_channels, triplets)
    exact = is_exact(recipe, network.head_kind.matrix, network.normalize)
    note = head_note(recipe, network)
    if note is not None:
        log.warning("%s", note)
    # Once, before any is read: a file that changes meanwhile must not pass for the one indexed.
    files = [source.fingerprint(position) for position in range(len(source))]
    given = None if triplets is None else pairs_digest(triplets)
    job = job_digest(recipe, identity, source, files, batch_size, own_maps, given)
    stages, generation = Stages(progress), 1
    with disk_errors(path), lock(path):
        if (path / "manifest.json").exists():
            with Index.open(path) as index:
                generation = index.manifest.generation + 1
                if _tidied(index) == job or not replace:
                    skipped = same_index(
                        index, recipe, identity, source, files, own_maps, trust, given, network
                    )
                    log.info("%s holds these images already", path)
                    return BuildReport(path, 0, skipped, left_out=source.left_out)
        checkpoint = Checkpoint(path / _CHECKPOINT, job)
        options = (batch_size, workers, on_unreadable)
        plan = _plan(
            network, source, recipe, checkpoint, options, exact, layers, own_maps * scratch_gb
        )
        _embed(plan, stages)
        embedded, codes, mean = _weigh(plan, stages, triplets)
        with stages("encode"):
            encodings = fit_encodings(plan, mean)
            part = encode(plan, encodings, embedded, mean, own_maps, source.root)
        calibrations: dict[str, Any] = {"trust_calibration": None}
        if trust:
            with stages("trust", len(trust_rows(len(part), recipe, network))) as progressed:
                calibrations["trust_calibration"] = calibrate_build(
                    plan, encodings, embedded, part, progressed
                )
        with stages("write"):
            if trust:
                calibrations["match_calibration"] = calibrate_match(
                    embedded.new, part.labels, recipe.metric, recipe.seed, recipe.near
                )
            grid = grid_of(plan)
            coarse = plan.strategy.map_grid(grid) if own_maps else None
            entries = [
                layer_entry(name, own_grid, encoding, coarse if number == 0 else None)
                for number, ((name, own_grid), encoding) in enumerate(
                    zip([(network.layer, grid), *layers[1:]], encodings, strict=True)
                )
            ]
            if note is not None:
                entries[0]["uses_positions"] = True
            about = header(
                recipe,
                {**identity.to_dict(), "loading": network.spec},
                source.root,
                width,
                network.normalize,
                entries,
                files=files_digest([files[position] for position in embedded.positions]),
                given=triplets,
            )
            shared = {**identity.arrays(), "embedding_mean": mean}
            checkpoint.mark_commit(job, generation)
            fitted = [encoding.fitted for encoding in encodings]
            create(path, {**about, **calibrations}, fitted, shared, part, replace=generation > 1)
        remove_checkpoint(checkpoint.path)
    notes = [] if note is None else [note]
    return _report(plan, path, embedded, codes, part.triplets_used, stages, notes, new=True)


def add_images(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    *,
    update: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    on_unreadable: str = "fail",
    scratch_gb: float = SCRATCH_GB,
    progress: bool | None = None,
) -> BuildReport:
    """Add images to an index; run again after an interruption, it goes on.

    What the first build fitted (mean, basis, FAISS training) stays as it is. New images draw their
    triplets from old and new ones; the weights of old images are not computed again.

    Parameters
    ----------
    source
        The new images; their ids must not be in the index.
    network
        The one the index was built with; another is refused.
    path
        Folder of the index.
    update
        The source is the whole collection that the index was built from: what is new is added,
        what has vanished is removed, and what has changed is replaced, in one step; see
        `BuildReport.changes`.
    batch_size, workers, on_unreadable, scratch_gb, progress
        As for `build_index`.

    Raises
    ------
    NetworkMismatch
        The network is not the index's.
    InputError
        Ids that are in the index already, an index of prototypes, or, for an update, another
        collection than the index was built from.
    ImageError
        An unreadable image, with on_unreadable="fail".
    EmbedcamError
        The disk is full or cannot be written; what is finished is used again.
    """
    path = Path(path)
    check_options(source, network, batch_size, on_unreadable, scratch_gb)
    Index.open(path).close()  # refuse a folder without an index before a lock file appears in it
    with disk_errors(path), lock(path), Index.open(path) as index:
        manifest = index.manifest
        index.refuse_prototypes(ADD_INSTEAD)
        encodings = [index.encoding(number) for number in range(len(index.layers))]
        recipe = Recipe.of_index(manifest)
        if source.numbers and recipe.labels != "numbers":
            raise InputError(
                'this index\'s labels are classes and those given are numbers; take labels="auto" '
                "(--labels auto), or build an index of numbers"
            )
        coded_labels(recipe, source.labels, source.ids)
        network.for_index(_identity_of(index))
        stages, live = Stages(progress), index.live_positions()
        changes, gone = None, list[str]()
        if update:
            with stages("compare", len(source)) as progressed:
                changes, places = changes_since(index, source, progressed)
            gone = changes.gone
            if not places:
                _tidied(index)
                return _removed(path, changes, source, [], stages)
            source = source.only(places)
            live = np.setdiff1d(live, index.positions(gone))
        exact = check_addable(recipe, encodings[0], network)
        layers = layers_of(network, recipe)
        files = [source.fingerprint(position) for position in range(len(source))]
        job = job_digest(recipe, network.identity(), source, files, batch_size, *sorted(gone))
        if _tidied(index) == job:
            log.info("%s has these images already", path)
            return BuildReport(path, 0, [], left_out=source.left_out)
        if not update:
            check_new(index, source)
        layer, root = manifest.layers[0], manifest.images_root
        with_maps = layer.coarse_grid is not None
        checkpoint = Checkpoint(path / _CHECKPOINT, f"{job} {manifest.manifest_sha256}")
        options = (batch_size, workers, on_unreadable)
        plan = _plan(
            network, source, recipe, checkpoint, options, exact, layers, with_maps * scratch_gb
        )
        _embed(plan, stages)
        if changes is not None:
            skipped = plan.skipped()
            changes = changes.without({name for name, _ in skipped})
            if len(skipped) == len(source):
                remove_checkpoint(checkpoint.path)
                return _removed(path, changes, source, skipped, stages)
        embedded, codes, mean = _weigh(plan, stages, None, index, live)
        if grid_of(plan) != tuple(layer.grid or ()):
            raise InputError(
                f"the layer's grid is {list(grid_of(plan))} for these images and "
                f"{list(layer.grid or ())} in the index; use the preprocessing that the index was "
                "built with"
            )
        with stages("encode"):
            part = encode(plan, encodings, embedded, mean, with_maps, Path(root) if root else None)
        with stages("write"):
            checkpoint.mark_commit(job, manifest.generation + 1)
            append(path, part, removing=gone)
        remove_checkpoint(checkpoint.path)
    report = _report(plan, path, embedded, codes, part.triplets_used, stages, [])
    return dataclasses.replace(report, changes=changes)


def calibrate_index(
    path: str | Path,
    network: EmbeddingNetwork | None = None,
    *,
    images: str | Path | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> dict[str, int]:
    """Calibrate match, and with the network trust, for the images an index holds now.

    Weights stay as they are. Match needs no pictures; trust forwards a sample of them, from the
    folder they were built from or `images`. Returns how many images each was calibrated with.
    """
    path = Path(path)
    with Index.open(path, with_faiss=False) as index:
        manifest, live = index.manifest, index.live_positions()
        index.refuse_prototypes("calibrate the index before compressing it")
        recipe = Recipe.of_index(manifest)
        # Read where they are asked for: a large collection's need not fit into memory.
        embeddings, labels = IndexRows(index, live), list(index.labels[live])
        calibrations = {
            "match": calibrate_match(embeddings, labels, recipe.metric, recipe.seed, recipe.near)
        }
        if network is not None:
            network.for_index(_identity_of(index))
            encodings = [index.encoding(number) for number in range(len(index.layers))]
            check_addable(recipe, encodings[0], network)
            rows = trust_rows(len(live), recipe, network)
            source = indexed_images(index, images)
            preprocess = network.require_preprocess()
            batches = load_batches(source, rows, preprocess, batch_size, workers=workers)
            with Stages(progress)("trust", len(rows)) as progressed:
                calibrations["trust"] = calibrate_trust(
                    recipe,
                    network,
                    encodings,
                    lambda layer, chosen: index.select(live[chosen]).fields(layer),
                    embeddings,
                    labels,
                    rows,
                    forwarded(network, manifest.layer_names, batches),
                    progressed,
                )
    counts = {}
    for what, calibration in calibrations.items():
        if calibration is None:
            least = LEAST_MATCH if what == "match" else LEAST
            raise InputError(
                f"{path}: {len(live)} images calibrate no {what}; add images until there are at "
                f"least {least}"
            )
        counts[what] = int(calibration["several"]["images"])
    stored = {f"{what}_calibration": calibration for what, calibration in calibrations.items()}
    put_calibrations(path, stored, manifest.manifest_sha256)
    return counts


def indexed_images(
    index: Index, root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> ImageSource:
    """Return the images of an open index as a source for a refit; `root` where they lie now."""
    index.refuse_prototypes("refit the index it was compressed from, and compress that again")
    live = index.live_positions()
    listed = zip(index.ids[live], index.paths[live], index.labels[live], strict=True)
    items = [Item(name, path, label) for name, path, label in listed]
    if any(not item.path for item in items):
        raise InputError(
            "the index does not know where its images lie (it was built from a data set or from "
            "features), so it cannot be refitted from them; build it again from its source"
        )
    chosen = index.manifest.images_root if root is None else root
    folder, numbers = chosen and Path(chosen), index.manifest.near_share is not None
    return ImageSource(items, folder or None, max_pixels=max_pixels, numbers=numbers)


def _identity_of(index: Index) -> Identity:
    if index.identity is None:
        raise InputError(
            "this index was built from features alone and does not know its network; build it "
            "again with all images"
        )
    return index.identity


def _tidied(index: Index) -> str | None:
    """Return the job that made this generation and was killed before it tidied up, and tidy up."""
    folder = index.path / _CHECKPOINT
    job = finished_job(folder, index.manifest.generation)
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if job is not None or empty:
        sweep(index.path)
        remove_checkpoint(folder)
    return job


def _plan(
    network: EmbeddingNetwork,
    source: ImageSource,
    recipe: Recipe,
    checkpoint: Checkpoint,
    options: tuple[int, int | None, str],
    exact: bool,
    layers: Layers,
    cached_gb: float,
) -> Plan:
    """Return a plan; activations for stored maps are cached where they take at most `cached_gb`."""
    strategy = strategy_for(network, recipe, exact=exact, layers=layers, batch_size=options[0])
    if cached_gb and not layers:  # several layers make the stored maps along with their weights
        activations = network.forward(network.probe_images()).activations
        needed = 2 * strategy.cached(activations)["activations"].size * len(source)
        strategy.caches = needed <= min(cached_gb * 1e9, 0.8 * checkpoint.free_bytes())
        if not strategy.caches:
            log.warning(
                "keeping the activations of all images would take %.1f GB, more than allowed; the "
                "images' own maps take one more forward pass instead",
                needed / 1e9,
            )
    return Plan(network, source, recipe, strategy, checkpoint, *options)


def _embed(plan: Plan, stages: Stages) -> None:
    with stages("embed", len(plan.source)) as progressed:
        embed_chunks(plan, progressed)


def _weigh(
    plan: Plan,
    stages: Stages,
    triplets: np.ndarray | None,
    index: Index | None = None,
    live: np.ndarray | None = None,
) -> tuple[EmbeddedImages, np.ndarray | None, np.ndarray]:
    """Weigh all chunks; return codes of the labels `[N]`, live images first, and the mean, too."""
    embedded = gather(plan, index, np.empty(0, np.int64) if live is None else live)
    items = [plan.source.items[position] for position in embedded.positions]
    labels, names = [item.label for item in items], [item.id for item in items]
    if index is None or live is None:
        mean = embedded.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    else:
        rows = index.select(live)
        labels, names = [*rows.labels, *labels], [*rows.ids, *names]
        mean = index.fitted("embedding_mean")
    codes = coded_labels(plan.recipe, labels, names)
    if triplets is not None and embedded.skipped:
        triplets = _without_skipped(triplets, embedded, plan.source)
    anchors = AnchorCotangents(plan.recipe, embedded.embeddings, codes, mean, triplets)
    with stages("weights", len(embedded.positions)) as progressed:
        weigh_chunks(plan, anchors, embedded.n_before, progressed)
    return embedded, codes, mean


def _without_skipped(
    triplets: np.ndarray, embedded: EmbeddedImages, source: ImageSource
) -> np.ndarray:
    """Return given triplets as places among the images that could be read."""
    new_place = np.full(len(source), -1)
    new_place[embedded.positions] = np.arange(len(embedded.positions))
    kept: np.ndarray = new_place[np.asarray(triplets)[embedded.positions]]
    if (lost := (kept < 0).any((1, 2))).any():
        name = source.items[embedded.positions[lost.argmax()]].id
        raise InputError(
            f"the triplets of image {name!r} name an image that could not be read (skipped: "
            f"{', '.join(repr(name) for name, _ in embedded.skipped[:3])}); give it others"
        )
    return kept


def _removed(
    path: Path,
    changes: Changes,
    source: ImageSource,
    skipped: list[tuple[str, str]],
    stages: Stages,
) -> BuildReport:
    """Carry out an update that has nothing to add."""
    if changes.gone:
        remove(path, changes.gone)
    return BuildReport(
        path, 0, skipped, seconds=stages.seconds, changes=changes, left_out=source.left_out
    )


def _report(
    plan: Plan,
    path: Path,
    embedded: EmbeddedImages,
    codes: np.ndarray | None,
    triplets_used: ArrayLike,
    stages: Stages,
    notes: list[str],
    *,
    new: bool = False,
) -> BuildReport:
    notes = [*plan.source.notes, *notes]
    if embedded.n_cropped:
        notes.append(
            f"the crop leaves out more than a quarter of {embedded.n_cropped:,} of "
            f"{len(embedded.positions):,} pictures"
            + ('; resize="squash" shows all of each' if new else "")
        )
    labels = [plan.source.items[position].label for position in embedded.positions]
    report = report_of(path, plan.recipe, labels, codes, triplets_used, stages)
    return dataclasses.replace(
        report, skipped=embedded.skipped, left_out=plan.source.left_out, notes=notes
    )
