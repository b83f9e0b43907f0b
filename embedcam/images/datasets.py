"""Any indexable data set as a source of images: torchvision's, a list, one of the caller's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from embedcam.errors import ImageError, InputError
from embedcam.images.reading import read_image
from embedcam.images.sources import ImageSource, Item, relative_path
from embedcam.memory import ran_out


class DatasetSource(ImageSource):
    """Images that a data set object holds; made by `from_dataset`."""

    def __init__(
        self, dataset: Any, items: Sequence[Item], root: Path | None, lock: threading.Lock | None
    ) -> None:
        super().__init__(items, root)
        self._dataset = dataset
        self._lock = lock

    def open(self, position: int) -> Image.Image:
        """The item's picture, upright and RGB; raises ImageError, which begins with its name."""
        name = self.name(position)
        try:
            if self._lock is None:
                item = self._dataset[position]
            else:
                with self._lock:
                    item = self._dataset[position]
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            # Pillow's ways of saying that a file is broken.
            if ran_out(error):
                raise
            raise ImageError(f"{name}: cannot be read ({error})") from error
        except Image.DecompressionBombWarning as error:
            raise ImageError(f"{name}: cannot be read ({error})") from error
        return read_image(_picture(item), max_pixels=self.max_pixels, name=name)

    def fingerprint(self, position: int) -> str:
        """The id alone: what lies behind a data set cannot be asked whether it changed."""
        return f"id:{self.items[position].id}"


def from_dataset(
    dataset: Any,
    ids: Sequence[str] | None = None,
    labels: Sequence[object] | Literal["none"] | None = None,
    *,
    thread_safe: bool = False,
) -> DatasetSource:
    """Any data set with a length and integer positions, of pictures or (picture, label) pairs.

    A picture is anything `read_image` takes, or a tensor `[1|3 H W]` (uint8, or floats in [0, 1]).
    ids: default the paths below `dataset.root` where the data set lists its files (`samples`, as
        torchvision's ImageFolder does), else "0", "1", ...
    labels: default `dataset.targets`; without those each item is read once for its label. "none"
        leaves them out. Whole numbers become names where the data set has `classes`.
    thread_safe: items may be read by several threads at once; otherwise one at a time.
    """
    try:
        n_items = len(dataset)
    except TypeError:
        raise InputError(
            f"{type(dataset).__name__}: has no length; give a data set with len() and positions"
        ) from None
    if n_items == 0:
        raise InputError(f"{type(dataset).__name__}: the data set is empty")
    root, paths = _dataset_paths(dataset, n_items)
    own_ids = list(ids) if ids is not None else paths or [str(i) for i in range(n_items)]
    if len(own_ids) != n_items:
        raise InputError(f"ids: {len(own_ids)} given for a data set of {n_items} images")
    for own in own_ids:
        if not isinstance(own, str) or not own:
            raise InputError(f"ids: {own!r} given; an id is a string that is not empty")
    names = _dataset_labels(dataset, n_items, labels)
    where = paths or [""] * n_items
    items = [Item(*values) for values in zip(own_ids, where, names, strict=True)]
    return DatasetSource(dataset, items, root, None if thread_safe else threading.Lock())


def _dataset_paths(dataset: Any, n_items: int) -> tuple[Path | None, list[str] | None]:
    """The root and relative paths of a data set that lists its files, as ImageFolder does."""
    samples, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if not isinstance(samples, list) or len(samples) != n_items or root is None:
        return None, None
    if not all(isinstance(s, tuple) and s and isinstance(s[0], str) for s in samples):
        return None, None
    return Path(root), [relative_path(os.path.abspath(s[0]), Path(root)) for s in samples]


def _dataset_labels(
    dataset: Any, n_items: int, labels: Sequence[object] | Literal["none"] | None
) -> list[str | None]:
    if isinstance(labels, str):
        if labels != "none":
            raise InputError(f'labels: expected one for each image, or "none", given {labels!r}')
        return [None] * n_items
    found: Iterable[object] | None = labels
    if found is None:
        targets = getattr(dataset, "targets", None)
        found = targets if targets is not None and len(targets) == n_items else None
    if found is None:
        found = _read_labels(dataset, n_items)
    names = [_label_name(value, getattr(dataset, "classes", None)) for value in found]
    if len(names) != n_items:
        raise InputError(f"labels: {len(names)} given for a data set of {n_items} images")
    return names


def _read_labels(dataset: Any, n_items: int) -> Iterator[object]:
    """Each item's second element; an unreadable item has none, and is reported when it is read."""
    for position in range(n_items):
        try:
            item = dataset[position]
        except (OSError, SyntaxError, EOFError) as error:
            if ran_out(error):
                raise
            yield None
            continue
        if not isinstance(item, tuple | list):
            yield from [None] * (n_items - position)
            return
        yield item[1] if len(item) > 1 else None


def _label_name(value: Any, classes: Any) -> str | None:
    """A label as a string; whole numbers by the data set's class names."""
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
    if not isinstance(value, int | float | bool | str):
        raise InputError(
            f"labels: a label of type {type(value).__name__} given; pass labels=, one string for "
            'each image, or labels="none"'
        )
    return str(value)


def _picture(item: Any) -> Any:
    """What `read_image` takes, of a data set's item."""
    picture = item[0] if isinstance(item, tuple | list) and item else item
    if not hasattr(picture, "detach"):
        return picture
    values: np.ndarray = picture.detach().cpu().numpy()
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        return (
            values[0] if values.shape[0] == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))
        )
    return values
