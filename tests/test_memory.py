"""Too little memory: said as that, and never taken for a broken picture or a query's result."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from build_samples import DENSE, everything, pictures, toy
from photo_samples import picture
from PIL import Image, ImageFile
from torch import nn

from embedcam import EmbeddingNetwork, Explainer, build_index, cli, find_images, write_report
from embedcam import errors as memory
from embedcam.cli.command_line import _say
from embedcam.errors import ImageError, InputError, NetworkError
from embedcam.images import ImageSource, read_image
from embedcam.report import LINES, PAGE

TORCH = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
)
FAILURES = [
    MemoryError(),
    RuntimeError(TORCH),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    OSError("out of memory error when reading image file"),
    ImportError("libx.so: failed to map segment from shared object"),
    SystemError("error return without exception set"),
    SystemError("<built-in function f> returned NULL without setting an exception"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: f"{type(e).__name__} {e}"[:40])
def test_memory_is_named_whoever_ran_out(error, capsys) -> None:
    for kind in (None, NetworkError, InputError):
        given = kind("it cannot be used") if kind else error
        given.__cause__ = error if kind else None
        assert memory.ran_out(given)
        assert _say(memory.told(given, {"batch_size": 4, "workers": None})) == 6
        said = capsys.readouterr().err
        assert said.startswith("embedcam: there is too little memory (")
        assert said.endswith(
            "); take a smaller --batch-size or fewer --workers, or allow it more, and run the "
            "same command again\n"
        )
        assert said.count("\n") == 1
        assert "enforce fail" not in said


def test_other_failures_are_themselves_and_only_options_of_the_command_are_named() -> None:
    for error in (
        ImageError("out of memory.png: is empty"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        assert not memory.ran_out(error)
        assert memory.told(error, {}) is error
    assert str(memory.told(MemoryError(), {})) == (
        "there is too little memory (MemoryError); allow it more, and run the same command again"
    )
    assert "take a smaller --batch-size, or" in str(memory.told(MemoryError(), {"batch_size": 3}))


@contextmanager
def short(raised: Callable[[], Exception], left: bool = False) -> Iterator[None]:
    """Let decoding fail as where memory is short, or where much is asked of what is `left`."""

    def fail(self: Image.Image) -> Any:
        raise raised()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", fail)
        patch.setattr(memory, "is_left", lambda n_bytes: left)
        yield


WAYS = [lambda: MemoryError(), lambda: OSError("broken data stream when reading image file")]


@pytest.mark.parametrize("raised", WAYS, ids=["memory", "broken stream"])
def test_a_picture_is_not_broken_because_memory_ran_out(tmp_path, raised, monkeypatch) -> None:
    photo = tmp_path / "a.png"
    picture(0, 1).save(photo)
    message = r"a\.png: there was too little memory to decode it"
    with short(raised), pytest.raises(MemoryError, match=message):
        read_image(photo)
    message = r"a\.png: cannot be decoded \(MemoryError\)"
    with short(MemoryError, left=True), pytest.raises(ImageError, match=message):
        read_image(photo)  # it asks for absurd amounts
    own, failures = ImageFile.ImageFile.load, [WAYS[1]()]

    def once(self: Any) -> Any:
        if failures:
            raise failures.pop()
        return own(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", once)
    assert read_image(photo).size == (48, 40)  # what failed once is read again


@pytest.mark.parametrize("raised", WAYS, ids=["memory", "broken stream"])
def test_no_picture_is_skipped_because_memory_ran_out(tmp_path, raised) -> None:
    source, it = pictures(tmp_path / "p"), toy()
    asked = {"batch_size": 4, "workers": 1, "progress": False, "on_unreadable": "skip"}
    build_index(source, it.network, tmp_path / "whole", DENSE, **asked)
    with short(raised), pytest.raises(MemoryError):
        build_index(source, it.network, tmp_path / "i", DENSE, **asked)
    assert build_index(source, it.network, tmp_path / "i", DENSE, **asked).skipped == []
    assert everything(tmp_path / "i") == everything(tmp_path / "whole")


@pytest.fixture(scope="module")
def explainer(dense: Path, network: EmbeddingNetwork) -> Explainer:
    return Explainer(dense, network, n_neighbors=3)


@pytest.fixture
def queries(tmp_path: Path) -> ImageSource:
    folder = tmp_path / "q"
    folder.mkdir()
    for number in range(5):
        picture(number % 3, 50 + number).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("a letter")
    return find_images(folder, "none")


def reported(explainer: Explainer, source: ImageSource, folder: Path) -> Any:
    return write_report(explainer, source, folder, batch_size=2)


@pytest.mark.parametrize("raised", WAYS, ids=["memory", "broken stream"])
def test_no_query_is_unreadable_because_memory_ran_out(
    explainer, queries, tmp_path, raised
) -> None:
    reported(explainer, queries, tmp_path / "whole")
    with short(raised), pytest.raises(MemoryError):
        reported(explainer, queries, tmp_path / "out")
    found = reported(explainer, queries, tmp_path / "out")
    assert [Path(name).name for name, _ in found.unreadable] == ["broken.png"]
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_no_query_is_kept_as_failed_because_memory_ran_out(
    explainer, queries, tmp_path, monkeypatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NetworkError("the network cannot be run") from RuntimeError(TORCH)

    with monkeypatch.context() as patch:
        patch.setattr(Explainer, "explain_batch", fail)
        with pytest.raises(NetworkError) as caught:
            reported(explainer, queries, tmp_path / "out")
    assert memory.ran_out(caught.value)
    assert not list((tmp_path / "out/.finished").iterdir())
    assert len(reported(explainer, queries, tmp_path / "out").unreadable) == 1


@pytest.mark.parametrize("name", [LINES, PAGE, "report.json"])
def test_a_damaged_report_is_repaired_by_a_rerun(explainer, queries, tmp_path, name) -> None:
    assert reported(explainer, queries, tmp_path / "out").n_new == 6
    before, file = everything(tmp_path / "out"), tmp_path / "out" / name
    if name == "report.json":
        said = json.loads(file.read_text())
        assert sorted(said["files"]) == [LINES, PAGE]
        file.write_text(json.dumps({**said, "files": {}}))
    else:
        file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    assert reported(explainer, queries, tmp_path / "out").n_new == 6
    assert everything(tmp_path / "out") == before
    assert reported(explainer, queries, tmp_path / "out").n_new == 0


def test_what_is_finished_proves_where_it_belongs(
    explainer, queries, tmp_path, monkeypatch
) -> None:
    """Another query's file, though whole, and another report's are explained anew."""
    write_report(explainer, queries, tmp_path / "whole", batch_size=1)

    def stopped(folder: Path, **asked: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("embedcam.report.report._assemble", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_report(explainer, queries, folder, batch_size=1, **asked)
        return folder / ".finished"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kept = stopped(tmp_path / "out")
    foreign = stopped(tmp_path / "foreign", n_neighbors=2)
    (kept / "00000001.json").write_bytes((kept / "00000000.json").read_bytes())
    (kept / "00000002.json").write_bytes((foreign / "00000002.json").read_bytes())
    assert write_report(explainer, queries, tmp_path / "out", batch_size=1).n_new == 2
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_report_s_own_places_are_no_links(explainer, queries, tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("00000001.json", "00000002.json.tmp", "notes.tmp"):
        (tmp_path / "theirs" / name).write_text("precious")
    reported(explainer, queries, tmp_path / "out")
    (tmp_path / "out/notes.tmp").write_text("mine")
    (tmp_path / "out/.finished").symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"\.finished: is a symbolic link; give a new folder"):
        reported(explainer, queries, tmp_path / "out")
    assert len(os.listdir(tmp_path / "theirs")) == 3
    assert (tmp_path / "out/notes.tmp").read_text() == "mine"
    (tmp_path / "out/.finished").unlink()
    (tmp_path / "out/report.json").unlink()
    os.mkfifo(tmp_path / "out/report.json")
    with pytest.raises(InputError, match=r"report\.json: is not a report's"):
        reported(explainer, queries, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc how much is used")
def test_a_decoder_under_a_real_limit(tmp_path: Path) -> None:
    """JPEG's own decoder calls it a broken stream, or Pillow memory; both are told as memory."""
    file = tmp_path / "big.jpg"
    Image.effect_noise((3000, 3000), 40).convert("RGB").save(file, quality=50)
    program = """
import resource, sys
from embedcam.images import read_image
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
read_image(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True)
    assert "\nMemoryError: " in done.stderr, done


def test_a_smaller_input_that_memory_stops_tells_nothing_of_a_layout() -> None:
    class Short(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[-1] < 32:
                raise RuntimeError("could not create a primitive")
            return super().forward(images).mean((2, 3))

    network = EmbeddingNetwork(Short(nn.Conv2d(3, 8, 4, 4)).eval(), "0", input_size=(32, 32))
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        network.forward(torch.zeros(1, 3, 32, 32))


def test_the_command_line_says_it_whenever_it_comes(tmp_path, monkeypatch, capsys) -> None:
    def none(*_: object, **__: object) -> None:
        raise MemoryError

    for place in ("index.Index.open", "cli.command_line._say", "cli.parser.parser"):
        monkeypatch.setattr(f"embedcam.{place}", none)
        assert cli.main(["info", str(tmp_path)]) == 6
        said = capsys.readouterr().err
        assert said.startswith("embedcam: there is too little memory")
        assert said.count("\n") == 1
        with pytest.raises(MemoryError):
            cli.main(["info", str(tmp_path), "--debug"])
