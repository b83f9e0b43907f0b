"""Tar shards: members as Python's tarfile finds them, samples as webdataset does, nothing else."""

import io
import os
import re
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_samples import grays, labelled, png, shard
from webdataset.tariterators import group_by_keys, tar_file_expander

from embedcam.errors import ImageError, InputError
from embedcam.images import ImageSource, find_images, places, tars
from embedcam.images.tars import Others

NAME = st.text(st.sampled_from("abä./_ 0☃"), min_size=1, max_size=12).filter(
    lambda name: not name.startswith("/") and name.strip("./ ") and not name.endswith("/")
)
LONG = st.builds(lambda name, n: f"{'d' * n}/{name}", NAME, st.integers(90, 300))
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def packed(members: list[tuple[str, bytes]], kind: int, beside: bool = False) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if beside:
                for other in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                    info = tarfile.TarInfo(f"{name[:40]}-")
                    info.type, info.linkname = other, "/etc/passwd"
                    tar.addfile(info)
    return held.getvalue()


@settings(max_examples=60)
@given(st.lists(st.tuples(NAME | LONG, st.binary(max_size=1200)), max_size=6), st.data())
def test_members_are_those_that_tarfile_finds(members, data) -> None:
    kind = data.draw(st.sampled_from(FORMATS[1:]))
    packed_tar = packed(members, kind, beside=True)
    with tarfile.open(fileobj=io.BytesIO(packed_tar)) as tar:
        expected = [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
    others = Others()
    found = [tuple(one) for one in tars.members(io.BytesIO(packed_tar), "x.tar", others)]
    assert found == expected if members else not found
    assert others.links == 2 * len(members)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b/a", "b.c/x", "__meta__", "ä"]),
            st.sampled_from(["png", "cls", "PNG", "json", "pkl", "left.png", "txt", ""]),
        ),
        max_size=10,
        unique_by=lambda pair: (pair[0], pair[1].lower()),
    )
)
def test_samples_are_those_of_webdataset(parts) -> None:
    members = [
        (f"{key}.{ending}", png(place) if "png" in ending.lower() else b"7")
        for place, (key, ending) in enumerate(parts)
    ]
    packed_tar = packed(members, tarfile.PAX_FORMAT)
    files = tar_file_expander([{"url": "x", "stream": io.BytesIO(packed_tar)}])
    expected = []
    for sample in group_by_keys(files):
        pictures = [data for name, data in sample.items() if name in ("png", "left.png")]
        if pictures:
            told = sample.get("cls", b"").decode() or None
            expected.append((sample["__key__"], pictures[0], told))
    stream = io.BytesIO(packed_tar)
    found = []
    for key, picture, label in tars.samples(stream, "x.tar", Others()):
        data = packed_tar[picture.start : picture.start + picture.size]
        found.append((key, data, label))
    assert found == expected


def test_a_shard_is_a_source(tmp_path: Path) -> None:
    members = [
        ("./cat/1.png", png(1)), ("./cat/1.json", b'{"label": "Felis", "url": 3}'),
        ("./cat/1.txt", b"a cat"), ("./cat/2.jpg", png(2)), ("./cat/2.pkl", b"cos\nsystem\n."),
        ("./cat/2.pth", b"x"), ("./cat/2.pyd", b"x"), ("./cat/3.cls", b"nothing to see"),
        ("./dog/4.png", png(4)), ("./dog/4.json", b'{"label": ["no text"]}'),
        ("./dog/4.other.png", png(5)), ("README", b"x"),
    ]  # fmt: skip
    shard(tmp_path / "s/000.tar", members)
    source = find_images(tmp_path / "s")
    assert source.ids == ["cat/1", "cat/2", "dog/4"]
    assert source.labels == ["Felis", None, None]
    assert grays(source) == [1, 2, 4]
    assert source.name(0) == f"{tmp_path}/s/000.tar?./cat/1.png"
    told = "1 .json, 1 .pkl, 1 .png, 1 .pth, 1 .pyd, 1 .txt, 1 without an ending"
    assert ", ".join(sorted(str(source.left_out).split(", "))) == told
    assert find_images(tmp_path / "s", "none").labels == [None] * 3
    assert find_images(tmp_path / "s/000.tar", "folders").labels == ["cat", "cat", "dog"]
    assert find_images(tmp_path / "s", exclude=["dog"]).ids == ["cat/1", "cat/2"]
    with pytest.raises(InputError, match=r"000\.tar, cat/1: the label 'Felis' is not a finite"):
        find_images(tmp_path / "s", "numbers")
    state = source.state(1, source.mark(1))
    assert (state, source.fingerprint(0)) == ("same", source.fingerprints()[2])


def test_keys_in_folders_are_labelled_by_them(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", [("cat/1.png", png(1)), ("dog/2.png", png(2))])
    assert find_images(tmp_path).labels == ["cat", "dog"]
    shard(tmp_path / "0.tar", [("cat/1.png", png(1)), ("2.png", png(2))])
    assert find_images(tmp_path).labels == [None, None]
    shard(tmp_path / "0.tar", [("train/cat/1.png", png(1)), ("train/dog/2.png", png(2))])
    assert "labels that look like parts of a data set: train" in find_images(tmp_path).notes[0]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_regrouping_shards_changes_no_id(tmp_path_factory, where, width) -> None:
    folder = tmp_path_factory.mktemp("shards")
    samples = {f"c{n % 3}/{n:03d}": (n, f"c{n % 3}") for n in range(len(where))}
    shard(folder / "all.tar", labelled(samples))
    for part in set(where):
        mine = [key for key, place in zip(samples, where, strict=True) if place == part]
        shard(folder / f"cut/{part:0{width}d}.tar", labelled({key: samples[key] for key in mine}))
    one, cut = find_images(folder / "all.tar"), find_images(folder / "cut")

    def told(source: ImageSource) -> dict[str, tuple[str | None, int]]:
        return dict(zip(source.ids, zip(source.labels, grays(source), strict=True), strict=True))

    assert told(one) == told(cut) == {key: (name, value) for key, (value, name) in samples.items()}


def test_patterns(tmp_path: Path) -> None:
    for number in range(12):
        shard(tmp_path / f"a/{number:03d}.tar", labelled({f"k{number}": (number, "x")}))
    for pattern, wanted in {
        "a/*.tar": range(12), "a/00[1-3].tar": range(1, 4), "a/{002..004}.tar": [2, 3, 4],
        "a/{011,000}.tar": [11, 0], "{a}/00?.tar": range(10), "a/{009..010}.{tar}": [9, 10],
    }.items():  # fmt: skip
        source = find_images(tmp_path / pattern)
        assert grays(source) == list(wanted), pattern
        assert all(path.endswith(".tar") or ".tar?" in path for path in source.items.paths)
    for pattern, message in {
        "a/*.png": "fits no .tar, .parquet", "a/{000..999999}.tar": "names more than 131,072 files",
        "a/{000..099}.tar": "012.tar: cannot be read (No such file",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=re.escape(message)):
            find_images(tmp_path / pattern)


def test_one_key_in_two_shards_is_one_sentence(tmp_path: Path) -> None:
    for name in "ab":
        shard(tmp_path / f"{name}.tar", labelled({"0001": (1, "x")}))
    with pytest.raises(InputError) as caught:
        find_images(tmp_path)
    one, other = (f"{tmp_path}/{name}.tar?0001.png" for name in "ab")
    assert str(caught.value) == (
        f"{one} and {other} have the same id '0001'; ids must be unique: name the members, or fill "
        "the column of ids, so that no two of all shards are alike"
    )


HEAD = packed([("a.png", b"x" * 100)], tarfile.USTAR_FORMAT)


def changed(**fields: tuple[int, bytes]) -> bytes:
    """A tar whose header has other bytes at some places, and the checksum of these."""
    head = bytearray(HEAD[:512])
    for start, data in fields.values():
        head[start : start + len(data)] = data
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + HEAD[512:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEAD[:512], "at byte 0 names 100 bytes, and the file ends after 0; it is broken"),
        (HEAD[:600], "at byte 0 names 100 bytes, and the file ends after 88"),
        (HEAD[:1024] + b"x" * 100, "at byte 1,024 breaks off within a header"),
        (HEAD[:1024] + b"x" * 512, "at byte 1,024 is no header of a tar"),
        (b"\x1f\x8b" + bytes(600), "is no header of a tar: it is compressed; unpack it to .tar"),
        (changed(size=(124, b"77777777777\0")), "names 8,589,934,591 bytes, and the file ends"),
        (changed(size=(124, b"\x80" + b"\xff" * 11)), "names 309,485,009,821,345,068,724,781,055"),
        (changed(size=(124, b"\xff" * 12)), "bytes, and the file ends after"),
        (changed(size=(124, b"-0000000001\0")), "at byte 0 has no size"),
        (changed(size=(124, b"00000000100x")), "at byte 0 has no size"),
        (changed(kind=(156, b"x")), "has a note that cannot be read"),
        (bytes(1024), "hold no images"),
        (b"", "hold no images"),
    ],
)  # fmt: skip
def test_broken_shards(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        find_images(tmp_path / "s.tar")
    assert "s.tar" in str(caught.value)


def test_shards_without_pictures_are_said_to_hold_what_they_hold(tmp_path: Path) -> None:
    for members, held in (
        ((), ""),
        ((("a.txt", b"x"), ("b.tar", b"y")), "; they hold 1 [.]tar, 1 [.]txt"),
    ):
        shard(tmp_path / "s" / "0.tar", members)
        with pytest.raises(InputError, match=rf"0\.tar hold no images{held}$"):
            find_images(tmp_path / "s")
    twice = shard(tmp_path / "t.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    with pytest.raises(InputError, match=r"two members .*t\.tar\?a\.png have the same id 'a'"):
        find_images(twice)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(InputError, match=r"s\.tar: is no regular file"):
        find_images(tmp_path / "s.tar")
    os.mkfifo(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: is no regular file"):
        find_images(tmp_path / "t.parquet")


def test_long_names_and_notes_are_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "_LONG", 64)
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard(tmp_path / "s.tar", [("d" * 300 + "/a.png", png(1))], kind)
        with pytest.raises(InputError, match=r"has a name or note of \d+ bytes; it is broken"):
            find_images(tmp_path / "s.tar")


def test_sparse_members_and_links_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, notes, kind in (
            ("a.png", {"GNU.sparse.major": "1", "GNU.sparse.name": "/etc/x"}, tarfile.REGTYPE),
            ("b.png", {}, tarfile.REGTYPE),
            ("c.png", {}, tarfile.SYMTYPE),
            ("d.png", {}, tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.pax_headers, info.type, info.linkname = notes, kind, "b.png"
            info.size = len(png(3)) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(png(3)))
    source = find_images(path)
    assert (source.ids, str(source.left_out)) == (["b"], "3 links")
    assert grays(source) == [3]


@settings(max_examples=150)
@given(st.integers(0, 3 * 512 - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(place, value) -> None:
    data = bytearray(packed([("a.png", b"x" * 10), ("b.cls", b"y")], tarfile.USTAR_FORMAT))
    data[place] = value
    found = []
    with suppress(InputError):
        found += tars.members(io.BytesIO(data), "s.tar", Others())
    assert all(one.start + one.size <= len(data) for one in found)


def test_a_member_that_is_not_there_any_more_is_said(tmp_path: Path, monkeypatch) -> None:
    path = shard(tmp_path / "s.tar", labelled({"a": (1, "x"), "b": (2, "y")}))
    source = find_images(path)
    marks, before = [source.mark(0), source.mark(1)], os.stat(path).st_mtime_ns
    assert [source.state(place, mark) for place, mark in enumerate(marks)] == ["same", "same"]
    monkeypatch.setattr(places, "MAX_BYTES", 10)
    monkeypatch.setattr(tars, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match=r"s\.tar\?a\.png: has \d+ bytes, and of one picture at"):
        source.open(0)
    monkeypatch.undo()
    shard(path, labelled({"b": (2, "y"), "a": (1, "x")}))
    os.utime(path, ns=(before + 1, before + 1))
    with pytest.raises(ImageError, match=r"a\.png: s\.tar holds something else there now; list"):
        source.open(0)
    assert source.state(0, marks[0]) == "missing"
    again = find_images(path)
    assert [again.state(place, mark) for place, mark in enumerate(marks[::-1])] == ["same"] * 2
    assert again.state(0, marks[0]) == "changed"
    shard(path, [("a.png", b"another size")])
    with pytest.raises(ImageError, match=r"a\.png: s\.tar holds something else there now; list"):
        source.open(0)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"s\.tar ends before it; list its images again"):
        source.open(1)
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.png: s\.tar does not exist"):
        source.open(0)
    assert source.state(0, marks[0]) == "missing"


def test_compressed_tars_and_mixtures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="is compressed, so no member is read alone; unpack"):
        find_images(tmp_path / "a.tar.gz")
    shard(tmp_path / "b/a.tar", labelled({"a": (1, "x")}))
    (tmp_path / "b/c.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.tar and tables are named together; give either"):
        find_images(tmp_path / "b/*")
    assert find_images(tmp_path / "b").ids == ["a"]
