"""Files of strangers and of killed writers: what is opened, written, locked and deleted."""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_samples import encoding_of, make, part
from PIL import Image

from embedcam import _files
from embedcam.errors import EmbedcamError, IndexFormatError, InputError
from embedcam.explain.drawing import save_picture
from embedcam.index import (
    Index,
    append,
    check_target,
    compact,
    lock,
    rebuild_faiss,
    remove,
    sweep,
    verify,
)
from embedcam.offline.checkpoint import Checkpoint, finished_job


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """Somebody's folder outside, with names and contents as a generation's."""
    folder = tmp_path / "holiday"
    for name in ("20240101", "000001.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "ids.utf8").write_text("precious")
    (folder / "123456").write_text("a file")
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "append": lambda path: append(path, part(30, 34, encoding_of("top-m"))),
    "remove": lambda path: remove(path, ["image-0003"]),
    "compact": compact,
    "compact and rebuild": lambda path: compact(path, rebuild_faiss=True),
    "rebuild": rebuild_faiss,
    "sweep": sweep,
    "replace": lambda path: make(path, 9, replace=True),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", ["parts", "fitted", ".building", "manifest.json", ".lock"])
def test_no_change_follows_a_link(tmp_path: Path, precious: Path, name: str, change: str) -> None:
    path = make(tmp_path / "x", 6)
    target = precious
    if name == "manifest.json":
        target = Path(shutil.move(path / name, precious / name))
    elif name == ".lock":
        target = precious / "planted"
        (path / name).unlink()
    elif name != ".building":
        shutil.rmtree(path / name)
    (path / name).symlink_to(target)
    before = everything(tmp_path)
    with pytest.raises(IndexFormatError, match=name.replace(".", r"\.")):
        CHANGES[change](path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("inside", ["parts/000001", "parts/000001/ids.utf8"])
def test_a_link_below_the_parts_is_refused_before_anything_is_touched(tmp_path, precious, inside):
    path = make(tmp_path / "x", 6)
    away = precious / Path(inside).name
    shutil.move(path / inside, away)
    (path / inside).symlink_to(away)
    (path / "faiss-000007.index").write_text("of a killed writer")
    before = everything(tmp_path)
    for change in ("rebuild", "compact", "remove", "append"):
        with pytest.raises(IndexFormatError, match="symbolic link"):
            CHANGES[change](path)
    assert everything(tmp_path) == before


def test_the_index_itself_may_be_a_link(tmp_path: Path) -> None:
    make(tmp_path / "x", 6)
    (tmp_path / "current").symlink_to("x")
    link = tmp_path / "current"
    remove(link, ["image-0001"])
    assert compact(link, rebuild_faiss="HNSW8") == 1
    assert len(Index.open(link)) == 5
    assert verify(link).problems == []
    assert link.is_symlink()


def test_the_sweep_deletes_only_what_the_format_names(tmp_path: Path, precious: Path) -> None:
    path = make(tmp_path / "x", 6)
    shutil.copytree(precious / "20240101", path / "parts/000009")
    shutil.copytree(precious / "20240101", path / "fitted/000009.tmp")
    for leftover in ("faiss-000009.index.tmp", "tombstones-000009.u64", "manifest.json.tmp"):
        (path / leftover).write_text("of a killed writer")
    (path / "notes.txt").write_text("mine")
    (path / "parts/20240102").mkdir()
    (path / "parts/20240102/me.jpg").write_text("mine")
    (path / "parts/123456").write_text("a file")
    (path / "faiss-000008.index").symlink_to(precious / "123456")
    (path / "parts/000008").symlink_to(precious)
    theirs, whole = everything(precious), everything(path)
    sweep(path)
    assert whole.keys() - everything(path).keys() == {
        "parts/000009", "parts/000009/ids.utf8", "fitted/000009.tmp",
        "fitted/000009.tmp/ids.utf8", "faiss-000009.index.tmp", "tombstones-000009.u64",
        "manifest.json.tmp",
    }  # fmt: skip
    assert everything(precious) == theirs


@pytest.mark.parametrize("name", ["parts/20240101/me.jpg", "fitted/000001/me.jpg"])
def test_a_folder_with_other_parts_is_no_unfinished_index(tmp_path: Path, name: str) -> None:
    (tmp_path / "cars" / name).parent.mkdir(parents=True)
    (tmp_path / "cars" / name).write_text("precious")
    for use in (check_target, lambda path: make(path, 3)):
        with pytest.raises(InputError, match=f"holds '{name}', which is no part of an index"):
            use(tmp_path / "cars")
    assert (tmp_path / "cars" / name).read_text() == "precious"
    assert not (tmp_path / "cars/.lock").exists()


PLANTED: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to(path.parent.parent / "holiday"),
    "file": Path.touch,
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_a_lock_that_is_no_file(tmp_path: Path, precious: Path, kind: str) -> None:
    path = make(tmp_path / "x", 4)
    (path / ".lock").unlink()
    PLANTED[kind](path / ".lock")
    with pytest.raises(IndexFormatError, match=r"\.lock: is no regular file, so .*delete it"):
        compact(path)
    with pytest.raises(IndexFormatError, match=r"\.lock"), lock(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    path = make(tmp_path / "x", 4)
    monkeypatch.setattr("fcntl.flock", failing(number))
    with pytest.raises(InputError, match=r"its file system cannot lock files \(.*; write"):
        compact(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_a_manifest_that_is_no_file_does_not_hang(tmp_path, monkeypatch, kind):
    path = make(tmp_path / "x", 4)
    (path / "manifest.json").unlink()
    monkeypatch.chdir(path)  # a socket's name may not be long
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as it:
            it.bind("manifest.json")
    else:
        PLANTED[kind](path / "manifest.json")
    for use in (Index.open, compact, verify, lambda path: make(path, 4, replace=True)):
        with pytest.raises(IndexFormatError, match=r"manifest\.json: is not a regular file"):
            use(path)


def test_the_old_generation_stays_until_the_new_one_is_durable(tmp_path, monkeypatch):
    path = make(tmp_path / "x", 6)
    remove(path, ["image-0001"])
    old = (path / "manifest.json").read_bytes()

    def lost(source: Path, target: Path) -> None:
        os.replace(source, target)
        raise OSError(errno.EIO, "Input/output error", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("embedcam.index.manifest.replace", lost)
        with pytest.raises(OSError, match="Input/output error"):
            compact(path)
    new, both = (path / "manifest.json").read_bytes(), everything(path)
    assert new != old
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            sweep(path)  # which sees that it is not durable
    assert everything(path) == both
    (path / "manifest.json").write_bytes(old)  # after a power failure
    assert verify(path).problems == []
    (path / "manifest.json").write_bytes(new)
    sweep(path)
    assert sorted(os.listdir(path / "parts")) == ["000003"]
    assert verify(path).problems == []


def test_compacting_with_a_rebuild_is_one_change_and_a_second_time_none(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 8)
    remove(path, ["image-0002"])
    assert compact(path, rebuild_faiss="HNSW8") == 1
    assert Index.open(path).manifest.faiss.factory == "HNSW8"
    whole = everything(path)
    assert compact(path, rebuild_faiss=True) == 0
    assert everything(path) == whole
    file = path / "faiss-000003.index"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")  # not what the manifest says of it
    assert compact(path, rebuild_faiss=True) == 0
    assert verify(path).problems == []
    assert compact(path, rebuild_faiss="none") == 0
    assert Index.open(path).manifest.faiss is None
    with pytest.raises(InputError, match="built without FAISS; name a factory"):
        compact(path, rebuild_faiss=True)


def test_every_folder_that_is_made_is_synced_into_the_one_above(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    path = tmp_path / "a" / "b" / "x"
    with lock(path):
        pass
    Checkpoint.owned(path / ".building", "k").mark_commit("job", 1)
    note = path / ".building/promise.json"
    assert {place.stat().st_ino for place in (note, *note.parents[:5])} <= synced


@pytest.mark.parametrize("kind", ["link", "file", "pipe"])
def test_scratch_that_is_no_folder(tmp_path: Path, precious: Path, kind: str) -> None:
    place, before = tmp_path / "x/.building", everything(precious)
    place.parent.mkdir()
    PLANTED[kind](place)
    assert finished_job(place, 1) is None
    with pytest.raises(InputError, match=r"\.building: is .*; delete it and run the same command"):
        Checkpoint.owned(place, "k")
    assert everything(precious) == before


def test_links_within_scratch_are_not_followed(tmp_path: Path, precious: Path) -> None:
    before = everything(precious)
    scratch = Checkpoint.owned(tmp_path / "s", "k")
    (tmp_path / "s" / "sums.array").symlink_to(precious / "123456")
    np.testing.assert_array_equal(scratch.array("f4", (2, 3)), 0)
    (tmp_path / "s" / "sums.array").unlink()
    (tmp_path / "s" / "embed-0000001.tmp").symlink_to(precious)
    (tmp_path / "s" / "more").symlink_to(precious)
    Checkpoint.owned(tmp_path / "s", "k")
    assert sorted(os.listdir(tmp_path / "s")) == ["key.json", "more"]
    (tmp_path / "s" / "promise.json").symlink_to(precious / "123456")
    assert finished_job(tmp_path / "s", 1) is None
    Checkpoint.owned(tmp_path / "s", "other")
    assert os.listdir(tmp_path / "s") == ["key.json"]
    assert everything(precious) == before


def test_a_file_is_read_only_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/file").write_text("words")
    (tmp_path / "out").symlink_to("in")
    (tmp_path / "in/link").symlink_to("deep")
    (tmp_path / "in/up").write_text("")
    assert _files.read_regular(tmp_path / "out", "deep/file", 5) == b"words"
    for name, why in {
        "out/deep/file": "lies behind a symbolic link",
        "in/link/file": "lies behind a symbolic link",
        "in/link": "is a symbolic link",
        "in/deep": "is not a regular file",
        "in/up/file": "lies below what is no folder",
        "in/../in/up": "is no plain name below its folder",
    }.items():
        with pytest.raises(_files.NotPlain, match=why):
            _files.read_regular(tmp_path, name, 5)
    with pytest.raises(_files.NotPlain, match="has 5 bytes, and at most 4 are read"):
        _files.read_regular(tmp_path, "in/deep/file", 4)
    with pytest.raises(FileNotFoundError, match="in/deep/none"):
        _files.open_regular(tmp_path, "in/deep/none")


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "file.tmp").symlink_to("theirs")
    with _files.written(tmp_path / "file") as file:
        file.write(b"mine")
    writer = _files.written(tmp_path / "file")
    writer.__enter__().write(b"half")
    assert not writer.__exit__(EmbedcamError, EmbedcamError("stopped"), None)
    assert everything(tmp_path) == {"file": b"mine", "theirs": b"precious"}


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to("real.html")
    _files.write_whole(tmp_path / "page.html", "new")
    assert os.readlink(tmp_path / "page.html") == "real.html"
    assert (tmp_path / "real.html").read_text() == "new"
    (tmp_path / "loop.html").symlink_to("loop.html")
    with pytest.raises(InputError, match=r"loop\.html: cannot be written \(Too many levels"):
        _files.write_whole(tmp_path / "loop.html", "new")
    assert sorted(os.listdir(tmp_path)) == ["loop.html", "page.html", "real.html"]


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "why.png").write_text("before")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(InputError, match=r"why\.png: cannot be written \(No space left"):
        save_picture(lambda: Image.new("RGB", (9, 9)), tmp_path / "why.png")
    assert everything(tmp_path) == {"why.png": b"before"}


def test_rights_stay_and_a_pipe_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").touch(0o640)
    (tmp_path / "numbers.csv").chmod(0o640)
    _files.write_whole(tmp_path / "numbers.csv", "1")
    assert (tmp_path / "numbers.csv").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    _files.write_whole(tmp_path / "pipe", "1,2")
    assert os.read(reader, 9) == b"1,2"
    os.close(reader)
