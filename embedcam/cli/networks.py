"""The network that the options, a recipe or an index name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..errors import InputError, NetworkError, reason, short

if TYPE_CHECKING:
    from ..index import Manifest

_KNOWN: dict[str, tuple[type, ...]] = {
    "network": (str,),
    "weights": (str,),
    "head": (str,),
    "layer": (str,),
    "normalize": (bool,),
    "size": (int, list, tuple),
    "resize": (str,),
    "output": (str, int),
    "layout": (str,),
    "grid": (list, tuple),
    "prefix_tokens": (int,),
    "device": (str,),
    "autocast": (str,),
    "channels_last": (bool,),
    "seed": (int,),
}
_FILES = ("weights", "head")
_FORMS = "--network torchvision:NAME, timm:NAME or package.module:factory"


def network_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the network; nothing where it says nothing."""
    names = (
        "network", "weights", "head", "layer", "size", "resize", "grid", "prefix_tokens", "device",
        "autocast",
    )  # fmt: skip
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.no_normalize:
        said["normalize"] = False
    return said


def check_onnx(options: argparse.Namespace) -> None:
    """Refuse beside an ONNX file what takes the network as torch has it."""
    if options.onnx is None:
        return
    said = [f"--{name.replace('_', '-')}" for name in network_options(options)]
    said += [f"--{name}" for name in ("method", "fallback") if getattr(options, name, None)]
    if said:
        raise InputError(
            f"--onnx takes the whole network from {options.onnx}, without torch; leave out "
            f"{', '.join(said).replace('--normalize', '--no-normalize')}"
        )


def network_given(options: argparse.Namespace, manifest: Manifest) -> Any:
    """The network a query is embedded with: from an ONNX file, or as the index was built."""
    if options.onnx is None:
        return named(network_of_index(manifest, network_options(options)))
    from ..onnx import OnnxNetwork

    return OnnxNetwork(options.onnx)


def network_of_index(manifest: Manifest, said: Mapping[str, Any]) -> dict[str, Any]:
    """How an index's network is loaded again: as it was for the build, but for what is said now.

    Raises:
        InputError: the index does not know its network, or not how to load it.
        NetworkError: a file it was loaded from is gone.
    """
    if manifest.network is None:
        raise InputError(
            "this index was built from features alone and does not know its network, so pictures "
            "cannot be embedded for it; build it again with --network, or use explain_features"
        )
    loading = manifest.network.loading or {}
    if said.get("network", loading.get("network")) != loading.get("network"):
        return dict(said)  # another way to the same network: layers and files have other names
    if not loading:
        raise InputError(
            "this index was built with a network that was not loaded by name; write a function "
            "that returns it, and give --network package.module:function"
        )
    name = str(loading.get("network", ""))
    if "network" not in said and name.partition(":")[0] not in ("torchvision", "timm"):
        raise InputError(
            f"this index names the network {name!r}, which is code of whoever built it; if you "
            f"trust it, say so with --network {name}"
        )
    for what in _FILES:
        file = loading.get(what)
        if what not in said and file not in (None, "random") and not os.path.isfile(file):
            raise NetworkError(
                f"the index was built with --{what} {file}, which is not there any more; say where "
                f"it lies now with --{what} FILE"
            )
    return {**loading, **said}


def named(settings: Mapping[str, Any]) -> Any:
    """Load the network.

    Raises:
        InputError: none is named, or a setting means nothing.
        NetworkError: it cannot be loaded.
    """
    arguments = {name: value for name, value in settings.items() if value is not None}
    _check(arguments)
    if not arguments.get("network"):
        raise InputError(f"no network was named; give {_FORMS}")
    for what in _FILES:
        # An index records the file, and is used from other folders later.
        if arguments.get(what, "random") != "random":
            arguments[what] = os.path.abspath(os.path.expanduser(arguments[what]))
    for name in ("size", "grid"):
        if isinstance(arguments.get(name), list):
            arguments[name] = tuple(arguments[name])
    name = str(arguments.pop("network"))
    own = name.partition(":")[0] not in ("torchvision", "timm")
    if own and os.getcwd() not in sys.path and "" not in sys.path:
        # Behind all others, so that a file lying here shadows no library.
        sys.path.append(os.getcwd())
    from ..network import load_network

    _check_device(arguments.get("device"))
    return load_network(name, **arguments)


def refuse_unknown(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse an entry of a recipe's table that means nothing, with the nearest one that does."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"{where} has no entry {name!r}; {hint}")


def refuse_nul(where: str, text: str) -> None:
    """Refuse the one letter that no name of a file or a network can hold."""
    if "\0" in text:
        raise InputError(f"{where} = {short(text)} holds a NUL, which no name can")


def _check(arguments: Mapping[str, Any]) -> None:
    refuse_unknown("[network]", arguments, _KNOWN)
    for name, value in arguments.items():
        kinds = _KNOWN[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not tuple)
            raise InputError(f"[network] {name} = {short(value)} should be of type {expected}")
        if isinstance(value, str):
            refuse_nul(f"[network] {name}", value)
    if arguments.get("autocast", "off") not in ("bf16", "fp16", "off"):
        raise InputError(f"autocast = {arguments['autocast']!r} is unknown; use bf16, fp16 or off")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        torch.empty(1, device=device)
    # What is missing decides what torch raises: RuntimeError, AssertionError, and others.
    except Exception as error:
        raise InputError(
            f"--device {device} cannot be used here ({reason(error)}); try cpu"
        ) from error
