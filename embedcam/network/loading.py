"""`load_network`: a network by name, ready to embed and to be explained."""

import importlib
import inspect
import json
import logging
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_sides, one_of
from ..errors import InputError, NetworkError
from ..preprocess import AnyPreprocess, Preprocess, Transform, from_transform
from ..preprocess.probe import probe_inputs
from .checkpoints import read_affine
from .embedding_network import DEFAULT_INPUT_SIZE, EmbeddingNetwork
from .finding import find_explained
from .layers import LayoutName, choose_embedding, near_misses, split_reading
from .module import input_channels, lay_out, module_device, no_gradients, user_code
from .open_clip_source import from_open_clip
from .reading import at_layer, read_by
from .runner import with_positions
from .sentence_transformers_source import from_sentence_transformers
from .source import Loaded, PathLike, Sides, load_weights
from .timm_source import from_timm
from .torchvision_source import from_torchvision
from .transformers_source import from_transformers

log = logging.getLogger(__name__)

_FORMS = "torchvision:, timm:, hf:, open_clip: or st: and a name, or package.module:factory"
_SOURCES = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "hf": from_transformers,
    "open_clip": from_open_clip,
    "st": from_sentence_transformers,
}
_AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_network(
    network: str,
    *,
    weights: PathLike = None,
    head: PathLike = None,
    layer: str | None = None,
    normalize: bool = True,
    size: int | tuple[int, int] | None = None,
    resize: Literal["crop", "squash"] | None = None,
    output: str | int | None = None,
    layout: LayoutName = "auto",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    preprocess: Transform | None = None,
    device: str | torch.device | None = None,
    autocast: torch.dtype | str | None = None,
    channels_last: bool | None = None,
    seed: int = 0,
) -> EmbeddingNetwork:
    """Return a network by name, in eval mode; its embedding is the input of its classifier.

    Its `spec` are the arguments that load it again.

    Parameters
    ----------
    network
        "torchvision:NAME", "timm:NAME", "hf:NAME" of transformers, "open_clip:NAME:PRETRAINED",
        "st:NAME" of sentence-transformers, of which the last three may be folders; or
        "package.module:factory", a function without arguments that returns a module, (module,
        preprocess), or an `EmbeddingNetwork`.
    weights
        None for the library's pretrained ones (a factory: as it made them), a file (.safetensors,
        or a PyTorch checkpoint that loads with `weights_only=True`), or "random".
    head
        A `.safetensors` file with `weight [D K']` and perhaps `bias [D]`, an affine map to put
        after the embedding.
    layer
        Dotted name; found by itself but for a factory's module. "LAYER@gradeclip" or
        "LAYER@value" reads inside an attention, "@gradeclip" and "@value" inside the last one.
    size, resize
        Of the network's input, H = W or (H, W), and "crop" or "squash", how pictures are brought to
        it; default as it was trained.
    autocast
        As of `EmbeddingNetwork`, or by name: "bf16", "fp16", "off".
    preprocess
        Instead of the network's own: a `Preprocess` or any transform.
    seed
        Of random weights.
    normalize, output, layout, grid, prefix_tokens, device, channels_last
        As of `EmbeddingNetwork`; the module is moved to the device, its weights to the format.

    Raises
    ------
    NetworkError, InputError
        In one sentence, with the next step.
    """
    arguments = dict(locals())
    if isinstance(autocast, str):
        autocast = _AUTOCAST[one_of("autocast", autocast, _AUTOCAST)]
    _refuse_kinds(network, weights, head)
    source, _, name = network.partition(":")
    if not name:
        raise _no_network(network)
    sides = None
    if size is not None:
        sides = check_sides("size", (size, size) if isinstance(size, int) else size)
    if source in _SOURCES:
        loaded = _SOURCES[source](name, weights, head, sides, seed)
    else:
        product = _call_factory(source, name)
        if isinstance(product, EmbeddingNetwork):
            return _as_made(product, {**arguments, "autocast": autocast})
        loaded = _from_factory(product, network, weights, head, output)
    base, reading = split_reading(layer or "")
    layer = _chosen(loaded, layer if base else None, network)
    if layer is None:
        raise NetworkError(
            f"no default layer is known for {network}; give one with --layer (layer=)"
            f"{_layers_of(loaded, sides, output)}"
        )
    module = loaded.module.eval()
    if device is not None:
        module = module.to(device)
        if isinstance(loaded.texts, nn.Module):
            loaded.texts.to(device)
    if channels_last:
        lay_out(module, True)
    transform = from_transform(preprocess) if preprocess is not None else loaded.preprocess
    result = EmbeddingNetwork(
        module,
        layer,
        head=loaded.head,
        trunk=loaded.trunk,
        normalize=normalize,
        output=None if isinstance(module, _WithHead) else output,
        layout=layout,
        grid=grid,
        prefix_tokens=loaded.prefix_tokens if prefix_tokens is None else prefix_tokens,
        preprocess=_resized(transform, sides, resize),
        device=device,
        autocast=autocast,
        channels_last=channels_last,
        name=network,
        texts=loaded.texts,
    )
    result.owns_module = True
    if reading and not base:
        result = read_by(result, reading)
    del arguments["preprocess"], arguments["device"]
    cast = next((name for name, kind in _AUTOCAST.items() if kind and kind == autocast), None)
    spec = {**arguments, "layer": result.layer, "size": sides, "autocast": cast}
    # As it will come back from JSON: paths as texts, tuples as lists.
    result.spec = json.loads(json.dumps(spec, default=str))
    return result


def _refuse_kinds(network: str, weights: PathLike, head: PathLike) -> None:
    if not isinstance(network, str):
        raise InputError(
            f"network is a {type(network).__name__}; expected {_FORMS}, or "
            "EmbeddingNetwork(module, layer) for a module that is there already"
        )
    for what, file in (("weights", weights), ("head", head)):
        if not isinstance(file, str | Path | None):
            raise InputError(f"{what} is a {type(file).__name__}; expected the path of a file")


def _chosen(loaded: Loaded, layer: str | None, network: str) -> str | None:
    """Return the layer that was asked for, or the one known of a network, if any is."""
    if layer is not None and layer != loaded.layer:
        loaded.head = loaded.trunk = None
        return layer
    if loaded.said:
        log.info("%s: %s", network, loaded.said)
    return loaded.layer


def _no_network(network: str) -> NetworkError:
    from torchvision import models

    package, _, function = network.rpartition(".")
    advice = f"give {_FORMS}"
    if package and find_spec(package.partition(".")[0]) is not None:
        advice = f"write {package}:{function}, with a colon before the function"
    else:
        known = [f"torchvision:{name}" for name in models.list_models(module=models)]
        advice += near_misses(f"torchvision:{network}", known, 2)
    return NetworkError(f"{network!r} is not a network; {advice}")


def _resized(
    preprocess: AnyPreprocess | None, sides: Sides, resize: Literal["crop", "squash"] | None
) -> AnyPreprocess | None:
    """Return a preprocessing at another size, the share that a crop cuts off kept."""
    if sides is None and resize is None:
        return preprocess
    if not isinstance(preprocess, Preprocess):
        raise InputError(
            "size and resize change the network's preprocessing, and none is known; give "
            "preprocess=, or let the function for it return (module, Preprocess.imagenet(224))"
        )
    return preprocess.sized(sides or preprocess.size, resize)


# A function of the user's


class _WithHead(nn.Module):
    """A network with an affine map after its embedding; `module` as other wrappers call it."""

    def __init__(self, module: nn.Module, head: nn.Linear, output: str | int | None) -> None:
        super().__init__()
        self.training = module.training
        self.module, self.embedding_head, self.output = module, head, output

    def forward(self, images: Tensor) -> Tensor:
        # Batches are told apart by the embedding: a layer's replaced output may hold more images.
        output: Tensor = self.embedding_head(
            choose_embedding(self.module(images), self.output, None)
        )
        return output


def _call_factory(source: str, name: str) -> Any:
    with user_code(f"importing {source}", advice="import it by itself to see the whole of it"):
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise  # it is there, and something that it imports is not
            raise NetworkError(
                f"{source!r} cannot be imported ({error}); expected {_FORMS}, the package "
                f"installed or on PYTHONPATH{near_misses(source, ['torchvision', 'timm'], 1)}"
            ) from error
    try:
        target = attrgetter(name)(module)
    except AttributeError:
        public = [known for known in dir(module) if not known.startswith("_")]
        raise NetworkError(f"{source} has no {name!r}{near_misses(name, public)}") from None
    if not callable(target):
        raise NetworkError(f"{source}:{name} is a {type(target).__name__}; expected a function")
    with user_code(f"{source}:{name}", advice="call it by itself to see the whole of it"):
        return target()


def _as_made(product: EmbeddingNetwork, arguments: dict[str, Any]) -> EmbeddingNetwork:
    """Return a factory's own `EmbeddingNetwork`, which settles everything by itself."""
    network, device, layer = arguments.pop("network"), arguments["device"], arguments["layer"]
    if "@" in str(layer):  # what is read inside an attention of it is another question
        arguments["layer"] = None
        base, reading = split_reading(str(layer))
        product = at_layer(product, str(layer)) if base else read_by(product, reading)
    if device is not None and torch.device(device) == product.device:
        arguments["device"] = None
    defaults = inspect.signature(load_network).parameters
    given = [name for name, value in arguments.items() if value != defaults[name].default]
    if settled := sorted({*given} - {"seed"}):
        raise InputError(
            f"{network} returns an EmbeddingNetwork, which settles {', '.join(settled)} itself; "
            "set it there, or return the module"
        )
    product.spec = {"network": network}
    if split_reading(product.layer)[1]:
        product.spec["layer"] = product.layer
    return product


def _from_factory(
    product: Any, network: str, weights: PathLike, head: PathLike, output: str | int | None
) -> Loaded:
    pair = isinstance(product, tuple) and len(product) == 2
    module, preprocess = product if pair else (product, None)
    if not isinstance(module, nn.Module):
        raise NetworkError(
            f"{network} returned {type(product).__name__}; expected a torch.nn.Module, (module, "
            "preprocess) or an EmbeddingNetwork"
        )
    load_weights(module, weights, [])
    transform = None if preprocess is None else from_transform(preprocess)
    if head is not None:
        module = _WithHead(module, read_affine(head, None), output)
    return Loaded(module, None, transform)


def _layers_of(loaded: Loaded, sides: Sides, output: str | int | None) -> str:
    """Return the layer that explains a module, or where none is found its last ones, in words."""
    module = loaded.module.eval()
    size = sides or DEFAULT_INPUT_SIZE
    picture = torch.from_numpy(probe_inputs(1, loaded.preprocess, size, input_channels(module))).to(
        module_device(module)
    )
    output = None if isinstance(module, _WithHead) else output
    if (found := find_explained(module, picture, output)) is not None:
        return f", for instance {found.layer!r}, where its positions last count"
    with no_gradients():
        names = with_positions(module, picture)
    names = (names or [name for name, _ in module.named_modules() if name])[-4:]
    return f", for instance {names[-1]!r}, the last of {', '.join(names)}" if names else ""
