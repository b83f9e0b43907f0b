"""What a first build writes beside its rows: the manifest's choices and the fitted arrays."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .._files import UNFINISHED, replace, sync_folder
from ..errors import InputError
from . import manifest as manifest_file
from .files import SUFFIXES, file_name, write_array
from .layout import FIELD_NAME, RESERVED
from .manifest import PlainManifest
from .records import Manifest
from .schema import Wrong, check_fields

Arrays = Mapping[str, np.ndarray]
_CALIBRATIONS = ("trust_calibration", "match_calibration")


def new_manifest(
    header: Mapping[str, Any], generation: int, rows: int, width: int
) -> PlainManifest:
    """The manifest of a first build, without its files.

    Raises:
        InputError: a header that lacks something, or holds what the format does not know.
    """
    needed = ("recipe", "embedding", "metric", "method", "target", "norm", "triplets", "layers")
    missing = [key for key in needed if key not in header]
    optional = {"network", "images", "libraries", "fitted_on", "compressed", *_CALIBRATIONS}
    known = {*needed, "sign", *optional}
    unknown = sorted(set(header) - known)
    if missing or unknown:
        raise InputError(
            f"the header lacks {missing} and has the unknown {unknown}; it takes {sorted(known)}"
        )
    embedding = {"width": width, "normalized": header["embedding"].get("normalized")}
    if header["embedding"] != embedding or type(embedding["normalized"]) is not bool:
        raise InputError(
            f"the header says embedding = {header['embedding']}; expected the width {width} of the "
            "embeddings given, and normalized true or false"
        )
    recipe = dict(header["recipe"])
    try:
        manifest = plain({key: header[key] for key in needed})
        manifest |= plain({"network": header.get("network"), "images": header.get("images")})
        for key in ("compressed", *_CALIBRATIONS):
            if header.get(key) is not None:
                manifest[key] = plain(header[key])
        manifest["recipe_sha256"] = manifest_file.digest(recipe)
    except (TypeError, ValueError) as error:
        raise InputError(f"the header cannot be written as JSON ({error})") from error
    manifest |= {
        "format": manifest_file.FORMAT,
        "format_version": manifest_file.FORMAT_VERSION,
        "generation": generation,
        "sign": header.get("sign", "margin"),
        "libraries": {**_libraries(), **header.get("libraries", {})},
        "layers": [
            {"grid": None, "cells": None, "coarse_grid": None, **layer}
            for layer in manifest["layers"]
        ],
        "fit": {"images": int(header.get("fitted_on", rows)), "rows": rows},
        "counts": counts(rows, 0),
        "parts": [],
        "tombstones": None,
        "faiss": None,
    }
    try:
        check_fields(Manifest, manifest)
    except Wrong as wrong:
        raise InputError(f"the header's {wrong}; see index/README.md") from wrong
    return manifest


def counts(rows: int, later: int) -> dict[str, int]:
    """Counts of an index without removed rows, `later` of them added after the fit."""
    return {"rows": rows, "live": rows, "added_after_fit": later}


def write_fitted(
    root: Path, generation: int, fitted: Sequence[Arrays], shared: Arrays
) -> dict[str, Any]:
    """Write what is fitted once, by layer and for all, durably; returns the manifest's entry."""
    directory = f"fitted/{generation:06d}"
    folder = (root / directory).with_suffix(UNFINISHED)
    folder.mkdir(parents=True)
    files = {}
    groups = [(f"layer{n}.", arrays) for n, arrays in enumerate(fitted)] + [("", shared)]
    for stem, arrays in groups:
        for name, array in arrays.items():
            if not FIELD_NAME.fullmatch(name) or name in RESERVED:
                raise InputError(f"a fitted array cannot be named {name!r}; use lower-case words")
            array = np.atleast_1d(np.asarray(array))
            dtype = array.dtype.name
            if dtype not in SUFFIXES or not np.isfinite(array).all():
                raise InputError(f"fitted {name!r} of type {dtype} must hold finite numbers")
            file = file_name(f"{stem}{name}", dtype)
            files[file] = write_array(folder, file, array, dtype)
    sync_folder(folder)
    replace(folder, root / directory)
    return {"directory": directory, "files": files}


def plain(value: Any) -> Any:
    """A copy of a JSON-able value."""
    return json.loads(json.dumps(value, allow_nan=False))


def _libraries() -> dict[str, str]:
    found = {"numpy": np.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["embedcam"] = metadata.version("embedcam")
    return found
