"""Pixels in order of value: one rule for every metric that takes the first so many of them."""

import math

import numpy as np


def pixel_ranks(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order and rank of every pixel, the largest value first, ties by position (row by row).

    Args:
        maps: `[B H W]`.

    Returns:
        The flat positions in order, `[B H*W]`, and the place of each pixel in it, `[B H W]`, from
        0.
    """
    flat = maps.reshape(len(maps), -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(flat.shape[1]), flat.shape), axis=1)
    return order, ranks.reshape(maps.shape)


def pixel_count(fraction: float, pixels: int) -> int:
    """How many of `pixels` a share of them is: the nearest whole number, halves up, at least 1."""
    return max(1, math.floor(fraction * pixels + 0.5))
