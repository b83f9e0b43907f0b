"""One picture of a pair, and what each of its positions and channels gives to its embedding.

A head turns activations A `[K H W]` into z `[D]`, and the embedding is f = z / |z| (or z itself).
Behind average pooling and an affine head z = W p + b all is exact. Elsewhere it is exact with what
is not linear held (attention weights, norms' statistics), and parts that are no positions are told
by name. |z| is held constant on purpose: differentiated through, all contributions sum to zero
where the head has no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .._checks import as_array
from ..errors import InputError, NetworkError
from ..index.encoding import LowRank
from ..index.records import Json
from ..preprocess import NORMS, Extent, HeldNorm
from ..render import Tile

if TYPE_CHECKING:
    from ..index import Index
    from ..network.held import HeldPass

Products = tuple[np.ndarray, np.ndarray, dict[str, float]]
_AT_ONCE = 16
"""Sets of positions in one pass through a head."""


class PooledSide:
    """A picture behind average pooling and an affine head W `[D K]`, None for the identity.

    Of it `activations` `[K H W]` float32, `embedding` f `[D]` float64, and `norm`, |z| where f is
    z / |z|, else 1. Where a norm over channels stands around the pooling, it is `held`.
    """

    exact = direct = True

    def __init__(
        self,
        activations: ArrayLike,
        embedding: ArrayLike,
        norm: float,
        matrix: np.ndarray | None,
        held: HeldNorm | None = None,
    ) -> None:
        self.activations = np.asarray(activations, np.float32)
        self.embedding = np.asarray(embedding, np.float64)
        self.norm, self._matrix = float(norm), matrix
        shape = (len(self.embedding), len(self.activations))
        fits = shape[0] == shape[1] if matrix is None else matrix.shape == shape
        if self.activations.ndim != 3 or not fits:
            head = "the identity" if matrix is None else f"{list(matrix.shape)}"
            raise InputError(
                f"activations {list(self.activations.shape)} and an embedding of {shape[0]} "
                f"numbers do not go with the head's matrix, {head}; expected [K H W], [D], [D K]"
            )
        self.held = () if held is None else (NORMS,)
        divided = self.activations if held is None else held.divided(self.activations)
        self._flat = divided.reshape(shape[1], -1)
        self._scale = self.norm * self._flat.shape[1]

    def products(self, direction: np.ndarray, within: np.ndarray | None = None) -> Products:
        """Return what channels `[K]`, positions `[H W]` and other parts give to f . direction.

        `within`, weights `[H W]` from 0 to 1, tells what of the positions is counted.
        """
        flat = self._flat if within is None else self._flat * within.ravel().astype(np.float32)
        slopes = direction if self._matrix is None else direction.astype("f4") @ self._matrix
        slopes = (slopes / self._scale).astype(np.float64)
        channels = slopes * flat.sum(1, dtype=np.float64)
        cells = slopes.astype(np.float32) @ flat
        return channels, cells.astype(np.float64).reshape(self.activations.shape[1:]), {}

    def vectors(self, masks: np.ndarray) -> np.ndarray:
        """Return what sets of positions give to f, `[n D]`; masks `[n H W]` from 0 to 1."""
        return self._embedded(self._flat @ masks.reshape(len(masks), -1).T.astype(np.float32))

    def cell_vectors(self, cells: Sequence[int]) -> np.ndarray:
        """Return what positions, counted row by row, alone give to f, `[n D]`."""
        every = isinstance(cells, range) and cells == range(self._flat.shape[1])
        return self._embedded(self._flat if every else self._flat[:, list(cells)])

    def _embedded(self, sums: np.ndarray) -> np.ndarray:
        embedded = sums if self._matrix is None else self._matrix @ sums
        return np.asarray(embedded.T.astype(np.float64) / self._scale)


class HeldSide:
    """A picture behind any other head, by `network.held_pass(input)` of it."""

    direct = False

    def __init__(self, passed: HeldPass, normalize: bool) -> None:
        features = passed.features
        self.activations = as_array(features.activations, np.float32)[0]
        self.embedding = as_array(features.embedding)[0].astype(np.float64)
        self.norm = float(features.norm[0]) if normalize else 1.0
        self.exact, self.held = passed.exact, passed.held
        self._passed = passed
        self._alone: dict[int, np.ndarray] = {}

    def products(self, direction: np.ndarray, within: np.ndarray | None = None) -> Products:
        """Return what channels `[K]`, positions `[H W]` and other parts give to f . direction.

        `within`, weights `[H W]` from 0 to 1, tells what of the positions is counted.
        """
        return self._passed.products(direction / self.norm, within)

    def vectors(self, masks: np.ndarray) -> np.ndarray:
        """Return what sets of positions give to f, `[n D]`; masks `[n H W]` from 0 to 1."""
        return self._passed.vectors(masks) / self.norm

    def cell_vectors(self, cells: Sequence[int]) -> np.ndarray:
        """Return what positions, counted row by row, alone give to f, `[n D]`."""
        # Kept: a query's positions are asked for again by each of its receipts.
        new = [cell for cell in dict.fromkeys(cells) if cell not in self._alone]
        size = self.activations[0].size
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            masks = np.eye(size, dtype=np.float32)[some]
            made = self.vectors(masks.reshape(-1, *self.activations.shape[1:]))
            self._alone.update(zip(some, made, strict=True))
        vectors = [self._alone[cell] for cell in cells]
        return np.array(vectors, np.float64).reshape(len(vectors), len(self.embedding))


Side = PooledSide | HeldSide


@dataclass(frozen=True, eq=False)
class Shown:
    """How to draw one picture of a receipt; `name` and `label` are of an indexed image."""

    image: Image.Image | None = None  # upright
    extent: Extent | None = None  # of it what the network saw, (x0, y0, x1, y1) in pixels
    name: str = ""
    label: str | None = None


NOT_SHOWN = Shown()


@dataclass(frozen=True, eq=False)
class Contributions:
    """What one picture's activations give to a score.

    Of each position `cells` `[H W]`, of each channel `channels` `[K]`, signed; `parts` are what is
    neither, such as "the MLP", by name; `shared` is what it has with the average image too,
    `remainder` biases, and where the side is not exact what is not of first order.
    `cells.sum()` (or `channels.sum()`), the parts, `shared` and `remainder` add up to the score;
    of a part of the query `outside`, what all else gives, with them.
    """

    cells: np.ndarray
    channels: np.ndarray
    parts: dict[str, float]
    shared: float
    remainder: float
    shown: Shown = NOT_SHOWN
    outside: float = 0.0

    def restricted(self, products: Products) -> Contributions:
        """Return the same where only what `products` says of channels and positions counts."""
        channels, cells, _ = products
        outside = float(self.channels.sum() - channels.sum())
        return replace(self, cells=cells, channels=channels, outside=outside)

    def tile(self, rival: bool = False) -> Tile:
        """Return the picture with its map; of a `rival` evidence is the other way round."""
        shown, cells = self.shown, -self.cells if rival else self.cells
        name, label = shown.name.rpartition("/")[2] or "query", shown.label or ""
        return Tile(shown.image, cells, shown.extent, name, label, signed=True)

    def middle(self, row: int, column: int) -> tuple[float, float]:
        """Return the middle of a position as shares of the picture's width and height."""
        (height, width), image = self.cells.shape, self.shown.image
        x, y = (column + 0.5) / width, (row + 0.5) / height
        if image is None or self.shown.extent is None:
            return x, y
        x0, y0, x1, y1 = self.shown.extent
        x, y = (x0 + x * (x1 - x0)) / image.width, (y0 + y * (y1 - y0)) / image.height
        return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)

    def to_dict(self) -> Json:
        """Return plain lists and numbers, ready for JSON."""
        shown = self.shown
        return {
            "id": shown.name,
            "label": shown.label,
            "cells": self.cells.astype(np.float32).tolist(),
            "parts": self.parts,
            "shared": self.shared,
            "outside": self.outside,
            "remainder": self.remainder,
            "extent": None if shown.extent is None else list(shown.extent),
        }


def evidence_of(
    side: Side,
    direction: np.ndarray,
    score: float,
    mean: np.ndarray | None,
    shown: Shown = NOT_SHOWN,
) -> Contributions:
    """Return what a picture gives to f . direction + constants, less the average embedding's."""
    direction = direction.astype(np.float64)
    shared = 0.0 if mean is None else float(side.embedding @ mean)
    direction = direction if mean is None else direction - mean
    with np.errstate(over="ignore", invalid="ignore"):
        channels, cells, parts = side.products(direction)
    if not (np.isfinite(cells).all() and np.isfinite(channels).all()):
        raise NetworkError(
            "a receipt overflows: the activations, with what the head makes of them, go beyond "
            "float32; check the network's weights"
        )
    remainder = float(score - shared - channels.sum() - sum(parts.values()))
    return Contributions(cells, channels, parts, shared, remainder, shown)


def matrix_of(index: Index) -> np.ndarray:
    """Return W `[D K]` of a head z = W p + b, by an index whose encoding has the origin "head"."""
    encoding, positions = index.encoding(), index.manifest.layers[0].cells
    from_head = isinstance(encoding, LowRank) and encoding.origin == "head"
    if not from_head or positions is None:
        lacks = "the number of the layer's positions" if from_head else "the head's matrix"
        raise InputError(
            f"receipts need {lacks}, which neither the ONNX file nor the index (encoding "
            f"{encoding.name}) holds; give the network instead of its ONNX file"
        )
    # The basis is dz/dA: the matrix divided by the number of positions.
    return np.asarray(encoding.fitted["basis"] * np.float32(positions))
