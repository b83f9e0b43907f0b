"""A text file in place whole or not at all: what was there before stays until the new one is."""

import errno
import os
import stat
from pathlib import Path

from .errors import InputError


def refuse_device(path: str | Path) -> None:
    """Refuse to read what may never end, such as /dev/zero.

    Raises:
        InputError: a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot be
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"{path}: is a device; give a file")


def write_whole(path: str | Path, text: str) -> Path:
    """Write beside the file, sync, and rename over it.

    A link stays one: what it leads to is replaced. What is no plain file (a pipe, `/dev/stdout`) is
    written to as it is.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    data = text.encode("utf-8", "replace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return path
        target = path.resolve()
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                unfinished.chmod(target.stat().st_mode & 0o777)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path
