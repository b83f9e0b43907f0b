"""Pure functions from weights and activations to a map: `cam`, resizing, sharpening, transfer.

Of NumPy arrays or torch tensors, by what both share: services can stay without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ._checks import one_of
from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
"""A NumPy array or a torch tensor; what comes in is what goes out."""
MODES = ("mean", "distance")
_ALONE, _SHARED, _FEW = 1 << 18, 1 << 24, 64
"""Multiplications up to which BLAS uses one thread, and from which several are worth waiting for;
rows of a product that is cut by its columns."""


def cam(weights: Array, activations: Array) -> Array:
    """Return the class activation map ReLU(sum_k w_k A_k) (Selvaraju et al. 2017, eq. 2).

    Parameters
    ----------
    weights
        Of channels, `[B K]` or `[K]`; or by position, of the activations' own shape (Draelos and
        Carin 2020, eq. 2).
    activations
        `[B K H W]`, or `[K H W]` for one image.

    Returns
    -------
    array
        The map, `[B H W]` or `[H W]`, >= 0, not normalised.
    """
    return signed_cam(weights, activations).clip(min=0)


def signed_cam(weights: Array, activations: Array) -> Array:
    """Return the map before its ReLU, sum_k w_k A_k: negative where the picture speaks against."""
    w_shape, a_shape = tuple(weights.shape), tuple(activations.shape)
    signed: Array
    if w_shape == a_shape and len(a_shape) in (3, 4):
        signed = (weights * activations).sum(-3)
        return signed
    if not w_shape or w_shape != a_shape[:-2]:
        raise InputError(
            f"weights {list(w_shape)} and activations {list(a_shape)} do not belong together; "
            "expected [B K] with [B K H W], or [K] with [K H W], or weights by position of the "
            "activations' own shape"
        )
    signed = weights[..., None, :] @ activations.reshape(*w_shape, -1)
    return signed.reshape(*w_shape[:-1], *a_shape[-2:])


def product(few: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the product of a few rows `[n R]` and a matrix `[R K]`, on the calling thread.

    BLAS would divide it among threads and wait for the last of them; where the cores are busy that
    takes many times as long as the product.
    """
    multiplied = len(few) * matrix.size
    if not _ALONE < multiplied <= _SHARED or len(few) > _FEW:
        return np.asarray(few @ matrix)
    columns = max(1, _ALONE // (len(few) * len(matrix)))
    whole = np.empty((len(few), matrix.shape[1]), np.result_type(few, matrix))
    for at in range(0, matrix.shape[1], columns):
        part = slice(at, at + columns)
        np.matmul(few, matrix[:, part], out=whole[:, part])
    return whole


def signed_cams(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Return signed maps `[n H W]` of one image `[K H W]` by weights `[n K]` or `[n K H W]`."""
    if weights.ndim == 2:
        flat = product(weights, activations.reshape(len(activations), -1))
        return np.asarray(flat.reshape(len(weights), *activations.shape[1:]))
    return np.asarray(np.einsum("nkhw,khw->nhw", weights, activations))


def attended(activations: np.ndarray, cam_map: np.ndarray) -> np.ndarray:
    """Return activations averaged where a map lies, sum_ij M_ij A_k,ij / sum_ij M_ij, `[K]`.

    As Chen et al. (WACV 2020) do it for house prices; under an empty map the plain mean. A map on
    another grid than the activations' `[K h w]` is averaged down, or interpolated where coarser.
    """
    size = activations.shape[1:]
    if cam_map.shape != size:
        fits = size[0] <= cam_map.shape[0] and size[1] <= cam_map.shape[1]
        cam_map = area_average(cam_map, size) if fits else resize(cam_map, size)
    # Shares of 1, so that neither a large nor a tiny map leaves float32's range.
    shares = np.asarray(cam_map, np.float64).ravel()
    total = shares.sum()
    shares = shares / total if total > 0 else np.full(shares.size, 1 / shares.size)
    return np.asarray(activations.reshape(len(activations), -1) @ shares.astype(np.float32))


def joined(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Return signed maps C `[... h w]` and F `[... H W]` of one picture as one, with mean 0.

    s_c ((U(C) - mean U(C)) / s_c + (F - mean F) / s_f), s the standard deviations.
    """
    pair = resize(coarse, _sides(fine)), fine
    upper, lower = (one - one.mean((-2, -1), keepdims=True) for one in pair)
    s_c, s_f = ((one * one).mean((-2, -1), keepdims=True) ** 0.5 for one in (upper, lower))
    # A map that varies by its own rounding alone says nothing, however far it is stretched.
    flat = s_f <= 1e-6 * np.abs(fine).mean((-2, -1), keepdims=True)
    return np.asarray(upper + lower * (s_c / (s_f + flat)) * ~flat)


def drawn_and_signed(
    weights: Sequence[np.ndarray],
    activations: Sequence[np.ndarray],
    finer: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the map >= 0 of a picture, or of several, by all layers, and before its ReLU.

    Weights `[K]` and activations `[K h w]` are of each layer, deepest first, or with a leading B;
    only the deepest says what speaks against. With `finer` activations both maps are `joined`.
    """
    signed = signed_cam(weights[0], activations[0])
    if finer is not None:
        signed = joined(signed, signed_cam(weights[0], finer[0]))
    positive = np.maximum(signed, 0)
    layers = activations if finer is None else finer
    for layer_weights, maps in zip(weights[1:], layers[1:], strict=True):
        positive = sharpen(cam(layer_weights, maps), positive)
    if len(weights) > 1:
        signed = positive + np.minimum(resize(signed, _sides(positive)), 0) * (positive == 0)
    return positive, signed


def picture_maps(
    weights: Sequence[np.ndarray],
    activations: Sequence[np.ndarray],
    finer: Sequence[np.ndarray] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `drawn_and_signed` of one picture at a size, and its `attended` activations `[K]`."""
    positive, signed = drawn_and_signed(weights, activations, finer)
    features = attended((activations if finer is None else finer)[0], positive)
    if size is not None:
        positive, signed = resize(positive, size), resize(signed, size)
    return positive, signed, features


def resize(maps: Array, size: tuple[int, int]) -> Array:
    """Return maps `[... h w]` at (H, W) by bilinear interpolation U(.), within their range.

    Pixel centers are aligned (`align_corners=False`); there is no antialiasing.
    """
    height, width = _checked_size(size)
    h, w = _sides(maps)
    # Eight bytes a number is float64 in either library.
    kind = "float64" if maps.itemsize == 8 else "float32"
    return _sandwich(maps, _bilinear(h, height, kind), _bilinear(w, width, kind))


def area_average(maps: Array, size: tuple[int, int]) -> Array:
    """Return maps `[... h w]` averaged over equal rectangles at (H, W), exactly, by area."""
    height, width = _checked_size(size)
    h, w = _sides(maps)
    if height > h or width > w:
        raise InputError(f"a {h} x {w} map cannot be averaged to {height} x {width}; use resize")
    return _sandwich(maps, _area(h, height), _area(w, width))


def sharpen(fine: Array, coarse: Array) -> Array:
    """Return L(R) U(P): a coarse map P `[... h w]` with the structure of a finer R `[... H W]`.

    L(R) = R / U(D(R)), D bilinear down to the size of P and U back up (Englebert et al. 2022): how
    R differs within the positions of P. It is 0 where U(D(R)) is 0 to the rounding of R's largest.
    """
    size, (largest, _) = _sides(fine), _ends(fine)
    around = resize(resize(fine, _sides(coarse)), size)
    seen = around > largest * (2.0**-52 if fine.itemsize == 8 else 2.0**-23)
    sharpened: Array = fine / (around * seen + ~seen) * seen * resize(coarse, size)
    return sharpened


def normalize(maps: Array) -> Array:
    """Return each map `[... H W]` min-max normalised to [0, 1]; a constant one becomes zeros.

    It hides how strong the evidence is: never use it before comparing maps.
    """
    floats = _floating(maps)
    high, low = _ends(floats)
    span = high - low
    scaled: Array = (floats - low) / (span + (span == 0))
    return scaled


def coefficients(norms: np.ndarray, distances: np.ndarray, mode: str = "mean") -> np.ndarray:
    """Return what each neighbor's weights are multiplied by before they are summed, `[... n]`.

    `mean`: each neighbor's weights divided by their L2 norm `[... n]`, then averaged. `distance`:
    the same with shares 1 / Euclidean distance (of *squared* distances `[... n]`), where exact
    matches take all. One neighbor: its weights, unscaled. Weights that are all zero take no share.
    """
    norms, distances = np.asarray(norms, np.float64), np.asarray(distances, np.float64)
    if mode not in MODES:
        one_of("transfer", mode, MODES)
    if norms.shape != distances.shape or norms.ndim == 0 or norms.shape[-1] == 0:
        raise InputError(
            f"norms {list(norms.shape)} and distances {list(distances.shape)} must have one shape "
            "[... n] with at least one neighbour"
        )
    n = norms.shape[-1]
    queries = zip(norms.reshape(-1, n).tolist(), distances.reshape(-1, n).tolist(), strict=True)
    shares = [_of_one_query(lengths, apart, mode) for lengths, apart in queries]
    return np.array(shares, np.float32).reshape(norms.shape)


def rival_coefficients(norms: np.ndarray) -> np.ndarray:
    """Return (1 / |w_A|, -1 / |w_B|) of a result's and its rival's norms `[2]`: both at length 1.

    Weights that are all zero stay zero.
    """
    lengths = np.asarray(norms, np.float64)
    inverse = np.divide(1, lengths, out=np.zeros(2), where=lengths > 0)
    return (inverse * (1, -1)).astype(np.float32)


def transfer(weights: np.ndarray, distances: np.ndarray, mode: str = "mean") -> np.ndarray:
    """Return query weights `[... K]` float32 from neighbors' `[... n K]`; see `coefficients`."""
    weights = np.asarray(weights)
    norms = np.linalg.norm(weights.astype(np.float64), axis=-1)
    share = coefficients(norms, distances, mode)
    return (share[..., None, :] @ weights.astype(np.float32, copy=False))[..., 0, :]


def _of_one_query(norms: list[float], distances: list[float], mode: str) -> list[float]:
    # In Python: ten neighbors are done before NumPy has set up its first operation.
    if not all(value >= 0 for values in (norms, distances) for value in values):
        raise InputError("norms and distances must be numbers >= 0; got a NaN or a negative value")
    if len(norms) == 1:
        return [1.0]
    shares = [float(norm > 0) for norm in norms]
    if mode == "distance":
        exact = [share * (apart == 0) for share, apart in zip(shares, distances, strict=True)]
        near = zip(shares, distances, strict=True)
        shares = exact if any(exact) else [s and 1 / math.sqrt(apart) for s, apart in near]
    total = sum(shares)
    return [share and share / total / norm for share, norm in zip(shares, norms, strict=True)]


def _sides(maps: Array) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _floating(maps: Array) -> Array:
    if isinstance(maps, np.ndarray):
        return maps if maps.dtype.kind == "f" else maps.astype(np.float32)
    return maps if maps.is_floating_point() else maps.float()


def _ends(maps: Array) -> tuple[Array, Array]:
    """Return the largest and the smallest number of each map, `[... 1 1]`."""
    if isinstance(maps, np.ndarray):
        return maps.max((-2, -1), keepdims=True), maps.min((-2, -1), keepdims=True)
    return maps.amax((-2, -1), keepdim=True), maps.amin((-2, -1), keepdim=True)


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if int(height) < 1 or int(width) < 1:
        raise InputError(f"size {tuple(size)} has an empty side; give (height, width), both >= 1")
    return int(height), int(width)


def _sandwich(maps: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    maps = _floating(maps)
    if isinstance(maps, np.ndarray):
        kind = maps.dtype if maps.dtype == np.float64 else np.dtype(np.float32)
        mixed: np.ndarray = (
            rows.astype(kind, copy=False) @ maps @ columns.astype(kind, copy=False).T
        )
        return mixed
    return maps.new_tensor(rows) @ maps @ maps.new_tensor(columns).mT


@lru_cache(maxsize=256)
def _bilinear(source: int, target: int, kind: str = "float64") -> np.ndarray:
    """Return the interpolation matrix `[target source]`; each row sums to 1."""
    center = (np.arange(target) + 0.5) * (source / target) - 0.5
    center = np.clip(center, 0, source - 1)
    low = np.floor(center).astype(int)
    high = np.minimum(low + 1, source - 1)
    part = center - low
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - part)
    np.add.at(matrix, (np.arange(target), high), part)
    matrix = matrix.astype(kind, copy=False)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=256)
def _area(source: int, target: int) -> np.ndarray:
    """Return the share of each source position in each target position, `[target source]`."""
    edges = np.arange(target + 1) * (source / target)
    start = np.arange(source)
    overlap = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    matrix: np.ndarray = np.clip(overlap, 0, None) * (target / source)
    matrix.setflags(write=False)
    return matrix
