"""What an interrupted command finds again, and how it says so."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .report import note

_JOBS = ("embedcam.offline.shard", "embedcam.progress")


def kept(options: argparse.Namespace) -> bool:
    """Whether running the command again finds work that was done before it was interrupted."""
    if options.command in ("build", "add"):
        return _chunks(Path(options.index))
    if options.command == "demo":
        stages = Path(options.folder) / "stages.json"
        recorded = stages.read_text(encoding="utf-8").strip() if stages.is_file() else "{}"
        return recorded != "{}" or any(map(_chunks, Path(options.folder).glob("*/")))
    return bool(options.resumes)


def _chunks(index: Path) -> bool:
    return any(index.glob(".building/*/arrays.json"))


@contextmanager
def told_of(options: argparse.Namespace) -> Iterator[None]:
    """Say on the error stream how far a job is, how much of it was done before, and warnings."""
    if options.command == "serve":  # whose log has all of it
        yield
        return
    heard, log = _Notes(options), logging.getLogger("embedcam")
    jobs = [logging.getLogger(name) for name in _JOBS]
    levels = [job.level for job in jobs]
    log.addHandler(heard)
    for job in jobs:
        job.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(heard)
        for job, level in zip(jobs, levels, strict=True):
            job.setLevel(level)


class _Notes(logging.Handler):
    """Records as notes."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(logging.INFO)
        self._options = options

    def filter(self, record: Any) -> bool:
        """Whether it is a warning or of a job."""
        return record.levelno >= logging.WARNING or record.name in _JOBS

    def emit(self, record: Any) -> None:
        """Print it, unless nothing but results is to be printed."""
        self._options.said = (*getattr(self._options, "said", ()), record.getMessage())
        note(self._options, record.getMessage())
