"""Where pictures lie: the syntax of places, what is followed, and lists kept for workers."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_samples import grays, labelled, png, shard

from embedcam.errors import InputError
from embedcam.explain.drawing import may_follow
from embedcam.images import ImageSource, Item, find_images, from_dataset, load_source, places
from embedcam.images.places import Inside, inside, member_path, row_path


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=20), st.integers(0, 10**15 - 1), st.integers(0, 10**12 - 1))
def test_a_member_s_path_says_where_it_is(name: str, start: int, size: int) -> None:
    for file in ("a.tar", "s3://b/c d.tar", "/x/y.TAR"):
        path = member_path(file, name, start, size)
        assert inside(path) == Inside(file, name, start, size)
        assert places.PLACE.match(path)
    assert inside(row_path("x/ä.parquet", size)) == Inside("x/ä.parquet", row=size)


@pytest.mark.parametrize(
    "path", ["a.tar", "a.tar?b.png", "a.tar?b@1", "a.parquet", "a.parquet#x", "a.csv#3", "b#3.png"]
)
def test_other_names_are_files(path: str) -> None:
    assert inside(path) is None
    assert places.PLACE.match(path) is None


@pytest.mark.parametrize(
    ("path", "root", "followed"),
    [
        ("s3://b/p/a.jpg", "s3://b/p", True),
        ("s3://b/p/x/000.tar?a.png@512+3", "s3://b/p", True),
        ("s3://b/p2/a.jpg", "s3://b/p", False),
        ("s3://b/p", "s3://b/p", False),
        ("s3://b/p/../q/a.jpg", "s3://b/p", False),
        ("https://h/p/%2e%2E/a.jpg", "https://h/p", False),
        ("https://h/p/..%2fa.jpg", "https://h/p", False),
        ("https://h/p/..\\a.jpg", "https://h/p", False),
        ("https://h/p/a.jpg::file:///etc/passwd", "https://h/p", False),
        ("https://h/p/a\n.jpg", "https://h/p", False),
        ("https://h.evil/p/a.jpg", "https://h", False),
        ("https://h@evil/p/a.jpg", "https://h", False),
        ("http://169.254.169.254/latest", "/data", False),
        ("http://169.254.169.254/latest", "s3://b/p", False),
        ("http:/169.254.169.254/latest", None, False),
        ("file:///etc/passwd", "/etc", False),
        ("/etc/a.jpg", "s3://b/p", False),
        ("/data/000.tar?a.png@512+3", "/data", True),
        ("/data/../000.tar?a.png@512+3", "/data", False),
        ("/else/000.tar?a.png@512+3", "/data", False),
        ("/data/x.parquet#3", "/data", True),
    ],
)
def test_addresses_are_followed_below_a_root_that_was_named(path, root, followed) -> None:
    folder = Path(root) if root and root.startswith("/") else root
    assert may_follow(path, folder, only_below=True) is followed
    freely = path.startswith(("/data/0", "/data/x", "/else", "/etc"))
    assert may_follow(path, folder, only_below=False) is freely


def test_paths_as_an_index_keeps_them() -> None:
    stored = places.stored_path
    assert stored("a.jpg", "/p", "/p") == "a.jpg"
    assert stored("", None, "/p") == ""
    assert stored("a.jpg", "/p/q", "/p") == "q/a.jpg"
    assert stored("x.tar?a/b.png@512+9", "/p/q", "/p") == "q/x.tar?a/b.png@512+9"
    assert stored("a.jpg", "s3://b/p/q", "s3://b/p") == "q/a.jpg"
    assert stored("a.jpg", "s3://b/p", None) == "s3://b/p/a.jpg"
    assert stored("a.jpg", "s3://b/p", "/p") == "s3://b/p/a.jpg"
    assert stored("a.jpg", "/p", "s3://b/p") == "/p/a.jpg"
    assert stored("https://h/a.jpg", "/p", "/q") == "https://h/a.jpg"


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=9), st.sampled_from([None, "x", "y", ""])),
        max_size=8,
        unique_by=lambda one: one[0].encode("utf-8", "replace"),
    )
)
def test_a_list_of_images_is_kept_for_workers(tmp_path_factory, quick_disk, listed) -> None:
    folder = tmp_path_factory.mktemp("list")
    listed = [one for one in listed if max(one[0]) < "\ud800"]
    items = [Item(name, f"{name}.png", label) for name, label in listed]
    source = ImageSource(items, folder, max_pixels=99, numbers=True)
    source.save(folder / "job")
    loaded = load_source(folder / "job")
    assert list(loaded.items) == items
    assert (loaded.root, loaded.max_pixels, loaded.numbers) == (folder, 99, True)
    assert loaded.describe() == source.describe()


def test_kept_lists_read_the_same_pictures(tmp_path: Path) -> None:
    shard(tmp_path / "s/0.tar", labelled({"a": (1, "x"), "b": (2, "y")}))
    source = find_images(tmp_path / "s")
    source.save(tmp_path / "job")
    loaded = load_source(tmp_path / "job")
    assert grays(loaded) == [1, 2]
    assert loaded.fingerprints() == source.fingerprints()
    assert loaded.only([1]).ids == ["b"]


def test_what_a_process_holds_is_not_kept(tmp_path: Path) -> None:
    source = from_dataset([np.zeros((2, 2), np.uint8)])
    with pytest.raises(InputError, match="list: lives in this process, so another cannot read"):
        source.save(tmp_path / "job")
    assert not (tmp_path / "job").exists()


def damaged(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def with_about(**changes: object):
    def change(folder: Path) -> None:
        about = json.loads((folder / "images.json").read_text())
        (folder / "images.json").write_text(json.dumps({**about, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged("images.json", b"{"), "Expecting property name"),
        (damaged("images.json", b"[]"), "says not how many images there are"),
        (damaged("images.json", b" " * (1 << 17)), "has 131072 bytes, and at most"),
        (lambda folder: (folder / "ids.utf8").unlink(), "No such file"),
        (damaged("ids.utf8", b"abc"), "ids.utf8 has 3 bytes, and 2 are told"),
        (damaged("ids.offsets.u64", b"abc"), "has 3 bytes, no multiple of 8"),
        (damaged("labels.codes.i32", b"\x09\0\0\0" * 2), "labels names one of 2 names that is"),
        (damaged("labels.codes.i32", b"\0\0\0\0"), "labels has 1 entries, and 2 are told"),
        (with_about(images=10**12), "ids has 2 entries, and 1000000000000 are told"),
        (with_about(images=True), "says not how many"),
        (with_about(root=3), "names no root"),
        (with_about(numbers=None), "names no root"),
        (with_about(max_pixels="all"), "max_pixels = 'all'"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "job"
    ImageSource([Item("a", "a.png", "x"), Item("b", "b.png", "y")], tmp_path).save(folder)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_source(folder)


def test_offsets_that_lead_elsewhere_are_refused_when_used(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    ImageSource([Item("a", "a.png"), Item("b", "b.png")], tmp_path).save(folder)
    offsets = np.array([0, 1 << 60, 2], np.uint64)
    (folder / "ids.offsets.u64").write_bytes(offsets.tobytes())
    with pytest.raises(ValueError, match="lead outside the text"):
        list(load_source(folder).ids)


def test_a_listing_keeps_no_object_an_image(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / f"class{folder:04d}").mkdir()
        for number in range(1000):
            (tmp_path / f"class{folder:04d}/image{number:06d}.jpg").touch()
    tracemalloc.start()
    try:
        source = find_images(tmp_path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 10_000
    assert kept / len(source) < 60
    assert most / len(source) < 300  # meanwhile: one folder's names, and hashes of the ids


def test_a_folder_is_listed_in_the_order_of_whole_paths(tmp_path: Path) -> None:
    for folder in "ba":
        (tmp_path / folder).mkdir()
        for name in ("2.png", "10.png", "x-1.png"):
            (tmp_path / folder / name).write_bytes(png(1))
    (tmp_path / "a-b").mkdir()
    (tmp_path / "a-b/0.png").write_bytes(png(1))
    source = find_images(tmp_path)
    assert source.ids == sorted(source.ids)
    assert source.items.paths is source.items.ids
