"""An ONNX file opened and run. The only file that imports onnxruntime."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from .._checks import whole
from ..errors import InputError, NetworkError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, RunOptions

PROVIDERS = ("CPUExecutionProvider",)
MAX_BYTES = (1 << 31) - 1
"""One protobuf holds no more; a file that has its numbers in others beside it is refused."""
PROBE_SECONDS = 60.0
"""A run that is not at its end by then is stopped, where a network is asked for the first time."""
AGAIN = "write it again with `embedcam export`"


class Session:
    """One file, its one input and its outputs. Concurrent runs are safe, forks' on one thread."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        providers: Sequence[str] = PROVIDERS,
    ) -> None:
        self.path = Path(path)
        self.threads = None if threads is None else whole("threads", threads, 1, 1024)
        known = ", ".join(available := _onnxruntime().get_available_providers())
        if isinstance(providers, str) or not providers or not set(providers) <= set(available):
            raise InputError(
                f"providers = {providers!r}; give a list of those this onnxruntime has: {known}"
            )
        self.providers = tuple(providers)
        self._stamp = _stamp(self.path)
        refuse_external(self.path)
        self._session = self._open(self.threads)
        self._pid = self._lock_pid = os.getpid()
        self._lock = threading.Lock()
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
        """Return those outputs of a batch `[B C H W]`, float32; stopped after so many seconds."""
        session = self._session if os.getpid() == self._pid else self._opened_again()
        options, timer = None, None
        if seconds is not None:
            options, stopped = _onnxruntime().RunOptions(), threading.Event()
            timer = threading.Timer(seconds, _stop, (options, stopped))
            timer.daemon = True
            timer.start()
        try:
            arrays = session.run(list(names), {self.input: images}, options)
        except MemoryError:
            raise
        except Exception as error:
            if timer is not None and stopped.is_set():
                raise NetworkError(
                    f"{self.path}: was not at its end after {seconds:g} s on the probe picture, "
                    "and was stopped; give a file that you trust, or a faster machine"
                ) from error
            raise NetworkError(
                f"{self.path}: ONNX Runtime cannot run it on images {list(images.shape)} "
                f"({_message(error)}); {AGAIN}"
            ) from error
        finally:
            if timer is not None:
                timer.cancel()
        for name, values in zip(names, arrays, strict=True):
            if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
                kind = getattr(values, "dtype", type(values).__name__)
                raise NetworkError(f"{self.path}: output {name!r} is {kind}; expected floats")
        return [values.astype(np.float32, copy=False) for values in arrays]

    def _opened_again(self) -> InferenceSession:
        """Return a session in a forked child, where the parent's would wait for ever."""
        # Another of the parent's threads may have held its lock at the fork.
        if self._lock_pid != os.getpid():
            self._lock, self._lock_pid = threading.Lock(), os.getpid()
        with self._lock:
            if os.getpid() != self._pid:
                if _stamp(self.path) != self._stamp:
                    raise NetworkError(
                        f"{self.path}: was replaced after it was opened, and this forked process "
                        "needs it again; open it in the child, or start workers by spawn"
                    )
                self._session, self._pid = self._open(1), os.getpid()
            return self._session

    def _open(self, threads: int | None) -> InferenceSession:
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
                f"{self.path}: ONNX Runtime cannot read it ({_message(error)}); {AGAIN}"
            ) from error


def runtime_version() -> str:
    """Return the version of ONNX Runtime."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> ModuleType:
    # Newer ones tell their maker about sessions, unless this stands there when they are imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise NetworkError(
            "an ONNX file is run by onnxruntime, which is not installed; run "
            'pip install "embedcam[onnx]"'
        ) from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when the file does; refuse what is no file of a size that can be."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise NetworkError(
            f"{path}: there is no such ONNX file ({error.strerror}); write it with "
            "`embedcam export INDEX -o network.onnx`"
        ) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a path ({error})") from error
    if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= MAX_BYTES:
        raise NetworkError(
            f"{path}: is not a regular file of 1 to {MAX_BYTES:,} bytes; give an ONNX file of one "
            "piece"
        )
    return state.st_ino, state.st_size, state.st_mtime_ns


def _stop(options: RunOptions, stopped: threading.Event) -> None:
    stopped.set()
    options.terminate = True


def _message(error: Exception) -> str:
    """Return ONNX Runtime's message without its number, on one line, no longer than one reads."""
    text = " ".join(str(error).split())
    return (text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text)[:300]


# Numbers in other files: found before ONNX Runtime would open them. The file is read as protobuf is
# written, by field numbers alone; only messages in which a tensor can stand are entered.

# Of each message, the fields that hold a message in which a tensor can stand (onnx.proto).
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def refuse_external(path: Path) -> None:
    """Refuse a file that names others, which may be any file of this machine."""
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            external = _is_external(data)
    except OSError as error:
        raise NetworkError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise NetworkError(f"{path}: ONNX Runtime cannot read it ({error}); {AGAIN}") from error
    if external:
        raise NetworkError(
            f"{path}: keeps numbers in other files, which are not opened; write it in one piece, "
            "with `embedcam export` or onnx.save(model, path, save_as_external_data=False)"
        )


def _is_external(data: mmap.mmap) -> bool:
    left = [(0, len(data), "model")]
    while left:
        start, stop, kind = left.pop()
        for field, first, last in _fields(data, start, stop):
            if kind == "tensor" and field in (_EXTERNAL_DATA, _DATA_LOCATION):
                # A location of 0 is the file itself.
                if field == _EXTERNAL_DATA or data[first:last].strip(b"\x80") != b"\x00":
                    return True
            elif field in _FIELDS[kind]:
                left.append((first, last, _FIELDS[kind][field]))
    return False


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, first byte, last byte + 1) of each field of a message."""
    at = start
    while at < stop:
        key, at = _varint(data, at, stop)
        first, wire = at, key & 7
        if wire == 0:
            at = _varint(data, at, stop)[1]
        elif wire == 2:
            size, first = _varint(data, at, stop)
            at = first + size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("it is no protobuf")
        if at > stop:
            raise ValueError("it is cut short")
        yield key >> 3, first, at


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(data[at : min(at + 10, stop)]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("it is no protobuf")
