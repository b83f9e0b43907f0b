"""What a method works on: a network, a batch of inputs, a target, and the passes between them.

Methods ask a `Subject` for activations, gradients and scores, and never run a network themselves:
so passes are counted, batches are cut, progress is shown and the norm is treated in one place.
What is asked for twice is computed once. Ask for gradients before activations: a forward that is to
be differentiated serves both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError, NetworkError, RecipeError
from ..network import (
    EmbeddingNetwork,
    Features,
    HeadPass,
    SeveralPass,
    input_gradient,
    several_pass,
)
from ..targets import NORMS, Target, head_cotangent
from .options import whole_number

Tick = Callable[[int], Any]
"""Told how many inputs or activations were put through the network or its head."""


@dataclass
class Found:
    """What a method hands back; `weights`, `maps` or both.

    Attributes:
        weights: channel weights, `[B K]`, or by position `[B K h w]`; the map is
            ReLU(sum_k w_k A_k) unless `maps` is given.
        maps: the method's own maps, >= 0 unless the method says otherwise, `[B h w]`.
        layers: for methods of several layers, each layer's weights `[B K_l]` by its name.
    """

    weights: Tensor | None = None
    maps: Tensor | None = None
    layers: dict[str, Tensor] | None = None


@dataclass
class Passes:
    """What was spent.

    Attributes:
        forwards: inputs put through the whole network.
        heads: activations put through the head alone.
        head_backwards: images differentiated from the embedding back to the layer.
        full_backwards: images differentiated back to the input.
    """

    forwards: int = 0
    heads: int = 0
    head_backwards: int = 0
    full_backwards: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        """Both together."""
        return Passes(**{name: n + getattr(other, name) for name, n in vars(self).items()})


def inputs_a_pass(device: torch.device, most: int = 32) -> int:
    """How many made inputs go through a network at once, at most `most`.

    On a CPU 8: what a batch leaves behind still fits its caches there, and MobileNetV2 takes less
    than half the time an input that it takes in batches of 32. Other devices want large batches.
    """
    return min(most, 8) if device.type == "cpu" else most


class Subject:
    """A batch of inputs of a network, explained with respect to a target.

    Args:
        network: the network.
        images: preprocessed inputs, `[B C H W]` (with layout "bkl" `[B C L]` or `[B L]`).
        target: what is explained.
        norm: the gradient "through" the L2 norm or "around" it.
        batch_size: of what a method makes (masks, noisy inputs, steps), inputs a forward pass; the
            images themselves go together. Changes nothing beyond float rounding. None takes
            `inputs_a_pass`.
        seed: of everything random; each image of a batch draws the same numbers.
        fill: what replaces masked pixels and is the baseline, see `masks.fill_like`.
        tick: told of progress.

    Raises:
        InputError: options, or references of the target, that do not fit.
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
        fill: Any = "mean",
        tick: Tick | None = None,
    ) -> None:
        if norm not in NORMS:
            raise InputError(f"norm {norm!r} is unknown; use one of {', '.join(NORMS)}")
        if batch_size is None:
            batch_size = inputs_a_pass(network.device)
        batch_size = whole_number("batch_size", batch_size, most=1 << 62)
        seed = whole_number("seed", seed, 0, (1 << 64) - 1)
        if seed >= 1 << 63:
            raise InputError(f"seed = {seed}; give a whole number below 2**63")
        self.network, self.images, self.target = network, images, target
        self.norm, self.batch_size, self.seed, self.fill = norm, batch_size, seed, fill
        self.passes = Passes()
        self.tick: Tick = tick or (lambda n: None)
        self._head: HeadPass | None = None
        self._channels_last = True

    def __len__(self) -> int:
        """B."""
        return len(self.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph of the head."""
        if self._head is not None:
            self._head.close()
            self._head = None

    # ---------------------------------------------------------------- the images themselves

    @cached_property
    def features(self) -> Features:
        """Embeddings, norms and activations of the images; one forward."""
        if self._head is not None:
            return self._head.features
        self.passes.forwards += len(self)
        features = self.network.forward(self.images)
        self.tick(len(self))
        return self._checked(features)

    @property
    def activations(self) -> Tensor:
        """A, `[B K H W]`."""
        return self.features.activations

    @property
    def head(self) -> HeadPass:
        """One forward of the images that can be differentiated back to the layer."""
        if self._head is None:
            self.passes.forwards += len(self)
            self._head = self.network.head_pass(self.images)
            self.tick(len(self))
            self.__dict__["features"] = self._checked(self._head.features)
        return self._head

    @cached_property
    def gradients(self) -> Tensor:
        """G = dy/dA of the target (of its mean, for triplets), `[B K H W]`."""
        head = self.head
        return self.vjp(head, self.mean_cotangents(self.features))

    def each_gradient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each triplet: G of its own margin `[B K H W]`, and the images it counts for `[B]`.

        For methods that are not linear in the target, whose weights are averaged over triplets.
        """
        head = self.head
        each, used = self.cotangents(self.features)
        for triplet in range(each.shape[1]):
            yield self.vjp(head, each[:, triplet]), used[:, triplet]

    @property
    def several_targets(self) -> bool:
        """Whether the target is a mean over several triplets."""
        return self.target.parts > 1

    # ---------------------------------------------------------------- scores and derivatives

    def cotangents(self, features: Features, row: int | None = None) -> tuple[Tensor, Tensor]:
        """dy/dz of each triplet at a forward's embeddings, by the norm's way.

        Args:
            features: of n inputs.
            row: the image whose target it is; None: they are the images of the batch.

        Returns:
            `[n S D]`, S = 1 but for triplets, and which of them count, booleans `[n S]`.
        """
        target = self.target if row is None else self.target.at(row)
        held = self.norm == "around" or target.holds_norm
        if held and self.network.already_normalized:
            what = type(target).__name__ if target.holds_norm else "norm 'around'"
            raise RecipeError(
                f"{what} needs the embedding before its L2 norm, and this module normalises its "
                "output itself; use norm 'through', or a module that returns the vector before it"
            )
        each, used = target.cotangents(features.embedding)
        if target.holds_norm:
            at_head = each / features.norm[:, None, None] if self.network.normalize else each
        else:
            at_head = head_cotangent(
                each, features.embedding, features.norm, self.norm, self.network.normalize
            )
        if used is None:
            return at_head, torch.ones(at_head.shape[:2], dtype=torch.bool, device=each.device)
        return at_head, torch.as_tensor(used, device=each.device)

    def mean_cotangents(self, features: Features, row: int | None = None) -> Tensor:
        """dy/dz of the target itself, the mean over the triplets that count, `[n D]`."""
        each, used = self.cotangents(features, row)
        counted = used.to(each.dtype)[..., None]
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)

    def vjp(self, head: HeadPass, cotangents: Tensor) -> Tensor:
        """dy/dA `[n K H W]` for dy/dz `[n D]`, counted."""
        self.passes.head_backwards += len(cotangents)
        return head.vjp(cotangents)

    def differentiate(
        self, inputs: Tensor, row: int, *, each: bool = False
    ) -> tuple[Features, Tensor]:
        """Other inputs (noisy, interpolated) with the target of one image.

        Args:
            inputs: `[n C H W]`, at most a batch.
            row: the image whose target it is.
            each: for every triplet apart.

        Returns:
            The features, and G `[n K H W]`, or with `each` `[S n K H W]`.
        """
        self.passes.forwards += len(inputs)
        with self.network.head_pass(inputs) as head:
            features = head.features
            if each:
                all_of, _ = self.cotangents(features, row)
                found = torch.stack([self.vjp(head, c) for c in all_of.unbind(1)])
            else:
                found = self.vjp(head, self.mean_cotangents(features, row))
        self.tick(len(inputs))
        return features, found

    def several(self, layers: list[str]) -> SeveralPass:
        """One forward of the images, differentiable back to the shallowest of several layers."""
        self.passes.forwards += len(self)
        made = several_pass(self.network, self.images, layers)
        self.tick(len(self))
        self._checked(made.features)
        return made

    def input_gradient(self, *, guided: bool) -> Tensor:
        """dy/dX of the images through the whole network, shaped as they are.

        Args:
            guided: whether rectifiers are guided, see `network.input_gradient`.
        """
        self.passes.forwards += len(self)
        _, found = input_gradient(
            self.network,
            self.images,
            lambda features: self.mean_cotangents(self._checked(features)),
            guided=guided,
        )
        self.passes.full_backwards += len(self)
        self.tick(len(self))
        return found

    def scores(self, row: int, inputs: Iterable[Tensor]) -> Tensor:
        """y of any number of inputs with the target of one image; a batch in memory at a time.

        Args:
            row: the image whose target it is.
            inputs: pieces `[n C H W]`, each at most a batch (`batches` cuts).

        Returns:
            `[total]`, in the order of the pieces.
        """
        target, found = self.target.at(row), []
        for piece in inputs:
            self.passes.forwards += len(piece)
            found.append(target.score(self._embedding(piece)))
            self.tick(len(piece))
        return torch.cat(found)

    def _embedding(self, piece: Tensor) -> Tensor:
        """Embeddings `[n D]` of one piece, in the memory format that runs fastest."""
        if self._channels_last and piece.ndim == 4 and piece.device.type == "cpu":
            # Convolutions on CPUs run up to 1.6 times as fast on it.
            turned = piece.contiguous(memory_format=torch.channels_last)
            try:
                return self.network.forward(turned, allow_zero=True).embedding
            except NetworkError:
                self._channels_last = False  # a module that takes views of contiguous memory only
        return self.network.forward(piece, allow_zero=True).embedding

    def normalized(self, z: Tensor) -> Tensor:
        """The embedding of head outputs z `[n D]`; a z of zeros stays zero, no evidence."""
        if not self.network.normalize:
            return z
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return z / torch.where(length > 0, length, 1)

    # ---------------------------------------------------------------- cutting and drawing lots

    def batches(self, total: int) -> Iterator[slice]:
        """0 .. total in slices of at most a batch."""
        for start in range(0, total, self.batch_size):
            yield slice(start, min(start + self.batch_size, total))

    def generator(self) -> torch.Generator:
        """A generator on the CPU, the same for every image: a batch means what one at a time means.

        Draw on the CPU and move: then every device draws the same numbers.
        """
        return torch.Generator().manual_seed(self.seed)

    def _checked(self, features: Features) -> Features:
        self.target.check(len(features.embedding), features.embedding.shape[1])
        return features
