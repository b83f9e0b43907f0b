"""Any indexable data set as a source of images: torchvision's, Hugging Face's, a list."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ..errors import ImageError, InputError, Plain, cut, ran_out, short
from .places import escaped, relative_path
from .reading import MAX_PIXELS, ImageLike, is_long_text
from .sources import ImageSource, Item

_PICTURES = ("image", "img", "picture", "photo")
"""Columns of rows that are taken for the picture, the first there is; `_LABELS` for the label."""
_LABELS = ("label", "labels", "class", "fine_label")
_UNDECODED = {"bytes", "path"}
_BOMBS = Image.DecompressionBombError, Image.DecompressionBombWarning
_BROKEN = OSError, SyntaxError, EOFError, *_BOMBS


class _Dataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, position: Any, /) -> Any: ...


class DatasetSource(ImageSource):
    """Images that a data set object holds; made by `from_dataset`."""

    def __init__(
        self,
        dataset: _Dataset,
        items: Sequence[Item],
        root: Path | None,
        lock: AbstractContextManager[object],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(items, root, max_pixels=max_pixels)
        self._dataset, self._lock = dataset, lock

    def fingerprint(self, position: int) -> str:
        """Return the id alone: what a data set holds cannot be asked whether it changed."""
        return f"id:{self.items[position].id}"

    def describe(self) -> dict[str, Plain]:
        """Raise InputError: what a data set holds lives in this process alone."""
        raise InputError(
            f"{type(self._dataset).__name__}: lives in this process, so another cannot read its "
            "images; write them as files, tar shards or Parquet, and give find_images those"
        )

    def _held(self, position: int) -> ImageLike:
        with self._lock:
            item = _item(self._dataset, position, self.name(position))
        return _picture(item)


def from_dataset(
    dataset: Any,
    ids: Sequence[str] | None = None,
    labels: Sequence[object] | Literal["none"] | None = None,
    *,
    thread_safe: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> DatasetSource:
    """Take any data set with a length and integer positions as a source of images.

    Parameters
    ----------
    dataset
        Of pictures, (picture, label) pairs, or dictionaries with the picture under "image" (or img,
        picture, photo), the label under "label" (or labels, class). A picture is anything
        `read_image` takes, or a tensor `[1|3 H W]` (uint8, or floats in [0, 1]).
    ids
        Default the paths below `dataset.root` where the data set lists its files (`samples`, as
        torchvision's ImageFolder does), else "0", "1", ...
    labels
        Default `dataset.targets`; without those each item is read once for its label. "none" leaves
        them out. Whole numbers become names where the data set has `classes`, or rows whose
        `features` name them; -1 is no label there.
    thread_safe
        Items may be read by several threads at once; otherwise one at a time.
    max_pixels
        More than this many pixels are refused.
    """
    kind, n_items = type(dataset).__name__, 0
    if isinstance(dataset, Mapping):
        named = cut(", ".join(map(str, list(dataset)[:3])), 80)
        raise InputError(f"{kind}: is a dictionary ({named}); give one of the data sets it holds")
    with suppress(TypeError):
        n_items = len(dataset)
    if n_items == 0:
        raise InputError(f"{kind}: is empty or has no length; give a data set with len() and items")
    root, paths = _dataset_paths(dataset, n_items)
    names = list(ids) if ids is not None else paths or [str(i) for i in range(n_items)]
    if len(names) != n_items:
        raise InputError(f"ids: {len(names)} given for a data set of {n_items} images")
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"ids: {short(name)} given; an id is a string that is not empty")
    columns = names, paths or [""] * n_items, _dataset_labels(dataset, n_items, labels)
    items = [Item(escaped(name), path, label) for name, path, label in zip(*columns, strict=True)]
    lock = nullcontext() if thread_safe else threading.Lock()
    return DatasetSource(dataset, items, root, lock, max_pixels)


def _dataset_paths(dataset: _Dataset, n_items: int) -> tuple[Path | None, list[str] | None]:
    samples, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if not isinstance(samples, list) or len(samples) != n_items or root is None:
        return None, None
    if not all(isinstance(s, tuple) and s and isinstance(s[0], str) for s in samples):
        return None, None
    return Path(root), [relative_path(os.path.abspath(s[0]), Path(root)) for s in samples]


def _dataset_labels(
    dataset: _Dataset, n_items: int, labels: Sequence[object] | Literal["none"] | None
) -> list[str | None]:
    if isinstance(labels, str):
        if labels != "none":
            raise InputError(f'labels: expected one for each image, or "none", given {labels!r}')
        return [None] * n_items
    values: Iterable[object] | None = labels
    if values is None:
        targets = getattr(dataset, "targets", None)
        values = targets if targets is not None and len(targets) == n_items else None
    classes, features = getattr(dataset, "classes", None), getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        column = next((name for name in _LABELS if name in features), None)
        if values is None and column is not None:
            values = dataset[column]  # all of them, without a picture decoded
        if classes is None and column is not None:
            classes = getattr(features[column], "names", None)
        values = None if values is None else [None if value == -1 else value for value in values]
    if values is None:
        values = _read_labels(dataset, n_items)
    names = [_label_name(value, classes) for value in values]
    if len(names) != n_items:
        raise InputError(f"labels: {len(names)} given for a data set of {n_items} images")
    return names


def _item(dataset: _Dataset, position: int, name: str) -> Any:
    """Return an item; an ImageError where its file is broken, as Pillow says in several ways."""
    try:
        return dataset[position]
    except ValueError as error:
        if not is_long_text(error):
            raise
        raise ImageError(
            f"{name}: is a PNG with more text beside its pixels than Pillow reads; save it "
            "again without, or give find_images its folder"
        ) from error
    except _BROKEN as error:
        if ran_out(error):
            raise
        raise ImageError(f"{name}: cannot be read ({error})") from error


def _read_labels(dataset: _Dataset, n_items: int) -> Iterator[object]:
    """Yield each item's label; an unreadable item has none, and is reported when it is read."""
    for position in range(n_items):
        try:
            item = _item(dataset, position, "")
        except ImageError:
            yield None
            continue
        if isinstance(item, Mapping):
            yield next((item[name] for name in _LABELS if name in item), None)
        elif isinstance(item, tuple | list):
            yield item[1] if len(item) > 1 else None
        else:
            yield from [None] * (n_items - position)
            return


def _label_name(value: Any, classes: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, int) and isinstance(classes, Sequence) and not isinstance(value, bool):
        if not 0 <= value < len(classes):
            raise InputError(
                f"labels: {value} given, the data set names {len(classes)} classes; pass labels="
            )
        return str(classes[value])
    if isinstance(value, float) and value != value:  # a table's missing one
        return None
    if not isinstance(value, int | float | bool | str):
        raise InputError(
            f"labels: a label of type {type(value).__name__} given; pass labels=, one string for "
            'each image, or labels="none"'
        )
    return str(value)


def _picture(item: Any) -> ImageLike:
    picture = item[0] if isinstance(item, tuple | list) and item else item
    if isinstance(picture, Mapping) and not picture.keys() <= _UNDECODED:
        column = next((name for name in _PICTURES if name in picture), None)
        if column is None:
            columns = cut(", ".join(map(str, picture)), 80)
            raise InputError(
                f"the data set's rows have the columns {columns}; one of them has to be the "
                f"picture and called {_PICTURES[0]!r}, or give (picture, label) pairs"
            )
        picture = picture[column]
    if isinstance(picture, Mapping) and picture.keys() & _UNDECODED:
        # An undecoded picture of Hugging Face's: the bytes of its file, or where it lies.
        held = picture.get("bytes")
        picture = picture.get("path") if held is None else held
    if not hasattr(picture, "detach"):
        shown: ImageLike = picture
        return shown
    values: np.ndarray = picture.detach().cpu().numpy()
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))
    return values
