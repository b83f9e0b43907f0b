"""The folder of a report: what it is a report of, the queries that are finished, and its files.

    DIR/
      index.html           the page, put in place by the last rename of the job
      explanations.jsonl   a line a query
      report.json          what the report depends on: index, queries, options
      .finished/           a file for each finished query, until the page is there

Every file is written under another name, synced and renamed, so that a job killed at any moment
leaves whole files. Nothing in it depends on the time, or on where the job was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from ..errors import InputError

PAGE: Final = "index.html"
LINES: Final = "explanations.jsonl"
_MARK: Final = "report.json"
_FINISHED: Final = ".finished"
_UNFINISHED: Final = ".tmp"
_FORMAT: Final = "embedcam-report"
_GO_ELSEWHERE: Final = "give a new folder, or delete this one"


@dataclass(frozen=True)
class Finished:
    """What is kept of a query.

    Attributes:
        line: its JSON, without a line's end.
        row: its HTML; empty where it could not be explained.
        cropped: whether a map on it leaves a visible part of its picture out.
    """

    line: str
    row: str = ""
    cropped: bool = False


def check_folder(path: str | Path) -> None:
    """Refuse a place where no report can be, or where something else is.

    Raises:
        InputError: a file, or a folder that holds something that is no report.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file; a report is a folder, so give another name")
    with _disk(path):
        names = sorted(entry.name for entry in os.scandir(path))
    strangers = [name for name in names if name != _MARK + _UNFINISHED]
    if strangers and _MARK not in names:
        raise InputError(
            f"{path}: holds something else ({strangers[0]}); a report takes a folder of its own, "
            "so give a new or an empty one"
        )


@contextmanager
def open_folder(path: Path, about: Mapping[str, Any]) -> Iterator[Folder]:
    """A report's folder, made where missing, held against other writers until it is let go.

    Args:
        path: the folder.
        about: what everything in it depends on: `index`, `queries`, `options` and `embedcam`.

    Raises:
        InputError: another report, or something else, lies there; another process writes it; or the
            disk cannot be written.
    """
    check_folder(path)
    with _disk(path):
        path.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        check_folder(path)
        known = _read_mark(path)
        wanted = {"format": _FORMAT, **about}
        if known is None:
            with written(path / _MARK) as file:
                file.write(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
        elif known != json.loads(json.dumps(wanted)):
            raise InputError(f"{path}: holds {_difference(known, wanted)}; {_GO_ELSEWHERE}")
        with _disk(path):
            (path / _FINISHED).mkdir(exist_ok=True)
            for left in (*path.glob(f"*{_UNFINISHED}"), *path.glob(f"{_FINISHED}/*{_UNFINISHED}")):
                left.unlink()
        yield Folder(path)


class Folder:
    """A folder whose lock is held, and whose report is the one that was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def complete(self) -> bool:
        """Whether the page is there: the last thing that a job writes."""
        return (self.path / PAGE).exists() and (self.path / LINES).exists()

    def finished(self) -> set[int]:
        """Places of the queries that are finished."""
        return {int(file.stem) for file in (self.path / _FINISHED).glob("[0-9]*.json")}

    def keep(self, queries: Mapping[int, Finished]) -> None:
        """Keep what was made of some queries, by their places."""
        for position, one in queries.items():
            text = json.dumps(asdict(one))
            with written(self._file(position), durable=False) as file:
                file.write(f"{zlib.crc32(text.encode()):08x}\n{text}")
        with _disk(self.path):
            _sync_folder(self.path / _FINISHED)

    def read(self, position: int) -> Finished:
        """What was kept of a query.

        Raises:
            InputError: its file was altered; it is dropped, and the query is explained anew.
        """
        file = self._file(position)
        try:
            check, _, text = file.read_text(encoding="utf-8").partition("\n")
            if int(check, 16) == zlib.crc32(text.encode()):
                return Finished(**json.loads(text))
        except (OSError, ValueError, TypeError):
            pass
        file.unlink(missing_ok=True)
        raise InputError(f"{file}: was altered; run the same command again")

    def lines(self) -> Iterator[str]:
        """The lines of a complete report."""
        with open(self.path / LINES, encoding="utf-8") as file:
            yield from file

    def tidy(self) -> None:
        """Drop what was kept of single queries, once the page is there."""
        shutil.rmtree(self.path / _FINISHED, ignore_errors=True)

    def _file(self, position: int) -> Path:
        return self.path / _FINISHED / f"{position:08d}.json"


@contextmanager
def written(path: Path, *, durable: bool = True) -> Iterator[IO[str]]:
    """A text file that appears whole, by one rename, or not at all.

    durable: sync the folder, too, so that the name survives a power failure.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    with _disk(path):
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        if durable:
            _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the folder against other writers, by a lock that ends with its holder."""
    import fcntl  # here, so that what only reads works where there is no flock

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{path}: another process is writing this report; wait until it is done"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A full or unwritable disk as one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); see to the "
            "disk and run the same command again: it goes on where it stopped"
        ) from error


def _read_mark(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict) or known.get("format") != _FORMAT:
        raise InputError(f"{path / _MARK}: is not a report's; {_GO_ELSEWHERE}")
    return known


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What a folder holds in place of what is asked for."""

    def of(values: Mapping[str, Any], entry: str) -> dict[str, Any]:
        found = values.get(entry)
        return found if isinstance(found, dict) else {}

    mine, other = of(known, "index"), of(wanted, "index")
    if mine != other:
        was, now = mine.get("generation"), other.get("generation")
        if was != now:
            return f"a report of generation {was} of the index, which is at generation {now}"
        return "a report of another index"
    mine, other = of(known, "queries"), of(wanted, "queries")
    if mine != other:
        was, now = mine.get("count"), other.get("count")
        if was != now:
            return f"a report of {was} queries, and {now} are given now"
        return "a report of other queries, or of the same before their files changed"
    mine, other = of(known, "options"), of(wanted, "options")
    for name in {**mine, **other}:
        was, now = mine.get(name, False), other.get(name, False)
        if was != now:
            return f"a report with {name} = {was!r}, and {now!r} is asked for"
    return f"a report of embedcam {known.get('embedcam')}, and this is {wanted.get('embedcam')}"
