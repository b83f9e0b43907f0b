"""The folder of a report: what it is a report of, the queries that are finished, and its files.

    DIR/
      index.html           the page
      explanations.jsonl   a line a query
      features.npy         where asked for: a row of features for each of these lines
      report.json          what the report depends on: index, queries, options; at the end also
                           the SHA-256 of the files above, which makes it complete
      .finished/           a file for each finished query, until then

Every file is written under another name, synced and renamed, so that a job killed at any moment
leaves whole files. Each proves itself: what is kept of a query has a digest over it, its place and
everything the report depends on, and what does not fit its digest is made again. Nothing depends
on the time, or on where the job was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from .._files import (
    UNFINISHED,
    NotPlain,
    fresh,
    held,
    is_folder,
    make_folder,
    open_regular,
    read_regular,
    remove_files,
    sync_folder,
    written,
)
from ..errors import InputError

PAGE: Final = "index.html"
LINES: Final = "explanations.jsonl"
FEATURES: Final = "features.npy"
_MARK: Final = "report.json"
_FINISHED: Final = ".finished"
_FILES: Final = "files"
_LEFT: Final = re.compile(
    rf"({'|'.join(map(re.escape, (PAGE, LINES, FEATURES, _MARK)))}){UNFINISHED}"
)
_ROW: Final = re.compile(r"([0-9]{8,})\.json")
_ROW_LEFT: Final = re.compile(rf"[0-9]{{8,}}\.json{UNFINISHED}")
_MOST: Final = 256 << 20
_FORMAT: Final = "embedcam-report"
About = dict[str, Any]
"""What a report depends on, ready for JSON."""
_GO_ELSEWHERE: Final = "give a new folder, or delete this one"


@dataclass(frozen=True)
class Finished:
    """What is kept of a query: its line of JSON, its row of HTML, and whether a map is cropped."""

    line: str
    row: str = ""
    cropped: bool = False


def check_folder(path: str | Path) -> None:
    """Raise InputError for a file, or a folder that holds something that is no report."""
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file; a report is a folder, so give another name")
    with _disk(path):
        names = sorted(entry.name for entry in os.scandir(path))
    others = [name for name in names if name != _MARK + UNFINISHED]
    if others and _MARK not in names:
        raise InputError(
            f"{path}: holds something else ({others[0]}); a report takes a folder of its own, "
            "so give a new or an empty one"
        )


@contextmanager
def open_folder(path: Path, about: About) -> Iterator[Folder]:
    """Yield a report's folder, made where missing, held against other writers meanwhile.

    Raises InputError where a report `about` something else lies there, or another process writes.
    """
    check_folder(path)
    with _disk(path):
        make_folder(path)
        lock = os.open(path, os.O_RDONLY)
    busy = InputError(f"{path}: another process is writing this report; wait until it is done")
    with held(lock, path, busy):
        check_folder(path)
        folder, known = Folder(path, about), _read_mark(path)
        if known is not None:
            known.pop(_FILES, None)
            if known != folder.about:
                raise InputError(
                    f"{path}: holds {_difference(known, folder.about)}; {_GO_ELSEWHERE}"
                )
        with _disk(path):
            if known is None:
                folder.mark()
            try:
                is_folder(folder.kept)
            except NotPlain as error:
                raise InputError(f"{folder.kept}: {error}; {_GO_ELSEWHERE}") from error
            folder.kept.mkdir(exist_ok=True)
            remove_files(path, _LEFT)
            remove_files(folder.kept, _ROW_LEFT)
        yield folder


class Folder:
    """A folder whose lock is held, with the report that was asked for; `files` complete it."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.kept = path, path / _FINISHED
        self.about: About = json.loads(json.dumps({"format": _FORMAT, **about}))
        self._job = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.files = (LINES, PAGE, *((FEATURES,) if about["options"].get("features") else ()))

    @property
    def complete(self) -> bool:
        """Whether the files are there, as written."""
        sums = (_read_mark(self.path) or {}).get(_FILES)
        return bool(sums) and sums == self._sums()

    def finished(self) -> set[int]:
        """Return the places of finished queries; what does not fit its digest is dropped."""
        names = filter(None, map(_ROW.fullmatch, os.listdir(self.kept)))
        places = {int(name[1]) for name in names}
        return {place for place in places if self._read(place) is not None}

    def keep(self, queries: Mapping[int, Finished]) -> None:
        """Keep what was made of some queries, by their places."""
        with _disk(self.path):
            for position, one in queries.items():
                text = json.dumps(asdict(one))
                target = self._place_of(position)
                unfinished = target.with_name(target.name + UNFINISHED)
                with fresh(unfinished) as file:
                    file.write(f"{self._proof(position, text)}\n{text}".encode())
                os.replace(unfinished, target)
            sync_folder(self.kept)

    def read(self, position: int) -> Finished:
        """Return what was kept of a query; an altered file is dropped and InputError raised."""
        kept = self._read(position)
        if kept is None:
            file = self._place_of(position)
            raise InputError(f"{file}: was altered; run the same command again")
        return kept

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        with open(open_regular(self.path, LINES), encoding="utf-8") as file:
            yield from file

    @contextmanager
    def filled(self, name: str) -> Iterator[IO[bytes]]:
        """Yield one of the report's files, which appears whole or not at all."""
        with _disk(self.path), written(self.path / name) as file:
            yield file

    def mark(self, complete: bool = False) -> None:
        """Write what the report depends on; with the digests of its files it is complete."""
        about = {**self.about, **({_FILES: self._sums()} if complete else {})}
        text = json.dumps(about, indent=1, sort_keys=True) + "\n"
        with self.filled(_MARK) as file:
            file.write(text.encode())

    def tidy(self) -> None:
        """Drop what was kept of single queries, once the report is complete."""
        remove_files(self.kept, _ROW)
        with suppress(OSError):  # it holds what is not ours
            self.kept.rmdir()

    def _sums(self) -> dict[str, str]:
        """Return the SHA-256 of the report's files; of none where one is missing or no file."""
        sums = {}
        try:
            for name in self.files:
                with open(open_regular(self.path, name), "rb") as file:
                    sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotPlain):
            return {}
        return sums

    def _place_of(self, position: int) -> Path:
        return self.kept / f"{position:08d}.json"

    def _proof(self, position: int, text: str) -> str:
        return hashlib.sha256(f"{self._job} {position}\n{text}".encode()).hexdigest()

    def _read(self, position: int) -> Finished | None:
        file = self._place_of(position)
        try:
            name = f"{_FINISHED}/{file.name}"
            check, _, text = read_regular(self.path, name, _MOST).decode().partition("\n")
            if check == self._proof(position, text):
                return Finished(**json.loads(text))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, NotPlain):
            pass
        with _disk(self.path):
            file.unlink(missing_ok=True)
        return None


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Tell of a full or unwritable disk in one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); see to the "
            "disk and run the same command again: it goes on where it stopped"
        ) from error


def _read_mark(path: Path) -> About | None:
    try:
        known = json.loads(read_regular(path, _MARK, _MOST))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, NotPlain):
        known = None
    if not isinstance(known, dict) or known.get("format") != _FORMAT:
        raise InputError(f"{path / _MARK}: is not a report's; {_GO_ELSEWHERE}")
    return known


def _difference(known: About, wanted: About) -> str:
    """Return what a folder holds in place of what is asked for."""
    old, new = _flat(known), _flat(wanted)
    was, now = ({name: one.get(name, False) for name in {**new, **old}} for one in (old, new))
    name = next((name for name in was if was[name] != now[name]), "format")
    return f"a report with {name} = {was[name]!r}, and {now[name]!r} is asked for"


def _flat(about: About) -> About:
    flat: About = {}
    for part, held_there in about.items():
        inner = held_there if isinstance(held_there, dict) else {"": held_there}
        for name, value in inner.items():
            flat[f"{part} {name}".strip().removeprefix("options ")] = value
    return flat
