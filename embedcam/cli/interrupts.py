"""Ctrl-C in a process that is the command line: exit code 130 and never a traceback."""

# Nothing that takes time to import, which would be time without a handler: `signal` takes `enum`.
import os
import sys
from _signal import (  # type: ignore[import-not-found]
    SIGINT,
    default_int_handler,
    getsignal,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130


class _Interrupts:
    """What SIGINT does once it is `taken`, to the end of the process.

    While a command runs (`with INTERRUPTS:`) the first one raises KeyboardInterrupt, so that files
    are tidied up; `met` then says so, for a library may swallow it or make another error of it.
    Any other ends the process at once: a second one, one before and after the command, and one
    amid an import, which libraries answer by errors of their own.
    """

    def __init__(self) -> None:
        self.met = self._running = False
        self._unraisable_before = sys.unraisablehook

    def take(self) -> None:
        """Take care of SIGINT, unless the process was started with it ignored (`nohup`, `&`)."""
        if getsignal(SIGINT) is default_int_handler:
            signal(SIGINT, self._handle)
            sys.unraisablehook = self._unraisable

    def __enter__(self) -> None:
        self._running = True

    def __exit__(self, *_: object) -> None:
        self._running = False

    def _handle(self, number: int, frame: "FrameType | None") -> None:
        if self.met or not self._running or _importing(frame):
            _end()
        self.met = True
        raise KeyboardInterrupt

    def _unraisable(self, about: "sys.UnraisableHookArgs") -> None:
        # An exception that Python itself swallows, in a destructor or a callback.
        if isinstance(about.exc_value, KeyboardInterrupt):
            _end()
        self._unraisable_before(about)


INTERRUPTS = _Interrupts()


def _importing(frame: "FrameType | None") -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def _end() -> "NoReturn":
    try:  # noqa: SIM105 - contextlib takes time to import
        os.write(2, b"embedcam: interrupted\n")
    except OSError:  # nobody listens any more
        pass
    os._exit(INTERRUPTED)
