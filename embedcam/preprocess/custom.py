"""A caller's own transform as preprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import EmbedcamError, InputError
from .standard import Extent, Preprocess, not_ours


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
        """The transform's own output as float32 `[C H W]`; other shapes and NaN are refused.

        Raises:
            InputError: it fails, the exception kept as the cause, or returns something else.
        """
        try:
            output = self.transform(image)
        except (EmbedcamError, MemoryError):
            raise
        except Exception as error:
            said = str(error).strip().partition("\n")[0][:300]
            raise InputError(
                f"preprocess {self.name} failed with {type(error).__name__}: {said}; give a "
                "transform that takes a PIL picture and returns an array or tensor [C H W]"
            ) from error
        if hasattr(output, "detach"):
            output = output.detach().cpu().numpy()
        values = np.asarray(output)
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
        """What the network sees of a `width` x `height` picture, as `Preprocess.extent` says it."""
        if min(width, height) < 1:
            raise InputError(f"preprocess: a picture of {width} x {height} pixels has no extent")
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
        """What an index can record of somebody else's code: its name, whether it sees it all."""
        extent = "whole" if self.rectangle is None else "own"
        return {"kind": "custom", "name": self.name, "extent": extent}


AnyPreprocess = Preprocess | CustomPreprocess


def custom(
    transform: Callable[[Image.Image], Any],
    *,
    name: str | None = None,
    extent: Callable[[int, int], Extent] | None = None,
) -> CustomPreprocess:
    """Wrap a function of an oriented RGB picture that returns a tensor or array `[C H W]`.

    extent: a function (width, height) -> (x0, y0, x1, y1) of what the network sees; default all.
    """
    if name is None:
        kind = type(transform)
        own = getattr(transform, "__qualname__", None)
        name = f"{transform.__module__}.{own}" if own else f"{kind.__module__}.{kind.__qualname__}"
    return CustomPreprocess(transform, name, extent)


def preprocess_from_dict(values: Mapping[str, Any]) -> AnyPreprocess:
    """What `to_dict` described. Of a caller's own transform only what its name allows:

    it cannot be called, and it has an extent only if that is the whole picture; what is missing is
    an InputError that asks for the transform.
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
        raise InputError(not_ours(str(name)))

    return CustomPreprocess(unknown, str(name or ""), unknown if extent == "own" else None)
