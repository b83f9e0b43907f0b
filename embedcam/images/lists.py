"""CSVs that list pictures: the columns path,label[,id], and what their lines say."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from .._files import refuse_device
from ..errors import InputError, cut, short
from .number_labels import check_number
from .places import relative_path
from .reading import is_url
from .sources import Item, Labels, LeftOut

_OPTIONAL = ("id", "label", "width", "height")


def csv_items(path: str, labels: Labels, left_out: LeftOut) -> Iterator[Item]:
    """Yield the images of a CSV at a path or an address, as written."""
    lines: dict[str, int] = {}
    wanted = ["path"] if labels == "none" else ["path", "label"]
    for line, row in csv_rows(path, wanted, "path,label[,id]"):
        where = row["path"]
        if not where or not row.get("id", where):
            empty = "id is empty; leave out the column or fill it" if where else "path is empty"
            raise InputError(f"{path}, line {line}: the {empty}")
        if not is_url(where):
            # At an address all paths are below its folder: none names a file of this machine.
            where = where.lstrip("/") if is_url(path) else relative_path(where, Path(path).parent)
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
    path: str | Path, wanted: Sequence[str], expected: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a CSV that has the columns `wanted`, else raise InputError.

    It is UTF-8 with commas, semicolons or tabs; `expected` is its header, for messages.
    """
    refuse_device(path)
    try:
        with _opened(path) as stream:
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


@contextmanager
def _opened(path: str | Path) -> Iterator[TextIO]:
    if isinstance(path, Path) or not is_url(path):
        with open(path, newline="", encoding="utf-8-sig") as stream:
            yield stream
        return
    from .remote import opened

    with opened(path) as file, TextIOWrapper(file, "utf-8-sig", newline="") as stream:
        yield stream


def _columns(header: str, divider: str, wanted: Sequence[str]) -> int:
    names = [name.strip(' "').lower() for name in re.split(f"[{divider}\r\n]", header)]
    return sum(name in names for name in wanted)
