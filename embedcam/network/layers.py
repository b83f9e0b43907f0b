"""Finding a layer in a module, and reading what it and the network return.

A layer's output is `[B K H W]` ("bkhw", most CNNs), `[B H W K]` ("bhwk", Swin), tokens `[B T K]`
("btk", ViT; "tbk" and "bkt" in another order) with class and register tokens first, or `[B K L]`
("bkl", 1-D convolutions). Everything else in the package sees `[B K H W]`, H = 1 for "bkl".
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, NetworkError
from .module import bare_name, user_code

LayoutName = Literal["auto", "bkhw", "bhwk", "btk", "tbk", "bkt", "bkl"]
Output: TypeAlias = "Tensor | Mapping[str | int, Output] | Sequence[Output] | None"
"""What a module returns."""
OutputChoice = str | int | Callable[[Any], Tensor] | None
Images = np.ndarray | Tensor

# How to bring tokens, or a signal's positions, to [B T K]; each order is its own inverse.
ORDERS = {"btk": (0, 1, 2), "tbk": (1, 0, 2), "bkt": (0, 2, 1), "bkl": (0, 2, 1)}
TOKENS = ("btk", "tbk", "bkt")
# Class token, register tokens and a distillation token: no published network has more.
MAX_PREFIX = 16
_EMBEDDING = "the embedding, a tensor [B D]"
# What transformers' models of one tower return.
_POOLED, _UNPOOLED = "pooler_output", ("last_hidden_state", "hidden_states", "attentions")

READINGS = ("gradeclip", "value")
"""What can be read inside an attention, as "LAYER@reading"; see `reading`."""

# Finding a layer


def split_reading(layer: str) -> tuple[str, str]:
    """Return the name of a layer, and what is read inside it, "" for its output."""
    base, mark, reading = layer.partition("@")
    if mark and reading not in READINGS:
        known = " or ".join(f"@{one}" for one in READINGS)
        raise NetworkError(f"layer {layer!r}: '@{reading}' is unknown; write LAYER{known}")
    return base, reading


def near_misses(word: str, known: Iterable[str], count: int = 4) -> str:
    """Return "; did you mean a, b?" of the names nearest to a wrong one, or nothing."""
    names = list(known)
    tail = word.rpartition(".")[2]
    close = difflib.get_close_matches(word, names, n=count)
    close += [name for name in names if name.rpartition(".")[2] == tail and name not in close]
    return f"; did you mean {', '.join(close[:count])}?" if close else ""


def find_layer(module: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Return (dotted name, module) of a layer given either way, wrappers' prefixes optional.

    What is read inside an attention stays in the name: "blocks.11.attn@gradeclip".
    """
    if isinstance(layer, str) and "@" in layer:
        base, reading = split_reading(layer)
        dotted, part = find_layer(module, base)
        return f"{dotted}@{reading}", part
    named = dict(module.named_modules())
    if isinstance(layer, nn.Module):
        name = next((name for name, part in named.items() if part is layer), None)
        if name is None:
            raise NetworkError(
                f"the given layer, a {type(layer).__name__}, is not part of the "
                f"{type(module).__name__}; give one of its submodules, or a name such as "
                f"{next(reversed(named), '')!r}"
            )
    elif isinstance(layer, str):
        bare = {bare_name(name): name for name in reversed(named)}
        name = layer if layer in named else bare.get(layer)
        if name is None:
            with suppress(AttributeError):  # another name of a layer that has several
                part = module.get_submodule(layer)
                name = next((name for name, known in named.items() if known is part), None)
        if not name:
            children = [name for name, _ in module.named_children()]
            more = ", ..." if len(children) > 12 else ""
            parts = f"; its parts are {', '.join(children[:12])}{more}" if children else ""
            raise NetworkError(
                f"{type(module).__name__} has no layer {layer!r}"
                f"{near_misses(layer, [name for name in bare if name]) or parts}"
            )
    else:
        raise InputError(f"layer={layer!r} is neither a name nor a module of the network")
    _refuse_compiled(named, name)
    return name, named[name]


def find_layers(module: nn.Module, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return (bare name, module) of several layers, each given once."""
    if isinstance(layers, str) or not layers:
        raise InputError("give a list of layers, such as ['layer3', 'layer4']")
    found = [(bare_name(name), part) for name, part in (find_layer(module, one) for one in layers)]
    if len(dict(found)) < len(found):
        names = ", ".join(name for name, _ in found)
        raise InputError(f"a layer is given twice among {names}; name each once")
    return found


def _refuse_compiled(named: dict[str, nn.Module], layer: str) -> None:
    """Refuse TorchScript, and what is behind `torch.compile`: hooks do not fire there."""
    parts = layer.split(".") if layer else []
    around = [named[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    why = ""
    if isinstance(around[-1], torch.jit.ScriptModule):
        why = "is TorchScript, where hooks do not fire; choose a layer before or after it"
    elif "_orig_mod" in parts or any(getattr(p, "_compiled_call_impl", None) for p in around):
        why = "lies inside a compiled module, where hooks fail; give the module before it"
    if why:
        raise NetworkError(
            f"layer {bare_name(layer)!r} {why}, or give trunk and head as "
            "EmbeddingNetwork.from_parts(trunk, head)"
        )


def before_attention(module: nn.Module) -> str | None:
    """Return the name of the normalization before a transformer's last attention, if any."""
    named = dict(module.named_modules())
    attentions = [n for n, part in named.items() if "attention" in type(part).__name__.lower()]
    # The outermost of nested attention modules stands beside the block's normalization.
    outermost = [n for n in attentions if not any(n.startswith(f"{o}.") for o in attentions)]
    if not outermost:
        return None
    block = outermost[-1].rpartition(".")[0]
    children = named[block].named_children()
    norm = next((n for n, part in children if "norm" in type(part).__name__.lower()), None)
    return None if norm is None else bare_name(f"{block}.{norm}" if block else norm)


# How a layer's output is laid out


@dataclass(frozen=True)
class Layout:
    """How a layer's output is laid out: its kind, (H, W) of the positions, tokens before them."""

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    def to_maps(self, raw: Tensor) -> Tensor:
        """Return `[B K H W]` of a layer's output or its gradient, without prefix tokens."""
        if self.kind not in ORDERS:
            return raw if self.kind == "bkhw" else raw.permute(0, 3, 1, 2)
        tokens = raw.permute(ORDERS[self.kind])[:, self.prefix :]
        # The shape, not len(): an exporter follows a batch of any size through it.
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.grid)

    def to_raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Return the layer's output with `[B K H W]` in it and the prefix tokens of `like`."""
        if self.kind not in ORDERS:
            return maps if self.kind == "bkhw" else maps.permute(0, 2, 3, 1)
        order = ORDERS[self.kind]
        tokens = maps.flatten(2).transpose(1, 2)
        if self.prefix:
            prefix = like.permute(order)[:, : self.prefix].expand(len(maps), -1, -1)
            tokens = torch.cat([prefix, tokens], dim=1)
        return tokens.permute(order)

    def one_position(self, pooled: Tensor) -> Tensor:
        """Return the layer's output if its grid had one position, holding `pooled` `[B K]`."""
        return replace(self, grid=(1, 1), prefix=0).to_raw(pooled[:, :, None, None], pooled)


def resolve(
    raw: Tensor,
    images: Tensor,
    kind: str = "auto",
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    layer: str = "layer",
) -> Layout:
    """Return the layout of a layer's output for `images`, held against what the user said of it."""
    shape, size = tuple(raw.shape), (int(images.shape[-2]), int(images.shape[-1]))
    if raw.ndim not in (3, 4):
        raise NetworkError(
            f"layer {layer!r} returned a tensor {list(shape)}; expected [B K H W], [B H W K] or "
            "tokens [B T K]: choose a layer before the pooling"
        )

    def wrong(said: str) -> NetworkError:
        return NetworkError(f"layer {layer!r} returned {list(shape)}{said}")

    if shape[1 if kind == "tbk" else 0] != len(images):
        raise wrong(
            f" for a batch of {len(images)}; expected the batch as first dimension: choose a layer "
            "that keeps images apart, or say layout='tbk' of tokens before it"
        )
    if kind == "auto":
        # Of four dimensions the channels are last where only the middle two have the aspect.
        last = raw.ndim == 4 and same_aspect(shape[1:3], size)
        kind = "bhwk" if last and not same_aspect(shape[2:4], size) else "bkhw"
        kind = "btk" if raw.ndim == 3 else kind
    if (kind in ORDERS) != (raw.ndim == 3):
        raise wrong(
            f", but layout={kind!r} says {'three' if kind in ORDERS else 'four'} dimensions; "
            'leave layout="auto" or choose another layer'
        )
    if kind in ORDERS:
        count = shape[ORDERS[kind].index(1)]
        if kind == "bkl" and (grid, prefix) == (None, None):
            return Layout(kind, (1, count))
        if kind == "bkl":
            raise wrong(", but layout='bkl' says [B K L], without grid= or prefix_tokens=")
        return Layout(kind, *token_grid(count, size, grid, prefix, layer))
    height, width = shape[1:3] if kind == "bhwk" else shape[2:4]
    if grid is not None and tuple(grid) != (height, width):
        raise wrong(
            f", read as {kind} with a grid of {height} x {width}, but grid={_by(grid)} was given; "
            "leave grid= out or set layout="
        )
    return Layout(kind, (height, width))


def axes_told(
    shapes: tuple[Sequence[int], Sequence[int]],
    batches: tuple[int, int],
    size: tuple[int, int],
    layer: str,
) -> str:
    """Return the layout that outputs for two sizes show; "auto" if the first one alone tells."""
    first, second = shapes
    if len(second) == len(first):
        moved = {place for place in range(1, len(first)) if first[place] != second[place]}
        batch = {place for place in (0, 1) if (first[place], second[place]) == batches}
        if len(first) == 3 and 0 not in batch and 1 in batch:
            return "tbk"
        told = {(3, 1): "btk", (3, 2): "bkt", (4, 3): "bkhw", (4, 1): "bhwk"}
        # Axis 2 of four is a side either way; the other side tells, and channels never move.
        kinds = [told[len(first), place] for place in moved if (len(first), place) in told]
        if 0 in batch and len(kinds) == 1:
            return kinds[0]
    if len(first) == 4 and same_aspect(first[1:3], size) and same_aspect(first[2:4], size):
        raise NetworkError(
            f"layer {layer!r} returned {list(first)} for an input {_by(size)} and takes no other "
            "size, so its channels cannot be told from its positions; say layout='bkhw' or 'bhwk'"
        )
    return "auto"


def smaller(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return sizes of about half: as it comes, and in steps that networks ask for."""
    steps = [step for step in (1, 32, 14) if all(side % step == 0 for side in size)]
    height, width = size
    halves = [(-(-height // (2 * n)) * n, -(-width // (2 * n)) * n) for n in steps]
    return [half for half in dict.fromkeys(halves) if half != tuple(size)]


def same_aspect(grid: Sequence[int], size: tuple[int, int]) -> bool:
    """Return whether the grid is the input's, divided by one stride, give or take a position."""
    (h, w), (height, width) = grid, size
    if h > height or w > width:
        return False
    return abs(h - w * height / width) <= 1 or abs(w - h * width / height) <= 1


def token_grid(
    count: int,
    size: tuple[int, int],
    grid: tuple[int, int] | None,
    prefix: int | None,
    layer: str,
) -> tuple[tuple[int, int], int]:
    """Return the grid of tokens, and how many others come before it."""
    if grid is not None:
        before = count - grid[0] * grid[1]
        if before < 0 or (prefix is not None and before != prefix):
            said = "" if prefix is None else f" and prefix_tokens={prefix}"
            raise NetworkError(
                f"layer {layer!r} returned {count} tokens, but grid={_by(grid)}{said} makes "
                f"{count - before + (prefix or 0)}; correct grid= or prefix_tokens="
            )
        return grid, before
    prefixes = range(min(MAX_PREFIX + 1, count)) if prefix is None else [prefix]
    for exact in (True, False):
        for candidate in prefixes:
            sides = _grid(count - candidate, size, exact)
            if sides is not None:
                return sides, candidate
    said = "" if prefix is None else f" after {prefix} prefix tokens"
    raise NetworkError(
        f"the {count} tokens of layer {layer!r}{said} fit no grid of a {_by(size)} input; "
        "give grid=(H, W), and prefix_tokens= if the network has class or register tokens"
    )


def _grid(count: int, size: tuple[int, int], exact: bool) -> tuple[int, int] | None:
    """Return (h, w), h w = count, that square patches cut out of the input, perhaps rounded."""
    height, width = size
    for h in (h for h in range(1, count + 1) if count % h == 0):
        w = count // h
        if exact and h * width == w * height and height % h == 0:
            return h, w
        sides = {height // h, -(-height // h), width // w, -(-width // w)} - {0}
        for patch in () if exact else sides:
            down, up = (height // patch, width // patch), (-(-height // patch), -(-width // patch))
            if (h, w) in (down, up):
                return h, w
    return None


def _by(size: Sequence[int]) -> str:
    return " x ".join(str(side) for side in size)


# The tensors in what a layer or a network returns


def _entries(output: Output) -> dict[str | int, Output]:
    """Return the values of a dict or dataclass by name, else by position."""
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {one.name: getattr(output, one.name) for one in dataclasses.fields(output)}
    return dict(enumerate(output if isinstance(output, tuple | list) else [output]))


def first_tensor(output: Output, layer: str) -> Tensor:
    """Return a layer's activations: its output, or the first tensor in what it returned."""
    first = next((one for one in _entries(output).values() if isinstance(one, Tensor)), None)
    what = ""
    if first is None:
        what = type(output).__name__
    elif torch._C._functorch.is_functorch_wrapped_tensor(first):
        what = "a tensor inside torch.vmap"
    elif not first.is_floating_point() or first.layout != torch.strided:
        what = f"a tensor of {_numbers(first)}"
    if first is None or what:
        raise NetworkError(
            f"layer {layer!r} returned {what}; expected real numbers in floating point, a tensor, "
            "or a tuple, list or dict with one: choose a layer before it, inside it or after it"
        )
    return first


def _numbers(tensor: Tensor) -> str:
    """Return "complex64", or "sparse_coo float32"."""
    kinds = (tensor.layout, tensor.dtype) if tensor.layout != torch.strided else (tensor.dtype,)
    return " ".join(str(kind).removeprefix("torch.") for kind in kinds)


def replace_first(output: Output, tensor: Tensor) -> Output:
    """Return the same output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    entries = _entries(output)
    entries[next(key for key, one in entries.items() if isinstance(one, Tensor))] = tensor
    kind: Callable[..., Output] = type(output)
    names = getattr(output, "_fields", entries if dataclasses.is_dataclass(output) else None)
    if names is not None:
        return kind(**dict(zip(names, entries.values(), strict=True)))
    return entries if isinstance(output, Mapping) else kind(entries.values())


def choose_embedding(output: Output, choice: OutputChoice, batch: int | None) -> Tensor:
    """Return the embedding `[B D]` in what a network's forward returned.

    Without a `choice`: a tensor, the first of a tuple, the only one of a dict, or `pooler_output`.
    """
    value = output if choice is None and isinstance(output, Tensor) else _chosen(output, choice)
    if not isinstance(value, Tensor):
        by = "the network" if choice is None else f"output={describe_choice(choice)!r}"
        raise NetworkError(f"{by} returned {type(value).__name__}; expected {_EMBEDDING}")
    if value.is_complex() or value.layout != torch.strided:
        real = "torch.view_as_real(out).flatten(1)" if value.is_complex() else "out.to_dense()"
        raise NetworkError(
            f"the network's output is a tensor of {_numbers(value)}; expected {_EMBEDDING} of real "
            f"numbers, such as output=lambda out: {real}"
        )
    if value.ndim > 2 and all(side == 1 for side in value.shape[2:]):
        value = value.flatten(1)
    if value.ndim != 2 or value.shape[1] == 0 or (batch and value.shape[0] != batch):
        images = "" if batch is None else f" for a batch of {batch}"
        raise NetworkError(
            f"the network's output is {list(value.shape)}{images}; expected {_EMBEDDING}: choose "
            "it with output=, such as lambda out: out.last_hidden_state[:, 0]"
        )
    return value


def _chosen(output: Output, choice: OutputChoice) -> Output:
    if callable(choice):
        advice = "give a function that takes what the network returns and gives the embedding [B D]"
        with user_code(f"output={describe_choice(choice)}", advice=advice):
            return choice(output)
    entries = _entries(output)
    if isinstance(choice, str):
        attribute: Output = None if isinstance(output, Tensor) else getattr(output, choice, None)
        if (found := entries.get(choice, attribute)) is not None:
            return found
        names = ", ".join(one for one in entries if isinstance(one, str))
        raise NetworkError(
            f"output={choice!r} is not in what the network returned ({type(output).__name__} with "
            f"{names or 'no names'})"
        )
    values = list(entries.values())
    if isinstance(choice, int):
        if not -len(values) <= choice < len(values):
            raise NetworkError(
                f"output={choice} is beyond the {len(values)} values that the network returned"
            )
        return values[choice]
    named = {
        name: one
        for name, one in entries.items()
        if isinstance(name, str) and isinstance(one, Tensor)
    }
    if len(named) < 2:
        return next(iter(named.values()), values[0] if values else output)
    if _POOLED in named and set(named) <= {_POOLED, *_UNPOOLED}:
        return named[_POOLED]
    # Of several, the first that is one vector an image.
    likely = next((name for name, value in named.items() if value.ndim == 2), next(iter(named)))
    raise NetworkError(
        f"the network returned {type(output).__name__} with {', '.join(named)}; say which is "
        f"the embedding, e.g. output={likely!r}"
    )


def describe_choice(choice: OutputChoice) -> str | int | None:
    """Return `output=` as something JSON can hold: a callable by its name."""
    if callable(choice):
        return getattr(choice, "__qualname__", type(choice).__name__)
    return choice
