"""Any indexable data set as a source of images: torchvision's, Hugging Face's, a list."""

from __future__ import annotations

import hashlib
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
from .sources import ImageSource, Item, Listing

_PICTURES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Columns of rows that are taken for the picture, the first there is; `_LABELS` for the label."""
_LABELS = ("label", "labels", "class", "fine_label", "cls")
_IDS = ("id", "key", "__key__", "image_id", "uid")
"""Columns of a stream's rows that are taken for the id, the first there is."""
_UNDECODED = {"bytes", "path"}
WINDOW = 64
"""Rows of a stream that are kept."""
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


class StreamSource(DatasetSource):
    """Images of a data set that is read from its beginning, in order; made by `from_dataset`.

    Each pass over the images is one over the data set. The last `WINDOW` rows are kept, since
    threads ask for them a little out of order.
    """

    def __init__(self, dataset: Any, items: Sequence[Item], max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(dataset, items, None, threading.Lock(), max_pixels)
        self._rest: Iterator[Any] = iter(())
        self._next, self._kept = len(self), dict[int, Any]()

    def only(self, positions: Sequence[int]) -> ImageSource:
        """Refuse: a pass has all images."""
        raise InputError(
            "a stream is read whole; leave images out of the data set itself (filter), or write "
            "them as files, tar shards or Parquet"
        )

    def _held(self, position: int) -> ImageLike:
        with self._lock:
            return _picture(self._row(position))

    def _row(self, position: int) -> Any:
        if position in self._kept:
            return self._kept[position]
        if position < self._next:
            self._rest, self._next = iter(self._dataset), 0
            self._kept.clear()
        while self._next <= position:
            row, place = next(self._rest, None), self._next
            if row is None or _row_id(row, place) != self.items.ids[place]:
                self._next = len(self)
                raise InputError(
                    f"the data set gave {short(self.items.ids[place])} as row {place} before, and "
                    "something else now; give one that is not shuffled and does not change"
                )
            self._kept[place] = row
            self._kept.pop(place - WINDOW, None)
            self._next += 1
        return self._kept[position]


def _stream(
    dataset: Iterable[Any],
    ids: Sequence[str] | None,
    labels: Sequence[object] | Literal["none"] | None,
    max_pixels: int,
) -> StreamSource:
    """List a data set without a length, in one pass; its pictures are not decoded."""
    kind = type(dataset).__name__
    if ids is not None or not (labels is None or isinstance(labels, str)):
        raise InputError(
            f"{kind}: has no length, and ids= or labels= are given; put them into its rows, as id "
            'and label, or take labels="none"'
        )
    if iter(dataset) is dataset:
        raise InputError(f"{kind}: is read once alone; give what can be iterated again")
    features = getattr(dataset, "features", None)
    names: dict[str, Any] = {}
    if isinstance(features, Mapping):
        undecoded = [name for name in _PICTURES if type(features.get(name)).__name__ == "Image"]
        for name in undecoded:
            held: Any = dataset
            dataset = held.cast_column(name, type(features[name])(decode=False))
        names = {n: getattr(features[n], "names", None) for n in _LABELS if n in features}

    def items() -> Iterator[Item]:
        for position, row in enumerate(dataset):
            there = row if isinstance(row, Mapping) and labels is None else {}
            column = next((name for name in _LABELS if name in there), "")
            value = there.get(column)
            value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            value = None if value == -1 and names.get(column) else value
            yield Item(_row_id(row, position), "", _label_name(value, names.get(column)))

    source = StreamSource(dataset, Listing.of(items()), max_pixels)
    if not len(source):
        raise InputError(f"{kind}: is empty; give a data set with rows")
    return source


def _row_id(row: Any, position: int) -> str:
    """Return a row's id: what it says, or the digest of its picture's bytes."""
    if isinstance(row, Mapping):
        told = next((row[name] for name in _IDS if row.get(name) not in (None, "")), None)
        if isinstance(told, str | int):
            return escaped(str(told))
        held = _picture(row)
        if isinstance(held, bytes):
            return hashlib.blake2b(held, digest_size=16).hexdigest()
    raise InputError(
        f"row {position} of the data set has no id, and ids are no positions; give it one, called "
        f"{_IDS[0]!r}"
    )


def from_dataset(
    dataset: Any,
    ids: Sequence[str] | None = None,
    labels: Sequence[object] | Literal["none"] | None = None,
    *,
    thread_safe: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> DatasetSource:
    """Take any data set as a source of images: with a length and positions, or a stream of rows.

    A stream, such as Hugging Face's `load_dataset(..., streaming=True)`, is read once for the ids
    and labels, and then once a pass, in its order.

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
    if n_items == 0 and not hasattr(type(dataset), "__len__") and isinstance(dataset, Iterable):
        return _stream(dataset, ids, labels, max_pixels)
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
