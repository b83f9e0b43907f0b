"""How far a job is: a bar on a terminal and in a notebook, elsewhere a log line now and then."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

log = logging.getLogger("embedcam.progress")
EVERY = 30.0
"""Seconds between two lines in the log."""
Advance = Callable[[int], object]
"""Told how many more are done."""
Stage = Callable[[str, int], AbstractContextManager[Advance]]
"""Shows how far a named stage of a job is, of so many images; 0 where they are not counted."""


@contextmanager
def progress_of(
    stage: str, total: int | None = 0, unit: str = "images", *, shown: bool | None, done: int = 0
) -> Iterator[Advance]:
    """Show how far a stage of a job is, while it runs; yield what is told how many more are done.

    A `total` of 0 is not counted, None is unknown. `shown` True shows a bar, False nothing; None a
    bar on a terminal or in a notebook, elsewhere a log line every half minute.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    wanted = shown if shown is not None else terminal or _notebook()
    if wanted and total != 0:
        try:
            from tqdm.auto import tqdm
        except ImportError:  # as where torch is missing
            pass
        else:
            with tqdm(desc=stage, total=total, initial=done, unit=f" {unit}") as bar:
                yield bar.update
            return
    if shown is False:
        yield lambda more: None
        return
    with _logged(stage, total, unit, done) as advance:
        yield advance


SILENT: Stage = partial(progress_of, shown=False)


def in_passes(progressed: Advance, passes: int) -> Advance:
    """Return what is told of each image so many times, or of each of its bytes, and tells once."""
    told = 0

    def advance(more: int) -> None:
        nonlocal told
        before, told = told // passes, told + more
        progressed(told // passes - before)

    return advance


def _notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _logged(stage: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    """Write a line every half minute by a thread, so that one long step does not silence it."""
    begun, counted, ended = time.monotonic(), [done], threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY):
            of = f" of {total:,}" if total else ""
            how_far = f"{counted[0]:,}{of} {unit}, " if total != 0 else ""
            seconds, left = time.monotonic() - begun, ""
            if total and seconds > 0 and (rate := (counted[0] - done) / seconds):
                each = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
                left = f", {each} a second, {_about((total - counted[0]) / rate)} left"
            log.info("%s: %s%s%s", stage, how_far, _about(seconds), left)

    def advance(more: int) -> None:
        counted[0] += more

    thread = threading.Thread(target=tell, name="embedcam-progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def _about(seconds: float) -> str:
    """Return "87 s", "45 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
