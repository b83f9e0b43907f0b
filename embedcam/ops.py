"""Pure functions from weights and activations to a map: `cam`, resizing, sharpening, transfer.

NumPy arrays or torch tensors, whichever is given: only operators and methods that both share are
used, so nothing heavy is imported and services can stay without torch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from .errors import InputError

Array = TypeVar("Array")
"""A NumPy array or a torch tensor; what comes in is what goes out."""


def cam(weights: Array, activations: Array) -> Array:
    """Class activation map ReLU(sum_k w_k A_k) (Selvaraju et al. 2017, eq. 2).

    Args:
        weights: channel weights, `[B K]`, or `[K]` for one image; or weights by position, of the
            activations' own shape (Draelos and Carin 2020, eq. 2).
        activations: `[B K H W]`, or `[K H W]` for one image.

    Returns:
        The map, `[B H W]` or `[H W]`, >= 0, not normalised.

    Raises:
        InputError: the shapes do not belong together.
    """
    return _relu(signed_cam(weights, activations))


def signed_cam(weights: Array, activations: Array) -> Array:
    """The map before its ReLU, sum_k w_k A_k: negative where the picture speaks against it.

    Args, returns and raises as `cam`, but for the sign.
    """
    w_shape, a_shape = tuple(weights.shape), tuple(activations.shape)  # type: ignore[attr-defined]
    if w_shape == a_shape and len(a_shape) in (3, 4):
        product: Any = weights * activations  # type: ignore[operator]
        by_position: Array = product.sum(-3)
        return by_position
    if len(a_shape) != len(w_shape) + 2 or a_shape[: len(w_shape)] != w_shape or not w_shape:
        raise InputError(
            f"weights {list(w_shape)} and activations {list(a_shape)} do not belong together; "
            "expected [B K] with [B K H W], or [K] with [K H W], or weights by position of the "
            "activations' own shape"
        )
    *batch, channels, height, width = a_shape
    flat = activations.reshape(*batch, channels, height * width)  # type: ignore[attr-defined]
    mixed = weights.reshape(*batch, 1, channels) @ flat  # type: ignore[attr-defined]
    signed: Array = mixed.reshape(*batch, height, width)
    return signed


def attended(activations: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Average activations where a map lies: sum_ij M_ij A_k,ij / sum_ij M_ij, `[K]` float32.

    As Chen et al. (WACV 2020) do it for house prices. Where the map is empty, the plain mean.

    Args:
        activations: A, `[K h w]`.
        drawn: M, `[H W]` >= 0; on a finer grid than the activations' it is averaged down to theirs,
            on a coarser one interpolated.
    """
    size = activations.shape[1:]
    if drawn.shape != size:
        fits = size[0] <= drawn.shape[0] and size[1] <= drawn.shape[1]
        drawn = area_average(drawn, size) if fits else resize(drawn, size)
    # Shares of 1, so that neither a large nor a tiny map leaves float32's range.
    shares = np.asarray(drawn, np.float64).ravel()
    total = shares.sum()
    shares = shares / total if total > 0 else np.full(shares.size, 1 / shares.size)
    found: np.ndarray = activations.reshape(len(activations), -1) @ shares.astype(np.float32)
    return found


def signed_cams(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Signed maps of one image by several weights.

    Args:
        weights: `[n K]`, or `[n K H W]` by position.
        activations: `[K H W]`.

    Returns:
        `[n H W]`.
    """
    if weights.ndim == 2:
        found: np.ndarray = np.tensordot(weights, activations, 1)
        return found
    return np.einsum("nkhw,khw->nhw", weights, activations)


def joined(coarse: Array, fine: Array) -> Array:
    """Signed maps of one picture from two views as one, on the finer grid.

    s_c ((U(C) - mean U(C)) / s_c + (F - mean F) / s_f), s the standard deviations: equal parts of
    both, in the units of the coarse map, with mean 0. A constant map adds nothing.

    Args:
        coarse: C, `[... h w]`.
        fine: F, `[... H W]`, of the same picture shown larger.

    Returns:
        `[... H W]`.
    """
    size = tuple(fine.shape)[-2:]  # type: ignore[attr-defined]
    upper, own = _centred(resize(coarse, size)), _centred(fine)
    spreads = [((one * one).mean((-2, -1))[..., None, None]) ** 0.5 for one in (upper, own)]
    # A map that varies by its own rounding alone says nothing, however far it is stretched.
    flat = spreads[1] <= 1e-6 * abs(fine).mean((-2, -1))[..., None, None]  # type: ignore[arg-type]
    both: Array = upper + own * (spreads[0] / (spreads[1] + flat)) * ~flat
    return both


def drawn_and_signed(
    weights: Sequence[np.ndarray],
    activations: Sequence[np.ndarray],
    finer: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the map of a picture with all layers, and the same before its ReLU.

    What several layers draw is positive (`sharpen`); only the deepest says what speaks against it.

    Args:
        weights: of each layer, deepest first, `[K]`, or of several pictures `[B K]`.
        activations: of each layer, `[K h w]` or `[B K h w]`.
        finer: of each layer, of the same picture shown larger: both maps are `joined`.

    Returns:
        Two maps `[H W]` or `[B H W]` on the finest grid, the first >= 0.
    """
    signed = signed_cam(weights[0], activations[0])
    if finer is not None:
        signed = joined(signed, signed_cam(weights[0], finer[0]))
    found = np.maximum(signed, 0)
    layers = activations if finer is None else finer
    for own, maps in zip(weights[1:], layers[1:], strict=True):
        found = sharpen(cam(own, maps), found)
    if len(weights) > 1:
        signed = found + np.minimum(resize(signed, found.shape[-2:]), 0) * (found == 0)
    return found, signed


def _centred(maps: Any) -> Any:
    return maps - maps.mean((-2, -1))[..., None, None]


def resize(maps: Array, size: tuple[int, int]) -> Array:
    """Bilinear resizing U(.) with pixel centres aligned (`align_corners=False`), no antialiasing.

    Args:
        maps: `[... h w]`.
        size: (H, W) wanted, both >= 1.

    Returns:
        `[... H W]`, within the range of the input.
    """
    height, width = _checked_size(size)
    h, w = tuple(maps.shape)[-2:]  # type: ignore[attr-defined]
    maps = _floating(maps)
    # Eight bytes a number is float64 in either library.
    kind = "float64" if maps.itemsize == 8 else "float32"  # type: ignore[attr-defined]
    return _sandwich(maps, _bilinear(h, height, kind), _bilinear(w, width, kind))


def area_average(maps: Array, size: tuple[int, int]) -> Array:
    """Average each map over equal rectangles, exactly, cells cut by a border counted by area.

    Args:
        maps: `[... h w]`.
        size: (H, W) wanted, at most (h, w).

    Returns:
        `[... H W]`; the mean of every map is kept.
    """
    height, width = _checked_size(size)
    h, w = tuple(maps.shape)[-2:]  # type: ignore[attr-defined]
    if height > h or width > w:
        raise InputError(f"a {h} x {w} map cannot be averaged to {height} x {width}; use resize")
    return _sandwich(_floating(maps), _area(h, height), _area(w, width))


def sharpen(fine: Array, coarse: Array) -> Array:
    """L(R) U(P): a coarse map P, given the local structure of a finer one R.

    L(R) = R / U(D(R)), D bilinear down to the size of P and U back up (Englebert et al. 2022): how
    R differs within the cells of P. It is 0 where U(D(R)) is 0 to the rounding of R's largest.

    Args:
        fine: R, `[... H W]`, >= 0.
        coarse: P, `[... h w]`, >= 0.

    Returns:
        `[... H W]`.
    """
    size = tuple(fine.shape)[-2:]  # type: ignore[attr-defined]
    around: Any = resize(resize(fine, tuple(coarse.shape)[-2:]), size)  # type: ignore[attr-defined]
    *lead, height, width = tuple(fine.shape)  # type: ignore[attr-defined]
    largest: Any = _largest(fine.reshape(*lead, height * width))[..., None]  # type: ignore[attr-defined]
    least = largest * (2.0**-52 if fine.itemsize == 8 else 2.0**-23)  # type: ignore[attr-defined]
    seen = around > least
    local = fine / (around * seen + ~seen) * seen
    sharpened: Array = local * resize(coarse, size)
    return sharpened


def normalize(maps: Array) -> Array:
    """Min-max normalisation N(.) of each map to [0, 1]; a constant map becomes zeros, never NaN.

    For showing one map by itself. It hides how strong the evidence is: never use it before
    comparing maps.

    Args:
        maps: `[... H W]`.
    """
    maps = _floating(maps)
    *lead, height, width = tuple(maps.shape)  # type: ignore[attr-defined]
    flat = maps.reshape(*lead, height * width)  # type: ignore[attr-defined]
    # Two sorted ends instead of amin/min(axis), whose return types differ between the libraries.
    low = -_largest(-flat)
    span = _largest(flat) - low
    flat_map = span == 0
    scaled = (flat - low) / (span + flat_map)
    return scaled.reshape(*lead, height, width)


def _relu(maps: Array) -> Array:
    if isinstance(maps, np.ndarray):
        positive: Any = np.maximum(maps, 0)
        return positive
    return maps.clip(min=0)  # type: ignore[attr-defined]


def _floating(maps: Array) -> Array:
    """Bytes and other whole numbers as float32, which neither wraps nor truncates."""
    if isinstance(maps, np.ndarray):
        floats: Any = maps if maps.dtype.kind == "f" else maps.astype(np.float32)
    else:
        floats = maps if maps.is_floating_point() else maps.float()  # type: ignore[attr-defined]
    return floats


def _largest(flat: Array) -> Array:
    """`[... N]` -> `[... 1]`, the largest value along the last axis."""
    best = flat.max(-1)  # type: ignore[attr-defined]
    values = getattr(best, "values", best)
    return values[..., None]


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = (int(n) for n in size)
    if height < 1 or width < 1:
        raise InputError(f"size {tuple(size)} has an empty side; give (height, width), both >= 1")
    return height, width


def _sandwich(maps: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """rows @ maps @ columns^T in the maps' own library, type and device."""
    if isinstance(maps, np.ndarray):
        kind = maps.dtype if maps.dtype == np.float64 else np.dtype(np.float32)
        return rows.astype(kind, copy=False) @ maps @ columns.astype(kind, copy=False).T
    left, right = maps.new_tensor(rows), maps.new_tensor(columns)  # type: ignore[attr-defined]
    return left @ maps @ right.mT


@lru_cache(maxsize=256)
def _bilinear(source: int, target: int, kind: str = "float64") -> np.ndarray:
    """Interpolation matrix `[target source]`; each row sums to 1."""
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    centre = np.clip(centre, 0, source - 1)
    low = np.floor(centre).astype(int)
    high = np.minimum(low + 1, source - 1)
    part = centre - low
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - part)
    np.add.at(matrix, (np.arange(target), high), part)
    matrix = matrix.astype(kind, copy=False)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=256)
def _area(source: int, target: int) -> np.ndarray:
    """Overlap matrix `[target source]`: the share of each source cell in each target cell."""
    edges = np.arange(target + 1) * (source / target)
    cell = np.arange(source)
    overlap = np.minimum(edges[1:, None], cell + 1) - np.maximum(edges[:-1, None], cell)
    matrix = np.clip(overlap, 0, None) * (target / source)
    matrix.setflags(write=False)
    return matrix


MODES = ("mean", "distance")


def coefficients(norms: np.ndarray, distances: np.ndarray, mode: str = "mean") -> np.ndarray:
    """What each neighbour's weights are multiplied by; the products are then summed.

    `mean`: each neighbour's weights divided by their L2 norm, then averaged. `distance`: the same
    with shares 1 / Euclidean distance, where exact matches (distance 0) take all. One neighbour:
    its weights, unscaled. A neighbour whose weights are all zero (no triplet taught it anything)
    carries no evidence and takes no share.

    Args:
        norms: L2 norm of each neighbour's weights, `[... n]`, >= 0.
        distances: *squared* Euclidean distance of each neighbour to the query, `[... n]`, >= 0.
        mode: "mean" or "distance".

    Returns:
        `[... n]` float32.

    Raises:
        InputError: unknown mode, unequal shapes, no neighbour, or a NaN or negative value.
    """
    norms, distances = np.asarray(norms, np.float64), np.asarray(distances, np.float64)
    if mode not in MODES:
        raise InputError(f"transfer mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if norms.shape != distances.shape or norms.ndim == 0 or norms.shape[-1] == 0:
        raise InputError(
            f"norms {list(norms.shape)} and distances {list(distances.shape)} must have one shape "
            "[... n] with at least one neighbour"
        )
    n = norms.shape[-1]
    given = zip(norms.reshape(-1, n).tolist(), distances.reshape(-1, n).tolist(), strict=True)
    found = [_of_one_query(lengths, apart, mode) for lengths, apart in given]
    return np.array(found, np.float32).reshape(norms.shape)


def rival_coefficients(norms: np.ndarray) -> np.ndarray:
    """Return what the weights of a result and of its rival are multiplied by before they are added.

    (1 / |w_A|, -1 / |w_B|): both are brought to unit length, as `coefficients` does with several
    neighbors, and the rival's are subtracted. Weights that are all zero stay zero.

    Args:
        norms: L2 norms of the weights of the result and of its rival, `[2]`, >= 0.

    Returns:
        `[2]` float32.
    """
    lengths = np.asarray(norms, np.float64)
    inverse = np.divide(1, lengths, out=np.zeros(2), where=lengths > 0)
    return (inverse * (1, -1)).astype(np.float32)


def transfer(weights: np.ndarray, distances: np.ndarray, mode: str = "mean") -> np.ndarray:
    """Query weights from decoded neighbours' weights.

    Args:
        weights: `[... n K]`, missing channels zero.
        distances: squared Euclidean distances to the query, `[... n]`.
        mode: "mean" or "distance", see `coefficients`.

    Returns:
        `[... K]` float32; never cut to the top M again.
    """
    weights = np.asarray(weights)
    norms = np.linalg.norm(weights.astype(np.float64), axis=-1)
    share = coefficients(norms, distances, mode)
    return (share[..., None, :] @ weights.astype(np.float32, copy=False))[..., 0, :]


def _of_one_query(norms: list[float], distances: list[float], mode: str) -> list[float]:
    """In Python: ten neighbours are done before NumPy has set up its first operation."""
    # Not "< 0", which a NaN passes.
    if not all(value >= 0 for values in (norms, distances) for value in values):
        raise InputError("norms and distances must be numbers >= 0; got a NaN or a negative value")
    if len(norms) == 1:
        return [1.0]
    shares = [float(norm > 0) for norm in norms]
    if mode == "distance":
        counted = [share * (apart == 0) for share, apart in zip(shares, distances, strict=True)]
        if any(counted):
            shares = counted
        else:
            shares = [
                share and 1 / math.sqrt(apart)
                for share, apart in zip(shares, distances, strict=True)
            ]
    total = sum(shares)
    return [share and share / total / norm for share, norm in zip(shares, norms, strict=True)]
