#!/usr/bin/env python
"""Turn the official downloads of CUB-200-2011 and Caltech-101 into one plain layout.

    OUT/annotations.csv      path,label,x0,y0,x1,y1,width,height and split (birds) or mask (objects)
    OUT/images/CLASS/*.jpg   longest side at most 320 pixels, never enlarged
    OUT/masks/CLASS/*.png    objects only: white = object

Boxes are in pixels of the written images, clipped to them. Both archives are unpacked as they
come; nothing is downloaded. A second run writes only what is missing or was made otherwise.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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


class Source(NamedTuple):
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
    images, boxes, numbers, splits, classes = (
        _table(root / f"{name}.txt")
        for name in (
            "images", "bounding_boxes", "image_class_labels", "train_test_split", "classes",
        )
    )  # fmt: skip
    chosen = choose([row[0] for row in classes.values()], wanted)
    for image, (path, *_) in images.items():
        try:
            label = classes[numbers[image][0]][0]
            x, y, width, height = map(float, boxes[image])
            split = {"1": "train", "0": "test"}[splits[image][0]]
        except (KeyError, ValueError) as error:
            raise PrepareError(
                f"{root}: the tables disagree about image {image} ({error}); unpack it again"
            ) from error
        if label in chosen:
            box, name = (x, y, x + width, y + height), str(Path(path).with_suffix(""))
            yield Source(root / "images" / path, name, label, box, split=split)


def read_objects(root: Path, wanted: Sequence[str]) -> Iterator[Source]:
    """The annotated pictures of Caltech-101, class by class."""
    root = _inside(root, "101_ObjectCategories", "caltech-101")
    images, annotations = root / "101_ObjectCategories", root / "Annotations"
    # The background has no object, hence no annotation.
    folders = {path.name for path in images.iterdir() if path.is_dir()} - {"BACKGROUND_Google"}
    for label in sorted(choose(sorted(folders), wanted)):
        folder = annotations / ANNOTATION_FOLDERS.get(label, label)
        folder = folder if folder.is_dir() else annotations / label
        for path in sorted((images / label).glob("*.jpg")):
            box, contour = read_annotation(
                folder / f"{path.stem.replace('image', 'annotation')}.mat"
            )
            yield Source(path, f"{label}/{path.stem}", label, box, contour)


def read_annotation(path: Path) -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Box and outline `[n 2]` of a Caltech-101 annotation, in pixels of the picture."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise PrepareError(f"{path}: no such annotation; unpack Annotations.tar there again")
    try:
        content = loadmat(path, variable_names=("box_coord", "obj_contour"))
        top, bottom, left, right = map(float, np.ravel(content["box_coord"]))
        across, down = np.asarray(content["obj_contour"], np.float64)
        if not (np.isfinite([across, down]).all() and right >= left and bottom >= top):
            raise ValueError("a box or outline that is none")
    except (OSError, KeyError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise PrepareError(f"{path}: not an annotation of Caltech-101 ({error})") from error
    return (left - 1, top - 1, right, bottom), np.stack([across + left - 1, down + top - 1], axis=1)


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


def prepare(sources: Sequence[Source], out: Path, max_side: int, progress: bool = True) -> int:
    """Write pictures, masks and, last, the table; finished pictures of the same size are kept.

    Returns how many were written.
    """
    if not sources:
        raise PrepareError("no picture was found; check the folder and the classes")
    settings = json.dumps({"max_side": max_side, "jpeg_quality": JPEG_QUALITY}).encode()
    marks = out / SETTINGS
    keep = marks.is_file() and marks.read_bytes() == settings
    _write(marks, settings)
    rows, written = [], 0
    for source in tqdm(sources, unit="image", disable=None if progress else True):
        row, fresh = _prepare_one(source, out, max_side, keep)
        rows.append(row)
        written += fresh
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    _write(out / "annotations.csv", table.getvalue().encode())
    return written


def _prepare_one(
    source: Source, out: Path, max_side: int, keep: bool
) -> tuple[dict[str, object], bool]:
    picture, mask = f"images/{source.name}.jpg", f"masks/{source.name}.png"
    try:
        with Image.open(source.path) as opened:
            original = opened.size
            size = fitted(original, max_side)
            fresh = not (keep and _has_size(out / picture, size))
            if fresh:
                image = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
                image = image if size == original else image.resize(size, Image.Resampling.LANCZOS)
                _write(out / picture, _encoded(image, "JPEG", quality=JPEG_QUALITY))
    except (OSError, Image.DecompressionBombError) as error:
        raise PrepareError(f"{source.path}: cannot be read as an image ({error})") from error
    scale = np.array(size) / original
    box = np.clip(np.reshape(source.box, (2, 2)) * scale, 0, size).round(1).ravel().tolist()
    row: dict[str, object] = {"path": picture, "label": source.label}
    row |= zip(("x0", "y0", "x1", "y1", "width", "height"), (*box, *size), strict=True)
    if source.contour is not None:
        row["mask"] = mask
        if fresh or not _has_size(out / mask, size):
            fresh, drawn = True, Image.new("L", size)
            # Scaled from the picture's edge, which lies half a pixel before the first's middle.
            corners = (source.contour + 0.5) * scale - 0.5
            ImageDraw.Draw(drawn).polygon([tuple(one) for one in corners.tolist()], fill=255)
            _write(out / mask, _encoded(drawn, "PNG", optimize=True))
    if source.split:
        row["split"] = source.split
    return row, fresh


def fitted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) with the longest side at most `max_side`; 0 leaves the size as it is."""
    longest = max(size)
    if not max_side or longest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longest)) for side in size)
    return width, height


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _has_size(path: Path, size: tuple[int, int]) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == size
    except OSError:
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
        return {first: others for first, *others in (line.split() for line in lines)}
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path}: cannot be read; unpack the archive again") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument(
        "kind", choices=("birds", "objects"), help="birds: CUB-200-2011; objects: Caltech-101"
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
    read = read_birds if options.kind == "birds" else read_objects
    try:
        sources = list(read(options.download, [name for name in options.classes if name]))
        written = prepare(sources, options.out, options.max_side, progress=not options.quiet)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    labels = {source.label for source in sources}
    print(
        f"{options.out / 'annotations.csv'}: {len(sources)} images of {len(labels)} classes "
        f"({written} written, {len(sources) - written} kept)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
