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
        settings = _from_preset(transform)
    else:
        settings = _from_chain(getattr(transform, "transforms", None))
    if settings is not None:
        return Preprocess(**settings)
    if not callable(transform):
        raise InputError(
            f"preprocess: expected a transform, given {transform!r:.100}; give Preprocess(...), a "
            "torchvision transform, a Hugging Face image processor or a function of a picture"
        )
    return custom(transform, name=name)


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _geometry(resize_size: list[int] | None, crop_size: list[int] | None) -> dict[str, Any] | None:
    """Return `size`, `resize` and `resize_to` of a resize and a crop; None for anything else."""
    crop = crop_size * 2 if crop_size is not None and len(crop_size) == 1 else crop_size
    if resize_size is None:
        return None
    if len(resize_size) == 2:
        if crop is not None and crop != resize_size:
            return None
        return {"size": tuple(resize_size), "resize": "squash"}
    if crop is None:
        return None
    return {"size": tuple(crop), "resize": "crop", "resize_to": resize_size[0]}


def _interpolation(mode: Any) -> str | None:
    """Return Pillow's name of an `InterpolationMode`, its value, or a Pillow constant."""
    if isinstance(mode, int) and not isinstance(mode, bool):
        return next((name for name, value in RESAMPLING.items() if value == mode), None)
    name = str(getattr(mode, "value", mode))
    name = "nearest" if name == "nearest-exact" else name
    return name if name in RESAMPLING else None


def _from_preset(preset: Any) -> dict[str, Any] | None:
    resize = None if preset.resize_size is None else _numbers(preset.resize_size)
    crop = None if preset.crop_size is None else _numbers(preset.crop_size)
    geometry, interpolation = _geometry(resize, crop), _interpolation(preset.interpolation)
    if geometry is None or interpolation is None:
        return None
    return {**geometry, "interpolation": interpolation, "mean": preset.mean, "std": preset.std}


def _from_chain(steps: Any) -> dict[str, Any] | None:
    """Return settings of a Compose whose steps are all known, once each and in the usual order."""
    order = ("Grayscale", "Resize", "CenterCrop", "ToTensor", "Normalize")
    if not isinstance(steps, Sequence) or not steps:
        return None
    names, steps = _as_first_version(steps)
    if names != [name for name in order if name in names] or "ToTensor" not in names:
        return None
    by_name = dict(zip(names, steps, strict=True))
    resize, crop, normalize = (by_name.get(name) for name in ("Resize", "CenterCrop", "Normalize"))
    if resize is None or getattr(resize, "max_size", None) is not None:
        return None
    gray = by_name.get("Grayscale")
    if gray is not None and gray.num_output_channels != 1:
        return None
    size = _numbers(resize.size)
    geometry = _geometry(size, None if crop is None else _numbers(crop.size))
    interpolation = _interpolation(resize.interpolation)
    if geometry is None or interpolation is None:
        return None
    count = 3 if gray is None else 1
    mean = [0.0] * count if normalize is None else _list(normalize.mean)
    std = [1.0] * count if normalize is None else _list(normalize.std)
    if len(mean) != count or len(std) != count:
        return None
    return {**geometry, "interpolation": interpolation, "mean": mean, "std": std}


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


def _list(values: Any) -> list[float]:
    return [float(value) for value in values]


def _from_processor(processor: Any, name: str | None) -> AnyPreprocess:
    """Return what a Hugging Face image processor amounts to; custom where it does more."""

    def said(key: str, default: Any = None) -> Any:
        return getattr(processor, key, default)

    size, crop = (_sides_of(said(key)) for key in ("size", "crop_size"))
    cropped = bool(said("do_center_crop"))
    scaled = said("do_rescale", True) and abs(said("rescale_factor", 1 / 255) - 1 / 255) < 1e-9
    more = [key for key in ("do_pad", "do_flip_channel_order", "rescale_offset") if said(key)]
    # ConvNeXt's own: the share that a crop keeps.
    share = said("crop_pct")
    geometry = None
    if said("do_resize") and size is not None and not more and share is None:
        geometry = _geometry(size, crop if cropped else None)
    interpolation = _interpolation(said("resample"))
    if scaled and geometry is not None and interpolation is not None:
        normalized = said("do_normalize", True)
        mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        std: tuple[float, ...] = (1.0, 1.0, 1.0)
        if normalized:
            mean, std = tuple(_list(processor.image_mean)), tuple(_list(processor.image_std))
        return Preprocess(**geometry, interpolation=interpolation, mean=mean, std=std)
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
    get = size.get if isinstance(size, Mapping) else lambda key: getattr(size, key, None)
    height, width, shortest = get("height"), get("width"), get("shortest_edge")
    if height and width:
        return [int(height), int(width)]
    return [int(shortest)] if shortest and not get("longest_edge") else None
