"""`Loaded`: a module that a library or a factory made, and what is known about it."""

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess
from .checkpoints import load_state, read_state
from .module import message_of, user_code
from .runner import Head, Trunk
from .texts import TextTower

Fetched = TypeVar("Fetched")
Made = TypeVar("Made")
Foreign: TypeAlias = Any
"""An object of a library that says nothing of its types."""
Sides = tuple[int, int] | None
PathLike = str | Path | None
_NEEDED: Final = {"hf": "config.json", "st": "modules.json", "open_clip": "open_clip_config.json"}
"""What a folder of each kind has."""
_SECONDS: Final = 5.0


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

    def settings(self) -> dict[str, Foreign]:
        """Return the arguments of an `EmbeddingNetwork`."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "said"}


def imported(package: str, what: str) -> ModuleType:
    """Return a package that is installed on demand."""
    try:
        return import_module(package)
    except ImportError as error:
        extra = package.replace("_", "-")
        raise NetworkError(
            f"{what} needs {extra}, which is not installed; run pip install 'embedcam[{extra}]'"
        ) from error


def place_of(full: str) -> str:
    """Return the folder that a network's name names, or its name on the hub."""
    name = full.partition(":")[2]
    path = Path(name).expanduser()
    if path.is_dir() or not name.startswith((".", "/", "~")):
        return str(path) if path.is_dir() else name
    raise NetworkError(f"{full} names a folder that is not there; give one that holds a model")


def fetched(load: Callable[..., Fetched], full: str, what: str) -> Fetched:
    """Return what `load(local)` gives: from a folder or a cache first, else from the hub."""
    problems, (kind, _, name) = list[Exception](), full.partition(":")
    folder = Path(name).expanduser()
    for local in (True, False):
        if not local and (folder.is_dir() or not hub_answers()):
            break
        try:
            with quiet():
                return load(local)
        # What is missing or damaged decides what is raised: OSError, ValueError, KeyError, ...
        except Exception as error:
            problems.append(error)
    why = f"{type(problems[-1]).__name__}: {message_of(problems[-1])}"
    if folder.is_dir():
        lacks = not (folder / _NEEDED[kind]).exists()
        said = f"has no {_NEEDED[kind]}" if lacks else f"does not hold {what} ({why})"
        advice = "give the folder that the whole model was saved to"
        raise NetworkError(f"{full} {said}; {advice}") from problems[-1]
    why = "there is no connection to the hub" if len(problems) == 1 else why
    raise NetworkError(
        f"{what} of {full} is neither here nor could it be fetched ({why}); give the folder that "
        f"it was saved to, as in {kind}:./folder, or its name while there is a connection"
    ) from problems[-1]


def hub_answers() -> bool:
    """Return whether the hub can be connected to: its library tries for up to a minute."""
    constants: Foreign = imported("huggingface_hub.constants", "a name on the hub")
    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or address.scheme in getproxies():
        return not constants.HF_HUB_OFFLINE  # a proxy knows by itself
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), _SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_closed(closed: bool) -> Iterator[None]:
    """Have huggingface_hub take what is in its cache, which some libraries have no option for."""
    constants: Foreign = imported("huggingface_hub.constants", "a name on the hub")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = closed or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from telling what they load; what matters is told as an error."""
    root, silent, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    bars: Foreign = sys.modules.get("transformers.utils.logging")
    showing = bars is not None and bars.is_progress_bar_enabled()
    root.addHandler(silent)  # else the first message would put a handler there that stays
    logging.disable(logging.ERROR)
    if showing:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if showing:
            bars.enable_progress_bar()
        logging.disable(before)
        root.removeHandler(silent)


def made(build: Callable[[bool], Made], name: str, weights: PathLike, seed: int) -> Made:
    """Return a module pretrained, or random by a seed of its own; no generator's state changes."""
    if weights is None:
        try:
            return build(True)
        except NetworkError:
            raise
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
