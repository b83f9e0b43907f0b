"""Layers read inside an attention: `LAYER@gradeclip` and `LAYER@value`.

`@gradeclip` are the activations of Grad-ECLIP (Zhao et al., ICML 2024): A_i = lambda_i v_i, the
value at position i, all heads side by side, and lambda_i the cosine of its key with the query of
the token that is read, scaled to [0, 1] over the positions (a loosened attention). Its gradient is
that of the attention's output o, before its projection, at the token that is read, and so the same
at every position: sum_i A_i stands in o's place. The network keeps its own heads and its own o.
Where several tokens are read, as before a mean, cosines are averaged and gradients summed.

`@value` are each position's value taken through what follows the attention for the token that is
read: projection, norm and head (MaskCLIP: Zhou et al., ECCV 2022), residual streams and their
branches left out (as ClearCLIP does: Lan et al., ECCV 2024). They lie in the embedding's space, and
their mean stands in its place.
"""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import ProcessLock
from ..errors import InputError, NetworkError
from .attention import Attended, AttentionLayer, AttentionWatch, attention_layers, watching
from .layers import READINGS, Images, Layout, find_layer, resolve, split_reading
from .module import bare_name, no_gradients, user_code
from .shadow import Shadow

if TYPE_CHECKING:
    from .embedding_network import EmbeddingNetwork

Network = TypeVar("Network", bound="EmbeddingNetwork")


@dataclass(frozen=True)
class LoosenedLayout(Layout):
    """Of `@gradeclip`: what is differentiated is the attention's output `[B h Q d]`."""

    def to_maps(self, raw: Tensor) -> Tensor:
        """Return the gradient at the output, summed over the tokens, at every position."""
        summed = raw.sum(2).flatten(1)[:, :, None, None]
        return summed.expand(-1, -1, *self.grid)

    def to_raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Return the output with the sum of `[B C H W]` over positions at every token."""
        summed = maps.sum((2, 3)).reshape(maps.shape[0], like.shape[1], 1, -1)
        return summed.expand(-1, -1, like.shape[2], -1)


@dataclass(frozen=True)
class ValueLayout(Layout):
    """Of `@value`: what is differentiated is the embedding z `[B D]` itself."""

    def to_maps(self, raw: Tensor) -> Tensor:
        """Return the gradient at z, divided by the number of positions, at every position."""
        each = raw[:, :, None, None] / (self.grid[0] * self.grid[1])
        return each.expand(-1, -1, *self.grid)

    def to_raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Return the mean of `[B D H W]` over positions."""
        return maps.mean((2, 3))


LAYOUTS: dict[str, type[Layout]] = {"gradeclip": LoosenedLayout, "value": ValueLayout}


class Reading:
    """One attention read in one run of B images.

    name: "LAYER@reading"; rows: the tokens whose output reaches the embedding; maps `[B K H W]` and
    layout: what was read.
    """

    name: str
    rows: tuple[int, ...]
    batch: int
    layout: Layout
    maps: Tensor

    def __init__(self, name: str, rows: tuple[int, ...], batch: int) -> None:
        self.name, self.rows, self.batch = name, rows, batch
        self._shadow = Shadow(streams=False) if split_reading(name)[1] == "value" else None

    def inside(
        self,
        part: nn.Module,
        keep: Callable[[Tensor], Tensor],
        layout_of: Callable[[Tensor], Layout],
    ) -> AbstractContextManager[object]:
        """Return the context of the run: `keep` hands on what is differentiated.

        `layout_of` finds the layout of tokens `[B T C]`.
        """
        stack, shadow = ExitStack(), self._shadow

        def noted(seen: Attended, output: Tensor) -> None:
            layout = self.layout = layout_of(seen.value.transpose(1, 2).flatten(2))
            if shadow is None:
                tokens = loosened(seen, self.rows, layout.prefix).detach()
                self.maps = _on_maps(tokens, layout.grid)
                return
            values = seen.value[:, :, layout.prefix :].transpose(1, 2).flatten(0, 1)[:, :, None]
            # A sequence for each position: as many tokens as are read, all of its value.
            pools = seen.query.shape[2] == 1
            length = 1 if pools else n_tokens_read(self.rows, layout.prefix)
            values = values.detach().expand(-1, -1, length, -1)
            sizes = [(self.batch, values.shape[0]), (seen.query.shape[2], length)]
            shadow.begin(output, values.flatten(0, 1) if output.ndim == 3 else values, sizes)

        watch = AttentionWatch(self.batch, output=keep if shadow is None else None, noted=noted)
        before = None if shadow is None else lambda: stack.enter_context(shadow)
        stack.enter_context(watching(part, watch, before))
        return stack

    def embedded(self, z: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        """Return z `[B D]` as it goes on, the values taken."""
        if self._shadow is None:
            return z
        values = self._shadow.of(z, self.name).detach()
        self.maps = _on_maps(values.reshape(self.batch, -1, values.shape[1]), self.layout.grid)
        return keep(z)


def _on_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return `[B C H W]` of tokens `[B Z C]`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def loosened(seen: Attended, rows: Sequence[int], prefix: int) -> Tensor:
    """Return lambda_i v_i, tokens `[B Z C]`, of one attention."""
    q, k, v = (one.transpose(1, 2).flatten(2) for one in (seen.query, seen.key, seen.value))
    unit = F.normalize
    cosines = unit(k[:, prefix:], dim=-1) @ unit(q[:, list(rows)], dim=-1).mean(1)[..., None]
    low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
    return (cosines - low) / torch.where(high > low, high - low, 1) * v[:, prefix:]


def n_tokens_read(rows: Sequence[int], prefix: int) -> int:
    """Return how long the shortest sequence is of which the same is read as of all tokens."""
    return prefix + 1 if max(rows) >= prefix else max(rows) + 1


def tokens_read(name: str, part: nn.Module, run: Callable[[], Tensor]) -> tuple[int, ...]:
    """Return which tokens of an attention's output reach the embedding: `run` is of one image."""
    leaves: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        leaves.append(output.detach().clone().requires_grad_())
        torch.set_grad_enabled(True)
        return leaves[-1].clone()

    with no_gradients():
        with watching(part, AttentionWatch(1, output=keep)):
            z = run()
        if len(leaves) != 1:
            number = f"{len(leaves)} attentions" if leaves else "no attention"
            raise NetworkError(
                f"inside layer {split_reading(name)[0]!r} {number} can be seen, and {name!r} reads "
                "one; name a module that computes one, such as 'blocks.11.attn'"
            )
        along = torch.linspace(-1, 1, z.shape[1] + 1, device=z.device)[1:].to(z.dtype)
        with user_code(f"the derivative of what follows {name}", advice="take another layer"):
            gradient = None
            if z.requires_grad:
                (gradient,) = torch.autograd.grad(z, leaves, along[None], allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise NetworkError(
            f"the attention of layer {name!r} never reaches the embedding; choose a later one"
        )
    return tuple(gradient.abs().amax((0, 1, 3)).nonzero().flatten().tolist())


# A network read elsewhere


def attentions_of(
    network: "EmbeddingNetwork", images: Images | None = None
) -> list[AttentionLayer]:
    """Return the attentions over all positions of a network's pictures, in the order they run.

    Found once, with one of the images or a probe picture.
    """
    if network.runner.attentions:
        return network.runner.attentions
    # The module of parts that a user gave need not be the network.
    if not network.hooked and network.spec is None:
        raise NetworkError(
            "this network was given as trunk and head, so no attention can be found in it; give it "
            "as a module and a layer"
        )
    runner = network.runner
    images = network.probe_images() if images is None else images[:1]
    with no_gradients(), runner.precision(), network.probing():
        batch = runner.prepare(images)
        with attention_layers(network.module, 1) as found:
            network.module(batch)
    several = {one.name for one in found if sum(one.name == other.name for other in found) > 1}
    runner.attentions = [
        replace(one, name=bare_name(one.name))
        for one in found
        if one.batch == 1 and one.name not in several and _on_grid(one.keys, batch)
    ]
    if not runner.attentions:
        raise NetworkError(
            f"the network {network.name or type(network.module).__name__} has no attention over "
            "all its positions, which this method reads; use one of any layer, such as 'gradcam'"
        )
    return runner.attentions


def _on_grid(tokens: int, images: Tensor) -> bool:
    try:
        grid = resolve(images.new_empty(len(images), tokens, 1), images, "btk").grid
    except NetworkError:
        return False
    return grid[0] * grid[1] > 1


def at_layer(network: Network, layer: str) -> Network:
    """Return a network that explains another layer, all else as it is."""
    dotted, part = find_layer(network.module, layer)
    other = copy.copy(network)
    other.layer, other._kind, other._session, other._sound = bare_name(dotted), None, None, False
    options = network.layout_options if split_reading(layer)[1] == "" else ("auto", None, None)
    other.runner = replace(
        network.runner,
        layer=other.layer,
        part=part,
        trunk=None,
        head=None,
        layout_options=options,
        lock=ProcessLock(),
        reached=set(),
        _layouts={},
    )
    if network.spec is not None:
        other.spec = json.loads(json.dumps({**network.spec, "layer": other.layer}))
    return other


def as_indexed(network: Network, layer: str) -> Network:
    """Return a network at an index's layer, if that is read inside an attention of the network."""
    base, reading = split_reading(layer)
    named = {bare_name(name) for name, _ in network.module.named_modules()}
    elsewhere = reading and layer != network.layer and base in named
    return at_layer(network, layer) if elsewhere else network


def read_by(network: Network, reading: str) -> Network:
    """Return a network at its last attention's reading, itself where it is one already."""
    if not reading or split_reading(network.layer)[1] == reading:
        return network
    if reading not in READINGS:
        raise InputError(f"reading = {reading!r}; give {' or '.join(READINGS)}")
    base, other = split_reading(network.layer)
    if other:
        return at_layer(network, f"{base}@{reading}")
    return at_layer(network, f"{attentions_of(network)[-1].name}@{reading}")
