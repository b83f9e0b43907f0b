"""An ONNX file opened and run. The only file that imports onnxruntime."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, NetworkError
from .external import refuse_external

PROVIDERS = ("CPUExecutionProvider",)
MAX_BYTES = (1 << 31) - 1
"""One protobuf holds no more; a file that has its numbers in others beside it is refused."""
PROBE_SECONDS = 60.0
"""A run that is not at its end by then is stopped, where a network is asked for the first time."""
_AGAIN = "write it again with `embedcam export`"


class Session:
    """One file, its one input and its outputs. Concurrent runs are safe.

    A child made by fork has none of ONNX Runtime's threads: it opens the file again on its first
    run, on one thread.

    Args:
        path: of the file.
        threads: that one run computes on; None leaves it to ONNX Runtime, which takes every core.
        providers: of ONNX Runtime, the preferred one first.

    Raises:
        InputError: threads or providers that there are not.
        NetworkError: onnxruntime is not installed, or the file is no network it can run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        providers: Sequence[str] = PROVIDERS,
    ) -> None:
        self.path = Path(path)
        self.threads = _checked_threads(threads)
        self.providers = _checked_providers(providers)
        self._stamp = _stamp(self.path)
        refuse_external(self.path)
        self._session = self._open(self.threads)
        self._pid, self._lock = os.getpid(), threading.Lock()
        self.props: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            shown = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs) or "none"
            raise NetworkError(
                f"{self.path}: its inputs are {shown}; expected one, float32 images [B 3 H W]"
            )
        self.input = str(inputs[0].name)
        self.shape = tuple(n if isinstance(n, int) and n > 0 else None for n in inputs[0].shape)
        """(B, C, H, W) of the input, None where any number will do."""
        self.outputs = {str(one.name): len(one.shape or ()) for one in outputs}
        """Each output's name and how many dimensions it has."""

    def run(
        self, names: Sequence[str], images: np.ndarray, seconds: float | None = None
    ) -> list[np.ndarray]:
        """Those outputs of a batch float32 `[B C H W]`, as float32.

        Args:
            names: of the outputs.
            images: the batch.
            seconds: after which the run is stopped, between two operations; None: never.

        Raises:
            NetworkError: ONNX Runtime fails or is stopped, or an output is no array of numbers.
        """
        session = self._session if os.getpid() == self._pid else self._opened_again()
        options, stopped = _onnxruntime().RunOptions(), threading.Event()

        def stop() -> None:
            stopped.set()
            options.terminate = True

        timer = None if seconds is None else threading.Timer(seconds, stop)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            found = session.run(list(names), {self.input: images}, options)
        except MemoryError:
            raise
        except Exception as error:
            if stopped.is_set():
                raise NetworkError(
                    f"{self.path}: was not at its end after {seconds:g} s on the probe picture, "
                    "and was stopped; it may never end: give a file that you trust, or a faster "
                    "machine"
                ) from error
            raise NetworkError(
                f"{self.path}: ONNX Runtime cannot run it on images {list(images.shape)} "
                f"({_said(error)}); {_AGAIN}"
            ) from error
        finally:
            if timer is not None:
                timer.cancel()
        for name, values in zip(names, found, strict=True):
            if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
                kind = getattr(values, "dtype", type(values).__name__)
                raise NetworkError(f"{self.path}: output {name!r} is {kind}; expected floats")
        return [values.astype(np.float32, copy=False) for values in found]

    def _opened_again(self) -> Any:
        """In a forked child, where the parent's session would wait for ever."""
        with self._lock_of_child():
            if os.getpid() != self._pid:
                if _stamp(self.path) != self._stamp:
                    raise NetworkError(
                        f"{self.path}: was replaced after it was opened, and this forked process "
                        "needs it again; open it in the child, or start workers by spawn"
                    )
                self._session, self._pid = self._open(1), os.getpid()
            return self._session

    def _lock_of_child(self) -> threading.Lock:
        # Another of the parent's threads may have held its lock at the fork.
        if getattr(self, "_lock_pid", None) != os.getpid():
            self._lock, self._lock_pid = threading.Lock(), os.getpid()
        return self._lock

    def _open(self, threads: int | None) -> Any:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised; nothing is printed as well
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            return onnxruntime.InferenceSession(
                str(self.path), options, providers=list(self.providers)
            )
        except Exception as error:
            raise NetworkError(
                f"{self.path}: ONNX Runtime cannot read it ({_said(error)}); {_AGAIN}"
            ) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise NetworkError(
            "an ONNX file is run by onnxruntime, which is not installed; run "
            'pip install "embedcam[onnx]"'
        ) from error
    return onnxruntime


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when the file does; refuses what is no file of a size that can be."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise NetworkError(
            f"{path}: there is no such ONNX file ({error.strerror}); write it with "
            "`embedcam export INDEX -o network.onnx`"
        ) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a path ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise NetworkError(f"{path}: is not a regular file; give an ONNX file")
    if not 0 < found.st_size <= MAX_BYTES:
        raise NetworkError(
            f"{path}: has {found.st_size:,} bytes; an ONNX file in one piece has 1 to {MAX_BYTES:,}"
        )
    return found.st_ino, found.st_size, found.st_mtime_ns


def _checked_threads(threads: Any) -> int | None:
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= 1024):
        raise InputError(f"threads = {threads!r}; give a whole number from 1, or None")
    return None if threads is None else int(threads)


def _checked_providers(providers: Any) -> tuple[str, ...]:
    known = _onnxruntime().get_available_providers()
    given = None if isinstance(providers, str) else tuple(providers)
    if not given or not set(given) <= set(known):
        raise InputError(
            f"providers = {providers!r}; give a list of those this onnxruntime has: "
            f"{', '.join(known)}"
        )
    return given


def _said(error: Exception) -> str:
    """ONNX Runtime's message without its number, on one line, no longer than one reads."""
    text = " ".join(str(error).split())
    parts = text.split(" : ", 3)
    return (parts[-1] if text.startswith("[ONNXRuntimeError]") else text)[:300]
