"""From the neighbours' weights to the query's: the step that replaces back-propagation.

Arrays only. Weights are linear in what is stored, so a transfer is one coefficient a neighbour;
the encoding applies them (`Encoding.combine`), which for low-rank codes means averaging codes.
Source: Chen et al., WACV 2020, section 3.3 (weights of the nearest training image), extended to
several neighbours as scikit-learn's nearest-neighbour estimators do.
"""

import math

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
