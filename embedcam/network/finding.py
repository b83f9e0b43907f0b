"""Finding the layer to explain by running a network: where its positions last count.

Where all of a picture still goes through one layer late in the network, that layer explains it:
what a convolutional network pools, the blocks before a class token that joins late (CaiT, XCiT).
Where a class token gathers on the way (ViT), positions last count at the norm before the last
attention. The first is asked by exchanging two pictures' activations, the second by a derivative.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError, NetworkError
from .layers import (
    Layout,
    Output,
    OutputChoice,
    choose_embedding,
    first_tensor,
    replace_first,
    resolve,
    smaller,
)
from .module import bare_name, no_gradients, uncompiled
from .runner import run_part

_TESTED = 6
"""Layers that are asked whether all of the picture goes through them."""
_SAME = 1e-2
"""Of the distance between two pictures' embeddings, what counts as none."""
_LATE = 0.5
"""Of the modules with parameters, how many have run before a layer counts as late."""


@dataclass(frozen=True)
class Found:
    """A layer's bare name, and a sentence about the choice where there was one."""

    layer: str
    said: str = ""


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a module returned first, how its positions lie, and how late it ended, 0 to 1."""

    name: str
    part: nn.Module
    output: Tensor
    layout: Layout
    when: float

    def __str__(self) -> str:
        return f"{self.name} ({self.layout.grid[0]} x {self.layout.grid[1]})"


def find_default(module: nn.Module, images: Tensor, output: OutputChoice = None) -> Found | None:
    """Return the layer that explains a network in eval mode; None where there is none.

    `images` are two different pictures `[2 C H W]` as its input; `output` says what is the
    embedding, as for an `EmbeddingNetwork`.
    """
    try:
        z, seen = _look(module, images, output)
        reached = _reached(z, seen)
        late = [one for one in reached if one.when > _LATE and not one.layout.prefix]
        for one in late[: -_TESTED - 1 : -1]:
            if _holds_all(module, images, output, z.detach(), one):
                return Found(_last_block(one))
    except EmbedcamError:
        return None
    inner = {id(part) for one in module.modules() if is_attention(one) for part in _below(one)}
    streams = _streams([one for one in reached if id(one.part) not in inner and _norms(one.part)])
    if len(streams) > 1:
        streams = _of_positions(module, images, streams)
    if len(streams) < 2:
        return Found(streams[0].name) if streams else None
    finest, *others = sorted(streams, key=lambda one: -one.layout.grid[0] * one.layout.grid[1])
    return Found(
        finest.name,
        f"{len(streams)} streams of positions lead to the embedding side by side, and the finest "
        f"is explained, layer {finest}; another can be named, {', '.join(map(str, others))}",
    )


def _look(module: nn.Module, images: Tensor, output: OutputChoice) -> tuple[Tensor, list[_Seen]]:
    """Return z `[2 D]` with its graph, and what modules with several positions returned."""
    seen: dict[str, _Seen] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # kept: a number may be given again
    again: set[str] = set()
    total = sum(_has_parameters(part) for part in module.modules())
    ran = 0

    def look(name: str, part: nn.Module, given: Output) -> None:
        nonlocal ran
        again.update({name} & set(seen))
        ran += _has_parameters(part)
        with suppress(NetworkError):
            raw = first_tensor(given, name)
            layout = resolve(raw, images, layer=name)
            # What a module only hands on need not be what is used after it.
            by, _ = made.setdefault(id(raw), (name, raw))
            handed_on = not f"{by}.".startswith(f"{name}.")
            if max(layout.grid) > 1 and not handed_on:
                seen[name] = _Seen(name, part, raw, layout, ran / max(total, 1))

    def after(name: str) -> Callable[[nn.Module, object, Output], None]:
        return lambda part, _, given: look(name, part, given)

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for dotted, part in module.named_modules():
            if dotted and not isinstance(part, torch.jit.ScriptModule):  # it takes no hooks
                stack.enter_context(part.register_forward_hook(after(bare_name(dotted))))
        leaf = images.detach().clone().requires_grad_()
        z = choose_embedding(run_part(module, "network", leaf.clone()), output, len(images))
    return z, [one for one in seen.values() if one.name not in again]


def _has_parameters(part: nn.Module) -> bool:
    return next(part.parameters(recurse=False), None) is not None


def _reached(z: Tensor, seen: list[_Seen]) -> list[_Seen]:
    """Return the modules on whose positions z depends, in the order they ended."""
    weights = torch.linspace(-1, 1, z.shape[1] + 1, device=z.device, dtype=z.dtype)[1:]
    return [one for one, slopes in _slopes((z * weights).sum(), seen) if bool(slopes.any())]


def _slopes(value: Tensor, seen: list[_Seen]) -> list[tuple[_Seen, Tensor]]:
    """Return the derivative at each module's positions, those left out that there is none at."""
    asked = [one for one in seen if one.output.requires_grad]
    if not asked or not value.requires_grad:
        return []
    raws = [one.output for one in asked]
    slopes = torch.autograd.grad(value, raws, retain_graph=True, allow_unused=True)
    pairs = zip(asked, slopes, strict=True)
    return [(one, one.layout.to_maps(slope)) for one, slope in pairs if slope is not None]


def _holds_all(
    module: nn.Module, images: Tensor, output: OutputChoice, z: Tensor, layer: _Seen
) -> bool:
    """Return whether pictures whose activations are exchanged exchange their embeddings."""

    def exchange(_: nn.Module, __: object, given: Output) -> Output:
        return replace_first(given, first_tensor(given, layer.name).flip(0))

    with no_gradients(), layer.part.register_forward_hook(exchange):
        given = run_part(module, "network", images.clone())
        moved = choose_embedding(given, output, len(images)).flip(0) - z
    apart = float(torch.linalg.vector_norm(z[0] - z[1]))
    rounding = 8 * torch.finfo(z.dtype).eps * float(torch.linalg.vector_norm(z))
    return float(torch.linalg.vector_norm(moved)) <= _SAME * apart + rounding


def _below(part: nn.Module) -> list[nn.Module]:
    return list(part.modules())[1:]


def _norms(part: nn.Module) -> bool:
    """Return whether a module is a norm, or holds one, as a block does."""
    return any("norm" in type(one).__name__.lower() for one in part.modules())


def _last_block(one: _Seen) -> str:
    """Return the name of the block that a sequence ends with, or of the layer itself."""
    name, part = one.name, one.part
    while isinstance(part, nn.Sequential) and len(part):
        name, part = f"{name}.{len(part) - 1}", part[-1]
    return name


def is_attention(part: nn.Module) -> bool:
    """Return whether a module is an attention by its name, not a block with one."""
    name = type(part).__name__.lower()
    block = name.endswith(("block", "layer"))
    return not block and ("attention" in name or "attn" in name)


def _streams(seen: list[_Seen]) -> list[_Seen]:
    """Return the last module, and of every other grid the last that does not lead to it."""
    if not seen:
        return []
    last = seen[-1].output
    of_grids = {one.layout.grid: one for one in seen}
    others = [one for one in of_grids.values() if one.layout.grid != seen[-1].layout.grid]
    # Not the sum, which is constant behind a norm.
    weights = torch.linspace(-1, 1, last.numel(), device=last.device, dtype=last.dtype)
    value = (last * weights.reshape(last.shape)).sum()
    leading = [one for one, slopes in _slopes(value, others) if bool(slopes.any())]
    return [seen[-1], *(one for one in others if one not in leading)]


def _of_positions(module: nn.Module, images: Tensor, streams: list[_Seen]) -> list[_Seen]:
    """Return those of which a smaller input has fewer; all where the network takes none."""
    changed: list[_Seen] = []

    def look(one: _Seen) -> Callable[[nn.Module, object, Output], None]:
        def compare(_: nn.Module, __: object, given: Output) -> None:
            if first_tensor(given, one.name).shape != one.output.shape:
                changed.append(one)

        return compare

    height, width = smaller((images.shape[2], images.shape[3]))[-1]
    part = images[:, :, :height, :width].contiguous()
    with no_gradients(), uncompiled(), ExitStack() as stack, suppress(EmbedcamError):
        for one in streams:
            stack.enter_context(one.part.register_forward_hook(look(one)))
        run_part(module, "network", part)
    return changed or streams
