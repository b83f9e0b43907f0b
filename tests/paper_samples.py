"""A tiny data set laid out as examples/prepare_data.py makes it, and a network for it."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn
from toys import seeded

from embedcam import EmbeddingNetwork
from embedcam.preprocess import Preprocess

CHANNELS, CLASSES, EACH = 12, 8, 8


def tiny_network() -> EmbeddingNetwork:
    module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, CHANNELS, 32, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    )
    return EmbeddingNetwork(module, "1", preprocess=Preprocess.imagenet(224), name="tiny")


def made_data(folder: Path) -> Path:
    """A coloured, striped block a picture, on noise; its colour is its class's."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (CLASSES, 3))
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(CLASSES * EACH):
        kind = number % CLASSES
        pixels = generator.integers(60, 190, (60, 80, 3))
        x, y = int(generator.integers(5, 40)), int(generator.integers(5, 25))
        pixels[y : y + 30, x : x + 30] = colours[kind] * generator.uniform(0.7, 1)
        pixels[y : y + 30 : 2 + kind % 3, x : x + 30] //= 2
        path = f"images/{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path)
        rows.append((path, f"class{kind}", x, y, x + 30, y + 30, 80, 60))
    with (folder / "annotations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "x0", "y0", "x1", "y1", "width", "height"))
        writer.writerows(rows)
    return folder
