"""Children that kill themselves with SIGKILL before a chosen step of a job on the disk.

What `kills.py` and the tests of killed jobs share. A child is a fork of a process that has imported
torch and FAISS and uses one thread: after a parallel region a forked child would wait for ever.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = Callable[[Path], object]
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Killer:
    """Kills this process before the n-th change to a folder's files."""

    def __init__(self) -> None:
        self.folder, self.left, self.seen = "", -1, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count one of Python's audit events, if it changes the disk."""
        if not self.folder or event not in STEPS:
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        # What is below a folder being deleted is named from within it.
        inside = str(arguments[0]).startswith(self.folder)
        if inside or event in ("os.remove", "os.rmdir"):
            self.step()

    def step(self, *_: object) -> None:
        """Count a step; also what `os.fsync` is in a child: nothing need survive a power cut."""
        self.seen += 1
        if self.seen == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, folder: Path, kill_before: int = -1) -> None:
        """Count from here on what happens below a folder."""
        self.folder, self.left, self.seen = str(folder), kill_before, 0


KILLER = Killer()


def begin(job: Job, folder: Path, kill_before: int = -1) -> int:
    """Begin a job in a fork of this process; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            KILLER.watch(folder, kill_before)
            job(folder)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def was_killed(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("the job failed by itself")
    return False


def in_child(job: Job, folder: Path, kill_before: int = -1) -> bool:
    """Run a job in a fork of this process; whether it was killed."""
    return was_killed(begin(job, folder, kill_before))


def everything(folder: Path) -> dict[str, str]:
    """Each file below a folder with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
