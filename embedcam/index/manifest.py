"""manifest.json: a typed `Manifest`, checked by its own declaration, read with suspicion once.

A record is a frozen dataclass whose annotations say what a key holds: a record, `X | None`,
`Literal[...]`, `tuple[X, ...]` (a list), `Mapping[K, X]` (an object whose keys are read as K), or
`Annotated[X, reader]`. A field without a default must be present; undeclared keys are ignored.
"""

import copy
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from .._files import NotPlain, fresh, read_regular, replace
from ..errors import IndexFormatError, InputError, short
from ..images.number_labels import near_share
from ..preprocess import AnyPreprocess, preprocess_from_dict
from .arrays import SUFFIXES, broken
from .calibration import Calibration, MatchCalibration

NAME = "manifest.json"
FORMAT = "embedcam-index"
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
MAX_DEPTH = 20
MAX_COARSE = 64
"""Positions of a stored map."""
MAX_FILES = 1 << 14
"""Each is mapped; a process has some 65,000 maps, of the default kernel."""
_SIDE = (1 << 16) - 1
_PIECES = re.compile(r"(parts|fitted|\.building|\.lock|faiss-.*|tombstones-.*|manifest\.json\.tmp)")

Reader = Callable[[Any], Any]


class Wrong(ValueError):  # noqa: N818 - reads as the fact it states
    """What is wrong with a value, as the end of a sentence, and the keys that lead to it."""

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.what, self.path = what, [*path]

    def __str__(self) -> str:
        plain = re.compile(r"[\w.-]{1,60}")
        keys = (
            f".{key}" if isinstance(key, str) and plain.fullmatch(key) else f"[{short(key)}]"
            for key in self.path
        )
        return ("".join(keys) + self.what).lstrip(". ")


# Readers: each takes a plain value and returns it, or raises `Wrong`.


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Wrong(f" is {short(value)}, not of type {kind.__name__}")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not low <= _of_type(value, int) <= high:
            raise Wrong(f" = {short(value)} is impossible; expected {low} to {high}")
        return int(value)

    return read


def _real(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        # Compared, not converted: a whole number of JSON may have more digits than a float holds.
        if type(value) not in (int, float) or not low <= value <= high:
            raise Wrong(f" is {short(value)}; expected a number from {low:g} to {high:g}")
        return float(value)

    return read


def _text(
    longest: int, pattern: str = r"[^\0]*", expected: str = "text without NUL"
) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if len(_of_type(value, str)) > longest:
            raise Wrong(f" has {len(value)} characters; at most {longest} are allowed")
        if not re.fullmatch(pattern, value, re.DOTALL):
            raise Wrong(f" is {short(value)}; expected {expected}")
        return str(value)

    return read


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(one) and value == one for one in known):
        raise Wrong(f" is {short(value)}; known: {', '.join(map(str, known))}")
    return value


def _numbered(pattern: str) -> Reader:
    return _text(100, pattern.replace("NNNNNN", "[0-9]{6,12}"), pattern.replace("\\", ""))


def _read_by(make: Reader) -> Reader:
    """Return a reader of what another module describes and checks."""

    def read(value: Any) -> Any:
        _of_type(value, dict)
        try:
            return make(value)
        except InputError as error:
            raise Wrong(f": {str(error)[:200]}") from error

    return read


def _any_json(value: Any) -> Any:
    """Read any JSON value, of numbers and texts that a message can repeat."""
    if isinstance(value, dict):
        return {_text(500)(key): _any_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_any_json(one) for one in value]
    if type(value) is int:
        return _whole(-(1 << 64), 1 << 64)(value)
    return _text(500)(value) if isinstance(value, str) else value


@cache
def _reader(kind: Any) -> Reader:
    """Return what reads a value of an annotated type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        checked: Reader = inner[1]
        return checked
    if origin is Literal:
        return partial(_one_of, inner)
    if origin in (Union, types.UnionType):
        kinds = [_reader(one) for one in inner if one is not types.NoneType]
        return lambda value: None if value is None else _first_of(kinds, value)
    if origin is tuple:
        return lambda value: _list(inner, value)
    if origin is Mapping:
        key, each = map(_reader, inner)
        return lambda value: _object(key, each, value)
    if isinstance(kind, type) and is_dataclass(kind):
        return lambda value: kind(**_fields(kind, value))
    return lambda value: _of_type(value, kind)


@cache
def _fields_of(kind: type) -> dict[str, tuple[Reader, bool]]:
    """Return of each field of a record its reader, and whether it must be present."""
    hints = get_type_hints(kind, include_extras=True)
    declared = [one for one in fields(kind) if one.init]
    return {one.name: (_reader(hints[one.name]), one.default is MISSING) for one in declared}


def _fields(kind: type, value: Any, partly: bool = False) -> dict[str, Any]:
    """Read the fields of a record; `partly` those that are there, whatever else it needs."""
    values, taken = _of_type(value, dict), {}
    for name, (read, needed) in _fields_of(kind).items():
        if name in values:
            taken[name] = _at(name, read, values[name])
        elif needed and not partly:
            raise Wrong(" is missing", name)
    return taken


def _object(key: Reader, each: Reader, value: Any) -> Mapping[str, Any]:
    taken = {}
    for name, one in _of_type(value, dict).items():
        try:
            key(name)
        except Wrong as wrong:
            what = wrong.what.partition(";")[2] or wrong.what
            raise Wrong(f" has the unknown entry {short(name)};{what}") from wrong
        taken[name] = _at(name, each, one)
    return taken


def _list(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(_of_type(value, list))
    elif len(_of_type(value, list)) != len(kinds):
        raise Wrong(f" is {short(value)}; expected {len(kinds)} values")
    return tuple(_at(n, _reader(kinds[n]), one) for n, one in enumerate(value))


def _first_of(kinds: list[Reader], value: Any) -> Any:
    for read in kinds[:-1]:
        try:
            return read(value)
        except Wrong:
            continue
    return kinds[-1](value)


def _at(key: str | int, read: Reader, value: Any) -> Any:
    try:
        return read(value)
    except Wrong as wrong:
        wrong.path.insert(0, key)
        raise


# Records: see index/README.md. Whatever no file bounds has a bound here that memory survives.

Count = Annotated[int, _whole(0, (1 << 48) - 1)]
Some = Annotated[int, _whole(1, (1 << 48) - 1)]
Width = Annotated[int, _whole(1, 1 << 20)]
Seed = Annotated[int, _whole(0, (1 << 64) - 1)]
Side = Annotated[int, _whole(1, _SIDE)]
Grid = tuple[Side, Side]
Name = Annotated[str, _text(500)]
Spoken = Annotated[str, _text(4096, r"[^\0-\x1f\x7f-\x9f]*", "text without control characters")]
"""What is repeated in a command that a message asks for."""
Sha256 = Annotated[str, _text(64, r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
FileName = Annotated[
    str, _text(100, r"(?!.*\.\.)[a-z][a-z0-9_.]*", "a plain file name of a-z, 0-9, _ and .")
]
Situation = Annotated[str, partial(_one_of, ("one", "several"))]
"""How many neighbors explain a query."""
Difference = Annotated[float, _real(-2, 2)]


@dataclass(frozen=True)
class FileEntry:
    """The array in a file, its exact size and its checksum."""

    dtype: Annotated[str, partial(_one_of, tuple(SUFFIXES))]
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 4:
            raise Wrong(f" is {short(list(self.shape))}, not a list of 1 to 4 sizes", "shape")
        # Python's integers cannot overflow, so this product is the true one.
        expected = math.prod(self.shape, start=np.dtype(self.dtype).itemsize)
        if self.bytes != expected:
            array = f"{self.dtype} {list(self.shape)}"
            raise Wrong(f" says {self.bytes} bytes where {array} takes {expected}")


@dataclass(frozen=True)
class TombstonesEntry(FileEntry):
    """The file of removed rows' positions."""

    file: Annotated[str, _numbered(r"tombstones-NNNNNN\.u64")]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "uint64" or len(self.shape) != 1:
            raise Wrong(f" says {self.dtype} {list(self.shape)}; expected uint64 [n]")


@dataclass(frozen=True)
class FolderEntry:
    """A folder of files that never change: here of arrays that are kept once."""

    directory: Annotated[str, _numbered("fitted/NNNNNN")]
    files: Mapping[FileName, FileEntry]


@dataclass(frozen=True)
class PartEntry(FolderEntry):
    """A folder of rows."""

    directory: Annotated[str, _numbered("parts/NNNNNN")]
    count: Count


@dataclass(frozen=True)
class SearchSettings:
    """How far an approximate search looks; None where the type of FAISS index has no such thing."""

    nprobe: Annotated[int, _whole(1, 1 << 24)] | None = None
    ef_search: Annotated[int, _whole(1, 1 << 16)] | None = None


@dataclass(frozen=True)
class FaissEntry:
    """The derived file for searching."""

    factory: Annotated[str, _text(500, r"(?!.*[0-9]{8})[^\0]*", "numbers of at most 7 digits")]
    search: SearchSettings
    file: Annotated[str, _numbered(r"faiss-NNNNNN\.index")]
    bytes: Some
    sha256: Sha256
    trained_on: Count
    version: Name | None = None


@dataclass(frozen=True)
class EmbeddingEntry:
    """D, and whether every row has unit length."""

    width: Width
    normalized: bool


@dataclass(frozen=True)
class EncodingEntry:
    """How weights are kept; what an encoding needs of this, `encoding.from_spec` asks for."""

    name: Literal["top-m", "low-rank", "dense", "by-position"]
    dtype: Literal["float16", "float32"]
    m: Width | None = None
    by: Literal["signed", "magnitude"] | None = None
    rank: Width | None = None
    origin: Literal["head", "pca"] | None = None
    codes: Literal["stored", "embedding"] | None = None


@dataclass(frozen=True)
class LayerEntry:
    """One explained layer."""

    name: Name
    channels: Width
    grid: Grid | None
    cells: Annotated[int, _whole(1, _SIDE**2)] | None
    encoding: EncodingEntry
    coarse_grid: Grid | None
    uses_positions: bool | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.cells not in (None, math.prod(self.grid)):
            raise Wrong(f" is {self.cells} on a grid of {self.grid[0]} x {self.grid[1]}", "cells")
        if self.coarse_grid is not None and math.prod(self.coarse_grid) > MAX_COARSE:
            what = f" {list(self.coarse_grid)} has more than {MAX_COARSE} cells"
            raise Wrong(what, "coarse_grid")


@dataclass(frozen=True)
class _Loading:
    """Of the arguments that load the network again, those that name code or files."""

    network: Spoken | None = None
    weights: Spoken | None = None
    head: Spoken | None = None


def _loading(value: Any) -> Any:
    _fields(_Loading, value)
    return value  # the other arguments are `load_network`'s to check


@dataclass(frozen=True)
class NetworkEntry:
    """The identity of the network; `identity.Identity` asks for what it compares."""

    name: Name | None = None
    layer: Name | None = None
    parameters_sha256: Name | None = None
    structure_sha256: Name | None = None
    preprocess: Annotated[AnyPreprocess, _read_by(preprocess_from_dict)] | None = None
    normalize: bool | None = None
    output: Name | Annotated[int, _whole(-_SIDE, _SIDE)] | None = None
    layout: Name | None = None
    precision: Name | None = None
    loading: Annotated[Mapping[str, Any], _read_by(_loading)] | None = None


@dataclass(frozen=True)
class ImagesEntry:
    """Where the images lay and what their files were."""

    root: Annotated[str, _text(4096)] | None
    files_sha256: Name | None = None


@dataclass(frozen=True)
class TripletsEntry:
    """The triplets behind the weights."""

    sampling: Name
    count: Count
    hinge: bool
    margin: Annotated[float, _real(0, 1e308)]
    seed: Seed
    sha256: Sha256 | None = None


@dataclass(frozen=True)
class Fit:
    """What the first build saw."""

    images: Count
    rows: Count


@dataclass(frozen=True)
class Counts:
    """Rows; those that are not removed; live ones behind the fit."""

    rows: Count
    live: Count
    added_after_fit: Count


@dataclass(frozen=True)
class Loss:
    """A mean over all images, over the prototypes, and their difference."""

    index: Difference
    prototypes: Difference
    loss: Difference


@dataclass(frozen=True)
class Fidelity:
    """What prototypes lost, measured on a sample."""

    images: Count
    cosine: Mapping[Annotated[str, _text(15, r"[0-9]+", "numbers of neighbours")], Loss | None]
    recall_at_1: Loss | None


@dataclass(frozen=True)
class CompressedEntry:
    """What an index of prototypes was made of."""

    from_rows: Some
    from_bytes: Count
    prototypes: Some
    rows: Some
    per_class: bool
    seed: Seed
    fidelity: Fidelity

    def __post_init__(self) -> None:
        sizes: dict[tuple[str, ...], int] = {("prototypes",): self.prototypes, ("rows",): self.rows}
        sizes[("fidelity", "images")] = self.fidelity.images
        for path, size in sizes.items():
            if size > self.from_rows:
                raise Wrong(f" is {size}, of {self.from_rows} images", *path)


@dataclass(frozen=True)
class Manifest:
    """What an index is: every key of its manifest.json that is read, checked; see `read`."""

    format: Literal["embedcam-index"]
    format_version: Literal[1]
    generation: Annotated[int, _whole(1, 1 << 32)]
    recipe: Annotated[Mapping[str, Any], _read_by(_any_json)]
    recipe_sha256: Sha256
    network: NetworkEntry | None
    images: ImagesEntry | None
    libraries: Mapping[Name, Name]
    embedding: EmbeddingEntry
    metric: Literal["l2", "ip"]
    sign: Literal["margin"]
    method: Name
    target: Name
    norm: Name
    triplets: TripletsEntry
    layers: tuple[LayerEntry, ...]
    fit: Fit
    counts: Counts
    parts: tuple[PartEntry, ...]
    fitted: FolderEntry
    tombstones: TombstonesEntry | None
    faiss: FaissEntry | None
    compressed: CompressedEntry | None = None
    trust_calibration: (
        Mapping[Situation, Annotated[Calibration, _read_by(Calibration.from_dict)]] | None
    ) = None
    match_calibration: (
        Mapping[Situation, Annotated[MatchCalibration, _read_by(MatchCalibration.from_dict)]] | None
    ) = None
    manifest_sha256: Sha256 = ""
    """Empty only while the manifest is being made."""
    raw: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """As JSON has it, keys of later versions included; for this module and `identity` alone."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise Wrong(" describes no layer")
        if len(set(self.layer_names)) < len(self.layers):
            raise Wrong(" names one layer twice")
        if len({part.directory for part in self.parts}) < len(self.parts):
            raise Wrong(" names one part twice", "parts")
        if (n_files := sum(len(part.files) for part in self.parts)) > MAX_FILES:
            raise Wrong(f" names {n_files} files of parts; at most {MAX_FILES} are mapped")
        for key in ("trust_calibration", "match_calibration"):
            for name, calibration in (getattr(self, key) or {}).items():
                if (calibration.neighbors == 1) != (name == "one"):
                    what = f" is of explanations by {calibration.neighbors} neighbours"
                    raise Wrong(what, key, name)
        counts, removed = self.counts, self.tombstones.shape[0] if self.tombstones else 0
        total = sum(part.count for part in self.parts)
        if counts.rows != total or counts.live != total - removed:
            raise Wrong(
                f" says {counts.rows} rows and {counts.live} live; the parts hold {total}, "
                f"{removed} of them removed",
                "counts",
            )
        if counts.added_after_fit > total - self.fit.rows:
            what = f" of {counts.added_after_fit} added and {self.fit.rows} fitted rows of {total}"
            raise Wrong(what + " do not go together", "counts")

    @property
    def is_compressed(self) -> bool:
        """Whether rows are prototypes, each merged from several images."""
        return self.compressed is not None

    @property
    def has_earlier_trust(self) -> bool:
        """Whether trust was calibrated by a version that meant something else by it."""
        return "trust" in self.raw and self.trust_calibration is None

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, deepest first."""
        return [layer.name for layer in self.layers]

    @property
    def images_root(self) -> str | None:
        """The folder that the images lay in; None where it is not known."""
        return None if self.images is None else self.images.root

    @property
    def near_share(self) -> float | None:
        """Share of the images that are near in value; None where labels are classes."""
        return near_share(self.recipe)

    @property
    def files(self) -> dict[str, FileEntry | FaissEntry]:
        """Every file that it names, by its path; its own is not among them."""
        folders: list[FolderEntry] = [*self.parts, self.fitted]
        named: dict[str, FileEntry | FaissEntry] = {
            f"{folder.directory}/{name}": entry
            for folder in folders
            for name, entry in folder.files.items()
        }
        return named | {one.file: one for one in (self.tombstones, self.faiss) if one is not None}

    @property
    def named_bytes(self) -> int:
        """Bytes of all files that it names."""
        return sum(entry.bytes for entry in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return a copy of the manifest as JSON has it, keys of later versions included."""
        return copy.deepcopy(self.raw)


# The file


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with `manifest_sha256` over everything else."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return {**rest, "manifest_sha256": digest(rest)}


def write(root: Path, manifest: Mapping[str, Any]) -> None:
    """Put a manifest in place by one durable rename; what could not be read is not written."""
    check(root, manifest)
    text = json.dumps(sealed(manifest), sort_keys=True, indent=1, allow_nan=False) + "\n"
    unfinished = root / f"{NAME}.tmp"
    with fresh(unfinished) as file:
        file.write(text.encode("ascii"))
    replace(unfinished, root / NAME)


def read(root: Path) -> Manifest:
    """Return the manifest of an index, checked; no other file is touched.

    Raises `IndexFormatError`: no index, an unfinished one, or one that cannot be believed.
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
    """Return the typed manifest of plain values, every key checked for presence, type and range."""
    try:
        checked: Manifest = _reader(Manifest)(manifest)
        if checked.recipe_sha256 != digest(manifest["recipe"]):
            raise Wrong(" is not the digest of the recipe", "recipe_sha256")
    except Wrong as wrong:
        match wrong.path:
            case ["parts", int(number), "files", str(name), *rest]:
                folder = manifest["parts"][number]
            case ["fitted", "files", str(name), *rest]:
                folder = manifest["fitted"]
            case _:
                raise broken(root, NAME, str(wrong)) from wrong
        what = f"its entry for {folder['directory']}/{name} {Wrong(wrong.what, *rest)}"
        raise broken(root, NAME, what) from wrong
    object.__setattr__(checked, "raw", manifest)
    return checked


def check_partly(manifest: Mapping[str, Any]) -> None:
    """Check those keys that are there already; raises `Wrong`."""
    _fields(Manifest, manifest, partly=True)


def layers_of(manifest: Mapping[str, Any]) -> tuple[LayerEntry, ...]:
    """Return the typed layers of a manifest that is being made."""
    layers: tuple[LayerEntry, ...] = _list((LayerEntry, ...), manifest["layers"])
    return layers


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
        what = "a file, not an index; give the folder of the index"
    elif not root.is_dir():
        what = "there is no index here; build one with `embedcam build`"
    elif any(_PIECES.fullmatch(entry.name) for entry in root.iterdir()):
        what = f"the index is unfinished (no {NAME}); run the same build again and it resumes"
    else:
        what = f"not an embedcam index (no {NAME}); check the path"
    return IndexFormatError(f"{root}: {what}")


def _parse(root: Path, data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is not JSON")
        return float(text)

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
    # What a writer, which nests a call for each level, could not write again.
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
