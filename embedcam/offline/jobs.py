"""The jobs: build an index, add images to one, and calibrate one."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..images import MAX_PIXELS, ImageSource, Item, load_batches
from ..index import (
    ADD_INSTEAD,
    EmbeddingRows,
    Index,
    PartData,
    append,
    check_target,
    create,
    lock,
    put_calibrations,
    remove,
    sweep,
)
from ..index.identity import Identity
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe
from .assembly import (
    Gathered,
    described,
    encode,
    fit_encodings,
    gather,
    grid_of,
    header,
    layer_entry,
)
from .calibrating import calibrate_build, calibrate_trust, forwarded, trust_rows
from .changes import Changes, changes_since
from .checks import (
    check_addable,
    check_amounts,
    check_method,
    check_new,
    check_norm,
    check_options,
    disk_errors,
    files_digest,
    head_note,
    layers_of,
    same_index,
    warn_of_norm,
)
from .classes import alone
from .cotangents import AnchorCotangents, coded_labels
from .match_fit import LEAST as LEAST_MATCH
from .match_fit import calibrate_match
from .passes import (
    Work,
    chunk_size,
    embedding_pass,
    is_exact,
    own_grid,
    skipped_of,
    spilled_numbers,
    weights_pass,
)
from .report import BuildReport, Stages, label_counts, number_range
from .scratch import Scratch, finished_job
from .scratch import remove as remove_scratch
from .triplets import pairs_digest
from .trust import LEAST

log = logging.getLogger(__name__)

SCRATCH_GB = 50.0
"""Activations kept between the passes, at most; beyond it own maps cost one more forward pass."""
_SCRATCH = ".building"
_CHUNKS = 2
"""Version of what the chunks hold: older ones are not used again."""


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

    Args:
        source: the images, from `find_images` or `from_dataset`.
        network: the network to explain, with its preprocessing.
        path: folder of the index; created where missing.
        recipe: the choices; None takes the defaults, which are what measured best.
        batch_size: images a forward pass; changes nothing beyond float rounding.
        workers: threads that decode images; None takes one for each core.
        on_unreadable: "fail" at an image that cannot be read, or "skip" and report it.
        triplets: with sampling "given": places in the source of (positive, negative), `[N S 2]`.
        own_maps: keep each image's own coarse map, so that results need no forward pass.
        trust: calibrate how far transfers and first results can be trusted.
        scratch_gb: disk that kept activations may take during the build; changes nothing else.
        replace: redo a finished index instead of refusing.
        progress: bars; None shows them on a terminal or in a notebook, else logs how far it is.

    Returns:
        What was done. The index itself is opened with `Index.open(path)`.

    Raises:
        RecipeError: choices that do not go together.
        ImageError: an unreadable image, with on_unreadable="fail".
        InputError: no images, too few, a single label, or a folder that holds something else.
        EmbedcamError: the disk is full or cannot be written; what is finished is used again.
    """
    recipe, path = _for_labels(recipe or Recipe(), source), Path(path)
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
    job = _digest(
        recipe, identity, source, files, chunk_size(batch_size, recipe.method), own_maps, given
    )
    with disk_errors(path), lock(path):
        generation = 1
        if (path / "manifest.json").exists():
            with Index.open(path) as index:
                generation = index.manifest.generation + 1
                if _tidied(index) == job or not replace:
                    skipped = same_index(
                        index, recipe, identity, source, files, own_maps, trust, given, network
                    )
                    log.info("%s holds these images already", path)
                    return BuildReport(path, 0, skipped, left_out=source.left_out)
        scratch = Scratch(path / _SCRATCH, job)
        keep = own_maps and _may_keep(network, source, exact, layers, scratch_gb, scratch)
        work = Work(
            network, source, recipe, scratch, batch_size, workers, on_unreadable, keep, exact,
            layers,
        )  # fmt: skip
        stages = Stages(progress)
        _embed(work, stages)
        gathered, labels, mean = _weights(work, stages, triplets)
        root = None if source.root is None else source.root.resolve()
        with stages("encode"):
            encodings = fit_encodings(work, mean)
            part = encode(work, encodings, gathered, mean, own_maps, source.root)
        calibrated = None
        if trust:
            with stages("trust", len(trust_rows(len(part), recipe, network))) as tick:
                calibrated = calibrate_build(work, encodings, gathered, part, tick)
        with stages("write"):
            grid = grid_of(work)
            about = header(
                recipe,
                described(network, identity),
                root,
                width,
                network.normalize,
                network.layer,
                grid,
                encodings[0],
                own_grid(work, grid) if own_maps else None,
                files=files_digest([files[position] for position in gathered.positions]),
                given=triplets,
            )
            if note is not None:
                about["layers"][0]["uses_positions"] = True
            about["trust_calibration"] = calibrated
            if trust:
                about["match_calibration"] = calibrate_match(
                    gathered.own, part.labels, recipe.metric, recipe.seed, recipe.near
                )
            about["layers"] += [
                layer_entry(name, own, encoding, None)
                for (name, own), encoding in zip(layers[1:], encodings[1:], strict=True)
            ]
            shared = {**identity.arrays(), "embedding_mean": mean}
            scratch.promise(job, generation)
            fitted = [encoding.fitted for encoding in encodings]
            create(path, about, fitted, shared, part, replace=generation > 1)
        scratch.remove()
    return _report(
        work, path, part, gathered, labels, stages, '; resize="squash" shows all of each', note
    )


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

    Args:
        source: the new images; their ids must not be in the index.
        network: the one the index was built with; another is refused.
        path: folder of the index.
        update: the source is the whole collection that the index was built from: what is new is
            added, what has vanished is removed, and what has changed is replaced, in one step; see
            `BuildReport.changes`.
        batch_size, workers, on_unreadable, scratch_gb, progress: as for `build_index`.

    Raises:
        NetworkMismatch: the network is not the index's.
        InputError: ids that are in the index already, an index of prototypes, or, for an update,
            another collection than the index was built from.
        ImageError: an unreadable image, with on_unreadable="fail".
        EmbedcamError: the disk is full or cannot be written; what is finished is used again.
    """
    path = Path(path)
    check_options(source, network, batch_size, on_unreadable, scratch_gb)
    Index.open(path).close()  # refuse a folder without an index before a lock file appears in it
    with disk_errors(path), lock(path), Index.open(path) as index:
        manifest = index.manifest
        index.refuse_prototypes(ADD_INSTEAD)
        encodings = [index.encoding(number) for number in range(len(index.layers))]
        recipe = Recipe.of_index(manifest)
        _check_labels(recipe, source)
        network.for_index(_identity_of(index))
        stages, live = Stages(progress), index.live_positions()
        changes, gone = None, list[str]()
        if update:
            with stages("compare", len(source)) as tick:
                changes, places = changes_since(index, source, tick)
            gone = changes.gone
            if not places:
                _tidied(index)
                return _removed(path, changes, source, [], stages)
            source = source.only(places)
            live = np.setdiff1d(live, index.positions(gone))
        exact = check_addable(recipe, encodings[0], network)
        layers = layers_of(network, recipe)
        files = [source.fingerprint(position) for position in range(len(source))]
        job = _digest(
            recipe,
            network.identity(),
            source,
            files,
            chunk_size(batch_size, recipe.method),
            *sorted(gone),
        )
        if _tidied(index) == job:
            log.info("%s has these images already", path)
            return BuildReport(path, 0, [], left_out=source.left_out)
        if not update:
            check_new(index, source)
        layer = manifest.layers[0]
        with_maps = layer.coarse_grid is not None
        scratch = Scratch(path / _SCRATCH, f"{job} {manifest.manifest_sha256}")
        keep = with_maps and _may_keep(network, source, exact, layers, scratch_gb, scratch)
        work = Work(
            network, source, recipe, scratch, batch_size, workers, on_unreadable, keep, exact,
            layers,
        )  # fmt: skip
        _embed(work, stages)
        if changes is not None:
            skipped = [
                (source.items[position].id, reason)
                for chunk in range(work.n_chunks)
                for position, reason in skipped_of(work, chunk)
            ]
            changes = changes.without({name for name, _ in skipped})
            if len(skipped) == len(source):
                scratch.remove()
                return _removed(path, changes, source, skipped, stages)
        gathered, labels, mean = _weights(work, stages, None, index, live)
        if list(grid_of(work)) != list(layer.grid or ()):
            raise InputError(
                f"the layer's grid is {list(grid_of(work))} for these images and "
                f"{list(layer.grid or ())} "
                "in the index; use the preprocessing that the index was built with"
            )
        with stages("encode"):
            root = manifest.images_root
            stored_root = None if root is None else Path(root)
            part = encode(work, encodings, gathered, mean, with_maps, stored_root)
        with stages("write"):
            scratch.promise(job, manifest.generation + 1)
            append(path, part, removing=gone)
        scratch.remove()
    return replace(_report(work, path, part, gathered, labels, stages), changes=changes)


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

    Weights stay as they are. Match needs no pictures; trust forwards a sample of them.

    Args:
        path: folder of the index.
        network: the one it was built with; None calibrates match alone.
        images: folder the pictures lie in now; None takes the one they were built from.
        batch_size, workers, progress: as for `build_index`.

    Returns:
        With how many images each of "match" and "trust" was calibrated.

    Raises:
        InputError: too few images; an index of prototypes, or one of features asked for trust.
        NetworkMismatch: the network is not the index's.
        ImageError: a picture of the sample cannot be read.
    """
    path = Path(path)
    with Index.open(path, with_faiss=False) as index:
        manifest, live = index.manifest, index.live_positions()
        index.refuse_prototypes("calibrate the index before compressing it")
        recipe = Recipe.of_index(manifest)
        # Read where they are asked for: a large collection's need not fit into memory.
        embeddings, labels = EmbeddingRows(index, live), list(index.labels[live])
        made = {
            "match_calibration": calibrate_match(
                embeddings, labels, recipe.metric, recipe.seed, recipe.near
            )
        }
        if network is not None:
            network.for_index(_identity_of(index))
            encodings = [index.encoding(number) for number in range(len(index.layers))]
            check_addable(recipe, encodings[0], network)
            rows = trust_rows(len(live), recipe, network)
            source = indexed_images(index, images)
            batches = load_batches(source, rows, network.preprocess, batch_size, workers=workers)
            layers = manifest.layer_names
            with Stages(progress)("trust", len(rows)) as tick:
                made["trust_calibration"] = calibrate_trust(
                    recipe,
                    network,
                    encodings,
                    lambda layer, chosen: index.select(live[chosen]).fields(layer),
                    embeddings,
                    labels,
                    rows,
                    forwarded(network, layers, batches),
                    tick,
                )
    for name, one in made.items():
        if one is None:
            least = LEAST_MATCH if name == "match_calibration" else LEAST
            what = name.partition("_")[0]
            raise InputError(
                f"{path}: {len(live)} images calibrate no {what}; add images until there are at "
                f"least {least}"
            )
    put_calibrations(path, made, manifest.manifest_sha256)
    return {
        name.partition("_")[0]: int(one["several"]["images"]) for name, one in made.items() if one
    }


def indexed_images(
    index: Index, root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> ImageSource:
    """The images of an index as a source again, for `build_index(..., replace=True)` (a refit).

    Args:
        index: an open index.
        root: folder the images lie in now; None takes the one they were built from.
        max_pixels: limit of a picture's pixels.

    Raises:
        InputError: an index of prototypes, or one that does not know where its images lie.
    """
    instead = "refit the index it was compressed from, and compress that again"
    index.refuse_prototypes(instead)
    live = index.live_positions()
    listed = zip(index.ids[live], index.paths[live], index.labels[live], strict=True)
    items = [Item(name, path, label) for name, path, label in listed]
    if any(not item.path for item in items):
        raise InputError(
            "the index does not know where its images lie (it was built from a data set or from "
            "features), so it cannot be refitted from them; build it again from its source"
        )
    stored = index.manifest.images_root
    chosen = root if root is not None else stored
    return ImageSource(
        items,
        None if chosen is None else Path(chosen),
        max_pixels=max_pixels,
        numbers=index.manifest.near_share is not None,
    )


def _for_labels(recipe: Recipe, source: ImageSource) -> Recipe:
    """The recipe, of numbers where the source's labels are numbers."""
    return replace(recipe, labels="numbers") if source.numbers else recipe


def _check_labels(recipe: Recipe, source: ImageSource) -> None:
    """Refuse labels of new images that an index cannot take, before any is embedded."""
    if source.numbers and recipe.labels != "numbers":
        raise InputError(
            'this index\'s labels are classes and those given are numbers; take labels="auto" '
            "(--labels auto), or build an index of numbers"
        )
    coded_labels(recipe, source.labels, source.ids)


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


def _embed(work: Work, stages: Stages) -> None:
    """The first pass over the images."""
    with stages("embed", len(work.source)) as tick:
        embedding_pass(work, tick)


def _weights(
    work: Work,
    stages: Stages,
    triplets: np.ndarray | None,
    index: Index | None = None,
    live: np.ndarray | None = None,
) -> tuple[Gathered, np.ndarray | None, np.ndarray]:
    """The second pass; the labels `[N]` of old images (`live` ones of an index) and of new ones,
    and the mean embedding."""
    gathered = gather(work, index, live)
    rows = None if index is None or live is None else index.select(live)
    before, ids = ([], []) if rows is None else (rows.labels, rows.ids)
    items = [work.source.items[position] for position in gathered.positions]
    labels = coded_labels(
        work.recipe,
        [*before, *(item.label for item in items)],
        [*ids, *(item.id for item in items)],
    )
    if index is None:
        mean = gathered.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    else:
        mean = index.fitted("embedding_mean")
    given = None if triplets is None else _without_skipped(triplets, gathered, work.source)
    anchors = AnchorCotangents(work.recipe, gathered.embeddings, labels, mean, given)
    with stages("weights", len(gathered.positions)) as tick:
        weights_pass(work, anchors, gathered.n_before, tick)
    return gathered, labels, mean


def _without_skipped(triplets: np.ndarray, gathered: Gathered, source: ImageSource) -> np.ndarray:
    """Given triplets as places among the images that could be read."""
    if not gathered.skipped:
        return triplets
    new_place = np.full(len(source), -1)
    new_place[gathered.positions] = np.arange(len(gathered.positions))
    kept = new_place[np.asarray(triplets)[gathered.positions]]
    if (lost := (kept < 0).any((1, 2))).any():
        name = source.items[gathered.positions[lost.argmax()]].id
        raise InputError(
            f"the triplets of image {name!r} name an image that could not be read (skipped: "
            f"{', '.join(repr(name) for name, _ in gathered.skipped[:3])}); give it others"
        )
    return kept


def _tidied(index: Index) -> str | None:
    """The job that made this generation and was killed before it had tidied up, which is done."""
    scratch = index.path / _SCRATCH
    job = finished_job(scratch, index.manifest.generation)
    empty = scratch.is_dir() and not scratch.is_symlink() and not any(scratch.iterdir())
    if job is not None or empty:
        sweep(index.path)
        remove_scratch(scratch)
    return job


def _may_keep(
    network: EmbeddingNetwork,
    source: ImageSource,
    exact: bool,
    layers: Sequence[object],
    scratch_gb: float,
    scratch: Scratch,
) -> bool:
    """Whether activations are kept on disk, in half precision, between the passes."""
    if layers:
        return False  # a method of several layers makes the own maps along with its weights
    needed = 2 * spilled_numbers(network, exact) * len(source)
    fits = needed <= min(scratch_gb * 1e9, 0.8 * scratch.free_bytes())
    if not fits and scratch_gb:
        log.warning(
            "keeping the activations of all images would take %.1f GB, more than allowed; the "
            "images' own maps take one more forward pass instead",
            needed / 1e9,
        )
    return fits


def _identity_of(index: Index) -> Identity:
    stored = index.identity
    if stored is None:
        raise InputError(
            "this index was built from features alone and does not know its network; build it "
            "again with all images"
        )
    return stored


def _digest(
    recipe: Recipe, identity: Identity, source: ImageSource, files: list[str], *choices: Any
) -> str:
    """Digest of everything the chunks of a job depend on."""
    digest = hashlib.sha256(recipe.resolved.digest().encode())
    root = None if source.root is None else str(source.root.resolve())
    digest.update(json.dumps([identity.to_dict(), root], sort_keys=True).encode())
    for item, file in zip(source.items, files, strict=True):
        digest.update(json.dumps([item.id, item.path, item.label, file]).encode())
    # The probe speaks for code that parameters do not show, to the bit: so do the chunks.
    probe = [array for _, array in sorted(identity.arrays().items())]
    # A picture that was skipped for its size may be read by another limit.
    choices += (source.max_pixels,) if source.max_pixels != MAX_PIXELS else ()
    for choice in (_CHUNKS, torch.__version__, np.__version__, *probe, *choices):
        data = choice.tobytes() if isinstance(choice, np.ndarray) else repr(choice).encode()
        digest.update(data + b"\0")
    return digest.hexdigest()


def _report(
    work: Work,
    path: Path,
    part: PartData,
    gathered: Gathered,
    labels: np.ndarray | None,
    stages: Stages,
    against_crop: str = "",
    of_head: str | None = None,
) -> BuildReport:
    """What was done.

    Args:
        work: of the job.
        path: of the index.
        part: what was written.
        gathered: what the embedding pass found.
        labels: codes of old and new images, or None.
        stages: their times.
        against_crop: what shows all of a picture, where there is something to be done.
        of_head: what to know of the network's head, if anything.
    """
    n_single, recipe, n = 0, work.recipe, len(gathered.positions)
    if labels is not None and recipe.resolved_target != "centred" and recipe.sampling != "given":
        n_single = int(alone(labels)[gathered.n_before :].sum())
    notes = [*work.source.notes, *([] if of_head is None else [of_head])]
    if gathered.n_cropped:
        notes.append(
            f"the crop leaves out more than a quarter of {gathered.n_cropped:,} of {n:,} "
            f"pictures{against_crop}"
        )
    return BuildReport(
        path,
        n,
        gathered.skipped,
        n_single,
        int((np.asarray(part.triplets_used) == 0).sum()),
        stages.seconds,
        *label_counts(part.labels, recipe.labels),
        work.source.left_out,
        notes,
        numbers=number_range(part.labels, recipe.labels),
    )
