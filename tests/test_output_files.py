"""Files that a command writes: a link stays one, and nothing is written through one unasked."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcam._files import fresh, write_whole
from embedcam.errors import InputError
from embedcam.explain.drawing import save_picture
from embedcam.offline.checkpoint import Checkpoint


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to("real.html")
    write_whole(tmp_path / "page.html", "new")
    assert os.readlink(tmp_path / "page.html") == "real.html"
    assert (tmp_path / "real.html").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "real.html"]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to("page.html")
    with pytest.raises(InputError, match=r"page\.html: cannot be written \(Too many levels"):
        write_whole(tmp_path / "page.html", "new")
    assert os.listdir(tmp_path) == ["page.html"]


def test_an_array_of_unfinished_work_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    scratch = Checkpoint(tmp_path / "s", "k")
    (tmp_path / "s" / "sums.array").symlink_to(tmp_path / "mine")
    np.testing.assert_array_equal(scratch.array("sums", "f4", (2, 3)), 0)
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_full_disk_leaves_the_picture_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "why.png").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"why\.png: cannot be written \(No space left"):
        save_picture(lambda: Image.new("RGB", (9, 9)), tmp_path / "why.png")
    assert os.listdir(tmp_path) == ["why.png"]
    assert (tmp_path / "why.png").read_text() == "before"
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*other'"),
        fresh(tmp_path / "other"),
    ):
        pass


def test_rights_stay_and_a_pipe_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").touch(0o640)
    (tmp_path / "numbers.csv").chmod(0o640)
    write_whole(tmp_path / "numbers.csv", "1")
    assert (tmp_path / "numbers.csv").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "1,2")
    assert os.read(reader, 9) == b"1,2"
    os.close(reader)
