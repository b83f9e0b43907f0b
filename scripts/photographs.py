"""Labelled photographs with boxes or masks: read, put through a frozen network, pasted in pairs.

A data folder holds `annotations.csv` (path,label,x0,y0,x1,y1,width,height and perhaps mask), as
scripts/prepare_data.py makes it.
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from embedcam import EmbeddingNetwork
from embedcam.images import read_image
from embedcam.metrics import box_mask

SIZE, N_SCENES = 224, 500
STEP = 4
"""Every so many pixels, down and across, their order in a map is measured."""
BATCH = 8
"""Pictures a forward pass; on a CPU few at once stay in its cache."""


@dataclass
class Pictures:
    """A data set: where its pictures lie, what they show, and where."""

    paths: list[Path]
    labels: np.ndarray
    regions: np.ndarray
    """`[N 224 224]` in [0, 1]; once the grid is known, seen from it, `[N 7 7]`."""
    objects: np.ndarray
    """Of every `STEP`th pixel whether it lies in the region, `[N 56 56]`."""

    def some(self, chosen: np.ndarray) -> "Pictures":
        """Those for which a mask `[N]` is true."""
        paths = [path for path, kept in zip(self.paths, chosen, strict=True) if kept]
        return Pictures(paths, self.labels[chosen], self.regions[chosen], self.objects[chosen])

    def seen(self) -> np.ndarray:
        """Whether a picture is of the first half of the classes, which train the head, `[N]`."""
        classes = sorted(set(self.labels))
        return np.isin(self.labels, classes[: len(classes) // 2])


@dataclass
class Features:
    """Frozen activations `[N K 7 7]` and pooled vectors `[N K]` of pictures."""

    activations: np.ndarray
    pooled: np.ndarray


@dataclass
class Scenes:
    """Side-by-side pairs `[n K 7 14]`, which picture is explained, on which side, beside which."""

    activations: np.ndarray
    explained: np.ndarray
    left: np.ndarray
    other: np.ndarray
    pooled: np.ndarray


def read_pictures(folder: Path) -> Pictures:
    """Paths, labels and regions (masks where given, else boxes) at 224 x 224."""
    paths, labels, regions = [], [], []
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            paths.append(folder / row["path"])
            labels.append(row["label"])
            if row.get("mask"):
                mask = Image.open(folder / row["mask"]).convert("L")
                shrunk = mask.resize((SIZE, SIZE), Image.Resampling.BOX)
                regions.append(np.asarray(shrunk, np.float32) / 255)
                continue
            x0, y0, x1, y1 = (float(row[n]) for n in ("x0", "y0", "x1", "y1"))
            across, down = SIZE / float(row["width"]), SIZE / float(row["height"])
            box = (x0 * across, y0 * down, x1 * across, y1 * down)
            regions.append(box_mask(box, (SIZE, SIZE)).astype(np.float32))
    stacked = np.stack(regions)
    objects = stacked[:, ::STEP, ::STEP] >= 0.5
    return Pictures(paths, np.array(labels), stacked, objects)


def forward(
    network: EmbeddingNetwork,
    pictures: Iterator[Image.Image],
    total: int,
    size: tuple[int, int],
    what: str,
) -> Features:
    """Frozen activations, in small batches, half precision in memory."""
    prepare = replace(network.preprocess, size=size)
    kept, pooled, batch = [], [], []
    for number, picture in enumerate(pictures, 1):
        batch.append(prepare(picture))
        if len(batch) == BATCH or number == total:
            activations = network.forward(np.stack(batch)).activations
            kept.append(activations.half().numpy())
            pooled.append(activations.mean((-2, -1)).numpy())
            batch = []
            print(f"\r{what}: {number}/{total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Features(np.concatenate(kept), np.concatenate(pooled))


def scene_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seeded pairs of pictures of different classes; the first of each is explained."""
    generator = np.random.default_rng(0)
    first = generator.integers(len(labels), size=N_SCENES)
    second = [generator.choice(np.flatnonzero(labels != labels[i])) for i in first]
    return first, np.array(second)


def scene_picture(
    unseen: Pictures, number: int, first: np.ndarray, second: np.ndarray
) -> Image.Image:
    """The pair of that number side by side; from n on, pair number - n mirrored."""
    scene = Image.new("RGB", (2 * SIZE, SIZE))
    for place, one in enumerate((first, second)):
        scene.paste(squashed(unseen.paths[one[number % len(first)]]), (place * SIZE, 0))
    mirrored = number >= len(first)
    return scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else scene


def scenes_of(features: Features, first: np.ndarray, second: np.ndarray) -> Scenes:
    """Scenes of the pairs and their mirror images, in the order of `scene_picture`."""
    left = np.repeat([True, False], len(first))
    return Scenes(
        features.activations, np.tile(first, 2), left, np.tile(second, 2), features.pooled
    )


def train_head(pooled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The reference embedding's matrix `[128 K]`."""
    torch.manual_seed(0)
    centred = pooled - pooled.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:128]
    head = nn.Linear(pooled.shape[1], len(directions), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(directions))
    loss = nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: ((a - b) ** 2).sum(-1), margin=0.2
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4)
    generator = np.random.default_rng(0)
    inputs = torch.from_numpy(pooled)
    for _ in range(100):
        anchors = generator.integers(len(labels), size=128)
        same = [generator.choice(_others(labels, a, same=True)) for a in anchors]
        other = [generator.choice(_others(labels, a, same=False)) for a in anchors]
        a, p, n = (nn.functional.normalize(head(inputs[rows])) for rows in (anchors, same, other))
        optimizer.zero_grad()
        loss(a, p, n).backward()
        optimizer.step()
    return head.weight.detach().numpy()


def _others(labels: np.ndarray, anchor: int, same: bool) -> np.ndarray:
    chosen = (labels == labels[anchor]) == same
    chosen[anchor] = False
    return np.flatnonzero(chosen)


def squashed(path: Path) -> Image.Image:
    """A picture at 224 x 224, nothing cut off."""
    return read_image(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def loaded(paths: list[Path]) -> Iterator[Image.Image]:
    return (squashed(path) for path in paths)
