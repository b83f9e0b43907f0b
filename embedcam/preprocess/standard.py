"""Resize, perhaps crop, scale and normalise: the preprocessing whose geometry is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

import numpy as np
from PIL import Image

from ..errors import ImageError, InputError

Extent = tuple[float, float, float, float]

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

MAX_SIDE: Final = 8_192
# A picture one pixel wide and 100,000 high, resized so that its shorter side is 256, would take
# gigabytes before the crop: the resized picture gets the limit that Pillow gives a decoded one.
MAX_RESIZED_PIXELS: Final = 178_956_970

RESAMPLING: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_KIND: Final = "standard"


def not_ours(name: str) -> str:
    """What to say where a caller's transform is needed and only its name is known."""
    return (
        f"preprocess: {name!r} is a transform of the caller's own and cannot be rebuilt from its "
        "name; pass the same transform as preprocess="
    )


def _side(name: str, value: object) -> int:
    """A side in pixels: a whole number from 1 to `MAX_SIDE`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"preprocess: {name} is {value!r}; give a whole number of pixels")
    if not 1 <= int(value) <= MAX_SIDE:
        raise InputError(f"preprocess: {name} is {value} pixels; give 1 to {MAX_SIDE}")
    return int(value)


def _sides(name: str, value: object) -> tuple[int, int]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"preprocess: {name} is {value!r}; give (height, width) in pixels")
    return _side(f"{name}[0]", value[0]), _side(f"{name}[1]", value[1])


def _channels(name: str, value: object) -> tuple[float, ...]:
    """Finite numbers: one for each of red, green and blue, or a single one for grey."""
    problem = (
        f"preprocess: {name} is {value!r}; give three finite numbers, for red, green and blue, or "
        "one, for a network of grey pictures"
    )
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(problem)
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        raise InputError(problem) from None
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) for number in numbers):
        raise InputError(problem)
    return tuple(numbers)


def _offset(length: int, window: int) -> int:
    """Where torchvision's centre crop begins; negative where it pads a side that is too short."""
    if window > length:
        return -((window - length) // 2)
    return int(round((length - window) / 2.0))  # noqa: RUF046 - torchvision's own half-to-even


@dataclass(frozen=True)
class Preprocess:
    """Resize, perhaps crop, scale to [0, 1] and normalise.

    size: (H, W) of the network's input.
    resize: "squash" resizes the whole picture to `size`, whatever its shape; "crop" brings the
        shorter side to `resize_to` and cuts `size` out of the centre.
    interpolation: nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's, antialiased).
    mean, std: of red, green and blue, for values in [0, 1]; one number each makes the picture grey
        (Pillow's "L") and the input `[1 H W]`.

    Where `resize_to` is smaller than `size` the crop is padded with black, as torchvision does it,
    and `extent` then reaches beyond the picture.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop"] = "squash"
    resize_to: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _sides("size", self.size))
        if self.resize not in ("squash", "crop"):
            raise InputError(f'preprocess: resize is {self.resize!r}; give "squash" or "crop"')
        if self.resize == "crop":
            if self.resize_to is None:
                raise InputError(
                    'preprocess: resize="crop" needs resize_to, the shorter side in pixels before '
                    "the crop (256 for a crop of 224)"
                )
            object.__setattr__(self, "resize_to", _side("resize_to", self.resize_to))
        elif self.resize_to is not None:
            raise InputError(
                f'preprocess: resize="squash" cuts nothing off, so resize_to={self.resize_to} has '
                'no meaning; leave it out, or take resize="crop"'
            )
        if not isinstance(self.interpolation, str) or self.interpolation not in RESAMPLING:
            raise InputError(
                f"preprocess: interpolation is {self.interpolation!r}; "
                f"give one of {', '.join(RESAMPLING)}"
            )
        object.__setattr__(self, "mean", _channels("mean", self.mean))
        object.__setattr__(self, "std", _channels("std", self.std))
        if len(self.mean) != len(self.std):
            raise InputError(
                f"preprocess: mean is of {len(self.mean)} channels and std of {len(self.std)}; "
                "give one number a channel in both"
            )
        if min(self.std) <= 0:
            raise InputError(f"preprocess: std is {self.std}; each must be above 0")

    @classmethod
    def imagenet(cls, size: int = 224, *, resize: Literal["squash", "crop"] = "crop") -> Self:
        """ImageNet's usual evaluation: shorter side to 256/224 of `size`, centre crop of `size`."""
        side = _side("size", size)
        resize_to = round(side * 256 / 224) if resize == "crop" else None
        return cls(size=(side, side), resize=resize, resize_to=resize_to)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The network's input of an oriented RGB picture: float32 `[3 H W]`, or `[1 H W]`."""
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            given = image.mode if isinstance(image, Image.Image) else type(image).__name__
            raise InputError(
                f"preprocess: expected an RGB picture, given {given}; "
                "read it with embedcam.images.read_image"
            )
        resized = self._resized(*image.size)
        height, width = self.size
        pixels = image if len(self.mean) == 3 else image.convert("L")
        if image.size != resized:
            pixels = pixels.resize(resized, RESAMPLING[self.interpolation])
        if self.resize == "crop":
            left, top = _offset(resized[0], width), _offset(resized[1], height)
            # Pillow fills what lies outside the picture with black, as torchvision's padding does.
            pixels = pixels.crop((left, top, left + width, top + height))
        levels = np.asarray(pixels, dtype=np.uint8).reshape(height, width, len(self.mean))
        values = levels.transpose(2, 0, 1).astype(np.float32)
        values /= np.float32(255)
        values -= np.array(self.mean, dtype=np.float32)[:, None, None]
        values /= np.array(self.std, dtype=np.float32)[:, None, None]
        return np.ascontiguousarray(values)

    def extent(self, width: int, height: int) -> Extent:
        """The rectangle (x0, y0, x1, y1) of a `width` x `height` picture that the network sees.

        In pixels of the oriented original, as floats: pixel i covers [i, i + 1]. The network's
        input [H W] is this rectangle, stretched evenly. It reaches beyond the picture where the
        crop was padded.
        """
        if min(width, height) < 1:
            raise InputError(f"preprocess: a picture of {width} x {height} pixels has no extent")
        if self.resize == "squash":
            return 0.0, 0.0, float(width), float(height)
        resized = self._resized(width, height)
        left, top = _offset(resized[0], self.size[1]), _offset(resized[1], self.size[0])
        # One division each, last: an edge that is the picture's own comes out exactly.
        return (
            left * width / resized[0],
            top * height / resized[1],
            (left + self.size[1]) * width / resized[0],
            (top + self.size[0]) * height / resized[1],
        )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the resized picture, before any crop."""
        if self.resize == "squash":
            return self.size[1], self.size[0]
        assert self.resize_to is not None
        shorter, longer = sorted((width, height))
        # torchvision cuts the longer side down to a whole number; it does not round it.
        long_side = int(self.resize_to * longer / shorter)
        if self.resize_to * long_side > MAX_RESIZED_PIXELS:
            raise ImageError(
                f"a picture of {width} x {height} pixels is too long and thin: with its shorter "
                f"side at {self.resize_to} it has more than {MAX_RESIZED_PIXELS} pixels; "
                'take resize="squash"'
            )
        return (self.resize_to, long_side) if width <= height else (long_side, self.resize_to)

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, ready for JSON."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return {"kind": _KIND, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The preprocessing that `to_dict` described; unknown or missing keys are refused."""
        if not isinstance(values, Mapping):
            raise InputError(f"preprocess: expected a table of settings, given {values!r}")
        kind = values.get("kind", _KIND)
        if kind == "custom":
            raise InputError(not_ours(str(values.get("name"))))
        if kind != _KIND:
            raise InputError(f'preprocess: kind is {kind!r}; known are "{_KIND}" and "custom"')
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known and key != "kind")
        missing = [name for name in known if name not in values]
        if unknown or missing:
            raise InputError(
                "preprocess: "
                + "; ".join(
                    f"{what} {', '.join(names)}"
                    for what, names in (
                        ("unknown settings", unknown),
                        ("missing settings", missing),
                    )
                    if names
                )
                + f" (expected {', '.join(known)})"
            )
        return cls(**{name: values[name] for name in known})
