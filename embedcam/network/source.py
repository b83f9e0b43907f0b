"""`Loaded`: a module that a library or a factory made, and what is known about it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess
from .checkpoints import load_state, read_state
from .module import message_of, user_code
from .runner import Head, Trunk
from .texts import TextTower

Foreign: TypeAlias = Any
"""An object of a library that says nothing of its types."""
Sides = tuple[int, int] | None
PathLike = str | Path | None


@dataclass
class Loaded:
    """A module in eval mode, what is known about it, and what is `said` of a choice made."""

    module: nn.Module
    layer: str | None
    preprocess: AnyPreprocess | None = None
    head: Head | None = None
    trunk: Trunk | None = None
    prefix_tokens: int | None = None
    said: str = ""
    texts: TextTower | None = None


def imported(package: str, what: str) -> ModuleType:
    """Return a package that is installed on demand."""
    try:
        return import_module(package)
    except ImportError as error:
        extra = package.replace("_", "-")
        raise NetworkError(
            f"{what} needs {extra}, which is not installed; run pip install 'embedcam[{extra}]'"
        ) from error


def made(build: Callable[[bool], Any], name: str, weights: PathLike, seed: int) -> Any:
    """Return a module pretrained, or random by a seed of its own; no generator's state changes."""
    if weights is None:
        try:
            return build(True)
        # Offline, a library may raise anything from URLError to its own kinds.
        except Exception as error:
            raise NetworkError(
                f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: "
                f"{message_of(error)}); give a file with --weights FILE, or random ones with "
                "--weights random"
            ) from error
    advice = "choose another size, or another network"
    with user_code(f"making {name}", advice=advice), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed accelerators.
        torch.default_generator.manual_seed(seed)
        return build(False)


def load_weights(module: nn.Module, weights: PathLike, dropped: list[str]) -> None:
    """Load a file into a module, its classifier dropped; None and "random" do nothing."""
    if weights is not None and weights != "random":
        load_state(module, read_state(weights), dropped, f"weights {weights}")
