"""From the neighbours' weights to the query's: the step that replaces back-propagation.

Arrays only. Weights are linear in what is stored, so a transfer is one coefficient a neighbour;
the encoding applies them (`Encoding.combine`), which for low-rank codes means averaging codes.
Source: Chen et al., WACV 2020, section 3.3 (weights of the nearest training image), extended to
several neighbours as scikit-learn's nearest-neighbour estimators do.
"""

import numpy as np

from .errors import InputError

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
    if not (np.all(norms >= 0) and np.all(distances >= 0)):
        raise InputError("norms and distances must be numbers >= 0; got a NaN or a negative value")
    if norms.shape[-1] == 1:
        return np.ones(norms.shape, np.float32)
    shares = _shares(norms > 0, distances, mode)
    return np.divide(shares, norms, out=np.zeros_like(norms), where=norms > 0).astype(np.float32)


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


def _shares(counted: np.ndarray, distances: np.ndarray, mode: str) -> np.ndarray:
    """Shares summing to 1 over the counted neighbours (all zero where none is)."""
    raw = counted.astype(np.float64)
    if mode == "distance":
        exact = counted & (distances == 0)
        with np.errstate(divide="ignore"):
            inverse = np.where(counted, 1 / np.sqrt(distances), 0)
        raw = np.where(exact.any(-1, keepdims=True), exact, inverse)
    total = raw.sum(-1, keepdims=True)
    return np.divide(raw, total, out=np.zeros_like(raw), where=total > 0)
