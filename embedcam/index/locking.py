"""One writer at a time: a lock that the kernel releases when its holder dies."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from ..errors import IndexBusyError

NAME = ".lock"
# Per thread and task, so that a job which holds the lock can call `append` and the others, while a
# second thread is as busy as a second process.
_held: ContextVar[frozenset[Path]] = ContextVar("embedcam_locked_indexes", default=frozenset())


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the writer's lock of an index; nested uses in one thread are one lock.

    Args:
        path: the index directory; created where missing.

    Raises:
        IndexBusyError: another process or thread is writing to the index.
    """
    import fcntl  # here, so that reading an index also works where there is no flock

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    root = path.resolve()
    if root in _held.get():
        yield
        return
    file = os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IndexBusyError(
                f"{path}: another process is writing to this index; wait until it is done"
            ) from error
        before = _held.get()
        _held.set(before | {root})
        try:
            yield
        finally:
            _held.set(before)
    finally:
        os.close(file)
