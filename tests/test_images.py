"""Images: found, named, read as they look, and batched in order whatever is broken."""

import io
import os
import threading
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from embedcam.errors import ImageError, ImageTooLarge, InputError
from embedcam.images import (
    MAX_PIXELS,
    ImageSource,
    Item,
    find_images,
    from_dataset,
    load_batches,
    read_image,
)
from embedcam.preprocess import Preprocess, custom

PLAIN = Preprocess((4, 4), mean=(0, 0, 0), std=(1, 1, 1))


def noise(width=9, height=7, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path, data=None, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of(Image.new("RGB", (6, 5), (value,) * 3)) if data is None else data)
    return path


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    image = noise()
    path = write(tmp_path / "a.png", file_of(image))
    with open(path, "rb") as stream:
        for source in (path, str(path), path.read_bytes(), stream, image, np.asarray(image)):
            read = read_image(source)
            assert read.mode == "RGB"
            np.testing.assert_array_equal(read, image)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own word on it
def test_a_broken_exif_block_counts_as_none():
    data = file_of(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert read_image(data).size == (9, 7)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    corners = np.zeros((8, 16, 3), dtype=np.uint8)
    corners[:4, :8] = 255, 0, 0
    corners[4:, 8:] = 0, 0, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = file_of(Image.fromarray(corners), kind, exif=exif, **options)
    read = read_image(data)
    with Image.open(io.BytesIO(data)) as stored:
        stored.load()
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert read.size == ((16, 8) if orientation < 5 else (8, 16))
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(read_image(read), expected)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (1, 1), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (1, 1), 1), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), "PNG", (255, 204, 204)),
        (Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (1, 1), (0, 51)), "PNG", (204, 204, 204)),
        (Image.new("RGB", (1, 1), (1, 2, 3)).quantize(4), "PNG", (1, 2, 3)),
    ],
)
def test_colour_modes(image, kind, expected):
    read = read_image(file_of(image, kind))
    assert read.mode == "RGB"
    np.testing.assert_allclose(read.getpixel((0, 0)), expected, atol=1)


def test_transparent_palettes_and_sixteen_bits():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    data = file_of(palette, transparency=bytes([0, 255]))
    assert read_image(data).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        read = np.asarray(read_image(file_of(grey, kind)))
        np.testing.assert_array_equal(read[0, :, 0], [0, 1, 128, 255])


def test_wide_values_without_an_agreed_white_are_refused():
    def read(values, kind):
        return read_image(Image.fromarray(np.array([values], dtype=kind)))

    assert read([0, 65_535], np.int32).getpixel((1, 0)) == (255, 255, 255)
    assert read([0.0, 0.2], np.float32).getpixel((1, 0)) == (51, 51, 51)
    with pytest.raises(ImageError, match="32-bit values from -5 to 70000; convert"):
        read([-5, 70_000], np.int32)
    with pytest.raises(ImageError, match=r"must lie in \[0, 1\], given 0 to 300"):
        read([0.0, 300.0], np.float32)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 2), 9, np.uint8), (9, 9, 9)),
        (np.full((2, 2, 4), (0, 0, 255, 51), np.uint8), (204, 204, 255)),
        (np.full((2, 2, 3), 65_535, np.uint16), (255, 255, 255)),
        (np.full((2, 2, 3), (0.0, 0.2, 1.0)), (0, 51, 255)),
        (np.full((4, 2, 3), 7, np.uint8)[::2, ::-1], (7, 7, 7)),
    ],
)
def test_arrays(array, expected):
    read = read_image(array)
    assert read.size == (2, 2)
    np.testing.assert_allclose(read.getpixel((0, 0)), expected, atol=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((2, 2, 3), 2.0), r"must lie in \[0, 1\], given 2 to 2"),
        (np.full((2, 2, 3), np.nan), r"must lie in \[0, 1\], given nan"),
        (np.zeros((2, 2), np.int64), "expected uint8, uint16 or floats .* given int64"),
        (np.zeros((2, 2), bool), "given bool"),
        (np.zeros((3, 5, 2), np.uint8), r"given \[3, 5, 2\]"),
        (np.zeros((2, 2, 2, 3), np.uint8), r"given \[2, 2, 2, 3\]"),
        (np.zeros((0, 2, 3), np.uint8), r"has no pixels \(2 x 0\)"),
        (np.zeros(3, np.uint8), "has no pixels"),
        (np.array(["a"]), "has no pixels"),
        (3, r"expected a path, bytes, .* given int"),
        (io.StringIO("text"), "opened as text"),
        ("a\0b.png", r"^a\\x00b\.png: is not a path \(embedded"),
    ],
)
def test_sources_that_are_no_picture(source, message):
    with pytest.raises(ImageError, match=message):
        read_image(source)


def broken_files(folder):
    """Path and what its message says, for every way in which a file can be no image."""
    jpeg, png, gif, webp = (file_of(noise(50, 50), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
    for name, data, reason in (
        ("empty.png", b"", r"is empty \(0 bytes\)"),
        ("text.jpg", b"hello world, this is text", "not an image of a known kind"),
        ("short.jpg", b"\xff", "not an image of a known kind"),
        ("cut.jpg", jpeg[: len(jpeg) // 2], "is truncated"),
        ("cut.png", png[: len(png) // 2], "is truncated"),
        ("header.jpg", jpeg[:30], "has a broken header"),
        ("header.png", png[:20], "has a broken header"),
        ("cut.gif", gif[:900], "is truncated|decoded"),
        ("cut.webp", webp[:90], "header|decoded"),
        ("damaged.png", png[:60] + bytes(4940) + png[5000:], "cannot be decoded|header|truncated"),
    ):
        yield write(folder / name, data), reason
    (folder / "folder.png").mkdir()
    yield folder / "folder.png", "is a folder, not an image"
    yield folder / "missing.png", "does not exist"
    os.symlink("nowhere.png", folder / "link.png")
    yield folder / "link.png", "is a link to nowhere.png, which does not exist"
    os.symlink("self.png", folder / "self.png")
    yield folder / "self.png", "cannot be opened"
    os.mkfifo(folder / "pipe.png")
    yield folder / "pipe.png", "is not a regular file"
    yield folder / ("n" * 300 + ".png"), "cannot be opened"


def test_whatever_is_broken_is_named_with_its_reason(tmp_path, monkeypatch):
    for path, reason in broken_files(tmp_path):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    path = write(tmp_path / "a.png")
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ImageError, match=r"a\.png: may not be read \(permission denied\)"):
        read_image(path)


@pytest.mark.parametrize("side", [9_500, 20_000, 2_000_000_000])
def test_decompression_bombs_are_refused_by_their_header(side):
    data = bytearray(file_of(noise()))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    says = f"^b.png: has {side} x {side} pixels, above the limit of {MAX_PIXELS}; raise max_pixels"
    with pytest.raises(ImageTooLarge, match=says):
        read_image(bytes(data), name="b.png")
    small = noise(20, 10)
    assert read_image(file_of(small), max_pixels=200).size == (20, 10)
    for source in (file_of(small), small, np.asarray(small)):
        with pytest.raises(ImageTooLarge, match="has 20 x 10 pixels, above the limit of 199"):
            read_image(source, max_pixels=199)


def test_reading_leaves_no_file_open_and_the_callers_picture_alone(tmp_path):
    path, descriptors = write(tmp_path / "a.png", file_of(noise())), Path("/proc/self/fd")
    before = descriptors.is_dir() and set(os.listdir(descriptors))
    assert len([read_image(path) for _ in range(3)]) == 3
    assert (descriptors.is_dir() and set(os.listdir(descriptors))) == before
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(io.BytesIO(file_of(noise(), exif=exif))) as mine:
        turned = read_image(mine)
        assert mine.getexif()[0x0112] == 3
        np.testing.assert_array_equal(np.asarray(turned), np.asarray(mine)[::-1, ::-1])


def test_a_folder_per_class(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x/deep.JPG", "a/ä.png", "B/1.png", "b/.hidden.png"):
        write(tmp_path / name)
    for name in ("b/notes.txt", ".cache/1.png", "readme.md"):
        write(tmp_path / name, b"no image")
    source = find_images(tmp_path)
    assert source.ids == ["B/1.png", "a/x/deep.JPG", "a/ä.png", "b/10.png", "b/2.png"]
    assert source.labels == ["B", "a", "a", "b", "b"]
    assert [item.path for item in source.items] == source.ids
    assert (source.root, len(source)) == (tmp_path, 5)
    assert source.open(3).size == (6, 5)
    assert find_images(tmp_path, "none").labels == [None] * 5
    assert find_images(str(tmp_path), "folders").items == source.items
    os.mkdir(tmp_path / "B" / "empty")
    assert find_images(tmp_path / "B").items == (Item("1.png", "1.png", None),)


@pytest.mark.parametrize(
    ("names", "where", "labels", "message"),
    [
        (["1.png"], "", "folders", 'no subfolder to take labels from; take labels="none"'),
        (["a/1.png", "x.png"], "", "auto", r"1 images such as 'x.png' lie beside the class"),
        ([], "", "auto", r"contains no images \(.avif, .bmp"),
        ([], "nowhere", "auto", "does not exist; give a folder of images, or a file"),
        (["one.png"], "one.png", "auto", "give a folder of images, or a file: .csv"),
        ([], "", "yes", "labels = 'yes' is unknown; known: auto, folders"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, where, labels, message):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        find_images(tmp_path / where, labels)


def test_links_are_followed_and_loops_end(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    write(folder / "z/1.png")
    write(outside / "2.png")
    links = {
        "in/z/up": folder, "in/alias": "z", "in/linked": outside, "outside/again": outside,
        "in/z/same.png": "../z/1.png", "in/z/dead.png": "nowhere", "in/loop": "loop",
    }  # fmt: skip
    for name, target in links.items():
        os.symlink(target, tmp_path / name)
    source = find_images(folder)
    assert source.ids == ["linked/2.png", "z/1.png", "z/dead.png", "z/same.png"]
    with pytest.raises(ImageError, match="is a link to nowhere, which does not exist"):
        source.open(2)
    assert source.fingerprint(2) == "unreadable"


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a/1.png")
    outer = os.scandir(tmp_path)
    monkeypatch.setattr(os, "scandir", Mock(side_effect=[outer, PermissionError]))
    with pytest.raises(InputError, match=r"a: may not be read \(permission denied\)"):
        find_images(tmp_path)


def test_names_that_are_not_text(tmp_path):
    write(tmp_path / "1.png")
    write(tmp_path / "2.png")
    try:
        os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = find_images(tmp_path)
    assert source.ids == ["2.png", "\\xff.png"]
    assert source.open(0).size == (6, 5)
    with pytest.raises(ImageError, match=r"/\\xff\.png: the file name is not UTF-8; rename it"):
        source.open(1)


def test_the_fingerprint_follows_the_file(tmp_path):
    path = write(tmp_path / "1.png")
    source = find_images(tmp_path)
    for _ in range(2):
        stat = path.stat()
        assert source.fingerprint(0) == f"{stat.st_size}:{stat.st_mtime_ns}"
        os.utime(path, ns=(1, 1))


def csv_of(folder, text, encoding="utf-8"):
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_csv(tmp_path):
    outside = tmp_path / "other" / "c.png"
    for name in ("sets/b.png", "sets/deep/a.png", "other/c.png"):
        write(tmp_path / name)
    path = csv_of(
        tmp_path / "sets",
        f'path,label,split\r\nb.png,cat,1\r\n"deep/../deep/a.png"," dog, small ",2\r\n'
        f"\r\n../other/c.png,,3\r\nmissing.png,cat,4\r\n{tmp_path}/sets/./deep/a.png,,\r\n",
    )
    with pytest.raises(InputError, match=r"lines 3 and 7 have the same id 'deep/a.png'.*column id"):
        find_images(path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    source = find_images(path)
    assert source.items == (
        Item("b.png", "b.png", "cat"),
        Item("deep/a.png", "deep/a.png", "dog, small"),
        Item(str(outside), str(outside), None),
        Item("missing.png", "missing.png", "cat"),
    )
    assert source.open(2).size == (6, 5)
    with pytest.raises(ImageError, match=r"sets/missing\.png: does not exist"):
        source.open(3)
    assert find_images(path, "none").labels == [None] * 4


def test_csv_with_ids_and_a_byte_order_mark(tmp_path):
    path = csv_of(tmp_path, "path,label,id\na.png,x,7\na.png,x,8\n", "utf-8-sig")
    assert find_images(path).ids == ["7", "8"]
    with pytest.raises(InputError, match="a CSV has a label column"):
        find_images(path, "folders")
    assert find_images(csv_of(tmp_path, "path\na.png\n"), "none").ids == ["a.png"]
    unnamed = csv_of(tmp_path, ",path,label,,\n0,a.png,x,,\n1,b.png,y,,\n")
    assert find_images(unnamed).labels == ["x", "y"]
    with pytest.raises(InputError, match="is not UTF-8 text"):
        find_images(csv_of(tmp_path, "path,label\nä.png,x\n", "latin-1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "header lacks path; expected .* found file,label"),
        ("file;label\na;b\n", "lacks path; .* found file,label"),
        ("path\na.png\n", "lacks label"),
        ("", "found an empty file"),
        ("path,label\n", "no lines below its header"),
        ("path,label,path\na,b,c\n", "names a column twice"),
        ("path,label\na.png,x\n,x\n", "line 3: the path is empty"),
        ("path,label\na.png\n", "line 2: 1 fields under a header of 2"),
        ("path,label\na.png,b,c\n", "line 2: 3 fields under a header of 2; .* double quotes"),
        ("path,label,id\na.png,b,\n", "line 2: the id is empty"),
        ("path,label,id\na,x,1\nb,x,2\nc,x,1\n", "lines 2 and 4 have the same id '1'; ids must be"),
        ('path,label\n"a,b\n', "line 2: is not a CSV"),
        ("path,label\n" + "a" * 200_000 + ",b\n", "line 2: is not a CSV"),
    ],
)
def test_csvs_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        find_images(csv_of(tmp_path, text))
    assert "list.csv" in str(caught.value)


class Pairs(list):
    """A data set of (picture, number)."""

    classes = ("cat", "dog")

    def __init__(self, n=4):
        super().__init__((Image.new("L", (3, 2), i), np.int64(i % 2)) for i in range(n))


def test_a_data_set_of_pairs():
    source = from_dataset(Pairs())
    assert source.ids == ["0", "1", "2", "3"]
    assert source.labels == ["cat", "dog", "cat", "dog"]
    assert source.open(3).getpixel((0, 0)) == (3, 3, 3)
    assert (source.fingerprint(3), source.root) == ("id:3", None)
    assert from_dataset(Pairs(), labels="none").labels == [None] * 4
    named = from_dataset(Pairs(2), ids=["x", "y"], labels=["one", None])
    assert named.items == (Item("x", "", "one"), Item("y", "", None))
    bare = from_dataset([np.full((2, 2), 9, np.uint8), Image.new("RGB", (4, 3))])
    assert bare.labels == [None, None]
    assert bare.open(0).getpixel((1, 1)) == (9, 9, 9)


def test_torchvisions_image_folder(tmp_path):
    for value, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png")):
        write(tmp_path / name, value=value)
    source = from_dataset(ImageFolder(tmp_path))
    assert source.items == find_images(tmp_path).items
    assert source.open(2).getpixel((0, 0)) == (2, 2, 2)
    assert source.name(2) == str(tmp_path / "dog/1.png")
    write(tmp_path / "dog/1.png", b"")
    with pytest.raises(ImageError, match=r"dog/1\.png: cannot be read"):
        source.open(2)


def test_tensors_of_a_data_set():
    channel_first = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    source = from_dataset(TensorDataset(channel_first, torch.tensor([5, 6])))
    assert source.labels == ["5", "6"]
    assert source.open(1).getpixel((1, 0)) == (13, 17, 21)
    grey = from_dataset(TensorDataset(torch.full((1, 1, 2, 2), 0.2)))
    assert grey.open(0).getpixel((0, 0)) == (51, 51, 51)
    with pytest.raises(ImageError, match=r"^0: floating-point values must lie in \[0, 1\]"):
        from_dataset([torch.full((3, 2, 2), -1.5)]).open(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_dataset([]), "list: is empty or has no length"),
        (lambda: from_dataset(Pairs(), ids=["a"]), "ids: 1 given for a data set of 4"),
        (lambda: from_dataset(Pairs(2), ids=["a", "a"]), "images 0 and 1 have the same id 'a'"),
        (lambda: from_dataset(Pairs(2), ids=["a", 3]), "ids: 3 given; an id is a string"),
        (lambda: from_dataset(Pairs(), labels=["a"]), "labels: 1 given for a data set of 4"),
        (lambda: from_dataset(Pairs(), labels="auto"), "or \"none\", given 'auto'"),
        (lambda: from_dataset(Pairs(2), labels=[0, -1]), "-1 given, the data set names 2 classes"),
        (lambda: from_dataset([(1, {"box": 2})]), "a label of type dict given; pass labels="),
    ],
)
def test_data_sets_that_cannot_be_used(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_data_set_is_asked_by_one_thread_at_a_time_unless_it_says_so():
    class Watched(Pairs):
        inside = most = 0

        def __getitem__(self, position):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.002)
            self.inside -= 1
            return super().__getitem__(position)

    careful, parallel = Watched(24), Watched(24)
    for data, thread_safe in ((careful, False), (parallel, True)):
        source = from_dataset(data, labels="none", thread_safe=thread_safe)
        list(load_batches(source, range(24), PLAIN, 8, workers=4))
    assert careful.most == 1
    assert parallel.most > 1


def image_threads():
    return [t for t in threading.enumerate() if t.name.startswith("embedcam-images")]


def numbered(folder, n=11, broken=()):
    for i in range(n):
        write(folder / f"{i:02d}.png", b"" if i in broken else None, value=10 * i)
    return find_images(folder)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(tmp_path, workers):
    source = numbered(tmp_path)
    batches = list(load_batches(source, [3, 1, 4, 1, 10, 9, 2], PLAIN, 3, workers=workers))
    assert [batch.positions.tolist() for batch in batches] == [[3, 1, 4], [1, 10, 9], [2]]
    for batch in batches:
        assert batch.images.shape == (len(batch), 3, 4, 4)
        assert (batch.images.dtype, batch.positions.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(batch.images[:, 1, 2, 2], batch.positions * 10 / 255, rtol=1e-6)
        np.testing.assert_array_equal(batch.sizes, [[6, 5]] * len(batch))
        assert batch.errors == []
    assert list(load_batches(source, [], PLAIN, 2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_fatal_or_moves_no_other(tmp_path, workers):
    source = numbered(tmp_path, 9, broken=(1, 3, 4, 5))
    batches = list(load_batches(source, range(9), PLAIN, 3, workers=workers, on_error="skip"))
    assert [batch.positions.tolist() for batch in batches] == [[0, 2], [], [6, 7, 8]]
    assert [[at for at, _ in batch.errors] for batch in batches] == [[1], [3, 4, 5], []]
    assert batches[0].errors == [(1, f"{tmp_path}/01.png: is empty (0 bytes)")]
    assert (batches[1].images.shape, batches[1].sizes.shape) == ((0, 3, 4, 4), (0, 2))
    np.testing.assert_allclose(batches[2].images[:, 0, 0, 0], [60 / 255, 70 / 255, 80 / 255])
    fatal = load_batches(source, [0, 2, 6, 7, 8, 4], PLAIN, 3, workers=workers)
    assert next(fatal).positions.tolist() == [0, 2, 6]
    with pytest.raises(ImageError, match=r"04\.png: is empty"):
        next(fatal)
    assert image_threads() == []


def test_a_picture_too_thin_for_its_preprocessing_is_skipped_by_name(tmp_path):
    write(tmp_path / "thin.png", file_of(Image.new("L", (1, 100_000))))
    given = find_images(tmp_path), [0], Preprocess.imagenet(), 1
    (batch,) = load_batches(*given, workers=0, on_error="skip")
    (error,) = batch.errors
    assert error[1].startswith(f"{tmp_path}/thin.png: a picture of 1 x 100000 pixels is too long")


def test_memory_is_bounded_however_slow_the_reader(tmp_path):
    started = []
    prepare = custom(lambda image: (started.append(1), np.zeros((3, 2, 2), np.float32))[1])
    source = from_dataset(Pairs(200), labels="none")
    batches = load_batches(source, range(200), prepare, 4, workers=2)
    next(batches)
    time.sleep(0.1)
    assert 4 <= len(started) <= 4 + 4 + 2 * 2
    batches.close()
    assert image_threads() == []
    assert len(started) < 20


def test_an_interrupt_while_waiting_stops_the_threads(tmp_path, monkeypatch):
    batches = load_batches(numbered(tmp_path), range(11), PLAIN, 2, workers=2)
    next(batches)
    monkeypatch.setattr("concurrent.futures.Future.result", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert image_threads() == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_transforms_own_faults_are_never_skipped(tmp_path, workers, on_error):
    source, options = numbered(tmp_path, 3), {"workers": workers, "on_error": on_error}
    with pytest.raises(KeyError) as caught:
        list(load_batches(source, range(3), lambda image: {}["key"], 2, **options))
    assert caught.value.__notes__ == [f"while preparing the image {tmp_path}/00.png"]
    flat = custom(lambda image: np.zeros(3), name="flat")
    with pytest.raises(InputError, match=r"00\.png: preprocess flat: .*expected an") as caught:
        list(load_batches(source, range(3), flat, 2, **options))
    assert not isinstance(caught.value, ImageError)


def test_shapes_that_vary_name_the_image(tmp_path):
    source = from_dataset([noise(4, 4), noise(5, 4)], ids=["a", "b"])
    whole = custom(lambda image: np.asarray(image).transpose(2, 0, 1), name="whole")
    with pytest.raises(InputError, match=r"b: preprocessed to \[3, 4, 5\], .* \[3, 4, 4\]"):
        list(load_batches(source, [0, 1], whole, 1, workers=0))
    (only,) = load_batches(source, [1], whole, 4, workers=0)
    assert only.images.shape == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [0, 2]}, "0 to 2 given, the source has 2 images"),
        ({"positions": [-1]}, "-1 to -1 given"),
        ({"positions": [0.5]}, "expected whole numbers"),
        ({"positions": [[0]]}, "expected whole numbers"),
        ({"batch_size": 0}, "batch_size = 0; give a whole number of at least 1"),
        ({"workers": -1}, "workers = -1; give a whole number of at least 0"),
        ({"on_error": "ignore"}, "on_error = 'ignore' is unknown; known: fail, skip"),
    ],
)
def test_options_are_checked_at_the_call(tmp_path, options, message):
    source = ImageSource([Item("a", "a.png"), Item("b", "b.png")], tmp_path)
    given = {"positions": [0], "preprocess": PLAIN, "batch_size": 2, **options}
    with pytest.raises(InputError, match=message):
        load_batches(source, **given)
