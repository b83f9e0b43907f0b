"""The network and the images that options, a recipe or an index name."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._checks import check_sides
from .._options import Values, checked_values, chosen, setting
from ..errors import InputError, NetworkError, Plain, reason, short

if TYPE_CHECKING:
    from ..index import Manifest, RunEntry
    from ..network import EmbeddingNetwork
    from ..onnx import OnnxNetwork

_FILES = ("weights", "head")
_LIBRARIES = ("torchvision", "timm", "hf", "open_clip", "st")
_NAMES = f"{':NAME, '.join(_LIBRARIES)}:NAME or package.module:factory"


def sides_of(text: str) -> tuple[int, int]:
    """Return the sides that N or HxW, in pixels, stands for."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"{text!r} is not a size; give 224 or 224x320")
    return int(sides[0]), int(sides[-1])


def _sides(name: str, value: Plain) -> Plain:
    return value if type(value) is int and value > 0 else check_sides(name, value)


def _text_or_number(name: str, value: Plain) -> Plain:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{name} = {short(value)}; give a text or a whole number")
    return value


def _patterns(name: str, value: Plain) -> Plain:
    patterns = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in patterns):
        raise InputError(f"{name} = {short(value)}; give a text or a list of texts")
    return value


_text, _whole = partial(setting, None, kind=str), partial(setting, None, kind=int)
_hw = partial(setting, None, "HxW", kind=tuple, read=sides_of)


class NetworkSettings:
    """How a network is loaded: the options of a command, and a recipe's table `[network]`."""

    network: str | None = _text("NAME", _NAMES)
    weights: str | None = _text("FILE", ".safetensors or .pt file, or 'random'")
    head: str | None = _text("FILE", "affine map, safetensors weight [D K], bias")
    layer: str | None = _text("NAME", "dotted name of the layer to explain")
    normalize: bool = setting(
        True, help="leave embeddings without their L2 norm", flag="no_normalize"
    )
    size: tuple[int, int] | int | None = _hw("input side, or HxW, in pixels", check=_sides)
    resize: str | None = _text(
        help="whole picture squashed, or centre cropped", choices=("squash", "crop")
    )
    grid: tuple[int, int] | None = _hw("HxW of the layer, where it is of tokens", check=check_sides)
    prefix_tokens: int | None = _whole("N", "class and register tokens before the grid", least=0)
    device: str | None = _text("NAME", "torch device, e.g. cpu or cuda")
    autocast: str | None = _text(help="compute in half precision", choices=("bf16", "fp16", "off"))
    output: str | int | None = _text(check=_text_or_number)
    layout: str | None = _text()
    channels_last: bool | None = setting(None, kind=bool)
    seed: int = setting(0)


class ImageSettings:
    """Which images are taken: the options of a command, and a recipe's table `[images]`."""

    path: str | None = _text()
    labels: str | None = _text(
        help="where labels are; numbers: those of a CSV are numbers, near ones alike",
        choices=("auto", "folders", "subfolders", "none", "numbers"),
    )
    on_unreadable: str | None = _text(
        help="what to do with an image that cannot be read or embedded (default fail)",
        choices=("fail", "skip"),
    )
    exclude: Sequence[str] | None = _text(
        "PATTERN",
        "leave out images and folders by path or name, such as '*.gif'; may be repeated",
        repeated=True,
        check=_patterns,
    )
    max_pixels: int | None = _whole(
        "N", "of a picture; larger ones are refused unread (default 89478485)", least=1
    )


@contextmanager
def run_by(
    options: argparse.Namespace,
    network: "EmbeddingNetwork",
    earlier: "RunEntry | None" = None,
    threads: int | None = 1,
) -> "Iterator[EmbeddingNetwork]":
    """Yield a network run by torch or ONNX Runtime, as the options say or as an `earlier` run was.

    On so many `threads` a pass, None on as many as torch; ONNX Runtime's file, where one is made
    for it, is removed at the end.
    """
    if runtime_of(options, earlier) != "onnx":
        yield network
        return
    from ..export import opened_for, through_onnx

    if options.onnx is not None:
        yield opened_for(network, options.onnx, threads)
        return
    with TemporaryDirectory(prefix="embedcam-", ignore_cleanup_errors=True) as folder:
        file = os.path.join(folder, "network.onnx")
        yield through_onnx(network, file, progress=options.progress, threads=threads)


def runtime_of(options: argparse.Namespace, earlier: "RunEntry | None" = None) -> str:
    """Return what runs the forward passes; refuse, before a network is loaded, what cannot."""
    file = getattr(options, "onnx", None)
    if file is not None and options.runtime == "torch":
        raise InputError(f"--onnx {file} is run by ONNX Runtime; leave out --runtime torch")
    if file is not None:
        if not os.path.isfile(file):
            raise InputError(f"--onnx {file}: there is no such file")
        return "onnx"
    runtime = options.runtime or (earlier.runtime if earlier else "torch")
    if runtime == "onnx":
        from ..export import check_packages

        try:
            check_packages()
        except NetworkError as error:
            if options.runtime:
                raise
            raise NetworkError(
                f"the index was built by ONNX Runtime, and {error}, or give --runtime torch"
            ) from error
    return str(runtime)


def loading_of_file(path: str, asked: Mapping[str, Plain]) -> Values:
    """Return how torch loads the network of an ONNX file: as it says, but for what is `asked`."""
    from ..onnx import OnnxNetwork

    described = OnnxNetwork(path).described
    if described is None or not described.loading:
        raise InputError(
            f"{path} does not say how torch loads its network, which a build needs beside it; give "
            "--network, too"
        )
    return _loaded_again(described.loading, asked, path, "built")


def torch_network(options: argparse.Namespace, manifest: "Manifest") -> "EmbeddingNetwork":
    """Return the network of an index as the build loaded it, but for what the options say."""
    return load_named(network_of_index(manifest, chosen(options, NetworkSettings)))


def query_network(
    options: argparse.Namespace, manifest: "Manifest"
) -> "EmbeddingNetwork | OnnxNetwork":
    """Return the network a query is embedded with: from an ONNX file, or as for the build."""
    if options.onnx is None:
        return torch_network(options, manifest)
    others = [name for name in ("method", "fallback") if getattr(options, name, None)]
    flags = [f"--{name.replace('_', '-')}" for name in [*chosen(options, NetworkSettings), *others]]
    if flags:
        raise InputError(
            f"--onnx takes the whole network from {options.onnx}, without torch; leave out "
            f"{', '.join(flags).replace('--normalize', '--no-normalize')}"
        )
    from ..onnx import OnnxNetwork

    return OnnxNetwork(options.onnx)


def network_of_index(manifest: "Manifest", asked: Mapping[str, Plain]) -> Values:
    """Return how an index's network is loaded again: as for its build, but for what is `asked`."""
    if manifest.network is None:
        raise InputError(
            "this index was built from features alone and does not know its network, so pictures "
            "cannot be embedded for it; build it again with --network, or use explain_features"
        )
    return network_again(manifest.network.loading or {}, asked, "index", "built")


def network_again(
    loading: Mapping[str, Plain], asked: Mapping[str, Plain], what: str, done: str
) -> Values:
    """Return how the network of an index or a job is loaded again, but for what is `asked`.

    `what` it is, and what was `done` with the network, are for messages.
    """
    if asked.get("network", loading.get("network")) != loading.get("network"):
        return dict(asked)  # another way to the same network: layers and files have other names
    if not loading:
        raise InputError(
            f"this {what} was {done} with a network that was not loaded by name; write a function "
            "that returns it, and give --network package.module:function"
        )
    return _loaded_again(loading, asked, f"this {what}", done)


def _loaded_again(
    loading: Mapping[str, Plain], asked: Mapping[str, Plain], who: str, done: str
) -> Values:
    """Return how a network is loaded, as an index or a file says, code of its own refused."""
    name = str(loading.get("network", ""))
    if "network" not in asked and name.partition(":")[0] not in _LIBRARIES:
        raise InputError(
            f"{who} names the network {name!r}, which is code of whoever {done} it; if you "
            f"trust it, say so with --network {name}"
        )
    for option in _FILES:
        file = loading.get(option)
        known = option in asked or not isinstance(file, str) or file == "random"
        if not known and not os.path.isfile(str(file)):
            raise NetworkError(
                f"{who.replace('this', 'the', 1)} was {done} with --{option} {file}, which is not "
                f"there any more; say where it lies now with --{option} FILE"
            )
    return {**loading, **asked}


def _lasting(name: str) -> str:
    """Return a network's name with the folder in it as an absolute path."""
    library, _, folder = name.partition(":")
    if library in _LIBRARIES and os.path.isdir(place := os.path.expanduser(folder)):
        return f"{library}:{os.path.abspath(place)}"
    return name


def load_named(settings: Mapping[str, Plain]) -> "EmbeddingNetwork":
    """Load the network that settings name, or raise InputError or NetworkError."""
    arguments = checked_values(NetworkSettings, settings, "[network]")
    name = arguments.pop("network", None)
    if not name:
        raise InputError(f"no network was named; give --network {_NAMES}")
    for option in _FILES:
        # An index records the file, and is used from other folders later.
        if arguments.get(option, "random") != "random":
            arguments[option] = os.path.abspath(os.path.expanduser(arguments[option]))
    name = _lasting(name)
    own_code = name.partition(":")[0] not in _LIBRARIES
    if own_code and os.getcwd() not in sys.path and "" not in sys.path:
        # Behind all others, so that a file lying here shadows no library.
        sys.path.append(os.getcwd())
    from ..network import load_network

    if device := arguments.get("device"):
        import torch

        try:
            torch.empty(1, device=device)
        # What is missing decides what torch raises: RuntimeError, AssertionError, and others.
        except Exception as error:
            raise InputError(
                f"--device {device} cannot be used here ({reason(error)}); try cpu"
            ) from error
    return load_network(name, **arguments)
