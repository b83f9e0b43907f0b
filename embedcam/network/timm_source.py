"""timm's networks by name, explained at the end of their trunk or before the last attention."""

import importlib
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import Preprocess
from .checkpoints import read_affine
from .layers import Output, near_misses
from .source import Loaded, PathLike, Sides, load_weights, made

PARTS_LAYER = "forward_features"
"""What the output of a timm model's own trunk is called."""


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


def from_timm(name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int) -> Loaded:
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

    module = made(build, f"timm:{name}", weights, seed)
    config: dict[str, Any] = data.resolve_model_data_config(module)
    classifier = module.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    load_weights(module, weights, [f"{name}." for name in names])
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
