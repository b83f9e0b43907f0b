"""How good a map and a ranking are: pure functions over arrays, no threshold, no sharpening."""

from collections.abc import Callable

import numpy as np

from .errors import InputError


def energy_share(maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Share of each map's energy that lies inside a region (Chen et al., WACV 2020, section 4.2).

    A map without energy tells nothing: it scores chance, the region's share of the area.

    Args:
        maps: `[B H W]`, >= 0.
        inside: the region, `[B H W]`: booleans, or the covered part of each pixel in [0, 1].

    Returns:
        `[B]` float64 in [0, 1].
    """
    maps, inside = np.asarray(maps, np.float64), np.asarray(inside, np.float64)
    if maps.shape != inside.shape or maps.ndim != 3:
        raise InputError(
            f"maps {list(maps.shape)} and regions {list(inside.shape)} must both be [B H W]"
        )
    if not (maps >= 0).all():
        raise InputError("a map must be >= 0 everywhere; got a NaN or a negative value")
    total = maps.sum((1, 2))
    chance = inside.mean((1, 2))
    return np.where(total > 0, (maps * inside).sum((1, 2)) / np.where(total > 0, total, 1), chance)


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """A box as the covered part of each pixel, `[H W]` in [0, 1].

    Args:
        box: x0, y0, x1, y1 in pixels of the map, edges between pixels; parts outside are cut.
        size: (H, W).
    """
    x0, y0, x1, y1 = box
    rows, columns = np.arange(size[0]), np.arange(size[1])
    down = np.clip(np.minimum(rows + 1, y1) - np.maximum(rows, y0), 0, 1)
    across = np.clip(np.minimum(columns + 1, x1) - np.maximum(columns, x0), 0, 1)
    return down[:, None] * across[None, :]


def recall_at_k(embeddings: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of images with an image of their own label among their k nearest others.

    Args:
        embeddings: `[N D]`; nearness is squared Euclidean distance, leave-one-out.
        labels: `[N]`.
        k: neighbours looked at, 1 to N - 1.
    """
    embeddings, labels = np.asarray(embeddings, np.float64), np.asarray(labels)
    if not 1 <= k < len(embeddings):
        raise InputError(f"k = {k} with {len(embeddings)} images; k must be 1 to N - 1")
    squares = (embeddings**2).sum(1)
    hits = 0
    for start in range(0, len(embeddings), 1024):
        rows = slice(start, start + 1024)
        distances = squares[rows, None] + squares - 2 * embeddings[rows] @ embeddings.T
        own = np.arange(start, start + len(distances))
        distances[np.arange(len(distances)), own] = np.inf
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        hits += int((labels[nearest] == labels[own, None]).any(1).sum())
    return hits / len(embeddings)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval over images or scenes (Efron 1979).

    Args:
        values: `[N]`, one figure an image or scene.
        statistic: called with `axis=1` on `[draws N]`.
        level: coverage.
        draws: resamples.
        seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    resampled = values[generator.integers(0, len(values), (draws, len(values)))]
    low, high = np.quantile(statistic(resampled, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
