"""What comes in, checked, and brought to a magnitude at which sums neither overflow nor vanish."""

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError


def finite(values: ArrayLike, what: str, axes: str) -> np.ndarray:
    """Numbers as float64, with the axes named in `axes`, none of them empty, all finite.

    Args:
        values: anything NumPy reads as numbers.
        what: how the message names them, in the plural.
        axes: their axes as they are written, "B H W".

    Raises:
        InputError: not numbers, another number of axes, an empty one, a NaN or an infinity.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be an array of numbers [{axes}]; {error}") from error
    if array.ndim != len(axes.split()) or not array.size:
        raise InputError(
            f"{what} {list(array.shape)} must be [{axes}] with no empty axis; "
            "put one image in a batch of one"
        )
    if not np.isfinite(array).all():
        raise InputError(
            f"{what} must be finite; got a NaN or an infinity: look at what computed them"
        )
    return array


def maps_of(maps: ArrayLike, what: str = "maps") -> np.ndarray:
    """Maps `[B H W]` as float64, finite and >= 0; an `InputError` otherwise."""
    try:
        array = np.asarray(maps, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be an array of numbers [B H W]; {error}") from error
    # Said before `finite` could, as of a map the sign is the likelier mistake.
    if not (array >= 0).all():
        raise InputError(
            "a map must be >= 0 everywhere; got a NaN or a negative value: "
            "give it as ReLU leaves it, not a signed map"
        )
    return finite(array, what, "B H W")


def maps_and_regions(
    maps: ArrayLike, inside: ArrayLike, *, signed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Maps and the regions they are judged by, both `[B H W]` float64, regions in [0, 1].

    signed: whether maps may be negative.
    """
    sizes = list(np.shape(maps)), list(np.shape(inside))
    if sizes[0] != sizes[1] or len(sizes[0]) != 3:
        raise InputError(
            f"maps {sizes[0]} and regions {sizes[1]} must both be [B H W] of one size; "
            "resize the maps to the regions"
        )
    drawn = finite(maps, "maps", "B H W") if signed else maps_of(maps)
    regions = finite(inside, "regions", "B H W")
    if regions.min() < 0 or regions.max() > 1:
        raise InputError(
            f"regions must lie in [0, 1], the covered part of each pixel; got "
            f"{regions.min():g} to {regions.max():g}: a mask of 255 must be divided by 255"
        )
    return drawn, regions


def same_shape(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """Refuse two arrays of different shapes: broadcasting would pair images wrongly, silently."""
    if a.shape != b.shape:
        raise InputError(
            f"{what} have shapes {list(a.shape)} and {list(b.shape)}; "
            "give both the same, image by image"
        )


def fraction_of(value: float, what: str) -> float:
    """A share in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{what} = {value}; it must lie in (0, 1]: 0.2 means a fifth")
    return float(value)


def whole(value: int, what: str, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        until = "or more" if high is None else f"to {high}"
        raise InputError(f"{what} = {value}; it must be a whole number, {low} {until}")
    return int(value)


def evened(values: np.ndarray) -> np.ndarray:
    """Each row `[B ...]` times a power of two, its largest magnitude in [0.5, 1); zeros stay.

    A power of two changes no digit, so what does not depend on scale keeps every bit, while squares
    and sums of extreme values neither overflow nor vanish.
    """
    axes = tuple(range(1, values.ndim))
    _, exponent = np.frexp(np.abs(values).max(axes, keepdims=True))
    scaled: np.ndarray = np.ldexp(values, -exponent)
    return scaled
