"""What a forked child does otherwise: it waits for no lock of its parent, and uses one thread.

Whoever holds state asks `os.getpid()` at its door; nothing is registered with the process.
"""

import os
import sys
import threading
from types import TracebackType


class ProcessLock:
    """A re-entrant lock, one for each process: a forked child finds its own, and that open.

    A plain lock that another thread of the parent held during the fork stays locked for ever.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def __deepcopy__(self, memo: object) -> "ProcessLock":
        """Return a lock of its own, open: what is copied is used by others."""
        return ProcessLock()

    def __enter__(self) -> None:
        # One atomic step: of two threads that come first, both take the lock that was put in.
        self._locks.setdefault(os.getpid(), threading.RLock()).acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._locks[os.getpid()].release()


def compute_on_one_thread() -> None:
    """torch on one thread, where this process has it: for a forked child.

    The parent's OpenMP threads are not there any more, and a child that hands them work waits for
    ever. FAISS is told at every search, see `embedcam.index.Index`.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
