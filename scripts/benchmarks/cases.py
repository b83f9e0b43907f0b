"""Networks with random weights, and pictures for them: nothing here needs data."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn
from torchvision import models

from embedcam import EmbeddingNetwork, load_network
from embedcam.preprocess import Preprocess

HEAD_WIDTH = 128
SIZE = 224


class GeM(nn.Module):
    """Trunk, generalised mean pooling, linear head: a head that is not a global average pool."""

    def __init__(
        self, trunk: nn.Module, width: int, out: int = HEAD_WIDTH, power: float = 3
    ) -> None:
        super().__init__()
        self.trunk, self.power = trunk, power
        self.head = nn.Linear(width, out)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `[B D]` before any norm."""
        activations = self.trunk(images).clamp(min=1e-6)
        return self.head(activations.pow(self.power).mean((-2, -1)).pow(1 / self.power))


def trunk_of(name: str) -> tuple[nn.Module, int]:
    """A torchvision CNN up to its last activations, with random weights, and their channels."""
    module = seeded(lambda: models.get_model(name, weights=None))
    if hasattr(module, "features"):
        trunk = module.features
    else:
        trunk = nn.Sequential(OrderedDict(list(module.named_children())[:-2]))
    with torch.inference_mode():
        return trunk, trunk(torch.zeros(1, 3, 64, 64)).shape[1]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in eval mode, its random weights from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().eval()


def gem_network(name: str) -> EmbeddingNetwork:
    """Any head but a pooled one, at the layer of the others."""
    trunk, width = trunk_of(name)
    module = seeded(lambda: GeM(trunk, width))
    return EmbeddingNetwork(
        module, "trunk", preprocess=Preprocess.imagenet(SIZE), name=f"{name}-gem"
    )


def frozen_network(name: str) -> EmbeddingNetwork:
    """The pooled vector itself as embedding, D = K."""
    return load_network(f"torchvision:{name}", weights="random", size=SIZE)


def linear_network(name: str, folder: Path) -> EmbeddingNetwork:
    """A linear head of 128 numbers behind the pooling."""
    width = trunk_of(name)[1]
    path = folder / f"{name}-head.safetensors"
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((HEAD_WIDTH, width)) / np.sqrt(width)
    save_file({"weight": matrix.astype(np.float32)}, path)
    return load_network(f"torchvision:{name}", weights="random", head=path, size=SIZE)


def fresh(network: EmbeddingNetwork) -> EmbeddingNetwork:
    """The same module in a wrapper that knows nothing yet: a build pays for finding out."""
    return EmbeddingNetwork(
        network.module,
        network.layer,
        normalize=network.normalize,
        preprocess=network.preprocess,
        name=network.name,
    )


def write_pictures(folder: Path, count: int, classes: int = 8) -> Path:
    """JPEG files of 320 x 240, smooth shapes with some noise, a folder per class."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class-{number % classes}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def query_input(seed: int = 0) -> Tensor:
    """One preprocessed picture `[3 224 224]`."""
    return torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
