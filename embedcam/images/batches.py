"""Images in batches for a network: read ahead by threads, in order, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from .._checks import one_of, whole
from ..errors import EmbeddingError, ImageError, InputError, printable
from .reading import NO_MARK
from .sources import ImageSource

Prepare = Callable[[Image.Image], np.ndarray]
T = TypeVar("T")
Outcome = tuple[np.ndarray, tuple[int, int], np.ndarray] | ImageError


@dataclass
class Batch:
    """Some consecutive images of the positions asked for, without those that cannot be read."""

    positions: np.ndarray  # indices into the source, int64 [b]
    images: np.ndarray  # preprocessed, float32 [b 3 H W]
    sizes: np.ndarray  # (width, height) of the upright originals, int64 [b 2]
    marks: np.ndarray  # of the files before they were read, uint32 [b 4]; zeros if not asked for
    errors: list[tuple[int, str]] = field(default_factory=list)  # (position, message), left out

    def __len__(self) -> int:
        return len(self.positions)

    def without(self, rows: Sequence[int], reasons: Sequence[str]) -> Batch:
        """Return the batch without some of its rows, which are among its errors then."""
        left_out = zip(self.positions[list(rows)].tolist(), reasons, strict=True)
        names = ("positions", "images", "sizes", "marks")
        kept = {name: np.delete(getattr(self, name), list(rows), axis=0) for name in names}
        return replace(self, **kept, errors=sorted([*self.errors, *left_out]))


def embed(
    batch: Batch, source: ImageSource, run: Callable[[np.ndarray], T], on_error: str
) -> tuple[Batch, T | None]:
    """Run a network on a batch, without the images of which `run` raises EmbeddingError.

    `on_error` "fail" raises it. Return the batch that was run, and what came of it, None of none.
    """
    while len(batch):
        names = [source.name(position) for position in batch.positions.tolist()]
        try:
            return batch, run(batch.images)
        except EmbeddingError as error:
            if on_error == "fail":
                raise error.named(names) from None
            rows = error.rows
            batch = batch.without(rows, [f"{names[row]}: {error.what}" for row in rows])
    return batch, None


def usable_cores() -> int:
    """Return how many cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable or 1)


def default_workers() -> int:
    """Return the threads worth having here: one for each usable core, at most eight."""
    return min(8, usable_cores())


def load_batches(
    source: ImageSource,
    positions: Sequence[int] | np.ndarray,
    preprocess: Prepare,
    batch_size: int,
    *,
    workers: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    marked: bool = False,
) -> Generator[Batch, None, None]:
    """Read and preprocess images, a batch at a time, in the order of `positions`.

    Batch j covers positions[j * batch_size : (j + 1) * batch_size], whatever could be read of it.
    `workers` threads read ahead by about one batch; 0 reads in the calling thread. `on_error`
    "fail" raises the ImageError of the first unreadable image, "skip" leaves it out and reports it
    in `Batch.errors`. `marked` takes the marks of the files, which reads each of them twice.
    """
    given = np.asarray(positions)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InputError(f"positions: expected whole numbers [n], given {given.dtype}")
    wanted = given.astype(np.int64).tolist()
    if wanted and not 0 <= min(wanted) <= max(wanted) < len(source):
        ends = f"{min(wanted)} to {max(wanted)}"
        raise InputError(f"positions: {ends} given, the source has {len(source)} images")
    batch_size = whole("batch_size", batch_size, 1)
    workers = default_workers() if workers is None else whole("workers", workers)
    one_of("on_error", on_error, ("fail", "skip"))
    prepare = partial(_prepare, source, preprocess, marked)
    outcomes = _outcomes(prepare, wanted, workers, ahead=batch_size + 2 * workers)
    size = getattr(preprocess, "size", None)
    shape = (3, *size) if isinstance(size, tuple) else None
    return _batches(source, wanted, outcomes, batch_size, on_error, shape)


def map_batches(
    source: ImageSource,
    positions: np.ndarray,
    preprocess: Prepare,
    batch_size: int,
    runs: Sequence[Callable[[Batch], T]],
    *,
    workers: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    marked: bool = False,
    start: Callable[[], object] | None = None,
) -> Generator[T, None, None]:
    """Yield in order what `runs` make of each batch; see `load_batches` for what a batch is.

    As many batches go side by side as there are `workers`, by default one for each run. A thread
    reads, prepares and runs a whole batch, so that reading and computing share the cores without
    anyone waiting for the other; `start` is called once in each. A run is used by one thread at a
    time, so that more workers than runs read more and take no more memory to compute.
    """
    workers = len(runs) if workers is None else whole("workers", workers, len(runs))
    free: SimpleQueue[Callable[[Batch], T]] = SimpleQueue()
    for run in runs:
        free.put(run)

    def of(part: np.ndarray) -> tuple[Batch, T]:
        (batch,) = load_batches(
            source, part, preprocess, batch_size, workers=0, on_error=on_error, marked=marked
        )
        run = free.get()
        try:
            return batch, run(batch)
        finally:
            free.put(run)

    pool = ThreadPoolExecutor(workers, "embedcam-images", initializer=start)
    waiting: deque[Future[tuple[Batch, T]]] = deque()
    shape: tuple[int, ...] | None = None
    parts = (positions[i : i + batch_size] for i in range(0, len(positions), batch_size))
    try:
        while True:
            waiting += (pool.submit(of, part) for part in islice(parts, workers + 1 - len(waiting)))
            if not waiting:
                return
            batch, made = waiting.popleft().result()
            if len(batch):
                shape = shape or batch.images.shape[1:]
                _check_shape(source, batch.positions[0], batch.images.shape[1:], shape)
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_shape(
    source: ImageSource, position: int, shape: tuple[int, ...], before: tuple[int, ...]
) -> None:
    if shape != before:
        raise InputError(
            f"{source.name(position)}: preprocessed to {list(shape)}, the images before it to "
            f"{list(before)}; a network takes one size, so resize or crop"
        )


def _prepare(source: ImageSource, preprocess: Prepare, marked: bool, position: int) -> Outcome:
    try:
        # Before it is read: a file that changes meanwhile must not pass for the one that was read.
        mark = source.mark(position) if marked else np.array(NO_MARK, np.uint32)
        image = source.open(position)
        return preprocess(image), image.size, mark
    except ImageError as error:
        name = source.name(position)
        return error if str(error).startswith(printable(name)) else ImageError(f"{name}: {error}")
    except InputError as error:
        # The transform is at fault, not the image: skipping would only hide it.
        raise InputError(f"{source.name(position)}: {error}") from error
    except Exception as error:
        error.add_note(f"while preparing the image {source.name(position)}")
        raise


def _outcomes(
    prepare: Callable[[int], Outcome], positions: Sequence[int], workers: int, ahead: int
) -> Generator[Outcome, None, None]:
    if not workers:
        yield from map(prepare, positions)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="embedcam-images")
    waiting: deque[Future[Outcome]] = deque()
    try:
        for position in positions:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(prepare, position))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(
    source: ImageSource,
    positions: Sequence[int],
    outcomes: Generator[Outcome, None, None],
    batch_size: int,
    on_error: str,
    shape: tuple[int, ...] | None,
) -> Generator[Batch, None, None]:
    with closing(outcomes):
        for start in range(0, len(positions), batch_size):
            part = positions[start : start + batch_size]
            loaded: list[tuple[int, np.ndarray, tuple[int, int], np.ndarray]] = []
            errors: list[tuple[int, str]] = []
            for position, outcome in zip(part, islice(outcomes, len(part)), strict=True):
                if isinstance(outcome, ImageError):
                    if on_error == "fail":
                        raise outcome
                    errors.append((position, str(outcome)))
                    continue
                shape = outcome[0].shape if shape is None else shape
                _check_shape(source, position, outcome[0].shape, shape)
                loaded.append((position, *outcome))
            places, arrays, sizes, marks = zip(*loaded, strict=True) if loaded else ((),) * 4
            yield Batch(
                np.array(places, np.int64),
                np.stack(arrays) if arrays else np.zeros((0, *(shape or (3, 0, 0))), "f4"),
                np.array(sizes, np.int64).reshape(-1, 2),
                np.array(marks, np.uint32).reshape(-1, 4),
                errors,
            )
