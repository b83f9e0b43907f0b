"""The head alone: a network on one picture, its layer's output replaced."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EmbedcamError
from .layouts import Layout
from .tap import Change

RunNetwork = Callable[[Tensor, Change, int], tuple[Tensor, Tensor]]
"""(picture, what to do with the layer's output, batch of the embedding) -> (z, what was kept)."""


class Injected:
    """The head alone: the network on one picture at a time, its layer's output replaced.

    The trunk sees one picture and the head a batch, which most modules allow; where one does not,
    the picture is repeated, at most `most` at once. `inputs` counts what the trunk saw.
    """

    def __init__(
        self, network: RunNetwork, pictures: Tensor, layout: Layout, most: int | None = None
    ) -> None:
        self.network, self.pictures, self.layout = network, pictures, layout
        self.most = most
        self.repeat = False
        self.inputs = 0

    def __call__(self, maps: Tensor, picture: int = 0, shake: bool = False) -> Tensor:
        """z `[n D]` for activations `[n K H W]`; `shake` also changes the prefix tokens."""
        one = self.pictures[picture : picture + 1]
        if not self.repeat:
            try:
                return self._run(one, maps, shake)
            except EmbedcamError:
                self.repeat = True
        rest = [1] * (one.ndim - 1)
        pieces = maps.split(len(maps) if self.most is None else self.most)
        return torch.cat([self._run(one.repeat(len(p), *rest), p, shake) for p in pieces])

    def _run(self, images: Tensor, maps: Tensor, shake: bool) -> Tensor:
        self.inputs += len(images)
        wanted = torch.is_grad_enabled()

        def inject(raw: Tensor) -> tuple[Tensor, Tensor]:
            like = raw.detach() * -3 + 1 if shake else raw.detach()
            torch.set_grad_enabled(wanted)
            onward = self.layout.to_raw(maps, like.to(maps.dtype))
            return raw, onward.to(raw.dtype).clone()

        return self.network(images, inject, len(maps))[0]


@dataclass
class HeadAlone:
    """The head of one picture, on activations `[n K H W]` as often as wanted: z `[n D]`.

    apply: runs it; injected: by what, None where the head was called as a function;
    asked: inputs that went through the network to find the layout.
    """

    apply: Callable[[Tensor], Tensor]
    injected: Injected | None
    asked: int = 0

    def __call__(self, maps: Tensor) -> Tensor:
        """Run it."""
        return self.apply(maps)

    @property
    def inputs(self) -> int:
        """Inputs put through the trunk so far, for the sake of the head."""
        return self.asked + (0 if self.injected is None else self.injected.inputs)
