"""Scenes of handwritten digits among clutter, with the true box of every digit.

The digits are scikit-learn's 1797 real ones, shared out so that no handwritten sample of one split
appears in another: what is measured on the queries is measured on unseen handwriting. Every scene
is a function of (seed, split, number) alone, so the number of scenes changes none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .doodles import draw_doodle

Split = Literal["train", "gallery", "query", "pair"]
Box = tuple[int, int, int, int]

#: Splits by handwriting; two-digit scenes show the queries' digits.
_SHARES = {"train": 0.6, "gallery": 0.2, "query": 0.2}
_STREAMS: dict[str, int] = {"train": 1, "gallery": 2, "query": 3, "pair": 4}
_N_DOODLES = 200
_PAD = 3
CLASSES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class PlacedDigit:
    """A digit of a scene: its class and its box (x0, y0, x1, y1) in pixels, ends excluded."""

    label: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `pixels` uint8 `[H W 3]` and its one or two digits, left one first."""

    pixels: np.ndarray
    digits: tuple[PlacedDigit, ...]


class SceneMaker:
    """Draws the scenes of one seed, at any size: coordinates are fractions of the side."""

    def __init__(self, seed: int = 0, size: int = 192) -> None:
        self.seed = seed
        self.size = size
        self._digits = _split_digits(seed)
        rng = np.random.default_rng([seed, 0])
        self._doodles = [draw_doodle(rng) for _ in range(_N_DOODLES)]

    def scene(self, split: Split, number: int) -> Scene:
        """Scene `number` of `split`; its class is `number % 10`, a pair's is drawn."""
        rng = np.random.default_rng([self.seed, _STREAMS[split], number])
        canvas = _Canvas(rng, self.size)
        regions: tuple[tuple[int, int, int], ...]
        if split == "pair":
            left, right = rng.permutation(10)[:2]
            half = self.size // 2
            regions = ((int(left), 0, half), (int(right), half, self.size))
        else:
            regions = ((number % 10, 0, self.size),)
        shapes = []
        for label, x0, x1 in regions:
            shape = _shape(
                rng, self._sample(rng, split, label), self.size * rng.uniform(0.30, 0.44)
            )
            shapes.append((str(label), shape, canvas.place(shape, x0, x1)))
        for _ in range(int(rng.integers(9, 14))):
            doodle = self._doodles[int(rng.integers(_N_DOODLES))]
            canvas.clutter(_shape(rng, doodle, self.size * rng.uniform(0.18, 0.34)))
        for _, shape, (x, y) in shapes:
            canvas.draw(shape, x, y, strength=float(rng.uniform(0.85, 1.0)))
        return Scene(canvas.pixels(), tuple(_placed(*placed) for placed in shapes))

    def _sample(self, rng: np.random.Generator, split: Split, label: int) -> np.ndarray:
        samples = self._digits["query" if split == "pair" else split][label]
        return samples[int(rng.integers(len(samples)))]


class _Canvas:
    """A picture in the making: ink `[H W]` in [0, 1] over a two-coloured backdrop."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self._rng = rng
        self._size = size
        self._ink = np.zeros((size, size), np.float32)
        self._taken = np.zeros((size, size), bool)

    def place(self, shape: np.ndarray, x0: int, x1: int) -> tuple[int, int]:
        """Reserve a random place for `shape` whose columns lie in [x0, x1)."""
        height, width = shape.shape
        x = int(self._rng.integers(x0, x1 - width + 1))
        y = int(self._rng.integers(0, self._size - height + 1))
        self._taken[y : y + height, x : x + width] = True
        return x, y

    def clutter(self, shape: np.ndarray) -> None:
        """Draw a doodle at a place where no digit is, if a few tries find one."""
        height, width = shape.shape
        for _ in range(8):
            x, y = (int(v) for v in self._rng.integers(-8, self._size - 8, size=2))
            spot = (slice(max(y, 0), y + height), slice(max(x, 0), x + width))
            if not self._taken[spot].any():
                self._taken[spot] = True
                self.draw(shape, x, y, strength=float(self._rng.uniform(0.85, 1.0)))
                return

    def draw(self, shape: np.ndarray, x: int, y: int, strength: float) -> None:
        """Lay ink on the canvas; what hangs over its edge is cut."""
        shape = shape[max(-y, 0) : self._size - y, max(-x, 0) : self._size - x] * strength
        x, y = max(x, 0), max(y, 0)
        spot = self._ink[y : y + shape.shape[0], x : x + shape.shape[1]]
        np.maximum(spot, shape, out=spot)

    def pixels(self) -> np.ndarray:
        """The finished picture, uint8 `[H W 3]`."""
        rng = self._rng
        hue, tilt = rng.uniform(0, 1, size=2)
        low, high = _colour(hue, 0.30, 0.13), _colour(hue + 0.08, 0.24, 0.36)
        paper = _smooth_noise(rng, self._size)[..., None]
        paper = low + (high - low) * paper
        ink = _colour(hue + 0.45 + 0.1 * tilt, 0.06, 0.92)
        alpha = self._ink[..., None]
        picture = paper * (1 - alpha) + ink * alpha
        return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def _split_digits(seed: int) -> dict[str, list[list[np.ndarray]]]:
    """Digits `[8 8]` in [0, 1] by split, then by class."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    order = np.random.default_rng([seed, 9]).permutation(len(images))
    ends = np.cumsum([int(share * len(order)) for share in _SHARES.values()])[:-1]
    parts = np.split(order, ends)
    return {
        split: [[images[i] for i in part if labels[i] == digit] for digit in range(10)]
        for split, part in zip(_SHARES, parts, strict=True)
    }


def _shape(rng: np.random.Generator, drawing: np.ndarray, height: float) -> np.ndarray:
    """Draw `[8 8]` large: `height` pixels tall, a little turned and slanted, cut to its ink."""
    side = round(height * (8 + 2 * _PAD) / 8)
    scale = (8 + 2 * _PAD) / side
    turn, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    aspect = rng.uniform(0.9, 1.2)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ np.array([[aspect, slant], [0, 1]])
    shift = (8 + 2 * _PAD) / 2 - matrix @ np.full(2, side / 2)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    padded = Image.fromarray(np.pad(drawing, _PAD))
    large = padded.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    # A soft threshold gives blown-up pixels the edge of a pen stroke.
    ink = 1 / (1 + np.exp(-12 * (np.asarray(large) - 0.48)))
    rows, columns = np.nonzero(ink.max(1) > 0.5)[0], np.nonzero(ink.max(0) > 0.5)[0]
    if not len(rows):
        return np.ones((2, 2), np.float32)
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cut.astype(np.float32)


def _placed(label: str, shape: np.ndarray, corner: tuple[int, int]) -> PlacedDigit:
    (height, width), (x, y) = shape.shape, corner
    return PlacedDigit(label, (x, y, x + width, y + height))


def _smooth_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cloudy texture `[size size]` in [0, 1]: noise of three scales."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((3, 0.5), (8, 0.3), (24, 0.2)):
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        total += weight * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(total, 0, 1)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV to RGB `[3]` in [0, 1]."""
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * wheel)).astype(np.float32)
