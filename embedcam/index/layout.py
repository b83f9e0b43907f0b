"""Which files a part and the fitted folder hold, with their types and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EmbedcamError
from . import manifest as manifest_file
from .encoding import Encoding, from_spec
from .files import SUFFIXES, broken, file_name, map_array
from .manifest import PlainManifest

_FITTED = re.compile(r"(?:layer([0-9]{1,4})\.)?([a-z][a-z0-9_]*)\.([a-z0-9]+)")
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = ("coarse", "coarse_scales")
STRINGS = ("ids", "paths", "labels")
MARKS = "marks.u32"
"""The one file that a part may lack: the marks of the images' files."""
Shape = tuple[int | None, ...]
"""Sizes of each axis; None where the data decides (blobs and their offsets)."""


@dataclass(frozen=True)
class Layer:
    """One explained layer: its name, channels, encoding and the grid of its coarse maps."""

    number: int
    name: str
    channels: int
    encoding: Encoding
    coarse_grid: tuple[int, int] | None
    no_rows: dict[str, tuple[str, np.ndarray]] = field(init=False, repr=False, compare=False)
    """The encoding's fields: the name of each one's file, and the field of no images."""
    coarse_files: tuple[str, str] = field(init=False, repr=False, compare=False)
    """File names of the coarse maps and of their scales."""

    def __post_init__(self) -> None:
        no_rows = {
            name: (self.file(name), np.empty((0, *kept.shape), kept.dtype))
            for name, kept in self.encoding.fields.items()
        }
        stems = (("coarse", "uint8"), ("coarse_scales", "float32"))
        maps, scales = (file_name(self.stem(stem), dtype) for stem, dtype in stems)
        object.__setattr__(self, "no_rows", no_rows)
        object.__setattr__(self, "coarse_files", (maps, scales))

    def stem(self, name: str) -> str:
        """Beginning of a field's file name."""
        return f"layer{self.number}.{name}"

    def file(self, name: str) -> str:
        """File name of one of the encoding's fields."""
        return file_name(self.stem(name), self.encoding.fields[name].dtype)


def order_dtype(n_rows: int) -> str:
    """Narrowest type that numbers the rows of a part."""
    return "uint32" if n_rows < 1 << 32 else "uint64"


def part_files(n_rows: int, width: int, layers: list[Layer]) -> dict[str, tuple[str, Shape]]:
    """File name -> (dtype, shape) of a part of `n_rows` rows."""
    order = order_dtype(n_rows)
    files: dict[str, tuple[str, Shape]] = {
        "embeddings.f32": ("float32", (n_rows, width)),
        "triplets_used.u32": ("uint32", (n_rows,)),
        file_name("ids.order", order): (order, (n_rows,)),
        "labels.codes.i32": ("int32", (n_rows,)),
    }
    for stem in STRINGS:
        files[f"{stem}.utf8"] = ("uint8", (None,))
        files[f"{stem}.offsets.u64"] = ("uint64", (None if stem == "labels" else n_rows + 1,))
    for layer in layers:
        for name, kept in layer.encoding.fields.items():
            files[layer.file(name)] = (kept.dtype, (n_rows, *kept.shape))
        if layer.coarse_grid is not None:
            maps, scales = layer.coarse_files
            files[maps] = ("uint8", (n_rows, *layer.coarse_grid))
            files[scales] = ("float32", (n_rows,))
    return files


def map_part(
    root: Path, part: Mapping[str, Any], width: int, layers: list[Layer]
) -> dict[str, Any]:
    """Every file of a part, mapped, after type, shape and size were checked.

    Raises:
        FileNotFoundError: a file is missing.
        IndexFormatError: a file or its entry is not what the layout asks for.
    """
    expected = part_files(part["count"], width, layers)
    entries: Mapping[str, Any] = part["files"]
    if MARKS in entries:
        expected[MARKS] = ("uint32", (part["count"], 4))
    for name in sorted(expected.keys() ^ entries.keys()):
        what = "is not listed in the manifest" if name in expected else "is no file of a part"
        raise broken(root, f"{part['directory']}/{name}", what)
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        fits = len(shape) == len(entry["shape"]) and all(
            want is None or want == got for want, got in zip(shape, entry["shape"], strict=True)
        )
        if entry["dtype"] != dtype or not fits:
            raise broken(
                root,
                f"{part['directory']}/{name}",
                f"the manifest says {entry['dtype']} {entry['shape']} where the format asks for "
                f"{dtype} {_say(shape)}",
            )
    if entries["labels.offsets.u64"]["shape"] == [0]:
        raise broken(root, f"{part['directory']}/labels.offsets.u64", "is empty")
    return {
        name: map_array(root, f"{part['directory']}/{name}", entry)
        for name, entry in entries.items()
    }


def map_fitted(root: Path, manifest: PlainManifest) -> dict[str, np.ndarray]:
    """The arrays kept once, mapped, by file name."""
    directory = manifest["fitted"]["directory"]
    for name, entry in manifest["fitted"]["files"].items():
        found = _FITTED.fullmatch(name)
        known = found and (found[1] is None or int(found[1]) < len(manifest["layers"]))
        if not found or not known or found[3] != SUFFIXES[entry["dtype"]]:
            raise broken(root, f"{directory}/{name}", "is no file of the fitted folder")
        if found[1] is None and not _fits(found[2], entry, manifest["embedding"]["width"]):
            what = f"holds {entry['dtype']} {entry['shape']}, which is no {found[2]}"
            raise broken(root, f"{directory}/{name}", what)
    return {
        name: map_array(root, f"{directory}/{name}", entry)
        for name, entry in manifest["fitted"]["files"].items()
    }


def _fits(name: str, entry: Mapping[str, Any], width: int) -> bool:
    """Whether an array kept once for the whole index has its type and shape; others are free."""
    if name not in ("embedding_mean", "probe_embedding", "probe_pooled"):
        return True
    shape = entry["shape"]
    fits = len(shape) == 1 and shape[0] > 0 if name == "probe_pooled" else shape == [width]
    return fits and entry["dtype"].startswith("float")


def map_tombstones(root: Path, manifest: PlainManifest) -> np.ndarray:
    """Positions of removed rows, mapped, uint64 `[n]`.

    Raises:
        FileNotFoundError: the file is missing.
        IndexFormatError: positions that do not rise or lie outside; every reader counts on them.
    """
    entry, rows = manifest["tombstones"], manifest["counts"]["rows"]
    removed = np.empty(0, np.uint64)
    if entry is not None:
        removed = map_array(root, entry["file"], entry)
    if len(removed) and removed.max() >= rows:
        what = f"removes row {removed.max()} of an index of {rows} rows"
        raise broken(root, entry["file"], what)
    if (removed[1:] <= removed[:-1]).any():
        raise broken(root, entry["file"], "the positions do not rise")
    fitted = manifest["fit"]["rows"]
    later = rows - fitted - int((removed >= fitted).sum())
    if manifest["counts"]["added_after_fit"] != later:
        what = f"counts.added_after_fit is not {later}, the live rows behind the fit"
        raise broken(root, manifest_file.NAME, what)
    return removed


def of_layer(files: Mapping[str, np.ndarray], number: int | None) -> dict[str, np.ndarray]:
    """Arrays of one layer by name, or with None those that belong to the whole index."""
    stem = "" if number is None else f"layer{number}."
    return {
        name.removeprefix(stem).split(".")[0]: array
        for name, array in files.items()
        if name.startswith(stem) and name.removeprefix(stem).count(".") == 1
    }


def make_layers(root: Path, manifest: PlainManifest, fitted: list[dict[str, Any]]) -> list[Layer]:
    """The layers that a manifest describes, with their encodings.

    Raises:
        IndexFormatError: a description that no encoding answers to.
    """
    layers = []
    for number, entry in enumerate(manifest["layers"]):
        try:
            encoding = from_spec(
                entry["encoding"], entry["channels"], fitted[number], entry["grid"]
            )
        except (EmbedcamError, KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is unusable ({error})"
            raise broken(
                root, manifest_file.NAME, f"the encoding of layers[{number}] {what}"
            ) from error
        grid = entry.get("coarse_grid")
        layer = Layer(
            number,
            str(entry.get("name")),
            entry["channels"],
            encoding,
            None if grid is None else (grid[0], grid[1]),
        )
        width = manifest["embedding"]["width"]
        if encoding.uses_embedding and getattr(encoding, "rank", width) != width:
            raise broken(
                root,
                manifest_file.NAME,
                f"layers[{number}] derives its codes from embeddings of width {width}, and its "
                f"rank is {getattr(encoding, 'rank', None)}",
            )
        layers.append(layer)
    return layers


def _say(shape: Shape) -> str:
    return "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
