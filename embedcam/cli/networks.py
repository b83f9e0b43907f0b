"""The network that the options, a recipe or an index name."""

import argparse
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..errors import InputError

_KNOWN = (
    "network", "weights", "head", "layer", "normalize", "size", "resize", "output", "layout",
    "grid", "prefix_tokens", "device", "autocast", "channels_last", "seed",
)  # fmt: skip


def network_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the network; nothing where it says nothing."""
    names = ("network", "weights", "head", "layer", "size", "resize", "device", "autocast")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.no_normalize:
        said["normalize"] = False
    return said


def named(settings: Mapping[str, Any]) -> Any:
    """Load the network.

    Raises:
        InputError: none is named, or a setting means nothing.
    """
    for name in settings:
        if name not in _KNOWN:
            near = get_close_matches(name, _KNOWN, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_KNOWN)}"
            raise InputError(f"[network] has no entry {name!r}; {hint}")
    if not settings.get("network"):
        raise InputError(
            "no network was named; give --network torchvision:NAME, timm:NAME or "
            "package.module:factory"
        )
    import torch

    from ..models import load_network

    arguments = {name: value for name, value in settings.items() if value is not None}
    for name in ("size", "grid"):
        if isinstance(arguments.get(name), list):
            arguments[name] = tuple(arguments[name])
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if isinstance(arguments.get("autocast"), str):
        arguments["autocast"] = kinds.get(arguments["autocast"])
    return load_network(str(arguments.pop("network")), **arguments)
