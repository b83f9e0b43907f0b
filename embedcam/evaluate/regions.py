"""Where the objects are: boxes from a CSV or masks from a folder, on the map's own grid."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError
from ..images import EXTENSIONS, ImageSource, Root, is_url, located, read_image
from ..images.lists import csv_rows
from ..metrics import box_mask
from ..preprocess import Extent

_GREY, _COLORED, _COLORS, _LOOKED = 32, 0.05, 32, 8
"""A mask's channels differ by no more, but for few pixels or of few colors."""
NEEDED = ("path", "x0", "y0", "x1", "y1")
Edges = tuple[float, float, float, float]


class Box(NamedTuple):
    """A box as it stands in a line: pixels of the upright file, or of a picture of size `of`."""

    edges: Edges
    label: str | None
    line: int
    of: tuple[float, float] | None


@dataclass
class Region:
    """What one image shows: `inside [H W]` in [0, 1], `boxes [n 4]`; `by_label` of several."""

    inside: np.ndarray
    boxes: np.ndarray
    by_label: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Regions:
    """Boxes or masks of the images of a source, by their positions; of neither, empty."""

    _source: ImageSource
    _boxes: Mapping[int, Sequence[Box]] = field(default_factory=dict)
    _masks: Mapping[int, Path] = field(default_factory=dict)
    _where: str = ""

    def __len__(self) -> int:
        return len(self._boxes) + len(self._masks)

    def pixels(self, position: int, size: tuple[int, int], label: str | None = None) -> list[Edges]:
        """Return boxes to draw on the picture of (width, height) `size`, of one label if any."""
        return [self._scaled(box, size) for box in self._of_label(position, label)]

    def of(
        self, position: int, size: tuple[int, int], extent: Extent, grid: tuple[int, int]
    ) -> Region | None:
        """Return the region of an image as the network saw it; None where nothing was seen.

        size: (width, height) of the picture; extent: its crop box; grid: (H, W) of the map.
        """
        if position in self._masks:
            return self._masked(self._masks[position], size, extent, grid)
        by_label: dict[str | None, list[Edges]] = {}
        placed: dict[Box, Edges] = {}
        for box in self._boxes.get(position, ()):
            placed[box] = _on_grid(self._scaled(box, size), extent, grid)
            by_label.setdefault(box.label, []).append(placed[box])
        wanted = (placed[box] for box in self._of_label(position))
        edges = [one for one in wanted if (one[2] - one[0]) * (one[3] - one[1]) > 0]
        if not edges:
            return None
        named = {label: _union(some, grid) for label, some in by_label.items() if label is not None}
        return Region(
            _union(edges, grid), np.array(edges, np.float64), named if len(named) > 1 else {}
        )

    def _of_label(self, position: int, label: str | None = None) -> Sequence[Box]:
        boxes = self._boxes.get(position, [])
        label = label or self._source.items[position].label
        return [box for box in boxes if label is not None and box.label == label] or boxes

    def _scaled(self, box: Box, size: tuple[int, int]) -> Edges:
        (width, height), (x0, y0, x1, y1) = box.of or size, box.edges
        if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
            raise InputError(
                f"{self._where}, line {box.line}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} reaches "
                f"beyond its picture of {width:g} x {height:g} pixels; give edges in pixels of it, "
                "or its size in columns width and height"
            )
        across, down = size[0] / width, size[1] / height
        least = max(x0 * across, 0), max(y0 * down, 0)
        return (*least, min(x1 * across, size[0]), min(y1 * down, size[1]))

    def _masked(
        self, file: Path, size: tuple[int, int], extent: Extent, grid: tuple[int, int]
    ) -> Region | None:
        mask = _mask(file, self._source.max_pixels)
        if mask.size != size:
            raise InputError(
                f"{file}: the mask is {mask.width} x {mask.height} pixels and its picture "
                f"{size[0]} x {size[1]}; save it at the picture's size"
            )
        inside = _seen(mask, extent, grid)
        rows, columns = (np.flatnonzero((inside >= 0.5).any(axis)) for axis in (1, 0))
        if not len(rows):
            return None
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return Region(inside, np.array([box], np.float64))


def absolute(root: Root | None, path: str) -> str:
    """Return a path below a folder, or an address, by which the same picture is known again."""
    place = located(root, path)
    return place if is_url(place) else os.path.abspath(place)


def of_boxes(path: str | os.PathLike[str], source: ImageSource) -> Regions:
    """Read boxes from a CSV with the columns path,x0,y0,x1,y1[,label][,width,height].

    A path is relative to the CSV, or an id. Edges are in pixels of the upright file, or of a
    picture of width x height where the line says so.
    """
    file = Path(path)
    items = list(enumerate(source.items))
    places = {item.id: place for place, item in items}
    by_file = {absolute(source.root, one.path): place for place, one in items if one.path}
    boxes: dict[int, list[Box]] = {}
    unknown: list[str] = []
    for line, row in csv_rows(file, NEEDED, "path,x0,y0,x1,y1[,label][,width,height]"):
        box = _box(f"{file}, line {line}", line, row)
        place = by_file.get(absolute(file.parent, row["path"]), places.get(row["path"]))
        if place is None:
            unknown.append(row["path"])
        else:
            boxes.setdefault(place, []).append(box)
    known = [box for each in boxes.values() for box in each]
    if not known and not unknown:
        raise InputError(f"{file}: has no lines below its header")
    if not known:
        asked = source.name(0) if len(source) else "none"
        raise InputError(
            f"{file}: no box belongs to one of the images: it names {unknown[0]!r} and the images "
            f"are such as {asked}; give paths relative to the CSV, or the images' ids"
        )
    if all(max(box.edges) <= 1 and box.of is None for box in known):
        raise InputError(
            f"{file}: no edge is beyond 1, so these look like shares of the picture; give pixels, "
            "or columns width and height, both 1"
        )
    return Regions(source, boxes, {}, str(file))


def of_masks(folder: str | os.PathLike[str], source: ImageSource) -> Regions:
    """Find masks in a folder, named as the images are, whatever the ending."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; give one with a mask for each image")
    stems = {
        str(file.relative_to(root).with_suffix("")): file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in EXTENSIONS
    }
    masks: dict[int, Path] = {}
    for position, item in enumerate(source.items):
        names = (os.path.splitext(name)[0] for name in (item.path, item.id))
        if (stem := next(filter(stems.get, names), None)) is not None:
            masks[position] = stems[stem]
    if not masks:
        asked = os.path.splitext(source.items[0].path or source.items[0].id)[0]
        raise InputError(
            f"{root}: holds no mask for any of the images; name it like the image, such as "
            f"{root / asked}.png"
        )
    for position, file in itertools.islice(masks.items(), _LOOKED):
        if os.path.exists(source.name(position)) and os.path.samefile(source.name(position), file):
            raise InputError(
                f"{root}: {file} is the query itself; give a folder of masks, white on the object"
            )
        _mask(file, source.max_pixels)
    return Regions(source, {}, masks)


def _mask(file: Path, max_pixels: int) -> Image.Image:
    picture = read_image(file, max_pixels=max_pixels).convert("RGB")
    small = np.asarray(picture.resize((64, 64), Image.Resampling.NEAREST), int)
    colored = (small.max(2) - small.min(2) > _GREY).mean()
    colors = len(np.unique((small // 32).reshape(-1, 3), axis=0))
    if colored > _COLORED and colors > _COLORS:
        raise InputError(
            f"{file}: is a photograph in many colours and no mask; give pictures in black, and "
            "white on the object"
        )
    return picture.convert("L")


def _box(where: str, line: int, row: Mapping[str, str]) -> Box:
    numbers = {}
    for name in (*NEEDED[1:], "width", "height"):
        text = row.get(name, "")
        if text or name in NEEDED:
            try:
                numbers[name] = float(text)
            except ValueError:
                numbers[name] = math.nan
            if not math.isfinite(numbers[name]):
                raise InputError(f"{where}: {name} is {text!r}; give a number of pixels")
    x0, y0, x1, y1, *size = numbers.values()
    if x0 >= x1 or y0 >= y1:
        raise InputError(
            f"{where}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} is empty; give x0 < x1 "
            "and y0 < y1, edges and not a width and a height"
        )
    if min(size, default=1) <= 0:
        raise InputError(f"{where}: a picture of {size[0]:g} x {size[-1]:g} pixels")
    of = (size[0], size[1]) if len(size) == 2 else None
    return Box((x0, y0, x1, y1), row.get("label") or None, line, of)


def _on_grid(box: Edges, extent: Extent, grid: tuple[int, int]) -> Edges:
    ends, (low, high) = np.array(grid[::-1]), np.reshape(extent, (2, 2))
    corners = (np.reshape(box, (2, 2)) - low) * (ends / (high - low))
    x0, y0, x1, y1 = np.clip(corners, 0, ends).ravel().tolist()
    return x0, y0, x1, y1


def _union(boxes: Sequence[Edges], grid: tuple[int, int]) -> np.ndarray:
    return np.asarray(np.max([box_mask(box, grid) for box in boxes], axis=0, initial=0.0))


def _seen(mask: Image.Image, extent: Extent, grid: tuple[int, int]) -> np.ndarray:
    """Return the mask's mean over each pixel of the map `[H W]`; beyond the picture it is 0."""
    x0, y0, x1, y1 = extent
    left, top = max(0, math.ceil(-x0)), max(0, math.ceil(-y0))
    right, bottom = max(mask.width, math.ceil(x1)), max(mask.height, math.ceil(y1))
    padded = mask.crop((-left, -top, right, bottom))
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    # In floating point: a byte holds no half.
    small = padded.convert("F").resize((grid[1], grid[0]), Image.Resampling.BOX, box=box)
    return np.asarray(small, np.float64) / 255
