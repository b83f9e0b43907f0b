"""Removed pixels filled in from their surroundings, so that the hole itself says little."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse.linalg import splu

from ..errors import InputError
from .checks import finite, whole

DIRECT, DIAGONAL = 1 / 6, 1 / 12
NEIGHBOURS = [
    (down, across, DIRECT if 0 in (down, across) else DIAGONAL)
    for down in (-1, 0, 1)
    for across in (-1, 0, 1)
    if (down, across) != (0, 0)
]


def noisy_linear_imputation(
    images: np.ndarray, masks: ArrayLike, noise: float = 0.01, seed: int = 0
) -> np.ndarray:
    """ROAD's imputation: a removed pixel is its neighbours' weighted mean (Rong et al., ICML 2022).

    The removed pixels of an image solve one sparse linear system a channel: direct neighbours weigh
    1/6, diagonal ones 1/12, removed or not; at the border of the picture the weights of those that
    are there are made to sum to 1. Gaussian noise is added to what was solved, to hide its
    smoothness.

    Args:
        images: `[B C H W]`, floating point, as the network takes them.
        masks: `[B H W]` booleans, true where a pixel is removed; not all of a picture.
        noise: standard deviation of the noise, in the images' units; 0 for none.
        seed: of the noise. Every image gets the same draw, so batches of any size give the same.

    Returns:
        `[B C H W]` in the images' type; what was not removed is as it was, bit for bit.

    Raises:
        InputError: shapes that do not go together, a NaN or an infinity, an empty batch, masks that
            are not booleans or that remove a whole picture, noise below 0.
    """
    images = np.asarray(images)
    if images.dtype.kind != "f":
        raise InputError(f"images of type {images.dtype} must be floating point; scale bytes first")
    pictures, masks = finite(images, "images", "B C H W"), np.asarray(masks)
    batch, channels, height, width = pictures.shape
    if masks.shape != (batch, height, width) or masks.dtype != bool:
        raise InputError(
            f"masks {list(masks.shape)} of type {masks.dtype} with images {list(images.shape)}; "
            "give booleans [B H W], true where a pixel is removed"
        )
    if masks.all((1, 2)).any():
        raise InputError(
            "a mask removes the whole picture, and nothing is left to fill it from; "
            "leave at least one pixel, or fill with a colour"
        )
    if not 0 <= noise < np.inf:
        raise InputError(f"noise = {noise}; it must be a standard deviation, 0 or more")
    filled = images.copy()
    draw = np.random.default_rng(whole(seed, "seed", 0)).normal(0, 1, (channels, height, width))
    alike: dict[bytes, list[int]] = {}
    for number, mask in enumerate(masks):
        alike.setdefault(np.packbits(mask).tobytes(), []).append(number)
    for numbers in alike.values():
        mask = masks[numbers[0]]
        if mask.any():
            solved = _solve(pictures[numbers].reshape(-1, height, width), mask)
            solved = solved.reshape(len(numbers), channels, -1) + noise * draw[:, mask]
            for number, values in zip(numbers, solved, strict=True):
                filled[number][:, mask] = values
    return filled


def _solve(planes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The removed pixels of planes `[P H W]` that share a mask `[H W]`, `[P removed]`.

    Each row is multiplied by the sum of its pixel's weights, which makes the matrix symmetric and
    spares the renormalisation at the border.
    """
    height, width = mask.shape
    size = int(mask.sum())
    place = np.full(mask.shape, -1)
    place[mask] = np.arange(size)
    total = np.zeros(mask.shape)
    known = np.zeros(planes.shape)
    rows, columns, values = [np.arange(size)], [np.arange(size)], []
    for down, across, weight in NEIGHBOURS:
        here = _shifted(-down, height), _shifted(-across, width)
        there = _shifted(down, height), _shifted(across, width)
        total[here] += weight
        known[:, *here] += weight * np.where(mask[there], 0, planes[:, *there])
        both = mask[here] & mask[there]
        rows.append(place[here][both])
        columns.append(place[there][both])
        values.append(np.full(len(rows[-1]), -weight))
    entries = np.concatenate([total[mask], *values])
    matrix = sparse.csc_matrix(
        (entries, (np.concatenate(rows), np.concatenate(columns))), shape=(size, size)
    )
    # One factorisation for all channels. At 224 x 224, on one core, it takes 0.01, 0.07 and 0.15 s
    # where a connected tenth, half and nine tenths are removed; conjugate gradients 0.03, 0.2 and
    # 0.6 s, and win only for scattered pixels. Symmetric and diagonally dominant: no pivoting.
    factors = splu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0, options={"SymmetricMode": True}
    )
    solved: np.ndarray = factors.solve(np.ascontiguousarray(known[:, mask].T)).T
    return solved


def _shifted(step: int, size: int) -> slice:
    """The part of an axis that, moved back by `step`, still lies in it."""
    return slice(max(step, 0), size + min(step, 0))
