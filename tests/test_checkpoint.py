"""Unfinished work on disk: found again if whole and of the same key, else as if it never was."""

import errno
import json
import os
import zlib

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
    scratch = Checkpoint.owned(path, key)
    scratch.write("stage", 3, ARRAYS)
    return scratch


def test_arrays_come_back_as_they_were(tmp_path) -> None:
    found = kept(tmp_path / "s").read("stage", 3)
    for (name, one), (expected, array) in zip(found.items(), ARRAYS.items(), strict=True):
        assert (name, one.dtype) == (expected, array.dtype)
        np.testing.assert_array_equal(one, array)
    assert not found["a"].flags.writeable
    scratch, file = (
        Checkpoint.owned(tmp_path / "s", "k"),
        tmp_path / "s" / "stage-0000003" / "a.bin",
    )
    assert list(scratch.read("stage", 3, "c")) == ["c"]
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(InputError, match=r"a\.bin: 52 bytes where 48 were written"):
        scratch.read("stage", 3)


def test_the_same_key_finds_its_chunks_and_another_an_empty_folder(tmp_path) -> None:
    kept(tmp_path / "s")
    assert Checkpoint.owned(tmp_path / "s", "k").intact("stage", 3)
    assert not Checkpoint.owned(tmp_path / "s", "k").intact("stage", 4)
    assert not Checkpoint.owned(tmp_path / "s", "other").intact("stage", 3)
    assert os.listdir(tmp_path / "s") == ["key.json"]
    for text in ("", "{", "[]", '{"key": 3}', "{}"):
        kept(tmp_path / "s")
        (tmp_path / "s" / "key.json").write_text(text)
        assert not Checkpoint.owned(tmp_path / "s", "k").intact("stage", 3)


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
    scratch = Checkpoint.owned(folder, "k")
    if scratch.intact("stage", 3):  # a change that says the same, as in the listing's blanks
        found = scratch.read("stage", 3)
        assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    else:
        assert not chunk.exists()
        scratch.write("stage", 3, ARRAYS)
        assert scratch.intact("stage", 3)


def test_of_two_writers_the_first_stays_and_a_damaged_chunk_makes_way(tmp_path) -> None:
    scratch = kept(tmp_path / "s")
    scratch.write("stage", 3, {"a": np.ones(2)})
    assert list(scratch.read("stage", 3)) == [*ARRAYS]
    assert sorted(os.listdir(tmp_path / "s")) == ["key.json", "stage-0000003"]
    held = scratch.read("stage", 3)["a"]
    (tmp_path / "s" / "stage-0000003" / "a.bin").write_bytes(b"damaged")
    scratch.write("stage", 3, {"a": np.ones(2)})
    assert scratch.read("stage", 3)["a"].tolist() == [1, 1]
    scratch.put_aside("stage", 3)
    assert not scratch.has("stage", 3)
    assert held.shape == (3, 4)
    (tmp_path / "s" / "stage-0000005").mkdir()
    assert not scratch.intact("stage", 5)
    Checkpoint(tmp_path / "s", "another stamp").write("stage", 3, ARRAYS)
    assert scratch.made("stage", 3) == "another stamp"
    assert not scratch.whole("stage", 3)
    scratch.write("stage", 3, {"b": np.zeros(1)})
    assert list(scratch.read("stage", 3)) == ["b"]


def test_only_who_owns_the_folder_deletes_what_is_unfinished(tmp_path) -> None:
    scratch, left = kept(tmp_path / "s"), tmp_path / "s" / "stage-0000004.elsewhere-7-0a.tmp"
    left.mkdir()
    (left / "a.bin").write_bytes(b"half")
    (tmp_path / "s" / "promise.json.tmp").write_text("{")
    scratch.write("stage", 4, ARRAYS)
    assert Checkpoint(tmp_path / "s").intact("stage", 4)
    assert left.exists()
    Checkpoint.owned(tmp_path / "s", "k")
    names = ["key.json", "stage-0000003", "stage-0000004"]
    assert sorted(os.listdir(tmp_path / "s")) == names


def test_a_listing_of_another_making_is_refused(tmp_path) -> None:
    scratch, file = kept(tmp_path / "s"), tmp_path / "s" / "stage-0000003" / "arrays.json"
    good = {"dtype": "<f4", "shape": [3, 4], "crc32": 0}
    for name, wrong in (
        ("../a", good),
        ("a", {**good, "dtype": "|O8"}),
        ("a", {**good, "shape": [-3, -4]}),
        ("a", {**good, "shape": [1 << 40, 1 << 40]}),
        ("a", {**good, "shape": "12"}),
        ("missing", good),
    ):
        listing = {"arrays": {name: wrong}, "made_by": ""}
        crc = zlib.crc32(json.dumps(listing, sort_keys=True).encode())
        file.write_text(json.dumps([listing, crc]))
        with pytest.raises((InputError, FileNotFoundError)):
            scratch.read("stage", 3)
        assert not scratch.whole("stage", 3)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"0" * 48)
    listing["arrays"] = {"a": good}
    file.write_text(json.dumps([listing, zlib.crc32(json.dumps(listing, sort_keys=True).encode())]))
    (file.parent / "a.bin").unlink()
    (file.parent / "a.bin").symlink_to(outside)
    with pytest.raises(InputError, match="is a symbolic link"):
        scratch.read("stage", 3)


def test_arrays_on_disk_are_claimed_before_they_are_written(tmp_path, monkeypatch) -> None:
    scratch, claimed, claim = Checkpoint.owned(tmp_path / "s", "k"), [], os.posix_fallocate

    def watched(descriptor: int, start: int, size: int) -> None:
        claim(descriptor, start, size)
        claimed.append(os.fstat(descriptor).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", watched)
    array, other = (scratch.array("float32", (1000, 30)) for _ in range(2))
    assert not array.any()
    assert claimed[0] >= 120000
    array[:] = 7
    assert not other.any()  # two merges at once
    assert os.listdir(tmp_path / "s") == ["key.json"]
    assert scratch.array("uint8", (0, 4)).shape == (0, 4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        scratch.array("uint8", (5,))
    assert caught.value.filename == str(tmp_path / "s")


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
    scratch.write("more", 1, ARRAYS)
    scratch.mark_commit("job", 1)
    left: list[list[str]] = []

    def watched(name, **options) -> None:
        left.append(os.listdir(tmp_path / "s"))
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", watched)
    remove_checkpoint(scratch.path)
    assert left[-1] == ["promise.json"]
    assert all("promise.json" in names for names in left)
