"""What in one picture looks like another, to a vision transformer of the CLIP or DINOv2 kind.

    python examples/transformer.py query.jpg other.jpg --model FOLDER --out why.png

FOLDER is a checkpoint as `save_pretrained` writes it. Without one, a small network with random
weights shows that everything runs, and means nothing. Needs `pip install 'embedcam[transformers]'`.

The class token's embedding says what a picture shows; the layer explained is the normalisation
before the last attention, the last place where patches still reach the class token.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from embedcam import EmbeddingNetwork, Preprocess
from embedcam.ops import cam
from embedcam.render import overlay

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def dinov2(model: Dinov2Model, **settings: object) -> EmbeddingNetwork:
    """DINOv2: the embedding is the class token after the last normalisation."""
    size = model.config.image_size
    return EmbeddingNetwork(
        model.eval(),
        f"encoder.layer.{model.config.num_hidden_layers - 1}.norm1",
        output="pooler_output",
        preprocess=Preprocess(size=(size, size)),
        **settings,
    )


def clip(model: CLIPVisionModelWithProjection, **settings: object) -> EmbeddingNetwork:
    """CLIP's image tower: the embedding is the projected class token."""
    size = model.config.image_size
    return EmbeddingNetwork(
        model.eval(),
        f"vision_model.encoder.layers.{model.config.num_hidden_layers - 1}.layer_norm1",
        output="image_embeds",
        preprocess=Preprocess(size=(size, size), mean=CLIP_MEAN, std=CLIP_STD),
        **settings,
    )


def load(folder: Path) -> EmbeddingNetwork:
    """The network in a local checkpoint folder; nothing is fetched."""
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind == "dinov2":
        return dinov2(Dinov2Model.from_pretrained(folder, local_files_only=True))
    if kind in ("clip", "clip_vision_model"):
        model = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
        return clip(model)
    raise SystemExit(f"{folder} holds a {kind}; this example knows dinov2 and clip")


def random_network(kind: str, seed: int = 0) -> EmbeddingNetwork:
    """A small transformer of that kind with random weights: for trying the program out."""
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "dinov2":
            return dinov2(Dinov2Model(Dinov2Config(patch_size=14, **shape)))
        config = CLIPVisionConfig(patch_size=14, intermediate_size=96, projection_dim=32, **shape)
        return clip(CLIPVisionModelWithProjection(config))


def similarity_cotangents(embedding: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    """dy/dz of the cosine similarity y = f . f_other, through the norm f = z / |z|: `[B D]`."""
    along = (embedding * other).sum(dim=1, keepdim=True)
    return (other - embedding * along) / norm[:, None]


def explain(network: EmbeddingNetwork, query: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The Grad-CAM map `[h w]` of what in `query` makes it similar to `other`, both `[3 H W]`."""
    target = network.forward(other[None]).embedding
    with network.head_pass(query[None]) as head_pass:
        features = head_pass.features
        cotangents = similarity_cotangents(features.embedding, features.norm, target)
        weights = head_pass.vjp(cotangents).mean((2, 3))
    return cam(weights, features.activations)[0].cpu().numpy()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("query", type=Path, help="the picture to explain")
    parser.add_argument("other", type=Path, help="the picture it is compared with")
    parser.add_argument("--model", type=Path, help="folder of a CLIP or DINOv2 checkpoint")
    parser.add_argument("--kind", choices=("dinov2", "clip"), default="dinov2")
    parser.add_argument("--out", type=Path, default=Path("why.png"))
    options = parser.parse_args(arguments)

    network = load(options.model) if options.model else random_network(options.kind)
    pictures = [Image.open(path).convert("RGB") for path in (options.query, options.other)]
    inputs = [network.preprocess(picture) for picture in pictures]
    overlay(pictures[0], explain(network, *inputs)).save(options.out)
    print(f"{options.out}: what in {options.query} looks like {options.other}")


if __name__ == "__main__":
    main()
