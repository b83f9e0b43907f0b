"""What a transform of torchvision, timm or transformers amounts to, told by its parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .transforms import RESAMPLING, AnyPreprocess, CustomPreprocess, Preprocess, custom


def from_transform(transform: Any, *, name: str | None = None) -> AnyPreprocess:
    """Return the `Preprocess` a transform amounts to, or the transform wrapped as a custom one.

    Recognized without importing their libraries: torchvision's weights and their presets
    (`weights.transforms()`), a Compose of [Grayscale] [Resize] [CenterCrop] ToTensor [Normalize] as
    timm and most training scripts write it (in v2 ToImage and ToDtype), and Hugging Face's image
    processors. What crops in a way of its own is an `InputError`.
    """
    if isinstance(transform, Preprocess | CustomPreprocess):
        return transform
    if isinstance(transform, type):
        raise InputError(
            f"preprocess: given the class {transform.__name__}; give an instance of it, such as "
            f"{transform.__name__}(...)"
        )
    if callable(getattr(transform, "transforms", None)):  # torchvision's weights
        transform = transform.transforms()
    processor = getattr(transform, "image_processor", transform)
    if hasattr(processor, "image_mean") and hasattr(processor, "do_resize"):
        return _from_processor(processor, name)
    preset = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if all(hasattr(transform, attribute) for attribute in preset):
        values = [getattr(transform, attribute) for attribute in preset]
        crop, resize, mean, std, interpolation = values
        recognized = _recognized(resize, crop, interpolation, mean, std)
    else:
        recognized = _from_chain(getattr(transform, "transforms", None))
    if recognized is not None:
        return recognized
    if not callable(transform):
        raise InputError(
            f"preprocess: expected a transform, given {transform!r:.100}; give Preprocess(...), a "
            "torchvision transform, a Hugging Face image processor or a function of a picture"
        )
    return custom(transform, name=name)


def _recognized(
    resize: Any, crop: Any, interpolation: Any, mean: Any, std: Any
) -> Preprocess | None:
    """Return the preprocessing of a resize and a crop in pixels; None for what does more."""
    shorter, sides = ([n] if isinstance(n, int) else list(n or ()) for n in (resize, crop))
    sides = sides * 2 if len(sides) == 1 else sides
    method = _interpolation(interpolation)
    squash = len(shorter) == 2
    if method is None or not shorter or (sides not in ([], shorter) if squash else not sides):
        return None
    size, resize_to = (shorter, None) if squash else (sides, shorter[0])
    mean, std = (tuple(float(number) for number in each) for each in (mean, std))
    return Preprocess(tuple(size), "squash" if squash else "crop", resize_to, method, mean, std)


def _interpolation(mode: Any) -> str | None:
    """Return Pillow's name of an `InterpolationMode`, its value, or a Pillow constant."""
    if isinstance(mode, int) and not isinstance(mode, bool):
        return next((name for name, value in RESAMPLING.items() if value == mode), None)
    name = str(getattr(mode, "value", mode))
    name = "nearest" if name == "nearest-exact" else name
    return name if name in RESAMPLING else None


def _from_chain(steps: Any) -> Preprocess | None:
    """Return what a Compose is whose steps are all known, once each and in the usual order."""
    order = ("Grayscale", "Resize", "CenterCrop", "ToTensor", "Normalize")
    if not isinstance(steps, Sequence) or not steps:
        return None
    names, steps = _as_first_version(steps)
    if names != [name for name in order if name in names] or "ToTensor" not in names:
        return None
    by_name = dict(zip(names, steps, strict=True))
    gray, resize, crop, normalize = (
        by_name.get(name) for name in ("Grayscale", "Resize", "CenterCrop", "Normalize")
    )
    if resize is None or getattr(resize, "max_size", None) is not None:
        return None
    if gray is not None and gray.num_output_channels != 1:
        return None
    count = 3 if gray is None else 1
    mean, std = [0.0] * count, [1.0] * count
    if normalize is not None:
        mean, std = list(normalize.mean), list(normalize.std)
    if len(mean) != count or len(std) != count:
        return None
    size = None if crop is None else crop.size
    return _recognized(resize.size, size, resize.interpolation, mean, std)


def _as_first_version(steps: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """Return names and steps, with what amounts to ToTensor under that name."""
    synonyms = {"MaybeToTensor": "ToTensor"}
    names = [synonyms.get(type(step).__name__, type(step).__name__) for step in steps]
    kept = list(steps)
    for place, pair in enumerate(itertools.pairwise(names)):
        if pair in (("ToImage", "ToDtype"), ("PILToTensor", "ConvertImageDtype")):
            scaling = steps[place + 1]
            single = str(getattr(scaling, "dtype", "")) == "torch.float32"
            if single and getattr(scaling, "scale", True):
                names[place : place + 2] = ["ToTensor"]
                kept[place : place + 2] = [scaling]
            break
    return names, kept


def _from_processor(processor: Any, name: str | None) -> AnyPreprocess:
    """Return what a Hugging Face image processor amounts to; custom where it does more."""

    def setting(key: str, default: Any = None) -> Any:
        return getattr(processor, key, default)

    size, crop = (_sides_of(setting(key)) for key in ("size", "crop_size"))
    cropped = bool(setting("do_center_crop"))
    share = setting("crop_pct")  # ConvNeXt's own: the share that a crop keeps
    more = ("do_pad", "do_flip_channel_order", "rescale_offset")
    scaled = (
        setting("do_rescale", True) and abs(setting("rescale_factor", 1 / 255) - 1 / 255) < 1e-9
    )
    if scaled and setting("do_resize") and share is None and not any(map(setting, more)):
        mean, std = (0.0,) * 3, (1.0,) * 3
        if setting("do_normalize", True):
            mean, std = processor.image_mean, processor.image_std
        crop = crop if cropped else None
        recognized = _recognized(size, crop, setting("resample"), mean, std)
        if recognized is not None:
            return recognized
    kind = type(processor).__name__
    if cropped or share is not None:
        raise InputError(
            f"preprocess: {kind} crops pictures in a way that cannot be read from its settings; "
            "give Preprocess(size=..., resize='crop', resize_to=..., mean=..., std=...), or "
            "embedcam.preprocess.custom(function, extent=...)"
        )

    def process(image: Any) -> Any:
        return processor(images=image, return_tensors="np")["pixel_values"][0]

    return custom(process, name=name or f"{type(processor).__module__}.{kind}")


def _sides_of(size: Any) -> list[int] | None:
    """Return [shorter side] or [H, W] of a processor's size; None for what it else may be."""
    if isinstance(size, int):
        return [size, size]
    names = ("height", "width", "shortest_edge", "longest_edge")
    sides = size if isinstance(size, Mapping) else {key: getattr(size, key, None) for key in names}
    height, width, shortest, longest = map(sides.get, names)
    if height and width:
        return [int(height), int(width)]
    return [int(shortest)] if shortest and not longest else None
