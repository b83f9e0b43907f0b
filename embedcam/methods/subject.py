"""Subject of a method: a network, a batch of inputs, a target, and the passes between them.

Ask for gradients before activations: a forward that is to be differentiated serves both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor

from .._checks import one_of, whole
from .._options import Setting
from ..errors import NetworkError, RecipeError
from ..network import (
    AttentionPass,
    EmbeddingNetwork,
    Features,
    HeadPass,
    SeveralPass,
    input_gradient,
    several_pass,
)
from ..recipe import NORMS
from ..targets import Target, head_cotangent

Progress = Callable[[int], object]
"""Called with how many inputs or activations went through the network or its head."""
Fill = str | float | np.ndarray | Tensor
"""Fill of masked pixels, and the baseline; see `masking.fill_like`."""
Count = Annotated[int, Setting(kind=int, least=1, most=1_000_000)]
Layers = Annotated[tuple[str, ...] | None, Setting(kind=tuple, optional=True)]


@dataclass
class MethodOutput:
    """Result of a method: weights `[B K]` or by position `[B K h w]`, maps `[B h w]`, or both.

    Without maps they are ReLU(sum_k w_k A_k). `layers` are the weights of several, by their names.
    """

    weights: Tensor | None = None
    maps: Tensor | None = None
    layers: dict[str, Tensor] | None = None


@dataclass
class Passes:
    """Count of inputs through the whole network, activations through the head alone.

    And images differentiated from the embedding back to the layer, or to the input.
    """

    forwards: int = 0
    heads: int = 0
    head_backwards: int = 0
    full_backwards: int = 0


def inputs_a_pass(device: torch.device, most: int = 32) -> int:
    """Return how many masked or noisy inputs go through a network at once, at most `most`."""
    # Results that fit the caches halve MobileNetV2's time on a CPU; other devices want more.
    return min(most, 8) if device.type == "cpu" else most


class Subject:
    """Batch of inputs `[B C H W]`, `[B C L]` or `[B L]`, explained with respect to a target.

    `batch_size` cuts what a method makes of them (masks, noise, steps); `passes` continues a count.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        images: Tensor,
        target: Target,
        *,
        norm: str = "through",
        batch_size: int | None = None,
        seed: int = 0,
        fill: Fill = "mean",
        progress: Progress | None = None,
        passes: Passes | None = None,
    ) -> None:
        if batch_size is None:
            batch_size = inputs_a_pass(network.device)
        self.network, self.images, self.target, self.fill = network, images, target, fill
        self.norm = one_of("norm", norm, NORMS)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.seed = whole("seed", seed, 0, (1 << 63) - 1)
        self.passes = passes or Passes()
        self.progress: Progress = progress or (lambda n: None)
        self._head: HeadPass | None = None
        self._channels_last = True

    def __len__(self) -> int:
        return len(self.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._head is not None:
            self._head.close()
            self._head = None

    def _ran(self, inputs: int) -> None:
        self.passes.forwards += inputs
        self.progress(inputs)

    @cached_property
    def features(self) -> Features:
        """Embeddings, norms and activations of the images; one forward."""
        if self._head is not None:
            return self._head.features
        features = self.network.forward(self.images)
        self._ran(len(self))
        return self._checked(features)

    @property
    def activations(self) -> Tensor:
        """A, `[B K H W]`."""
        return self.features.activations

    @property
    def head(self) -> HeadPass:
        """One forward of the images that can be differentiated back to the layer."""
        if self._head is None:
            self._head = self.network.head_pass(self.images)
            self._ran(len(self))
            self.__dict__["features"] = self._checked(self._head.features)
        return self._head

    @cached_property
    def gradients(self) -> Tensor:
        """G = dy/dA of the target (of its mean, for triplets), `[B K H W]`."""
        head = self.head
        return self.vjp(head, self.mean_cotangents(self.features))

    def cotangents(self, features: Features, row: int | None = None) -> tuple[Tensor, Tensor]:
        """Return dy/dz of each triplet `[n S D]` (S = 1 but for triplets) and which count `[n S]`.

        The target is that of one `row`, or with None each input's own.
        """
        target = self.target if row is None else self.target.at(row)
        holds_norm = self.norm == "around" or target.holds_norm
        if holds_norm and self.network.already_normalized:
            what = type(target).__name__ if target.holds_norm else "norm 'around'"
            raise RecipeError(
                f"{what} needs the embedding before its L2 norm, and this module normalises its "
                "output itself; use norm 'through', or a module that returns the vector before it"
            )
        each, used = target.cotangents(features.embedding)
        if not target.holds_norm:
            each = head_cotangent(
                each, features.embedding, features.norm, self.norm, self.network.normalize
            )
        elif self.network.normalize:
            each = each / features.norm[:, None, None]
        if used is None:
            return each, torch.ones(each.shape[:2], dtype=torch.bool, device=each.device)
        return each, torch.as_tensor(used, device=each.device)

    def mean_cotangents(self, features: Features, row: int | None = None) -> Tensor:
        """Return dy/dz of the target itself, the mean over the triplets that count, `[n D]`."""
        each, used = self.cotangents(features, row)
        counted = used.to(each.dtype)[..., None]
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)

    def vjp(self, head: HeadPass, cotangents: Tensor) -> Tensor:
        """Return dy/dA `[n K H W]` for dy/dz `[n D]`, counted."""
        self.passes.head_backwards += len(cotangents)
        return head.vjp(cotangents)

    def differentiate(
        self, inputs: Tensor, row: int, *, each: bool = False
    ) -> tuple[Features, Tensor]:
        """Run inputs `[n C H W]`, at most a batch, with the target of one image.

        Returns their features and G `[n K H W]`, or with `each` one of every triplet `[S n K H W]`.
        """
        with self.network.head_pass(inputs) as head:
            features = head.features
            if each:
                triplets, _ = self.cotangents(features, row)
                gradients = torch.stack([self.vjp(head, one) for one in triplets.unbind(1)])
            else:
                gradients = self.vjp(head, self.mean_cotangents(features, row))
        self._ran(len(inputs))
        return features, gradients

    def several(self, layers: Iterable[str]) -> SeveralPass:
        """Run the images once, differentiable back to the shallowest of several layers."""
        run = several_pass(self.network, self.images, list(layers))
        self._ran(len(self))
        self._checked(run.features)
        return run

    def attentions(self, depths: bool = False) -> AttentionPass:
        """Run the images once, differentiable from their attentions' weights on."""
        run = AttentionPass(self.network, self.images, depths)
        self._ran(len(self))
        self._checked(run.features)
        return run

    def input_gradient(self, *, guided: bool) -> Tensor:
        """Return dy/dX through the whole network, shaped as the images, its ReLUs guided or not."""
        _, gradient = input_gradient(
            self.network,
            self.images,
            lambda features: self.mean_cotangents(self._checked(features)),
            guided=guided,
        )
        self.passes.full_backwards += len(self)
        self._ran(len(self))
        return gradient

    def score(self, row: int) -> Tensor:
        """Return y of one image as it is, `[1]`."""
        return self.target.at(row).score(self.features.embedding[row : row + 1])

    def scores(self, row: int, inputs: Iterable[Tensor]) -> Tensor:
        """Return y `[total]` of inputs in pieces `[n C H W]` with the target of one image."""
        target, scores = self.target.at(row), []
        for piece in inputs:
            scores.append(target.score(self._embedding(piece)))
            self._ran(len(piece))
        return torch.cat(scores)

    def _embedding(self, piece: Tensor) -> Tensor:
        if self._channels_last and piece.ndim == 4 and piece.device.type == "cpu":
            # Convolutions on CPUs run up to 1.6 times as fast on it.
            turned = piece.contiguous(memory_format=torch.channels_last)
            try:
                return self.network.forward(turned, allow_zero=True).embedding
            except NetworkError:
                self._channels_last = False  # a module that takes views of contiguous memory only
        return self.network.forward(piece, allow_zero=True).embedding

    def batches(self, total: int) -> Iterator[slice]:
        """Yield 0 .. total in slices of at most a batch."""
        for start in range(0, total, self.batch_size):
            yield slice(start, min(start + self.batch_size, total))

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, the same for every image and on every device."""
        return torch.Generator().manual_seed(self.seed)

    def _checked(self, features: Features) -> Features:
        self.target.check(len(features.embedding), features.embedding.shape[1])
        return features
