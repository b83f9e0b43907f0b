"""A range of chunks of a plan: images embedded, then weighed, into chunk files of the checkpoint.

A finished chunk of an earlier run is not computed again. Chunks depend on nothing but the plan
and, for weights, the embeddings of all images, so that ranges of them may be computed apart.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import EmbeddingError, ImageError
from ..images import Batch, embed
from ..images.progress import Advance
from ..network import EmbeddingNetwork
from ..preprocess import AnyPreprocess, Preprocess
from . import concepts
from .concepts import Seen, seen
from .cotangents import AnchorCotangents
from .plan import Plan
from .strategies import Strategy, maps_of, stored_maps, to_numpy

log = logging.getLogger(__name__)

CROPPED = 0.25
"""Share of a picture from which on a build says that the crop leaves it out."""


def embed_chunks(plan: Plan, chunks: range | None = None) -> None:
    """Write chunks `embed`: positions, marks, embeddings, lengths, what weights need, errors."""
    chunks = plan.chunks if chunks is None else chunks
    sizes = {chunk: len(plan.positions(chunk)) for chunk in chunks}
    done_chunks = {chunk for chunk in sizes if plan.checkpoint.intact("embed", chunk)}
    if plan.on_unreadable == "fail":  # what an earlier run skipped fails now
        for chunk in [chunk for chunk in done_chunks if plan.unusable(chunk)]:
            plan.checkpoint.put_aside("embed", chunk)
            plan.checkpoint.put_aside_but("embed")  # where it can be read now, it counts there
            done_chunks.remove(chunk)
    todo = [chunk for chunk in sizes if chunk not in done_chunks]
    if done := sum(sizes[chunk] for chunk in done_chunks):
        n_images = sum(sizes.values())
        log.info("going on: %s of %s images are embedded", f"{done:,}", f"{n_images:,}")
    if todo:
        log.info("%s", plan.run)
    with plan.stages("embed", sum(sizes.values())) as progressed:
        progressed(done)
        # One stream over all chunks, so that reading runs ahead across their borders.
        places = np.concatenate([np.empty(0, np.int64), *map(plan.positions, todo)])
        of = partial(_embed, plan)
        with closing(plan.each_batch(places, of, marked=True)) as stream:
            for chunk in todo:
                batches = itertools.islice(stream, -(-sizes[chunk] // plan.batch_size))
                arrays = _joined(batches, sizes[chunk], progressed)
                plan.checkpoint.write("embed", chunk, arrays)


@dataclass(frozen=True)
class _Embedded:
    """What the embedding pass keeps of a batch: rows, and (position, reason) of those left out."""

    rows: dict[str, np.ndarray]
    errors: list[tuple[int, str]]
    refused: list[int]
    grid: tuple[int, int] | None
    n_cropped: int
    seen: Seen | None = None


def _embed(plan: Plan, strategy: Strategy, network: EmbeddingNetwork, read: Batch) -> _Embedded:
    batch, features = embed(read, plan.source, network.forward, plan.on_unreadable)
    refused = np.setdiff1d(read.positions, batch.positions).tolist()
    n_cropped = sum(_is_cropped(network.preprocess, *size) for size in batch.sizes)
    if features is None:
        return _Embedded({}, batch.errors, refused, None, n_cropped)
    activations = features.activations
    rows = {
        "positions": batch.positions,
        "marks": batch.marks,
        "embedding": to_numpy(features.embedding),
        "length": to_numpy(features.norm),
        **strategy.embedded(activations),
    }
    grid = activations.shape[2], activations.shape[3]
    kept = seen(plan, batch.positions, activations) if plan.fits else None
    return _Embedded(rows, batch.errors, refused, grid, n_cropped, kept)


def _joined(batches: Iterable[_Embedded], n: int, progressed: Advance) -> dict[str, np.ndarray]:
    """Return the arrays of a chunk of n images."""
    rows, errors, refused = _Buffers(n), list[tuple[int, str]](), list[int]()
    grid, n_cropped, every = (0, 0), 0, list[Seen]()
    for batch in batches:
        every += [batch.seen] if batch.seen else []
        errors += batch.errors
        refused += batch.refused
        n_cropped += batch.n_cropped
        grid = batch.grid or grid
        if batch.rows:
            rows.add(batch.rows)
        progressed(len(batch.rows.get("positions", ())) + len(batch.errors))
    text = json.dumps([[int(position), message] for position, message in errors])
    return {
        "positions": np.empty(0, np.int64),
        **rows.arrays(),
        **(concepts.joined(every) if every else {}),
        "grid": np.array(grid),
        "errors": np.frombuffer(text.encode(), np.uint8),
        "refused": np.array(refused, np.int64),
        "cropped": np.array([n_cropped]),
    }


def _is_cropped(preprocess: AnyPreprocess | None, width: int, height: int) -> bool:
    """Return whether a centre crop leaves out more than `CROPPED` of a picture."""
    if not isinstance(preprocess, Preprocess) or preprocess.resize != "crop":
        return False
    x0, y0, x1, y1 = preprocess.extent(int(width), int(height))
    seen = (min(x1, width) - max(x0, 0)) * (min(y1, height) - max(y0, 0))
    return bool(seen < (1 - CROPPED) * width * height)


def weigh_chunks(
    plan: Plan, anchors: AnchorCotangents, offset: int, chunks: range | None = None
) -> None:
    """Write chunks `weights`: averaged weights, counts of triplets, and cached activations.

    `offset` is the place of the first chunk's first image among the anchors' embeddings.
    """
    chunks = plan.chunks if chunks is None else chunks
    sizes = {chunk: len(plan.embedded(chunk)) for chunk in chunks}
    done = {chunk for chunk in sizes if sizes[chunk] and plan.checkpoint.intact("weights", chunk)}
    n_done, n_images = sum(sizes[chunk] for chunk in done), sum(sizes.values())
    if done:
        log.info("going on: weights of %s of %s images are done", f"{n_done:,}", f"{n_images:,}")
    with plan.stages("weights", n_images) as progressed:
        progressed(n_done)
        for chunk, n in sizes.items():
            if n and chunk not in done:
                arrays = _weigh(plan, chunk, anchors, np.arange(offset, offset + n), progressed)
                plan.checkpoint.write("weights", chunk, arrays)
            offset += n


def _weigh(
    plan: Plan, chunk: int, anchors: AnchorCotangents, places: np.ndarray, progressed: Advance
) -> dict[str, np.ndarray]:
    embedded, kept = plan.checkpoint.read("embed", chunk), _Buffers(len(places))

    def weigh(strategy: Strategy, rows: slice, images: np.ndarray) -> dict[str, np.ndarray]:
        try:
            cotangents = anchors.of(places[rows])
            arrays = strategy.weigh(images, embedded, rows, cotangents)
        except EmbeddingError as error:
            # A method may have run changed pictures, so that its rows are not the batch's.
            first, last = (plan.source.name(int(embedded["positions"][rows][at])) for at in (0, -1))
            name = first if len(images) == 1 else f"one of the images {first} to {last}"
            raise error.of_one(name) from None
        return {**arrays, "counts": cotangents.counts}

    def pooled() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(places), plan.batch_size):
            n = len(places[first : first + plan.batch_size])
            yield weigh(plan.strategy, slice(first, first + n), np.empty((n, 0), "f4"))

    def look(
        strategy: Strategy, _: EmbeddingNetwork, rows: slice, batch: Batch
    ) -> dict[str, np.ndarray]:
        return weigh(strategy, rows, batch.images)

    weighed = pooled() if plan.strategy.stage == "embed" else look_again(plan, chunk, look)
    for arrays in weighed:
        kept.add(arrays)
        progressed(len(arrays["counts"]))
    return kept.arrays()


Look = Callable[[Strategy, EmbeddingNetwork, slice, Batch], dict[str, np.ndarray]]
"""What is made of a batch that is seen again; the slice are its rows in the chunk."""


def look_again(plan: Plan, chunk: int, look: Look) -> Iterator[dict[str, np.ndarray]]:
    """Yield what `look` makes of each batch of a finished chunk, composed as in the first pass.

    An image that could be read then and cannot now, or the other way round, is an ImageError.
    """
    expected = plan.embedded(chunk)
    refused = plan.checkpoint.column("embed", chunk, "refused")

    def of(strategy: Strategy, network: EmbeddingNetwork, read: Batch) -> dict[str, np.ndarray]:
        out = np.flatnonzero(np.isin(read.positions, refused))
        batch, reasons = read.without(out.tolist(), [""] * len(out)), dict(read.errors)
        for position in [*batch.positions.tolist(), *reasons]:
            if (position in reasons) == (position in expected):
                why = reasons.get(position, f"{plan.source.name(position)}: can be read now")
                raise ImageError(
                    f"{why}; its file changed during the build, so run the build again"
                )
        if not len(batch):
            return {}
        first = int(np.searchsorted(expected, batch.positions[0]))
        return look(strategy, network, slice(first, first + len(batch)), batch)

    with closing(plan.each_batch(plan.positions(chunk), of)) as batches:
        yield from filter(None, batches)


def map_chunk(plan: Plan, chunk: int, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's stored map `[n h w]` as bytes with one scale, of a finished chunk.

    `factors` multiply the cached activations: decoded weights `[n K]` or `[n K H W]`, or codes.
    """
    if plan.checkpoint.whole("maps", chunk):  # drawn by a shard
        arrays = plan.checkpoint.read("maps", chunk, "maps", "scales")
        return np.asarray(arrays["maps"]), np.asarray(arrays["scales"])
    if plan.strategy.layers:
        arrays = plan.checkpoint.read("weights", chunk, "own", "own_scales")
        return np.asarray(arrays["own"]), np.asarray(arrays["own_scales"])
    arrays, rows = plan.checkpoint.read(plan.strategy.stage, chunk), _Buffers(len(factors))

    def maps(places: slice, cached: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        bytes_of, scales = stored_maps(maps_of(factors[places], cached))
        return {"maps": bytes_of, "scales": scales}

    def kept() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(factors), plan.batch_size):
            places = slice(first, first + plan.batch_size)
            yield maps(places, {name: arrays[name][places] for name in ("activations", "peaks")})

    def look(
        strategy: Strategy, network: EmbeddingNetwork, places: slice, batch: Batch
    ) -> dict[str, np.ndarray]:
        return maps(places, strategy.cached(network.forward(batch.images).activations))

    for drawn in kept() if "activations" in arrays else look_again(plan, chunk, look):
        rows.add(drawn)
    return rows.arrays()["maps"], rows.arrays()["scales"]


class _Buffers:
    """Arrays of at most n rows filled batch by batch, so that no second copy is ever made."""

    def __init__(self, n: int) -> None:
        self.n, self.n_done = n, 0
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add rows of every array, the same number of each."""
        stop = self.n_done + len(next(iter(rows.values())))
        for name, array in rows.items():
            if name not in self._arrays:
                self._arrays[name] = np.empty((self.n, *array.shape[1:]), array.dtype)
            self._arrays[name][self.n_done : stop] = array
        self.n_done = stop

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the rows so far."""
        return {name: array[: self.n_done] for name, array in self._arrays.items()}
