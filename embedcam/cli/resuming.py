"""What an interrupted command finds again, and how it says so."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .report import note


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
    """Say on the error stream how far a job is, and how much of it an earlier run has done."""
    heard = _Notes(options)
    logs = [logging.getLogger(f"embedcam.{name}") for name in ("passes", "progress")]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(heard)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
            log.removeHandler(heard)


class _Notes(logging.Handler):
    """Records of a job as notes."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(logging.INFO)
        self._options = options

    def emit(self, record: Any) -> None:
        """Print it, unless nothing but results is to be printed."""
        note(self._options, record.getMessage())
