#!/usr/bin/env python
"""Turn the official downloads of CUB-200-2011 and Caltech-101 into one plain layout.

    OUT/annotations.csv      path,label,x0,y0,x1,y1,width,height and split (birds) or mask (objects)
    OUT/images/CLASS/*.jpg   longest side at most 320 pixels, never enlarged
    OUT/masks/CLASS/*.png    objects only: white = object

Boxes are in pixels of the written images, clipped to them. Both archives are unpacked as they
come; nothing is downloaded. A second run writes only what is missing or was made otherwise.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

EXAMPLES = """\
examples:
  %(prog)s birds CUB_200_2011 data/birds20 --classes 001-020
  %(prog)s birds CUB_200_2011 data/birds --max-side 0            (all classes, full size)
  %(prog)s objects caltech-101 data/objects --classes panda ant crab
  %(prog)s objects caltech-101 data/objects24 --classes @classes.txt

Classes are named as their folders are; birds also by number (001) or range of numbers (001-020).
@FILE reads names from a text file, one a line.
"""
#: Folders of Caltech-101 whose annotations have another name.
ANNOTATION_FOLDERS = {
    "Faces": "Faces_2",
    "Faces_easy": "Faces_3",
    "Motorbikes": "Motorbikes_16",
    "airplanes": "Airplanes_Side_2",
}
JPEG_QUALITY = 90
SETTINGS = "prepare.json"


class PrepareError(Exception):
    """What is wrong with the download or the request, in one sentence."""


@dataclass(frozen=True)
class Source:
    """One picture of a download."""

    path: Path
    name: str
    label: str
    box: tuple[float, float, float, float]
    contour: np.ndarray | None = None
    split: str = ""


def read_birds(root: Path, wanted: Sequence[str]) -> Iterator[Source]:
    """The pictures of CUB-200-2011, in the order of images.txt."""
    root = _inside(root, "images.txt", "CUB_200_2011")
    names, boxes, numbers, splits, classes = (
        _table(root / f"{name}.txt")
        for name in (
            "images", "bounding_boxes", "image_class_labels", "train_test_split", "classes",
        )
    )  # fmt: skip
    chosen = choose([row[0] for row in classes.values()], wanted)
    for image, (path, *_) in names.items():
        try:
            label = classes[numbers[image][0]][0]
            x, y, width, height = (float(value) for value in boxes[image])
            split = {"1": "train", "0": "test"}[splits[image][0]]
        except (KeyError, ValueError) as error:
            raise PrepareError(
                f"{root}: the tables disagree about image {image} ({error}); unpack the archive "
                "again"
            ) from error
        if label in chosen:
            yield Source(
                path=root / "images" / path,
                name=str(Path(path).with_suffix("")),
                label=label,
                box=(x, y, x + width, y + height),
                split=split,
            )


def read_objects(root: Path, wanted: Sequence[str]) -> Iterator[Source]:
    """The annotated pictures of Caltech-101, class by class."""
    root = _inside(root, "101_ObjectCategories", "caltech-101")
    images, annotations = root / "101_ObjectCategories", root / "Annotations"
    if not annotations.is_dir():
        raise PrepareError(f"{root}: no folder Annotations; unpack Annotations.tar there too")
    folders = sorted(p.name for p in images.iterdir() if p.is_dir())
    # The background has no object, hence no annotation.
    folders = [name for name in folders if name != "BACKGROUND_Google"]
    for label in sorted(choose(folders, wanted)):
        folder = annotations / ANNOTATION_FOLDERS.get(label, label)
        if not folder.is_dir():
            folder = annotations / label
        for path in sorted((images / label).glob("*.jpg")):
            mat = folder / f"{path.stem.replace('image', 'annotation')}.mat"
            box, contour = read_annotation(mat)
            yield Source(path, f"{label}/{path.stem}", label, box, contour)


def read_annotation(path: Path) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Box and outline `[n 2]` of a Caltech-101 annotation, in pixels of the picture."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise PrepareError(f"{path}: no such annotation; unpack Annotations.tar again")
    try:
        content = loadmat(path, variable_names=("box_coord", "obj_contour"))
        top, bottom, left, right = (float(v) for v in np.ravel(content["box_coord"]))
        contour = np.asarray(content["obj_contour"], np.float64)
        if contour.ndim != 2 or contour.shape[0] != 2 or contour.shape[1] < 3:
            raise ValueError(f"an outline of shape {list(contour.shape)}, expected [2 n]")
        if not (np.isfinite(contour).all() and right >= left and bottom >= top):
            raise ValueError("a box or outline that is none")
    except (OSError, KeyError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise PrepareError(f"{path}: not an annotation of Caltech-101 ({error})") from error
    return (left - 1, top - 1, right, bottom), contour.T + np.array([left - 1, top - 1])


def choose(known: Sequence[str], wanted: Sequence[str]) -> set[str]:
    """The known classes that are wanted; all, if none is named."""
    if not wanted:
        return set(known)
    by_number = {name.split(".")[0]: name for name in known if name.split(".")[0].isdigit()}
    chosen: set[str] = set()
    for name in wanted:
        first, dash, last = name.partition("-")
        if name in known:
            chosen.add(name)
        elif name in by_number:
            chosen.add(by_number[name])
        elif dash and first in by_number and last in by_number:
            chosen |= {full for number, full in by_number.items() if first <= number <= last}
        else:
            near = ", ".join(sorted(known)[:5])
            raise PrepareError(f"no class {name!r}; the download has {near} ... ({len(known)})")
    return chosen


def prepare(
    sources: Sequence[Source], out: Path, max_side: int, progress: bool = True
) -> dict[str, int]:
    """Write pictures, masks and, last, the table; finished pictures of the same size are kept."""
    if not sources:
        raise PrepareError("no picture was found; check the folder and the classes")
    settings = {"max_side": max_side, "jpeg_quality": JPEG_QUALITY}
    keep = _same_settings(out / SETTINGS, settings)
    _write(out / SETTINGS, json.dumps(settings).encode())
    rows, counts = [], {"written": 0, "kept": 0}
    for source in tqdm(sources, unit="image", disable=None if progress else True):
        row, fresh = _prepare_one(source, out, max_side, keep)
        rows.append(row)
        counts["written" if fresh else "kept"] += 1
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    _write(out / "annotations.csv", table.getvalue().encode())
    return counts


def _prepare_one(
    source: Source, out: Path, max_side: int, keep: bool
) -> tuple[dict[str, object], bool]:
    picture = out / "images" / f"{source.name}.jpg"
    mask = out / "masks" / f"{source.name}.png"
    try:
        with Image.open(source.path) as opened:
            original = opened.size
            size = fitted(original, max_side)
            fresh = not (keep and _has_size(picture, size))
            if fresh:
                image = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
                _write(picture, _jpeg(image, size))
    except (OSError, Image.DecompressionBombError) as error:
        raise PrepareError(f"{source.path}: cannot be read as an image ({error})") from error
    if source.contour is not None and not (keep and not fresh and _has_size(mask, size)):
        _write(mask, _mask(source.contour, original, size))
        fresh = True
    row: dict[str, object] = {"path": f"images/{source.name}.jpg", "label": source.label}
    row |= zip(("x0", "y0", "x1", "y1"), scaled(source.box, original, size), strict=True)
    row |= {"width": size[0], "height": size[1]}
    row |= {"mask": f"masks/{source.name}.png"} if source.contour is not None else {}
    row |= {"split": source.split} if source.split else {}
    return row, fresh


def fitted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) with the longest side at most `max_side`; 0 leaves the size as it is."""
    longest = max(size)
    if not max_side or longest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longest)) for side in size)
    return width, height


def scaled(
    box: Sequence[float], original: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The box in pixels of the resized picture, clipped to it, to a tenth of a pixel."""
    across, down = size[0] / original[0], size[1] / original[1]
    x0, x1 = (min(max(x * across, 0), size[0]) for x in (box[0], box[2]))
    y0, y1 = (min(max(y * down, 0), size[1]) for y in (box[1], box[3]))
    return round(x0, 1), round(y0, 1), round(x1, 1), round(y1, 1)


def _jpeg(image: Image.Image, size: tuple[int, int]) -> bytes:
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _mask(contour: np.ndarray, original: tuple[int, int], size: tuple[int, int]) -> bytes:
    scale = np.array([size[0] / original[0], size[1] / original[1]])
    # Scaled from the picture's edge, which lies half a pixel before the first pixel's middle.
    corners = (contour + 0.5) * scale - 0.5
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    file = io.BytesIO()
    mask.save(file, "PNG", optimize=True)
    return file.getvalue()


def _has_size(path: Path, size: tuple[int, int]) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == size
    except OSError:
        return False


def _same_settings(path: Path, settings: Mapping[str, object]) -> bool:
    try:
        return bool(json.loads(path.read_text()) == settings)
    except (OSError, ValueError):
        return False


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _inside(root: Path, content: str, usual: str) -> Path:
    for folder in (root, root / usual):
        if (folder / content).exists():
            return folder
    raise PrepareError(f"{root}: no {content} in it; give the folder of the unpacked archive")


def _table(path: Path) -> dict[str, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"{path}: cannot be read; unpack the archive again") from error
    rows = [line.split() for line in lines if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise PrepareError(f"{path}: a line with a single word; unpack the archive again")
    return {first: others for first, *others in rows}


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Source]]] = {
    "birds": read_birds,
    "objects": read_objects,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kind", choices=sorted(READERS), help="birds: CUB-200-2011; objects: Caltech-101"
    )
    parser.add_argument("download", type=Path, help="folder of the unpacked archive")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="default: all")
    parser.add_argument(
        "--max-side", type=int, default=320, metavar="PIXELS", help="default 320; 0: as it is"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.max_side < 0:
        parser.error("--max-side takes 0 or a number of pixels")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        classes = [name for given in options.classes for name in _names(given)]
        sources = list(READERS[options.kind](options.download, classes))
        counts = prepare(sources, options.out, options.max_side, progress=not options.quiet)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.out / 'annotations.csv'}: {len(sources)} images of "
        f"{len({source.label for source in sources})} classes "
        f"({counts['written']} written, {counts['kept']} kept)"
    )
    return 0


def _names(given: str) -> list[str]:
    if not given.startswith("@"):
        return [given]
    try:
        lines = Path(given[1:]).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PrepareError(f"{given[1:]}: cannot be read ({error.strerror})") from error
    return [line.strip() for line in lines if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
