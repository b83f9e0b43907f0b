"""Scenes of handwritten digits among clutter, with the true box of every digit, and their files.

The digits are scikit-learn's 1797 real ones, shared out so that no handwritten sample of one split
appears in another: what is measured on the queries is measured on unseen handwriting. Every scene
is a function of (seed, split, number) alone, so the number of scenes changes none of them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .._files import make_folder, write_whole
from ..images.progress import progress_of
from .settings import DemoSettings

Split = Literal["train", "gallery", "query", "pair"]
SPLITS: tuple[Split, ...] = ("train", "gallery", "query", "pair")
Box = tuple[int, int, int, int]
TABLE = "annotations.csv"
COLUMNS = ("path", "label", "x0", "y0", "x1", "y1", "width", "height", "split")

# Splits by handwriting; two-digit scenes show the queries' digits.
_SHARES = {"train": 0.6, "gallery": 0.2, "query": 0.2}
_STREAMS = {split: stream for stream, split in enumerate(SPLITS, 1)}
_N_DOODLES = 200
_PAD = 3


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
        self.seed, self.size = seed, size
        self._digits = _split_digits(seed)
        rng = np.random.default_rng([seed, 0])
        self._doodles = [draw_doodle(rng) for _ in range(_N_DOODLES)]

    def scene(self, split: Split, number: int, two: bool | None = None) -> Scene:
        """Draw scene `number` of `split`; its class is `number % 10`, those of two are drawn.

        two: whether there are two digits, side by side; None: in a pair only.
        """
        rng = np.random.default_rng([self.seed, _STREAMS[split], number])
        canvas, digits = (
            _Canvas(rng, self.size),
            self._digits["query" if split == "pair" else split],
        )
        labels, ends = [number % 10], [0, self.size]
        if split == "pair" if two is None else two:
            labels, ends = rng.permutation(10)[:2].tolist(), [0, self.size // 2, self.size]
        placed, shapes = [], []
        for label, x0, x1 in zip(labels, ends, ends[1:], strict=False):
            sample = digits[label][int(rng.integers(len(digits[label])))]
            shape = _shape(rng, sample, self.size * rng.uniform(0.30, 0.44))
            x, y = canvas.place(shape, x0, x1)
            box = (x, y, x + shape.shape[1], y + shape.shape[0])
            placed.append(PlacedDigit(str(label), box))
            shapes.append(shape)
        for _ in range(int(rng.integers(9, 14))):
            doodle = self._doodles[int(rng.integers(_N_DOODLES))]
            canvas.clutter(_shape(rng, doodle, self.size * rng.uniform(0.18, 0.34)))
        for one, shape in zip(placed, shapes, strict=True):
            canvas.draw(shape, *one.box[:2])
        return Scene(canvas.pixels(), tuple(placed))


class _Canvas:
    """A picture in the making: ink `[H W]` in [0, 1] over a two-colored backdrop."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self._rng, self._size = rng, size
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
                self.draw(shape, x, y)
                return

    def draw(self, shape: np.ndarray, x: int, y: int) -> None:
        """Lay ink on the canvas, of some strength; what hangs over its edge is cut."""
        strength = float(self._rng.uniform(0.85, 1.0))
        shape = shape[max(-y, 0) : self._size - y, max(-x, 0) : self._size - x] * strength
        x, y = max(x, 0), max(y, 0)
        spot = self._ink[y : y + shape.shape[0], x : x + shape.shape[1]]
        np.maximum(spot, shape, out=spot)

    def pixels(self) -> np.ndarray:
        """Return the finished picture, uint8 `[H W 3]`."""
        rng = self._rng
        hue, tilt = rng.uniform(0, 1, size=2)
        low, high = _color(hue, 0.30, 0.13), _color(hue + 0.08, 0.24, 0.36)
        paper = low + (high - low) * _smooth_noise(rng, self._size)[..., None]
        ink, alpha = _color(hue + 0.45 + 0.1 * tilt, 0.06, 0.92), self._ink[..., None]
        picture = paper * (1 - alpha) + ink * alpha
        return np.asarray(np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8))


def _split_digits(seed: int) -> dict[str, list[list[np.ndarray]]]:
    """Return digits `[8 8]` in [0, 1] by split, then by class."""
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


def _smooth_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a cloudy texture `[size size]` in [0, 1]: noise of three scales."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((3, 0.5), (8, 0.3), (24, 0.2)):
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        total += weight * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(total, 0, 1)


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert HSV to RGB `[3]` in [0, 1]."""
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation + saturation * wheel), np.float32)


def write_scenes(settings: DemoSettings, folder: Path, progress: bool = True) -> None:
    """Write gallery/, query/ (a folder per class), pairs/ and the table, the table last."""
    side = settings.scene_size
    maker, lines = SceneMaker(settings.seed, side), [",".join(COLUMNS)]
    numbers: list[tuple[Split, int]] = [
        *(("gallery", number) for number in range(settings.n_gallery)),
        *(("query", number) for number in range(settings.n_query)),
        *(("pair", number) for number in range(settings.n_pairs)),
    ]
    shown = None if progress else False
    with progress_of("scenes", len(numbers), "scenes", shown=shown) as advance:
        for split, number in numbers:
            scene = maker.scene(split, number)
            place = "pairs" if split == "pair" else f"{split}/{scene.digits[0].label}"
            name = f"{place}/{split}-{number:04d}.png"
            make_folder((folder / name).parent)
            Image.fromarray(scene.pixels).save(folder / name, compress_level=1)
            for digit in scene.digits:
                lines.append(",".join(map(str, (name, digit.label, *digit.box, side, side, split))))
            advance(1)
    write_whole(folder / TABLE, "\n".join([*lines, ""]))


def read_scenes(folder: Path, split: Split) -> dict[str, list[PlacedDigit]]:
    """Return the digits of a split's written scenes by path below `folder`, left one first."""
    scenes: dict[str, list[PlacedDigit]] = {}
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                x0, y0, x1, y1 = (int(row[edge]) for edge in COLUMNS[2:6])
                digit = PlacedDigit(row["label"], (x0, y0, x1, y1))
                scenes.setdefault(row["path"], []).append(digit)
    return scenes


# Clutter: small drawings made like the digits, of which none is a digit. The digits of scikit-learn
# are 32 x 32 bitmaps counted in 4 x 4 blocks. Doodles are drawn and counted the same way, so that
# neither sharpness nor stroke width tells a digit from its surroundings: only its shape does.
_BITMAP, _BLOCK = 32, 4


def draw_doodle(rng: np.random.Generator) -> np.ndarray:
    """Draw one random doodle `[8 8]` float32 in [0, 1]."""
    bitmap = Image.new("L", (_BITMAP, _BITMAP))
    kind = DOODLES[int(rng.integers(len(DOODLES)))]
    kind(ImageDraw.Draw(bitmap), rng)
    if kind in _TURNED:
        bitmap = bitmap.rotate(float(rng.uniform(0, 180)))
    blocks = np.asarray(bitmap, np.float32).reshape(8, _BLOCK, 8, _BLOCK)
    return np.asarray(blocks.mean(axis=(1, 3)) / 255)


def _lines(draw: ImageDraw.ImageDraw, width: int, *lines: Sequence[tuple[float, float]]) -> None:
    for line in lines:
        draw.line(list(line), 255, width)


def _hatching(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for x in np.linspace(5, 26, int(rng.integers(3, 5))):
        _lines(draw, 3, [(x, rng.uniform(1, 7)), (x, rng.uniform(25, 31))])


def _cross(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _lines(draw, 4, [(3, 16), (29, 16)], [(16, 3), (16, 29)])


def _star(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for angle in np.arange(3) * np.pi / 3:
        dx, dy = 14 * np.cos(angle), 14 * np.sin(angle)
        _lines(draw, 3, [(16 - dx, 16 - dy), (16 + dx, 16 + dy)])


def _zigzag(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    turns, ys = int(rng.integers(5, 7)), (rng.uniform(5, 10), rng.uniform(22, 27))
    xs = np.linspace(1, 30, turns)
    _lines(draw, 4, [(x, ys[place % 2 == 0]) for place, x in enumerate(xs)])


def _waves(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    xs = np.linspace(1, 30, 16)
    for y in np.linspace(8, 24, int(rng.integers(2, 4))):
        ys = y + 3 * np.sin(xs / 30 * 4 * np.pi + rng.uniform(0, 1))
        _lines(draw, 3, list(zip(xs, ys, strict=True)))


def _dots(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(4, 8))):
        x, y = rng.uniform(4, 28, size=2)
        radius = rng.uniform(2, 3.5)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)


def _grid(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for at in (10, 22):
        _lines(draw, 3, [(at, 2), (at, 30)], [(2, at), (30, at)])


def _patch(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    corners = int(rng.integers(3, 7))
    angles = (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * np.pi / corners
    radii = rng.uniform(9, 14, corners)
    points = zip(16 + radii * np.cos(angles), 16 + radii * np.sin(angles), strict=True)
    draw.polygon(list(points), fill=255)


def _bolt(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _lines(draw, 3, *([(5, y), (16, y + 7), (27, y)] for y in (4, 13, 22)))


DOODLES = (_hatching, _cross, _star, _zigzag, _waves, _dots, _grid, _patch, _bolt)
# A zigzag stood on its end can be read as a 3.
_TURNED = frozenset(DOODLES) - {_zigzag, _waves}
