"""Too little memory: told as that by whatever library met it, and with nothing else concluded."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from embedcam import EmbeddingNetwork, cli
from embedcam.errors import InputError, NetworkError
from embedcam.memory import ran_out, told

TOO_LITTLE = "embedcam: there is too little memory"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate"),
        RuntimeError("std::bad_alloc"),
        SystemError("error return without exception set"),
        SystemError("<built-in function f> returned NULL without setting an exception"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
        caused(InputError("FAISS cannot"), MemoryError()),
        caused(NetworkError("its forward pass failed"), RuntimeError("CUDA out of memory. Tried")),
    ],
)
def test_the_many_ways_to_say_it(error: Exception) -> None:
    assert ran_out(error)
    said = told(error, {"batch_size": 8, "workers": 2})
    assert str(said).startswith("there is too little memory (")
    assert str(said).endswith(
        "; take a smaller --batch-size or fewer --workers, or allow it more, and run the same "
        "command again"
    )
    assert "enforce fail" not in str(said)


@pytest.mark.parametrize(
    "error",
    [
        InputError("out of memory.png: cannot be read"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("shapes differ"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
    ],
)
def test_what_is_something_else(error: Exception) -> None:
    assert not ran_out(error)
    assert told(error, {}) is error


def test_a_smaller_input_that_memory_stops_tells_nothing_of_a_layout() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[-1] < 32:
                raise RuntimeError("could not create a primitive")
            return self.conv(images).mean((2, 3))

    network = EmbeddingNetwork(Short().eval(), "conv", input_size=(32, 32))
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        network.forward(torch.zeros(1, 3, 32, 32))


def test_the_command_line_says_it_whenever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object, **__: object) -> None:
        raise MemoryError

    for place in ("embedcam.index.Index.open", "embedcam.cli._say", "embedcam.cli.parser.parser"):
        monkeypatch.setattr(place, none)
        assert cli.main(["info", str(tmp_path)]) == 6
        said = capsys.readouterr().err
        assert said.startswith(TOO_LITTLE)
        assert said.count("\n") == 1
        with pytest.raises(MemoryError):
            cli.main(["info", str(tmp_path), "--debug"])
