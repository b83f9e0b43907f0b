"""One writer at a time: a lock that the kernel releases when its holder dies."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from .._files import held, make_folder
from ..errors import IndexBusyError
from .files import broken

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
        IndexFormatError: something else than a file lies where the lock should.
        InputError: the file system has no locks.
    """
    path = Path(path)
    make_folder(path)
    root = path.resolve()
    if root in _held.get():
        yield
        return
    busy = IndexBusyError(
        f"{path}: another process is writing to this index; wait until it is done"
    )
    with held(_open(root), path, busy):
        before = _held.get()
        _held.set(before | {root})
        try:
            yield
        finally:
            _held.set(before)


def _open(root: Path) -> int:
    """The lock file, made where it is missing; nothing is made through a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(root / NAME, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    what = "is no regular file, so it cannot be locked"
    raise broken(root, NAME, what, "delete it and run the same command again")
