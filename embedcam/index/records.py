"""What a manifest holds: every key that is read, with its type, its range and what it must fit.

See index/README.md for what they mean. Whatever no file bounds has a bound here that memory
survives: channels, positions, search settings, lengths of text.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from ..errors import InputError, short
from ..images.number_labels import near_share
from ..preprocess import AnyPreprocess, preprocess_from_dict
from .calibration import Calibration
from .files import SUFFIXES
from .matching import MatchCalibration
from .schema import Real, Text, Whole, Wrong, check_fields, one_of

MAX_WIDTH = 1 << 20
MAX_CHANNELS = 1 << 20
MAX_EF_SEARCH = 1 << 16
MAX_NPROBE = 1 << 24
MAX_COARSE_CELLS = 64
MAX_FILES = 1 << 14
"""Each is mapped; a process has some 65,000 maps, of the default kernel."""
_SIDE = (1 << 16) - 1

Count = Annotated[int, Whole(0, (1 << 48) - 1)]
Some = Annotated[int, Whole(1, (1 << 48) - 1)]
Width = Annotated[int, Whole(1, MAX_WIDTH)]
Channels = Annotated[int, Whole(1, MAX_CHANNELS)]
Seed = Annotated[int, Whole(0, (1 << 64) - 1)]
Grid = tuple[Annotated[int, Whole(1, _SIDE)], Annotated[int, Whole(1, _SIDE)]]
Name = Annotated[str, Text(500)]
Place = Annotated[str, Text(4096)]
Spoken = Annotated[str, Text(4096, r"[^\0-\x1f\x7f-\x9f]*", "text without control characters")]
"""What is repeated in a command that a message asks for."""
Sha256 = Annotated[str, Text(64, r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
FileName = Annotated[
    str, Text(100, r"(?!.*\.\.)[a-z][a-z0-9_.]*", "a plain file name of a-z, 0-9, _ and .")
]


Situation = Annotated[str, partial(one_of, ("one", "several"))]
"""How many neighbors explain a query."""


def _numbered(pattern: str) -> Text:
    return Text(100, pattern.replace("NNNNNN", "[0-9]{6,12}"), pattern.replace("\\", ""))


def _read_by(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reader of what another module describes and checks."""

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise Wrong(f" is {short(value)}, not of type dict")
        try:
            return make(value)
        except InputError as error:
            raise Wrong(f": {str(error)[:200]}") from error

    return read


def _table(value: Any) -> Any:
    """Any JSON value, of numbers and texts that a message can repeat."""
    if isinstance(value, dict):
        return {Text(500)(key): _table(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_table(one) for one in value]
    if type(value) is int:
        return Whole(-(1 << 64), 1 << 64)(value)
    return Text(500)(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class FileEntry:
    """A file's line: the array in it, its exact size and its checksum."""

    dtype: Annotated[str, partial(one_of, tuple(SUFFIXES))]
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 4:
            raise Wrong(f" is {short(list(self.shape))}, not a list of 1 to 4 sizes", "shape")
        expected = np.dtype(self.dtype).itemsize
        for n in self.shape:
            # Python's integers cannot overflow, so this product is the true one.
            expected *= n
        if self.bytes != expected:
            what = (
                f" says {self.bytes} bytes where {self.dtype} {list(self.shape)} takes {expected}"
            )
            raise Wrong(what)


@dataclass(frozen=True)
class Tombstones(FileEntry):
    """The file of removed rows' positions."""

    file: Annotated[str, _numbered(r"tombstones-NNNNNN\.u64")]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "uint64" or len(self.shape) != 1:
            raise Wrong(f" says {self.dtype} {list(self.shape)}; expected uint64 [n]")


@dataclass(frozen=True)
class Part:
    """Immutable rows in one folder."""

    directory: Annotated[str, _numbered("parts/NNNNNN")]
    count: Count
    files: Mapping[FileName, FileEntry]


@dataclass(frozen=True)
class Fitted:
    """The folder of what is kept once."""

    directory: Annotated[str, _numbered("fitted/NNNNNN")]
    files: Mapping[FileName, FileEntry]


@dataclass(frozen=True)
class SearchSettings:
    """How far an approximate search looks; None where the type of FAISS index has no such thing."""

    nprobe: Annotated[int, Whole(1, MAX_NPROBE)] | None = None
    ef_search: Annotated[int, Whole(1, MAX_EF_SEARCH)] | None = None


@dataclass(frozen=True)
class Faiss:
    """The derived file for searching."""

    factory: Annotated[str, Text(500, r"(?!.*[0-9]{8})[^\0]*", "numbers of at most 7 digits")]
    search: SearchSettings
    file: Annotated[str, _numbered(r"faiss-NNNNNN\.index")]
    bytes: Some
    sha256: Sha256
    trained_on: Count
    version: Name | None = None


@dataclass(frozen=True)
class Embedding:
    """D, and whether every row has unit length."""

    width: Width
    normalized: bool


@dataclass(frozen=True)
class EncodingSpec:
    """How weights are kept; what an encoding needs of this, `encoding.from_spec` asks for."""

    name: Literal["top-m", "low-rank", "dense", "by-position"]
    dtype: Literal["float16", "float32"]
    m: Channels | None = None
    by: Literal["signed", "magnitude"] | None = None
    rank: Width | None = None
    origin: Literal["head", "pca"] | None = None
    codes: Literal["stored", "embedding"] | None = None


@dataclass(frozen=True)
class Layer:
    """One explained layer."""

    name: Name
    channels: Channels
    grid: Grid | None
    cells: Annotated[int, Whole(1, _SIDE**2)] | None
    encoding: EncodingSpec
    coarse_grid: Grid | None
    uses_positions: bool | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.cells not in (None, self.grid[0] * self.grid[1]):
            raise Wrong(f" is {self.cells} on a grid of {self.grid[0]} x {self.grid[1]}", "cells")
        coarse = self.coarse_grid
        if coarse is not None and coarse[0] * coarse[1] > MAX_COARSE_CELLS:
            what = f" {list(coarse)} has more than {MAX_COARSE_CELLS} cells"
            raise Wrong(what, "coarse_grid")


@dataclass(frozen=True)
class Loading:
    """Of the arguments that load the network again, those that name code or files.

    The others are `load_network`'s to check.
    """

    network: Spoken | None = None
    weights: Spoken | None = None
    head: Spoken | None = None


def _loading(value: Any) -> Any:
    check_fields(Loading, value)
    return value


@dataclass(frozen=True)
class Network:
    """The identity of the network; `identity.Identity` asks for what it compares."""

    name: Name | None = None
    layer: Name | None = None
    parameters_sha256: Name | None = None
    structure_sha256: Name | None = None
    preprocess: Annotated[AnyPreprocess, _read_by(preprocess_from_dict)] | None = None
    normalize: bool | None = None
    output: Name | Annotated[int, Whole(-_SIDE, _SIDE)] | None = None
    layout: Name | None = None
    precision: Name | None = None
    loading: Annotated[Mapping[str, Any], _read_by(_loading)] | None = None


@dataclass(frozen=True)
class Images:
    """Where the images lay and what their files were."""

    root: Place | None
    files_sha256: Name | None = None


@dataclass(frozen=True)
class Triplets:
    """The triplets behind the weights."""

    sampling: Name
    count: Count
    hinge: bool
    margin: Annotated[float, Real(0, 1e308)]
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

    index: Annotated[float, Real(-2, 2)]
    prototypes: Annotated[float, Real(-2, 2)]
    loss: Annotated[float, Real(-2, 2)]


@dataclass(frozen=True)
class Fidelity:
    """What prototypes lost, measured on a sample."""

    images: Count
    cosine: Mapping[Annotated[str, Text(15, r"[0-9]+", "numbers of neighbours")], Loss | None]
    recall_at_1: Loss | None


@dataclass(frozen=True)
class Compressed:
    """What an index of prototypes was made of."""

    from_rows: Some
    from_bytes: Count
    prototypes: Some
    rows: Some
    per_class: bool
    seed: Seed
    fidelity: Fidelity

    def __post_init__(self) -> None:
        for name in ("prototypes", "rows"):
            if getattr(self, name) > self.from_rows:
                raise Wrong(f" is {getattr(self, name)}, of {self.from_rows} images", name)
        if self.fidelity.images > self.from_rows:
            what = f" is {self.fidelity.images}, of {self.from_rows} images"
            raise Wrong(what, "fidelity", "images")


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every key was checked; see `embedcam.index.manifest.check`."""

    format: Literal["embedcam-index"]
    format_version: Literal[1]
    generation: Annotated[int, Whole(1, 1 << 32)]
    recipe: Annotated[Mapping[str, Any], _read_by(_table)]
    recipe_sha256: Sha256
    network: Network | None
    images: Images | None
    libraries: Mapping[Name, Name]
    embedding: Embedding
    metric: Literal["l2", "ip"]
    sign: Literal["margin"]
    method: Name
    target: Name
    norm: Name
    triplets: Triplets
    layers: tuple[Layer, ...]
    fit: Fit
    counts: Counts
    parts: tuple[Part, ...]
    fitted: Fitted
    tombstones: Tombstones | None
    faiss: Faiss | None
    compressed: Compressed | None = None
    trust_calibration: (
        Mapping[Situation, Annotated[Calibration, _read_by(Calibration.from_dict)]] | None
    ) = None
    match_calibration: (
        Mapping[
            Situation,
            Annotated[MatchCalibration, _read_by(MatchCalibration.from_dict)],
        ]
        | None
    ) = None
    manifest_sha256: Sha256 = ""
    """Empty only while the manifest is being made."""
    raw: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """As JSON has it, keys of later versions included; for `embedcam.index` alone."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise Wrong(" describes no layer")
        if len({layer.name for layer in self.layers}) < len(self.layers):
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
        """Share of the images that are near in value; None where labels are classes.

        Raises:
            InputError: a recipe that no build has written.
        """
        return near_share(self.recipe)

    @property
    def named_bytes(self) -> int:
        """Bytes of all files that it names; its own are not among them."""
        folders: list[Part | Fitted] = [*self.parts, self.fitted]
        total = sum(entry.bytes for folder in folders for entry in folder.files.values())
        return total + sum(entry.bytes for entry in (self.faiss, self.tombstones) if entry)

    def to_dict(self) -> dict[str, Any]:
        """Return a copy of the manifest as JSON has it."""
        return copy.deepcopy(dict(self.raw))
