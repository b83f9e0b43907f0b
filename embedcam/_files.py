"""Files: opened without following links, written whole or not at all, locked, and removed.

Below the folder that the user gave, which may be a link itself, no link is followed: names in an
index or a report are a stranger's, so each folder on the way is opened from the one above it.
What is written is synced before it gets its name, and its name before anything counts on it.
"""

import errno
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import EmbedcamError, InputError

UNFINISHED = ".tmp"
"""Ending of a file or folder that has not got its name yet."""
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A folder may be walked through that must not be listed.
_WALK = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW


class NotPlain(Exception):  # noqa: N818 - reads as the fact it states
    """What lies at a place cannot be what should; says why, as the end of a sentence."""


def open_regular(root: Path, name: str) -> int:
    """Return a descriptor for reading a regular file below `root`; raise NotPlain of all else.

    An OSError, where it is missing or cannot be read, names the whole path.
    """
    above, _, last = name.rpartition("/")
    try:
        with _folder_below(root, above, _WALK) as folder:
            kind = os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISREG(kind):
                # A pipe or a link put there meanwhile neither blocks nor leads away.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(last, flags, dir_fd=folder)
                kind = os.fstat(descriptor).st_mode
                if stat.S_ISREG(kind):
                    return descriptor
                os.close(descriptor)
    except OSError as error:
        error.filename = str(root / name)
        raise
    raise NotPlain("is a symbolic link" if stat.S_ISLNK(kind) else "is not a regular file")


def read_regular(root: Path, name: str, most: int) -> bytes:
    """Return the bytes of a regular file below `root`; raise NotPlain of more than `most`."""
    with open(open_regular(root, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise NotPlain(f"has {size} bytes, and at most {most} are read")
        return file.read(most)


def is_folder(path: Path) -> bool:
    """Return whether a folder lies at a place; raise NotPlain of a link or something else."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(kind):
        raise NotPlain("is a symbolic link" if stat.S_ISLNK(kind) else "is not a folder")
    return True


def refuse_device(path: str | Path) -> None:
    """Refuse to read what may never end, such as /dev/zero."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot be
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"{path}: is a device; give a file")


@contextmanager
def _folder_below(root: Path, name: str, flags: int) -> Iterator[int]:
    """Open `root`, or a folder below it that is reached without following a link."""
    with ExitStack() as stack:
        descriptor = os.open(root, flags & ~os.O_NOFOLLOW)
        stack.callback(os.close, descriptor)
        for step in name.split("/") if name else ():
            if step in ("", ".", ".."):
                raise NotPlain("is no plain name below its folder")
            kind = os.stat(step, dir_fd=descriptor, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(kind):
                what = "behind a symbolic link" if stat.S_ISLNK(kind) else "below what is no folder"
                raise NotPlain(f"lies {what}")
            descriptor = os.open(step, flags, dir_fd=descriptor)
            stack.callback(os.close, descriptor)
        yield descriptor


@contextmanager
def fresh(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file, synced when the block ends and gone where it fails; a leftover makes way."""
    path.unlink(missing_ok=True)
    try:
        with open(path, "xb") as file:  # never through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """Rename durably."""
    os.replace(source, target)
    sync_folder(target.parent)


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears whole and durably by one rename; until then the old one stays."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with fresh(unfinished) as file:
        yield file
    replace(unfinished, path)


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write a file in place of another, whole or not at all, or raise InputError.

    A link stays one: what it leads to is replaced. What is no plain file (a pipe, `/dev/stdout`) is
    written to as it is.
    """
    path = Path(path)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return path
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unfinished = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
        with fresh(unfinished) as file:
            file.write(data)
            if target.exists():
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
        try:
            replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each durably in the one above it."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(descriptor: int, path: Path, busy: EmbedcamError) -> Iterator[None]:
    """Hold the lock of an open file, closed at the end; the kernel lets go when its holder dies.

    `busy` is raised where another process or thread holds it; `path` is what messages name.
    """
    import fcntl  # here, so that what only reads works where there is no flock

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError as error:
            raise InputError(
                f"{path}: its file system cannot lock files ({error.strerror or error}), so two "
                "writers could spoil it; write to a folder on a local disk, and copy that here"
            ) from error
        yield
    finally:
        os.close(descriptor)


def remove_tree(path: Path, last: str = "") -> None:
    """Delete a folder, no link itself, and all in it, the entry `last` at last; gone is fine."""
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return
    try:
        for name in sorted(os.listdir(descriptor), key=last.__eq__):
            kind = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            remove = shutil.rmtree if stat.S_ISDIR(kind) else os.unlink  # of a link, the link
            remove(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(path)


def remove_files(
    root: Path, ours: re.Pattern[str], named: Collection[str] = (), below: str = ""
) -> None:
    """Delete the plain files right in `root/below` with names that are ours and not `named`."""
    with suppress(OSError, NotPlain), _folder_below(root, below, _READ) as folder:
        for name in os.listdir(folder):
            if ours.fullmatch(name) and name not in named:
                with suppress(OSError):
                    if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                        os.unlink(name, dir_fd=folder)


def remove_folders(
    root: Path, name: str, ours: re.Pattern[str], files: re.Pattern[str], named: Collection[str]
) -> None:
    """Delete the folders in `root/name` with names that are ours and not `named`.

    Of each, the plain files with names that fit `files`; a folder that holds anything else stays.
    """
    with suppress(OSError, NotPlain), _folder_below(root, name, _READ) as folder:
        for entry in os.listdir(folder):
            if ours.fullmatch(entry) and entry not in named:
                remove_files(root, files, below=f"{name}/{entry}")
                with suppress(OSError):
                    os.rmdir(entry, dir_fd=folder)


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

    def __exit__(self, *_: object) -> None:
        self._locks[os.getpid()].release()


def compute_on_one_thread() -> None:
    """Keep torch, where this process has it, to one thread: for a forked child.

    A child that hands work to the parent's OpenMP threads, which it has not, waits for ever.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
