"""What a network hands back, read: which tensor is the embedding, and how activations are laid out.

A layer's output is `[B K H W]` ("bkhw", most CNNs), `[B H W K]` ("bhwk", Swin), tokens `[B T K]`
("btk", ViT; "tbk" and "bkt" in another order), whose class and register tokens come first, or
`[B K L]` ("bkl", 1-D convolutions over signals, tables and text). Everything else in the package
sees `[B K H W]`, with H = 1 for "bkl".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NetworkError
from .failures import own_failures

LayoutName = Literal["auto", "bkhw", "bhwk", "btk", "tbk", "bkt", "bkl"]
OutputChoice = str | int | Callable[[Any], Tensor] | None

LAYOUTS = ("auto", "bkhw", "bhwk", "btk", "tbk", "bkt", "bkl")
# How to bring tokens to [B T K]; each order is its own inverse.
_ORDERS = {"btk": (0, 1, 2), "tbk": (1, 0, 2), "bkt": (0, 2, 1)}
# Class token, register tokens and a distillation token: no published network has more.
MAX_PREFIX = 16
# What transformers' models of one tower return.
_POOLED, _UNPOOLED = "pooler_output", ("last_hidden_state", "hidden_states", "attentions")
_OUTPUT = "give a function that takes what the network returns and gives the embedding [B D]"


@dataclass(frozen=True)
class Layout:
    """How one layer's output is laid out.

    kind: one of `LAYOUTS` but "auto"; grid: (H, W) of the positions; prefix: tokens before the
    grid's.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def tokens(self) -> bool:
        """Whether the positions are tokens."""
        return self.kind in _ORDERS

    def to_maps(self, raw: Tensor) -> Tensor:
        """`[B K H W]` of a layer's output (or of its gradient); prefix tokens are left out."""
        if self.kind == "bkhw":
            return raw
        if self.kind == "bhwk":
            return raw.permute(0, 3, 1, 2)
        if self.kind == "bkl":
            return raw[:, :, None]
        tokens = raw.permute(_ORDERS[self.kind])[:, self.prefix :]
        # The shape, not len(): an exporter follows a batch of any size through it.
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.grid)

    def to_raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """The layer's output with these `[B K H W]` in it; prefix tokens are those of `like`."""
        if self.kind == "bkhw":
            return maps
        if self.kind == "bhwk":
            return maps.permute(0, 2, 3, 1)
        if self.kind == "bkl":
            return maps[:, :, 0]
        order = _ORDERS[self.kind]
        tokens = maps.flatten(2).transpose(1, 2)
        if self.prefix:
            prefix = like.permute(order)[:, : self.prefix].expand(len(maps), -1, -1)
            tokens = torch.cat([prefix, tokens], dim=1)
        return tokens.permute(order)

    def one_cell(self, pooled: Tensor) -> Tensor:
        """The layer's output if its grid had one position, holding `pooled` `[B K]`."""
        one = Layout(self.kind, (1, 1))
        return one.to_raw(pooled[:, :, None, None], pooled[:, None, :])


def resolve(
    raw: Tensor,
    images: Tensor,
    kind: str = "auto",
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    layer: str = "layer",
) -> Layout:
    """The layout of a layer's output, checked against what the user said about it.

    Args:
        raw: the layer's output.
        images: the network's input, `[B C H W]`: its shape tells grids from channels.
        kind: one of `LAYOUTS`.
        grid: (H, W) of the tokens, when it cannot be found from the input's shape.
        prefix: number of tokens before the grid's.
        layer: the layer's name, for messages.

    Raises:
        NetworkError: the output cannot be read as activations.
    """
    shape = tuple(raw.shape)
    if raw.ndim not in (3, 4):
        raise NetworkError(
            f"layer {layer!r} returned a tensor {list(shape)}; expected [B K H W], [B H W K] or "
            "tokens [B T K]: choose a layer before the pooling"
        )
    if shape[1 if kind == "tbk" else 0] != len(images):
        raise NetworkError(
            f"layer {layer!r} returned {list(shape)} for a batch of {len(images)}; expected the "
            "batch as first dimension: choose a layer that keeps images apart, or say "
            "layout='tbk' of tokens that come before it"
        )
    if kind == "bkl":
        return _positions(shape, grid, prefix, layer)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    if kind == "auto":
        kind = "btk" if raw.ndim == 3 else _four_dimensional(shape, size)
    if (kind in _ORDERS) != (raw.ndim == 3):
        expected = "three dimensions" if kind in _ORDERS else "four dimensions"
        raise NetworkError(
            f"layer {layer!r} returned {list(shape)}, but layout={kind!r} says {expected}; "
            'leave layout="auto" or choose another layer'
        )
    if kind in _ORDERS:
        count = shape[_ORDERS[kind].index(1)]
        return replace(_tokens(count, size, grid, prefix, layer), kind=kind)
    found = shape[1:3] if kind == "bhwk" else shape[2:4]
    if grid is not None and tuple(grid) != found:
        raise NetworkError(
            f"layer {layer!r} returned {list(shape)}, read as {kind} with a grid of "
            f"{_by(found)}, but grid={_by(grid)} was given; leave grid= out or set layout="
        )
    return Layout(kind, (found[0], found[1]))


def axes_told(
    shapes: tuple[Sequence[int], Sequence[int]],
    batches: tuple[int, int],
    size: tuple[int, int],
    layer: str,
) -> str:
    """The layout that a layer shows by its outputs for two inputs of other sizes and batches.

    Args:
        shapes: of the two outputs; the second may be empty, where the network took no other size.
        batches: how many inputs each was for.
        size: (H, W) of the first input.
        layer: its name, for messages.

    Returns:
        A layout, or "auto" where the answers do not tell and the first shape alone does.

    Raises:
        NetworkError: neither tells.
    """
    first, second = shapes
    if len(second) == len(first):
        moved = {place for place in range(1, len(first)) if first[place] != second[place]}
        batch = {place for place in (0, 1) if (first[place], second[place]) == batches}
        if len(first) == 3 and 0 not in batch and 1 in batch:
            return "tbk"
        told = {(3, 1): "btk", (3, 2): "bkt", (4, 3): "bkhw", (4, 1): "bhwk"}
        # Axis 2 of four is a side either way; the other side tells, and channels never move.
        found = [told[len(first), place] for place in moved if (len(first), place) in told]
        if 0 in batch and len(found) == 1:
            return found[0]
    if len(first) == 4 and _same_aspect(first[1:3], size) and _same_aspect(first[2:4], size):
        raise NetworkError(
            f"layer {layer!r} returned {list(first)} for an input {_by(size)} and takes no other "
            "size, so its channels cannot be told from its positions; say layout='bkhw' or 'bhwk'"
        )
    return "auto"


def smaller(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of about half: as it comes, and in steps that networks ask for."""
    found: list[tuple[int, int]] = []
    for step in (1, 32, 14):
        half = tuple(-(-side // (2 * step)) * step for side in size)
        fits = all(side % step == 0 for side in size) and half != tuple(size)
        if fits and half not in found:
            found.append((half[0], half[1]))
    return found


def _positions(
    shape: tuple[int, ...], grid: tuple[int, int] | None, prefix: int | None, layer: str
) -> Layout:
    if len(shape) != 3 or grid is not None or prefix is not None:
        raise NetworkError(
            f"layer {layer!r} returned {list(shape)}, but layout='bkl' says [B K L], channels over "
            "positions, without grid= or prefix_tokens="
        )
    return Layout("bkl", (1, shape[2]))


def _four_dimensional(shape: tuple[int, ...], size: tuple[int, int]) -> str:
    """ "bhwk" where only the middle dimensions have the input's aspect, else "bkhw"."""
    channels_last = _same_aspect(shape[1:3], size) and not _same_aspect(shape[2:4], size)
    return "bhwk" if channels_last else "bkhw"


def _same_aspect(grid: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether the grid is the input's, divided by one stride, give or take one cell."""
    (h, w), (height, width) = grid, size
    if h > height or w > width:
        return False
    return abs(h - w * height / width) <= 1 or abs(w - h * width / height) <= 1


def _tokens(
    count: int,
    size: tuple[int, int],
    grid: tuple[int, int] | None,
    prefix: int | None,
    layer: str,
) -> Layout:
    if grid is not None:
        h, w = grid
        found = count - h * w
        if found < 0 or (prefix is not None and found != prefix):
            said = "" if prefix is None else f" and prefix_tokens={prefix}"
            raise NetworkError(
                f"layer {layer!r} returned {count} tokens, but grid={_by(grid)}{said} makes "
                f"{h * w + (prefix or 0)}; correct grid= or prefix_tokens="
            )
        return Layout("btk", (h, w), found)
    prefixes = range(min(MAX_PREFIX + 1, count)) if prefix is None else [prefix]
    for exact in (True, False):
        for candidate in prefixes:
            cells = _grid(count - candidate, size, exact)
            if cells is not None:
                return Layout("btk", cells, candidate)
    said = "" if prefix is None else f" after {prefix} prefix tokens"
    raise NetworkError(
        f"the {count} tokens of layer {layer!r}{said} fit no grid of a {_by(size)} input; "
        "give grid=(H, W), and prefix_tokens= if the network has class or register tokens"
    )


def _grid(cells: int, size: tuple[int, int], exact: bool) -> tuple[int, int] | None:
    """(h, w) with h w = cells that square patches cut out of the input, rounding unless `exact`."""
    height, width = size
    for h in range(1, cells + 1):
        if cells % h:
            continue
        w = cells // h
        if exact:
            if h * width == w * height and height % h == 0:
                return h, w
            continue
        for patch in {height // h, -(-height // h), width // w, -(-width // w)} - {0}:
            down, up = (height // patch, width // patch), (-(-height // patch), -(-width // patch))
            if (h, w) in (down, up):
                return h, w
    return None


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in size)


def first_tensor(output: Any, layer: str) -> Tensor:
    """A layer's activations: its output, or the first tensor of a tuple, list or dict.

    Raises:
        NetworkError: no tensor, or one that is not of real numbers.
    """
    values = [output] if isinstance(output, Tensor) else _values(output) or []
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise NetworkError(
            f"layer {layer!r} returned {type(output).__name__}; expected a tensor, or a tuple, "
            "list or dict with a tensor in it: choose a layer inside or after it"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(found):
        raise NetworkError(
            f"layer {layer!r} runs inside torch.vmap, where its activations cannot be kept; choose "
            "a layer outside of it, or give a module that takes the whole batch at once"
        )
    if not found.is_floating_point() or found.layout != torch.strided:
        raise NetworkError(
            f"layer {layer!r} returned a tensor of {_numbers(found)}; expected real numbers in "
            "floating point: choose a layer before or after it"
        )
    return found


def _numbers(tensor: Tensor) -> str:
    """ "complex64", or "sparse_coo float32"."""
    kinds = (tensor.layout, tensor.dtype) if tensor.layout != torch.strided else (tensor.dtype,)
    return " ".join(str(kind).removeprefix("torch.") for kind in kinds)


def replace_first(output: Any, tensor: Tensor) -> Any:
    """The same output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        changed: Any = type(output)(**output) if dataclasses.is_dataclass(output) else {**output}
        changed[next(key for key, value in output.items() if isinstance(value, Tensor))] = tensor
        return changed
    items = list(output)
    items[next(i for i, value in enumerate(items) if isinstance(value, Tensor))] = tensor
    if hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)


def _values(output: Any) -> list[Any] | None:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else None


def choose_embedding(output: Any, choice: OutputChoice, batch: int | None) -> Tensor:
    """The embedding `[B D]` in what a network's forward returned.

    Args:
        output: a tensor, tuple, list, dict or dataclass.
        choice: None takes a tensor, the first of a tuple, the only one of a dict or dataclass, or
            `pooler_output` beside `last_hidden_state`;
            a str is a key or attribute, an int a position, a callable gets the output.
        batch: B, or None where any will do.

    Raises:
        NetworkError: nothing there, or not one vector an image.
    """
    value = _chosen(output, choice)
    if not isinstance(value, Tensor):
        by = "the network" if choice is None else f"output={describe_choice(choice)!r}"
        raise NetworkError(
            f"{by} returned {type(value).__name__}; expected the embedding, a tensor [B D]"
        )
    if value.is_complex() or value.layout != torch.strided:
        raise NetworkError(
            f"the network's output is a tensor of {_numbers(value)}; expected an embedding of real "
            "numbers, such as output=lambda out: "
            f"{'torch.view_as_real(out).flatten(1)' if value.is_complex() else 'out.to_dense()'}"
        )
    if value.ndim > 2 and all(side == 1 for side in value.shape[2:]):
        value = value.flatten(1)
    if value.ndim != 2 or value.shape[1] == 0 or (batch and value.shape[0] != batch):
        given = "" if batch is None else f" for a batch of {batch}"
        raise NetworkError(
            f"the network's output is {list(value.shape)}{given}; expected an "
            "embedding [B D]: choose it with output=, a name, a position or a function such as "
            "lambda out: out.last_hidden_state[:, 0]"
        )
    return value


def _chosen(output: Any, choice: OutputChoice) -> Any:
    if choice is None and isinstance(output, Tensor):
        return output
    if callable(choice):
        with own_failures(f"output={describe_choice(choice)}", advice=_OUTPUT):
            return choice(output)
    named = _named(output)
    if isinstance(choice, str):
        if isinstance(output, Mapping) and choice in output:
            return output[choice]
        if not isinstance(output, Tensor) and getattr(output, choice, None) is not None:
            return getattr(output, choice)
        listed = ", ".join(named or ()) or "no names"
        raise NetworkError(
            f"output={choice!r} is not in what the network returned "
            f"({type(output).__name__} with {listed})"
        )
    if isinstance(choice, int):
        values = [output] if isinstance(output, Tensor) else _values(output) or []
        if not -len(values) <= choice < len(values):
            raise NetworkError(
                f"output={choice} is beyond the {len(values)} values that the network returned"
            )
        return values[choice]
    if named is not None:
        if len(named) == 1:
            return next(iter(named.values()))
        if _POOLED in named and set(named) <= {_POOLED, *_UNPOOLED}:
            return named[_POOLED]
        # Of several, the first that is one vector an image.
        likely = [name for name, value in named.items() if value.ndim == 2] or [*named, ""]
        raise NetworkError(
            f"the network returned {type(output).__name__} with {', '.join(named)}; say which is "
            f"the embedding, e.g. output={likely[0]!r}"
        )
    return output[0] if isinstance(output, tuple | list) and output else output


def _named(output: Any) -> dict[str, Tensor] | None:
    """The tensors of a dict or dataclass by name; None for what has no names."""
    if isinstance(output, Mapping):
        items = {str(key): value for key, value in output.items()}
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        return None
    return {name: value for name, value in items.items() if isinstance(value, Tensor)}


def describe_choice(choice: OutputChoice) -> str | int | None:
    """`output=` as something JSON can hold: a callable by its name."""
    if callable(choice):
        return getattr(choice, "__qualname__", type(choice).__name__)
    return choice


def check_options(
    layout: str, grid: tuple[int, int] | None, prefix: int | None, output: OutputChoice
) -> None:
    """Refuse options that no layer's output could ever fit.

    Raises:
        InputError: with what was given and what is possible.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r} is not known; give one of {', '.join(LAYOUTS)}")
    if grid is not None and not is_pair(grid):
        raise InputError(f"grid={grid!r} is not a grid; give (H, W), both at least 1")
    if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int)):
        raise InputError(f"prefix_tokens={prefix!r}; give a whole number of tokens, or None")
    if prefix is not None and prefix < 0:
        raise InputError(f"prefix_tokens={prefix} is negative; give 0 or more")
    if not (output is None or isinstance(output, str | int) or callable(output)):
        raise InputError(
            f"output={output!r} cannot choose an embedding; give a name, a position or a function"
        )


def is_pair(value: Any) -> bool:
    """Whether a value is (H, W), both whole and at least 1."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in value)
    )


def check_images(images: np.ndarray | Tensor, positions: bool = False) -> Tensor:
    """A batch of preprocessed images as a tensor `[B C H W]` of floats.

    Args:
        images: the batch.
        positions: expect signals `[B C L]`, tables `[B L]` or the numbers of words `[B L]` instead.

    Raises:
        InputError: another shape, none at all, or pixels that were never preprocessed.
    """
    if isinstance(images, np.ndarray):
        # torch warns about arrays it could write to though it should not.
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if positions:
        if not isinstance(images, Tensor) or images.ndim not in (2, 3) or 0 in images.shape:
            given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"the input is {given}; layout='bkl' expects signals [B C L], tables [B L] or the "
                "numbers of words [B L], at least one"
            )
        return images
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"images are {given}; expected preprocessed images [B 3 H W], at least one: add the "
            "batch dimension to a single image"
        )
    if not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype}; expected preprocessed floats: apply the network's "
            "preprocess first"
        )
    return images
