"""torchvision's families of networks: which layer explains them and where their classifier is.

The embedding of a named network is what its classifier's last linear layer is given.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from .layers import near_misses


def _last_relu(module: nn.Module) -> str:
    """VGG and AlexNet: the last convolution's ReLU, before the max pooling halves its grid."""
    named = [name for name, part in module.named_modules() if isinstance(part, nn.ReLU)]
    return [name for name in named if name.startswith("features.")][-1]


def _last_norm_before_attention(module: nn.Module) -> str:
    """ViT: after its last attention only the class token reaches the embedding."""
    return [name for name, _ in module.named_modules() if name.endswith(".ln_1")][-1]


@dataclass(frozen=True)
class Family:
    """One family.

    layer: dotted name of the layer to explain, or a function finding it.
    classifier: dotted name of the last linear layer (SqueezeNet: of the whole classifier).
    head: whether pooling and the rest of the classifier follow `layer` as
        `classifier(avgpool(activations))` with something non-affine in between.
    """

    layer: str | Callable[[nn.Module], str]
    classifier: str
    head: bool = False


FAMILIES: dict[str, Family] = {
    r"(wide_)?resnet|resnext": Family("layer4", "fc"),
    r"mobilenet_v2": Family("features", "classifier.1"),
    r"mobilenet_v3": Family("features", "classifier.3", head=True),
    r"efficientnet": Family("features", "classifier.1"),
    r"convnext": Family("features", "classifier.2", head=True),
    r"densenet": Family("features", "classifier"),
    r"vgg": Family(_last_relu, "classifier.6"),
    r"alexnet": Family(_last_relu, "classifier.6"),
    r"squeezenet": Family("features", "classifier"),
    r"swin": Family("permute", "head"),
    r"vit_": Family(_last_norm_before_attention, "heads.head"),
    r"regnet": Family("trunk_output", "fc"),
    r"shufflenet": Family("conv5", "fc"),
    r"mnasnet": Family("layers", "classifier.1"),
}


def family_of(name: str) -> Family:
    """The family of a torchvision model.

    Raises:
        NetworkError: no such model, with the nearest names; or one of a family without a default.
    """
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


def cut_classifier(module: nn.Module, family: Family) -> int:
    """Replace the classifier's last linear layer by nothing: D, the width of the embedding."""
    last = module.get_submodule(family.classifier)
    if isinstance(last, nn.Linear):
        _replace(module, family.classifier, nn.Identity())
        return last.in_features
    # SqueezeNet classifies by a convolution; its embedding is the global average of its features.
    width = next(part.in_channels for part in last.modules() if isinstance(part, nn.Conv2d))
    _replace(module, family.classifier, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return width


def attach_head(module: nn.Module, family: Family, linear: nn.Linear) -> None:
    """Put an affine map where the classifier's last linear layer was."""
    pooling = module.get_submodule(family.classifier)
    if isinstance(pooling, nn.Sequential):
        pooling.append(linear)
    else:
        _replace(module, family.classifier, linear)


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def default_layer(module: nn.Module, family: Family) -> str:
    """The dotted name of the layer to explain."""
    return family.layer if isinstance(family.layer, str) else family.layer(module)


def head_function(module: Any, family: Family) -> Callable[[Tensor], Tensor] | None:
    """What follows the default layer, as a function, where it is pooled but not affine."""
    # Not a closure: a copy of the network calls its own module's parts.
    return partial(_classified, module) if family.head else None


def _classified(module: Any, activations: Tensor) -> Tensor:
    pooled = module.avgpool(activations)
    # ConvNeXt's classifier begins with a normalisation over channels of `[B K 1 1]`.
    if not isinstance(module.classifier[0], nn.Linear):
        return module.classifier(pooled)
    return module.classifier(torch.flatten(pooled, 1))
