"""From an oriented RGB picture to the network's input, and back to the pixels it saw.

The numbers are those of torchvision's `ImageClassification` preset on PIL input (resize the shorter
side, crop the center, scale to [0, 1], normalize), or of a plain resize ("squash").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Self, TypeAlias

import numpy as np
from PIL import Image

from .._checks import as_array, one_of, whole
from ..errors import EmbedcamError, ImageError, InputError, reason
from .probe import probe_inputs

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray | torch.Tensor"
Transform = Callable[..., Any]
"""What `from_transform` takes."""
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


def offsets(lengths: tuple[int, int], windows: tuple[int, int], center: str) -> list[int]:
    """Return where a center crop begins; negative where it pads a short side."""
    offsets = []
    for length, window in zip(lengths, windows, strict=True):
        half = (length - window) / 2.0  # torchvision rounds half to even, but what it pads
        inside = round(half) if center == "round" else int(half)
        offsets.append(-((window - length) // 2) if half < 0 else inside)
    return offsets


def _sides(name: str, size: object) -> tuple[int, int]:
    """Return (height, width) in whole pixels, or raise an `InputError`."""
    if isinstance(size, str | bytes) or not isinstance(size, Sequence) or len(size) != 2:
        raise InputError(f"preprocess: {name} is {size!r}; give (height, width) in pixels")
    sides = [whole(f"preprocess: {name}[{n}]", one, 1, MAX_SIDE) for n, one in enumerate(size)]
    return sides[0], sides[1]


def _empty(width: int, height: int) -> InputError:
    return InputError(f"preprocess: a picture of {width} x {height} pixels has no extent")


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
        side to `resize_to`, or the whole picture to that (H, W), and cuts `size` out of the center.
    interpolation
        nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's, antialiased).
    mean, std
        Of red, green and blue, for values in [0, 1]; one number each makes the picture gray
        (Pillow's "L") and the input `[1 H W]`.
    center
        Where a crop begins that has no middle in whole pixels: "round", half to even as torchvision
        does it, or "floor", as transformers does.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop"] = "squash"
    resize_to: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    center: Literal["round", "floor"] = "round"

    def __post_init__(self) -> None:
        sides = _sides("size", self.size)
        one_of("preprocess: center", self.center, ("round", "floor"))
        one_of("preprocess: resize", self.resize, ("squash", "crop"))
        one_of("preprocess: interpolation", self.interpolation, RESAMPLING)
        if (self.resize == "crop") != (self.resize_to is not None):
            raise InputError(
                f"preprocess: resize={self.resize!r} was given with resize_to={self.resize_to}; "
                "'crop' needs resize_to, the shorter side in pixels before the crop (256 for one "
                "of 224), and 'squash' takes none"
            )
        shorter: int | tuple[int, int] | None = self.resize_to
        if isinstance(shorter, Sequence):
            shorter = _sides("resize_to", shorter)
        elif shorter is not None:
            shorter = whole("preprocess: resize_to", shorter, 1, MAX_SIDE)
        try:
            mean, std = (
                tuple(float(one) for one in each if not isinstance(one, str))
                for each in (self.mean, self.std)
            )
        except (TypeError, ValueError, OverflowError):
            mean = std = ()
        fits = len(mean) in (1, 3) and len(std) == len(mean) and min(std) > 0
        if not fits or not all(map(math.isfinite, mean + std)):
            raise InputError(
                f"preprocess: mean is {self.mean!r} and std {self.std!r}; give three finite "
                "numbers each, for red, green and blue, or one each for gray, std above 0"
            )
        checked = {"size": sides, "resize_to": shorter, "mean": mean, "std": std}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def imagenet(cls, size: int = 224, *, resize: Literal["squash", "crop"] = "crop") -> Self:
        """Return ImageNet's usual: shorter side to 256/224 of `size`, center crop of `size`."""
        side = whole("preprocess: size", size, 1, MAX_SIDE)
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
            left, top = offsets(resized, (width, height), self.center)
            # Pillow fills what lies outside the picture with black, as torchvision's padding does.
            pixels = pixels.crop((left, top, left + width, top + height))
        levels = np.asarray(pixels, dtype=np.uint8).reshape(height, width, len(self.mean))
        # Turned while they are bytes: floats in one piece are computed several times as fast.
        values = np.ascontiguousarray(levels.transpose(2, 0, 1)).astype(np.float32)
        values /= np.float32(255)
        values -= np.array(self.mean, dtype=np.float32)[:, None, None]
        values /= np.array(self.std, dtype=np.float32)[:, None, None]
        return values

    def extent(self, width: int, height: int) -> Extent:
        """Return the rectangle (x0, y0, x1, y1) of a picture that the network sees.

        Evenly stretched, in pixels of the original: pixel i covers [i, i + 1]. It reaches
        beyond the picture where the crop was padded.
        """
        if min(width, height) < 1:
            raise _empty(width, height)
        if self.resize == "squash":
            return 0.0, 0.0, float(width), float(height)
        resized, (down, across) = self._resized(width, height), self.size
        left, top = offsets(resized, (across, down), self.center)
        # One division each, last: an edge that is the picture's own comes out exactly.
        x, y = (left * width, (left + across) * width), (top * height, (top + down) * height)
        return x[0] / resized[0], y[0] / resized[1], x[1] / resized[0], y[1] / resized[1]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the resized picture, before any crop."""
        if not isinstance(self.resize_to, int):
            down, across = self.resize_to or self.size
            return across, down
        shorter, longer = sorted((width, height))
        # torchvision cuts the longer side down to a whole number; it does not round it.
        long_side = int(self.resize_to * longer / shorter)
        if self.resize_to * long_side > MAX_RESIZED_PIXELS:
            raise ImageError(
                f"a picture of {width} x {height} pixels is too long and thin: resized it has more "
                f'than {MAX_RESIZED_PIXELS} pixels; take resize="squash"'
            )
        return (self.resize_to, long_side) if width <= height else (long_side, self.resize_to)

    def to_dict(self) -> dict[str, Any]:
        """Return everything `from_dict` needs, ready for JSON."""
        values = asdict(self)
        if self.center == "round":
            del values["center"]  # of which descriptions before it know nothing
        as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"kind": _KIND, **as_lists}

    def sized(self, size: tuple[int, int], resize: Literal["squash", "crop"] | None = None) -> Self:
        """Return it at another size, (H, W), and mode; the share that a crop cuts off is kept."""
        mode = resize or self.resize
        if mode == "squash":
            return replace(self, size=size, resize=mode, resize_to=None)
        if isinstance(self.resize_to, tuple):
            pairs = zip(size, self.resize_to, self.size, strict=True)
            down, across = (round(side * whole / part) for side, whole, part in pairs)
            return replace(self, size=size, resize=mode, resize_to=(down, across))
        share = 256 / 224 if self.resize_to is None else self.resize_to / min(self.size)
        return replace(self, size=size, resize=mode, resize_to=round(min(size) * share))

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
        values = {"center": "round", **values}
        unknown = sorted(str(key) for key in values if key not in (*known, "kind"))
        missing = [name for name in known if name not in values]
        if unknown or missing:
            wrong = (("unknown settings", unknown), ("missing settings", missing))
            problems = [f"{what} {', '.join(names)}" for what, names in wrong if names]
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

    An index records its name, not its code. Without `rectangle`, a function (width, height) ->
    (x0, y0, x1, y1), the network is taken to see the whole picture.
    """

    transform: Callable[[Image.Image], Array]
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
            raise InputError(
                f"preprocess {self.name} failed with {type(error).__name__}: {reason(error)}; give "
                "a transform that takes a PIL picture and returns an array or tensor [C H W]"
            ) from error
        values = as_array(output) if hasattr(output, "detach") else np.asarray(output)
        fits = values.ndim == 3 and values.size > 0 and values.dtype.kind in "fiu"
        if fits:
            last = values.shape[2] in (1, 3) and values.shape[0] not in (1, 3)
            values = np.ascontiguousarray(values, dtype=np.float32)
            fits = not last and bool(np.isfinite(values).all())
        if not fits:
            raise InputError(
                f"preprocess {self.name}: expected an array [C H W] of finite numbers, the "
                f"transform returned {type(output).__name__} of shape {list(values.shape)}"
            )
        return values

    def extent(self, width: int, height: int) -> Extent:
        """Return what the network sees of a picture, as `Preprocess.extent` says it."""
        if min(width, height) < 1:
            raise _empty(width, height)
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


def refuse_random(preprocess: AnyPreprocess) -> None:
    """Refuse a caller's own transform that makes another input each time of one picture."""
    if not isinstance(preprocess, CustomPreprocess):
        return
    steps = getattr(preprocess.transform, "transforms", None)
    # A flip in one of two pictures would pass a trial too often.
    random = isinstance(steps, list | tuple) and any(
        type(step).__name__.startswith("Random") for step in steps
    )
    first, second = (probe_inputs(1, preprocess, (1, 1)) for _ in range(2))
    if random or not np.array_equal(first, second):
        raise InputError(
            f"preprocess {preprocess.name}: gives another input each time it sees one picture; "
            "give the transform that is used for evaluation, without random steps"
        )


def custom(
    transform: Callable[[Image.Image], Array],
    *,
    name: str | None = None,
    extent: Callable[[int, int], Extent] | None = None,
) -> CustomPreprocess:
    """Wrap a function of an oriented RGB picture that returns a tensor or array `[C H W]`.

    `extent` is a function (width, height) -> (x0, y0, x1, y1) of what the network sees, else all.
    """
    if name is None:
        named = getattr(transform, "__qualname__", type(transform).__qualname__)
        name = f"{transform.__module__}.{named}"
    return CustomPreprocess(transform, name, extent)


def preprocess_from_dict(values: Mapping[str, Any]) -> AnyPreprocess:
    """Return what `to_dict` described; a caller's own transform cannot be called, and says so."""
    if not isinstance(values, Mapping) or values.get("kind") != "custom":
        return Preprocess.from_dict(values)
    name, extent = values.get("name"), values.get("extent")
    if set(values) != {"kind", "name", "extent"} or extent not in ("whole", "own"):
        raise InputError(
            "preprocess: a transform of the caller's own is described by kind, name and extent "
            f'("whole" or "own"), given {dict(values)}'
        )

    def unknown(*_: object) -> NoReturn:
        raise InputError(_not_ours(name))

    return CustomPreprocess(unknown, str(name or ""), unknown if extent == "own" else None)
