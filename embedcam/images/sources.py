"""What images there are: a folder or a CSV as a list of items with stable ids.

An id is a string that names one image for as long as the collection lives: its path below the
folder, with "/" between the parts, or what the CSV says. A folder is ordered by id (code points),
a CSV as it is written, so that arrays made beside it stay aligned.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from embedcam.errors import InputError
from embedcam.images.reading import EXTENSIONS, MAX_PIXELS, read_image
from embedcam.writing import refuse_device

Labels = Literal["auto", "folders", "none"]


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its id, where it lies (relative to the source's root when below it), its label."""

    id: str
    path: str
    label: str | None = None


class ImageSource:
    """Images on disk, in a fixed order."""

    def __init__(
        self, items: Sequence[Item], root: Path | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.items: Sequence[Item] = tuple(items)
        self.root = root
        self.max_pixels = max_pixels
        first: dict[str, int] = {}
        for position, item in enumerate(self.items):
            other = first.setdefault(item.id, position)
            if other != position:
                raise InputError(
                    f"images {other} and {position} have the same id {item.id!r}; "
                    "ids must be unique"
                )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> list[str]:
        """The ids, in order."""
        return [item.id for item in self.items]

    @property
    def labels(self) -> list[str | None]:
        """The labels, in order; None where an image has none."""
        return [item.label for item in self.items]

    def name(self, position: int) -> str:
        """What messages call an image: its path, or its id where it has no path."""
        item = self.items[position]
        return str(self._file(position)) if item.path else item.id

    def open(self, position: int) -> Image.Image:
        """The picture, upright and RGB; raises ImageError, which begins with its path."""
        return read_image(
            self._file(position), max_pixels=self.max_pixels, name=self.name(position)
        )

    def fingerprint(self, position: int) -> str:
        """Changes when the file does (size and time of change): for resuming a build."""
        try:
            status = os.stat(self._file(position))
        except (OSError, ValueError):
            return "unreadable"
        return f"{status.st_size}:{status.st_mtime_ns}"

    def _file(self, position: int) -> Path:
        path = Path(self.items[position].path)
        return path if self.root is None else self.root / path


def find_images(
    path: str | os.PathLike[str], labels: Labels = "auto", *, max_pixels: int = MAX_PIXELS
) -> ImageSource:
    """The images of a folder, or of a CSV with the columns path,label[,id].

    labels: "folders" takes the first folder below `path` as the label; "none" gives no labels;
        "auto" does the one where the images lie in subfolders and the other where they lie flat.
        For a CSV "auto" takes its label column.

    Images are told by the extension (see `EXTENSIONS`); hidden files and folders are left out.
    Links are followed; a folder that is reached twice is read once, under its own name if it has
    one.
    A file that turns out to be no image is reported when it is read.
    """
    if labels not in ("auto", "folders", "none"):
        raise InputError(f'labels: expected "auto", "folders" or "none", given {labels!r}')
    root = Path(path)
    if root.is_dir():
        items = _folder_items(root, labels)
    elif root.suffix.lower() == ".csv" and root.is_file():
        if labels == "folders":
            raise InputError(f'{root}: a CSV has a label column; take labels="auto" or "none"')
        items = list(_csv_items(root, labels))
        root = root.parent
    elif root.exists():
        raise InputError(f"{root}: expected a folder of images or a .csv file")
    else:
        raise InputError(f"{root}: does not exist; give a folder of images or a .csv file")
    return ImageSource(items, root, max_pixels=max_pixels)


def _folder_items(root: Path, labels: Labels) -> list[Item]:
    found = sorted(_walk(root))
    if not found:
        raise InputError(f"{root}: contains no images ({', '.join(sorted(EXTENSIONS))})")
    for name in found:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{root}: the file name {name!r} is not UTF-8; rename it") from None
    flat = [name for name in found if "/" not in name]
    if labels == "auto":
        labels = "none" if len(flat) == len(found) else "folders"
    if labels == "folders" and flat:
        if len(flat) == len(found):
            raise InputError(f'{root}: has no subfolder to take labels from; take labels="none"')
        raise InputError(
            f"{root}: {len(flat)} images such as {flat[0]!r} lie beside the class folders; move "
            'them into one, or take labels="none"'
        )
    return [
        Item(name, name, name.partition("/")[0] if labels == "folders" else None) for name in found
    ]


def _walk(root: Path) -> Iterator[str]:
    """Paths below `root`, "/" between the parts, of the files with an image's extension."""
    seen: set[tuple[int, int]] = set()
    # Links last: a folder is read under its own name, and a loop of links ends.
    ahead, links = [""], list[str]()
    while ahead or links:
        if not ahead:
            links.sort(reverse=True)
            ahead.append(links.pop())
        below = ahead.pop()
        status = os.stat(root / below)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = list(os.scandir(root / below))
        except PermissionError:
            raise InputError(f"{root / below}: may not be read (permission denied)") from None
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else ahead).append(name)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _csv_items(path: Path, labels: Labels) -> Iterator[Item]:
    lines: dict[str, int] = {}
    wanted = ["path"] if labels == "none" else ["path", "label"]
    for line, row in _csv_rows(path, wanted):
        if not row["path"]:
            raise InputError(f"{path}, line {line}: the path is empty")
        where = relative_path(row["path"], path.parent)
        own = row.get("id", where)
        if not own:
            raise InputError(
                f"{path}, line {line}: the id is empty; leave out the column or fill it"
            )
        other = lines.setdefault(own, line)
        if other != line:
            raise InputError(
                f"{path}: lines {other} and {line} have the same id {own!r}; ids must be unique"
                + ("" if "id" in row else ", so add a column id or remove one of the lines")
            )
        label = None if labels == "none" else row["label"].strip() or None
        yield Item(own, where, label)
    if not lines:
        raise InputError(f"{path}: has no lines below its header")


def _csv_rows(path: Path, wanted: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV that has the wanted columns."""
    refuse_device(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            header = [column.strip() for column in next(reader, [])]
            missing = [column for column in wanted if column not in header]
            if missing:
                raise InputError(
                    f"{path}: the header lacks {' and '.join(missing)}; expected path,label[,id], "
                    f"found {','.join(header) or 'an empty file'}"
                )
            if len(set(header)) != len(header):
                raise InputError(f"{path}: the header names a column twice: {','.join(header)}")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of "
                        f"{len(header)}; put text that holds commas in double quotes"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: is not a CSV ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def relative_path(given: str, root: Path) -> str:
    """A CSV's path relative to `root` if it lies below it, else absolute; "/" between the parts."""
    base = os.path.abspath(root)
    absolute = os.path.normpath(os.path.join(base, given))
    below = os.path.join(base, "")
    return Path(absolute.removeprefix(below)).as_posix()
