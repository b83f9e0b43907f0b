"""Modules from torchvision and timm, their classifiers left out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, NetworkError
from ..preprocess import CustomPreprocess, Preprocess, from_transform
from .checkpoints import load_state, read_affine, read_state
from .failures import own_failures
from .families import attach_head, cut_classifier, default_layer, family_of, head_function
from .layers import near_misses

Weights = str | Path | None
PARTS_LAYER = "forward_features"
"""What the output of a timm model's own trunk is called."""


@dataclass
class Loaded:
    """A module in eval mode, and what is known about it."""

    module: nn.Module
    layer: str | None
    preprocess: Preprocess | CustomPreprocess | None = None
    head: Callable[[Tensor], Any] | None = None
    trunk: Callable[[Tensor], Any] | None = None
    prefix_tokens: int | None = None


def _built(build: Callable[[], nn.Module], seed: int, network: str) -> nn.Module:
    """A module with random weights of its own seed; no generator of the caller's moves."""
    advice = "choose another size, or another network"
    with own_failures(f"making {network}", advice=advice), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed accelerators.
        torch.default_generator.manual_seed(seed)
        return build()


def _fetched(build: Callable[[], nn.Module], network: str) -> nn.Module:
    """A module with the library's pretrained weights, or one sentence about what to do."""
    try:
        return build()
    # Offline, a library may raise anything from URLError to its own kinds.
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:120]
        raise NetworkError(
            f"the pretrained weights of {network} could not be fetched "
            f"({type(error).__name__}: {said}); give a file with --weights FILE, or random ones "
            "with --weights random"
        ) from error


# -------------------------------------------------------------------- torchvision


def from_torchvision(
    name: str, weights: Weights, head: str | Path | None, size: tuple[int, int] | None, seed: int
) -> Loaded:
    """A torchvision model of a known family.

    Raises:
        NetworkError: no such model, weights that cannot be had, or a head that does not fit.
    """
    from torchvision import models

    family = family_of(name)
    default = models.get_model_weights(name).DEFAULT
    build, side = models.get_model, {}
    if name.startswith("vit_"):
        # A ViT's position embeddings belong to one input size.
        if size is not None and size[0] != size[1]:
            raise InputError(f"size={size} is not square, which torchvision:{name} needs")
        side = {"image_size": size[0] if size else default.transforms().crop_size[0]}
    if weights is None:
        module = _fetched(lambda: build(name, weights=default), f"torchvision:{name}")
        if side and side["image_size"] != module.image_size:
            state = module.state_dict()
            module = _built(lambda: build(name, weights=None, **side), seed, name)
            _load_vit(module, state, side["image_size"])
    else:
        module = _built(lambda: build(name, weights=None, **side), seed, name)
    width = cut_classifier(module, family)
    if weights not in (None, "random"):
        assert weights is not None
        state = read_state(weights)
        load_state(module, state, [f"{family.classifier}."], f"weights {weights}")
    if head is not None:
        attach_head(module, family, read_affine(head, width))
    return Loaded(
        module,
        default_layer(module, family),
        from_transform(default.transforms()),
        head_function(module, family),
    )


def _load_vit(module: Any, state: dict[str, Tensor], size: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    module.load_state_dict(interpolate_embeddings(size, module.patch_size, state))


# -------------------------------------------------------------------- timm


class _TimmNetwork(nn.Module):
    """A timm model without classifier, as its own two halves, perhaps with an affine map."""

    def __init__(self, module: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.module: Any = module
        self.embedding_head = nn.Identity() if head is None else head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def trunk(self, images: Tensor) -> Tensor:
        return self.module.forward_features(images)

    def head(self, activations: Tensor) -> Tensor:
        return self.embedding_head(self.module.forward_head(activations))


def from_timm(
    name: str,
    weights: Weights,
    head: str | Path | None,
    size: tuple[int, int] | None,
    seed: int,
) -> Loaded:
    """Any timm model, explained at the end of its trunk, or before its last attention.

    Raises:
        NetworkError: timm is not installed, no such model, or as for torchvision.
    """
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise NetworkError(
            f"timm:{name} needs timm, which is not installed; run pip install 'embedcam[timm]'"
        ) from error
    if not timm.is_model(name):
        raise NetworkError(f"timm has no model {name!r}{near_misses(name, timm.list_models())}")

    def build() -> nn.Module:
        made: dict[str, Any] = {"pretrained": weights is None, "num_classes": 0}
        if size is not None:
            try:
                return timm.create_model(name, img_size=size, **made)
            except TypeError:  # a network that takes any size has no such argument
                pass
        return timm.create_model(name, **made)

    if weights is None:
        module: Any = _fetched(build, f"timm:{name}")
    else:
        module = _built(build, seed, name)
    if weights not in (None, "random"):
        assert weights is not None
        classifier = module.pretrained_cfg.get("classifier") or ()
        names = [classifier] if isinstance(classifier, str) else list(classifier)
        load_state(module, read_state(weights), [f"{n}." for n in names], f"weights {weights}")
    affine = None if head is None else read_affine(head, module.head_hidden_size)
    return _timm_loaded(module, affine, _timm_preprocess(resolve_model_data_config(module)))


def _timm_loaded(module: Any, affine: nn.Linear | None, preprocess: Preprocess) -> Loaded:
    whole = _TimmNetwork(module, affine)
    prefix = getattr(module, "num_prefix_tokens", None)
    if hasattr(module, "cls_attn_blocks") or hasattr(module, "blocks_token_only"):
        # CaiT and XCiT: the class token comes after the blocks, and reads the patches there.
        return Loaded(whole, f"blocks.{len(module.blocks) - 1}", preprocess, prefix_tokens=0)
    blocks = getattr(module, "blocks", None)
    early = blocks is not None and hasattr(blocks[-1], "norm1")
    if prefix and getattr(module, "global_pool", "") == "token" and early:
        # Only the class token is read: after the last attention the patches count no more.
        layer = f"blocks.{len(module.blocks) - 1}.norm1"
        return Loaded(whole, layer, preprocess, prefix_tokens=prefix)
    return Loaded(whole, PARTS_LAYER, preprocess, whole.head, whole.trunk, prefix_tokens=prefix)


def _timm_preprocess(config: dict[str, Any]) -> Preprocess:
    _, height, width = config["input_size"]
    crop = config.get("crop_mode", "center") == "center"
    return Preprocess(
        size=(height, width),
        resize="crop" if crop else "squash",
        resize_to=int(min(height, width) / config["crop_pct"]) if crop else None,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
