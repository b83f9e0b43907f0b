"""From an oriented RGB picture to the network's input, and back to the pixels it saw.

The numbers are those of torchvision's `ImageClassification` preset on PIL input (resize the shorter
side, crop the center, scale to [0, 1], normalize), or of a plain resize ("squash").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

import numpy as np
from PIL import Image

from .._checks import one_of, whole
from ..errors import EmbedcamError, ImageError, InputError
from .probe import probe_inputs

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


def _side(name: str, value: object) -> int:
    return whole(f"preprocess: {name}", value, 1, MAX_SIDE)


def _channels(name: str, value: object) -> tuple[float, ...]:
    """Return finite numbers: one for each of red, green and blue, or a single one for gray."""
    try:
        numbers = [] if isinstance(value, str | bytes) else [float(number) for number in value]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"preprocess: {name} is {value!r}; give three finite numbers, for red, green and blue, "
            "or one, for a network of gray pictures"
        )
    return tuple(numbers)


def _offset(length: int, window: int) -> int:
    """Return where torchvision's center crop begins; negative where it pads a short side."""
    if window > length:
        return -((window - length) // 2)
    return int(round((length - window) / 2.0))  # noqa: RUF046 - torchvision's own half-to-even


def _refuse_empty(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise InputError(f"preprocess: a picture of {width} x {height} pixels has no extent")


@dataclass(frozen=True)
class Preprocess:
    """Resize, perhaps crop, scale to [0, 1] and normalize.

    Where `resize_to` is smaller than `size` the crop is padded with black, as torchvision does it,
    and `extent` then reaches beyond the picture.

    Parameters
    ----------
    size
        (H, W) of the network's input.
    resize
        "squash" resizes the whole picture to `size`, whatever its shape; "crop" brings the shorter
        side to `resize_to` and cuts `size` out of the center.
    interpolation
        nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's, antialiased).
    mean, std
        Of red, green and blue, for values in [0, 1]; one number each makes the picture gray
        (Pillow's "L") and the input `[1 H W]`.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop"] = "squash"
    resize_to: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        size: object = self.size
        if isinstance(size, str | bytes) or not isinstance(size, Sequence) or len(size) != 2:
            raise InputError(f"preprocess: size is {size!r}; give (height, width) in pixels")
        sides = tuple(_side(f"size[{place}]", side) for place, side in enumerate(size))
        object.__setattr__(self, "size", sides)
        one_of("preprocess: resize", self.resize, ("squash", "crop"))
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
        one_of("preprocess: interpolation", self.interpolation, RESAMPLING)
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
        """Return ImageNet's usual: shorter side to 256/224 of `size`, center crop of `size`."""
        side = _side("size", size)
        resize_to = round(side * 256 / 224) if resize == "crop" else None
        return cls(size=(side, side), resize=resize, resize_to=resize_to)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the network's input of an oriented RGB picture: float32 `[3 H W]` or `[1 H W]`."""
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            kind = image.mode if isinstance(image, Image.Image) else type(image).__name__
            raise InputError(
                f"preprocess: expected an RGB picture, given {kind}; "
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
        """Return the rectangle (x0, y0, x1, y1) of a picture that the network sees.

        In pixels of the oriented original, as floats: pixel i covers [i, i + 1]. The network's
        input [H W] is this rectangle, stretched evenly. It reaches beyond the picture where the
        crop was padded.
        """
        _refuse_empty(width, height)
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
        """Return (width, height) of the resized picture, before any crop."""
        if self.resize_to is None:
            return self.size[1], self.size[0]
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
        """Return everything `from_dict` needs, ready for JSON."""
        values = asdict(self).items()
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
        return {"kind": _KIND, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` described; unknown or missing keys are an `InputError`."""
        if not isinstance(values, Mapping):
            raise InputError(f"preprocess: expected a table of settings, given {values!r}")
        kind = values.get("kind", _KIND)
        if kind == "custom":
            raise InputError(_not_ours(values.get("name")))
        if kind != _KIND:
            raise InputError(f'preprocess: kind is {kind!r}; known are "{_KIND}" and "custom"')
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known and key != "kind")
        missing = [name for name in known if name not in values]
        wrong = (("unknown settings", unknown), ("missing settings", missing))
        problems = [f"{what} {', '.join(names)}" for what, names in wrong if names]
        if problems:
            raise InputError(f"preprocess: {'; '.join(problems)} (expected {', '.join(known)})")
        return cls(**{name: values[name] for name in known})


# A caller's own transform


def _not_ours(name: object) -> str:
    return (
        f"preprocess: {str(name)!r} is a transform of the caller's own and cannot be rebuilt from "
        "its name; pass the same transform as preprocess="
    )


@dataclass(frozen=True)
class CustomPreprocess:
    """A caller's own transform: an oriented RGB picture in, `[C H W]` numbers out.

    An index records its name, not its code: opening the index elsewhere takes the same transform.
    Without `rectangle`, a function (width, height) -> (x0, y0, x1, y1), the network is taken to see
    the whole picture.
    """

    transform: Callable[[Image.Image], Any]
    name: str
    rectangle: Callable[[int, int], Extent] | None = None

    def __post_init__(self) -> None:
        if not callable(self.transform):
            raise InputError(
                f"preprocess: expected a function of a picture, given {self.transform!r}"
            )
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"preprocess: name is {self.name!r}; give the transform a name")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the transform's output as float32 `[C H W]`; other shapes and NaN are refused."""
        try:
            output = self.transform(image)
        except (EmbedcamError, MemoryError):
            raise
        except Exception as error:
            message = str(error).strip().partition("\n")[0][:300]
            raise InputError(
                f"preprocess {self.name} failed with {type(error).__name__}: {message}; give a "
                "transform that takes a PIL picture and returns an array or tensor [C H W]"
            ) from error
        detach = getattr(output, "detach", None)
        values = np.asarray(output if detach is None else detach().cpu().numpy())
        last = values.ndim == 3 and values.shape[2] in (1, 3) and values.shape[0] not in (1, 3)
        if values.ndim != 3 or values.size == 0 or last:
            raise InputError(
                f"preprocess {self.name}: expected an array [C H W], the transform returned "
                f"{type(output).__name__} of shape {list(values.shape)}"
            )
        if values.dtype.kind not in "fiu":
            raise InputError(f"preprocess {self.name}: expected numbers, given {values.dtype}")
        values = np.ascontiguousarray(values, dtype=np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"preprocess {self.name}: the transform returned NaN or infinity")
        return values

    def extent(self, width: int, height: int) -> Extent:
        """Return what the network sees of a picture, as `Preprocess.extent` says it."""
        _refuse_empty(width, height)
        if self.rectangle is None:
            return 0.0, 0.0, float(width), float(height)
        x0, y0, x1, y1 = (float(value) for value in self.rectangle(width, height))
        if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
            raise InputError(
                f"preprocess {self.name}: rectangle of {width} x {height} is "
                f"({x0}, {y0}, {x1}, {y1}); expected x0 < x1 and y0 < y1 in pixels"
            )
        return x0, y0, x1, y1

    def to_dict(self) -> dict[str, Any]:
        """Return what an index can record: the name, and whether all of a picture is seen."""
        extent = "whole" if self.rectangle is None else "own"
        return {"kind": "custom", "name": self.name, "extent": extent}


AnyPreprocess = Preprocess | CustomPreprocess


def refuse_random(preprocess: AnyPreprocess | None) -> None:
    """Refuse a caller's own transform that makes another input each time of one picture."""
    if not isinstance(preprocess, CustomPreprocess):
        return
    steps = getattr(preprocess.transform, "transforms", None)
    steps = steps if isinstance(steps, list | tuple) else []
    # A flip in one of two pictures would pass a trial too often.
    random = any(type(step).__name__.startswith("Random") for step in steps)
    first, second = (probe_inputs(1, preprocess, (1, 1)) for _ in range(2))
    if random or first.shape != second.shape or (first != second).any():
        raise InputError(
            f"preprocess {preprocess.name}: gives another input each time it sees one picture; "
            "give the transform that is used for evaluation, without random steps"
        )


def custom(
    transform: Callable[[Image.Image], Any],
    *,
    name: str | None = None,
    extent: Callable[[int, int], Extent] | None = None,
) -> CustomPreprocess:
    """Wrap a function of an oriented RGB picture that returns a tensor or array `[C H W]`.

    `extent` is a function (width, height) -> (x0, y0, x1, y1) of what the network sees; default
    all.
    """
    kind = type(transform)
    qualified = getattr(transform, "__qualname__", None)
    where = f"{transform.__module__ if qualified else kind.__module__}"
    name = f"{where}.{qualified or kind.__qualname__}" if name is None else name
    return CustomPreprocess(transform, name, extent)


def preprocess_from_dict(values: Mapping[str, Any]) -> AnyPreprocess:
    """Return what `to_dict` described; of a caller's own transform only what its name allows.

    It cannot be called, and has an extent only if that is the whole picture; what is missing is an
    `InputError` that asks for the transform.
    """
    if not isinstance(values, Mapping) or values.get("kind") != "custom":
        return Preprocess.from_dict(values)
    name, extent = values.get("name"), values.get("extent")
    if set(values) != {"kind", "name", "extent"} or extent not in ("whole", "own"):
        raise InputError(
            "preprocess: a transform of the caller's own is described by kind, name and extent "
            f'("whole" or "own"), given {dict(values)}'
        )

    def unknown(*_: object) -> Any:
        raise InputError(_not_ours(name))

    return CustomPreprocess(unknown, str(name or ""), unknown if extent == "own" else None)
