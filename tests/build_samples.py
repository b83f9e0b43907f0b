"""Tiny networks of every kind of head, with their heads once more in float64, and pictures."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import averaged_weights, dot_score, target_weights
from PIL import Image
from torch import Tensor, nn
from toys import seeded

import embedcam.offline.build as jobs
from embedcam.images import ImageSource, find_images
from embedcam.index import Index
from embedcam.network import EmbeddingNetwork
from embedcam.offline.triplets import NearestOthers, TripletSampler, label_codes
from embedcam.preprocess import Preprocess, probe
from embedcam.recipe.recipe import Recipe

SIDE, CHANNELS, WIDTH = 16, 8, 5
CELLS = (SIDE // 4) ** 2
DENSE = Recipe(encoding="dense", dtype="float32", sampling="random", triplets=4)
BAD = ["c0/003.png", "c1/004.png", "c2/005.png"]


def dense(**choices) -> Recipe:
    return Recipe(**{**DENSE.to_dict(), **choices})


def quicken(monkeypatch) -> None:
    """What a test of values need not wait for: the disk, and the same probe picture again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(probe, "probe_picture", cache(probe.probe_picture))


def interrupt(monkeypatch, stage: str, job: Callable[..., object], *given, **options) -> None:
    """Run a job that the user interrupts when it comes to this step, as "merge.gather"."""

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"embedcam.offline.{stage}", stop)
        with pytest.raises(KeyboardInterrupt):
            job(*given, **options)


class Patches(nn.Module):
    """Images to tokens with a class token before them, `[B 1+T K]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)


class TokenHead(nn.Module):
    """One attention block; the class token is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.mix = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)
        self.linear = nn.Linear(CHANNELS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        return self.linear((tokens + self.mix(x, x, x, need_weights=False)[0])[:, 0])


class PowerMean(nn.Module):
    """GeM pooling: sees positions, so it takes a second pass."""

    def forward(self, maps: Tensor) -> Tensor:
        return (maps.clamp(min=1e-3) ** 3).mean((2, 3)) ** (1 / 3)


class Mean(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def trunk(stride: int = 4, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 5, stride, 2), last or nn.ReLU())


def linear() -> nn.Module:
    return nn.Linear(CHANNELS, WIDTH)


def bent(n: int) -> list[nn.Module]:
    return [nn.Linear(n, 7), nn.Tanh(), nn.Linear(7, WIDTH)]


HEADS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "affine": lambda: (trunk(), nn.Sequential(Mean(), linear())),
    "signed": lambda: (trunk(last=nn.SiLU()), nn.Sequential(Mean(), linear())),
    "pooled": lambda: (trunk(), nn.Sequential(Mean(), *bent(CHANNELS))),
    "other": lambda: (trunk(), nn.Sequential(PowerMean(), linear())),
    "normed": lambda: (
        trunk(last=nn.SiLU()),
        nn.Sequential(Mean(), nn.LayerNorm(CHANNELS, 1e-3), linear()),
    ),
    "tokens": lambda: (Patches(), TokenHead()),
    "identity": lambda: (trunk(), Mean()),
    "flattening": lambda: (trunk(), nn.Sequential(nn.Flatten(), *bent(CHANNELS * CELLS))),
    "depthwise": lambda: (
        trunk(),
        nn.Sequential(
            nn.AdaptiveAvgPool2d(SIDE // 4),  # of inputs of another size, too
            nn.Conv2d(CHANNELS, CHANNELS, SIDE // 4, groups=CHANNELS),
            nn.Flatten(),
            linear(),
        ),
    ),
    "fine": lambda: (trunk(1), nn.Sequential(Mean(), linear())),
}


@dataclass
class Toy:
    """A network, what it was called with, and its head in float64 for the literal loop."""

    kind: str
    network: EmbeddingNetwork
    head: Callable[[Tensor], Tensor]
    precise: nn.ModuleList
    batches: list[int] = field(default_factory=list)


def toy(kind: str = "affine", *, normalize=True, seed=0, dtype=torch.float32, **settings) -> Toy:
    parts = seeded(lambda: nn.ModuleList(HEADS[kind]()), seed).to(dtype)
    first, head = parts
    batches: list[int] = []

    def counted(images: Tensor) -> Tensor:
        batches.append(len(images))
        return first(images)

    options = {"preprocess": Preprocess((SIDE, SIDE)), "normalize": normalize, **settings}
    network = EmbeddingNetwork.from_parts(counted, head, module=parts, **options)
    precise = seeded(lambda: nn.ModuleList(HEADS[kind]()), seed).double()

    def on_maps(maps: Tensor) -> Tensor:
        if kind != "tokens":
            return precise[1](maps)
        tokens = maps.flatten(2).transpose(1, 2)
        return precise[1](torch.cat([precise[0].token.expand(len(tokens), -1, -1), tokens], 1))

    return Toy(kind, network, on_maps, precise, batches)


def pictures(folder: Path, n: int = 12, classes: int = 3, seed: int = 5) -> ImageSource:
    """n pictures in folders of their classes, each of a colour and with noise."""
    paint(folder, range(n), classes, seed)
    return find_images(folder, "folders" if classes else "none")


def paint(folder: Path, numbers, classes: int = 3, seed: int = 5) -> None:
    for number in numbers:
        generator = np.random.default_rng([seed, number])
        kind = number % classes if classes else 0
        base = np.random.default_rng([seed, 1000 + kind]).integers(0, 160, (3, 3, 3))
        base = np.kron(base, np.ones((8, 8, 1), int))
        pixels = (base + generator.integers(0, 96, base.shape)).astype(np.uint8)
        path = folder / (f"c{kind}" if classes else "") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def broken_pictures(folder: Path) -> ImageSource:
    """Twelve pictures, of which one is empty, one no picture, and one cut short: `BAD`."""
    pictures(folder)
    (folder / BAD[0]).write_bytes(b"")
    (folder / BAD[1]).write_text("a letter")
    data = (folder / BAD[2]).read_bytes()
    (folder / BAD[2]).write_bytes(data[: len(data) // 2])
    return find_images(folder)


def inputs(toy: Toy, source: ImageSource) -> np.ndarray:
    return np.stack([toy.network.preprocess(source.open(i)) for i in range(len(source))])


def activations_of(toy: Toy, source: ImageSource) -> Tensor:
    return toy.network.forward(inputs(toy, source)).activations


def drawn(recipe: Recipe, embeddings: np.ndarray, labels: list[str | None]) -> np.ndarray:
    """The triplets that a build draws, `[N S 2]`."""
    finder, codes = NearestOthers(embeddings), label_codes(labels)
    return TripletSampler(embeddings, codes, finder, recipe).draw(np.arange(len(embeddings)))


def literal_weights(
    toy: Toy, source: ImageSource, recipe: Recipe, embeddings: np.ndarray, triplets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[n K]`, of HiResCAM `[n K H W]`, by a backward a triplet, and the triplets counted.

    The source's images are the last of those embedded.
    """
    own = embeddings[len(embeddings) - len(source) :]
    choices = {"method": recipe.method, "norm": recipe.norm, "normalize": toy.network.normalize}
    choices["hinge"] = recipe.margin if recipe.hinge else None
    rows = [
        averaged_weights(toy.head, maps, f, embeddings, pairs.tolist(), **choices)
        for maps, f, pairs in zip(activations_of(toy, source), own, triplets, strict=True)
    ]
    return np.stack([weights for weights, _ in rows]), np.array([used for _, used in rows])


def literal_centred(toy: Toy, source: ImageSource, recipe: Recipe, embeddings) -> np.ndarray:
    """Weights of the centred target, each image its own reference, `[N K]`."""
    centred = torch.from_numpy(embeddings - embeddings.astype(np.float64).mean(0))
    choices = {"method": recipe.method, "norm": recipe.norm, "normalize": toy.network.normalize}
    both = zip(activations_of(toy, source), map(dot_score, centred), strict=True)
    return np.stack([target_weights(toy.head, *each, **choices) for each in both])


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative difference of all rows together; rows that should be zero must be."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def everything(folder: Path) -> dict[str, str]:
    """Each file below a folder with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def opened(path: Path) -> Iterator[tuple[Index, np.ndarray]]:
    """An index and its live positions."""
    with Index.open(path) as index:
        yield index, index.live_positions()


def built(source: ImageSource, made_of: Toy, path: Path, recipe=None, **options: Any) -> Path:
    """Build an index; returns its path."""
    jobs.build_index(source, made_of.network, path, recipe, progress=False, **options)
    return path
