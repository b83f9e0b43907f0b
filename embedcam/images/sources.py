"""What images there are: a folder (by id, in code points) or a CSV (as written), with stable ids.

An id is the image's path below the folder, "/" between the parts, or what the CSV says.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np
from PIL import Image

from .._checks import one_of, whole
from .._files import refuse_device
from ..errors import ImageError, InputError, cut, short
from .number_labels import check_number
from .reading import (
    EXTENSIONS,
    MAX_PIXELS,
    FileState,
    ImageLike,
    file_mark,
    file_state,
    is_url,
    read_image,
    why_missing,
)
from .texts import LabelColumn, Texts, TextsWriter, first_twice, is_same

Labels = Literal["auto", "folders", "subfolders", "none", "numbers"]
_SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))
_OPTIONAL = ("id", "label", "width", "height")
_RUN = 1 << 14
"""Images listed at once."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its id, where it lies (relative to the source's root when below it), its label."""

    id: str
    path: str
    label: str | None = None


@dataclass(slots=True)
class LeftOut:
    """What lies in a folder beside its images, or was not wanted of a list; counted."""

    endings: dict[str, int] = field(default_factory=dict)  # of unknown kinds, most first
    hidden: int = 0  # names that begin with a dot
    empty: int = 0  # folders that hold no file
    excluded: dict[str, int] = field(default_factory=dict)  # what each pattern left out

    def excludes(self, *names: str) -> bool:
        """Count a pattern that fits one of the names; return whether one does."""
        for pattern in self.excluded:
            if any(fnmatchcase(name, pattern.rstrip("/")) for name in names):
                self.excluded[pattern] += 1
                return True
        return False

    def __str__(self) -> str:
        said = [f"{n:,} {ending or 'without an ending'}" for ending, n in self.endings.items()]
        if len(said) > 10:
            said[10:] = [f"{sum([*self.endings.values()][10:]):,} of {len(said) - 10} other kinds"]
        said += [f"{self.hidden:,} hidden"] if self.hidden else []
        said += [f"{self.empty:,} empty folder{'s' * (self.empty > 1)}"] if self.empty else []
        said += [f"{n:,} excluded by {cut(pattern, 80)}" for pattern, n in self.excluded.items()]
        return ", ".join(said)


class Listing(Sequence[Item]):
    """Images in a fixed order, held as columns: an `Item` is made when it is asked for."""

    def __init__(self, ids: Texts, paths: Texts, labels: LabelColumn) -> None:
        self.ids, self.paths, self.labels = ids, paths, labels

    @classmethod
    def of(cls, items: Iterable[Item]) -> Listing:
        """Keep images, read once and in order."""
        ids, paths, same, rest = TextsWriter(), TextsWriter(), True, iter(items)

        def labels() -> Iterator[str | None]:
            nonlocal same
            while run := list(islice(rest, _RUN)):
                ids.extend([one.id for one in run])
                paths.extend([one.path for one in run])
                same &= all(one.id == one.path for one in run)
                yield from (one.label for one in run)

        named = LabelColumn.of(labels())
        kept, own = Texts(*ids.columns()), Texts(*paths.columns())
        return cls(kept, kept if same else own, named)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, where: int) -> Item: ...

    @overload
    def __getitem__(self, where: slice) -> list[Item]: ...

    def __getitem__(self, where: int | slice) -> Item | list[Item]:
        if isinstance(where, slice):
            columns = self.ids[where], self.paths[where], self.labels[where]
            return [Item(*one) for one in zip(*columns, strict=True)]
        return Item(self.ids[where], self.paths[where], self.labels[where])

    def __iter__(self) -> Iterator[Item]:
        return map(Item, self.ids, self.paths, self.labels)

    def __eq__(self, other: object) -> bool:
        return is_same(self, other)

    def only(self, positions: Sequence[int] | np.ndarray) -> Listing:
        """Return the images at some places."""
        rows = np.asarray(positions, np.int64)
        ids = self.ids.select(rows)
        paths = ids if self.paths is self.ids else self.paths.select(rows)
        return Listing(ids, paths, self.labels.take(rows))


class ImageSource:
    """Images on disk, in a fixed order, with paths relative to `root`.

    `notes` says what looks like a mistake, a sentence each; `numbers` whether labels are numbers.
    """

    def __init__(
        self,
        items: Sequence[Item],
        root: Path | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        left_out: LeftOut | None = None,
        notes: Sequence[str] = (),
        numbers: bool = False,
    ) -> None:
        listed = items if isinstance(items, Listing) else Listing.of(items)
        self.items = listed
        self.root = root
        self.max_pixels = whole("max_pixels", max_pixels, 1)
        self.left_out, self.notes, self.numbers = left_out or LeftOut(), tuple(notes), numbers
        if (twice := first_twice(listed.ids)) is not None:
            raise InputError(
                f"images {twice[0]} and {twice[1]} have the same id "
                f"{short(listed.ids[twice[0]])}; ids must be unique"
            )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> Texts:
        """The ids, in order."""
        return self.items.ids

    @property
    def labels(self) -> LabelColumn:
        """The labels, in order; None where an image has none."""
        return self.items.labels

    def name(self, position: int) -> str:
        """Return what messages call an image: its path, or its id where it has no path."""
        item = self.items[position]
        if is_url(item.path):
            return cut(item.path, 200)
        return escaped(str(self._file(position))) if item.path else item.id

    def refused(self, position: int) -> str | None:
        """Return why an image is not read, where its path alone says so: its error's message."""
        path = self.items[position].path
        if is_url(path):
            return f"{self.name(position)}: {why_missing(path)}"
        if escaped(path) != path:
            return f"{self.name(position)}: the file name is not UTF-8; rename it"
        return None

    def open(self, position: int) -> Image.Image:
        """Return the picture, upright and RGB, or raise ImageError, beginning with its path."""
        if (reason := self.refused(position)) is not None:
            raise ImageError(reason)
        held = self._held(position)
        return read_image(held, max_pixels=self.max_pixels, name=self.name(position))

    def fingerprint(self, position: int) -> str:
        """Return what changes when the file does (size and time): for resuming a build."""
        try:
            status = os.stat(self._file(position))
        except (OSError, ValueError):
            return "unreadable"
        return f"{status.st_size}:{status.st_mtime_ns}"

    def mark(self, position: int) -> np.ndarray:
        """Return the file's mark, see `file_mark`; zeros for what is no file."""
        return file_mark(self._file(position) if self.items[position].path else "")

    def state(self, position: int, mark: np.ndarray) -> FileState | None:
        """Return whether the file is the one that was marked; see `file_state`."""
        return file_state(self._file(position), mark)

    def only(self, positions: Sequence[int]) -> ImageSource:
        """Return the images at some places, as a source of their own."""
        items, limit = self.items.only(positions), self.max_pixels
        return ImageSource(
            items, self.root, max_pixels=limit, left_out=self.left_out, numbers=self.numbers
        )

    def _held(self, position: int) -> ImageLike:
        return self._file(position)

    def _file(self, position: int) -> Path:
        path = Path(self.items[position].path)
        return path if self.root is None else self.root / path


def find_images(
    path: str | os.PathLike[str],
    labels: Labels = "auto",
    *,
    max_pixels: int = MAX_PIXELS,
    exclude: str | Sequence[str] = (),
) -> ImageSource:
    """List the images of a folder, or of a CSV with the columns path,label[,id].

    Images are told by the extension (see `EXTENSIONS`); hidden files and folders are left out. The
    source's `left_out` counts what was not taken, its `notes` say what looks like a mistake. Links
    are followed; a folder that is reached twice is read once.

    Parameters
    ----------
    path
        The folder, or the CSV file.
    labels
        "folders" takes the first folder below `path` as the label, "subfolders" the one below that;
        "none" gives no labels; "auto" takes folders where the images lie in some. For a CSV "auto"
        takes its label column, and "numbers" too, as numbers: near ones are alike.
    max_pixels
        More than this many pixels are refused before they are decoded.
    exclude
        Patterns (`*`, `?`, `[...]`) of what is left out: a path below the folder, or the name of a
        file or of a folder with all that is in it. Of a CSV, of its paths and ids.
    """
    one_of("labels", labels, get_args(Labels))
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise InputError(f"exclude: expected patterns such as '*.gif', given {short(exclude)}")
    root, left_out = Path(path), LeftOut(excluded=dict.fromkeys(patterns, 0))
    folder, notes, numbers = root, list[str](), labels == "numbers"
    if root.is_dir():
        if numbers:
            raise InputError(
                f'{root}: labels="numbers" takes the label column of a CSV, and this is a folder; '
                "give a CSV with the columns path,label"
            )
        paths = sorted(_walk(root, left_out))
        counts = sorted(left_out.endings.items(), key=lambda pair: (-pair[1], pair[0]))
        left_out.endings = dict(counts)
        items = _folder_items(root, paths, labels, left_out)
        notes = [*_of_lists(root), *_of_parts(root, items)]
    elif root.suffix.lower() == ".csv" and root.is_file():
        if labels in ("folders", "subfolders"):
            raise InputError(
                f'{root}: a CSV has a label column; take labels="auto", "numbers" or "none"'
            )
        items, folder = list(_csv_items(root, labels, left_out)), root.parent
    else:
        problem = "is no folder and no .csv file" if root.exists() else why_missing(str(path))
        raise InputError(f"{root}: {problem}; give a folder of images or a .csv file")
    return ImageSource(
        items, folder, max_pixels=max_pixels, left_out=left_out, notes=notes, numbers=numbers
    )


def escaped(text: str) -> str:
    r"""Return text that can be stored: bytes of a file name that are no UTF-8 as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _folder_items(root: Path, paths: list[str], labels: Labels, left_out: LeftOut) -> list[Item]:
    if not paths:
        there = f"; it holds {left_out}" if str(left_out) else ""
        raise InputError(f"{root}: contains no images ({', '.join(sorted(EXTENSIONS))}){there}")
    flat = [name for name in paths if "/" not in name]
    if labels == "auto":
        labels = "none" if len(flat) == len(paths) else "folders"
    depth = {"none": 0, "folders": 1, "subfolders": 2}[labels]
    shallow = [name for name in paths if name.count("/") < depth]
    if shallow and len(shallow) == len(paths):
        what = "subfolder" if depth == 1 else "folder in its subfolders"
        raise InputError(f'{root}: has no {what} to take labels from; take labels="none"')
    if shallow:
        raise InputError(
            f"{root}: {len(shallow)} images such as {short(escaped(shallow[0]))} lie beside the "
            'class folders; move them into one, or take labels="none"'
        )
    names = map(escaped, paths)
    return [
        Item(name, path, name.split("/")[depth - 1] if depth else None)
        for name, path in zip(names, paths, strict=True)
    ]


def _of_lists(root: Path) -> list[str]:
    """Return notes on CSVs in the folder that list pictures and labels."""
    notes = []
    for file in sorted(file for file in root.glob("*.csv") if file.is_file())[:3]:
        with suppress(OSError, UnicodeDecodeError), file.open(encoding="utf-8-sig") as lines:
            columns = [name.strip() for name in lines.readline(4096).split(",")]
            if {"path", "label"} <= set(columns):
                notes.append(f"{file} lists pictures with labels; give it in place of the folder")
    return notes


def _of_parts(root: Path, items: Sequence[Item]) -> list[str]:
    """Say that labels look like the parts a data set is divided into for training."""
    folders = {item.label for item in items if item.label == item.id.partition("/")[0]}
    splits = sorted(label for label in folders if label and label.lower() in _SPLITS)
    if not splits or (len(splits) == 1 and len(folders) > 1):  # a train may be a class
        return []
    looks = f"labels that look like parts of a data set: {' and '.join(splits)}"
    paths = [item.id.split("/") for item in items]
    below = sorted({parts[1] for parts in paths if len(parts) > 2 and parts[0] in splits})
    if not below:
        return [f'{looks}; labels="none" leaves them out']
    some = ", ".join([cut(name, 80) for name in below[:3]] + ["..."] * (len(below) > 3))
    most = next((name for name in splits if name.lower().startswith("train")), splits[0])
    return [
        f'{looks}; for the labels below ({some}) give {root / most}, or take labels="subfolders"'
    ]


def _walk(root: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the paths of images below `root`, "/" between the parts; count what is left out."""
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
            hint = "; exclude= leaves it out" if below else ""
            raise InputError(
                f"{escaped(str(root / below))}: may not be read (permission denied){hint}"
            ) from None
        left_out.empty += not entries
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                left_out.hidden += 1
            elif left_out.excludes(name, entry.name):
                continue
            elif _is_folder(entry):
                (links if entry.is_symlink() else ahead).append(name)
            elif (ending := os.path.splitext(entry.name)[1].lower()) in EXTENSIONS:
                yield name
            else:
                kind = escaped(cut(ending, 20))
                left_out.endings[kind] = left_out.endings.get(kind, 0) + 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _csv_items(path: Path, labels: Labels, left_out: LeftOut) -> Iterator[Item]:
    lines: dict[str, int] = {}
    wanted = ["path"] if labels == "none" else ["path", "label"]
    for line, row in csv_rows(path, wanted, "path,label[,id]"):
        where = row["path"]
        if not where or not row.get("id", where):
            empty = "id is empty; leave out the column or fill it" if where else "path is empty"
            raise InputError(f"{path}, line {line}: the {empty}")
        where = where if is_url(where) else relative_path(where, path.parent)
        id = row.get("id", where)
        other = lines.setdefault(id, line)
        if other != line:
            hint = "" if "id" in row else ", so add a column id or remove one of the lines"
            raise InputError(
                f"{path}: lines {other} and {line} have the same id {short(id)}; ids must be "
                f"unique{hint}"
            )
        parts = where.split("/")
        above = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        if left_out.excludes(id, *parts, *above):
            continue
        if labels == "numbers" and row["label"]:
            check_number(row["label"], f"{path}, line {line}")
        yield Item(id, where, None if labels == "none" else row["label"] or None)
    if not lines:
        raise InputError(f"{path}: has no lines below its header")


def csv_rows(
    path: Path, wanted: Sequence[str], expected: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a CSV that has the columns `wanted`, else raise InputError.

    It is UTF-8 with commas, semicolons or tabs; `expected` is its header, for messages.
    """
    refuse_device(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            header = stream.readline()
            stream.seek(0)
            divider = max(",;\t", key=lambda one: _columns(header, one, wanted))
            reader = csv.reader(stream, strict=True, delimiter=divider, skipinitialspace=True)
            columns = list(map(str.strip, next(reader, [])))
            known = (*wanted, *_OPTIONAL)
            columns = [name.lower() if name.lower() in known else name for name in columns]
            found = cut(",".join(columns), 80) or "an empty file"
            if missing := [column for column in wanted if column not in columns]:
                raise InputError(
                    f"{path}: the header lacks {' and '.join(missing)}; expected {expected}, found "
                    f"{found}"
                )
            named = [*filter(None, columns)]  # a spreadsheet may leave several without a name
            if len(set(named)) != len(named):
                raise InputError(f"{path}: the header names a column twice: {found}")
            for row in reader:
                if not any(map(str.strip, row)):
                    continue
                if len(row) != len(columns):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of "
                        f"{len(columns)}; put text that holds commas in double quotes"
                    )
                yield reader.line_num, dict(zip(columns, map(str.strip, row), strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: is not a CSV ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _columns(header: str, divider: str, wanted: Sequence[str]) -> int:
    names = [name.strip(' "').lower() for name in re.split(f"[{divider}\r\n]", header)]
    return sum(name in names for name in wanted)


def relative_path(path: str, root: Path) -> str:
    """Return a path relative to `root` where it lies below it, else absolute; "/" between parts."""
    base = os.path.join(os.path.abspath(root), "")
    return Path(os.path.normpath(os.path.join(base, path)).removeprefix(base)).as_posix()
