"""timm's networks by name, explained at the end of their trunk or before the last attention."""

from contextlib import suppress
from functools import partial
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError, NetworkError
from ..preprocess import Preprocess
from ..preprocess.probe import probe_inputs
from .checkpoints import read_affine
from .finding import Found, find_explained
from .layers import Output, near_misses
from .module import input_channels, no_gradients
from .runner import run_part
from .source import (
    Foreign,
    Loaded,
    PathLike,
    Sides,
    hub_answers,
    hub_closed,
    imported,
    load_weights,
    made,
)

PARTS_LAYER = "forward_features"
"""What the output of a timm model's own trunk is called."""


class _DataConfig(TypedDict):
    """Of what timm says of a model's pictures, what is asked here."""

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    crop_mode: NotRequired[str]


class _TimmNetwork(nn.Module):
    """A timm model without classifier, as its own two halves, perhaps with an affine map."""

    def __init__(self, module: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.module: Foreign = module
        self.embedding_head = nn.Identity() if head is None else head

    def forward(self, images: Tensor) -> Output:
        return self.head(self.trunk(images))

    def trunk(self, images: Tensor) -> Output:
        output: Output = self.module.forward_features(images)
        return output

    def head(self, activations: Output) -> Output:
        output: Output = self.embedding_head(self.module.forward_head(activations))
        return output


def from_timm(name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int) -> Loaded:
    """Load any timm model, explained at the end of its trunk, or before its last attention."""
    timm = imported("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise NetworkError(f"timm has no model {name!r}{near_misses(name, timm.list_models())}")

    def build(pretrained: bool) -> Foreign:
        create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
        with hub_closed(pretrained and not hub_answers()):
            if sides is not None:
                with suppress(TypeError):  # a network that takes any size has no such argument
                    return create(img_size=sides)
            return create()

    module = made(build, f"timm:{name}", weights, seed)
    config: _DataConfig = timm.data.resolve_model_data_config(module)
    classifier = module.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    load_weights(module, weights, [f"{name}." for name in names])
    affine = None if head is None else read_affine(head, module.head_hidden_size)
    whole, prefix = _TimmNetwork(module, affine), getattr(module, "num_prefix_tokens", None)
    preprocess = _timm_preprocess(config)
    preprocess = preprocess if sides is None else preprocess.sized(sides)
    loaded = Loaded(whole, PARTS_LAYER, preprocess, prefix_tokens=prefix)
    if _by_class_token(module):
        # Only the class token is read: after the last attention the patches count no more.
        loaded.layer = f"blocks.{len(module.blocks) - 1}.norm1"
    elif found := _found(whole, preprocess):
        loaded.layer, loaded.said = found.layer, found.said
        loaded.prefix_tokens = found.prefix_tokens
    else:
        loaded.head, loaded.trunk = whole.head, whole.trunk
    return loaded


def _by_class_token(module: nn.Module) -> bool:
    """Return whether a class token goes through all blocks, the last of which begins by a norm."""
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not _reads_token(module):
        return False
    begins_by_norm = hasattr(blocks[-1], "norm1") and "Post" not in type(blocks[-1]).__name__
    children = [part for name, part in module.named_children()]
    behind = children[children.index(blocks) + 1 :]
    kinds = [type(part).__name__.lower() for child in behind for part in child.modules()]
    late = any("attention" in kind or "attn" in kind for kind in kinds)
    return begins_by_norm and bool(getattr(module, "num_prefix_tokens", 0)) and not late


def _reads_token(module: nn.Module) -> bool:
    return getattr(module, "global_pool", "") == "token"


def _found(whole: _TimmNetwork, preprocess: Preprocess) -> Found | None:
    """Return the layer where the trunk's output is not what explains; None where it is."""
    picture = torch.from_numpy(probe_inputs(1, preprocess, preprocess.size, input_channels(whole)))
    if not _reads_token(whole.module):
        with no_gradients(), suppress(EmbedcamError):
            output = run_part(whole.eval().trunk, "trunk", picture)
            if not isinstance(output, list | tuple):
                return None
    return find_explained(whole.eval(), picture)


def _timm_preprocess(config: _DataConfig) -> Preprocess:
    _, height, width = config["input_size"]
    look = (config["interpolation"], config["mean"], config["std"])
    if config.get("crop_mode", "center") != "center":
        return Preprocess((height, width), "squash", None, *look)
    return Preprocess((height, width), "crop", int(min(height, width) / config["crop_pct"]), *look)
