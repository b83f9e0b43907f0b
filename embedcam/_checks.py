"""Checks: a value is of the wanted kind, or one sentence says what was given and what is expected.

The checks of arrays import NumPy where they run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .errors import EmbedcamError, InputError, NetworkError, Plain, reason, short

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike
    from torch import Tensor

UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a normalised embedding may be."""
LARGEST = 1e15
"""Of what is given: squares and sums of larger numbers need not stay within float32."""


def whole(
    name: str,
    value: object,
    least: float = 0,
    most: float = math.inf,
    *,
    error: type[EmbedcamError] = InputError,
) -> int:
    """Return a whole number (Python's or NumPy's, no boolean) as an int, or raise `error`."""
    try:
        if not isinstance(value, bool) and least <= (number := operator.index(value)) <= most:  # type: ignore[arg-type]
            return number
    except TypeError:
        pass
    raise error(f"{name} = {short(value)}; give a whole number {interval(least, most)}".rstrip())


def number(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    error: type[EmbedcamError] = InputError,
) -> float:
    """Return a finite number, no boolean, as a float, or raise `error`."""
    try:
        converted = math.nan if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        converted = math.nan
    fits = math.isfinite(converted) and least <= converted <= most
    if fits and (above is None or converted > above) and (below is None or converted < below):
        return converted
    wanted = f"a number {interval(least, most, above, below)}".rstrip()
    raise error(f"{name} = {short(value)}; give {wanted}")


def interval(
    least: float, most: float, above: float | None = None, below: float | None = None
) -> str:
    """Return words for a range: "of at least 1", "from 0 to 1", "between 0 and 1"."""
    if above is not None and below is not None:
        return f"between {_end(above)} and {_end(below)}"
    if math.isfinite(least) and math.isfinite(most):
        return f"from {_end(least)} to {_end(most)}"
    ends = (("above", above), ("of at least", least), ("below", below), ("of at most", most))
    known = [(words, end) for words, end in ends if end is not None and math.isfinite(end)]
    return " and ".join(f"{words} {_end(end)}" for words, end in known)


def _end(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def one_of(
    name: str, value: object, known: Iterable[str], *, error: type[EmbedcamError] = InputError
) -> str:
    """Return a choice among known ones, or raise `error` with the nearest one and all of them."""
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise error(f"{name} = {short(value)} is unknown; {nearest_of(value, names)}")
    return value


def nearest_of(value: object, known: Iterable[str]) -> str:
    """Return words for a message: the known name nearest to what was given, and all of them."""
    names = list(known)
    near = get_close_matches(value, names, 1) if isinstance(value, str) else []
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}"


def check_sides(name: str, sides: Plain) -> tuple[int, int]:
    """Return (height, width), both whole and at least 1."""
    try:
        height, width = (whole("side", side, 1) for side in sides)  # type: ignore[union-attr]
        return height, width
    except (TypeError, ValueError):
        raise InputError(
            f"{name} = {sides!r}; give (height, width), whole numbers of at least 1"
        ) from None


def check_features(
    embedding: ArrayLike,
    activations: ArrayLike,
    width: int,
    channels: int,
    normalized: bool,
    grid: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return features of queries as float32 `[B D]` and `[B K H W]`, and whether it was one alone.

    Embeddings may be `[D]` too; activations `[K H W]`, or tokens `[T K]`, `[B T K]` on a `grid`.
    """
    import numpy as np

    vectors, maps = as_numbers("embedding", embedding), as_numbers("activations", activations)
    single = vectors.ndim == 1
    if single:
        vectors, maps = vectors[None], maps[None]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise InputError(
            f"the embedding has shape {list(np.shape(embedding))}; this index holds {width} "
            f"numbers an image, so give [{width}] or [B {width}]"
        )
    tokens = grid is not None and maps.ndim == 3 and maps.shape[2] == channels
    if tokens:
        height, cells = check_sides("grid", grid)
        if maps.shape[1] != height * cells:
            raise InputError(
                f"{maps.shape[1]} tokens do not fill a grid of {height} x {cells}; drop class "
                "and register tokens first"
            )
        maps = maps.reshape(-1, height, cells, channels).transpose(0, 3, 1, 2)
    shaped = maps.ndim == 4 and maps.shape[1] == channels and 0 not in maps.shape[2:]
    if not shaped or (grid is not None and not tokens):
        raise InputError(
            f"the activations have shape {list(np.shape(activations))}; this index needs "
            f"[{channels} H W] for one query and [B {channels} H W] for several, or tokens "
            f"[T {channels}] and [B T {channels}] with grid=(H, W)"
        )
    if len(maps) != len(vectors):
        raise InputError(f"{len(vectors)} embeddings came with {len(maps)} activations")
    if wrong := wrong_number(maps, "query"):
        raise InputError(f"the activations of {wrong}")
    return check_vectors(vectors, normalized), maps.astype(np.float32, copy=False), single


def check_vectors(vectors: np.ndarray, normalized: bool) -> np.ndarray:
    """Return embeddings of queries `[B D]` as float32; each of length 1 where `normalized`."""
    import numpy as np

    if wrong := wrong_number(vectors, "query"):
        raise InputError(f"the embedding of {wrong}")
    vectors = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt((vectors * vectors).sum(axis=1))
    off = np.abs(lengths - 1)
    if normalized and off.max(initial=0) > UNIT_TOLERANCE:
        worst = int(off.argmax())
        raise InputError(
            f"the embedding of query {worst} has length {lengths[worst]:.4g}; this index holds "
            "vectors of length 1: divide it by its L2 norm first"
        )
    return vectors


def check_outputs(embeddings: np.ndarray, *activations: np.ndarray) -> None:
    """Raise NetworkError where embeddings `[B D]` or a layer's activations cannot be used."""
    named = [("embedding", embeddings), *(("activations", maps) for maps in activations)]
    for name, values in named:
        if wrong := wrong_number(values, "query"):
            raise NetworkError(f"the network's {name} of {wrong}")


def wrong_number(values: np.ndarray, row: str = "row", first: int = 0) -> str | None:
    """Return words on the first row with a NaN, an infinity or more than `LARGEST`; or None.

    Rows are counted from `first`.
    """
    import numpy as np

    if is_usable(values):
        return None
    place = next(place for place, one in enumerate(values) if not is_usable(one))
    least, most = float(values[place].min()), float(values[place].max())
    if not np.isfinite([least, most]).all():
        return f"{row} {first + place} holds a NaN or an infinity"
    held = f"{row} {first + place} holds {most if most > LARGEST else least:.4g}"
    return f"{held}, and numbers may go up to {LARGEST:g} either way; scale it down"


def is_usable(values: np.ndarray) -> bool:
    """Return whether all are numbers, of up to `LARGEST` either way."""
    # Two passes and no copy, in whatever type they come; a NaN passes neither comparison.
    return float(values.min(initial=0)) >= -LARGEST and float(values.max(initial=0)) <= LARGEST


def stacked(inputs: Sequence[np.ndarray | Tensor]) -> np.ndarray | Tensor:
    """Return inputs `[3 H W]` as one batch in their own library; a batch of one is not copied."""
    import numpy as np

    shapes = sorted({str(list(one.shape)) for one in inputs})
    if len(shapes) > 1:
        raise InputError(f"inputs of one batch must have one shape, got {', '.join(shapes)}")
    if len(inputs) == 1:
        return inputs[0][None]
    first = next((one for one in inputs if not isinstance(one, np.ndarray)), None)
    if first is None:
        return np.stack([as_array(one) for one in inputs])
    batch = first.detach().new_empty((len(inputs), *first.shape))
    for place, one in enumerate(inputs):
        batch[place] = first.new_tensor(one) if isinstance(one, np.ndarray) else one.detach()
    return batch


def as_numbers(name: str, values: ArrayLike) -> np.ndarray:
    """Return an array of numbers, or raise InputError."""
    import numpy as np

    try:
        array = np.asarray(values)
        if array.dtype.kind in "fiu":
            return array
        why = f"type {array.dtype}"
    except (TypeError, ValueError, RuntimeError) as error:
        why = reason(error)
    raise InputError(f"the {name} cannot be read as an array of numbers ({why})")


def as_array(values: np.ndarray | Tensor, kind: DTypeLike | None = None) -> np.ndarray:
    """Return an array, or a tensor of any device, as an array; of that `kind` if any."""
    import numpy as np

    array: np.ndarray = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    return array if kind is None else array.astype(kind, copy=False)
