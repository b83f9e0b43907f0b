"""manifest.json: a typed `Manifest`, checked by its own declaration (see records), read once."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from .._files import NotPlain, fresh, read_regular, replace
from ..errors import IndexFormatError, InputError, short
from ..images.number_labels import near_share
from ..preprocess import AnyPreprocess, preprocess_from_dict
from .arrays import SUFFIXES, broken
from .calibration import Calibration, MatchCalibration
from .records import Json, Reader, Wrong, of_type, one_of, read_as, real, text, whole

NAME = "manifest.json"
FORMAT = "embedcam-index"
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
MAX_DEPTH = 20
MAX_COARSE = 64
"""Positions of a stored map."""
MAX_FILES = 1 << 14
"""Each is mapped; a process has some 65,000 maps, of the default kernel."""
FAISS_BLOCK, MOST_FAISS_BLOCKS = 1 << 20, 1 << 17
"""Bytes of a block of a FAISS file that has a digest of its own, and how many have."""
MOST_FAISS_FILES = 256
"""Each stays open."""
_SIDE = (1 << 16) - 1
_PIECES = re.compile(r"(parts|fitted|\.building|\.lock|faiss-.*|tombstones-.*|manifest\.json\.tmp)")


_short_text = text(500)


def _numbered(pattern: str) -> Reader:
    return text(100, pattern.replace("NNNNNN", "[0-9]{6,12}"), pattern.replace("\\", ""))


def _preprocess(value: object) -> AnyPreprocess:
    try:
        return preprocess_from_dict(of_type(dict, value))
    except Wrong:
        raise
    except InputError as error:
        raise Wrong(f": {str(error)[:200]}") from error


def loading_of(value: object) -> Json:
    """Return the arguments that load a network again, those that name code or files checked."""
    read_as(_Loading, value)  # the other arguments are `load_network`'s to check
    return of_type(dict, value)


def _any_json(value: object) -> object:
    """Read any JSON value, of numbers and texts that a message can repeat."""
    if isinstance(value, dict):
        return {_short_text(key): _any_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_any_json(one) for one in value]
    if type(value) is int:
        return whole(-(1 << 64), 1 << 64)(value)
    return _short_text(value) if isinstance(value, str) else value


# Records: see index/README.md. Whatever no file bounds has a bound here that memory survives.

Count = Annotated[int, whole(0, (1 << 48) - 1)]
Some = Annotated[int, whole(1, (1 << 48) - 1)]
Width = Annotated[int, whole(1, 1 << 20)]
Seed = Annotated[int, whole(0, (1 << 64) - 1)]
Side = Annotated[int, whole(1, _SIDE)]
Grid = tuple[Side, Side]
Name = Annotated[str, text(500)]
Spoken = Annotated[str, text(4096, r"[^\0-\x1f\x7f-\x9f]*", "text without control characters")]
"""What is repeated in a command that a message asks for."""
Sha256 = Annotated[str, text(64, r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
FileName = Annotated[
    str, text(100, r"(?!.*\.\.)[a-z][a-z0-9_.]*", "a plain file name of a-z, 0-9, _ and .")
]
Situation = Annotated[str, partial(one_of, ("one", "several"))]
"""How many neighbors explain a query."""
Difference = Annotated[float, real(-2, 2)]


@dataclass(frozen=True)
class FileEntry:
    """The array in a file, its exact size and its checksum."""

    dtype: Annotated[str, partial(one_of, tuple(SUFFIXES))]
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 4:
            raise Wrong(f" is {short(list(self.shape))}, not a list of 1 to 4 sizes", "shape")
        # Python's integers cannot overflow, so this product is the true one.
        expected = math.prod(self.shape, start=np.dtype(self.dtype).itemsize)
        if self.bytes != expected:
            raise Wrong(
                f" says {self.bytes} bytes where {self.dtype} {list(self.shape)} takes {expected}"
            )


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

    nprobe: Annotated[int, whole(1, 1 << 24)] | None = None
    ef_search: Annotated[int, whole(1, 1 << 16)] | None = None


@dataclass(frozen=True)
class FaissBlocks:
    """BLAKE2b of each block of a FAISS file, 8 bytes each in hexadecimal, one after the other.

    `of` is the checksum of the file that they belong to: a writer of before this entry keeps it
    beside another file.
    """

    of: Sha256
    blake2b: Annotated[
        str, text(16 * MOST_FAISS_BLOCKS, r"([0-9a-f]{16})*", "digests of 16 hexadecimal digits")
    ]


@dataclass(frozen=True, kw_only=True)
class FaissFileEntry:
    """One file for searching."""

    file: str
    bytes: Some
    sha256: Sha256
    version: Name | None = None
    blocks: FaissBlocks | None = None

    def __post_init__(self) -> None:
        count, told = -(-self.bytes // FAISS_BLOCK), self.blocks
        if told is not None and told.of == self.sha256 and len(told.blake2b) != 16 * count:
            raise Wrong(f" has {len(told.blake2b)} digits for {count} blocks", "blocks", "blake2b")


@dataclass(frozen=True, kw_only=True)
class FurtherFaissEntry(FaissFileEntry):
    """A file of the rows behind those of the files before it."""

    file: Annotated[str, _numbered(r"faiss-NNNNNN\.[0-9]{4}\.index")]
    rows: Some


@dataclass(frozen=True, kw_only=True)
class FaissEntry(FaissFileEntry):
    """The derived file for searching, the first of them where there are several."""

    factory: Annotated[str, text(500, r"(?!.*[0-9]{8})[^\0]*", "numbers of at most 7 digits")]
    search: SearchSettings
    file: Annotated[str, _numbered(r"faiss-NNNNNN\.index")]
    trained_on: Count
    more: tuple[FurtherFaissEntry, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.more) >= MOST_FAISS_FILES:
            raise Wrong(f" names {len(self.more)} files; at most {MOST_FAISS_FILES - 1}", "more")
        for number, one in enumerate(self.more):
            if one.file.split(".")[1] != f"{number + 1:04d}":
                raise Wrong(
                    f" is {one.file!r}, the file number {number + 1}", "more", number, "file"
                )


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
    cells: Annotated[int, whole(1, _SIDE**2)] | None
    encoding: EncodingEntry
    coarse_grid: Grid | None
    uses_positions: bool | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.cells not in (None, math.prod(self.grid)):
            raise Wrong(f" is {self.cells} on a grid of {self.grid[0]} x {self.grid[1]}", "cells")
        if self.coarse_grid is not None and math.prod(self.coarse_grid) > MAX_COARSE:
            raise Wrong(f" has more than {MAX_COARSE} cells", "coarse_grid")


@dataclass(frozen=True)
class _Loading:
    """Of the arguments that load the network again, those that name code or files."""

    network: Spoken | None = None
    weights: Spoken | None = None
    head: Spoken | None = None


@dataclass(frozen=True)
class NetworkEntry:
    """The identity of the network; `identity.Identity` asks for what it compares."""

    name: Name | None = None
    layer: Name | None = None
    parameters_sha256: Name | None = None
    structure_sha256: Name | None = None
    preprocess: Annotated[AnyPreprocess, _preprocess] | None = None
    normalize: bool | None = None
    output: Name | Annotated[int, whole(-_SIDE, _SIDE)] | None = None
    layout: Name | None = None
    precision: Name | None = None
    loading: Annotated[Json, loading_of] | None = None


@dataclass(frozen=True)
class RunEntry:
    """How a network's forward passes are run, which later additions repeat."""

    runtime: Literal["torch", "onnx"]
    device: Annotated[str, text(100)]
    batch_size: Annotated[int, whole(1, 1 << 20)]
    channels_last: bool

    @property
    def words(self) -> str:
        """What a person reads of it."""
        last = ", channels last" if self.channels_last else ""
        by = {"torch": "torch", "onnx": "ONNX Runtime"}[self.runtime]
        return f"batches of {self.batch_size:,}{last}, {by}"

    def __str__(self) -> str:
        return f"forward passes: {self.words}"


@dataclass(frozen=True)
class ImagesEntry:
    """Where the images lay and what their files were."""

    root: Annotated[str, text(4096)] | None
    files_sha256: Name | None = None


@dataclass(frozen=True)
class TripletsEntry:
    """The triplets behind the weights."""

    sampling: Name
    count: Count
    hinge: bool
    margin: Annotated[float, real(0, 1e308)]
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
    cosine: Mapping[Annotated[str, text(15, r"[0-9]+", "numbers of neighbours")], Loss | None]
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
        for path, size in (
            (["prototypes"], self.prototypes),
            (["rows"], self.rows),
            (["fidelity", "images"], self.fidelity.images),
        ):
            if size > self.from_rows:
                raise Wrong(f" is {size}, of {self.from_rows} images", *path)


@dataclass(frozen=True)
class Manifest:
    """What an index is: every key of its manifest.json that is read, checked; see `read`."""

    format: Literal["embedcam-index"]
    format_version: Literal[1]
    generation: Annotated[int, whole(1, 1 << 32)]
    recipe: Mapping[Name, Annotated[Any, _any_json]]
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
    run: RunEntry | None = None
    trust_calibration: Mapping[Situation, Calibration] | None = None
    match_calibration: Mapping[Situation, MatchCalibration] | None = None
    manifest_sha256: Sha256 = ""
    """Empty only while the manifest is being made."""
    raw: Json = field(default_factory=dict, init=False, repr=False, compare=False)
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
                    by = f" is of explanations by {calibration.neighbors} neighbours"
                    raise Wrong(by, key, name)
        counts, removed = self.counts, self.tombstones.shape[0] if self.tombstones else 0
        total = sum(part.count for part in self.parts)
        if (counts.rows, counts.live) != (total, total - removed):
            held = f"the parts hold {total}, {removed} of them removed"
            raise Wrong(f" says {counts.rows} rows and {counts.live} live; {held}", "counts")
        further = sum(one.rows for one in self.faiss.more) if self.faiss else 0
        if further and further >= total:
            raise Wrong(
                f" holds {further} of {total} rows; the first file has some", "faiss", "more"
            )
        if (added := counts.added_after_fit) > total - self.fit.rows:
            of = f" of {added} added and {self.fit.rows} fitted rows of {total}"
            raise Wrong(of + " do not go together", "counts")

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
    def files(self) -> dict[str, FileEntry | FaissFileEntry]:
        """Every file that it names, by its path; its own is not among them."""
        alone = (self.tombstones, self.faiss, *(self.faiss.more if self.faiss else ()))
        named: dict[str, FileEntry | FaissFileEntry] = {one.file: one for one in alone if one}
        for folder in (*self.parts, self.fitted):
            named |= {f"{folder.directory}/{name}": one for name, one in folder.files.items()}
        return named

    @property
    def named_bytes(self) -> int:
        """Bytes of all files that it names."""
        return sum(entry.bytes for entry in self.files.values())

    def entries(self, *names: str) -> Json:
        """Return copies of some entries as JSON has them, None for what is not there."""
        return {name: copy.deepcopy(self.raw.get(name)) for name in names}

    def derived_header(self, encodings: Sequence[Json]) -> Json:
        """Return the header of an index merged from these rows, its layers encoded as said."""
        same = ("recipe", "network", "embedding", "metric", "method", "target", "norm", "triplets")
        header = self.entries(*same, "libraries", "images", "layers", "run")
        layers = zip(header["layers"], encodings, strict=True)
        # The digest is of the files of all images, which are no longer the rows.
        images = header["images"] and {**header["images"], "files_sha256": None}
        layers_now = [{**layer, "encoding": encoding} for layer, encoding in layers]
        return {**header, "images": images, "layers": layers_now, "fitted_on": self.fit.images}

    def to_dict(self) -> Json:
        """Return a copy of the manifest as JSON has it, keys of later versions included."""
        return copy.deepcopy(self.raw)


# The file


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON: sorted keys, no spaces."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def sealed(manifest: Json) -> Json:
    """Return the manifest with `manifest_sha256` over everything else."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return {**rest, "manifest_sha256": digest(rest)}


def text_of(root: Path, manifest: Json) -> bytes:
    """Return the file that holds a manifest; what could not be read is refused."""
    check(root, manifest)
    whole_text = json.dumps(sealed(manifest), sort_keys=True, indent=1, allow_nan=False)
    return f"{whole_text}\n".encode("ascii")


def write(root: Path, manifest: Json) -> None:
    """Put a manifest in place by one durable rename; what could not be read is not written."""
    content, unfinished = text_of(root, manifest), root / f"{NAME}.tmp"
    with fresh(unfinished) as file:
        file.write(content)
    replace(unfinished, root / NAME)


def read(root: Path) -> Manifest:
    """Return the manifest of an index, checked; no other file is touched.

    Raises `IndexFormatError`: no index, an unfinished one, or one that cannot be believed.
    """
    try:
        return of_bytes(root, read_regular(root, NAME, MAX_BYTES))
    except NotPlain as error:
        raise broken(root, NAME, str(error)) from error
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(root) from None
    except OSError as error:
        raise broken(root, NAME, f"cannot be read ({error.strerror})") from error


def of_bytes(root: Path, content: bytes) -> Manifest:
    """Return the manifest that a file's bytes hold, checked, or raise `IndexFormatError`."""
    if len(content) > MAX_BYTES:
        raise broken(root, NAME, f"has {len(content)} bytes, and at most {MAX_BYTES} are read")
    manifest = _parse(root, content)
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


def check(root: Path, manifest: Json) -> Manifest:
    """Return the typed manifest of plain values, every key checked for presence, type and range."""
    try:
        return typed(manifest)
    except Wrong as wrong:
        raise broken(root, NAME, str(wrong)) from wrong


def typed(manifest: Json) -> Manifest:
    """Return the typed manifest of plain values; raises `Wrong`."""
    checked = read_as(Manifest, manifest)
    if checked.recipe_sha256 != digest(manifest["recipe"]):
        raise Wrong(" is not the digest of the recipe", "recipe_sha256")
    object.__setattr__(checked, "raw", manifest)
    return checked


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


def _parse(root: Path, data: bytes) -> Json:
    def once(pairs: list[tuple[str, Any]]) -> Json:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number[:20]} is not JSON")
        return float(number)

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
