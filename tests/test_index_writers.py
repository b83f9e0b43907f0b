"""Writers on a stranger's index, on a disk whose syncs fail, and where there are no locks."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import pytest
from index_samples import encoding_of, make, part

from embedcam.errors import IndexFormatError, InputError
from embedcam.index import Index, append, compact, rebuild_faiss, remove, sweep, verify
from embedcam.index import manifest as manifest_file

WRITERS: dict[str, Callable[[Path], Any]] = {
    "append": lambda path: append(path, part(12, 14, encoding_of("top-m"))),
    "remove": lambda path: remove(path, ["image-0003"]),
    "compact": lambda path: compact(path, rebuild_faiss="HNSW4"),
    "rebuild": rebuild_faiss,
    "replace": lambda path: make(path, 14, replace=True),
    "sweep": sweep,
}


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["parts", "fitted", ".building"])
def test_no_writer_follows_a_link(tmp_path: Path, writer: str, name: str) -> None:
    path, outside = make(tmp_path / "x", 12), tmp_path / "outside"
    if (path / name).exists():
        (path / name).rename(outside)
    (outside / "000007").mkdir(parents=True)
    (outside / "000007/layer0.codes.f32").write_text("mine")
    (path / name).symlink_to(outside)
    before = listed(outside)
    with pytest.raises(IndexFormatError, match=rf"x/{name}.*symbolic link"):
        WRITERS[writer](path)
    assert listed(outside) == before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "place", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.parents[1] / "made")]
)
def test_a_lock_is_a_plain_file(tmp_path: Path, writer: str, place: Callable[[Path], None]) -> None:
    path = make(tmp_path / "x", 12)
    (path / ".lock").unlink()
    place(path / ".lock")
    with pytest.raises(IndexFormatError, match=r"\.lock: is no regular file, so it cannot be lock"):
        WRITERS[writer](path)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("leftover", ["manifest.json.tmp", "faiss-000002.index.tmp"])
def test_a_leftover_that_is_a_link_makes_way(tmp_path: Path, leftover: str) -> None:
    path = make(tmp_path / "x", 12)
    (tmp_path / "mine").write_text("kept")
    (path / leftover).symlink_to(tmp_path / "mine")
    rebuild_faiss(path)
    assert (tmp_path / "mine").read_text() == "kept"
    assert verify(path).problems == []
    assert not (path / leftover).is_symlink()


def test_only_what_the_format_names_is_swept(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 12)
    for name in ("parts/000009/layer0.codes.f32", "parts/000010/notes.txt", "parts/mine/a.f32"):
        (path / name).parent.mkdir()
        (path / name).write_text("")
    (path / "faiss-mine.index").write_text("")
    sweep(path)
    assert sorted(os.listdir(path / "parts")) == ["000001", "000010", "mine"]
    assert (path / "faiss-mine.index").exists()


@pytest.mark.parametrize("writer", ["append", "compact", "rebuild", "replace"])
def test_the_old_generation_stays_until_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = make(tmp_path / "x", 12)
    old, sync, rename = {*listed(path)}, os.fsync, os.replace
    committed: list[str] = []

    def replace(source: Path, target: Path) -> None:
        rename(source, target)
        committed.extend([Path(target).name] if Path(target).name == "manifest.json" else [])

    def fails(descriptor: int) -> None:
        if committed:
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output error"):
            WRITERS[writer](path)
        assert committed
        assert old <= {*listed(path)}
        with pytest.raises(OSError, match="Input/output error"):
            sweep(path)  # a later writer that cannot see it durable either
        assert old <= {*listed(path)}
    assert verify(path).problems == []
    sweep(path)
    assert not (path / "faiss-000001.index").exists()
    assert verify(path).problems == []


def test_compact_with_another_faiss_file_is_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = make(tmp_path / "x", 12), os.replace
    remove(path, ["image-0003"])
    commits: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        commits.extend([target] if Path(target).name == "manifest.json" else [])
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert compact(path, rebuild_faiss="HNSW4") == 1
    assert len(commits) == 1
    with Index.open(path) as index:
        assert (index.manifest["generation"], index.manifest["faiss"]["factory"]) == (3, "HNSW4")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_locks_are_told_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, code: int
) -> None:
    path = make(tmp_path / "x", 12)

    def none(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(InputError, match=r"x: its file system cannot lock files .*local disk"):
        WRITERS[writer](path)
    assert verify(path).problems == []


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("IVF9999999,Flat", "needs at least 9999999 images to train, and there are 12"),
        ("IVF8(IVF1048576,Flat),Flat", "needs at least 1048576 images"),
        ("PQ8x24", "needs at least 16777216 images"),
        ("IMI2x14,Flat", r"cannot be used \(2\^28 lists are too many for 12 images\)"),
    ],
)
def test_what_a_stranger_s_factory_asks_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, what: str
) -> None:
    path = make(tmp_path / "x", 12)
    manifest = manifest_file.read(path)
    manifest["faiss"]["factory"] = factory
    manifest_file.write(path, manifest)

    def never(*_: object) -> None:
        raise AssertionError("FAISS was asked for it")

    monkeypatch.setattr(faiss, "index_factory", never)
    with pytest.raises(InputError, match=what):
        rebuild_faiss(path)
