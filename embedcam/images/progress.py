"""How far a job is: a bar on a terminal and in a notebook, elsewhere a log line now and then."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("embedcam.progress")
EVERY = 30.0
"""Seconds between two lines in the log."""
Advance = Callable[[int], object]
"""Told how many more are done."""


@contextmanager
def progress_of(
    stage: str, total: int | None = 0, unit: str = "images", *, shown: bool | None, done: int = 0
) -> Iterator[Advance]:
    """Show how far a stage of a job is, while it runs.

    Args:
        stage: what is being done.
        total: of units; 0 where they are not counted, which no bar shows, None where nobody knows.
        unit: what is counted.
        shown: True shows a bar; False nothing; None a bar on a terminal or in a notebook, and
            elsewhere a line of the logger `embedcam.progress` every half minute.
        done: units that were done before.

    Yields:
        What is to be told how many more were dealt with.
    """
    wanted = shown if shown is not None else _terminal() or _notebook()
    bar = _bar(stage, total, unit, done) if wanted and total != 0 else None
    if bar is not None:
        with bar:
            yield bar.update
    elif shown is False:
        yield lambda more: None
    else:
        with _logged(stage, total, unit, done) as advance:
            yield advance


def _bar(stage: str, total: int | None, unit: str, done: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # as where torch is missing
        return None
    return tqdm(desc=stage, total=total, initial=done, unit=f" {unit}")


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _notebook() -> bool:
    """Whether this is a notebook's kernel; its error stream is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _logged(stage: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    """A line every half minute by a thread, so that one long step does not silence it."""
    begun, counted, ended = time.monotonic(), [done], threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY):
            of = f" of {total:,}" if total else ""
            how_far = f"{counted[0]:,}{of} {unit}, " if total != 0 else ""
            log.info("%s: %s%.0f s", stage, how_far, time.monotonic() - begun)

    def advance(more: int) -> None:
        counted[0] += more

    thread = threading.Thread(target=tell, name="embedcam-progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
