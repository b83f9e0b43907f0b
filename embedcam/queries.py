"""What a query may be: features and inputs, checked, refused with their numbers. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError, NetworkError

UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a normalised embedding may be."""
LARGEST = 1e15
"""Of what is given: squares and sums of larger numbers need not stay within float32."""


def check_features(
    embedding: Any,
    activations: Any,
    width: int,
    channels: int,
    normalized: bool,
    grid: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Features of one query or of several.

    Args:
        embedding: `[D]` or `[B D]`.
        activations: `[K H W]` or `[B K H W]`; tokens `[T K]` or `[B T K]` with `grid`.
        width: D expected.
        channels: K expected.
        normalized: whether embeddings must have length 1.
        grid: (H, W) of tokens.

    Returns:
        float32 `[B D]`, float32 `[B K H W]`, and whether it was one query alone.

    Raises:
        InputError: a wrong shape, a NaN, a number beyond `LARGEST`, or a vector that is not of unit
            length.
    """
    vectors, maps = _numbers("embedding", embedding), _numbers("activations", activations)
    single = vectors.ndim == 1
    if single:
        vectors, maps = vectors[None], maps[None]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise InputError(
            f"the embedding has shape {list(np.shape(embedding))}; this index holds {width} "
            f"numbers an image, so give [{width}] or [B {width}]"
        )
    maps = _on_grid(maps, channels, grid, list(np.shape(activations)))
    if len(maps) != len(vectors):
        raise InputError(f"{len(vectors)} embeddings came with {len(maps)} activations")
    wrong = wrong_number(maps)
    if wrong is not None:
        raise InputError(f"the activations of query {wrong[0]} {wrong[1]}")
    return check_vectors(vectors, normalized), maps.astype(np.float32, copy=False), single


def check_vectors(vectors: np.ndarray, normalized: bool) -> np.ndarray:
    """Embeddings of queries, numbers `[B D]`, as float32.

    Args:
        vectors: given.
        normalized: whether they must have length 1.

    Raises:
        InputError: a NaN, a number beyond `LARGEST`, or a vector that is not of unit length.
    """
    wrong = wrong_number(vectors)
    if wrong is not None:
        raise InputError(f"the embedding of query {wrong[0]} {wrong[1]}")
    found = vectors.astype(np.float32, copy=False)
    lengths = np.linalg.norm(found, axis=1)
    off = np.abs(lengths - 1)
    if normalized and len(off) and off.max() > UNIT_TOLERANCE:
        worst = int(off.argmax())
        raise InputError(
            f"the embedding of query {worst} has length {lengths[worst]:.4g}; this index holds "
            "vectors of length 1: divide it by its L2 norm first"
        )
    return found


def check_outputs(embeddings: np.ndarray, *activations: np.ndarray) -> None:
    """What a network made of pictures: embeddings `[B D]`, activations `[B K H W]` of each layer.

    Raises:
        NetworkError: a NaN, an infinity, or a number beyond `LARGEST`.
    """
    named = [("embedding", embeddings), *(("activations", maps) for maps in activations)]
    for name, values in named:
        wrong = wrong_number(values)
        if wrong is not None:
            raise NetworkError(f"the network's {name} of query {wrong[0]} {wrong[1]}")


def wrong_number(values: np.ndarray) -> tuple[int, str] | None:
    """The first row of numbers `[n ...]` that cannot be computed with, and what is wrong with it.

    A NaN and an infinity, and what is larger than `LARGEST`; None where there is none.
    """
    if _usable(values):
        return None
    row = next(place for place, one in enumerate(values) if not _usable(one))
    numbers = values[row].ravel()
    least, most = float(numbers.min()), float(numbers.max())
    worst = most if most > LARGEST else least
    if not np.isfinite(worst) or not np.isfinite(numbers).all():
        return row, "holds a NaN or an infinity"
    return row, f"holds {worst:.4g}, and numbers may go up to {LARGEST:g} either way; scale it down"


def _usable(values: np.ndarray) -> bool:
    # Two passes and no copy, in whatever type they come; a NaN passes neither comparison.
    return float(values.min(initial=0)) >= -LARGEST and float(values.max(initial=0)) <= LARGEST


def check_count(n_neighbors: Any) -> int:
    """How many neighbours are wanted, as an int."""
    whole = isinstance(n_neighbors, int | np.integer) and not isinstance(n_neighbors, bool)
    if not whole or n_neighbors < 1:
        raise InputError(f"n_neighbors = {n_neighbors!r}; give a whole number of at least 1")
    return int(n_neighbors)


def check_sides(name: str, sides: Any) -> tuple[int, int]:
    """(height, width), both whole and at least 1."""
    try:
        height, width = (int(side) for side in sides)
        if min(height, width) >= 1 and (height, width) == tuple(sides):
            return height, width
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} = {sides!r}; give (height, width), whole numbers of at least 1")


def stacked(inputs: Sequence[Any]) -> Any:
    """Inputs `[3 H W]` as one batch in their own library; a batch of one is not copied."""
    if len({tuple(one.shape) for one in inputs}) > 1:
        shapes = sorted({str(list(one.shape)) for one in inputs})
        raise InputError(f"inputs of one batch must have one shape, got {', '.join(shapes)}")
    if len(inputs) == 1:
        return inputs[0][None]
    first = next((one for one in inputs if not isinstance(one, np.ndarray)), None)
    if first is None:
        return np.stack(inputs)
    batch = first.detach().new_empty((len(inputs), *first.shape))
    for place, one in enumerate(inputs):
        batch[place] = first.new_tensor(one) if isinstance(one, np.ndarray) else one.detach()
    return batch


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values)
        if found.dtype.kind in "fiu":
            return found
        given = f"type {found.dtype}"
    except (TypeError, ValueError, RuntimeError) as error:
        given = str(error).partition("\n")[0]
    raise InputError(f"the {name} cannot be read as an array of numbers ({given})")


def _on_grid(
    maps: np.ndarray, channels: int, grid: tuple[int, int] | None, given: list[int]
) -> np.ndarray:
    """Activations `[B K H W]` of these, or of tokens `[B T K]` on a grid."""
    if grid is not None and maps.ndim == 3 and maps.shape[2] == channels:
        height, width = check_sides("grid", grid)
        if maps.shape[1] != height * width:
            raise InputError(
                f"{maps.shape[1]} tokens do not fill a grid of {height} x {width}; drop class "
                "and register tokens first"
            )
        return maps.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
    if grid is not None or maps.ndim != 4 or maps.shape[1] != channels or 0 in maps.shape[2:]:
        raise InputError(
            f"the activations have shape {given}; this index needs [{channels} H W] for one query "
            f"and [B {channels} H W] for several, or tokens [T {channels}] and [B T {channels}] "
            "with grid=(H, W)"
        )
    return maps
