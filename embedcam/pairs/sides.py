"""One picture of a pair, and what each of its cells and channels gives to its embedding.

A head turns activations A `[K H W]` into z `[D]`, and the embedding is f = z / |z| (or z itself).
Both sides here answer the same two questions about it, to first order in A and with |z| held
constant: what a direction of the embedding gets from every activation (`products`), and what
embedding the activations of one cell make by themselves (`cell_vectors`). Behind average pooling
and an affine head z = W p + b both are exact and follow from the activations alone; elsewhere they
are one vector-Jacobian product of the head, and one Jacobian-vector product a cell.

|z| is held constant on purpose. Differentiating through it makes the contributions of all channels
sum to zero where the head has no bias: the cosine does not change when all of them grow alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import InputError, NetworkError


class Side(Protocol):
    """One picture of a pair.

    activations: `[K H W]` float32; embedding: f `[D]`, float64; norm: |z| where the embedding is
    z / |z|, else 1; exact: whether products are exact, not of first order.
    """

    activations: np.ndarray
    embedding: np.ndarray
    norm: float
    exact: bool

    def products(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a direction `[D]` of the embedding gets from each channel and each cell.

        Returns:
            Sums over cells `[K]` and over channels `[H W]` of dy/dA * A, y = f . direction.
        """

    def cell_vectors(self, cells: Sequence[int]) -> np.ndarray:
        """What each cell alone gives to the embedding, `[n D]`; cells are counted row by row."""


class PooledSide(Side):
    """A picture behind average pooling and an affine head: everything from its activations.

    Args:
        activations: A, `[K H W]`.
        embedding: f, `[D]`.
        norm: |z|, or 1 where the embedding is not normalised.
        matrix: W `[D K]`; None for the identity.

    Raises:
        InputError: shapes that do not belong together.
    """

    exact = True

    def __init__(
        self, activations: Any, embedding: Any, norm: float, matrix: np.ndarray | None
    ) -> None:
        self.activations = np.asarray(activations, np.float32)
        self.embedding = np.asarray(embedding, np.float64)
        self.norm, self._matrix = float(norm), matrix
        shape = (len(self.embedding), len(self.activations))
        fits = shape[0] == shape[1] if matrix is None else matrix.shape == shape
        if self.activations.ndim != 3 or not fits:
            given = "the identity" if matrix is None else f"{list(matrix.shape)}"
            raise InputError(
                f"activations {list(self.activations.shape)} and an embedding of {shape[0]} "
                f"numbers do not go with the head's matrix, {given}; expected [K H W], [D], [D K]"
            )
        self._flat = self.activations.reshape(shape[1], -1)
        self._cells = self._flat.shape[1]

    def products(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Side` says."""
        given = direction if self._matrix is None else direction.astype(np.float32) @ self._matrix
        slopes = (given / (self.norm * self._cells)).astype(np.float64)
        channels = slopes * self._flat.sum(1, dtype=np.float64)
        cells = slopes.astype(np.float32) @ self._flat
        return channels, cells.astype(np.float64).reshape(self.activations.shape[1:])

    def cell_vectors(self, cells: Sequence[int]) -> np.ndarray:
        """As `Side` says."""
        chosen = self._flat[:, list(cells)]
        made = chosen if self._matrix is None else self._matrix @ chosen
        vectors: np.ndarray = made.T.astype(np.float64) / (self.norm * self._cells)
        return vectors


class DifferentiatedSide(Side):
    """A picture behind any other head, held by a head pass that can be differentiated twice.

    Args:
        passed: `network.head_pass(input, twice=True)` of one picture.
        normalize: whether the embedding is z / |z|.
    """

    exact = False

    def __init__(self, passed: Any, normalize: bool) -> None:
        features = passed.features
        self.activations = as_array(features.activations)[0].astype(np.float32, copy=False)
        self.embedding = as_array(features.embedding)[0].astype(np.float64)
        self.norm = float(features.norm[0]) if normalize else 1.0
        self._passed = passed
        self._vectors: dict[int, np.ndarray] = {}

    def products(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Side` says."""
        slopes = as_array(self._passed.vjp((direction / self.norm)[None]))[0]
        product = slopes.astype(np.float64) * self.activations
        return product.sum((1, 2)), product.sum(0)

    def cell_vectors(self, cells: Sequence[int]) -> np.ndarray:
        """As `Side` says."""
        for cell in cells:
            # Kept: a query's cells are asked for again by each of its receipts.
            if cell not in self._vectors:
                self._vectors[cell] = self._cell_vector(cell)
        found = np.array([self._vectors[cell] for cell in cells], np.float64)
        return found.reshape(len(cells), -1) / self.norm

    def _cell_vector(self, cell: int) -> np.ndarray:
        place = np.unravel_index(cell, self.activations.shape[1:])
        alone = np.zeros_like(self.activations)
        alone[:, *place] = self.activations[:, *place]
        found: np.ndarray = as_array(self._passed.jvp(alone[None]))[0]
        return found


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one picture's activations give to a score.

    Attributes:
        cells: of each cell, `[H W]`, signed.
        channels: of each channel, `[K]`, signed.
        shared: the part of the score that the picture has with the average image too.
        remainder: what neither accounts for: the head's bias, and beyond an affine head what is
            not of first order. The sum of `cells` (or of `channels`), `shared` and `remainder` is
            the score.
    """

    cells: np.ndarray
    channels: np.ndarray
    shared: float
    remainder: float


def evidence_of(
    side: Side, direction: np.ndarray, score: float, mean: np.ndarray | None
) -> Evidence:
    """What a picture gives to the score y = f . direction + constants.

    Args:
        side: the picture.
        direction: `[D]`; the other picture's embedding.
        score: y.
        mean: the average embedding `[D]` taken from the direction first; what it takes away,
            f . mean, is `shared`. None takes nothing.

    Raises:
        NetworkError: numbers beyond float32.
    """
    direction = direction.astype(np.float64)
    shared = 0.0
    if mean is not None:
        shared = float(side.embedding @ mean)
        direction = direction - mean
    with np.errstate(over="ignore", invalid="ignore"):
        channels, cells = side.products(direction)
    if not (np.isfinite(cells).all() and np.isfinite(channels).all()):
        raise NetworkError(
            "a receipt overflows: the activations, with what the head makes of them, go beyond "
            "float32; check the network's weights"
        )
    return Evidence(cells, channels, shared, float(score - shared - channels.sum()))


def as_array(values: Any) -> np.ndarray:
    """An array, or a tensor on any device, as an array."""
    found: np.ndarray = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    return found
