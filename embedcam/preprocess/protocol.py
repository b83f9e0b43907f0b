"""`Network`: what a torch network and an ONNX network both do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from .transforms import AnyPreprocess, Array

if TYPE_CHECKING:
    from ..index.identity import Identity
    from ..index.manifest import RunEntry


class Embedded(NamedTuple):
    """What one run on B images gives, as NumPy arrays."""

    embedding: np.ndarray
    """`[B D]`, of length 1 iff the network normalizes."""
    norm: np.ndarray | None
    """`[B]`, the length |z| before that; None where the network cannot tell it."""
    activations: list[np.ndarray]
    """Of each layer, `[B K H W]`."""


NORMS = "the norms' statistics"
"""What a receipt says of a `HeldNorm`."""


@dataclass(frozen=True)
class HeldNorm:
    """LayerNorm or RMSNorm over channels, its statistics held: it divides by sqrt(v + epsilon).

    v is the variance where it is `centered`, else the mean of squares: of the pooled activations,
    or, where the norm comes before the pooling, of those of each position.
    """

    epsilon: float
    centered: bool
    pooled: bool = True

    def divided(self, activations: np.ndarray) -> np.ndarray:
        """Return activations `[K H W]` divided by sqrt(v + epsilon), of the same type."""
        values = np.asarray(activations, np.float64)
        if self.pooled:
            values = values.mean((1, 2), keepdims=True)
        squares = values.var(0) if self.centered else (values**2).mean(0)
        return np.asarray(activations / np.sqrt(squares + self.epsilon), activations.dtype)


@dataclass(frozen=True, eq=False)
class HeadMatrix:
    """A pooled affine head: z = W p + b, W `[D K]` or None for the identity, b `[D]` if known.

    Around a norm p is the mean of what `held` makes of the activations, and W centers them.
    """

    matrix: np.ndarray | None
    bias: np.ndarray | None = None
    held: HeldNorm | None = None

    def output(self, activations: np.ndarray) -> np.ndarray:
        """Return z `[D]` of activations `[K H W]`; the bias must be known."""
        divided = activations if self.held is None else self.held.divided(activations)
        pooled = divided.mean((1, 2), dtype=np.float64)
        z = pooled if self.matrix is None else self.matrix @ pooled
        return np.asarray(z if self.bias is None else z + self.bias)

    def norm(self, activations: np.ndarray) -> float:
        """Return |z| of activations `[K H W]`; the bias must be known."""
        return float(np.linalg.norm(self.output(activations)))


@runtime_checkable
class Network(Protocol):
    """A network whose embeddings are explained, whatever runs it."""

    differentiable: ClassVar[bool]
    """Whether derivatives of the embedding at the layer can be had."""
    preprocess: AnyPreprocess | None
    name: str | None

    @property
    def texts(self) -> object:
        """The tower for texts, as `embed_texts` runs it; None without one."""

    @property
    def autocast(self) -> object:
        """The type it computes in where that is not its parameters'; None for those."""

    @property
    def usual_run(self) -> RunEntry:
        """How its forward passes are run where nobody says otherwise: see `usual_passes`."""

    def embed(self, images: Array, layers: Sequence[str] | None = None) -> Embedded:
        """Embed preprocessed images `[B C H W]`; activations are its own layer's, or of these."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings `[n D]` of texts, float32; `NetworkError` without a tower for them."""

    def probe_images(self, count: int = 1) -> np.ndarray:
        """Return the synthetic pictures as this network's input, float32 `[count C H W]`."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the network beside its parameters, ready for JSON."""

    def identity(self) -> Identity:
        """Return what tells this network from another, its probe taken with one run."""

    def for_index(self, stored: Identity, layers: Sequence[str]) -> Self:
        """Return the network as the one of an index, or raise `NetworkMismatch`."""

    def warm_up(self) -> None:
        """Find out once what later questions need."""

    def affine_head(self, stored_matrix: Callable[[], np.ndarray]) -> HeadMatrix | None:
        """Return the head, None where it is another; a matrix not known is asked of an index."""
