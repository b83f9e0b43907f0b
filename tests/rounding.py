"""Comparisons of what another processor, thread count or library version may round otherwise."""

from typing import Any

import numpy as np

VALUES = 1e-5
"""Relative tolerance of single precision sums: a hundred times their rounding."""
LEVEL = 1
STEP, RARE = 4, 1e-3
"""Between neighbouring colours of a map's 256 lie at most 4 levels; rounding seldom swaps them."""


def assert_same_picture(found, expected) -> None:
    """Every value is within one level, but for one in a thousand, which is within a step."""
    mine, other = np.asarray(found), np.asarray(expected)
    assert mine.shape == other.shape
    assert mine.dtype == other.dtype == np.uint8
    apart = np.abs(mine.astype(int) - other)
    assert apart.max() <= STEP, f"{apart.max()} levels apart"
    assert np.mean(apart > LEVEL) <= RARE, f"{np.mean(apart > LEVEL):.2%} of the values differ"


def same_values(found: Any, expected: Any) -> bool:
    """Whether two JSON-like structures are equal, numbers of floating point within `VALUES`."""
    if isinstance(expected, dict):
        alike = isinstance(found, dict) and found.keys() == expected.keys()
        return alike and all(same_values(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        alike = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return alike and all(map(same_values, found, expected))
    if isinstance(expected, float) and not isinstance(found, bool):
        same = {"rtol": VALUES, "atol": VALUES, "equal_nan": True}
        return isinstance(found, (int, float)) and bool(np.isclose(found, expected, **same))
    return bool(type(found) is type(expected) and found == expected)


def same_arrays(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays have one type and shape and, where of floating point, close values."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if found.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    return bool(np.allclose(found, expected, rtol=VALUES, atol=VALUES * scale))


def stretch(cam: Any, size: tuple[int, int], extent: Any = None) -> np.ndarray:
    """What a map is at each pixel's center: bilinear within its extent, 0 outside."""
    x0, y0, x1, y1 = extent or (0, 0, size[1], size[0])
    sides = []
    for cells, pixels, low, high in zip(np.shape(cam), size, (y0, x0), (y1, x1), strict=True):
        share = (np.arange(pixels) + 0.5 - low) / (high - low)
        at = np.clip(share * cells - 0.5, 0, cells - 1)[:, None]
        weights = np.maximum(0, 1 - np.abs(at - np.arange(cells)))
        sides.append(weights * ((share >= 0) & (share < 1))[:, None])
    return np.asarray(sides[0] @ np.asarray(cam) @ sides[1].T)
