"""How far a job is: a bar on a terminal and in a notebook, elsewhere a log line now and then."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("embedcam.progress")
EVERY = 30.0
"""Seconds between two lines in the log."""
Advance = Callable[[int], object]
"""Told how many more are done."""


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
