"""manifest.json: read with suspicion, checked against the format, written canonically."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import NotPlain, fresh, read_regular, replace
from ..errors import IndexFormatError, short
from .files import broken
from .records import Manifest
from .schema import Wrong, reader

NAME = "manifest.json"
FORMAT = "embedcam-index"
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
MAX_DEPTH = 20
_PIECES = re.compile(r"(parts|fitted|\.building|\.lock|faiss-.*|tombstones-.*|manifest\.json\.tmp)")
PlainManifest = dict[str, Any]
"""A manifest as JSON has it, keys of later versions included."""


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: the form that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> PlainManifest:
    """The manifest with `manifest_sha256` over everything else."""
    rest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return {**rest, "manifest_sha256": digest(rest)}


def write(root: Path, manifest: Mapping[str, Any]) -> None:
    """Put a manifest in place by one durable rename; what could not be read is not written.

    Raises:
        IndexFormatError: a key that `check` refuses; nothing changed.
    """
    check(root, manifest)
    text = json.dumps(sealed(manifest), sort_keys=True, indent=1, allow_nan=False) + "\n"
    unfinished = root / f"{NAME}.tmp"
    with fresh(unfinished) as file:
        file.write(text.encode("ascii"))
    replace(unfinished, root / NAME)


def read(root: Path) -> Manifest:
    """The manifest of an index, checked; no other file is touched.

    Raises:
        IndexFormatError: no index, an unfinished one, or a manifest that cannot be believed.
    """
    manifest = _parse(root, _read_bytes(root))
    if manifest.get("format") != FORMAT:
        what = f"its format is {short(manifest.get('format'))}, not {FORMAT!r}"
        raise broken(root, NAME, what)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        newer = type(version) is int and version > FORMAT_VERSION
        remedy = "install a newer embedcam" if newer else "build the index again"
        what = f"has format version {short(version)}, and this embedcam reads {FORMAT_VERSION}"
        raise broken(root, NAME, what, remedy)
    if manifest != sealed(manifest):
        raise broken(root, NAME, "does not match its own checksum, so it was altered")
    return check(root, manifest)


def check(root: Path, manifest: Mapping[str, Any]) -> Manifest:
    """The manifest with every key that is read checked once, for presence, type and range.

    Raises:
        IndexFormatError: naming the key that cannot be believed.
    """
    try:
        checked: Manifest = reader(Manifest)(manifest)
        if checked.recipe_sha256 != digest(manifest["recipe"]):
            raise Wrong(" is not the digest of the recipe", "recipe_sha256")
    except Wrong as wrong:
        raise broken(root, NAME, _said(manifest, wrong)) from wrong
    object.__setattr__(checked, "raw", manifest)
    return checked


def _said(manifest: Mapping[str, Any], wrong: Wrong) -> str:
    """What is wrong; of a file's line with the file's own name."""
    match wrong.path:
        case ["parts", int(number), "files", str(name), *rest]:
            folder = manifest["parts"][number]
        case ["fitted", "files", str(name), *rest]:
            folder = manifest["fitted"]
        case _:
            return str(wrong)
    return f"its entry for {folder['directory']}/{name} {Wrong(wrong.what, *rest)}"


def _read_bytes(root: Path) -> bytes:
    try:
        return read_regular(root, NAME, MAX_BYTES)
    except NotPlain as error:
        raise broken(root, NAME, str(error)) from error
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(root) from None
    except OSError as error:
        raise broken(root, NAME, f"cannot be read ({error.strerror})") from error


def _absent(root: Path) -> IndexFormatError:
    if root.is_file():
        return IndexFormatError(f"{root}: a file, not an index; give the folder of the index")
    if not root.is_dir():
        return IndexFormatError(f"{root}: there is no index here; build one with `embedcam build`")
    if any(_PIECES.fullmatch(entry.name) for entry in root.iterdir()):
        return IndexFormatError(
            f"{root}: the index is unfinished (no {NAME}); run the same build again and it resumes"
        )
    return IndexFormatError(f"{root}: not an embedcam index (no {NAME}); check the path")


def _parse(root: Path, data: bytes) -> PlainManifest:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key appears twice")
        return made

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not JSON")
        return value

    try:
        manifest = json.loads(
            data.decode("utf-8"), object_pairs_hook=once, parse_float=finite, parse_constant=finite
        )
        _check_depth(manifest)
    except (ValueError, RecursionError) as error:
        what = str(error)[:200] if isinstance(error, ValueError) else "it is nested too deeply"
        raise broken(root, NAME, f"is not a readable JSON file ({what})") from error
    if not isinstance(manifest, dict):
        raise broken(root, NAME, "is not a JSON object")
    return manifest


def _check_depth(manifest: object) -> None:
    """Refuse what a writer, which nests a call for each level, could not write again."""
    level = [manifest]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
