"""One run of a network tapped at several layers, differentiable back to the shallowest of them."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .embedding_network import EmbeddingNetwork
from .gradients import (
    Features,
    any_cotangents,
    at_least_single,
    dead_tokens,
    derivatives,
    half_scale,
    make_features,
    unreachable,
)
from .layouts import Layout
from .state import no_gradients, refuse_inference


class SeveralPass:
    """Activations of several layers from one forward of B images, and dy/dA at each of them.

    Attributes:
        layers: names, in the order they were asked for.
        features: embedding and norm; its activations are those of the last layer asked for.
        activations: of each layer, `[B K H W]`.
        depth: the layers' places in the order they ran, shallowest first.
    """

    def __init__(
        self,
        layers: list[str],
        features: Features,
        z: Tensor,
        kept: list[Tensor],
        layouts: list[Layout],
        depth: list[int],
        module: nn.Module,
    ) -> None:
        self.layers, self.features, self.depth = layers, features, depth
        self.activations = [
            at_least_single(layout.to_maps(raw.detach())).contiguous()
            for raw, layout in zip(kept, layouts, strict=True)
        ]
        self._layouts, self._module = layouts, module
        self._graph: tuple[Tensor, list[Tensor]] | None = (z, kept)

    def vjp(self, cotangents: Tensor) -> list[Tensor]:
        """dy/dA of each layer, `[B K H W]`, for the cotangents dy/dz `[B D]` at z.

        Raises:
            InputError: the pass was closed.
            NetworkError: a layer's output, or that of all its patch tokens, never reaches the
                embedding.
        """
        if self._graph is None:
            raise InputError("this pass was closed; make another")
        z, kept = self._graph
        if not z.requires_grad:
            raise unreachable(", ".join(self.layers))
        with no_gradients():
            c = cotangents.to(z.dtype)
            half = any(raw.dtype == torch.float16 for raw in kept)
            scale = half_scale(c) if half else torch.ones_like(c[:, :1])
            found = derivatives(z, kept, c * scale, f"layers {', '.join(self.layers)}")
        reached = []
        for layer, gradient in zip(self.layers, found, strict=True):
            if gradient is None:
                raise unreachable(layer)
            reached.append(gradient)
        scales = scale[:, :, None, None]
        gradients = [
            at_least_single(layout.to_maps(gradient)).contiguous() / scales
            for layout, gradient in zip(self._layouts, reached, strict=True)
        ]
        self._refuse_dead_tokens(z, kept, gradients)
        return gradients

    def _refuse_dead_tokens(self, z: Tensor, kept: list[Tensor], gradients: list[Tensor]) -> None:
        """Zeros may be the target's own; those that no cotangent moves are the network's."""
        for layer, layout, raw, gradient in zip(
            self.layers, self._layouts, kept, gradients, strict=True
        ):
            if not layout.tokens or bool(gradient.any()):
                continue
            with no_gradients():
                every = any_cotangents(z).to(z.dtype)
                every = every * half_scale(every)
                (reached,) = torch.autograd.grad(z, raw, every, retain_graph=True)
            if not bool(layout.to_maps(reached).any()):
                raise dead_tokens(layer, self._module)

    def close(self) -> None:
        """Free the graph."""
        self._graph = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def several_pass(
    network: EmbeddingNetwork, images: np.ndarray | Tensor, layers: Sequence[str]
) -> SeveralPass:
    """Run a network once and keep several layers' outputs, differentiable.

    Args:
        network: given as a module, not as trunk and head: hooks find the layers.
        images: preprocessed, `[B C H W]`.
        layers: dotted names, each once.

    Raises:
        InputError: no layer, or one twice.
        NetworkError: an unknown layer, one that runs never or more than once, or one whose output
            never reaches the embedding.
    """
    refuse_inference(network.module)
    run = network.run_several(images, layers)
    with no_gradients():
        last = run.layouts[-1].to_maps(run.kept[-1].detach())
        features = make_features(run.batch, run.z.detach(), last, network.normalize)
    return SeveralPass(run.names, features, run.z, run.kept, run.layouts, run.depth, network.module)
