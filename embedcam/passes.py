"""The passes over the images: embeddings first, and, for heads that need it, gradients second.

A pass works chunk by chunk into a scratch folder and skips the chunks an earlier run finished.
Behind a global average pool the first pass keeps the pooled vector, and no second one is needed.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cam import area_average, cam
from .cotangents import AnchorCotangents
from .errors import ImageError
from .images import Batch, ImageSource, load_batches
from .index import quantize_coarse
from .network import EmbeddingNetwork, Features
from .recipe import Recipe
from .scratch import Scratch
from .targets import head_cotangent
from .weights import weights_from_head, weights_from_pooled

CHUNK = 256
"""Images a chunk, at least; a kill loses at most one chunk of work."""

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
    """

    network: EmbeddingNetwork
    source: ImageSource
    recipe: Recipe
    scratch: Scratch
    batch_size: int
    workers: int
    on_unreadable: str
    keep_grids: bool

    @property
    def chunk_size(self) -> int:
        """Images a chunk: a multiple of the batch size, so that resuming repeats its batches."""
        return chunk_size(self.batch_size)

    @property
    def n_chunks(self) -> int:
        """Chunks of the whole source."""
        return -(-len(self.source) // self.chunk_size)

    @property
    def pooled(self) -> bool:
        """Whether the pooled vector stands in for a second pass."""
        return self.network.head_kind.pooled and self.network.pooled_replay

    @property
    def exact(self) -> bool:
        """Whether the code dy/dz in the head's own matrix holds the weights without loss."""
        return self.pooled and is_exact(self.recipe, self.network.head_kind.matrix)

    def chunk_positions(self, chunk: int) -> np.ndarray:
        """Places in the source of a chunk's images."""
        start = chunk * self.chunk_size
        return np.arange(start, min(start + self.chunk_size, len(self.source)))

    def batches(self, positions: np.ndarray) -> Iterator[Batch]:
        """Loaded batches of images at these places in the source."""
        return load_batches(
            self.source,
            positions,
            self.network.preprocess,
            self.batch_size,
            workers=self.workers,
            on_error="fail" if self.on_unreadable == "fail" else "skip",
        )


def is_exact(recipe: Recipe, matrix: np.ndarray | None) -> bool:
    """Whether dy/dz in the head's own matrix W `[D K]`, None if it has none, is all there is.

    Grad-CAM behind a pooled affine head is W^T dy/dz / Z, also averaged over triplets.
    """
    wanted = recipe.encoding == "low-rank" and recipe.method == "gradcam"
    return wanted and matrix is not None and len(matrix) <= recipe.rank


def chunk_size(batch_size: int) -> int:
    """Images a chunk for a batch size."""
    return -(-CHUNK // batch_size) * batch_size


def embedding_pass(work: Work, tick: Tick) -> None:
    """Chunks `embed`: positions, embedding, length, pooled vectors, grids, messages of errors."""
    todo = [c for c in range(work.n_chunks) if not work.scratch.intact("embed", c)]
    tick(len(work.source) - sum(len(work.chunk_positions(chunk)) for chunk in todo))
    if not todo:
        return
    # One stream over all chunks, so that decoding runs ahead across their borders.
    stream = work.batches(np.concatenate([work.chunk_positions(chunk) for chunk in todo]))
    for chunk in todo:
        n_batches = -(-len(work.chunk_positions(chunk)) // work.batch_size)
        arrays = _embed(work, itertools.islice(stream, n_batches), tick)
        work.scratch.write("embed", chunk, arrays)


def _embed(work: Work, batches: Iterable[Batch], tick: Tick) -> dict[str, np.ndarray]:
    kept: dict[str, list[np.ndarray]] = {}
    errors: list[tuple[int, str]] = []
    for batch in batches:
        errors += batch.errors
        if len(batch.positions):
            features = work.network.forward(batch.images)
            for name, array in _kept(work, features).items():
                kept.setdefault(name, []).append(array)
            kept.setdefault("positions", []).append(batch.positions)
        tick(len(batch.positions) + len(batch.errors))
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    text = json.dumps([[int(position), message] for position, message in errors])
    return {**arrays, "errors": np.frombuffer(text.encode(), np.uint8)}


def _kept(work: Work, features: Features) -> dict[str, np.ndarray]:
    """What later stages need of a batch."""
    activations = features.activations
    arrays = {"embedding": _numpy(features.embedding), "length": _numpy(features.norm)}
    if not work.pooled:
        return arrays
    arrays["pooled"] = _numpy(activations.mean((-2, -1)))
    if work.recipe.method == "gradcam++":
        arrays["positive_pooled"] = _numpy(activations.clamp(min=0).mean((-2, -1)))
    arrays["grid"] = np.array([activations.shape[-2:]])
    if work.keep_grids:
        arrays["activations"] = _spilled(work, activations)
    return arrays


def _spilled(work: Work, activations: Tensor) -> np.ndarray:
    """Activations for the own maps, `[B C H W]` half precision.

    In an exact low-rank index a map only needs the D combinations W A, not all K channels.
    """
    head = work.network.head_kind
    if work.exact and not head.identity:
        matrix = torch.from_numpy(head.matrix).to(activations)
        activations = torch.einsum("dk,bkhw->bdhw", matrix, activations)
    return _numpy(activations.to(torch.float16))


def weights_pass(work: Work, anchors: AnchorCotangents, offset: int, tick: Tick) -> None:
    """Chunks `weights`: averaged weights `[n K]` (dy/dz `[n D]` where exact) and triplet counts.

    Args:
        work: with every chunk of `embed` finished.
        anchors: says what each image is differentiated along.
        offset: place of the first image among the anchors' embeddings.
        tick: told of progress.
    """
    for chunk in range(work.n_chunks):
        embedded = work.scratch.read("embed", chunk)
        n = len(embedded["positions"]) if "positions" in embedded else 0
        if n and not work.scratch.intact("weights", chunk):
            places = np.arange(offset, offset + n)
            if work.pooled:
                arrays = _weights_of_pooled(work, embedded, anchors, places)
            else:
                arrays = _weights_of_images(work, embedded, anchors, places, tick)
            work.scratch.write("weights", chunk, arrays)
        if work.pooled or not n:
            tick(n)
        offset += n


def _weights_of_pooled(
    work: Work, embedded: dict[str, np.ndarray], anchors: AnchorCotangents, places: np.ndarray
) -> dict[str, np.ndarray]:
    cells = int(np.prod(embedded["grid"][0]))
    kept: dict[str, list[np.ndarray]] = {"weights": [], "counts": []}
    for start in range(0, len(places), work.batch_size):
        rows = slice(start, start + work.batch_size)
        at_head, used, counts = _at_head(work, embedded, anchors, places, rows)
        if work.exact:
            weights = at_head
        else:
            pooled = torch.from_numpy(np.array(embedded["pooled"][rows]))
            positive = pooled
            if "positive_pooled" in embedded:
                positive = torch.from_numpy(np.array(embedded["positive_pooled"][rows]))
            weights = weights_from_pooled(
                work.network, pooled, positive, at_head, used, cells, work.recipe.method
            )
        kept["weights"].append(_numpy(weights))
        kept["counts"].append(counts)
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def _weights_of_images(
    work: Work,
    embedded: dict[str, np.ndarray],
    anchors: AnchorCotangents,
    places: np.ndarray,
    tick: Tick,
) -> dict[str, np.ndarray]:
    kept: dict[str, list[np.ndarray]] = {"weights": [], "counts": [], "grid": []}
    done = 0
    for batch in work.batches(np.array(embedded["positions"])):
        if batch.errors:
            raise ImageError(f"{batch.errors[0][1]}; it could be read before: build again")
        rows = slice(done, done + len(batch.positions))
        at_head, used, counts = _at_head(work, embedded, anchors, places, rows)
        with closing(work.network.head_pass(batch.images)) as head_pass:
            device = head_pass.features.activations.device
            weights = weights_from_head(
                head_pass,
                at_head.to(device),
                None if used is None else used.to(device),
                work.recipe.method,
            )
            activations = head_pass.features.activations.detach()
        kept["weights"].append(_numpy(weights))
        kept["counts"].append(counts)
        kept["grid"].append(np.array([activations.shape[-2:]]))
        if work.keep_grids:
            kept.setdefault("activations", []).append(_spilled(work, activations))
        done = rows.stop
        tick(len(batch.positions))
    return {name: np.concatenate(parts) for name, parts in kept.items()}


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
        work.recipe.norm,
        work.network.normalize,
    )
    used = None if found.used is None else torch.from_numpy(found.used)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)), used, found.counts


def own_maps(
    work: Work, chunk: int, weights: np.ndarray, codes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's own coarse map as bytes with one scale: map = bytes * scale / 255.

    Args:
        work: with chunks `embed` and `weights` finished.
        chunk: which.
        weights: the stored weights, decoded, `[n K]`.
        codes: where exact: the stored codes, mean taken off, `[n D]`.

    Returns:
        `[n h w]` uint8 and `[n]` float32; more than 64 cells are averaged to at most 64.
    """
    stage = "embed" if work.pooled else "weights"
    arrays = work.scratch.read(stage, chunk)
    if "activations" in arrays:
        spilled = arrays["activations"]
        factors = weights if codes is None else codes / np.prod(spilled.shape[2:])
        maps = cam(np.asarray(factors, np.float32), np.asarray(spilled, np.float32))
    else:
        maps = _maps_again(work, chunk, weights)
    maps = area_average(maps, coarse_grid(maps.shape[1:]))
    return quantize_coarse(maps)


def _maps_again(work: Work, chunk: int, weights: np.ndarray) -> np.ndarray:
    """Own maps by one more forward pass, where the activations were too many to keep."""
    positions = np.array(work.scratch.read("embed", chunk, "positions")["positions"])
    maps, done = [], 0
    for batch in work.batches(positions):
        if batch.errors:
            raise ImageError(f"{batch.errors[0][1]}; it could be read before: build again")
        activations = _numpy(work.network.forward(batch.images).activations)
        maps.append(cam(weights[done : done + len(activations)], activations))
        done += len(activations)
    return np.concatenate(maps)


def coarse_grid(grid: tuple[int, ...]) -> tuple[int, int]:
    """The grid of own maps: the layer's, or the largest of its shape with at most 64 cells."""
    height, width = grid
    if height * width <= 64:
        return height, width
    shrink = (64 / (height * width)) ** 0.5
    rows = max(1, min(height, 64, int(height * shrink)))
    return rows, max(1, min(width, 64 // rows, round(width * shrink) or 1))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
