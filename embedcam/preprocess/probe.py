"""One fixed synthetic picture: what a network is asked about itself.

Whole-number arithmetic only: the same on every machine, with every version of every library.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

PROBE_SIZE = (240, 320)
"""(H, W) of the picture: not square, so that a crop and a squash of it differ."""


def probe_picture(index: int = 0) -> np.ndarray:
    """Return the synthetic picture of that number, uint8 `[240 320 3]`: slopes and texture."""
    height, width = PROBE_SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    channels = []
    for channel in range(3):
        slope = (x * (2 + channel) + y * (3 - channel) + 41 * index) // 4 % 256
        blocks = _scatter(x // 32, y // 24, 7 * index + channel)
        texture = _scatter(x // 3, y // 3, 7 * index + channel + 3)
        channels.append((2 * slope + 4 * blocks + 2 * texture) // 8)
    return np.stack(channels, axis=-1).astype(np.uint8)


def probe_inputs(
    count: int,
    preprocess: Callable[[Image.Image], np.ndarray] | None,
    size: tuple[int, int],
    channels: int = 3,
) -> np.ndarray:
    """Return pictures as inputs, float32 `[count C H W]`; in [-2, 2] where not preprocessed."""
    pictures = [probe_picture(index) for index in range(count)]
    if preprocess is not None:
        return np.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
    height, width = size
    rows = np.arange(height) * PROBE_SIZE[0] // height
    columns = np.arange(width) * PROBE_SIZE[1] // width
    sampled = np.stack([picture[rows][:, columns].transpose(2, 0, 1) for picture in pictures])
    sampled = sampled[:, np.arange(channels) % 3]
    return sampled.astype(np.float32) / np.float32(63.75) - np.float32(2)


def _scatter(x: np.ndarray, y: np.ndarray, salt: int) -> np.ndarray:
    """Return numbers 0..255 that look random, by mixing that never overflows int64."""
    mixed = (x * 73_856_093) ^ (y * 19_349_663) ^ ((salt + 1) * 83_492_791)
    mixed = (mixed & 0xFFFFFFF) * 2_654_435 & 0xFFFFFFFFFF
    bytes_: np.ndarray = mixed >> 16 & 0xFF
    return bytes_
