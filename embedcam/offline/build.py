"""The jobs: build an index, add images to one, and calibrate one. Each is plan, shard, merge."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from ..errors import InputError, cut
from ..images import MAX_PIXELS, ImageSource, Item, as_root, is_url, load_batches
from ..images.places import is_below
from ..images.sources import Listing
from ..images.texts import LabelColumn, Texts, in_runs
from ..index import Index, IndexRows, PartData, writer
from ..index.encoding import Encoding, from_spec
from ..network import EmbeddingNetwork, as_indexed, read_by
from ..recipe.recipe import Recipe
from . import concepts, merge, plan, shard
from .checkpoint import Checkpoint, finished_job, remove_checkpoint
from .cotangents import AnchorCotangents, coded_labels
from .job import How, Job, job_of
from .match import LEAST_MATCH, calibrate_match
from .plan import SCRATCH_GB, Plan
from .prompts import check_prompts, has_mean_of, read_prompts, text_mean
from .report import BuildReport, Changes, Stages, changes_since, report_of
from .strategies import Strategy, is_exact, strategy_for
from .triplets import pairs_digest
from .trust import LEAST, calibrate_trust, forwarded, trust_rows

if TYPE_CHECKING:
    from .engine import RayEngine

log = logging.getLogger(__name__)

CHECKPOINT = ".building"


def build_index(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    on_unreadable: str = "fail",
    triplets: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
    own_maps: bool = True,
    trust: bool = True,
    scratch_gb: float = SCRATCH_GB,
    replace: bool = False,
    progress: bool | None = None,
    engine: "RayEngine | None" = None,
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
        Images a forward pass; changes nothing beyond float rounding. None takes what suits the
        network and the device (`usual_passes`).
    workers
        Threads that decode images; None takes one for each core.
    on_unreadable
        "fail" at an image that cannot be read, or "skip" and report it.
    triplets
        With sampling "given": places in the source of (positive, negative), `[N S 2]`.
    prompts
        Captions whose mean embedding stands for text as such, where the network has a text tower;
        None takes those that come along.
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
    engine
        What looks at the images; None does it in this process. `workers` are then the merge's.

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
    path, recipe = Path(path), recipe or Recipe()
    network = read_by(network, recipe.entry.reading)
    how = How(batch_size=batch_size, on_unreadable=on_unreadable, scratch_gb=scratch_gb)
    writer.check_target(path, replace=True)
    job, strategy = planned_build(
        source,
        network,
        path,
        recipe,
        triplets=triplets,
        prompts=prompts,
        own_maps=own_maps,
        trust=trust,
        **how,
    )
    with plan.disk_errors(path), writer.lock(path), network.one_thread_each():
        if (done := finished_build(job, path, network, replace=replace)) is not None:
            return done
        checkpoint, stages = Checkpoint.owned(path / CHECKPOINT, job.choices.key), Stages(progress)
        how_done = (network, checkpoint, stages, workers, strategy)
        job, work = _embedded(job, engine, *how_done)
        report = write_build(job, work, path)
    if engine is not None:
        engine.tidy()
    return report


def _embedded(
    job: Job,
    engine: "RayEngine | None",
    network: EmbeddingNetwork,
    checkpoint: Checkpoint,
    stages: Stages,
    workers: int | None,
    strategy: Strategy,
) -> tuple[Job, Plan]:
    """Have the images of a job embedded, here or by an engine, whose work is found on disk."""
    if engine is not None:
        job = engine.do(job, checkpoint.path, network, stages)
        checkpoint = job.checkpoint
    work = job.work(network, checkpoint, stages, workers, strategy)
    if engine is None:
        shard.embed_chunks(work)
    return job, work


def planned_build(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: Path,
    recipe: Recipe | None,
    *,
    triplets: np.ndarray | None,
    prompts: Sequence[str] | None,
    own_maps: bool,
    trust: bool,
    **how: Unpack[How],
) -> tuple[Job, Strategy]:
    """Return a build as a job, and how it finds weights; refuse what cannot be built.

    Activations are cached where the disk of `path` has room for them.
    """
    recipe = recipe or Recipe()
    if source.numbers:
        recipe = dataclasses.replace(recipe, labels="numbers")
    amounts = (how["batch_size"], how["on_unreadable"], how["scratch_gb"])
    plan.check_options(source, network, *amounts)
    if prompts is not None:
        prompts = check_prompts(prompts)
        network.embed_texts(prompts[:1])  # refuse a network without a tower for texts
    network.check(gradients=not recipe.entry.scored)
    plan.warn_of_norm(recipe, network.normalize or network.already_normalized, 3)
    exact = is_exact(recipe, network.head_kind.matrix, network.normalize)
    identity, run = network.identity(), plan.run_of(network, how["batch_size"])
    strategy = strategy_for(network, recipe, exact=exact, batch_size=run.batch_size)
    width, n_channels = len(identity.probe_embedding), len(identity.probe_pooled)
    plan.check_method(recipe, network, width)
    plan.check_amounts(recipe, source.ids, source.labels, width, n_channels, triplets)
    note = plan.head_note(recipe, network)
    if note is not None:
        log.warning("%s", note)
    job = job_of(
        source,
        network,
        recipe,
        strategy,
        identity,
        path,
        kind="build",
        own_maps=own_maps,
        trust=trust,
        triplets=triplets,
        prompts=prompts or (),
        **how,
    )
    return job, strategy


def finished_build(
    job: Job, path: Path, network: EmbeddingNetwork, *, replace: bool
) -> BuildReport | None:
    """Return what to report where an index holds what a job builds, None where it is to be built.

    Another finished index is refused unless it is to be replaced. For the holder of its lock.
    """
    if not (path / "manifest.json").exists():
        return None
    with Index.open(path) as index:
        if _tidied(index) != job.choices.key and replace:
            return None
        given = None if job.triplets is None else pairs_digest(job.triplets)
        asked = (job.recipe, job.source, job.files, job.choices.own_maps, job.choices.trust)
        skipped = plan.same_index(index, *asked, given, network)
        if job.prompts and not has_mean_of(index, network, job.prompts):
            raise InputError(
                f"{path} holds a finished index of other prompts; choose another folder, or redo "
                "it with --refit (replace=True)"
            )
    log.info("%s holds these images already", path)
    return BuildReport(path, 0, skipped, left_out=job.source.left_out)


def write_build(job: Job, work: Plan, path: Path) -> BuildReport:
    """Write the index of a job whose images are embedded: reductions, what is left, one commit.

    For the holder of the index's lock.
    """
    choices, recipe, network, strategy = job.choices, work.recipe, work.network, work.strategy
    embedded = merge.gather(work)
    anchors = anchors_of(job, work, embedded)
    shard.weigh_chunks(work, anchors, embedded.n_before)
    note, root = plan.head_note(recipe, network), work.source.root
    with work.stages("encode", len(embedded.positions)) as progressed:
        encodings = encodings_of(work, embedded)
        part = merge.encode(work, encodings, embedded, choices.own_maps, root, progressed)
    made = merge.calibrate_build(work, encodings, embedded, part) if choices.trust else None
    of = (embedded.ids, embedded.new, part.labels, recipe, work.stages)
    match = calibrate_match(*of) if choices.trust else None
    grid = merge.grid_of(work)
    named = [(network.layer, grid), *strategy.layers[1:]]
    coarse = strategy.map_grid(grid) if choices.own_maps else None
    entries = [
        merge.layer_entry(*named[number], encoding, None if number else coarse)
        for number, encoding in enumerate(encodings)
    ]
    if note is not None:
        entries[0]["uses_positions"] = True
    about = merge.header(
        recipe,
        {**job.identity.to_dict(), "loading": choices.loading},
        root,
        part.embeddings.shape[1],
        network.normalize,
        entries,
        files=plan.files_digest(job.files[position] for position in embedded.positions),
        given=job.triplets,
    )
    about["run"] = dataclasses.asdict(choices.run)
    if "onnxruntime" in choices.libraries:
        about["libraries"]["onnxruntime"] = choices.libraries["onnxruntime"]
    about["trust_calibration"] = merge.plain(made)
    about["match_calibration"] = merge.plain(match)
    shared = {**job.identity.arrays(), "embedding_mean": embedded.mean, **concepts.fitted(work)}
    if network.texts is not None:
        shared["text_mean"] = text_mean(network, job.prompts or read_prompts(), work.stages)
    fitted = [encoding.fitted for encoding in encodings]
    generation = 1
    if (path / "manifest.json").exists():
        with Index.open(path, with_faiss=False) as index:
            generation = index.manifest.generation + 1
    key = job.choices.key
    Checkpoint.owned(path / CHECKPOINT, key).mark_commit(key, generation)
    writer.create(path, about, fitted, shared, part, replace=generation > 1, stage=work.stages)
    remove_checkpoint(path / CHECKPOINT)
    notes = [] if note is None else [note]
    return _report(work, path, embedded, part, notes, '; resize="squash" shows all of each')


def add_images(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    *,
    update: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    on_unreadable: str = "fail",
    scratch_gb: float = SCRATCH_GB,
    progress: bool | None = None,
    engine: "RayEngine | None" = None,
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
    batch_size
        Images a forward pass; None takes the build's, where that ran on the same kind of device.
    workers, on_unreadable, scratch_gb, progress, engine
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
    how = How(batch_size=batch_size, on_unreadable=on_unreadable, scratch_gb=scratch_gb)
    plan.check_options(source, network, batch_size, on_unreadable, scratch_gb)
    Index.open(path).close()  # refuse a folder without an index before a lock file appears in it
    with (
        plan.disk_errors(path),
        writer.lock(path),
        Index.open(path) as index,
        network.one_thread_each(),
    ):
        network = as_indexed(network, index.layers[0].name)
        stages, changes, gone = Stages(progress), None, list[str]()
        check_additions(index, source, network)

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
        job, strategy = planned_additions(index, source, network, gone=gone, **how)
        if (done := finished_additions(job, index)) is not None:
            return done
        if not update:
            plan.check_new(index, source)
        checkpoint = Checkpoint.owned(path / CHECKPOINT, _key_of_additions(job))
        if engine is not None:
            choices = dataclasses.replace(job.choices, index=str(path.resolve()))
            job = dataclasses.replace(job, choices=choices)
        how_done = (network, checkpoint, stages, workers, strategy)
        job, work = _embedded(job, engine, *how_done)
        if changes is not None:
            skipped = work.skipped()
            changes = changes.without({name for name, _ in skipped})
            if len(skipped) == len(source):
                remove_checkpoint(checkpoint.path)
                return removed(changes, skipped)
        report = write_additions(job, work, index)
    if engine is not None:
        engine.tidy()
    return dataclasses.replace(report, changes=changes)


def check_additions(index: Index, source: ImageSource, network: EmbeddingNetwork) -> bool:
    """Refuse what an index cannot take in; return whether its codes are dy/dz."""
    index.refuse_prototypes(writer.ADD_INSTEAD)
    network.repeat_run(index.manifest.run)
    recipe = Recipe.of_index(index.manifest)
    if source.numbers and recipe.labels != "numbers":
        raise InputError(
            'this index\'s labels are classes and those given are numbers; take labels="auto" '
            "(--labels auto), or build an index of numbers"
        )
    coded_labels(recipe, source.labels, source.ids)
    return _encodings(index, recipe, network)[1]


def planned_additions(
    index: Index,
    source: ImageSource,
    network: EmbeddingNetwork,
    *,
    gone: Sequence[str] = (),
    **how: Unpack[How],
) -> tuple[Job, Strategy]:
    """Return additions to an open index as a job, and how it finds weights."""
    manifest = index.manifest
    repeated, recipe = network.repeat_run(manifest.run), Recipe.of_index(manifest)
    how["batch_size"] = repeated if how["batch_size"] is None else how["batch_size"]
    exact, run = (
        plan.check_addable(recipe, index.encoding(0), network),
        plan.run_of(network, how["batch_size"]),
    )
    strategy = strategy_for(network, recipe, exact=exact, batch_size=run.batch_size)
    job = job_of(
        source,
        network,
        recipe,
        strategy,
        network.identity(),
        index.path,
        kind="add",
        own_maps=manifest.layers[0].coarse_grid is not None,
        trust=False,
        gone=gone,
        index_sha256=manifest.manifest_sha256,
        **how,
    )
    return job, strategy


def finished_additions(job: Job, index: Index) -> BuildReport | None:
    """Return what to report where a job's addition is what made an index as it is, else None."""
    if _tidied(index) != job.choices.key:
        return None
    log.info("%s has these images already", index.path)
    return BuildReport(index.path, 0, [], left_out=job.source.left_out)


def gathered(job: Job, work: Plan, index: Index | None) -> merge.EmbeddedImages:
    """Return what the embedding pass of a job gave, behind the rows of the index it adds to."""
    if index is None:
        return merge.gather(work)
    live = np.setdiff1d(index.live_positions(), index.positions(job.gone))
    return merge.gather(work, index, live)


def anchors_of(job: Job, work: Plan, embedded: merge.EmbeddedImages) -> AnchorCotangents:
    """Return the cotangents of all images of a job.

    Who comes first keeps what is reduced over all of them beside the chunks.
    """
    statistics = None
    if work.checkpoint.intact("reduced", 0):
        statistics = work.checkpoint.read("reduced", 0)
    anchors = merge.anchors_of(work, embedded, job.triplets, statistics)
    if statistics is None:
        work.checkpoint.write("reduced", 0, anchors.statistics(work.stages))
    return anchors


def encodings_of(
    work: Plan, embedded: merge.EmbeddedImages, index: Index | None = None
) -> list[Encoding]:
    """Return the layers' encodings: the index's, or what is fitted once all weights are known.

    Who fits them first keeps them beside the chunks, so that all encode by the same.
    """
    if index is not None:
        return [index.encoding(number) for number in range(len(index.layers))]
    if not work.checkpoint.intact("fitted", 0):
        encodings = merge.fit_encodings(work, embedded.mean)
        arrays = {
            f"layer{number}_{name}": array
            for number, one in enumerate(encodings)
            for name, array in one.fitted.items()
        }
        about = json.dumps([[one.spec(), one.n_channels] for one in encodings])
        arrays["about"] = np.frombuffer(about.encode(), np.uint8)
        work.checkpoint.write("fitted", 0, arrays)
    kept, grid = work.checkpoint.read("fitted", 0), merge.grid_of(work)
    encodings = []
    for number, (spec, n_channels) in enumerate(json.loads(bytes(kept["about"]))):
        of = f"layer{number}_"
        fitted = {n.removeprefix(of): np.array(kept[n]) for n in kept if n.startswith(of)}
        encodings.append(from_spec(spec, n_channels, fitted, grid))
    return encodings


def write_additions(job: Job, work: Plan, index: Index) -> BuildReport:
    """Add the images of a job, which are embedded, to an open index; for the holder of its lock."""
    manifest, path = index.manifest, index.path
    layer, root = manifest.layers[0], manifest.images_root
    embedded = gathered(job, work, index)
    anchors = anchors_of(job, work, embedded)
    shard.weigh_chunks(work, anchors, embedded.n_before)
    if merge.grid_of(work) != tuple(layer.grid or ()):
        raise InputError(
            f"the layer's grid is {list(merge.grid_of(work))} for these images and "
            f"{list(layer.grid or ())} in the index; use the preprocessing that the index was "
            "built with"
        )
    encodings = encodings_of(work, embedded, index)
    with work.stages("encode", len(embedded.positions)) as progressed:
        of = (work, encodings, embedded, job.choices.own_maps)
        part = merge.encode(*of, as_root(root) if root else None, progressed)
    checkpoint = Checkpoint.owned(path / CHECKPOINT, _key_of_additions(job))
    checkpoint.mark_commit(job.choices.key, manifest.generation + 1)
    writer.append(path, part, removing=job.gone, stage=work.stages)
    remove_checkpoint(checkpoint.path)
    return _report(work, path, embedded, part)


def _key_of_additions(job: Job) -> str:
    # Chunks of weights depend on the rows there are, which the finished index no longer tells.
    return f"{job.choices.key} {job.choices.index_sha256}"


def calibrate_index(
    path: str | Path,
    network: EmbeddingNetwork | None = None,
    *,
    images: str | Path | None = None,
    batch_size: int | None = None,
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
        embeddings, labels = IndexRows(index, live), LabelColumn.of(in_runs(index.labels, live))
        ids = Texts.of(in_runs(index.ids, live))
        stages = Stages(progress)
        match = calibrate_match(ids, embeddings, labels, recipe, stages)
        made = {"match": (merge.plain(match), LEAST_MATCH)}
        if network is not None:
            network = as_indexed(network, index.layers[0].name)
            repeated = network.repeat_run(manifest.run)
            encodings, _ = _encodings(index, recipe, network)
            of_run = plan.run_of(network, repeated if batch_size is None else batch_size)
            rows, source = trust_rows(ids, recipe, network), indexed_images(index, images)
            preprocess = network.require_preprocess()
            batches = load_batches(source, rows, preprocess, of_run.batch_size, workers=workers)
            views = forwarded(network, manifest.layer_names, batches)

            def fields(layer: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
                return index.select(live[chosen]).fields(layer)

            with stages("trust", len(rows)) as progressed:
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
    columns = (in_runs(strings, live) for strings in (index.ids, index.paths, index.labels))
    items = Listing.of(map(Item, *columns))
    if "" in items.paths:
        raise InputError(
            "the index does not know where its images lie (it was built from a data set or from "
            "features), so it cannot be refitted from them; build it again from its source"
        )
    chosen = index.manifest.images_root if root is None else root
    folder = None if not chosen else as_root(chosen)
    elsewhere = filter(is_url, items.paths)
    address = next((one for one in elsewhere if folder is None or not is_below(one, folder)), None)
    if root is None and isinstance(folder, str):
        address = folder
    if address is not None:
        raise InputError(
            f"the index names pictures at {cut(address, 200)}, and addresses are read where you "
            "name them: give the list or the folder that they were indexed from as the images"
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
    folder = index.path / CHECKPOINT
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
    notes += report.notes
    return dataclasses.replace(report, skipped=embedded.skipped, left_out=left_out, notes=notes)
