"""One run of a network tapped at several layers, differentiable back to the shallowest of them."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NetworkError
from .embedding_network import EmbeddingNetwork
from .gradients import Features, at_least_single, half_scale, make_features, unreachable
from .layers import bare_name, find_layer
from .layouts import Layout, resolve
from .state import refuse_inference
from .tap import run_tapped_several


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
    ) -> None:
        self.layers, self.features, self.depth = layers, features, depth
        self.activations = [
            at_least_single(layout.to_maps(raw.detach())).contiguous()
            for raw, layout in zip(kept, layouts, strict=True)
        ]
        self._layouts = layouts
        self._graph: tuple[Tensor, list[Tensor]] | None = (z, kept)

    def vjp(self, cotangents: Tensor) -> list[Tensor]:
        """dy/dA of each layer, `[B K H W]`, for the cotangents dy/dz `[B D]` at z.

        Raises:
            InputError: the pass was closed.
            NetworkError: a layer's output never reaches the embedding.
        """
        if self._graph is None:
            raise InputError("this pass was closed; make another")
        z, kept = self._graph
        if not z.requires_grad:
            raise unreachable(", ".join(self.layers))
        with torch.inference_mode(False), torch.no_grad():
            c = cotangents.to(z.dtype)
            half = any(raw.dtype == torch.float16 for raw in kept)
            scale = half_scale(c) if half else torch.ones_like(c[:, :1])
            found = torch.autograd.grad(z, kept, c * scale, retain_graph=True, allow_unused=True)
        for layer, gradient in zip(self.layers, found, strict=True):
            if gradient is None:
                raise unreachable(layer)
        scales = scale[:, :, None, None]
        return [
            at_least_single(layout.to_maps(gradient)).contiguous() / scales
            for layout, gradient in zip(self._layouts, found, strict=True)
        ]

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
    if isinstance(layers, str) or not layers:
        raise InputError("give a list of layers, such as ['layer3', 'layer4']")
    found = [find_layer(network.module, layer) for layer in layers]
    names = [bare_name(name) for name, _ in found]
    if len(set(names)) < len(names):
        raise InputError(f"a layer is given twice among {', '.join(names)}; name each once")
    if not network.hooked:
        raise NetworkError(
            "this network was given as trunk and head, so no other layer can be found in it; give "
            "it as a module and a layer"
        )
    refuse_inference(network.module)
    z, kept, batch, depth = network.run_several(
        images, lambda module, prepared: run_tapped_several(module, found, prepared)
    )
    layouts = [_layout(network, name, raw, batch) for name, raw in zip(names, kept, strict=True)]
    with torch.inference_mode(False), torch.no_grad():
        last = layouts[-1].to_maps(kept[-1].detach())
        features = make_features(batch, z.detach(), last, network.normalize)
    return SeveralPass(names, features, z, kept, layouts, depth)


def _layout(network: EmbeddingNetwork, name: str, raw: Tensor, batch: Tensor) -> Layout:
    """The network's own options for its own layer; other layers are read by their shapes."""
    kind, grid, prefix = network.layout_options
    if name == network.layer:
        return resolve(raw, batch, kind, grid, prefix, name)
    return resolve(raw, batch, "bkl" if kind == "bkl" else "auto", None, None, name)
