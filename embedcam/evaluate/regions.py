"""Where the objects are: boxes from a CSV or masks from a folder, on the map's own grid."""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from ..images import EXTENSIONS, MAX_PIXELS, ImageSource, read_image
from ..images.sources import csv_rows
from ..metrics import box_mask
from ..preprocess import Extent

_GREY, _COLOURED, _COLOURS, _LOOKED = 32, 0.05, 32, 8
"""A mask's channels differ by no more, but for few pixels or of few colours."""
NEEDED = ("path", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Box:
    """A box as it was written: edges in pixels, the label if any, and the line it stands in.

    of: (width, height) of the picture that the edges count pixels of, or None for the file's own.
    """

    edges: tuple[float, float, float, float]
    label: str | None
    line: int
    of: tuple[float, float] | None = None

    def scaled(self, size: tuple[int, int], where: str) -> tuple[float, float, float, float]:
        """The edges in pixels of a picture of (width, height) `size`, cut to it.

        Raises:
            InputError: it reaches more than a pixel beyond the picture.
        """
        width, height = self.of or size
        x0, y0, x1, y1 = self.edges
        if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
            raise InputError(
                f"{where}, line {self.line}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} reaches beyond "
                f"its picture of {width:g} x {height:g} pixels; give edges in pixels of the "
                "upright file, or say in columns width and height of which size"
            )
        across, down = size[0] / width, size[1] / height
        return (
            max(x0 * across, 0),
            max(y0 * down, 0),
            min(x1 * across, size[0]),
            min(y1 * down, size[1]),
        )


@dataclass
class Region:
    """What one image shows, on a grid of H x W.

    inside: `[H W]` in [0, 1], the covered part of each pixel; boxes: `[n 4]`, cut to the grid.
    by_label: the same region for each label apart, where the boxes name several.
    """

    inside: np.ndarray
    boxes: np.ndarray
    by_label: dict[str, np.ndarray] = field(default_factory=dict)


class Regions:
    """Where objects are in the images of a source; made by `of_boxes`, `of_masks` or `nowhere`."""

    def __len__(self) -> int:
        return 0

    def has(self, position: int) -> bool:
        """Whether anything is known of an image."""
        return False

    def labels(self, position: int) -> list[str]:
        """Labels that the boxes of an image name, each once."""
        return []

    def pixels(
        self, position: int, size: tuple[int, int], label: str | None = None
    ) -> list[tuple[float, float, float, float]]:
        """Boxes to draw on the picture of (width, height) `size`, of one label where given."""
        return []

    def of(
        self, position: int, size: tuple[int, int], extent: Extent, grid: tuple[int, int]
    ) -> Region | None:
        """The region of an image as the network saw it.

        Args:
            position: in the source.
            size: (width, height) of the upright picture.
            extent: the rectangle of it that the network saw.
            grid: (H, W) of the map.

        Returns:
            None where nothing is known, or nothing of it was seen.
        """
        return None


class BoxRegions(Regions):
    """Boxes of a CSV."""

    def __init__(self, where: str, boxes: dict[int, list[Box]], source: ImageSource) -> None:
        self.where, self._boxes, self._source = where, boxes, source

    def __len__(self) -> int:
        return len(self._boxes)

    def has(self, position: int) -> bool:  # noqa: D102
        return position in self._boxes

    def labels(self, position: int) -> list[str]:  # noqa: D102
        named = (box.label for box in self._boxes.get(position, ()))
        return list(dict.fromkeys(label for label in named if label is not None))

    def pixels(  # noqa: D102
        self, position: int, size: tuple[int, int], label: str | None = None
    ) -> Any:
        return [box.scaled(size, self.where) for box in self._own(position, label)]

    def _own(self, position: int, label: str | None = None) -> Sequence[Box]:
        """The boxes of a label, else of the image's own, where boxes name it; else all."""
        boxes = self._boxes.get(position, [])
        label = label or self._source.items[position].label
        own = [box for box in boxes if label is not None and box.label == label]
        return own or boxes

    def of(  # noqa: D102
        self, position: int, size: tuple[int, int], extent: Extent, grid: tuple[int, int]
    ) -> Region | None:
        if position not in self._boxes:
            return None
        placed = [
            (_on_grid(box.scaled(size, self.where), extent, grid), box)
            for box in self._boxes[position]
        ]
        own = {id(box) for box in self._own(position)}
        edges = [edge for edge, box in placed if id(box) in own and _area(edge) > 0]
        if not edges:
            return None
        labels = self.labels(position)
        by_label = {
            label: _union([edge for edge, box in placed if box.label == label], grid)
            for label in (labels if len(labels) > 1 else ())
        }
        return Region(_union(edges, grid), np.array(edges, np.float64), by_label)


class MaskRegions(Regions):
    """Masks of a folder: white is the object."""

    def __init__(self, files: dict[int, Path], max_pixels: int = MAX_PIXELS) -> None:
        self._files, self._max_pixels = files, max_pixels

    def __len__(self) -> int:
        return len(self._files)

    def has(self, position: int) -> bool:  # noqa: D102
        return position in self._files

    def of(  # noqa: D102
        self, position: int, size: tuple[int, int], extent: Extent, grid: tuple[int, int]
    ) -> Region | None:
        if position not in self._files:
            return None
        file = self._files[position]
        mask = _mask(file, self._max_pixels)
        if mask.size != size:
            raise InputError(
                f"{file}: the mask is {mask.width} x {mask.height} pixels and its picture "
                f"{size[0]} x {size[1]}; save it at the picture's size"
            )
        inside = _seen(mask, extent, grid)
        rows = np.flatnonzero((inside >= 0.5).any(1))
        columns = np.flatnonzero((inside >= 0.5).any(0))
        if not len(rows):
            return None
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return Region(inside, np.array([box], np.float64))


def of_boxes(path: str | os.PathLike[str], source: ImageSource) -> BoxRegions:
    """Boxes from a CSV with the columns path,x0,y0,x1,y1[,label][,width,height].

    A path is relative to the CSV, or an id of the images. Several lines of one image are several
    boxes. Edges are in pixels of the upright file, pixel i reaching from i to i + 1; or of a
    picture of width x height, where the line says so.

    Raises:
        InputError: what cannot be read, a box that is none, or no image that is known.
    """
    file = Path(path)
    by_file = _by_file(source)
    by_id = {item.id: position for position, item in enumerate(source.items)}
    found: dict[int, list[Box]] = {}
    unknown = ""
    for line, row in _rows(file):
        box = _box(file, line, row)
        full = os.path.abspath(os.path.join(file.parent, row["path"]))
        place = by_file.get(full, by_id.get(row["path"]))
        if place is None:
            unknown = unknown or row["path"]
        else:
            found.setdefault(place, []).append(box)
    shares = max((max(one.edges) for boxes in found.values() for one in boxes), default=2) <= 1
    if shares and not any(one.of for boxes in found.values() for one in boxes):
        raise InputError(
            f"{file}: no edge is beyond 1, so these look like shares of the picture; give pixels, "
            "or columns width and height, both 1"
        )
    if not found:
        asked = source.name(0) if len(source) else "none"
        raise InputError(
            f"{file}: no box belongs to one of the images: it names {unknown!r} and the images are "
            f"such as {asked}; give paths relative to the CSV, or the images' ids"
        )
    return BoxRegions(str(file), found, source)


def of_masks(folder: str | os.PathLike[str], source: ImageSource) -> MaskRegions:
    """Masks from a folder with the images' own relative names, whatever the ending.

    Raises:
        InputError: no folder, or no mask for any image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; give one with a mask for each image")
    stems = {
        str(file.relative_to(root).with_suffix("")): file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in EXTENSIONS
    }
    found = {}
    for position, item in enumerate(source.items):
        for name in (item.path, item.id):
            stem = os.path.splitext(name)[0]
            if stem in stems:
                found[position] = stems[stem]
                break
    for position, file in itertools.islice(found.items(), _LOOKED):
        if os.path.exists(source.name(position)) and os.path.samefile(source.name(position), file):
            raise InputError(
                f"{root}: {file} is the query itself; give a folder of masks, white on the object"
            )
        _mask(file, source.max_pixels)
    if not found:
        asked = os.path.splitext(source.items[0].path or source.items[0].id)[0]
        raise InputError(
            f"{root}: holds no mask for any of the images; name it like the image, such as "
            f"{root / asked}.png"
        )
    return MaskRegions(found, source.max_pixels)


def _mask(file: Path, max_pixels: int) -> Image.Image:
    """A mask in grey.

    Raises:
        InputError: a photograph.
    """
    picture = read_image(file, max_pixels=max_pixels).convert("RGB")
    small = np.asarray(picture.resize((64, 64), Image.Resampling.NEAREST), int)
    coloured = (small.max(2) - small.min(2) > _GREY).mean()
    colours = len(np.unique((small // 32).reshape(-1, 3), axis=0))
    if coloured > _COLOURED and colours > _COLOURS:
        raise InputError(
            f"{file}: is a photograph in many colours and no mask; give pictures in black, and "
            "white on the object"
        )
    return picture.convert("L")


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    if not file.exists():
        raise InputError(f"{file}: there is no such file of boxes")
    rows = list(csv_rows(file, NEEDED, "path,x0,y0,x1,y1[,label][,width,height]"))
    if not rows:
        raise InputError(f"{file}: has no lines below its header")
    return rows


def _box(file: Path, line: int, row: dict[str, str]) -> Box:
    numbers = {}
    for name in ("x0", "y0", "x1", "y1", "width", "height"):
        text = (row.get(name) or "").strip()
        if not text and name in ("width", "height"):
            continue
        try:
            numbers[name] = float(text)
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise InputError(f"{file}, line {line}: {name} is {text!r}; give a number of pixels")
    x0, y0, x1, y1 = (numbers[name] for name in ("x0", "y0", "x1", "y1"))
    if x0 >= x1 or y0 >= y1:
        raise InputError(
            f"{file}, line {line}: the box {x0:g}, {y0:g}, {x1:g}, {y1:g} is empty; give x0 < x1 "
            "and y0 < y1, edges and not a width and a height"
        )
    of = None
    if "width" in numbers and "height" in numbers:
        of = (numbers["width"], numbers["height"])
        if min(of) <= 0:
            raise InputError(f"{file}, line {line}: a picture of {of[0]:g} x {of[1]:g} pixels")
    return Box((x0, y0, x1, y1), (row.get("label") or "").strip() or None, line, of)


def _by_file(source: ImageSource) -> dict[str, int]:
    root = "" if source.root is None else str(source.root)
    return {
        os.path.abspath(os.path.join(root, item.path)): position
        for position, item in enumerate(source.items)
        if item.path
    }


def _on_grid(
    box: tuple[float, float, float, float], extent: Extent, grid: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box in pixels of the picture, in pixels of the map and cut to it."""
    x0, y0, x1, y1 = extent
    across, down = grid[1] / (x1 - x0), grid[0] / (y1 - y0)

    def cut(value: float, most: int) -> float:
        return min(max(value, 0.0), float(most))

    return (
        cut((box[0] - x0) * across, grid[1]),
        cut((box[1] - y0) * down, grid[0]),
        cut((box[2] - x0) * across, grid[1]),
        cut((box[3] - y0) * down, grid[0]),
    )


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _union(boxes: Sequence[tuple[float, float, float, float]], grid: tuple[int, int]) -> np.ndarray:
    """Covered part of each pixel; of boxes that cut the same pixel the larger part."""
    inside = np.zeros(grid)
    for box in boxes:
        np.maximum(inside, box_mask(box, grid), out=inside)
    return inside


def _seen(mask: Image.Image, extent: Extent, grid: tuple[int, int]) -> np.ndarray:
    """The mean of a mask over each pixel of the map, `[H W]`; beyond the picture there is none."""
    width, height = mask.size
    x0, y0, x1, y1 = extent
    left, top = max(0, math.ceil(-x0)), max(0, math.ceil(-y0))
    right, bottom = max(0, math.ceil(x1 - width)), max(0, math.ceil(y1 - height))
    if left or top or right or bottom:
        padded = Image.new("L", (width + left + right, height + top + bottom))
        padded.paste(mask, (left, top))
        mask = padded
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    # In floating point: a byte holds no half.
    small = mask.convert("F").resize((grid[1], grid[0]), Image.Resampling.BOX, box=box)
    return np.asarray(small, np.float64) / 255
