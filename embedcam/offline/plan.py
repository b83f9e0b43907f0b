"""What one build does: images, recipe, strategy, batches; and what it refuses before it begins."""

import errno
import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import PIL
import torch

from .. import __version__
from .._checks import one_of, whole
from ..errors import EmbedcamError, ImageError, InputError, NetworkMismatch, RecipeError
from ..images import Batch, ImageSource, embed, load_batches, map_batches, root_text
from ..images.batches import default_workers, usable_cores
from ..images.texts import Texts
from ..index import Index, RunEntry, check_factory
from ..index.encoding import Encoding, LowRank, TopM
from ..index.identity import Identity
from ..methods import Subject, run_method
from ..methods.masking import fill_like
from ..network import EmbeddingNetwork
from ..onnx import runtime_version
from ..recipe.recipe import Recipe, RecipeWarning
from ..recipe.registry import PositionMethod
from ..targets import Direction
from .checkpoint import Checkpoint
from .cotangents import AnchorCotangents, coded_labels
from .report import Stages
from .strategies import POOLED_METHODS, Strategy
from .triplets import sample_of
from .trust import LEAST

log = logging.getLogger(__name__)
T = TypeVar("T")

SCRATCH_GB = 50.0
"""Activations cached between the passes, at most; beyond it stored maps cost one more forward."""
CHUNK = 256
"""Images a chunk, at least; a kill loses at most one chunk of work."""
SAMPLED = 2048
"""Images that concepts are fitted to, at most."""
_CHUNKS = 5
"""Version of what the chunks hold: older ones are not used again."""
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


@dataclass(frozen=True)
class Plan:
    """One build's inputs, the checkpoint that keeps its unfinished work, and what shows progress.

    `on_unreadable` is "fail" or "skip"; so many `workers` read images, and on a CPU run them; a
    chunk has `per_chunk` images, and `fits` says whether something is fitted to them, as additions
    to an index do not. Where `files` holds fingerprints of the source's images, one that
    has another when it is read is an ImageError.
    """

    network: EmbeddingNetwork
    source: ImageSource
    recipe: Recipe
    strategy: Strategy
    checkpoint: Checkpoint
    stages: Stages
    run: RunEntry
    workers: int | None
    on_unreadable: str
    per_chunk: int
    files: Texts | None = None
    fits: bool = True

    @property
    def batch_size(self) -> int:
        """Images a forward pass."""
        return self.run.batch_size

    @property
    def chunks(self) -> range:
        """Chunks of the whole source."""
        return range(-(-len(self.source) // self.per_chunk))

    def positions(self, chunk: int) -> np.ndarray:
        """Return places in the source of a chunk's images."""
        size = self.per_chunk
        return np.arange(chunk * size, min((chunk + 1) * size, len(self.source)))

    def batches(
        self, positions: np.ndarray, *, marked: bool = False
    ) -> Generator[Batch, None, None]:
        """Load batches of images at these places in the source, `marked` with their files'."""
        self._check_files(positions)
        of = (self.source, positions, self.network.require_preprocess(), self.batch_size)
        on_error: Literal["fail", "skip"] = "fail" if self.on_unreadable == "fail" else "skip"
        return load_batches(*of, workers=self.workers, on_error=on_error, marked=marked)

    def each_batch(
        self,
        positions: np.ndarray,
        work: Callable[[Strategy, EmbeddingNetwork, Batch], T],
        *,
        marked: bool = False,
    ) -> Generator[T, None, None]:
        """Yield in order what `work` makes of each batch, on a CPU several side by side."""
        runs = [partial(work, *one) for one in self.side_by_side]
        if len(runs) == 1:
            with closing(self.batches(positions, marked=marked)) as batches:
                yield from map(runs[0], batches)
            return
        self._check_files(positions)
        of = (self.source, positions, self.network.require_preprocess(), self.batch_size, runs)
        on_error: Literal["fail", "skip"] = "fail" if self.on_unreadable == "fail" else "skip"
        alone = partial(torch.set_num_threads, 1)
        n = self._workers
        yield from map_batches(*of, workers=n, on_error=on_error, marked=marked, start=alone)

    @cached_property
    def sampled(self) -> np.ndarray:
        """Which images of the source concepts are fitted to, bool `[N]`."""
        chosen = np.zeros(len(self.source), bool)
        if self.recipe.concepts:
            chosen[sample_of(self.source.ids, self.recipe.seed, SAMPLED)] = True
        return chosen

    @cached_property
    def side_by_side(self) -> list[tuple[Strategy, EmbeddingNetwork]]:
        """Strategies with their networks: one for a thread that reads images, no more than cores.

        More workers wait for a store or a disk; what a pass takes of memory is not for those.
        """
        networks = self.network.side_by_side(min(self._workers, usable_cores()))
        return [(self.strategy.by(network), network) for network in networks]

    @property
    def _workers(self) -> int:
        return default_workers() if self.workers is None else max(1, self.workers)

    def _check_files(self, positions: np.ndarray) -> None:
        if self.files is None:
            return
        now = self.source.only(positions.tolist()).fingerprints()
        for position, fingerprint in zip(positions.tolist(), now, strict=True):
            if fingerprint != self.files[position]:
                what = "was removed" if fingerprint == "unreadable" else "changed"
                raise ImageError(
                    f"{self.source.name(position)}: its file {what} after the job was planned; "
                    "put the old one back, or plan the job again in another folder"
                )

    def embedded(self, chunk: int) -> np.ndarray:
        """Return places in the source of a finished chunk's images that could be embedded."""
        return np.array(self.checkpoint.column("embed", chunk, "positions"))

    def unusable(self, chunk: int) -> list[tuple[str, str]]:
        """Return (id, reason) of a finished chunk's images that cannot be read or embedded."""
        text = bytes(self.checkpoint.column("embed", chunk, "errors"))
        return [(self.source.items[position].id, message) for position, message in json.loads(text)]

    def skipped(self) -> list[tuple[str, str]]:
        """Return (id, reason) of all images that cannot be read or embedded."""
        return [one for chunk in self.chunks for one in self.unusable(chunk)]

    def columns(self, stage: str, name: str) -> list[np.ndarray]:
        """Return one array of every chunk in which at least one image could be embedded."""
        return [self.checkpoint.column(stage, chunk, name) for chunk in self.filled()]

    def filled(self) -> list[int]:
        """Return the chunks in which at least one image could be embedded."""
        return [chunk for chunk in self.chunks if len(self.embedded(chunk))]


def chunk_size(batch_size: int, method: str) -> int:
    """Return images a chunk: whole batches, so that resuming repeats them; one of slow methods."""
    return batch_size if method not in POOLED_METHODS else -(-CHUNK // batch_size) * batch_size


def caches_within(
    strategy: Strategy, network: EmbeddingNetwork, n_images: int, folder: Path, gigabytes: float
) -> bool:
    """Return whether activations for stored maps take at most so much, and may be cached."""
    if not gigabytes or strategy.layers:  # several layers make stored maps along with their weights
        return False
    probe = strategy.cached(network.forward(network.probe_images()).activations)
    needed = 2 * probe["activations"].size * n_images
    caches = needed <= min(gigabytes * 1e9, 0.8 * shutil.disk_usage(folder).free)
    if not caches:
        log.warning(
            "keeping the activations of all images would take %.1f GB, more than allowed; the "
            "images' own maps take one more forward pass instead",
            needed / 1e9,
        )
    return caches


def job_digest(
    recipe: Recipe,
    identity: Identity,
    source: ImageSource,
    files: Texts,
    run: RunEntry,
    libraries: Mapping[str, str],
    *choices: int | str | np.ndarray | tuple[str, ...] | None,
) -> str:
    """Return a digest of everything the chunks of a job depend on."""
    digest = hashlib.sha256(recipe.resolved.digest().encode())
    about = [identity.to_dict(), root_text(source.root)]
    digest.update(json.dumps(about, sort_keys=True).encode())
    for column in listed_columns(source, files).values():
        digest.update(hashlib.sha256(np.ascontiguousarray(column).data).digest())
    # The probe speaks for code that parameters do not show, to the bit: so do the chunks.
    probe = [array for _, array in sorted(identity.arrays().items())]
    # A picture that was skipped for its size may be read by another limit.
    choices += (chunk_size(run.batch_size, recipe.entry.formula), source.max_pixels)
    choices += (run.runtime, run.channels_last)
    for choice in (_CHUNKS, *sorted(libraries.items()), *probe, *choices):
        data = choice.tobytes() if isinstance(choice, np.ndarray) else repr(choice).encode()
        digest.update(data + b"\0")
    return digest.hexdigest()


def libraries_of(network: EmbeddingNetwork) -> dict[str, str]:
    """Return versions of what computes the chunks of a job, by name."""
    used = {"numpy": np.__version__, "pillow": PIL.__version__, "torch": torch.__version__}
    source = str((network.spec or {}).get("network", "")).partition(":")[0]
    if source in ("torchvision", "timm"):
        used[source] = version(source)
    if network.onnx_file is not None:
        used["onnxruntime"] = runtime_version()
    return {"embedcam": __version__, **used}


def listed_columns(source: ImageSource, files: Texts) -> dict[str, np.ndarray]:
    """Return what a source lists, with its files' fingerprints, as arrays by name."""
    labels, names = source.labels, Texts.of(source.labels.names)
    texts = {"ids": source.ids, "paths": source.items.paths, "files": files, "names": names}
    columns: dict[str, np.ndarray] = {"labels": labels.codes}
    for name, column in texts.items():
        columns[name], columns[f"{name}_ends"] = column.blob, column.offsets
    return columns


def run_of(network: EmbeddingNetwork, batch_size: int | None) -> RunEntry:
    """Return how a checked network is run, in batches of that size, None for the usual one."""
    usual = network.usual_run
    return usual if batch_size is None else replace(usual, batch_size=batch_size)


def check_options(
    source: ImageSource,
    network: EmbeddingNetwork,
    batch_size: int | None,
    unreadable: str,
    gb: float,
) -> None:
    """Refuse options that no job can work with."""
    if len(source) == 0:
        raise InputError("there are no images to index; give a folder or a CSV that names some")
    one_of("on_unreadable", unreadable, ("fail", "skip"))
    if batch_size is not None:
        whole("batch_size", batch_size, 1)
    if not gb >= 0:
        raise InputError(f"scratch_gb = {gb!r}; give a number of at least 0")
    network.require_preprocess()
    if unreadable == "fail":
        # Known without a look at the files: said before hours of work, not after.
        reasons = (source.refused(position) for position in range(len(source)))
        if reason := next((reason for reason in reasons if reason is not None), None):
            raise ImageError(reason)


def warn_of_norm(recipe: Recipe, normalize: bool, stacklevel: int) -> None:
    """Warn of the centred target through the norm."""
    by_gradient = recipe.entry.targeted and not recipe.entry.scored
    centred = recipe.resolved_target == "centred"
    if by_gradient and centred and recipe.norm == "through" and normalize:
        warnings.warn(
            "the centred target through the L2 norm loses its own part at the image itself and "
            "can point at the wrong object; 'around' is the safe choice",
            RecipeWarning,
            stacklevel=stacklevel + 1,
        )


def check_amounts(
    recipe: Recipe,
    names: Sequence[str],
    labels: Sequence[str | None],
    width: int,
    n_channels: int,
    given: np.ndarray | None,
) -> None:
    """Refuse what the encoding, FAISS or the triplets could only refuse after all the work."""
    if recipe.encoding == "top-m":
        TopM(n_channels, recipe.m, recipe.by, recipe.dtype)
    if recipe.faiss.lower() != "none":
        check_factory(recipe.faiss, width, len(names), recipe.metric)
    # No embedding is looked at before cotangents are asked for.
    unseen = np.broadcast_to(np.float32(0), (len(names), width))
    AnchorCotangents(recipe, unseen, coded_labels(recipe, labels, names), unseen[0], given)


def head_note(recipe: Recipe, network: EmbeddingNetwork) -> str | None:
    """Return what to know of a head that does not pool, a sentence; None of others."""
    if not network.head_kind.uses_positions:
        return None
    what = f"what follows layer {network.layer!r} does not pool: where a thing lies counts"
    if isinstance(recipe.entry, PositionMethod):
        return (
            f"{what}; the weights are kept by position, so transferred maps hold for queries "
            "aligned as the indexed pictures are"
        )
    return (
        f"{what}, and weights by channel, being means over positions, cannot say so; where all "
        "pictures are aligned, as faces are, build with method 'hirescam' (--method hirescam), "
        "which keeps weights by position; elsewhere have the map computed on the query: `embedcam "
        "explain --method hirescam` or xgradcam"
    )


def check_method(recipe: Recipe, network: EmbeddingNetwork, width: int) -> None:
    """Refuse a method, or options, that this network cannot do, before any image is embedded."""
    if recipe.norm == "around" and network.already_normalized:
        raise RecipeError(
            "norm 'around' needs the embedding before its L2 norm, and this module normalises its "
            "output itself; use norm 'through', or a module that returns the vector before the norm"
        )
    if isinstance(recipe.entry, PositionMethod) and network.head_kind.pooled:
        raise RecipeError(
            f"behind average pooling {recipe.entry.title} is Grad-CAM, whose weights belong to "
            "channels and take less room; use method 'gradcam'"
        )
    inputs = torch.from_numpy(network.probe_images()).to(network.device)
    options = recipe.method_options
    if recipe.layers:
        options["layers"] = list(recipe.layers)
    if recipe.fill != "mean":
        fill_like(inputs[0], recipe.fill, network.preprocess)

    def ran(_: int) -> None:
        # After its first pass a method has checked its options: a thousand are not for that.
        if recipe.method != "cam" and not recipe.entry.trained:
            raise _FirstPass

    with (
        suppress(_FirstPass),
        Subject(network, inputs, Direction(np.zeros(width)), progress=ran) as subject,
    ):
        run_method(subject, recipe.entry, **options)


class _FirstPass(Exception):  # noqa: N818 - an event, caught above
    """A method has made its first pass."""


def files_digest(fingerprints: Iterable[str]) -> str:
    """Return SHA-256 over what tells of each image's file whether it changed, in order."""
    digest = hashlib.sha256()
    for place, fingerprint in enumerate(fingerprints):
        digest.update(f"{chr(10) if place else ''}{fingerprint}".encode())
    return digest.hexdigest()


def same_index(
    index: Index,
    recipe: Recipe,
    source: ImageSource,
    files: Sequence[str],
    own_maps: bool,
    trust: bool,
    given: str | None,
    network: EmbeddingNetwork,
) -> list[tuple[str, str]]:
    """Refuse a finished index where another was asked for; return (id, reason) of unusable images.

    `files` are fingerprints of the source's images, `given` the digest of the user's own triplets.
    """
    manifest, live = index.manifest, index.live_positions()
    unusable = _unusable(source, set(index.ids[live]), network)
    identity, enough = network.identity().to_dict(), manifest.fit.images >= LEAST
    calibrated = manifest.trust_calibration is not None
    checks = {
        "recipe": manifest.recipe_sha256 == recipe.resolved.digest(),
        "network": index.identity is not None and index.identity.to_dict() == identity,
        "choice of own maps": (manifest.layers[0].coarse_grid is not None) == own_maps,
        "choice of trust": calibrated == (trust and enough),
        "array of given triplets": manifest.triplets.sha256 == given,
    }
    differs = [what for what, same in checks.items() if not same]
    words = [f"another {' and '.join(differs)}"] if differs else []
    counts = manifest.counts
    added = counts.added_after_fit
    removed = manifest.fit.images - (counts.live - added)
    changes = [f"{n:,} {how} since" for n, how in ((added, "added"), (removed, "removed")) if n]
    places = [place for place in range(len(source)) if place not in (unusable or {})]
    items = [source.items[place] for place in places]
    listed = list(zip(index.ids[live], index.paths[live], strict=True))
    if changes:
        words.append(f"another list of images ({', '.join(changes)})")
    elif unusable is None or [(item.id, item.path) for item in items] != listed:
        words.append("another list of images")
    else:
        if [item.label for item in items] != list(index.labels[live]):
            words.append("other labels")
        stored = manifest.images.files_sha256 if manifest.images else None
        if stored not in (None, files_digest(files[place] for place in places)):
            words.append("image files changed since")
    if words:
        raise InputError(
            f"{index.path} holds a finished index with {', and with '.join(words)}; choose "
            "another folder, add images with `embedcam add`, or redo it with --refit (replace=True)"
        )
    return list((unusable or {}).values())


def _unusable(
    source: ImageSource, known: set[str], network: EmbeddingNetwork
) -> dict[int, tuple[str, str]] | None:
    """Return (id, reason) of images not known, by place; None if one of them can be used."""
    places = [place for place, item in enumerate(source.items) if item.id not in known]
    unusable: dict[int, tuple[str, str]] = {}
    of = (source, places, network.require_preprocess(), 1)
    with closing(load_batches(*of, workers=0, on_error="skip")) as batches:
        for read in batches:
            batch, _ = embed(read, source, network.forward, "skip")
            if len(batch):
                return None
            unusable |= {place: (source.items[place].id, why) for place, why in batch.errors}
    return unusable


def check_addable(recipe: Recipe, encoding: Encoding, network: EmbeddingNetwork) -> bool:
    """Refuse additions the index's encoding cannot take; return whether its codes are dy/dz."""
    if recipe.sampling == "given" and recipe.resolved_target == "margin":
        raise InputError(
            "this index was built from given triplets, which say nothing about new images; build "
            "it again with all images and their triplets"
        )
    if not isinstance(encoding, LowRank) or encoding.origin != "head":
        return False
    matrix = network.head_kind.matrix
    if matrix is None or matrix.shape != encoding.fitted["basis"].shape:
        raise NetworkMismatch(
            "the index keeps weights in the matrix of an affine head behind average pooling, "
            f"{list(encoding.fitted['basis'].shape)}, and this network "
            f"{'has none' if matrix is None else f'has one of {list(matrix.shape)}'}; give the "
            "network that the index was built with, in the same precision"
        )
    return True


def check_new(index: Index, source: ImageSource) -> None:
    """Refuse ids that the index already has."""
    known = sorted(index.find_live(source.ids))
    if known:
        some = ", ".join(known[:3]) + (" ..." if len(known) > 3 else "")
        raise InputError(
            f"{len(known)} of {len(source)} images are in the index already ({some}); leave "
            "them out (--skip-existing), or remove them from the index first; where they are other "
            "pictures of the same names, a CSV with the columns path,label,id gives them other ids"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say of a full or unwritable disk what to do; what is finished stays, and is used again."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmbedcamError) or error.errno not in _DISK_ERRORS:
            raise
        raise EmbedcamError(
            f"{error.filename or path}: cannot be written ({error.strerror}); see to the disk and "
            "run the same command again: it goes on where it stopped"
        ) from error
