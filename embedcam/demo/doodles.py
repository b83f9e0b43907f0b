"""Clutter: small drawings made like the digits, of which none is a digit.

The digits of scikit-learn are 32 x 32 bitmaps counted in 4 x 4 blocks. Doodles are drawn and
counted the same way, so that neither sharpness nor stroke width tells a digit from its
surroundings: only its shape does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

BITMAP = 32
BLOCK = 4


def draw_doodle(rng: np.random.Generator) -> np.ndarray:
    """One random doodle `[8 8]` float32 in [0, 1]."""
    bitmap = Image.new("L", (BITMAP, BITMAP))
    kind = DOODLES[int(rng.integers(len(DOODLES)))]
    kind(ImageDraw.Draw(bitmap), rng)
    if kind in _TURNED:
        bitmap = bitmap.rotate(float(rng.uniform(0, 180)))
    blocks = np.asarray(bitmap, np.float32).reshape(8, BLOCK, 8, BLOCK)
    return blocks.mean(axis=(1, 3)) / 255


def _hatching(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Parallel lines."""
    count = int(rng.integers(3, 5))
    for x in np.linspace(5, 26, count):
        draw.line([(x, rng.uniform(1, 7)), (x, rng.uniform(25, 31))], fill=255, width=3)


def _cross(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Two lines that cross in their middles."""
    draw.line([(3, 16), (29, 16)], fill=255, width=4)
    draw.line([(16, 3), (16, 29)], fill=255, width=4)


def _star(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Three lines through one point."""
    for angle in np.arange(3) * np.pi / 3:
        dx, dy = 14 * np.cos(angle), 14 * np.sin(angle)
        draw.line([(16 - dx, 16 - dy), (16 + dx, 16 + dy)], fill=255, width=3)


def _zigzag(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A line with four or five turns."""
    turns = int(rng.integers(5, 7))
    top, bottom = rng.uniform(5, 10), rng.uniform(22, 27)
    ys = [top if i % 2 else bottom for i in range(turns)]
    draw.line(list(zip(np.linspace(1, 30, turns), ys, strict=True)), fill=255, width=4)


def _waves(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Two or three wavy lines, one above the other."""
    xs = np.linspace(1, 30, 16)
    for y in np.linspace(8, 24, int(rng.integers(2, 4))):
        ys = y + 3 * np.sin(xs / 30 * 4 * np.pi + rng.uniform(0, 1))
        draw.line(list(zip(xs, ys, strict=True)), fill=255, width=3)


def _dots(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Scattered dots."""
    for _ in range(int(rng.integers(4, 8))):
        x, y = rng.uniform(4, 28, size=2)
        radius = rng.uniform(2, 3.5)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)


def _grid(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Two lines across two lines."""
    for at in (10, 22):
        draw.line([(at, 2), (at, 30)], fill=255, width=3)
        draw.line([(2, at), (30, at)], fill=255, width=3)


def _patch(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A filled polygon of three to six corners."""
    corners = int(rng.integers(3, 7))
    angles = (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * np.pi / corners
    radii = rng.uniform(9, 14, corners)
    points = zip(16 + radii * np.cos(angles), 16 + radii * np.sin(angles), strict=True)
    draw.polygon(list(points), fill=255)


def _bolt(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Three chevrons, one above the other."""
    for y in (4, 13, 22):
        draw.line([(5, y), (16, y + 7), (27, y)], fill=255, width=3)


Doodle = Callable[[ImageDraw.ImageDraw, np.random.Generator], None]
DOODLES: tuple[Doodle, ...] = (
    _hatching,
    _cross,
    _star,
    _zigzag,
    _waves,
    _dots,
    _grid,
    _patch,
    _bolt,
)
# A zigzag stood on its end can be read as a 3.
_TURNED = frozenset(DOODLES) - {_zigzag, _waves}
