"""Unfinished work on disk: found again if whole and of the same key, else as if it never was."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam.errors import InputError
from embedcam.offline.checkpoint import Checkpoint, finished_job, remove_checkpoint

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([], np.uint8),
    "c": np.arange(5)[::-1],
}


def kept(path, key="k") -> Checkpoint:
    scratch = Checkpoint(path, key)
    scratch.write("stage", 3, ARRAYS)
    return scratch


def test_arrays_come_back_as_they_were(tmp_path) -> None:
    found = kept(tmp_path / "s").read("stage", 3)
    for (name, one), (expected, array) in zip(found.items(), ARRAYS.items(), strict=True):
        assert (name, one.dtype) == (expected, array.dtype)
        np.testing.assert_array_equal(one, array)
    assert not found["a"].flags.writeable
    scratch, file = Checkpoint(tmp_path / "s", "k"), tmp_path / "s" / "stage-0000003" / "a.bin"
    assert list(scratch.read("stage", 3, "c")) == ["c"]
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(InputError, match=r"a\.bin: 52 bytes where 48 were written"):
        scratch.read("stage", 3)


def test_the_same_key_finds_its_chunks_and_another_an_empty_folder(tmp_path) -> None:
    kept(tmp_path / "s")
    assert Checkpoint(tmp_path / "s", "k").intact("stage", 3)
    assert not Checkpoint(tmp_path / "s", "k").intact("stage", 4)
    assert not Checkpoint(tmp_path / "s", "other").intact("stage", 3)
    assert os.listdir(tmp_path / "s") == ["key.json"]
    for text in ("", "{", "[]", '{"key": 3}', "{}"):
        kept(tmp_path / "s")
        (tmp_path / "s" / "key.json").write_text(text)
        assert not Checkpoint(tmp_path / "s", "k").intact("stage", 3)


@settings(max_examples=150)
@given(st.data())
def test_a_chunk_changed_cut_or_missing_a_file_is_dropped(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("s")
    kept(folder)
    chunk = folder / "stage-0000003"
    file = chunk / data.draw(st.sampled_from(["a.bin", "c.bin", "arrays.json"]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["cut", "changed", "missing"]))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content[:place] if damage == "cut" else content)
    if damage == "missing":
        file.unlink()
    scratch = Checkpoint(folder, "k")
    if scratch.intact("stage", 3):  # a change that says the same, as in the listing's blanks
        found = scratch.read("stage", 3)
        assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    else:
        assert damage == "missing" or not chunk.exists()
        scratch.write("stage", 3, ARRAYS)
        assert scratch.intact("stage", 3)


def test_writing_again_replaces_and_leftovers_go(tmp_path) -> None:
    scratch = kept(tmp_path / "s")
    scratch.write("stage", 3, {"a": np.ones(2)})
    assert list(scratch.read("stage", 3)) == ["a"]
    (tmp_path / "s" / "stage-0000004.tmp").mkdir()
    (tmp_path / "s" / "promise.json.tmp").write_text("{")
    Checkpoint(tmp_path / "s", "k")
    assert sorted(os.listdir(tmp_path / "s")) == ["key.json", "stage-0000003"]


def test_arrays_on_disk_are_claimed_before_they_are_written(tmp_path, monkeypatch) -> None:
    scratch = Checkpoint(tmp_path / "s", "k")
    array = scratch.array("x", "float32", (1000, 30))
    assert not array.any()
    assert os.stat(tmp_path / "s" / "x.array").st_blocks * 512 >= 120000
    array[:] = 7
    assert not scratch.array("x", "float32", (10, 3)).any()  # an earlier run's is not taken over
    assert scratch.array("empty", "uint8", (0, 4)).shape == (0, 4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        scratch.array("y", "uint8", (5,))


def test_a_job_is_remembered_until_its_folder_is_gone(tmp_path) -> None:
    path = tmp_path / "s"
    assert finished_job(path, 3) is None
    scratch = kept(path)
    scratch.mark_commit("job", 3)
    assert finished_job(path, 3) == "job"
    assert finished_job(path, 2) is None
    (path / "promise.json").write_text("{")
    assert finished_job(path, 3) is None
    for _ in range(2):
        remove_checkpoint(path)
        assert not path.exists()


def test_what_is_remembered_is_deleted_last(tmp_path, monkeypatch) -> None:
    scratch, unlink = kept(tmp_path / "s"), os.unlink
    scratch.array("x", "uint8", (3,))
    scratch.mark_commit("job", 1)
    left: list[list[str]] = []

    def watched(name, **options) -> None:
        left.append(os.listdir(tmp_path / "s"))
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", watched)
    remove_checkpoint(scratch.path)
    assert left[-1] == ["promise.json"]
    assert all("promise.json" in names for names in left)
