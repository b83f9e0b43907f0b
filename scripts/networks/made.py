"""Networks of transformers and sentence-transformers in small configurations, by hand.

Each name is a function without arguments, `scripts.networks.made:clip`, that returns an
`EmbeddingNetwork` of random weights with the library's own processor; two towers have a tokenizer
of a few words.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from embedcam.network import EmbeddingNetwork

SIDE = 64
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_VIT = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8, **_SMALL}
_TEXT = {
    "hidden_size": 32, "vocab_size": 12, "max_position_embeddings": 16, "projection_size": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **_SMALL,
}  # fmt: skip
_LONGER = {**_TEXT, "max_position_embeddings": 64}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_WINDOWS = {
    "image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
_TOWERS = {"text_config": _TEXT, "vision_config": _VIT, "projection_dim": 16}
# What the beginning of weights is drawn with would fade away in a network of this width.
_WIDER = {"initializer_range": 0.3}
_NAFLEX = {"hidden_size": 32, "patch_size": 16, "num_patches": 16, **_SMALL}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", _VIT),
    "deit": ("DeiTModel", _VIT),
    "beit": ("BeitModel", _VIT),
    "dinov2": ("Dinov2Model", _VIT),
    "dinov2_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 4, **_VIT}),
    "dinov3_vit": ("DINOv3ViTModel", {"num_register_tokens": 4, **_VIT}),
    "dinov3_convnext": ("DINOv3ConvNextModel", _STAGES),
    "swin": ("SwinModel", _WINDOWS),
    "swinv2": ("Swinv2Model", _WINDOWS),
    "convnext": ("ConvNextModel", _STAGES),
    "convnextv2": ("ConvNextV2Model", _STAGES),
    "resnet": ("ResNetModel", {"embedding_size": 8, "layer_type": "basic", **_STAGES}),
    "pvt_v2": ("PvtV2Model", {"num_attention_heads": [1, 2, 2, 4], **_STAGES}),
    "hiera": (
        "HieraModel",
        {"embed_dim": 16, "image_size": [SIDE, SIDE], "depths": [1, 1, 2, 1], "mlp_ratio": 2.0},
    ),
    "mobilenet_v2": ("MobileNetV2Model", {"depth_multiplier": 0.35, **_WIDER}),
    "efficientnet": (
        "EfficientNetModel",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, **_WIDER},
    ),
    "clip_vision": ("CLIPVisionModelWithProjection", {"projection_dim": 16, **_VIT}),
    "siglip_vision": ("SiglipVisionModel", _VIT),
    "clip": ("CLIPModel", _TOWERS),
    "siglip": ("SiglipModel", {"text_config": _TEXT, "vision_config": _VIT}),
    "siglip2": (
        "Siglip2Model",
        {"text_config": {**_TEXT, "max_position_embeddings": 64}, "vision_config": _NAFLEX},
    ),
    "blip": ("BlipModel", _TOWERS),
    "chinese_clip": ("ChineseCLIPModel", _TOWERS),
}
SENTENCES = ("sentences_clip", "sentences_siglip", "sentences_dinov2", "sentences_vit_dense")
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "cat", "two", "dogs", "red", "car", "over", "the")


def __getattr__(name: str) -> Callable[[], EmbeddingNetwork]:
    if name in TRANSFORMERS:
        return partial(_network, name)
    if name in SENTENCES:
        return partial(_sentences, name.removeprefix("sentences_"))
    raise AttributeError(name)


def tokenizer() -> Any:
    """Return a tokenizer of a few words, 16 of them at most."""
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=16, **special
    )


def model(name: str, seed: int = 0) -> nn.Module:
    """Return a model of transformers in eval mode, of weights drawn with a seed."""
    kind, settings = TRANSFORMERS[name]
    build: Any = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made: nn.Module = build(build.config_class(**settings))
    return made.eval()


def processor(name: str) -> Any:
    """Return a processor: as the family has it for two towers, else that of a ViT."""
    squash = {"height": SIDE, "width": SIDE}
    if name == "siglip2":
        images = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
        return transformers.Siglip2Processor(images, tokenizer())
    if name == "siglip":
        images = transformers.SiglipImageProcessor(size=squash)
        return transformers.SiglipProcessor(images, tokenizer())
    if name in ("clip", "blip", "chinese_clip"):
        images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=squash)
        return transformers.CLIPProcessor(images, tokenizer())
    return transformers.ViTImageProcessor(size=squash)


def _network(name: str) -> EmbeddingNetwork:
    return EmbeddingNetwork.from_transformers(model(name), processor(name), name=name)


def sentences(name: str) -> nn.Module:
    """Return a SentenceTransformer: a tower of transformers, perhaps pooled and mapped."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    inner = name.removesuffix("_dense")
    with TemporaryDirectory() as folder:
        save(inner, Path(folder))
        parts: list[nn.Module] = [Transformer(folder)]
    if inner not in ("clip", "siglip"):
        parts.append(Pooling(32, "mean"))
    if name != inner:
        parts += [Dense(32, 16), Normalize()]
    return SentenceTransformer(modules=parts, device="cpu").eval()


def save(name: str, folder: Path) -> None:
    """Write a model and its processor as transformers loads them."""
    saved: Any = model(name)
    saved.save_pretrained(folder)
    processor(name).save_pretrained(folder)


def _sentences(name: str) -> EmbeddingNetwork:
    return EmbeddingNetwork.from_sentence_transformers(sentences(name), name=name)
