"""torchvision's networks by name: which layer explains a family, where its classifier is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..errors import InputError, NetworkError
from ..preprocess import from_transform
from .checkpoints import read_affine
from .layers import Output, near_misses
from .source import Loaded, PathLike, Sides, load_weights, made


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
    linear layer; head: whether `classifier(avgpool(activations))` follows, not affine; size: the
    argument by which it is made for one input size, which must be square; random: what one without
    torchvision's weights is made with.
    """

    layer: str | Callable[[nn.Module], str]
    classifier: str
    head: bool = False
    size: str = ""
    random: dict[str, bool] = field(default_factory=dict)


# The last convolution's ReLU, before the max pooling halves its grid.
_VGG = Family(_last("features.", "", nn.ReLU), "classifier.6")
# As the trained ones are made: they norm the input once more, and their weights expect it.
_INCEPTION = {"transform_input": True, "init_weights": False}
# Heads beside the network's own, in training only.
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
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
    r"vit_": Family(_last("", ".ln_1", nn.LayerNorm), "heads.head", size="image_size"),
    r"maxvit": Family("blocks.3", "classifier.5", head=True, size="input_size"),
    r"googlenet": Family("inception5b", "fc", random=_INCEPTION),
    r"inception_v3": Family("Mixed_7c", "fc", random=_INCEPTION),
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


def from_torchvision(
    name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int
) -> Loaded:
    """Load a network of torchvision's, its classifier cut, explained where its family says."""
    from torchvision import models

    family, full = _family_of(name), f"torchvision:{name}"
    default = models.get_model_weights(name).DEFAULT
    own = default.transforms().crop_size[0]
    if family.size and sides is not None and sides[0] != sides[1]:
        raise InputError(f"size={sides} is not square, which {full} needs")
    wanted = sides[0] if sides else own
    shape = {"image_size": wanted, "input_size": (wanted, wanted)}

    def build(pretrained: bool) -> nn.Module:
        if pretrained:
            network: nn.Module = models.get_model(name, weights=default)
            return network
        sized = {family.size: shape[family.size]} if family.size else {}
        network = models.get_model(name, weights=None, **family.random, **sized)
        return network

    module = made(build, full, weights, seed)
    if family.size and weights is None and wanted != own:
        module = _resized(module, made(build, full, "random", seed))
    for part in _AUXILIARY:
        if hasattr(module, part):
            setattr(module, part, None)
    width = _cut_classifier(module, family)
    load_weights(module, weights, [f"{part}." for part in (family.classifier, *_AUXILIARY)])
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


def _resized(trained: nn.Module, module: nn.Module) -> nn.Module:
    """Return the module, of another input size, with the trained one's parameters."""
    from torchvision import models

    state = trained.state_dict()
    if isinstance(module, models.VisionTransformer):
        # A ViT's position embeddings belong to one input size.
        state = models.vision_transformer.interpolate_embeddings(
            module.image_size, module.patch_size, state
        )
    module.load_state_dict(state)
    return module


def _classified(module: nn.Module, activations: Output) -> Output:
    classifier = module.get_submodule("classifier")
    # MaxViT's classifier pools by itself.
    pool = getattr(module, "avgpool", nn.Identity())
    # ConvNeXt's classifier begins with a normalization over channels of `[B K 1 1]`.
    flat = isinstance(classifier.get_submodule("0"), nn.Linear)
    pooled: Tensor = pool(activations)
    output: Output = classifier(pooled.flatten(1) if flat else pooled)
    return output
