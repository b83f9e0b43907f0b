"""Options that several commands have."""

import argparse
from typing import Any

from .values import amount, option, path, positive, share, size, whole


def network_options(one: argparse.ArgumentParser) -> None:
    """Which network, and how it is loaded."""
    group = one.add_argument_group("network")
    group.add_argument(
        "--network", metavar="NAME", help="torchvision:NAME, timm:NAME or package.module:factory"
    )
    group.add_argument("--weights", metavar="FILE", help=".safetensors or .pt file, or 'random'")
    group.add_argument("--head", metavar="FILE", help="affine map, safetensors weight [D K], bias")
    group.add_argument("--layer", metavar="NAME", help="dotted name of the layer to explain")
    group.add_argument(
        "--no-normalize", action="store_true", help="leave embeddings without their L2 norm"
    )
    group.add_argument("--size", type=size, metavar="HxW", help="input side, or HxW, in pixels")
    group.add_argument(
        "--resize", choices=("squash", "crop"), help="whole picture squashed, or centre cropped"
    )
    group.add_argument(
        "--grid", type=size, metavar="HxW", help="HxW of the layer, where it is of tokens"
    )
    group.add_argument(
        "--prefix-tokens", type=whole, metavar="N", help="class and register tokens before the grid"
    )
    group.add_argument("--device", metavar="NAME", help="torch device, e.g. cpu or cuda")
    group.add_argument(
        "--autocast", choices=("bf16", "fp16", "off"), help="compute in half precision"
    )


def work_options(one: argparse.ArgumentParser) -> None:
    """How the work is done."""
    group = one.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=positive, metavar="N", default=32, help="images a pass (default 32)"
    )
    group.add_argument("--workers", type=whole, metavar="N", help="threads that decode images")
    group.add_argument(
        "--on-unreadable",
        choices=("fail", "skip"),
        help="what to do with an image that cannot be read or embedded (default fail)",
    )
    group.add_argument(
        "--scratch-gb",
        type=amount,
        metavar="GB",
        default=50.0,
        help="disk for activations kept meanwhile (default 50)",
    )


def found_options(one: Any) -> None:
    """Which images of a folder or a CSV are taken."""
    one.add_argument(
        "--exclude",
        metavar="PATTERN",
        action="append",
        help="leave out images and folders by path or name, such as '*.gif'; may be repeated",
    )


def pixel_options(one: Any) -> None:
    """How large a picture may be."""
    one.add_argument(
        "--max-pixels",
        metavar="N",
        type=positive,
        help="of a picture; larger ones are refused unread (default 89478485)",
    )


def label_options(one: Any, whose: str = "") -> None:
    """Where labels come from, and what they are."""
    one.add_argument(
        "--labels",
        choices=("auto", "folders", "subfolders", "none", "numbers"),
        help=f"{whose}where labels are; numbers: those of a CSV are numbers, near ones alike",
    )


def online_options(one: argparse.ArgumentParser) -> None:
    """Where queries and their results come from."""
    one.add_argument("--images", metavar="FOLDER", help="where the indexed images lie now")
    one.add_argument(
        "--onnx",
        metavar="FILE",
        type=path,
        help="the network as `embedcam export` wrote it, run without torch",
    )


def transfer_options(one: argparse.ArgumentParser) -> None:
    """How weights are transferred, and from when they are trusted."""
    one.add_argument(
        "--transfer",
        choices=("mean", "distance"),
        default="mean",
        help="how neighbours count (default mean)",
    )
    one.add_argument(
        "--trusted-from",
        type=share,
        metavar="T",
        help="correlation that nine in ten such maps must reach to count as trusted (default 0.5)",
    )
    one.add_argument(
        "--fallback",
        action="store_true",
        help="where the transfer is not trusted, compute the weights on the query itself",
    )


def index_options(one: argparse.ArgumentParser) -> None:
    """The index."""
    one.add_argument("index", metavar="INDEX", type=path, help="folder of the index")


def method_options(group: Any) -> None:
    """Choices of a method."""
    group.add_argument(
        "--fill",
        metavar="WHAT",
        help="what a masking method puts in place of masked pixels: mean (default), black or blur",
    )
    group.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=option,
        action="append",
        help="an option of the method, such as samples=50; may be repeated",
    )
