"""Maps drawn from channel weights, measured: pixels in order, energy, shares, intervals."""

import numpy as np
import torch
from photographs import SIZE, STEP, Features, Scenes

from embedcam.index.encoding import Encoding, LowRank
from embedcam.methods.weights import weights_from_pooled
from embedcam.metrics import bootstrap_interval, pixel_auc
from embedcam.offline.features import AffineHead
from embedcam.offline.merge import make_encoding, sample_places
from embedcam.offline.strategies import is_exact
from embedcam.ops import resize, signed_cam
from embedcam.recipe.recipe import Recipe

GRID = (7, 7)
COARSE_BYTES = 7 * 7 + 4 + 4  # own map, its scale, the count of triplets


def dense_weights(
    recipe: Recipe,
    head: AffineHead,
    gallery: Features,
    at_head: np.ndarray,
    used: np.ndarray | None,
) -> np.ndarray:
    """Averaged weights `[N K]`."""
    pooled = torch.from_numpy(gallery.pooled)
    marks = None if used is None else torch.from_numpy(used)
    made = weights_from_pooled(
        head, pooled, pooled, torch.from_numpy(at_head), marks, 49, recipe.method
    )
    return made.numpy()


def stored(
    recipe: Recipe,
    head: AffineHead,
    at_head: np.ndarray,
    dense: np.ndarray,
    mean: np.ndarray,
    embeddings: np.ndarray,
) -> tuple[np.ndarray, Encoding]:
    """Weights as an index gives them back: encoded and decoded, `[N K]`."""
    exact = is_exact(recipe, head.matrix)
    encoding = make_encoding(
        recipe,
        head.matrix if exact else None,
        GRID,
        mean,
        True,
        lambda: dense[sample_places(len(dense), recipe.seed)],
        dense.shape[1],
    )
    if exact and isinstance(encoding, LowRank):
        rows = {**encoding.encode_codes(at_head), "embedding": embeddings}
        return encoding.decode(rows), encoding
    return encoding.decode(encoding.encode(dense)), encoding


def energy_in(activations: np.ndarray, weights: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of each map's energy in its region `[N h w]`, projected by `projected`."""
    maps = drawn(activations, weights)
    inside, total = (maps * regions).sum((1, 2)), (maps * projected(None, maps)).sum((1, 2))
    chance = regions.sum((1, 2)) / projected(None, maps).sum()
    return np.where(total > 0, inside / np.where(total > 0, total, 1), chance)


def projected(regions: np.ndarray | None, maps: np.ndarray) -> np.ndarray:
    """Regions `[.. H W]` seen from the maps' grid; without regions, the whole picture.

    Resizing is linear, so sum(resize(map) * region) = sum(map * resize^T(region)): the same shares
    without drawing every map at full size.
    """
    h, w = maps.shape[-2:]
    down, across = (resize(np.eye(n, dtype=np.float32), (SIZE * n // 7, n)) for n in (h, w))
    whole = np.ones((len(down), len(across)), np.float32)
    return down.T @ (whole if regions is None else regions) @ across


def signed(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """signed_cam of activations in half or single precision, in blocks, float64 `[N h w]`."""
    blocks = (slice(i, i + 128) for i in range(0, len(weights), 128))
    found = [
        signed_cam(*(part[rows].astype(np.float32, copy=False) for part in (weights, activations)))
        for rows in blocks
    ]
    return np.concatenate(found).astype(np.float64)


def drawn(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same as it is drawn, after its ReLU."""
    return np.maximum(signed(activations, weights), 0)


def single_auc(activations: np.ndarray, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Pixel AUC of each picture's signed map, the object `[N 56 56]` against the rest, `[N]`."""
    maps = signed(activations, weights)
    blocks = (slice(i, i + 128) for i in range(0, len(maps), 128))
    finer = [resize(maps[rows], (SIZE, SIZE))[:, ::STEP, ::STEP] for rows in blocks]
    return pixel_auc(np.concatenate(finer), objects)


def pasted_auc(scenes: Scenes, weights: np.ndarray) -> np.ndarray:
    """AUC of each scene's signed map, the explained side's positions against the other's, `[2 n]`:
    upright, mirrored."""
    maps = signed(scenes.activations, weights)
    left = np.zeros(maps.shape[1:], bool)
    left[:, : left.shape[1] // 2] = True
    sides = np.where(scenes.left[:, None, None], left, ~left)
    return pixel_auc(maps, sides).reshape(2, -1)


def share_of(scenes: Scenes, weights: np.ndarray) -> np.ndarray:
    """Share of each scene's energy on the explained side, `[2 n]`: upright, mirrored."""
    half = np.zeros((SIZE, 2 * SIZE), np.float32)
    half[:, :SIZE] = 1
    sides = np.stack([projected(1 - half, scenes.activations), projected(half, scenes.activations)])
    shares = energy_in(scenes.activations, weights, sides[scenes.left.astype(int)])
    return shares.reshape(2, -1)


def explaining(embeddings: np.ndarray, labels: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """For each scene the nearest other picture of the explained one's class."""
    distances = 2 - 2 * embeddings[explained] @ embeddings.T
    distances[labels[explained][:, None] != labels] = np.inf
    distances[np.arange(len(explained)), explained] = np.inf
    return distances.argmin(1)


def figure(values: np.ndarray) -> str:
    """Mean and 95% bootstrap interval over images or scenes."""
    if values.ndim == 2:
        values = values.mean(0)
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def right(share: np.ndarray) -> str:
    """How often the larger half is the right one, with its interval."""
    return figure(halves(share))


def halves(share: np.ndarray) -> np.ndarray:
    """1 where the larger half is the right one, 1/2 for an even split."""
    return (share > 0.5) + 0.5 * (share == 0.5)
