"""Synthetic photographs and small networks that make an index of them in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from toys import seeded

from embedcam import EmbeddingNetwork, Explanation, Preprocess, Recipe, build_index, find_images

CHANNELS, WIDTH, SIDE = 8, 5, 32
SQUASH = Preprocess(size=(SIDE, SIDE))
GRID = (SIDE // 4, SIDE // 4)
DENSE = Recipe(encoding="dense", dtype="float32")
CROP = Preprocess(size=(SIDE, SIDE), resize="crop", resize_to=36)


class Pooled(nn.Module):
    """Convolution, ReLU, global average pooling, linear: low-rank codes are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 5, 4, 2)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(CHANNELS, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(images)))

    def head(self, activations: Tensor) -> Tensor:
        return self.linear(activations.mean((2, 3)))


class Flat(Pooled):
    """The same with a head that reads every position: what no pooled vector can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS * (SIDE // 4) ** 2, WIDTH)

    def head(self, activations: Tensor) -> Tensor:
        return self.linear(activations.flatten(1))


def network_of(kind: type[nn.Module] = Pooled, **settings: Any) -> EmbeddingNetwork:
    settings = {"preprocess": SQUASH, **settings}
    return EmbeddingNetwork(seeded(kind), "relu", **settings)


def picture(label: int, number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A disc of the label's colour on noise, elsewhere in every picture; (width, height) `size`."""
    rng = np.random.default_rng([label, number])
    width, height = size
    pixels = rng.integers(0, 120, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    at = rng.uniform(0.25, 0.75, 2) * (height, width)
    inside = (y - at[0]) ** 2 + (x - at[1]) ** 2 < (min(size) / 4) ** 2
    pixels[inside] = np.eye(3)[label % 3] * 200 + 40
    return Image.fromarray(pixels.astype(np.uint8))


def write_photos(folder: Path, labels: int = 3, each: int = 4) -> Path:
    """PNG files, a folder a label: `0/0.png` ..."""
    for label in range(labels):
        (folder / str(label)).mkdir(parents=True)
        for number in range(each):
            picture(label, number).save(folder / str(label) / f"{number}.png")
    return folder


def given_triplets(labels: int = 3, each: int = 4, s: int = 3) -> np.ndarray:
    """`[N S 2]`: places of a positive and a negative."""
    rng = np.random.default_rng(5)
    of = np.repeat(np.arange(labels), each)
    rows = []
    for a in range(len(of)):
        positives = [p for p in range(len(of)) if of[p] == of[a] and p != a]
        negatives = [n for n in range(len(of)) if of[n] != of[a]]
        rows.append([[rng.choice(positives), rng.choice(negatives)] for _ in range(s)])
    return np.array(rows)


def build(
    photos: Path, path: Path, network: EmbeddingNetwork, recipe: Recipe | None = None, **more: Any
) -> Path:
    build_index(find_images(photos), network, path, recipe, progress=False, workers=0, **more)
    return path


def tensor_of(image: Image.Image, preprocess: Preprocess = SQUASH) -> Tensor:
    return torch.from_numpy(preprocess(image))


def same(a: Explanation, b: Explanation, rtol: float = 0.0) -> None:
    for name in ("ids", "labels", "paths", "explained"):
        assert getattr(a, name) == getattr(b, name)
    assert (a.neighbor_cams is None) == (b.neighbor_cams is None)
    for name in ("cam", "weights", "distances", "similarities", "neighbor_cams"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine is not None:
            assert mine.shape == other.shape
            np.testing.assert_allclose(mine, other, rtol=rtol, atol=rtol * np.abs(other).max())
