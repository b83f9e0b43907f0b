"""Finding a layer in a module, and saying why one cannot be explained."""

import difflib
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import nn

from ..errors import InputError, NetworkError

_WRAPPERS = ("module", "_orig_mod")


def near_misses(word: str, known: Iterable[str], count: int = 4) -> str:
    """ ", did you mean a, b?" or nothing: the names nearest to a wrong one."""
    names = list(known)
    tail = word.rpartition(".")[2]
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    same_tail = [name for name in names if name.rpartition(".")[2] == tail and name not in close]
    close = (close + same_tail)[:count]
    return f"; did you mean {', '.join(close)}?" if close else ""


def bare_name(name: str) -> str:
    """A dotted name without what wrappers put into it (`module.` of DDP, `_orig_mod.`)."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def find_layer(module: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """(dotted name, module) of a layer given either way.

    A name may leave out the `module.` that wrappers such as DistributedDataParallel add.

    Raises:
        NetworkError: there is none, with the nearest names; or it lies inside a compiled module.
    """
    named = dict(module.named_modules())
    if isinstance(layer, nn.Module):
        name = next((name for name, found in named.items() if found is layer), None)
        if name is None:
            raise NetworkError(
                f"the given layer, a {type(layer).__name__}, is not part of the "
                f"{type(module).__name__}; give one of its submodules, or a name such as "
                f"{_last_name(named)!r}"
            )
    elif isinstance(layer, str):
        bare = {bare_name(name): name for name in reversed(named)}
        name = layer if layer in named else bare.get(layer) or _other_name(module, named, layer)
        if not name:
            raise NetworkError(
                f"{type(module).__name__} has no layer {layer!r}"
                f"{near_misses(layer, [name for name in bare if name]) or _parts(module)}"
            )
    else:
        raise InputError(f"layer={layer!r} is neither a name nor a module of the network")
    _refuse_compiled(named, name)
    return name, named[name]


def find_layers(module: nn.Module, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of several layers.

    Raises:
        InputError: no list, an empty one, or a layer twice.
        NetworkError: as `find_layer`.
    """
    if isinstance(layers, str) or not layers:
        raise InputError("give a list of layers, such as ['layer3', 'layer4']")
    found = [find_layer(module, layer) for layer in layers]
    bare = [(bare_name(name), part) for name, part in found]
    names = [name for name, _ in bare]
    if len(set(names)) < len(names):
        raise InputError(f"a layer is given twice among {', '.join(names)}; name each once")
    return bare


def _parts(module: nn.Module, most: int = 12) -> str:
    """ "; its parts are conv1, bn1, ...": where no name comes near."""
    names = [name for name, _ in module.named_children()]
    more = ", ..." if len(names) > most else ""
    return f"; its parts are {', '.join(names[:most])}{more}" if names else ""


def _other_name(module: nn.Module, named: dict[str, nn.Module], layer: str) -> str | None:
    """The first name of a layer that has several, given one of the others."""
    with suppress(AttributeError):
        part = module.get_submodule(layer)
        return next((name for name, found in named.items() if found is part), None)
    return None


def _last_name(named: dict[str, nn.Module]) -> str:
    return next(reversed(named), "")


def _refuse_compiled(named: dict[str, nn.Module], layer: str) -> None:
    """Hooks on TorchScript, or added after `torch.compile`, do not fire: nothing is captured."""
    if isinstance(named[layer], torch.jit.ScriptModule):
        raise NetworkError(
            f"layer {bare_name(layer)!r} is TorchScript, where hooks do not fire; choose a layer "
            "before or after it, or give trunk and head as EmbeddingNetwork.from_parts(trunk, head)"
        )
    parts = layer.split(".") if layer else []
    for depth in range(len(parts) + 1):
        name = ".".join(parts[:depth])
        found = named[name]
        inside = depth < len(parts) and parts[depth] == "_orig_mod"
        if inside or getattr(found, "_compiled_call_impl", None) is not None:
            raise NetworkError(
                f"layer {bare_name(layer)!r} lies inside a compiled module, where hooks do not "
                "fire; give the module as it was before torch.compile, or compile trunk and head "
                "separately and use EmbeddingNetwork.from_parts"
            )


def before_attention(module: nn.Module | None) -> str | None:
    """The normalisation before the last attention of a transformer, by name, if there is one."""
    if module is None:
        return None
    named = dict(module.named_modules())
    attentions = [
        name for name, part in named.items() if "attention" in type(part).__name__.lower()
    ]
    # The outermost of nested attention modules stands beside the block's normalisation.
    outermost = [
        name for name in attentions if not any(name.startswith(f"{other}.") for other in attentions)
    ]
    if not outermost:
        return None
    block = outermost[-1].rpartition(".")[0]
    for name, part in named[block].named_children():
        if "norm" in type(part).__name__.lower():
            return bare_name(f"{block}.{name}" if block else name)
    return None
