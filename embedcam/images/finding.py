"""Finding images: a folder, a CSV, tar shards or tables, on this machine or at an address."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from glob import glob
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple, get_args

from .._checks import one_of
from ..errors import InputError, cut, short
from .lists import csv_items
from .number_labels import check_number
from .places import (
    Root,
    as_root,
    escaped,
    inside,
    located,
    member_path,
    relative_path,
    row_path,
)
from .reading import EXTENSIONS, MAX_PIXELS, is_url, why_missing
from .sources import ImageSource, Item, Labels, LeftOut, Listing
from .tables import ENDINGS as TABLES
from .texts import LabelColumn, Texts, TextsWriter

_SPLITS: Final = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev")
)
_TAR: Final = (".tar",)
_PATTERN: Final = re.compile(r"[*?\[{]")
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS: Final = 1 << 17


class _Entry(NamedTuple):
    """What lies in a folder; of a folder the name ends with a slash."""

    name: str
    stamp: str
    is_link: bool = False


def find_images(
    path: str | os.PathLike[str],
    labels: Labels = "auto",
    *,
    max_pixels: int = MAX_PIXELS,
    exclude: str | Sequence[str] = (),
) -> ImageSource:
    """List the images of a folder, a CSV, tar shards or tables, here or at an address.

    Images are told by the extension (see `EXTENSIONS`); hidden files and folders are left out. The
    source's `left_out` counts what was not taken, its `notes` say what looks like a mistake. Links
    are followed; a folder that is reached twice is read once. A folder without images may hold
    shards (.tar), or tables (.parquet, .arrow, .feather, .lance).

    Parameters
    ----------
    path
        The folder; a CSV with the columns path,label[,id]; a .tar or a table, or several as
        `shards/{000..123}.tar` or `data/*.parquet`. Or an address, such as `s3://bucket/photos`.
    labels
        "folders" takes the first folder below `path` as the label, "subfolders" the one below that;
        "none" gives no labels; "auto" takes folders where the images lie in some. For a CSV or a
        table "auto" takes its label column, for shards .cls or the label in .json where there is
        one; and "numbers" too, as numbers: near ones are alike.
    max_pixels
        More than this many pixels are refused before they are decoded.
    exclude
        Patterns (`*`, `?`, `[...]`) of what is left out: a path below the folder, or the name of a
        file or of a folder with all that is in it. Of a CSV, of its paths and ids; of shards and
        tables, of ids.
    """
    one_of("labels", labels, get_args(Labels))
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise InputError(f"exclude: expected patterns such as '*.gif', given {short(exclude)}")
    text, left_out = os.fspath(path), LeftOut(excluded=dict.fromkeys(patterns, 0))
    text = text.rstrip("/") or text
    shown = text if is_url(text) else str(Path(text))
    ending = os.path.splitext(text)[1].lower()
    kind = _kind_of(text)
    if kind == "file" and ending == ".csv":
        found = _of_csv(text, labels, left_out)
    elif (kind == "file" and ending in (*_TAR, *TABLES)) or (kind and ending == ".lance"):
        folder, _, name = text.rpartition("/")
        root = as_root(folder) if is_url(text) else Path(text).parent
        found = _of_shards(root, [(name, "")], labels, left_out)
    elif kind == "folder":
        found = _of_folder(as_root(text), labels, left_out)
    elif kind is None and _is_pattern(text):
        root, names = _expanded(text)
        found = _of_shards(root, [(name, "") for name in names], labels, left_out)
    elif kind == "file" and re.search(r"\.(tgz|tar\.\w+)$", text, re.IGNORECASE):
        raise InputError(f"{shown}: is compressed, so no member is read alone; unpack it to .tar")
    else:
        problem = "is no folder and no .csv file" if kind else why_missing(text)
        if kind is None and is_url(text):
            problem = "does not exist"
        kinds = ".csv, .tar, .parquet, .arrow or .lance"
        raise InputError(f"{shown}: {problem}; give a folder of images, or a file: {kinds}")
    listing, root, stamps, notes = found
    return ImageSource(
        listing,
        root,
        max_pixels=max_pixels,
        left_out=left_out,
        notes=notes,
        numbers=labels == "numbers",
        stamps=stamps,
    )


_Found = tuple[Listing, Root, "Texts | LabelColumn | None", list[str]]


def is_collection(path: str) -> bool:
    """Return whether a path names many images, not one: by what lies there, and by its ending."""
    if os.path.isdir(path):
        return True
    if os.path.exists(path) or is_url(path) or _is_pattern(path):
        ending = os.path.splitext(path)[1].lower()
        return ending in (".csv", *_TAR, *TABLES) or (is_url(path) and ending not in EXTENSIONS)
    return False


def _is_pattern(path: str) -> bool:
    # Of a web server's address "?" begins what is asked of it.
    return _PATTERN.search(path.replace("?", "") if path.startswith("http") else path) is not None


def _kind_of(path: str) -> str | None:
    if is_url(path):
        from .remote import kind_of

        return None if _is_pattern(path) else kind_of(path.rstrip("/"))
    with suppress(ValueError):  # what is no path at all
        if os.path.isdir(path):
            return "folder"
        return "file" if os.path.exists(path) else None
    return None


# A folder, and what is in it.


def _of_folder(root: Root, labels: Labels, left_out: LeftOut) -> _Found:
    paths, stamps = _walked(root, EXTENSIONS, left_out)
    if not len(paths):
        for endings in (_TAR, TABLES):
            if any(ending in left_out.endings for ending in endings):
                other = LeftOut(excluded=dict.fromkeys(left_out.excluded, 0))
                names, told = _walked(root, endings, other)
                shards = list(zip(names, told or [""] * len(names), strict=True))
                for ending in endings:  # taken, after all
                    left_out.endings.pop(ending, None)
                return _of_shards(root, shards, labels, left_out)
        there = f"; it holds {left_out}" if str(left_out) else ""
        raise InputError(f"{root}: contains no images ({', '.join(sorted(EXTENSIONS))}){there}")
    if labels == "numbers":
        raise InputError(
            f'{root}: labels="numbers" takes the label column of a CSV, and this is a folder; '
            "give a CSV with the columns path,label"
        )
    is_text = all(name.isascii() or escaped(name) == name for name in paths)
    ids = paths if is_text else Texts.of(map(escaped, paths))
    listing = Listing(ids, paths, _folder_labels(root, ids, labels))
    notes = [*(_of_lists(root) if isinstance(root, Path) else ()), *_of_parts(root, listing)]
    return listing, root, stamps, notes


def _folder_labels(root: Root, ids: Texts, labels: Labels, auto_none: bool = False) -> LabelColumn:
    """Return the folders that ids lie in as labels; with `auto_none` no mixture is refused."""
    n_flat = sum("/" not in name for name in ids)
    if labels == "auto":
        labels = "none" if n_flat == len(ids) or (auto_none and n_flat) else "folders"
    depth = {"folders": 1, "subfolders": 2}.get(labels, 0)
    if not depth:
        return LabelColumn.of(None for _ in range(len(ids)))
    n_shallow = n_flat if depth == 1 else sum(name.count("/") < depth for name in ids)
    if n_shallow and n_shallow == len(ids):
        what = "subfolder" if depth == 1 else "folder in its subfolders"
        raise InputError(f'{root}: has no {what} to take labels from; take labels="none"')
    if n_shallow:
        first = next(name for name in ids if name.count("/") < depth)
        raise InputError(
            f"{root}: {n_shallow} images such as {short(first)} lie beside the "
            'class folders; move them into one, or take labels="none"'
        )
    return LabelColumn.of(name.split("/", depth)[depth - 1] for name in ids)


def _of_lists(root: Path) -> list[str]:
    """Return notes on CSVs in the folder that list pictures and labels."""
    notes = []
    for file in sorted(file for file in root.glob("*.csv") if file.is_file())[:3]:
        with suppress(OSError, UnicodeDecodeError), file.open(encoding="utf-8-sig") as lines:
            columns = [name.strip() for name in lines.readline(4096).split(",")]
            if {"path", "label"} <= set(columns):
                notes.append(f"{file} lists pictures with labels; give it in place of the folder")
    return notes


def _of_parts(root: Root, items: Listing) -> list[str]:
    """Say that labels look like the parts a data set is divided into for training."""
    if not any(name.lower() in _SPLITS for name in items.labels.names):
        return []
    folders = {item.label for item in items if item.label == item.id.partition("/")[0]}
    splits = sorted(label for label in folders if label and label.lower() in _SPLITS)
    if not splits or (len(splits) == 1 and len(folders) > 1):  # a train may be a class
        return []
    looks = f"labels that look like parts of a data set: {' and '.join(splits)}"
    parted = (name.split("/") for name in items.ids)
    below = sorted({parts[1] for parts in parted if len(parts) > 2 and parts[0] in splits})
    if not below:
        return [f'{looks}; labels="none" leaves them out']
    some = ", ".join([cut(name, 80) for name in below[:3]] + ["..."] * (len(below) > 3))
    most = next((name for name in splits if name.lower().startswith("train")), splits[0])
    there = located(root, most)
    return [f'{looks}; for the labels below ({some}) give {there}, or take labels="subfolders"']


def _walked(root: Root, endings: Iterable[str], left_out: LeftOut) -> tuple[Texts, Texts | None]:
    """Return paths of the files with some endings below a folder, in order, and their stamps."""
    paths, stamps = TextsWriter(), TextsWriter()
    listed = _in_folder(root) if isinstance(root, Path) else _at_address(root)
    links = list[str]()
    for path, stamp in _walk(listed, frozenset(endings), left_out, links):
        paths.extend([path])
        if isinstance(root, str):
            stamps.extend([stamp])
    left_out.endings = dict(sorted(left_out.endings.items(), key=lambda pair: (-pair[1], pair[0])))
    found = Texts(*paths.columns())
    if isinstance(root, str):
        return found, Texts(*stamps.columns())
    return (Texts.of(sorted(found)) if links else found), None


def _walk(
    listed: Callable[[str], list[_Entry] | None],
    endings: frozenset[str],
    left_out: LeftOut,
    links: list[str],
) -> Iterator[tuple[str, str]]:
    """Yield (path, stamp) of files, "/" between the parts; count what is left out.

    One folder's names are held at a time. They come in the order of whole paths, those behind
    `links` to folders at last: a folder is read under its own name, and a loop of links ends.
    """
    ahead, waiting = [("", "")], list[str]()
    while ahead or waiting:
        if not ahead:
            waiting.sort(reverse=True)
            ahead.append((waiting.pop(), ""))
        place, stamp = ahead.pop()
        if place and not place.endswith("/"):
            yield place, stamp
            continue
        entries = listed(place)
        if entries is None:  # read under another name
            continue
        left_out.empty += not entries
        below = list[tuple[str, str]]()
        for entry in entries:
            name, is_folder = entry.name.rstrip("/"), entry.name.endswith("/")
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out.hidden += 1
            elif left_out.excludes(f"{place}{name}", name):
                continue
            elif is_folder and ending != ".lance":
                if entry.is_link:
                    waiting.append(f"{place}{name}/")
                    links.append(name)
                else:
                    below.append((f"{place}{name}/", ""))
            elif ending in endings:
                below.append((f"{place}{name}", entry.stamp))
            else:
                kind = escaped(cut(ending, 20))
                left_out.endings[kind] = left_out.endings.get(kind, 0) + 1
        below.sort(reverse=True)
        ahead += below


def _in_folder(root: Path) -> Callable[[str], list[_Entry] | None]:
    seen: set[tuple[int, int]] = set()

    def listed(below: str) -> list[_Entry] | None:
        place = root / below
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            return None
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(place) as there:
                return [
                    _Entry(f"{one.name}/", "", one.is_symlink())
                    if _is_folder(one)
                    else _Entry(one.name, "")
                    for one in there
                ]
        except PermissionError:
            hint = "; exclude= leaves it out" if below else ""
            raise InputError(
                f"{escaped(str(place))}: may not be read (permission denied){hint}"
            ) from None

    return listed


def _at_address(root: str) -> Callable[[str], list[_Entry]]:
    from .remote import entries

    def listed(below: str) -> list[_Entry]:
        there = entries(f"{root}/{below}".rstrip("/"))
        return [_Entry(f"{name}/" if folder else name, stamp) for name, folder, stamp in there]

    return listed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# A CSV.


def _of_csv(path: str, labels: Labels, left_out: LeftOut) -> _Found:
    if labels in ("folders", "subfolders"):
        raise InputError(
            f'{path}: a CSV has a label column; take labels="auto", "numbers" or "none"'
        )
    folder = as_root(path.rpartition("/")[0] or ".") if is_url(path) else Path(path).parent
    return Listing.of(csv_items(path, labels, left_out)), folder, None, []


# Shards and tables: several files, each of many images.


def _expanded(pattern: str) -> tuple[Root, list[str]]:
    """Return the folder of a pattern, as far as it is none, and the files below that it fits."""
    pieces = pattern.split("/")
    plain = next(place for place, one in enumerate(pieces) if _PATTERN.search(one))
    root = "/".join(pieces[:plain])
    start, found = len(root) + 1 if plain else 0, list[str]()
    for one in _braced(pattern):
        if not re.search(r"[*?\[]", one):
            found.append(one)
        elif is_url(one):
            from .remote import matching

            found += [f"{root}/{name}" for name in matching(one, root)]
        else:
            found += sorted(glob(one, recursive=True))
    files = [one for one in found if os.path.splitext(one)[1].lower() in (*_TAR, *TABLES)]
    if not files:
        raise InputError(
            f"{pattern}: fits no .tar, .parquet, .arrow, .feather or .lance; give a folder of "
            "images, a .csv file, or a pattern of those"
        )
    return as_root(root or ("/" if plain else ".")), [one[start:] for one in files]


def _braced(pattern: str) -> list[str]:
    """Return what {000..123} and {a,b} in a pattern stand for, in their order."""
    parts, choices = _BRACES.split(pattern), list[list[str]]()
    total = 1
    for place, part in enumerate(parts):
        options = [part]
        if place % 2:
            ends = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", part)
            if ends:
                first, last = int(ends[1]), int(ends[2])
                total *= max(last - first + 1, 0)
                width = len(ends[1]) if total <= _MOST_SHARDS else 0
                last = last if total <= _MOST_SHARDS else first
                options = [f"{number:0{width}d}" for number in range(first, last + 1)]
            else:
                options = part.split(",")
                total *= len(options)
        if total > _MOST_SHARDS:
            raise InputError(f"{pattern}: names more than {_MOST_SHARDS:,} files; give fewer")
        choices.append(options)
    return ["".join(one) for one in product(*choices)]


def _of_shards(
    root: Root, files: Sequence[tuple[str, str]], labels: Labels, left_out: LeftOut
) -> _Found:
    """List the images of tars or tables, (path, stamp) below a root, in the order given."""
    endings = {os.path.splitext(name)[1].lower() for name, _ in files}
    if _TAR[0] in endings and len(endings) > 1:
        raise InputError(f"{root}: .tar and tables are named together; give either")
    are_tars, from_folders = endings == set(_TAR), labels in ("folders", "subfolders")
    if from_folders and not are_tars:
        raise InputError(
            f'{root}: a table has a label column; take labels="auto", "numbers" or "none"'
        )
    pictures = set[str]()
    told = list[str]()

    def items() -> Iterator[Item]:
        for file, stamp in files:
            place = located(root, file)
            if is_url(place) and not stamp:
                from .remote import stamp_of_address

                stamp = stamp_of_address(place)
            given = root, file, labels != "none" and not from_folders, left_out
            for item in _tar_items(*given) if are_tars else _table_items(*given, pictures):
                if left_out.excludes(item.id, *item.id.split("/")):
                    continue
                if labels == "numbers" and item.label:
                    check_number(item.label, f"{file}, {cut(item.id, 80)}")
                told.append(stamp)
                yield item

    listing, stamps = Listing.of(items()), None
    left_out.endings = dict(sorted(left_out.endings.items(), key=lambda pair: (-pair[1], pair[0])))
    if not len(listing):
        there = f"; they hold {left_out}" if str(left_out) else ""
        raise InputError(
            f"{root}: {cut(', '.join(name for name, _ in files), 200)} hold no images{there}"
        )
    notes = list[str]()
    if from_folders or (are_tars and labels == "auto" and not listing.labels.names):
        column = _folder_labels(root, listing.ids, labels, auto_none=True)
        listing = Listing(listing.ids, listing.paths, column)
        notes = _of_parts(root, listing)
    if isinstance(root, str) and all(map(inside, listing.paths)):
        stamps = LabelColumn.of(told)
    return listing, root, stamps, notes


def _tar_items(root: Root, file: str, labelled: bool, left_out: LeftOut) -> Iterator[Item]:
    from .tars import Others, listed

    others = Others()
    for sample in listed(located(root, file), others, labelled=labelled):
        name, start, size = sample.picture
        path = member_path(file, escaped(name), start, size)
        yield Item(escaped(sample.key.removeprefix("./")), path, sample.label)
    for ending, number in others.endings.items():
        left_out.endings[ending] = left_out.endings.get(ending, 0) + number
    if others.links:
        left_out.endings["links"] = left_out.endings.get("links", 0) + others.links


def _table_items(
    root: Root, file: str, labelled: bool, left_out: LeftOut, pictures: set[str]
) -> Iterator[Item]:
    """Yield a table's images; of those told by their `pictures` each once."""
    from .tables import open_table

    table = open_table(located(root, file))
    for row in table.rows(labelled=labelled):
        path = row.path
        if table.id is None and table.picture is not None:
            if not row.id or row.id in pictures:
                what = "pictures twice" if row.id else "without a picture"
                left_out.endings[what] = left_out.endings.get(what, 0) + 1
                continue
            pictures.add(row.id)
        if not path:
            path = row_path(file, row.number)
        elif not is_url(path):
            path = relative_path(path, root) if isinstance(root, Path) else path.lstrip("/")
        yield Item(row.id if table.path is None or table.id else path, path, row.label)
