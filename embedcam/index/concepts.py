"""Concepts: parts that activations are made of, and the pictures where each answers most.

A position's activations are, roughly, a sum of parts: a V with V `[P K]` not negative (non-negative
matrix factorisation, Lee and Seung, Nature 1999). V is fitted once, over positions of a sample of
the images. What a picture's channels give to a score is divided among the parts by the share that
each has in them, as a mixture of sounds is divided among its sources (Févotte, Bertin and Durrieu,
Neural Computation 2009): the amounts and a rest add up to the score.

An index keeps the parts, and for every channel and part the ids of the pictures, and the positions
in them, where it answers most: arrays of the whole index, nothing for each image.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._checks import one_of, whole
from .._files import refuse_device
from ..errors import InputError, short
from ..images.texts import Texts

KINDS = ("channel", "concept")
"""What has exemplars."""
PARTS = "concept_parts"
IDS = ("exemplar_ids", "exemplar_offsets")
EXEMPLARS = (*(f"{kind}_{what}" for kind in KINDS for what in ("exemplars", "values")), *IDS)
ARRAYS = frozenset((PARTS, *EXEMPLARS))
"""Names of the arrays, none of which decodes a row."""
MOST_BYTES = 1 << 20
"""Of all of them together, in an index that embedcam makes."""
LONGEST_NAME = 100
_NONE = 1e-100
"""Of a channel, where the largest is about 1: what is less cannot be divided by."""


class Exemplar(NamedTuple):
    """A picture of the index and the position (row, column) where a line answers with `value`."""

    id: str
    row: int
    column: int
    value: float


class Best(NamedTuple):
    """Where each of n lines answers most, `values` `[n E]`, best first.

    Of the picture each is in: its number, `places` `[n E]`, and the position, `cells` `[n E]`,
    counted row by row.
    """

    values: np.ndarray
    places: np.ndarray
    cells: np.ndarray

    def first(self, n: int) -> Best:
        """Return the n best of each line."""
        return Best(*(one[:, :n] for one in self))

    def merged(self, other: Best, n: int) -> Best:
        """Return the n best of two of different pictures; of equal values the first pictures'."""
        both = [np.concatenate(pair, axis=1) for pair in zip(self, other, strict=True)]
        order = np.lexsort((both[1], -both[0]), axis=1)[:, :n]
        return Best(*(np.take_along_axis(one, order, axis=1) for one in both))


@dataclass(frozen=True, eq=False)
class Concepts:
    """P parts of K channels, `parts` `[P K]`, float32 and not negative, with their `names`.

    Of a layer whose activations are signed they are `[P 2K]`: parts of what is positive, and
    behind them of what is negative, without its sign. A name that nobody gave is "".
    """

    parts: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.parts)

    def named(self, names: Mapping[int, str]) -> Concepts:
        """Return the same with names by number, as `read_names` reads them."""
        if wrong := [number for number in names if number >= len(self)]:
            raise InputError(
                f"concept {wrong[0]} is named {short(names[wrong[0]])}, and the index has "
                f"{len(self)} concepts, counted from 0; give names to those"
            )
        return replace(self, names=tuple(names.get(n, one) for n, one in enumerate(self.names)))

    def amounts(self, activations: np.ndarray) -> np.ndarray:
        """Return how much of each part is in a picture `[K H W]`, `[P]`, not negative.

        They are those whose sum is nearest to the channels' sums over positions, by squares, where
        the largest of these counts as 1: amounts of one picture compare, of two they do not.
        """
        from scipy.optimize import nnls

        sums = self._sums(activations)
        largest = float(sums.max(initial=0))
        if not (0 < largest < np.inf):
            return np.zeros(len(self))
        factor, projection = self._factors
        most = 50 * len(self)
        return np.asarray(nnls(factor.T, projection @ (sums / largest), maxiter=most)[0])

    def divide(self, channels: np.ndarray, activations: np.ndarray) -> tuple[np.ndarray, float]:
        """Return what each part gives to a score, `[P]`, and the rest, which no part explains.

        `channels` `[K]` is what each channel of the picture `[K H W]` gives. The shares of parts in
        a channel are 0 to 1, and add up to 1, or to 0 where no part has it.
        """
        parts, n_channels = self._wide, len(activations)
        much = self.amounts(activations)
        total = much @ parts
        if signed := len(total) != n_channels:
            total = total[:n_channels] + total[n_channels:]
        each = channels / np.where(total > _NONE, total, 1)
        amounts = much * (parts @ (np.concatenate([each, each]) if signed else each))
        return amounts, float(channels.sum() - amounts.sum())

    @cached_property
    def _wide(self) -> np.ndarray:
        return self.parts.astype(np.float64)

    @cached_property
    def _factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A lower triangle L `[P P]` with L L^T = V V^T, but for what keeps equal parts apart.

        And what least squares of L take of a picture's channels, L^-1 V.
        """
        wide = self._wide
        products = wide @ wide.T
        products[np.diag_indices(len(wide))] += 1e-9 * np.trace(products) / len(wide) + 1e-300
        factor = np.linalg.cholesky(products)
        return factor, np.linalg.solve(factor, wide)

    def _sums(self, activations: np.ndarray) -> np.ndarray:
        flat = activations.reshape(len(activations), -1)
        if self.parts.shape[1] not in (len(flat), 2 * len(flat)):
            raise InputError(
                f"these activations have {len(flat)} channels, and the index's concepts are parts "
                f"of {self.parts.shape[1]}; give those of the network it was built with"
            )
        ones = np.ones(flat.shape[1], flat.dtype)
        sums: np.ndarray = (np.maximum(flat, 0) @ ones).astype(np.float64)
        if self.parts.shape[1] == len(flat):
            return sums
        return np.concatenate([sums, sums - (flat @ ones).astype(np.float64)])


class Exemplars:
    """The exemplars of an index, decoded and looked at one by one: nothing of a file is believed.

    `arrays` are those of the whole index by name, `width` is W of the layer's grid.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], width: int) -> None:
        self._arrays, self._width = arrays, width
        self._ids = Texts(*(arrays[name] for name in IDS)) if IDS[0] in arrays else None

    def of(self, kind: str, number: int) -> Iterator[Exemplar]:
        """Yield the exemplars of a channel or concept, best first, removed pictures too.

        Raises ValueError, which says what is wrong, where the arrays do not hold together.
        """
        found = self._arrays.get(f"{one_of('kind', kind, KINDS)}_exemplars")
        if found is None or self._ids is None:
            return
        whole("number", number, 0, len(found) - 1)
        values = self._arrays[f"{kind}_values"][number]
        for (place, cell), value in zip(found[number].tolist(), values.tolist(), strict=True):
            if value > 0:  # nothing answers with less: a dead channel
                row, column = divmod(cell, self._width)
                yield Exemplar(self._id(place), row, column, value)

    def _id(self, place: int) -> str:
        assert self._ids is not None
        if place >= len(self._ids):
            raise ValueError(f"name picture {place} of {len(self._ids)}")
        start, stop = self._ids.offsets[place : place + 2].tolist()
        if not start <= stop <= len(self._ids.blob):
            raise ValueError(f"name picture {place}, whose id lies outside")
        return self._ids.raw(place).decode("utf-8")


def arrays_of(
    channels: Best, concepts: Best | None, parts: np.ndarray | None, ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the arrays of an index, by name, with as many exemplars as `MOST_BYTES` allow."""
    best = {"channel": channels} | ({} if concepts is None else {"concept": concepts})
    kept = {} if parts is None else {PARTS: parts}
    for n in range(channels.values.shape[1], 0, -1):
        some = {kind: one.first(n) for kind, one in best.items()}
        named, numbers = np.unique(
            np.concatenate([one.places.ravel() for one in some.values()]), return_inverse=True
        )
        texts, done, arrays = Texts.of(ids[int(place)] for place in named), 0, dict(kept)
        for kind, one in some.items():
            of = numbers[done : done + one.places.size].reshape(one.places.shape)
            arrays[f"{kind}_exemplars"] = np.stack([of, one.cells], axis=2).astype(np.uint32)
            arrays[f"{kind}_values"] = one.values.astype(np.float32)
            done += one.places.size
        arrays |= dict(zip(IDS, (texts.blob, texts.offsets.astype(np.uint64)), strict=True))
        if sum(array.nbytes for array in arrays.values()) <= MOST_BYTES:
            return arrays
    return kept


def misshapen(shapes: Mapping[str, tuple[str, tuple[int, ...]]], channels: int) -> str | None:
    """Return what is wrong with types and shapes of an index's arrays, or None.

    `shapes` are (dtype, shape) by name, of any arrays of the whole index; `channels` is K.
    """
    shapes = {name: shapes[name] for name in sorted(ARRAYS & shapes.keys())}
    if "concept_exemplars" in shapes and PARTS not in shapes:
        return f"concept_exemplars are there without {PARTS}"
    parts = shapes.get(PARTS, ("float32", (1, channels)))[1]
    lines = {"channel": channels, "concept": parts[0]}
    for name, (dtype, shape) in shapes.items():
        kind, _, what = name.partition("_")
        n = lines.get(kind, 0)
        expected: dict[str, tuple[str, bool]] = {
            "parts": (
                "float32",
                len(shape) == 2 and shape[1] in (channels, 2 * channels) and n > 0,
            ),
            "exemplars": ("uint32", len(shape) == 3 and (shape[0], shape[2]) == (n, 2)),
            "values": ("float32", len(shape) == 2 and shape[0] == n),
            "ids": ("uint8", len(shape) == 1),
            "offsets": ("uint64", len(shape) == 1),
        }
        if (dtype, True) != expected[what] or 0 in shape[name in IDS :]:
            return f"{name} holds {dtype} {list(shape)}"
    for kind in KINDS:
        pair = [shapes.get(f"{kind}_{what}", ("", ()))[1][:2] for what in ("exemplars", "values")]
        if pair[0] != pair[1]:
            return f"{kind}_exemplars and {kind}_values are not as many"
        if pair[0] and not shapes.keys() >= {*IDS}:
            return f"{kind}_exemplars are there without the ids they name"
    return None


def wrong_arrays(
    arrays: Mapping[str, np.ndarray], grid: Sequence[int] | None
) -> Iterator[tuple[str, str]]:
    """Yield names of arrays that fit in type and shape, and what is wrong with what they hold."""
    parts = arrays.get(PARTS)
    if parts is not None and not (np.isfinite(parts).all() and (parts >= 0).all()):
        yield PARTS, "holds a number that is negative or not finite"
    n_ids = 0
    if IDS[0] in arrays:
        blob, offsets = arrays[IDS[0]], arrays[IDS[1]]
        n_ids = len(offsets) - 1
        if n_ids < 0 or offsets[0] != 0 or offsets[-1] != len(blob):
            yield IDS[1], "do not run from 0 to the length of the ids"
            return
        if (offsets[1:] <= offsets[:-1]).any():
            yield IDS[1], f"do not rise at {int((offsets[1:] <= offsets[:-1]).argmax())}"
            return
        ids = Texts(blob, offsets)
        for place in range(n_ids):
            try:
                ids.raw(place).decode("utf-8")
            except UnicodeDecodeError:
                yield IDS[0], f"string {place} is not UTF-8"
                return
    for kind in KINDS:
        found = arrays.get(f"{kind}_exemplars")
        if found is None:
            continue
        if found[..., 0].max(initial=0) >= n_ids:
            yield f"{kind}_exemplars", f"name a picture beyond the {n_ids} there are"
        if grid is None or found[..., 1].max(initial=0) >= grid[0] * grid[1]:
            yield f"{kind}_exemplars", f"name a position outside the grid {grid and list(grid)}"
        if not np.isfinite(arrays[f"{kind}_values"]).all():
            yield f"{kind}_values", "holds a NaN or an infinity"


def read_names(path: str | Path) -> dict[int, str]:
    """Return the names a user gave to concepts, by number, from TOML: `[concepts]`, `3 = "wheel"`.

    Raises InputError of a file that cannot be read or says something else.
    """
    path = Path(path)
    refuse_device(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the names cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no TOML file ({error})") from error
    table = tables.pop("concepts", None)
    if tables or not isinstance(table, dict):
        raise InputError(f'{path}: expected one table, [concepts], with lines such as 3 = "wheel"')
    for number, name in table.items():
        fits = number.isascii() and number.isdecimal() and len(number) < 9
        shown = isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME
        if not (fits and shown):
            raise InputError(
                f"{path}: {short(number)} = {short(name)}; expected a concept's number and a name "
                f'of at most {LONGEST_NAME} characters, such as 3 = "wheel"'
            )
    return {int(number): name for number, name in table.items()}
