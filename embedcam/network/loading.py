"""`load_network`: a network by name, ready to embed and to be explained."""

import importlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, NetworkError
from ..preprocess import CustomPreprocess, Preprocess, from_transform
from ..preprocess.probe import probe_inputs
from .checkpoints import load_state, read_affine, read_state
from .embedding_network import EmbeddingNetwork
from .failures import own_failures
from .layers import near_misses
from .layouts import LayoutName, choose_embedding, is_pair
from .libraries import PARTS_LAYER, Loaded, Weights, from_timm, from_torchvision
from .state import input_channels, module_device, no_gradients
from .tap import with_positions

Size = int | tuple[int, int] | None

_FORMS = "torchvision:NAME, timm:NAME or package.module:factory"


class _WithHead(nn.Module):
    """A network with an affine map after its embedding; `module` as other wrappers call it."""

    def __init__(self, module: nn.Module, head: nn.Linear, output: str | int | None) -> None:
        super().__init__()
        self.training = module.training
        self.module, self.embedding_head, self.output = module, head, output

    def forward(self, images: Tensor) -> Tensor:
        # Batches are told apart by the embedding: a layer's replaced output may hold more images.
        return self.embedding_head(choose_embedding(self.module(images), self.output, None))


_AUTOCAST_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _autocast(name: str) -> torch.dtype | None:
    known = {"off": None, **{short: dtype for dtype, short in _AUTOCAST_NAMES.items()}}
    if name not in known:
        raise InputError(f"autocast = {name!r} is unknown; use 'bf16', 'fp16' or 'off'")
    return known[name]


def load_network(
    network: str,
    *,
    weights: Weights = None,
    head: str | Path | None = None,
    layer: str | None = None,
    normalize: bool = True,
    size: Size = None,
    resize: Literal["crop", "squash"] | None = None,
    output: str | int | None = None,
    layout: LayoutName = "auto",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    preprocess: Any = None,
    device: str | torch.device | None = None,
    autocast: torch.dtype | str | None = None,
    channels_last: bool = False,
    seed: int = 0,
) -> EmbeddingNetwork:
    """A network by name; its embedding is the input of its classifier.

    Args:
        network: "torchvision:NAME", "timm:NAME", or "package.module:factory", a function without
            arguments that returns a module, (module, preprocess), or an `EmbeddingNetwork`.
        weights: None for the library's pretrained ones (a factory: as it made them), a file
            (.safetensors, or a PyTorch checkpoint that loads with `weights_only=True`), or
            "random".
        head: a `.safetensors` file with `weight [D K']` and perhaps `bias [D]`, an affine map to
            put after the embedding.
        layer: dotted name of the layer to explain; known for torchvision's common families and
            timm's.
        normalize: L2-normalise the embedding.
        size: of the network's input, H = W or (H, W); default as it was trained.
        resize: "crop" or "squash", how pictures are brought to that size; default as trained.
        output, layout, grid, prefix_tokens, channels_last: as of `EmbeddingNetwork`.
        autocast: as of `EmbeddingNetwork`, or by name: "bf16", "fp16", "off".
        preprocess: instead of the network's own: a `Preprocess` or any transform.
        device: where to put it.
        seed: of random weights.

    Returns:
        The network in eval mode; its `spec` are the arguments that load it again.

    Raises:
        NetworkError, InputError: in one sentence, with the next step.
    """
    if isinstance(autocast, str):
        autocast = _autocast(autocast)
    if not isinstance(network, str):
        raise InputError(
            f"network is a {type(network).__name__}; expected {_FORMS}, or "
            "EmbeddingNetwork(module, layer) for a module that is there already"
        )
    for what, file in (("weights", weights), ("head", head)):
        if not isinstance(file, str | Path | None):
            raise InputError(f"{what} is a {type(file).__name__}; expected the path of a file")
    source, _, name = network.partition(":")
    if not name:
        from torchvision import models

        package, _, function = network.rpartition(".")
        if package and find_spec(package.partition(".")[0]) is not None:
            raise NetworkError(
                f"{network!r} is not a network; write {package}:{function}, with a colon before "
                "the function"
            )
        known = [f"torchvision:{known}" for known in models.list_models(module=models)]
        raise NetworkError(
            f"{network!r} is not a network; give {_FORMS}"
            f"{near_misses(f'torchvision:{network}', known, 2)}"
        )
    sides = _sides(size)
    if source == "torchvision":
        loaded = from_torchvision(name, weights, head, sides, seed)
    elif source == "timm":
        loaded = from_timm(name, weights, head, sides, seed)
    else:
        made = _call_factory(source, name)
        if isinstance(made, EmbeddingNetwork):
            moved = None if device is None or torch.device(device) == made.device else device
            return _as_made(
                made, network, weights=weights, head=head, layer=layer, size=size, resize=resize,
                output=output, layout=None if layout == "auto" else layout, grid=grid,
                prefix_tokens=prefix_tokens, preprocess=preprocess, autocast=autocast,
                normalize=None if normalize else False, channels_last=channels_last or None,
                device=moved,
            )  # fmt: skip
        loaded = _from_factory(made, network, weights, head, output)
    if loaded.trunk is not None and layer in (None, PARTS_LAYER):
        layer = PARTS_LAYER
    elif layer is not None and layer != loaded.layer:
        loaded.head = loaded.trunk = None
    if layer is None and loaded.layer is None:
        raise NetworkError(
            f"no default layer is known for {network}; give one with --layer (layer=)"
            f"{_last_layers(loaded, sides)}"
        )
    module = loaded.module.eval()
    if device is not None:
        module = module.to(device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    own = from_transform(preprocess) if preprocess is not None else loaded.preprocess
    made_network = EmbeddingNetwork(
        module,
        layer or loaded.layer or "",
        head=loaded.head,
        trunk=loaded.trunk,
        normalize=normalize,
        output=None if isinstance(module, _WithHead) else output,
        layout=layout,
        grid=grid,
        prefix_tokens=loaded.prefix_tokens if prefix_tokens is None else prefix_tokens,
        preprocess=_resized(own, sides, resize),
        device=device,
        autocast=autocast,
        channels_last=channels_last,
        name=network,
    )
    made_network.spec = {
        "network": network,
        "weights": None if weights is None else str(weights),
        "head": None if head is None else str(head),
        "layer": made_network.layer,
        "normalize": normalize,
        "size": None if sides is None else list(sides),
        "resize": resize,
        "output": output,
        "layout": layout,
        "grid": None if grid is None else list(grid),
        "prefix_tokens": prefix_tokens,
        "autocast": None if autocast is None else _AUTOCAST_NAMES[autocast],
        "channels_last": channels_last,
        "seed": seed,
    }
    return made_network


def _sides(size: Any) -> tuple[int, int] | None:
    """(H, W) of a size given as one number, a pair, or not at all."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    if not is_pair(sides):
        raise InputError(f"size={size!r} is not a size; give one number of pixels, or (H, W)")
    return sides[0], sides[1]


def _resized(
    preprocess: Preprocess | CustomPreprocess | None,
    size: tuple[int, int] | None,
    resize: Literal["crop", "squash"] | None,
) -> Preprocess | CustomPreprocess | None:
    """The network's preprocessing at another size, the share that a crop cuts off kept."""
    if size is None and resize is None:
        return preprocess
    if not isinstance(preprocess, Preprocess):
        raise InputError(
            "size and resize change the network's own preprocessing, and it has none that is "
            "known; leave them out and give preprocess=, or let the function that makes it return "
            "(module, Preprocess.imagenet(224))"
        )
    old, size = preprocess, (size[0], size[1]) if size is not None else preprocess.size
    mode = resize or old.resize
    if mode == "squash":
        return replace(old, size=size, resize=mode, resize_to=None)
    share = old.resize_to / min(old.size) if old.resize_to is not None else 256 / 224
    return replace(old, size=size, resize=mode, resize_to=round(min(size) * share))


# -------------------------------------------------------------------- a function of the user's


def _call_factory(source: str, name: str) -> Any:
    with own_failures(f"importing {source}", advice="import it by itself to see the whole of it"):
        try:
            found: Any = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise  # it is there, and something that it imports is not
            raise NetworkError(
                f"{source!r} cannot be imported ({error}); expected {_FORMS}, the package "
                f"installed or on PYTHONPATH{near_misses(source, ['torchvision', 'timm'], 1)}"
            ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise NetworkError(f"{source} has no {name!r}{near_misses(name, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise NetworkError(f"{source}:{name} is a {type(found).__name__}; expected a function")
    with own_failures(f"{source}:{name}", advice="call it by itself to see the whole of it"):
        return found()


def _as_made(made: EmbeddingNetwork, network: str, **given: Any) -> EmbeddingNetwork:
    """A factory's own `EmbeddingNetwork`, which settles everything by itself."""
    settled = sorted(key for key, value in given.items() if value is not None)
    if settled:
        raise InputError(
            f"{network} returns an EmbeddingNetwork, which settles {', '.join(settled)} itself; "
            "set it there, or return the module"
        )
    made.spec = {"network": network}
    return made


def _from_factory(
    made: Any, network: str, weights: Weights, head: str | Path | None, output: str | int | None
) -> Loaded:
    module, preprocess = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise NetworkError(
            f"{network} returned {type(made).__name__}; expected a torch.nn.Module, (module, "
            "preprocess) or an EmbeddingNetwork"
        )
    if weights not in (None, "random"):
        assert weights is not None
        load_state(module, read_state(weights), [], f"weights {weights}")
    own = None if preprocess is None else from_transform(preprocess)
    if head is not None:
        module = _WithHead(module, read_affine(head, None), output)
    return Loaded(module, None, own)


def _last_layers(loaded: Loaded, size: tuple[int, int] | None) -> str:
    """The last layers that return maps of several positions, or the last of all if none is met."""
    module = loaded.module.eval()
    channels = input_channels(module)
    picture = torch.from_numpy(probe_inputs(1, loaded.preprocess, size or (224, 224), channels))
    with no_gradients():
        names = with_positions(module, picture.to(module_device(module)))
    names = (names or [name for name, _ in module.named_modules() if name])[-4:]
    return f", for instance {names[-1]!r}, the last of {', '.join(names)}" if names else ""
