"""`load_network`: a network by name, ready to embed and to be explained."""

import importlib
import inspect
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
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
from .checkpoints import load_state, read_affine, read_state
from .embedding_network import DEFAULT_INPUT_SIZE, EmbeddingNetwork
from .layers import LayoutName, Output, choose_embedding, near_misses
from .module import input_channels, message_of, module_device, no_gradients, user_code
from .runner import Head, Trunk, with_positions

Sides = tuple[int, int] | None
PathLike = str | Path | None

_FORMS = "torchvision:NAME, timm:NAME or package.module:factory"
_AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS_LAYER = "forward_features"
"""What the output of a timm model's own trunk is called."""


@dataclass
class Loaded:
    """A module in eval mode, and what is known about it."""

    module: nn.Module
    layer: str | None
    preprocess: AnyPreprocess | None = None
    head: Head | None = None
    trunk: Trunk | None = None
    prefix_tokens: int | None = None


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
        "torchvision:NAME", "timm:NAME", or "package.module:factory", a function without arguments
        that returns a module, (module, preprocess), or an `EmbeddingNetwork`.
    weights
        None for the library's pretrained ones (a factory: as it made them), a file (.safetensors,
        or a PyTorch checkpoint that loads with `weights_only=True`), or "random".
    head
        A `.safetensors` file with `weight [D K']` and perhaps `bias [D]`, an affine map to put
        after the embedding.
    layer
        Dotted name; known for torchvision's common families and timm's.
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
        raise _no_network(network)
    sides = None
    if size is not None:
        sides = check_sides("size", (size, size) if isinstance(size, int) else size)
    if source in ("torchvision", "timm"):
        load = _from_torchvision if source == "torchvision" else _from_timm
        loaded = load(name, weights, head, sides, seed)
    else:
        product = _call_factory(source, name)
        if isinstance(product, EmbeddingNetwork):
            return _as_made(product, {**arguments, "autocast": autocast})
        loaded = _from_factory(product, network, weights, head, output)
    if layer not in (None, loaded.layer):
        loaded.head = loaded.trunk = None
    layer = layer or loaded.layer
    if layer is None:
        raise NetworkError(
            f"no default layer is known for {network}; give one with --layer (layer=)"
            f"{_last_layers(loaded, sides)}"
        )
    module = loaded.module.eval()
    if device is not None:
        module = module.to(device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
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
    )
    result.owns_module = True
    del arguments["preprocess"], arguments["device"]
    cast = next((name for name, kind in _AUTOCAST.items() if kind and kind == autocast), None)
    spec = {**arguments, "layer": result.layer, "size": sides, "autocast": cast}
    # As it will come back from JSON: paths as texts, tuples as lists.
    result.spec = json.loads(json.dumps(spec, default=str))
    return result


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
    size, mode = sides or preprocess.size, resize or preprocess.resize
    if mode == "squash":
        return replace(preprocess, size=size, resize=mode, resize_to=None)
    shorter = preprocess.resize_to
    share = 256 / 224 if shorter is None else shorter / min(preprocess.size)
    return replace(preprocess, size=size, resize=mode, resize_to=round(min(size) * share))


def _made(build: Callable[[bool], Any], name: str, weights: PathLike, seed: int) -> Any:
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


def _load_weights(module: nn.Module, weights: PathLike, dropped: list[str]) -> None:
    if weights is not None and weights != "random":
        load_state(module, read_state(weights), dropped, f"weights {weights}")


# torchvision: which layer explains a family's networks, and where their classifier is


def _last(start: str, end: str, kind: type[nn.Module]) -> Callable[[nn.Module], str]:
    """Return what finds the last module of a kind by the ends of its name."""

    def find(module: nn.Module) -> str:
        parts = [str(name) for name, part in module.named_modules() if isinstance(part, kind)]
        return [name for name in parts if name.startswith(start) and name.endswith(end)][-1]

    return find


@dataclass(frozen=True)
class Family:
    """A family of torchvision's networks.

    layer: dotted name of the layer to explain, or a function finding it; classifier: of the last
    linear layer; head: whether `classifier(avgpool(activations))` follows, not affine.
    """

    layer: str | Callable[[nn.Module], str]
    classifier: str
    head: bool = False


# The last convolution's ReLU, before the max pooling halves its grid.
_VGG = Family(_last("features.", "", nn.ReLU), "classifier.6")
FAMILIES: dict[str, Family] = {
    r"(wide_)?resnet|resnext": Family("layer4", "fc"),
    r"mobilenet_v2": Family("features", "classifier.1"),
    r"mobilenet_v3": Family("features", "classifier.3", head=True),
    r"efficientnet": Family("features", "classifier.1"),
    r"convnext": Family("features", "classifier.2", head=True),
    r"densenet": Family("features", "classifier"),
    r"vgg": _VGG,
    r"alexnet": _VGG,
    r"squeezenet": Family("features", "classifier"),
    r"swin": Family("permute", "head"),
    # After a ViT's last attention only the class token reaches the embedding.
    r"vit_": Family(_last("", ".ln_1", nn.LayerNorm), "heads.head"),
    r"regnet": Family("trunk_output", "fc"),
    r"shufflenet": Family("conv5", "fc"),
    r"mnasnet": Family("layers", "classifier.1"),
}


def _family_of(name: str) -> Family:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise NetworkError(f"torchvision has no model {name!r}{near_misses(name, known)}")
    for pattern, family in FAMILIES.items():
        if re.match(pattern, name):
            return family
    raise NetworkError(
        f"embedcam does not know where the embedding of torchvision:{name} is; wrap it in a "
        "function of your own and give it as package.module:factory with --layer"
    )


def _from_torchvision(
    name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int
) -> Loaded:
    from torchvision import models

    family, full = _family_of(name), f"torchvision:{name}"
    default, size = models.get_model_weights(name).DEFAULT, {}
    if name.startswith("vit_"):
        # A ViT's position embeddings belong to one input size.
        if sides is not None and sides[0] != sides[1]:
            raise InputError(f"size={sides} is not square, which {full} needs")
        size = {"image_size": sides[0] if sides else default.transforms().crop_size[0]}

    def build(pretrained: bool) -> Any:
        settings = {"weights": default} if pretrained else {"weights": None, **size}
        return models.get_model(name, **settings)

    module = _made(build, full, weights, seed)
    if size and size["image_size"] != module.image_size:
        state = models.vision_transformer.interpolate_embeddings(
            size["image_size"], module.patch_size, module.state_dict()
        )
        module = _made(build, full, "random", seed)
        module.load_state_dict(state)
    width = _cut_classifier(module, family)
    _load_weights(module, weights, [f"{family.classifier}."])
    if head is not None:
        linear, end = read_affine(head, width), module.get_submodule(family.classifier)
        if isinstance(end, nn.Sequential):
            end.append(linear)
        else:
            _replace(module, family.classifier, linear)
    # Not a closure: a copy of the network calls its own module's parts.
    function = partial(_classified, module) if family.head else None
    layer = family.layer if isinstance(family.layer, str) else family.layer(module)
    return Loaded(module, layer, from_transform(default.transforms()), function)


def _cut_classifier(module: nn.Module, family: Family) -> int:
    """Replace the classifier's last linear layer by nothing: D, the width of the embedding."""
    last = module.get_submodule(family.classifier)
    if isinstance(last, nn.Linear):
        _replace(module, family.classifier, nn.Identity())
        return last.in_features
    # SqueezeNet classifies by a convolution; its embedding is the global average of its features.
    width = next(part.in_channels for part in last.modules() if isinstance(part, nn.Conv2d))
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _replace(module, family.classifier, pooling)
    return width


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def _classified(module: nn.Module, activations: Output) -> Output:
    pool, classifier = module.get_submodule("avgpool"), module.get_submodule("classifier")
    # ConvNeXt's classifier begins with a normalization over channels of `[B K 1 1]`.
    flat = isinstance(classifier.get_submodule("0"), nn.Linear)
    pooled: Tensor = pool(activations)
    output: Output = classifier(pooled.flatten(1) if flat else pooled)
    return output


# timm


class _TimmNetwork(nn.Module):
    """A timm model without classifier, as its own two halves, perhaps with an affine map."""

    def __init__(self, module: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.module: Any = module
        self.embedding_head = nn.Identity() if head is None else head

    def forward(self, images: Tensor) -> Output:
        return self.head(self.trunk(images))

    def trunk(self, images: Tensor) -> Output:
        output: Output = self.module.forward_features(images)
        return output

    def head(self, activations: Output) -> Output:
        output: Output = self.embedding_head(self.module.forward_head(activations))
        return output


def _from_timm(name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int) -> Loaded:
    """Load any timm model, explained at the end of its trunk, or before its last attention."""
    try:
        import timm

        data: Any = importlib.import_module("timm.data")
    except ImportError as error:
        raise NetworkError(
            f"timm:{name} needs timm, which is not installed; run pip install 'embedcam[timm]'"
        ) from error
    if not timm.is_model(name):
        raise NetworkError(f"timm has no model {name!r}{near_misses(name, timm.list_models())}")

    def build(pretrained: bool) -> nn.Module:
        create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
        if sides is not None:
            with suppress(TypeError):  # a network that takes any size has no such argument
                return create(img_size=sides)
        return create()

    module = _made(build, f"timm:{name}", weights, seed)
    config: dict[str, Any] = data.resolve_model_data_config(module)
    classifier = module.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    _load_weights(module, weights, [f"{name}." for name in names])
    affine = None if head is None else read_affine(head, module.head_hidden_size)
    whole, prefix = _TimmNetwork(module, affine), getattr(module, "num_prefix_tokens", None)
    loaded = Loaded(whole, PARTS_LAYER, _timm_preprocess(config), prefix_tokens=prefix)
    blocks = getattr(module, "blocks", None)
    late = [getattr(module, part, None) for part in ("cls_attn_blocks", "blocks_token_only")]
    by_token = prefix and getattr(module, "global_pool", "") == "token"
    if blocks is not None and late != [None, None]:
        # CaiT and XCiT: the class token comes after the blocks, and reads the patches there.
        loaded.layer, loaded.prefix_tokens = f"blocks.{len(blocks) - 1}", 0
    elif by_token and blocks is not None and getattr(blocks[-1], "norm1", None) is not None:
        # Only the class token is read: after the last attention the patches count no more.
        loaded.layer = f"blocks.{len(blocks) - 1}.norm1"
    else:
        loaded.head, loaded.trunk = whole.head, whole.trunk
    return loaded


def _timm_preprocess(config: dict[str, Any]) -> Preprocess:
    _, height, width = config["input_size"]
    look = (config["interpolation"], config["mean"], config["std"])
    if config.get("crop_mode", "center") != "center":
        return Preprocess((height, width), "squash", None, *look)
    return Preprocess((height, width), "crop", int(min(height, width) / config["crop_pct"]), *look)


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
    network, device = arguments.pop("network"), arguments["device"]
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
    _load_weights(module, weights, [])
    transform = None if preprocess is None else from_transform(preprocess)
    if head is not None:
        module = _WithHead(module, read_affine(head, None), output)
    return Loaded(module, None, transform)


def _last_layers(loaded: Loaded, sides: Sides) -> str:
    """Return the last layers with maps of several positions, or the last of all, in words."""
    module = loaded.module.eval()
    size = sides or DEFAULT_INPUT_SIZE
    picture = probe_inputs(1, loaded.preprocess, size, input_channels(module))
    with no_gradients():
        names = with_positions(module, torch.from_numpy(picture).to(module_device(module)))
    names = (names or [name for name, _ in module.named_modules() if name])[-4:]
    return f", for instance {names[-1]!r}, the last of {', '.join(names)}" if names else ""
