"""Files at addresses, such as s3://bucket/a.jpg, through fsspec and whatever it opens them with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal

from ..errors import ImageError, InputError, cut, ran_out, reason
from .places import MAX_BYTES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_SCHEME = re.compile(r"([a-z0-9]+)://?(?=[^/])", re.IGNORECASE)
_ALIASES = {"s3a": "s3", "gcs": "gs", "ftps": "ftp"}
KNOWN = ("s3", "gs", "https", "http", "hf", "az", "abfs", "abfss", "ftp", "sftp", "memory")
"""Schemes that are read; others, such as file:, and chains of them ("::") are not."""
UNKNOWN = f"is no address that is read; known: {', '.join(f'{one}://' for one in KNOWN)}"
_STAMPS = ("ETag", "etag", "md5Hash", "checksum", "LastModified", "updated", "created", "mtime")


def is_known(address: str) -> bool:
    """Return whether an address is of a kind that is read."""
    fits = _SCHEME.match(address)
    return fits is not None and "::" not in address and _known(fits[1]) in KNOWN


def _known(scheme: str) -> str:
    return _ALIASES.get(scheme.lower(), scheme.lower())


def filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the path in it; or raise InputError."""
    fits = _SCHEME.match(address)
    if fits is None or not is_known(address):
        raise InputError(f"{cut(address, 200)}: {UNKNOWN}")
    scheme = _known(fits[1])
    with _in_words(address):
        import fsspec

        system: AbstractFileSystem = fsspec.filesystem(scheme, use_listings_cache=False)
    # Of one slash, as pathlib writes it, too; fsspec's own parser would take chains apart.
    path = f"{scheme}://{address[fits.end() :]}"
    return system, str(system._strip_protocol(path))


def read_address(address: str, start: int = 0, size: int | None = None) -> bytes:
    """Return a file's bytes, or `size` of them from `start` on; more than `MAX_BYTES` are refused.

    Timeouts and repetitions are those of fsspec's settings.
    """
    system, path = filesystem(address)
    is_web = address.lower().startswith("http")
    with _in_words(address):
        if is_web and not start:
            # A size spares fsspec the question for it, which the answer tells as well.
            with system.open(path, "rb", block_size=0, size=1) as stream:
                return _streamed(address, stream, size)
        n_bytes = system.info(path).get("size") if size is None else size
        if n_bytes is not None and n_bytes > MAX_BYTES:
            raise _too_long(address, n_bytes)
        if is_web:
            with system.open(path, "rb", cache_type="none") as stream:
                stream.seek(start)
                data: bytes = stream.read(n_bytes)
        else:
            end = start + (n_bytes or 0)
            data = system.cat_file(path, start=start, end=end) if n_bytes else b""
    return data if n_bytes is None else data[:n_bytes]


def _streamed(address: str, stream: Any, size: int | None) -> bytes:
    """Return the bytes of an answer, or the first `size`, as they come.

    A server may not say how many there are, or send more than it said.
    """
    headers = stream.r.headers
    told = "" if headers.get("Content-Encoding") else headers.get("Content-Length", "")
    if size is None and told.isdecimal():
        size = int(told)
    if size is not None and size > MAX_BYTES:
        raise _too_long(address, size)
    most, data = MAX_BYTES + 1 if size is None else size, bytearray()
    # What has arrived is given at once: seldom all that was asked for.
    while len(data) < most and (more := stream.read(most - len(data))):
        data += more
    if len(data) > MAX_BYTES:
        raise _too_long(address, len(data))
    return bytes(data)


def _too_long(address: str, n_bytes: int) -> ImageError:
    return ImageError(
        f"{cut(address, 200)}: has {n_bytes:,} bytes, and of one picture at most {MAX_BYTES:,} are "
        "read"
    )


def stamp_of_address(address: str) -> str:
    """Return what changes when a file does: size and tag, or time; "unreadable" where it is not."""
    try:
        system, path = filesystem(address)
        return stamp_of_info(system.info(path))
    except Exception as error:
        if ran_out(error):
            raise
        return "unreadable"


def stamp_of_info(info: Mapping[str, Any]) -> str:
    """Return a file's size and the first of its tag and times that its store tells."""
    told = next((info[name] for name in _STAMPS if info.get(name) is not None), "")
    return f"{info.get('size')}:{cut(str(told), 100)}"


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """Open a file for reading at random places."""
    system, path = filesystem(address)
    with _in_words(address), system.open(path, "rb") as stream:
        yield stream


def entries(address: str) -> Iterator[tuple[str, bool, str]]:
    """Yield (name, whether it is a folder, stamp) of what lies right in a folder, in no order."""
    system, path = filesystem(address)
    base = path.rstrip("/")
    with _in_words(address):
        listed = system.ls(base, detail=True)
    for info in listed:
        name = str(info["name"]).rstrip("/")
        if name.startswith(f"{base}/") and "/" not in name[len(base) + 1 :]:
            yield name[len(base) + 1 :], info["type"] == "directory", stamp_of_info(info)


def matching(pattern: str, root: str) -> list[str]:
    """Return paths below `root` of the files that a pattern fits, in order."""
    system, path = filesystem(pattern)
    base = filesystem(root)[1].rstrip("/")
    with _in_words(pattern):
        found = sorted(map(str, system.glob(path)))
    return [one[len(base) + 1 :] for one in found if one.startswith(f"{base}/")]


def kind_of(address: str) -> Literal["file", "folder"] | None:
    """Return what lies at an address, None where nothing does."""
    system, path = filesystem(address)
    with _in_words(address):
        if system.isfile(path):
            return "file"
        return "folder" if system.isdir(path) else None


@contextmanager
def _in_words(address: str) -> Iterator[None]:
    """Tell a store's exception in one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        name = cut(address, 200)
        if isinstance(error, FileNotFoundError):
            raise ImageError(f"{name}: does not exist") from error
        if isinstance(error, PermissionError):
            raise ImageError(f"{name}: may not be read ({reason(error)})") from error
        said = reason(error)
        if isinstance(error, ImportError):
            raise InputError(
                f"{name}: is an address, which fsspec reads ({said}); pip install "
                '"embedcam[remote]"'
            ) from error
        raise ImageError(f"{name}: cannot be read ({type(error).__name__}: {said})") from error
