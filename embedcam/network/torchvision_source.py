"""torchvision's networks by name: which layer explains a family, where its classifier is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def from_torchvision(
    name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int
) -> Loaded:
    """Load a network of torchvision's, its classifier cut, explained where its family says."""
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

    module = made(build, full, weights, seed)
    if size and size["image_size"] != module.image_size:
        state = models.vision_transformer.interpolate_embeddings(
            size["image_size"], module.patch_size, module.state_dict()
        )
        module = made(build, full, "random", seed)
        module.load_state_dict(state)
    width = _cut_classifier(module, family)
    load_weights(module, weights, [f"{family.classifier}."])
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
