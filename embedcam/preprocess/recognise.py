"""What a torchvision or timm transform amounts to, told by its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedcam.errors import InputError
from embedcam.preprocess.custom import AnyPreprocess, CustomPreprocess, custom
from embedcam.preprocess.standard import RESAMPLING, Preprocess


def from_transform(transform: Any, *, name: str | None = None) -> AnyPreprocess:
    """The `Preprocess` that a transform amounts to, or the transform wrapped as a custom one.

    Recognised without importing torchvision: its weights' presets (`weights.transforms()`), and a
    Compose of [Resize] [CenterCrop] ToTensor [Normalize] as timm and most training scripts write.
    """
    if isinstance(transform, Preprocess | CustomPreprocess):
        return transform
    preset = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if all(hasattr(transform, attribute) for attribute in preset):
        settings = _from_preset(transform)
    else:
        settings = _from_chain(getattr(transform, "transforms", None))
    if settings is not None:
        return Preprocess(**settings)
    if not callable(transform):
        raise InputError(f"preprocess: expected a transform, given {transform!r}")
    return custom(transform, name=name)


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _geometry(resize_size: list[int] | None, crop_size: list[int] | None) -> dict[str, Any] | None:
    """`size`, `resize` and `resize_to` of a resize and a crop; None if they do something else."""
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
    """Pillow's name of a torchvision `InterpolationMode`, its value, or a Pillow constant."""
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
    """Settings of a Compose whose steps are all known, each at most once and in the usual order."""
    order = ("Resize", "CenterCrop", "ToTensor", "Normalize")
    synonyms = {"MaybeToTensor": "ToTensor"}
    if not isinstance(steps, Sequence) or not steps:
        return None
    names = [synonyms.get(type(step).__name__, type(step).__name__) for step in steps]
    if names != [name for name in order if name in names] or "ToTensor" not in names:
        return None
    found = dict(zip(names, steps, strict=True))
    resize, crop, normalize = (found.get(name) for name in ("Resize", "CenterCrop", "Normalize"))
    if resize is None or getattr(resize, "max_size", None) is not None:
        return None
    geometry = _geometry(_numbers(resize.size), None if crop is None else _numbers(crop.size))
    interpolation = _interpolation(resize.interpolation)
    if geometry is None or interpolation is None:
        return None
    return {
        **geometry,
        "interpolation": interpolation,
        "mean": (0.0, 0.0, 0.0) if normalize is None else _list(normalize.mean),
        "std": (1.0, 1.0, 1.0) if normalize is None else _list(normalize.std),
    }


def _list(values: Any) -> list[float]:
    return [float(value) for value in values]
