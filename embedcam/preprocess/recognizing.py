"""What a transform of torchvision, timm, open_clip or transformers amounts to, by its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import InputError
from .probe import probe_picture
from .transforms import (
    RESAMPLING,
    AnyPreprocess,
    CustomPreprocess,
    Preprocess,
    Transform,
    custom,
)

_MOST_LEVELS = 12


def from_transform(transform: Transform, *, name: str | None = None) -> AnyPreprocess:
    """Return the `Preprocess` a transform amounts to, or the transform wrapped as a custom one.

    Recognized without importing their libraries: torchvision's weights and their presets, a Compose
    of [Grayscale] [Resize] [CenterCrop] ToTensor [Normalize] (in v2 ToImage and ToDtype), and
    Hugging Face's image processors. What crops in a way of its own is an `InputError`.
    """
    if isinstance(transform, Preprocess | CustomPreprocess):
        return transform
    if isinstance(transform, type):
        raise InputError(
            f"preprocess: given the class {transform.__name__}; give an instance of it, such as "
            f"{transform.__name__}(...)"
        )
    steps = getattr(transform, "transforms", None)
    if callable(steps):  # torchvision's weights
        transform = steps()
        steps = getattr(transform, "transforms", None)
    processor = getattr(transform, "image_processor", transform)
    if hasattr(processor, "image_mean") and hasattr(processor, "do_resize"):
        return _from_processor(processor, name)
    preset = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if all(hasattr(transform, attribute) for attribute in preset):
        values = [getattr(transform, attribute) for attribute in preset]
        crop, resize, mean, std, interpolation = values
        found = recognized(resize, crop, interpolation, mean, std)
    else:
        found = _from_chain(steps)
    if found is not None:
        return found
    if not callable(transform):
        raise InputError(
            f"preprocess: expected a transform, given {transform!r:.100}; give Preprocess(...), a "
            "torchvision transform, a Hugging Face image processor or a function of a picture"
        )
    return custom(transform, name=name)


def recognized(
    resize: int | Sequence[int] | None,
    crop: int | Sequence[int] | None,
    interpolation: object,
    mean: Sequence[float],
    std: Sequence[float],
    center: Literal["round", "floor"] = "round",
) -> Preprocess | None:
    """Return the preprocessing of a resize and a crop in pixels; None for what does more."""
    shorter, sides = ([n] if isinstance(n, int) else list(n or ()) for n in (resize, crop))
    sides = sides * 2 if len(sides) == 1 else sides
    # A Pillow constant, an `InterpolationMode`, or its value.
    asked = getattr(interpolation, "value", interpolation)
    asked = "nearest" if asked == "nearest-exact" else asked
    method = next((name for name, value in RESAMPLING.items() if asked in (name, value)), None)
    if method is None or not shorter or (len(shorter) == 1 and not sides):
        return None
    mean, std = (tuple(float(number) for number in each) for each in (mean, std))
    if len(shorter) == 2 and sides in ([], shorter):
        return Preprocess((shorter[0], shorter[1]), "squash", None, method, mean, std)
    first = shorter[0] if len(shorter) == 1 else (shorter[0], shorter[1])
    return Preprocess((sides[0], sides[1]), "crop", first, method, mean, std, center)


# What a Compose's steps are called where they are all known, once each and in the usual order.
_CHAIN = re.compile(
    "(Grayscale )?Resize (CenterCrop )?(MaybeConvertMode |function )?"
    "(ToTensor|MaybeToTensor|ToImage ToDtype|PILToTensor ConvertImageDtype)( Normalize)?"
)


def _from_chain(steps: Sequence[Any] | None) -> Preprocess | None:
    """Return what a Compose is whose steps are all known."""
    named = {type(step).__name__: step for step in steps or ()}
    if getattr(named.get("function"), "__name__", "_convert_to_rgb") != "_convert_to_rgb":
        return None
    if not _CHAIN.fullmatch(" ".join(named)) or len(named) != len(steps or ()):
        return None
    gray, crop, normalize = map(named.get, ("Grayscale", "CenterCrop", "Normalize"))
    resize = named["Resize"]
    scaled = named.get("ToDtype", named.get("ConvertImageDtype"))
    if scaled is not None and not (
        str(getattr(scaled, "dtype", "")) == "torch.float32" and getattr(scaled, "scale", True)
    ):
        return None
    if getattr(resize, "max_size", None) is not None or (
        gray is not None and gray.num_output_channels != 1
    ):
        return None
    count = 3 if gray is None else 1
    mean, std = [0.0] * count, [1.0] * count
    if normalize is not None:
        mean, std = list(normalize.mean), list(normalize.std)
    if {len(mean), len(std)} != {count}:
        return None
    return recognized(
        resize.size, None if crop is None else crop.size, resize.interpolation, mean, std
    )


def _from_processor(processor: Any, name: str | None) -> AnyPreprocess:
    """Return what a Hugging Face image processor amounts to; custom where it does more."""
    kind = type(processor).__name__

    def process(image: Image.Image) -> np.ndarray:
        pixels: np.ndarray = processor(images=image, return_tensors="np")["pixel_values"][0]
        return pixels

    known = list(_readings(processor))
    for reading in known:
        if not callable(processor) or _agree(reading, process):
            return reading
    setting = partial(getattr, processor)
    extent = None
    if setting("do_center_crop", False) or setting("crop_pct", None) is not None:
        # What it does to colors may be its own; where it looks is known.
        extent = known[0].extent if known and setting("do_flip_channel_order", False) else None
        if extent is None:
            raise InputError(
                f"preprocess: {kind} crops pictures in a way that cannot be read from its "
                "settings; give Preprocess(size=..., resize='crop', resize_to=..., mean=..., "
                "std=...), or embedcam.preprocess.custom(function, extent=...)"
            )
    return custom(process, name=name or f"{type(processor).__module__}.{kind}", extent=extent)


def _readings(processor: object) -> Iterator[Preprocess]:
    """Yield what an image processor's settings may mean, the usual meaning first."""
    setting = partial(getattr, processor)
    size, crop = (_sides_of(setting(key, None)) for key in ("size", "crop_size"))
    if not setting("do_resize") or size is None:
        return
    crop = crop if setting("do_center_crop", False) else None
    share = setting("crop_pct", None)
    if share is not None and len(size) == 1:
        # ConvNeXt has no crop size of its own and crops nothing from 384 on; PoolFormer has one.
        crop = crop or size * 2
        size = size * 2 if crop == size * 2 and size[0] >= 384 else [int(size[0] / share)]
    levels = _levels(processor)
    resample = setting("resample", None)
    # LeViT's own takes its size for that of the crop.
    for resized in (size, [int(256 / 224 * side) for side in size]):
        reading = recognized(resized, crop, resample, *levels, "floor")
        if reading is not None:
            yield reading


def _levels(processor: object) -> tuple[list[float], list[float]]:
    """Return mean and std for values in [0, 1] of how a processor rescales and normalizes."""
    setting = partial(getattr, processor)
    scale = setting("rescale_factor", 1 / 255) if setting("do_rescale", True) else 1.0
    shift = -1.0 if setting("rescale_offset", False) else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if setting("do_normalize", True):
        mean, std = list(setting("image_mean")), list(setting("image_std"))
    if setting("include_top", False):  # EfficientNet divides twice
        std = [one * one for one in std]
    whole = 255 * scale
    if abs(whole - 1) < 1e-9:
        whole = 1.0
    return [(one - shift) / whole for one in mean], [one / whole for one in std]


def _agree(reading: Preprocess, process: Callable[[Image.Image], np.ndarray]) -> bool:
    """Return whether a reading does to a picture of odd sides what its processor does to it."""
    picture = Image.fromarray(probe_picture()[:-7, :-1])
    try:
        expected = np.asarray(process(picture))
    except Exception:  # of what takes more than a picture
        return False
    found = reading(picture)
    if found.shape != expected.shape:
        return False
    # In levels of a byte; libraries round what they resize in their own ways.
    off = np.abs(found - expected) * 255 * np.array(reading.std)[:, None, None]
    return bool(off.max() <= _MOST_LEVELS and off.mean() <= 1)


def _sides_of(size: object) -> list[int] | None:
    """Return [shorter side] or [H, W] of a processor's size; None for what it else may be."""
    if isinstance(size, int):
        return [size, size]
    names = ("height", "width", "shortest_edge", "longest_edge")
    sides = size if isinstance(size, Mapping) else {key: getattr(size, key, None) for key in names}
    height, width, shortest, longest = map(sides.get, names)
    if height and width:
        return [int(height), int(width)]
    return [int(shortest)] if shortest and not longest else None
