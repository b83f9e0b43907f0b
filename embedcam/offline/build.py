"""The jobs: build an index, add images to one, and calibrate one. Each is plan, shard, merge."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, cut
from ..images import MAX_PIXELS, ImageSource, Item, as_root, is_url, load_batches
from ..images.places import is_below
from ..index import Index, IndexRows, PartData, writer
from ..index.encoding import Encoding
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe
from . import merge, plan, shard
from .checkpoint import Checkpoint, finished_job, remove_checkpoint
from .cotangents import coded_labels
from .match import LEAST_MATCH, calibrate_match
from .plan import SCRATCH_GB, Plan
from .report import BuildReport, Changes, Stages, changes_since, report_of
from .strategies import is_exact, strategy_for
from .triplets import pairs_digest
from .trust import LEAST, calibrate_trust, forwarded, trust_rows

log = logging.getLogger(__name__)

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
    plan.check_options(source, network, batch_size, on_unreadable, scratch_gb)
    network.check(gradients=not recipe.entry.scored)
    plan.warn_of_norm(recipe, network.normalize or network.already_normalized, 2)
    writer.check_target(path, replace=True)
    exact = is_exact(recipe, network.head_kind.matrix, network.normalize)
    strategy = strategy_for(network, recipe, exact=exact, batch_size=batch_size)
    identity = network.identity()
    width, n_channels = len(identity.probe_embedding), len(identity.probe_pooled)
    plan.check_method(recipe, network, width)
    plan.check_amounts(recipe, source.ids, source.labels, width, n_channels, triplets)
    note = plan.head_note(recipe, network)
    if note is not None:
        log.warning("%s", note)
    # Once, before any is read: a file that changes meanwhile must not pass for the one indexed.
    files = list(source.fingerprints())
    given = None if triplets is None else pairs_digest(triplets)
    job = plan.job_digest(recipe, identity, source, files, batch_size, own_maps, given)
    stages, generation = Stages(progress), 1
    with plan.disk_errors(path), writer.lock(path):
        if (path / "manifest.json").exists():
            with Index.open(path) as index:
                generation = index.manifest.generation + 1
                if _tidied(index) == job or not replace:
                    asked = (recipe, source, files, own_maps, trust, given, network)
                    skipped = plan.same_index(index, *asked)
                    log.info("%s holds these images already", path)
                    return BuildReport(path, 0, skipped, left_out=source.left_out)
        checkpoint, options = Checkpoint(path / _CHECKPOINT, job), (workers, on_unreadable)
        work = Plan(network, source, recipe, strategy, checkpoint, stages, batch_size, *options)
        plan.cache_within(work, own_maps * scratch_gb)
        shard.embed_chunks(work)
        embedded = merge.gather(work)
        anchors = merge.anchors_of(work, embedded, triplets)
        shard.weigh_chunks(work, anchors, embedded.n_before)
        with stages("encode"):
            encodings = merge.fit_encodings(work, embedded.mean)
            part = merge.encode(work, encodings, embedded, own_maps, source.root)
        made = merge.calibrate_build(work, encodings, embedded, part) if trust else None
        with stages("write"):
            match = calibrate_match(embedded.new, part.labels, recipe) if trust else None
            grid = merge.grid_of(work)
            named = [(network.layer, grid), *strategy.layers[1:]]
            coarse = strategy.map_grid(grid) if own_maps else None
            entries = [
                merge.layer_entry(*named[number], encoding, None if number else coarse)
                for number, encoding in enumerate(encodings)
            ]
            if note is not None:
                entries[0]["uses_positions"] = True
            about = merge.header(
                recipe,
                {**identity.to_dict(), "loading": network.spec},
                source.root,
                width,
                network.normalize,
                entries,
                files=plan.files_digest([files[position] for position in embedded.positions]),
                given=triplets,
            )
            about["trust_calibration"] = merge.plain(made)
            about["match_calibration"] = merge.plain(match)
            shared = {**identity.arrays(), "embedding_mean": embedded.mean}
            checkpoint.mark_commit(job, generation)
            fitted = [encoding.fitted for encoding in encodings]
            writer.create(path, about, fitted, shared, part, replace=generation > 1)
        remove_checkpoint(checkpoint.path)
    notes = [] if note is None else [note]
    return _report(work, path, embedded, part, notes, '; resize="squash" shows all of each')


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
    plan.check_options(source, network, batch_size, on_unreadable, scratch_gb)
    Index.open(path).close()  # refuse a folder without an index before a lock file appears in it
    with plan.disk_errors(path), writer.lock(path), Index.open(path) as index:
        manifest, stages = index.manifest, Stages(progress)
        index.refuse_prototypes(writer.ADD_INSTEAD)
        recipe = Recipe.of_index(manifest)
        if source.numbers and recipe.labels != "numbers":
            raise InputError(
                'this index\'s labels are classes and those given are numbers; take labels="auto" '
                "(--labels auto), or build an index of numbers"
            )
        coded_labels(recipe, source.labels, source.ids)
        encodings, exact = _encodings(index, recipe, network)
        live, changes, gone = index.live_positions(), None, list[str]()

        def removed(changes: Changes, skipped: list[tuple[str, str]]) -> BuildReport:
            """Carry out an update that has nothing to add."""
            if changes.gone:
                writer.remove(path, changes.gone)
            report = BuildReport(path, 0, skipped, seconds=stages.seconds, changes=changes)
            return dataclasses.replace(report, left_out=source.left_out)

        if update:
            with stages("compare", len(source)) as progressed:
                changes, places = changes_since(index, source, progressed)
            gone = changes.gone
            if not places:
                _tidied(index)
                return removed(changes, [])
            source = source.only(places)
            live = np.setdiff1d(live, index.positions(gone))
        strategy = strategy_for(network, recipe, exact=exact, batch_size=batch_size)
        files = list(source.fingerprints())
        job = plan.job_digest(recipe, network.identity(), source, files, batch_size, *sorted(gone))
        if _tidied(index) == job:
            log.info("%s has these images already", path)
            return BuildReport(path, 0, [], left_out=source.left_out)
        if not update:
            plan.check_new(index, source)
        layer, root = manifest.layers[0], manifest.images_root
        with_maps, options = layer.coarse_grid is not None, (workers, on_unreadable)
        checkpoint = Checkpoint(path / _CHECKPOINT, f"{job} {manifest.manifest_sha256}")
        work = Plan(network, source, recipe, strategy, checkpoint, stages, batch_size, *options)
        plan.cache_within(work, with_maps * scratch_gb)
        shard.embed_chunks(work)
        if changes is not None:
            skipped = work.skipped()
            changes = changes.without({name for name, _ in skipped})
            if len(skipped) == len(source):
                remove_checkpoint(checkpoint.path)
                return removed(changes, skipped)
        embedded = merge.gather(work, index, live)
        anchors = merge.anchors_of(work, embedded, None)
        shard.weigh_chunks(work, anchors, embedded.n_before)
        if merge.grid_of(work) != tuple(layer.grid or ()):
            raise InputError(
                f"the layer's grid is {list(merge.grid_of(work))} for these images and "
                f"{list(layer.grid or ())} in the index; use the preprocessing that the index was "
                "built with"
            )
        with stages("encode"):
            of = (work, encodings, embedded, with_maps)
            part = merge.encode(*of, as_root(root) if root else None)
        with stages("write"):
            checkpoint.mark_commit(job, manifest.generation + 1)
            writer.append(path, part, removing=gone)
        remove_checkpoint(checkpoint.path)
    return dataclasses.replace(_report(work, path, embedded, part), changes=changes)


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
        made = {"match": (merge.plain(calibrate_match(embeddings, labels, recipe)), LEAST_MATCH)}
        if network is not None:
            encodings, _ = _encodings(index, recipe, network)
            rows, source = trust_rows(len(live), recipe, network), indexed_images(index, images)
            preprocess = network.require_preprocess()
            batches = load_batches(source, rows, preprocess, batch_size, workers=workers)
            views = forwarded(network, manifest.layer_names, batches)

            def fields(layer: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
                return index.select(live[chosen]).fields(layer)

            with Stages(progress)("trust", len(rows)) as progressed:
                of = (recipe, network, encodings, fields, embeddings, labels, rows)
                made["trust"] = (merge.plain(calibrate_trust(*of, views, progressed)), LEAST)
    counts, stored = {}, {}
    for what, (calibration, least) in made.items():
        if calibration is None:
            raise InputError(
                f"{path}: {len(live)} images calibrate no {what}; add images until there are at "
                f"least {least}"
            )
        counts[what] = int(calibration["several"]["images"])
        stored[f"{what}_calibration"] = calibration
    writer.put_calibrations(path, stored, manifest.manifest_sha256)
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
    folder = None if not chosen else as_root(chosen)
    elsewhere = (item.path for item in items if is_url(item.path))
    address = next((one for one in elsewhere if folder is None or not is_below(one, folder)), None)
    if root is None and isinstance(folder, str):
        address = folder
    if address is not None:
        raise InputError(
            f"the index names pictures at {cut(address, 200)}, which are read where you name their "
            "folder: give it as the images"
        )
    numbers = index.manifest.near_share is not None
    return ImageSource(items, folder, max_pixels=max_pixels, numbers=numbers)


def _encodings(
    index: Index, recipe: Recipe, network: EmbeddingNetwork
) -> tuple[list[Encoding], bool]:
    """Return the layers' encodings, and whether codes are dy/dz; refuse another network."""
    if index.identity is None:
        raise InputError(
            "this index was built from features alone and does not know its network; build it "
            "again with all images"
        )
    network.for_index(index.identity)
    encodings = [index.encoding(number) for number in range(len(index.layers))]
    return encodings, plan.check_addable(recipe, encodings[0], network)


def _tidied(index: Index) -> str | None:
    """Return the job that made this generation and was killed before it tidied up, and tidy up."""
    folder = index.path / _CHECKPOINT
    job = finished_job(folder, index.manifest.generation)
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if job is not None or empty:
        writer.sweep(index.path)
        remove_checkpoint(folder)
    return job


def _report(
    work: Plan,
    path: Path,
    embedded: merge.EmbeddedImages,
    part: PartData,
    notes: Sequence[str] = (),
    instead_of_crop: str = "",
) -> BuildReport:
    notes = [*work.source.notes, *notes]
    if embedded.n_cropped:
        notes.append(
            f"the crop leaves out more than a quarter of {embedded.n_cropped:,} of "
            f"{len(part):,} pictures{instead_of_crop}"
        )
    of = (part.labels, embedded.codes, part.triplets_used, work.stages)
    report = report_of(path, work.recipe, *of)
    left_out = work.source.left_out
    return dataclasses.replace(report, skipped=embedded.skipped, left_out=left_out, notes=notes)
