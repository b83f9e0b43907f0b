"""`model.embedcam`: an index without its rows, in one file, and the generation that rows are of.

The file is a ZIP archive without compression: manifest.json, which names no part, and the fitted
arrays, each under the name that it has in the index. The same index makes the same bytes.
"""

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._files import NotPlain, read_regular, write_whole
from ..errors import IndexFormatError
from . import manifest as manifest_file
from .arrays import sha256_of
from .concepts import ARRAYS
from .manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from .reader import Index

MOST_BYTES = 1 << 28
"""Of a model: what is fitted once is small, unless somebody made it large on purpose."""
_AGAIN = "write it again with `embedcam model INDEX -o FILE`"
DECODE_NO_ROW = ("text_mean", *sorted(ARRAYS))
"""How the names of fitted arrays begin that rows are not read by."""
_DIGITS = 16


def write_model(index: "Index", path: str | Path) -> Path:
    """Write what is kept once for the whole index as one file, and return its path.

    Raises `InputError` where it cannot be written.
    """
    raw = index.manifest.to_dict()
    counts, fit = {"rows": 0, "live": 0, "added_after_fit": 0}, {**raw["fit"], "rows": 0}
    raw |= {"parts": [], "tombstones": None, "faiss": None, "counts": counts, "fit": fit}
    content = BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo made by its name alone has the same date whenever it is written.
        manifest = manifest_file.text_of(Path(path), raw)
        archive.writestr(zipfile.ZipInfo(manifest_file.NAME), manifest)
        for name, array in sorted(index.fitted_files.items()):
            place = f"{index.manifest.fitted.directory}/{name}"
            archive.writestr(zipfile.ZipInfo(place), array.tobytes())
    return write_whole(path, content.getvalue())


def read_model(path: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Return the manifest, and the fitted arrays by place, all checksums compared.

    Raises `IndexFormatError` of a file that is no model, or a broken one.
    """
    try:
        whole = read_regular(path.parent, path.name, MOST_BYTES)
        with zipfile.ZipFile(BytesIO(whole)) as archive:
            members = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                raise NotPlain("holds a compressed file")
            # Members may lie over one another, so that they hold more than the file.
            if sum(one.file_size for one in members) > len(whole):
                raise NotPlain("says that it holds more than it has")
            files = {one.filename: archive.read(one) for one in members}
    except NotPlain as error:
        raise _broken(path, str(error)) from error
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _broken(path, f"is no model of embedcam ({str(error)[:100]})") from error
    if manifest_file.NAME not in files:
        raise _broken(path, f"is no model of embedcam (it holds no {manifest_file.NAME})")
    manifest = manifest_file.of_bytes(path, files.pop(manifest_file.NAME))
    if manifest.parts or manifest.faiss or manifest.tombstones:
        raise _broken(path, "names rows, which a model has none of")
    named = manifest.files.keys()
    if named ^ files.keys() or len(members) != len(named) + 1:
        raise _broken(path, "its files are not those that its manifest names")
    arrays = {}
    for name, entry in manifest.fitted.files.items():
        place = f"{manifest.fitted.directory}/{name}"
        array = np.frombuffer(files[place], np.uint8)
        if len(array) != entry.bytes or sha256_of(array) != entry.sha256:
            raise _broken(path, f"{place} does not match its checksum, so it was altered")
        arrays[place] = array.view(np.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
    return manifest, arrays


def generation_of(manifest: Manifest) -> str:
    """Return what rows of this index can be read by, 16 hexadecimal digits.

    A digest of the recipe, the network, the encodings and all that was fitted: additions and
    removals leave it, another build changes it. (The manifest's own `generation` counts changes.)
    What is fitted but decodes no row is left out: see `DECODE_NO_ROW`.
    """
    same = ("recipe_sha256", "embedding", "metric", "method", "target", "norm", "layers")
    network = dict(manifest.raw["network"] or {})
    network.pop("loading", None)  # where it lies does not matter
    files = manifest.fitted.files.items()
    fitted = {name: one.sha256 for name, one in files if not name.startswith(DECODE_NO_ROW)}
    said = {**manifest.entries(*same), "network": network, "fitted": fitted}
    return manifest_file.digest(said)[:_DIGITS]


def digest_of_part(files: Mapping[str, FileEntry]) -> str:
    """Return what tells a part from every other, by its content, 16 hexadecimal digits."""
    return manifest_file.digest({name: one.sha256 for name, one in files.items()})[:_DIGITS]


def _broken(path: Path, what: str) -> IndexFormatError:
    return IndexFormatError(f"{path}: {what}; {_AGAIN}")
