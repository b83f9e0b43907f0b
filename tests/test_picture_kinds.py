"""Kinds of picture files that are rare, each beside the picture that is right."""

import io
import re
import struct
import sys
import tomllib
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from embedcam.errors import ImageError, ImageTooLarge, InputError
from embedcam.images import from_dataset, read_image

RAMP = np.tile(np.linspace(0, 1, 48), (8, 1))


def png(width: int, depth: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """One row of pixels as a PNG with a transparent level."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)),
        (b"tRNS", clear),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def tiff(bits: int, white_is_zero: bool, data: bytes, size: tuple[int, int], kind: int = 1,
         order: str = "<") -> bytes:  # fmt: skip
    """A plain grey TIFF; kind 1 holds whole numbers, 3 floats."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: 0 if white_is_zero else 1,
            273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: size[1], 279: len(data), 339: kind}  # fmt: skip
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags.items():
        out += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return out + bytes(4) + data


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def red(source: bytes) -> list[int]:
    return np.asarray(read_image(source))[0, :, 0].tolist()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiffs_of_every_depth_show_the_same_picture(order: str, white_is_zero: bool) -> None:
    stored = 1 - RAMP if white_is_zero else RAMP
    for bits, kind, data in (
        (8, 1, np.rint(stored * 255).astype("u1")),
        (16, 1, np.rint(stored * 65_535).astype(f"{order}u2")),
        (32, 3, stored.astype(f"{order}f4")),
    ):
        made = tiff(bits, white_is_zero, data.tobytes(), (48, 8), kind, order)
        if (bits, white_is_zero, order) == (16, True, ">"):  # which Pillow does not decode
            with pytest.raises(ImageError, match=r"of a kind that is not read .*; save it as PNG"):
                read_image(made)
            continue
        shown = np.asarray(read_image(made))[..., 0].astype(int)
        assert np.abs(shown - np.rint(RAMP * 255)).max() <= 1, (bits, kind)
    # Twelve bits are scaled from their own white: two pixels in three bytes, 0 and 4095.
    assert red(tiff(12, False, bytes([0x00, 0x0F, 0xFF]), (2, 1))) == [0, 255]


@pytest.mark.parametrize(
    ("made", "right"),
    [
        (png(2, 2, 0, bytes([0b01_10_0000]), words(1)), [255, 170]),
        (png(2, 4, 0, b"\x3a", words(3)), [255, 170]),
        (png(2, 8, 0, b"\x03\x10", words(3)), [255, 16]),
        (png(2, 16, 0, words(1000, 5140), words(1000)), [255, 20]),
        (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), words(1, 2, 3)), [255, 4]),
        (png(2, 16, 2, words(1000, 2000, 3000, 5140, 0, 0), words(1000, 2000, 3000)), [255, 20]),
    ],
)
def test_a_transparent_level_is_white_in_every_depth(made: bytes, right: list[int]) -> None:
    np.testing.assert_allclose(red(made), right, atol=1)


def noted() -> bytes:
    """A PNG with more text beside its pixels than Pillow reads."""
    info = PngImagePlugin.PngInfo()
    info.add_text("short", "kept")
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    held = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(held, "PNG", pnginfo=info)
    return held.getvalue()


def test_a_png_s_long_text_is_passed_over(tmp_path: Path) -> None:
    data = noted()
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert read_image(source).getpixel((0, 0)) == (255, 0, 0)
    # Text behind the pixels, which Pillow meets only when it decodes them.
    end = data.index(b"IDAT") - 4
    length = int.from_bytes(data[end : end + 4], "big") + 12
    late = data[:33] + data[end : end + length] + data[33:end] + data[end + length :]
    assert read_image(late).getpixel((0, 0)) == (255, 0, 0)
    # The limit of pixels holds on this way, too.
    with pytest.raises(ImageTooLarge, match="above the limit of 23"):
        read_image(data, max_pixels=23)
    with pytest.raises(ImageError, match=r"truncated|broken"):
        read_image(data[:-40])

    class Opens(list[bytes]):
        def __getitem__(self, position):  # type: ignore[no-untyped-def]
            return Image.open(io.BytesIO(super().__getitem__(position)))

    with pytest.raises(ImageError, match="0: is a PNG with more text beside its pixels than"):
        from_dataset(Opens([data])).open(0)


def test_heic_is_read_by_the_extra_and_named_without_it(tmp_path, monkeypatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 32), (200, 30, 30))
    picture.paste((20, 20, 220), (0, 0, 32, 32))
    heif.from_pillow(picture).save(tmp_path / "a.heic", quality=95)
    before = dict(Image.OPEN)
    read = np.asarray(read_image(tmp_path / "a.heic"))
    assert before == Image.OPEN  # nothing of Pillow's changes for others
    assert read.shape == (32, 64, 3)
    np.testing.assert_allclose(read[16, [8, 56]], [[20, 20, 220], [200, 30, 30]], atol=12)
    with pytest.raises(ImageTooLarge, match="has 64 x 32 pixels"):
        read_image(tmp_path / "a.heic", max_pixels=100)
    with pytest.raises(ImageError, match=r"broken header|cannot be decoded"):
        read_image(b"\0\0\0\x18ftypheic" + bytes(200), name="b.heic")
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(picture).save(tmp_path / "turned.heic", exif=exif.tobytes(), quality=95)
    turned = np.asarray(read_image(tmp_path / "turned.heic"))
    assert turned.shape == (64, 32, 3)
    np.testing.assert_allclose(turned[[8, 56], 16], [[20, 20, 220], [200, 30, 30]], atol=12)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a\.heic: is a HEIC .* pip install \"embedcam\[heic\]\""):
        read_image(tmp_path / "a.heic")


def test_extras_that_messages_name_exist() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    sources = [path.read_text() for path in (root / "embedcam").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"embedcam\[(\w+)\]", text)}
    assert "heic" in named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    held = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(held, kind, save_all=True, append_images=frames[1:], **more)
    np.testing.assert_allclose(read_image(held.getvalue()).getpixel((3, 3)), (255, 0, 0), atol=1)


class Rows(list[dict[str, object]]):
    """Rows with named features, as Hugging Face's data sets have them."""

    class Label:
        names = ("cat", "dog")

    features: ClassVar = {"image": None, "label": Label()}

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        if key == "label":
            return [row["label"] for row in self]
        return super().__getitem__(key)


def grey(value: int) -> Image.Image:
    return Image.new("L", (3, 2), value)


def test_rows_as_they_come() -> None:
    held = io.BytesIO()
    grey(7).save(held, "PNG")
    undecoded = {"bytes": held.getvalue(), "path": None}
    images = [grey(0), undecoded, grey(2)]
    rows = [{"image": one, "label": k} for one, k in zip(images, (0, 1, -1), strict=True)]
    source = from_dataset(Rows(rows))
    assert source.labels == ["cat", "dog", None]
    assert [source.open(place).getpixel((0, 0))[0] for place in range(3)] == [0, 7, 2]
    plain = from_dataset([{"img": grey(5), "class": 3}, {"img": grey(6)}])
    assert plain.labels == ["3", None]
    assert plain.open(0).getpixel((0, 0)) == (5, 5, 5)
    pairs = from_dataset([(undecoded, "a"), (undecoded, float("nan"))])
    assert pairs.labels == ["a", None]
    assert pairs.open(0).getpixel((0, 0)) == (7, 7, 7)


def test_rows_that_are_no_pictures_say_what_is_missing() -> None:
    source = from_dataset([{"pixel_values": 1, "text": "a"}])
    with pytest.raises(InputError, match=r"columns pixel_values, text; .* called 'image'"):
        source.open(0)
    with pytest.raises(InputError, match=r"dict: is a dictionary \(train, test\).*; give one of"):
        from_dataset({"train": [], "test": []})
    with pytest.raises(ImageError, match="0: has 3 x 2 pixels, above the limit of 5"):
        from_dataset([grey(0)], max_pixels=5).open(0)
