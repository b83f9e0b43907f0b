"""One image: from a file, bytes, Pillow or numpy to an upright RGB picture; and a file's mark.

What becomes of pictures that are not plain 8-bit RGB:

- EXIF orientation is applied; a broken EXIF block counts as none.
- Grey, palette, CMYK and YCbCr are converted, transparency is composed on white; color profiles
  are ignored, as networks' training pipelines ignore them.
- 16 bits a channel are scaled to 8 (65535 becomes 255), not clipped.
- Of an animation or a multi-page file the first picture is taken.
- HEIC and HEIF need pillow-heif, the extra `embedcam[heic]`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np
from PIL import Image

from .. import errors as memory
from ..errors import ImageError, ImageTooLarge, reason

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# Pillow's own threshold for a warning: 89 million pixels, 268 MB once decoded.
MAX_PIXELS: Final = 178_956_970 // 2

# The decoders used, whatever a file is called. Pillow knows more, some of which run programs (EPS).
FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_HEIF: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1",
                b"msf1")  # fmt: skip
EXTENSIONS: Final = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif", ".hif",
))  # fmt: skip

_URL: Final = re.compile(
    # One slash, too: as `pathlib` writes them.
    r"(https?|ftps?|sftp|s3a?|gs|gcs|hf|az|abfss?|file|memory)://?|data:image/",
    re.IGNORECASE,
)
_BYTES_A_PIXEL: Final = 32
"""What decoding, converting and turning take at once."""
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 0x0112, 258, 262, 0
# How far a PNG's level has to go to be one of the pixel's, by Pillow's name for its raw pixels.
_LEVELS: Final = {
    "L;2": lambda level: level * 85,
    "L;4": lambda level: level * 17,
    "RGB;16B": lambda levels: tuple(level >> 8 for level in levels),
}
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageLike = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray
FileState = Literal["same", "changed", "missing"]
NO_MARK: Final = (0, 0, 0, 0)
"""Of what is no file, or could not be read; no file has it."""
_hash = partial(hashlib.blake2b, digest_size=8)
MAX_HASHED: Final = 1 << 28
"""Bytes of a file whose content is looked at; of a larger one size and time have to do."""


def read_image(
    source: ImageLike, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Return the picture as a person sees it: RGB, 8 bits, upright.

    Parameters
    ----------
    source
        A path, the bytes of a file, an open binary file, a Pillow image, or a numpy array: uint8 or
        uint16 `[H W]`, `[H W 3]`, `[H W 4]`, or floats of these shapes in [0, 1].
    max_pixels
        More than this many pixels are refused before they are decoded.
    name
        What to call the image in messages; a path by default.

    Raises
    ------
    ImageError
        Beginning with the path or name, for whatever cannot be read.
    """
    if isinstance(source, np.ndarray):
        name = name or "array"
        _check_size(name, source.shape[1::-1], max_pixels)
        return Image.fromarray(_eight_bits(name, source))
    if isinstance(source, Image.Image):
        return _finish(
            name or str(getattr(source, "filename", "") or "picture"), source, max_pixels
        )
    if hasattr(source, "read"):
        name = name or str(getattr(source, "name", "open file"))
        source = source.read()
        if not isinstance(source, bytes):
            raise ImageError(f"{name}: opened as text; open it in binary mode (rb)")
    if isinstance(source, bytes | bytearray | memoryview):
        name = name or f"image of {len(source)} bytes"
        return _decode(name, io.BytesIO(source), len(source), max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"{name or 'image'}: expected a path, bytes, a binary file, a Pillow image or a numpy "
            f"array, given {type(source).__name__}"
        )
    path = os.fspath(source)
    try:
        return _read_file(path, name or path, max_pixels)
    except ImageError as error:
        if isinstance(error, ImageTooLarge):
            raise
    # Another thread may have had all the memory for that moment.
    return _read_file(path, name or path, max_pixels)


def why_missing(path: str) -> str:
    """Return what to say of a file that is not there."""
    if is_url(path):
        return "is an address, and no file of this machine; download it, or list it in a CSV"
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    return "does not exist"


def is_url(path: str) -> bool:
    """Return whether a path is an address on the network, such as https://host/a.jpg."""
    return _URL.match(path) is not None


def is_long_text(error: Exception) -> bool:
    """Return whether Pillow refused the text of a PNG, not its pixels."""
    return "MAX_TEXT" in str(error)


def file_mark(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the mark of a file as it is now, uint32 `[4]`; `NO_MARK` for what cannot be read.

    Its size modulo 2^32; the CRC-32 of its time of change (nanoseconds, as a little-endian int64);
    and the BLAKE2b-64 of its bytes, the lower half first, 0 for a file above `MAX_HASHED`.
    """
    content = bytes(8)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            return np.array(NO_MARK, np.uint32)
        with open(path, "rb") as stream:
            # Before a byte is read: a file that changes meanwhile is seen to have changed.
            status = os.fstat(stream.fileno())
            if status.st_size <= MAX_HASHED:
                content = hashlib.file_digest(stream, _hash).digest()
    except (OSError, ValueError):
        return np.array(NO_MARK, np.uint32)
    return np.array([*_size_and_time(status), *np.frombuffer(content, "<u4")], np.uint32)


def file_state(path: str | os.PathLike[str], mark: np.ndarray) -> FileState | None:
    """Return whether the file at a path is the one that was marked; None where it was not.

    With another time alone its bytes decide: copying a collection changes times and no picture.
    """
    if not np.any(mark):
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    if not stat.S_ISREG(status.st_mode):
        return "missing"
    marked, now = mark.tolist(), _size_and_time(status)
    if now == tuple(marked[:2]):
        return "same"
    if now[0] != marked[0] or not any(marked[2:]):
        return "changed"
    times = status.st_mtime_ns, status.st_ctime_ns
    hashed = _content(os.fspath(path), *status[1:3], status.st_size, *times)
    return "same" if hashed == marked[2:] else "changed"


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    time = status.st_mtime_ns.to_bytes(8, "little", signed=True)
    return status.st_size % (1 << 32), zlib.crc32(time)


@lru_cache(maxsize=4096)
def _content(path: str, *_: int) -> list[int]:
    """Return the second half of a file's mark, read once while the folder says the same of it."""
    content: list[int] = file_mark(path)[2:].tolist()
    return content


def _read_file(path: str, name: str, max_pixels: int) -> Image.Image:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            kind = "a folder, not an image" if stat.S_ISDIR(mode) else "not a regular file"
            raise ImageError(f"{name}: is {kind}")
        with open(path, "rb") as stream:
            return _decode(name, stream, os.fstat(stream.fileno()).st_size, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: {why_missing(path)}") from None
    except PermissionError:
        raise ImageError(f"{name}: may not be read (permission denied)") from None
    except (OSError, ValueError) as error:
        if memory.ran_out(error):
            raise
        said = "cannot be opened" if isinstance(error, OSError) else "is not a path"
        raise ImageError(f"{name}: {said} ({getattr(error, 'strerror', None) or error})") from None


def _decode(name: str, stream: IO[bytes], n_bytes: int, max_pixels: int) -> Image.Image:
    if n_bytes == 0:
        raise ImageError(f"{name}: is empty (0 bytes)")
    try:
        return _finish(name, _open_header(name, stream), max_pixels)
    except ImageError as error:
        if not is_long_text(error):
            raise
    return _finish(name, _open_header(name, _without_text(stream)), max_pixels)


def _without_text(stream: IO[bytes]) -> IO[bytes]:
    """Return a PNG without its text; XMP, which may turn it, stays if readable."""
    stream.seek(0)
    kept = io.BytesIO()
    kept.write(stream.read(8))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        chunk = stream.read(length + 4)
        xmp = chunk.startswith(b"XML:com.adobe.xmp\0\0") and length <= 1 << 20
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or (kind == b"iTXt" and xmp):
            kept.write(head + chunk)
    kept.seek(0)
    return kept


def _open_header(name: str, stream: IO[bytes]) -> ImageFile:
    # `Image.open` without its check for decompression bombs, which warns or raises by a global
    # setting; warnings cannot be caught safely beside other threads. See `_check_size`.
    Image.init()
    prefix = stream.read(16)
    refusals, missing = [], ""
    try:
        for kind in FORMATS:
            if kind not in Image.OPEN:  # built without this decoder
                continue
            factory, accepts = Image.OPEN[kind]
            accepted = accepts(prefix) if accepts else True
            if isinstance(accepted, str):
                missing = accepted
            elif accepted:
                stream.seek(0)
                try:
                    return factory(stream, "")
                except (SyntaxError, IndexError, TypeError, struct.error) as error:
                    # "Not mine", in the decoders' ways of saying so: another one may know it.
                    refusals.append(f"{kind}: {reason(error)}")
        if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF:
            try:  # the plugin itself, which is not registered with Pillow for everyone else
                from pillow_heif import HeifImageFile
            except ImportError:
                raise ImageError(
                    f"{name}: is a HEIC or HEIF picture, which pillow-heif reads; pip install "
                    '"embedcam[heic]"'
                ) from None
            stream.seek(0)
            opened: ImageFile = HeifImageFile(stream, "")
            return opened
        if missing:
            raise ImageError(f"{name}: cannot be read ({missing}); pip install -U pillow")
        if refusals:
            raise SyntaxError(refusals[0])
    except ImageError:
        raise
    except Exception as error:
        if "unknown pixel mode" in str(error):  # whole, and not one of those Pillow decodes
            raise ImageError(
                f"{name}: is of a kind that is not read ({reason(error)}); save it as PNG"
            ) from None
        # A crafted header can make a decoder raise nearly anything.
        _not_for_memory(name, error, 0)
        raise ImageError(f"{name}: has a broken header ({reason(error)})") from None
    raise ImageError(f"{name}: is not an image of a known kind ({', '.join(FORMATS)}, HEIF)")


def _finish(name: str, image: Image.Image, max_pixels: int) -> Image.Image:
    _check_size(name, image.size, max_pixels)
    try:
        # The level that a PNG calls transparent, in the depth that its pixels are decoded to.
        level, tiles = image.info.get("transparency"), getattr(image, "tile", None)
        if level is not None and tiles and isinstance(tiles[0][3], str):
            scale: Callable[[Any], Any] = _LEVELS.get(tiles[0][3], lambda level: level)
            image.info["transparency"] = scale(level)
        # A truncated file is found here. PNG and TIFF know their orientation only afterwards.
        image.load()
        try:
            turn = _UPRIGHT.get(int(image.getexif().get(_ORIENTATION_TAG, 1)))
        except Exception as error:  # a broken EXIF block says nothing about the pixels
            if memory.ran_out(error):
                raise
            turn = None
        plain = image.mode == "RGB" and "transparency" not in image.info
        rgb = image if plain else _to_rgb(name, image)
        if turn is None:
            return rgb
        upright = rgb.transpose(turn)
        # Without the old EXIF block: read again, the picture must not turn again.
        upright.info = {}
        return upright
    except ImageError:
        raise
    except Exception as error:
        _not_for_memory(name, error, image.width * image.height)
        words = reason(error)
        if "truncated" in words.lower() or isinstance(error, EOFError):
            raise ImageError(f"{name}: is truncated ({words})") from None
        raise ImageError(f"{name}: cannot be decoded ({words})") from None


def _check_size(name: str, size: Sequence[int], max_pixels: int) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ImageError(f"{name}: has no pixels ({' x '.join(map(str, size))})")
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: has {width} x {height} pixels, above the limit of {max_pixels}; "
            "raise max_pixels if you trust it"
        )


def _not_for_memory(name: str, error: Exception, pixels: int) -> None:
    # Not asked of the error: some decoders call too little memory a broken stream, and a crafted
    # picture may ask for more than any machine has.
    if not memory.is_left(_BYTES_A_PIXEL * pixels):
        raise MemoryError(f"{name}: there was too little memory to decode it") from error


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = _wide_values(name, image)
        pixels, level = _eight_bits(name, values), image.info.get("transparency")
        if isinstance(level, int):
            pixels[values == level] = 255
        return Image.fromarray(pixels)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _wide_values(name: str, image: Image.Image) -> np.ndarray:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # TIFF has tags
    inverted = tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO  # Pillow sees to it up to 8 bits
    if image.mode == "F":
        return np.float32(1) - values if inverted else values.astype(np.float32)
    if image.mode != "I":
        if tags.get(_BITS_TAG) == (12,):
            values = values.astype(np.uint32) * 65_535 // 4095
        return (65_535 - values if inverted else values).astype(np.uint16)
    # Pillow before 11 opens 16-bit PNG in this mode; true 32-bit pictures have no agreed white.
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError(
            f"{name}: has 32-bit values from {values.min()} to {values.max()}; "
            "convert it to 8 or 16 bits"
        )
    return values.astype(np.uint16)


def _eight_bits(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ImageError(
            f"{name}: expected an array [H W], [H W 3] or [H W 4], given {list(values.shape)}"
        )
    kind = values.dtype
    if kind.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN included
            raise ImageError(
                f"{name}: floating-point values must lie in [0, 1], given {low:g} to {high:g}; "
                "scale them, or give uint8"
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif kind == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif kind != np.uint8:
        raise ImageError(f"{name}: expected uint8, uint16 or floats in [0, 1], given {kind}")
    if values.ndim == 2:
        return np.repeat(values[:, :, None], 3, axis=2)
    values = np.ascontiguousarray(values)
    return values if values.shape[2] == 3 else np.asarray(_to_rgb(name, Image.fromarray(values)))
