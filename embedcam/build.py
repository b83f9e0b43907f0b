"""OFFLINE: a network and its images -> an index on disk. Resumable, and the same bytes each time.

    embed -> weights -> fit the encoding -> encode and draw own maps -> write

Each arrow is a set of finished chunks in a scratch folder inside the index's own, so a job killed
at any moment goes on where it stopped. `explain` never imports this file: they meet on disk.
"""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .assembly import Gathered, encode, fit_encoding, gather, grid_of, header
from .cotangents import AnchorCotangents
from .encoding import Encoding
from .errors import InputError, RecipeError
from .identity import Identity, check, fingerprint
from .images import ImageSource, Item
from .images.batches import default_workers
from .index import Index, PartData, append, create, lock
from .network import EmbeddingNetwork
from .passes import Work, chunk_size, coarse_grid, embedding_pass, weights_pass
from .recipe import Recipe, RecipeWarning
from .scratch import Scratch
from .triplets import Classes, label_codes

log = logging.getLogger(__name__)

SCRATCH_GB = 50.0
"""Activations kept between the passes, at most; beyond it own maps cost one more forward pass."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the index.
        n_images: images indexed by this job.
        skipped: (id, reason) of images that could not be read.
        n_single: labels that only one image has.
        n_without_triplets: images whose every triplet was satisfied: their weights are zero.
        seconds: wall time of each stage.
    """

    path: Path
    n_images: int
    skipped: list[tuple[str, str]]
    n_single: int = 0
    n_without_triplets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


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
        triplets: with sampling "given": places of (positive, negative), `[N S 2]`.
        own_maps: keep each image's own coarse map, so that results need no forward pass.
        scratch_gb: disk that kept activations may take during the build.
        replace: redo a finished index instead of refusing.
        progress: bars; None shows them on a terminal only.

    Returns:
        What was done. The index itself is opened with `Index.open(path)`.

    Raises:
        RecipeError: choices that do not go together.
        ImageError: an unreadable image, with on_unreadable="fail".
        InputError: no images, too few, or a single label.
        IndexFormatError: the folder holds something else.
    """
    recipe, path = recipe or Recipe(), Path(path)
    if len(source) == 0:
        raise InputError("there are no images to index; give a folder or a CSV that names some")
    _check_choices(recipe, network, on_unreadable)
    identity = fingerprint(network)
    with lock(path):
        finished = (path / "manifest.json").exists()
        if finished and not replace:
            return _already_built(path, recipe, identity, source)
        key = _digest(
            recipe.digest(), identity, source, chunk_size(batch_size), on_unreadable, own_maps,
            scratch_gb, triplets,
        )  # fmt: skip
        scratch = Scratch(path / ".building", key)
        keep = own_maps and _keeps_grids(network, len(source), scratch_gb, scratch)
        work = Work(
            network, source, recipe, scratch, batch_size, _workers(workers), on_unreadable, keep
        )
        clock = _Clock()
        with clock("embed"), _bar(len(source), "embedding", progress) as tick:
            embedding_pass(work, tick)
        gathered = gather(work)
        labels = _labels(work, gathered, [])
        mean = gathered.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
        anchors = AnchorCotangents(recipe, gathered.embeddings, labels, mean, triplets)
        with clock("weights"), _bar(len(gathered.positions), "weights", progress) as tick:
            weights_pass(work, anchors, 0, tick)
        with clock("encode"):
            encoding = fit_encoding(work, mean)
            part = encode(work, encoding, gathered, mean, own_maps)
        with clock("write"):
            described = _header(work, identity, encoding, own_maps)
            shared = {**identity.arrays(), "embedding_mean": mean}
            create(path, described, [encoding.fitted], shared, part, replace=finished)
        scratch.remove()
    n_single = 0 if labels is None else Classes(labels).n_single
    return _report(path, part, gathered, n_single, clock)


def add_images(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    *,
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
        batch_size, workers, on_unreadable, scratch_gb, progress: as for `build_index`.

    Raises:
        NetworkMismatch: the network is not the index's.
        InputError: ids that are in the index already.
        ImageError: an unreadable image, with on_unreadable="fail".
    """
    path = Path(path)
    _refuse_missing(path)
    with lock(path), Index.open(path) as index:
        recipe = _recipe_of(index)
        identity = _identity_of(index)
        check(identity, network)
        _refuse_known(index, source)
        encoding, with_maps = (
            index.encoding(),
            index.manifest["layers"][0]["coarse_grid"] is not None,
        )
        key = _digest(
            index.manifest["manifest_sha256"], identity, source, chunk_size(batch_size),
            on_unreadable, scratch_gb,
        )  # fmt: skip
        scratch = Scratch(path / ".building", key)
        keep = with_maps and _keeps_grids(network, len(source), scratch_gb, scratch)
        work = Work(
            network, source, recipe, scratch, batch_size, _workers(workers), on_unreadable, keep
        )
        clock = _Clock()
        with clock("embed"), _bar(len(source), "embedding", progress) as tick:
            embedding_pass(work, tick)
        live = index.live_positions()
        gathered = gather(work, index.embeddings(live))
        labels = _labels(work, gathered, index.labels[live])
        mean = index.fitted("embedding_mean")
        anchors = AnchorCotangents(recipe, gathered.embeddings, labels, mean)
        with clock("weights"), _bar(len(gathered.positions), "weights", progress) as tick:
            weights_pass(work, anchors, len(live), tick)
        with clock("encode"):
            part = encode(work, encoding, gathered, mean, with_maps)
        with clock("write"):
            append(path, part)
        scratch.remove()
    return _report(path, part, gathered, 0, clock)


def indexed_images(index: Index, root: str | Path | None = None) -> ImageSource:
    """The images of an index as a source again, for `build_index(..., replace=True)` (a refit).

    Args:
        index: an open index.
        root: folder the images lie in now; None takes the one they were built from.
    """
    live = index.live_positions()
    listed = zip(index.ids[live], index.paths[live], index.labels[live], strict=True)
    items = [Item(name, path, label) for name, path, label in listed]
    if any(not item.path for item in items):
        raise InputError(
            "the index does not know where its images lie (it was built from a data set or from "
            "features), so it cannot be refitted from them; build it again from its source"
        )
    stored = (index.manifest["images"] or {}).get("root")
    chosen = root if root is not None else stored
    return ImageSource(items, None if chosen is None else Path(chosen))


def _check_choices(recipe: Recipe, network: EmbeddingNetwork, on_unreadable: str) -> None:
    if on_unreadable not in ("fail", "skip"):
        raise InputError(f"on_unreadable = {on_unreadable!r}; use 'fail' or 'skip'")
    if network.preprocess is None:
        raise InputError(
            "the network has no preprocessing, so images cannot be turned into its input; give "
            "EmbeddingNetwork(..., preprocess=Preprocess(...))"
        )
    if recipe.norm == "around" and network.normalize and network.already_normalized:
        raise RecipeError(
            "norm 'around' needs the embedding before its L2 norm, and this module normalises its "
            "output itself; use norm 'through', or a module that returns the vector before the norm"
        )
    if recipe.target == "centred" and recipe.norm == "through" and network.normalize:
        warnings.warn(
            "the centred target through the L2 norm loses its own part at the image itself and "
            "can point at the wrong object; 'around' is the safe choice",
            RecipeWarning,
            stacklevel=3,
        )


def _already_built(
    path: Path, recipe: Recipe, identity: Identity, source: ImageSource
) -> BuildReport:
    """The report of an index that is complete as asked for; an error where it is another one."""
    with Index.open(path) as index:
        live = index.live_positions()
        differs = [
            what
            for what, same in (
                ("recipe", index.manifest["recipe_sha256"] == recipe.digest()),
                (
                    "network",
                    identity.to_dict().items() <= (index.manifest["network"] or {}).items(),
                ),
                ("list of images", set(index.ids[live]) <= set(source.ids)),
            )
            if not same
        ]
    if differs:
        raise InputError(
            f"{path} holds a finished index with another {' and '.join(differs)}; choose another "
            "folder, add images with `embedcam add`, or redo it with --refit (replace=True)"
        )
    log.info("%s is complete already", path)
    return BuildReport(path, 0, [])


def _header(work: Work, identity: Identity, encoding: Encoding, own_maps: bool) -> dict[str, Any]:
    grid = grid_of(work)
    return header(
        work.recipe,
        {**identity.to_dict(), "loading": work.network.spec},
        work.source.root,
        len(identity.probe_embedding),
        work.network.normalize,
        work.network.layer,
        grid,
        encoding,
        coarse_grid(grid) if own_maps else None,
    )


def _labels(work: Work, gathered: Gathered, before: list[str | None]) -> np.ndarray | None:
    items = work.source.items
    return label_codes([*before, *(items[position].label for position in gathered.positions)])


def _keeps_grids(
    network: EmbeddingNetwork, n_images: int, scratch_gb: float, scratch: Scratch
) -> bool:
    """Whether the activations of all images fit on disk between the passes."""
    activations = network.forward(network.probe_images()).activations
    needed = n_images * activations[0].numel() * 2
    fits = needed <= min(scratch_gb * 1e9, 0.8 * scratch.free_bytes())
    if not fits:
        log.warning(
            "keeping the activations of %d images would take %.1f GB, more than allowed; the "
            "images' own maps take one more forward pass instead",
            n_images,
            needed / 1e9,
        )
    return fits


def _refuse_missing(path: Path) -> None:
    """Refuse a folder without an index, before a lock file appears in it."""
    Index.open(path).close()


def _refuse_known(index: Index, source: ImageSource) -> None:
    known = sorted(index.find_live(source.ids))
    if known:
        some = ", ".join(known[:3]) + (" ..." if len(known) > 3 else "")
        raise InputError(
            f"{len(known)} of {len(source)} images are in the index already ({some}); remove them "
            "from the index first, or leave them out"
        )


def _recipe_of(index: Index) -> Recipe:
    recipe = Recipe.from_dict(index.manifest["recipe"], "the index's recipe")
    if recipe.sampling == "given":
        raise InputError(
            "this index was built from given triplets, which say nothing about new images; build "
            "it again with all images and their triplets"
        )
    return recipe


def _identity_of(index: Index) -> Identity:
    stored = index.manifest["network"]
    if stored is None:
        raise InputError(
            "this index was built from features alone and does not know its network; build it "
            "again with all images"
        )
    return Identity.from_dict(stored, index.probe())


def _digest(start: str, identity: Identity, source: ImageSource, *choices: Any) -> str:
    """Digest of everything the chunks of a job depend on."""
    digest = hashlib.sha256(start.encode())
    digest.update(json.dumps(identity.to_dict(), sort_keys=True).encode())
    for position, item in enumerate(source.items):
        row = [item.id, item.path, item.label, source.fingerprint(position)]
        digest.update(json.dumps(row).encode())
    for choice in (torch.__version__, *choices):
        data = choice.tobytes() if isinstance(choice, np.ndarray) else repr(choice).encode()
        digest.update(data + b"\0")
    return digest.hexdigest()


def _report(
    path: Path, part: PartData, gathered: Gathered, n_single: int, clock: "_Clock"
) -> BuildReport:
    return BuildReport(
        path,
        len(gathered.positions),
        gathered.skipped,
        n_single,
        int((np.asarray(part.triplets_used) == 0).sum()),
        clock.seconds,
    )


def _workers(workers: int | None) -> int:
    return default_workers() if workers is None else workers


class _Clock:
    """Wall seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


@contextmanager
def _bar(total: int, stage: str, progress: bool | None) -> Iterator[Any]:
    """A progress bar's `update`; silent where not asked for, or not on a terminal."""
    silent = None if progress is None else not progress
    with tqdm(total=total, desc=stage, unit=" images", disable=silent) as bar:
        yield bar.update
