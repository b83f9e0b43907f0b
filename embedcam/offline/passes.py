"""The passes over the images: embeddings first, and, for heads that need it, gradients second.

A pass works chunk by chunk into a scratch folder and skips the chunks an earlier run finished.
Behind a global average pool the first pass keeps the pooled vector, and no second one is needed.
"""

import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EmbeddingError, ImageError
from ..images import Batch, ImageSource, embed, load_batches
from ..index import quantize_coarse
from ..methods import Subject, inputs_a_pass, run_method, weights_for
from ..methods.weights import weights_from_head, weights_from_pooled
from ..network import EmbeddingNetwork
from ..ops import area_average, cam
from ..recipe.recipe import Recipe
from ..recipe.registry import PositionMethod, WeightMethod
from ..targets import Direction, head_cotangent
from .cotangents import AnchorCotangents, Cotangents
from .scratch import Scratch

log = logging.getLogger(__name__)

CHUNK = 256
"""Images a chunk, at least; a kill loses at most one chunk of work."""

CROPPED = 0.25
"""Share of a picture from which on a build says that the crop leaves it out."""

POOLED_METHODS = ("cam", "gradcam", "gradcam++")
"""Methods whose weights, behind a global average pool, are functions of the pooled vector."""

Tick = Callable[[int], Any]
"""Told how many images were dealt with."""


@dataclass(frozen=True)
class Work:
    """One build's inputs and where its unfinished work lies.

    Args:
        network: the embedding network.
        source: the images.
        recipe: the choices.
        scratch: keeps the chunks.
        batch_size: images a forward pass.
        workers: threads that decode images.
        on_unreadable: "fail" or "skip".
        keep_grids: whether activations are kept for the images' own maps.
        exact: keep dy/dz, the code in the head's own matrix, in place of the weights.
        layers: for a method of several layers, their names, deepest first, and their grids.
    """

    network: EmbeddingNetwork
    source: ImageSource
    recipe: Recipe
    scratch: Scratch
    batch_size: int
    workers: int | None
    on_unreadable: str
    keep_grids: bool
    exact: bool
    layers: tuple[tuple[str, tuple[int, int]], ...] = ()

    @property
    def chunk_size(self) -> int:
        """Images a chunk: a multiple of the batch size, so that resuming repeats its batches."""
        return chunk_size(self.batch_size, self.recipe.method)

    @property
    def n_chunks(self) -> int:
        """Chunks of the whole source."""
        return -(-len(self.source) // self.chunk_size)

    @property
    def pooled(self) -> bool:
        """Whether the pooled vector stands in for a second pass."""
        return self.recipe.method in POOLED_METHODS and self.network.pooled_replay

    def chunk_positions(self, chunk: int) -> np.ndarray:
        """Places in the source of a chunk's images."""
        start = chunk * self.chunk_size
        return np.arange(start, min(start + self.chunk_size, len(self.source)))

    def batches(
        self, positions: np.ndarray, *, marked: bool = False
    ) -> Generator[Batch, None, None]:
        """Loaded batches of images at these places in the source, `marked` with their files'."""
        return load_batches(
            self.source,
            positions,
            self.network.preprocess,
            self.batch_size,
            workers=self.workers,
            on_error="fail" if self.on_unreadable == "fail" else "skip",
            marked=marked,
        )

    def embedded(self, chunk: int) -> np.ndarray:
        """Places in the source of a finished chunk's images that could be read and embedded."""
        return np.array(self.scratch.read("embed", chunk, "positions")["positions"])

    def refused(self, chunk: int) -> np.ndarray:
        """Places of those that could be read, and whose embeddings cannot be used."""
        return np.array(self.scratch.read("embed", chunk, "refused")["refused"])


def is_exact(recipe: Recipe, matrix: np.ndarray | None, normalize: bool = True) -> bool:
    """Whether dy/dz in the head's own matrix W `[D K]`, None if it has none, is all there is.

    Grad-CAM behind a pooled affine head is W^T dy/dz / Z, also averaged over triplets. A code that
    is derived from the stored embedding takes no room, whatever its width.
    """
    wanted = recipe.encoding == "low-rank" and recipe.method == "gradcam" and matrix is not None
    return wanted and (is_derived(recipe, normalize) or len(matrix) <= recipe.rank)  # type: ignore[arg-type]


def is_derived(recipe: Recipe, normalize: bool) -> bool:
    """Whether dy/dz is the stored embedding less the mean: centred, not through a norm."""
    return recipe.resolved_target == "centred" and (recipe.norm == "around" or not normalize)


def chunk_size(batch_size: int, method: str = "gradcam") -> int:
    """Images a chunk for a batch size: one batch for methods that may take seconds an image."""
    return batch_size if method not in POOLED_METHODS else -(-CHUNK // batch_size) * batch_size


def spilled_numbers(network: EmbeddingNetwork, exact: bool) -> int:
    """How many half-precision numbers an image's kept activations take."""
    activations = network.forward(network.probe_images()).activations
    return _spilled(network, exact, activations)["activations"].size


def embedding_pass(work: Work, tick: Tick) -> None:
    """Chunks `embed`: positions, marks, embeddings, lengths, pooled vectors, grids, errors."""
    todo = [chunk for chunk in range(work.n_chunks) if not _is_embedded(work, chunk)]
    done = len(work.source) - sum(len(work.chunk_positions(chunk)) for chunk in todo)
    if done:
        log.info("going on: %s of %s images are embedded", f"{done:,}", f"{len(work.source):,}")
    tick(done)
    if not todo:
        return
    # One stream over all chunks, so that decoding runs ahead across their borders.
    places = np.concatenate([work.chunk_positions(chunk) for chunk in todo])
    with closing(work.batches(places, marked=True)) as stream:
        for chunk in todo:
            n = len(work.chunk_positions(chunk))
            batches = itertools.islice(stream, -(-n // work.batch_size))
            work.scratch.write("embed", chunk, _embed(work, batches, n, tick))


def _is_embedded(work: Work, chunk: int) -> bool:
    """Whether an earlier run's chunk serves; one that skipped images does not where that fails."""
    if not work.scratch.intact("embed", chunk):
        return False
    return work.on_unreadable == "skip" or not skipped_of(work, chunk)


def skipped_of(work: Work, chunk: int) -> list[tuple[int, str]]:
    """Place and reason of the images of a finished chunk that could not be read."""
    text = bytes(work.scratch.read("embed", chunk, "errors")["errors"])
    return [(position, message) for position, message in json.loads(text)]


def _embed(work: Work, batches: Iterable[Batch], n: int, tick: Tick) -> dict[str, np.ndarray]:
    kept = _Rows(n)
    errors: list[tuple[int, str]] = []
    refused: list[int] = []
    grid, n_cropped = (0, 0), 0
    for read in batches:
        batch, features = embed(read, work.source, work.network.forward, work.on_unreadable)
        refused += np.setdiff1d(read.positions, batch.positions).tolist()
        errors += batch.errors
        n_cropped += sum(_is_cropped(work.network.preprocess, *size) for size in batch.sizes)
        if features is not None:
            activations = features.activations
            grid = (activations.shape[2], activations.shape[3])
            rows = {
                "positions": batch.positions,
                "marks": batch.marks,
                "embedding": _numpy(features.embedding),
                "length": _numpy(features.norm),
            }
            if work.pooled:
                rows |= _pooled(work, activations)
            kept.add(rows)
        tick(len(batch.positions) + len(batch.errors))
    text = json.dumps([[int(position), message] for position, message in errors])
    return {
        "positions": np.empty(0, np.int64),
        **kept.arrays(),
        "grid": np.array(grid),
        "errors": np.frombuffer(text.encode(), np.uint8),
        "refused": np.array(refused, np.int64),
        "cropped": np.array([n_cropped]),
    }


def _is_cropped(preprocess: Any, width: int, height: int) -> bool:
    """Whether a centre crop leaves out more than `CROPPED` of a picture."""
    if getattr(preprocess, "resize", None) != "crop":
        return False
    x0, y0, x1, y1 = preprocess.extent(int(width), int(height))
    seen = (min(x1, width) - max(x0, 0)) * (min(y1, height) - max(y0, 0))
    return bool(seen < (1 - CROPPED) * width * height)


def _pooled(work: Work, activations: Tensor) -> dict[str, np.ndarray]:
    """What later stages need of a batch's activations behind a global average pool."""
    arrays = {"pooled": _numpy(activations.mean((-2, -1)))}
    if work.recipe.method == "gradcam++":
        arrays["positive_pooled"] = _numpy(activations.clamp(min=0).mean((-2, -1)))
    if work.keep_grids:
        arrays |= _spilled(work.network, work.exact, activations)
    return arrays


def _spilled(network: EmbeddingNetwork, exact: bool, activations: Tensor) -> dict[str, np.ndarray]:
    """Activations for the own maps, `[B C H W]` in half precision, and their peaks `[B]`.

    In an exact low-rank index a map only needs the D combinations W A, not all K channels.
    """
    head = network.head_kind
    if exact and not head.identity:
        matrix = torch.from_numpy(head.matrix).to(activations)
        activations = torch.einsum("dk,bkhw->bdhw", matrix, activations)
    # Divided by the peak, so that neither large nor tiny activations leave half precision's range.
    peaks = activations.abs().amax((1, 2, 3))
    safe = torch.where(peaks > 0, peaks, 1)[:, None, None, None]
    halves = (activations / safe).to(torch.float16)
    return {"activations": _numpy(halves), "peaks": _numpy(peaks.float())}


def weights_pass(work: Work, anchors: AnchorCotangents, offset: int, tick: Tick) -> None:
    """Chunks `weights`: averaged weights `[n K]` (dy/dz `[n D]` where exact) and triplet counts.

    Args:
        work: with every chunk of `embed` finished.
        anchors: says what each image is differentiated along.
        offset: place of the first image among the anchors' embeddings.
        tick: told of progress.
    """
    sizes = [len(work.embedded(chunk)) for chunk in range(work.n_chunks)]
    intact = [bool(n) and work.scratch.intact("weights", chunk) for chunk, n in enumerate(sizes)]
    if done := sum(n for n, whole in zip(sizes, intact, strict=True) if whole):
        log.info("going on: weights of %s of %s images are done", f"{done:,}", f"{sum(sizes):,}")
    for chunk, n in enumerate(sizes):
        places = np.arange(offset, offset + n)
        offset += n
        if n and not intact[chunk]:
            find = _weights_of_pooled if work.pooled else _weights_of_images
            work.scratch.write("weights", chunk, find(work, chunk, anchors, places, tick))
        else:
            tick(n)


def _weights_of_pooled(
    work: Work, chunk: int, anchors: AnchorCotangents, places: np.ndarray, tick: Tick
) -> dict[str, np.ndarray]:
    embedded, device = work.scratch.read("embed", chunk), work.network.device
    kept = _Rows(len(places))
    for start in range(0, len(places), work.batch_size):
        rows = slice(start, start + work.batch_size)
        at_head, used, counts = _at_head(work, embedded, anchors, places, rows)
        if not work.exact:
            pooled = torch.from_numpy(np.array(embedded["pooled"][rows])).to(device)
            positive = pooled
            if "positive_pooled" in embedded:
                positive = torch.from_numpy(np.array(embedded["positive_pooled"][rows])).to(device)
            at_head = weights_from_pooled(
                work.network,
                pooled,
                positive,
                at_head,
                used,
                int(np.prod(embedded["grid"])),
                work.recipe.method,
            )
        kept.add({"weights": _numpy(at_head), "counts": counts})
        tick(len(counts))
    return kept.arrays()


def _weights_of_images(
    work: Work, chunk: int, anchors: AnchorCotangents, places: np.ndarray, tick: Tick
) -> dict[str, np.ndarray]:
    embedded = work.scratch.read("embed", chunk)
    kept = _Rows(len(places))
    for batch in _read_again(work, chunk):
        rows = slice(kept.done, kept.done + len(batch))
        try:
            kept.add(_of_images(work, batch, embedded, anchors, places, rows))
        except EmbeddingError as error:
            # A method may have run changed pictures, so that its rows are not the batch's.
            first, last = (work.source.name(int(batch.positions[row])) for row in (0, -1))
            name = first if len(batch) == 1 else f"one of the images {first} to {last}"
            raise error.of_one(name) from None
        tick(len(batch))
    return kept.arrays()


def _of_images(
    work: Work,
    batch: Batch,
    embedded: dict[str, np.ndarray],
    anchors: AnchorCotangents,
    places: np.ndarray,
    rows: slice,
) -> dict[str, np.ndarray]:
    """The rows of one batch in a chunk of weights."""
    if work.layers:
        return _by_layers(work, batch, anchors, places[rows])
    find = _by_head if work.recipe.method in POOLED_METHODS else _by_method
    weights, activations, counts = find(work, batch, embedded, anchors, places, rows)
    arrays = {"weights": _numpy(weights), "counts": counts}
    if work.keep_grids:
        arrays |= _spilled(work.network, work.exact, activations)
    return arrays


def _by_head(
    work: Work,
    batch: Batch,
    embedded: dict[str, np.ndarray],
    anchors: AnchorCotangents,
    places: np.ndarray,
    rows: slice,
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Weights `[n K]`, activations `[n K H W]`, triplets that count: by the head's derivative."""
    at_head, used, counts = _at_head(work, embedded, anchors, places, rows)
    with closing(work.network.head_pass(batch.images)) as head_pass:
        weights = weights_from_head(head_pass, at_head, used, work.recipe.method)
        return weights, head_pass.features.activations.detach(), counts


def _by_method(
    work: Work,
    batch: Batch,
    embedded: dict[str, np.ndarray],
    anchors: AnchorCotangents,
    places: np.ndarray,
    rows: slice,
) -> tuple[Tensor, Tensor, np.ndarray]:
    """The same by any method of the zoo of one layer; by some, weights by position `[n K H W]`."""
    found, entry = anchors.of(places[rows]), work.recipe.entry
    assert isinstance(entry, WeightMethod | PositionMethod)
    with _subject(work, batch, found) as subject:
        weights = weights_for(subject, entry, **work.recipe.method_options)
        return weights, subject.activations.detach(), found.counts


def _by_layers(
    work: Work, batch: Batch, anchors: AnchorCotangents, places: np.ndarray
) -> dict[str, np.ndarray]:
    """By a method of several layers: weights of each, triplets that count, and own maps."""
    found, names = anchors.of(places), [name for name, _ in work.layers]
    with _subject(work, batch, found) as subject:
        options = work.recipe.method_options
        made = run_method(subject, work.recipe.entry, layers=names, **options)
    assert made.layers is not None
    assert made.maps is not None
    arrays = {weights_of_layer(at): _numpy(made.layers[name]) for at, name in enumerate(names)}
    maps = _numpy(made.maps.float())
    own, scales = quantize_coarse(area_average(maps, coarse_grid(maps.shape[1:])))
    return {**arrays, "counts": found.counts, "own": own, "own_scales": scales}


def weights_of_layer(number: int) -> str:
    """Name of a layer's array in a chunk of weights."""
    return "weights" if number == 0 else f"weights{number}"


def _subject(work: Work, batch: Batch, found: Cotangents) -> Subject:
    """A batch with its margin, or centred target, as one direction an image (or a triplet).

    The margin is affine in the anchor's embedding, so the mean over triplets is one direction, and
    no method asks for more than differences of scores.
    """
    values = found.values if found.values.ndim == 3 else found.values[:, None]
    return Subject(
        work.network,
        torch.from_numpy(batch.images).to(work.network.device),
        Direction(values, found.used),
        norm=_head_norm(work),
        batch_size=inputs_a_pass(work.network.device, work.batch_size),
        seed=work.recipe.seed % (1 << 63),
        fill=work.recipe.fill,
    )


def _head_norm(work: Work) -> str:
    """The norm's way; a module that normalises itself knows none but through it."""
    return "through" if work.network.already_normalized else work.recipe.head_norm


def _at_head(
    work: Work,
    embedded: dict[str, np.ndarray],
    anchors: AnchorCotangents,
    places: np.ndarray,
    rows: slice,
) -> tuple[Tensor, Tensor | None, np.ndarray]:
    """dy/dz of some images of a chunk, the triplets that count, and how many they are."""
    found = anchors.of(places[rows])
    values = head_cotangent(
        found.values,
        np.array(embedded["embedding"][rows]),
        np.array(embedded["length"][rows]),
        work.recipe.head_norm,
        work.network.normalize,
    )
    device = work.network.device
    used = None if found.used is None else torch.from_numpy(found.used).to(device)
    at_head = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)
    return at_head, used, found.counts


def _read_again(work: Work, chunk: int) -> Iterator[Batch]:
    """The batches of a finished chunk once more, composed as in the first pass, to the bit.

    Raises:
        ImageError: an image that could be read then and cannot now, or the other way round.
    """
    expected, refused = work.embedded(chunk), work.refused(chunk)
    with closing(work.batches(work.chunk_positions(chunk))) as batches:
        for read in batches:
            rows = np.flatnonzero(np.isin(read.positions, refused))
            batch, reasons = read.without(rows.tolist(), [""] * len(rows)), dict(read.errors)
            for position in [*batch.positions.tolist(), *reasons]:
                if (position in reasons) == (position in expected):
                    why = reasons.get(position, f"{work.source.name(position)}: can be read now")
                    raise ImageError(
                        f"{why}; its file changed during the build, so run the build again"
                    )
            if len(batch):
                yield batch


def own_maps(work: Work, chunk: int, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's own coarse map as bytes with one scale: map = bytes * scale / 255.

    Args:
        work: with chunks `embed` and `weights` finished.
        chunk: which.
        factors: what multiplies the kept activations: the stored weights, decoded, `[n K]`; where
            exact their codes, mean taken off, over the number of cells, `[n D]`; or `[n K H W]`.

    Returns:
        `[n h w]` uint8 and `[n]` float32; more than 64 cells are averaged to at most 64.
    """
    if work.layers:
        kept_maps = work.scratch.read("weights", chunk, "own", "own_scales")
        return np.asarray(kept_maps["own"]), np.asarray(kept_maps["own_scales"])
    made, done = [], 0
    for kept in _activations(work, chunk):
        # NumPy widens halves twenty times slower than torch does.
        activations = torch.from_numpy(np.array(kept["activations"])).float().numpy()
        rows = slice(done, done + len(activations))
        # Times the peaks afterwards: a map scales with its activations.
        maps = cam(np.asarray(factors[rows], np.float32), activations)
        maps = maps * np.asarray(kept["peaks"])[:, None, None]
        made.append(quantize_coarse(area_average(maps, coarse_grid(maps.shape[1:]))))
        done = rows.stop
    maps, scales = zip(*made, strict=True)
    return np.concatenate(maps), np.concatenate(scales)


def _activations(work: Work, chunk: int) -> Iterator[dict[str, np.ndarray]]:
    """A chunk's `_spilled` activations, a batch at a time; by one more forward where not kept."""
    arrays = work.scratch.read("embed" if work.pooled else "weights", chunk)
    if "activations" not in arrays:
        for batch in _read_again(work, chunk):
            activations = work.network.forward(batch.images).activations
            yield _spilled(work.network, work.exact, activations)
        return
    for start in range(0, len(arrays["peaks"]), work.batch_size):
        rows = slice(start, start + work.batch_size)
        yield {name: arrays[name][rows] for name in ("activations", "peaks")}


def own_grid(work: Work, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of own maps of a layer `grid`; of several layers the shallowest decides."""
    return coarse_grid(work.layers[-1][1] if work.layers else grid)


def coarse_grid(grid: tuple[int, ...]) -> tuple[int, int]:
    """The grid of own maps: the layer's, or the largest of its shape with at most 64 cells."""
    height, width = grid
    if height * width <= 64:
        return height, width
    shrink = (64 / (height * width)) ** 0.5
    rows = max(1, min(height, 64, int(height * shrink)))
    return rows, max(1, min(width, 64 // rows, round(width * shrink) or 1))


class _Rows:
    """Arrays of at most n rows filled batch by batch, so that no second copy is ever made."""

    def __init__(self, n: int) -> None:
        self.n, self.done = n, 0
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add rows of every array, the same number of each."""
        count = {len(array) for array in rows.values()}.pop()
        for name, array in rows.items():
            if name not in self._arrays:
                self._arrays[name] = np.empty((self.n, *array.shape[1:]), array.dtype)
            self._arrays[name][self.done : self.done + count] = array
        self.done += count

    def arrays(self) -> dict[str, np.ndarray]:
        """The rows so far."""
        return {name: array[: self.done] for name, array in self._arrays.items()}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
