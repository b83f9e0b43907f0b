"""Marks of files: what they are, how they stand in an index, and how they follow its rows."""

import hashlib
import os
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from build_samples import quicken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_samples import WIDTH, encoding_of, make, part
from PIL import Image

from embedcam.errors import IndexFormatError
from embedcam.images import ImageSource, Item, file_state, from_dataset, load_batches, reading
from embedcam.images.reading import NO_MARK, file_mark
from embedcam.index import Index, PartData, append, compact, remove, verify
from embedcam.prototypes import compress

GOLDEN = Path(__file__).parent / "data" / "golden-marks-1"
TOP = encoding_of("top-m")
TIME = 1_700_000_000_123_456_789


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "owl.png"
    path.write_bytes(b"owl")
    os.utime(path, ns=(TIME, TIME))
    return path


def test_a_mark_is_size_time_and_content(file: Path) -> None:
    """Each by hand: 3 bytes; CRC-32 of the time as int64; BLAKE2b-64 of "owl", lower half first."""
    time = zlib.crc32(struct.pack("<q", TIME))
    content = struct.unpack("<II", hashlib.blake2b(b"owl", digest_size=8).digest())
    mark = file_mark(file)
    assert mark.tolist() == [3, time, *content] == [3, 3290193451, 2287258930, 936799972]
    os.utime(file, ns=(0, 0))  # another time alone is no change
    copy = Path(shutil.copyfile(file, file.with_name("copy.png")))
    assert file_state(file, mark) == file_state(copy, mark) == "same"


def test_what_is_no_file_has_no_mark_and_a_gone_one_is_missing(file: Path) -> None:
    mark = file_mark(file)
    os.mkfifo(file.with_name("pipe"))
    for path in (file.with_name("nowhere"), file.parent, file.with_name("pipe"), "a\0b"):
        assert tuple(file_mark(path)) == NO_MARK
        assert file_state(path, mark) == "missing"
    assert file_state(file, np.zeros(4, np.uint32)) is None


def test_of_a_very_large_file_size_and_time_decide(file, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MAX_HASHED", 2)
    mark = file_mark(file)
    assert mark[2:].tolist() == [0, 0]
    assert file_state(file, mark) == "same"
    os.utime(file, ns=(0, 0))
    assert file_state(file, mark) == "changed"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=st.binary(min_size=1, max_size=40),
    new=st.binary(min_size=1, max_size=40),
    times=st.lists(st.integers(0, 1 << 61), min_size=2, max_size=2, unique=True),
)
def test_a_file_is_the_same_where_its_bytes_are(tmp_path, old, new, times) -> None:
    path = tmp_path / f"{len(os.listdir(tmp_path))}"
    path.write_bytes(old)
    os.utime(path, ns=(times[0], times[0]))
    mark = file_mark(path)
    path.write_bytes(new)
    os.utime(path, ns=(times[1], times[1]))
    assert file_state(path, mark) == ("same" if new == old else "changed")


def test_a_file_that_changes_while_it_is_read_does_not_pass_for_the_one_read(
    tmp_path, monkeypatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    source, read = ImageSource([Item("a", "a.png")], tmp_path), ImageSource.open

    def replaced(source: ImageSource, position: int) -> Image.Image:
        Image.new("RGB", (9, 9), "blue").save(path)
        return read(source, position)

    monkeypatch.setattr(ImageSource, "open", replaced)
    whole = source, [0], lambda picture: np.zeros((3, 2, 2), "f4"), 1
    (batch,) = load_batches(*whole, workers=0, marked=True)
    assert file_state(path, batch.marks[0]) == "changed"
    (plain,) = load_batches(*whole, workers=0)
    arrays = from_dataset([np.zeros((4, 4, 3), np.uint8)] * 2, labels="none")
    assert plain.marks.tolist() == [arrays.mark(0).tolist()] == [list(NO_MARK)]


def marked(start: int, stop: int) -> PartData:
    """Rows whose marks are made of their numbers; of every fifth there is none."""
    marks = np.array([expected(row) for row in range(start, stop)], np.uint32)
    return replace(part(start, stop, TOP), marks=marks)


def expected(row: int, unmarked: set[int] = frozenset()) -> list[int]:
    return [0] * 4 if row % 5 == 0 or row in unmarked else [row, 10 * row, 100 * row, 1000 * row]


def test_the_golden_index_with_marks_opens_for_ever() -> None:
    stored = (GOLDEN / "parts/000001/marks.u32").read_bytes()
    assert stored.hex(" ", 4).split()[4:8] == ["01000000", "0a000000", "64000000", "e8030000"]
    with Index.open(GOLDEN) as index:
        assert index.marked
        found = index.select(np.arange(7)).marks
        assert found[:6].tolist() == [[n, 10 * n, 100 * n, 1000 * n] for n in range(6)]
        assert found[6].tolist() == [0, 0, 0, 0]  # added without
        assert len(index.verify()) == 8


def test_an_index_without_marks_is_as_it_was(tmp_path: Path) -> None:
    with Index.open(make(tmp_path / "x", 20)) as index:
        assert not index.marked
        assert index.select([3, 4]).marks.tolist() == [[0] * 4] * 2
        assert "marks.u32" not in index.manifest.parts[0].files


STEPS = st.sampled_from(["with", "without", "remove", "compact", "replace"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=2, max_size=7), first=st.booleans())
def test_marks_follow_their_rows_through_every_change(tmp_path_factory, steps, first) -> None:
    path, n, unmarked = tmp_path_factory.mktemp("marks") / "x", 12, set(range(0 if first else 12))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        rows = marked(0, 12)
        make(path, factory="none", rows=rows if first else replace(rows, marks=None))
        for step in steps:
            with Index.open(path) as index:
                ids = index.ids[index.live_positions()]
            if step == "compact":
                compact(path)
            elif step == "remove" and len(ids) > 3:
                remove(path, ids[1:3])
            elif step in ("with", "without", "replace"):
                rows = marked(n, n + 4)
                if step == "without":
                    rows = replace(rows, marks=None)
                    unmarked |= set(range(n, n + 4))
                append(path, rows, removing=ids[:2] if step == "replace" else [])
                n += 4
    verify(path)
    with Index.open(path) as index:
        live = index.live_positions()
        wanted = [expected(int(id.removeprefix("image-")), unmarked) for id in index.ids[live]]
        assert index.select(live).marks.tolist() == wanted


def test_rows_are_added_and_removed_in_one_step(tmp_path: Path) -> None:
    """An id may be removed and come anew in the same commit; searches find the new row."""
    path = make(tmp_path / "x", 20)
    rows = replace(part(7, 9, TOP), embeddings=np.eye(WIDTH, dtype="f4")[:2])
    assert append(path, rows, removing=["image-0003", "image-0007", "image-0008"]) == 20
    with Index.open(path) as index:
        assert index.manifest.generation == 2
        assert index.manifest.to_dict()["counts"] == {"rows": 22, "live": 19, "added_after_fit": 2}
        assert index.tombstones.tolist() == [3, 7, 8]
        assert index.positions(["image-0007", "image-0008"]).tolist() == [20, 21]
        assert index.search(np.eye(WIDTH, dtype="f4")[:1], 1).positions.tolist() == [[20]]
        assert not index.find_live(["image-0003"])
    append(path, part(7, 8, TOP), removing=["image-0007"])
    with Index.open(path) as index:
        assert index.manifest.to_dict()["counts"] == {"rows": 23, "live": 19, "added_after_fit": 2}
    assert verify(path).ok


def test_a_flipped_bit_in_the_marks_is_found_and_not_copied(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN, tmp_path / "x"))
    file = path / "parts/000001/marks.u32"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    for change in (verify, compact):
        with pytest.raises(IndexFormatError, match=r"marks\.u32: does not match its checksum"):
            change(path)


def test_prototypes_have_the_marks_of_the_pictures_that_they_show(tmp_path: Path) -> None:
    rows = marked(0, 20)
    compress(make(tmp_path / "x", factory="none", rows=rows), tmp_path / "small", 4)
    with Index.open(tmp_path / "small") as index:
        assert index.marked
        by_path = dict(zip(rows.paths, rows.marks.tolist(), strict=True))
        assert index.select(np.arange(4)).marks.tolist() == [by_path[p] for p in index.paths]
