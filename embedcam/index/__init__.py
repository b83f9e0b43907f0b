"""The index on disk: created offline, opened online. NumPy and FAISS, no torch.

The format is index/README.md. `Index.open(path)` reads; `create`, `append`, `remove`, `compact`
and `rebuild_faiss` write, one writer at a time, each change visible through one rename; `verify`
checks.
"""

from .faiss_files import check_factory
from .manifest import FORMAT_VERSION, Manifest
from .parts import PartData, check_ids, quantize_coarse
from .reader import REMOVED, Index, Selection, Stored
from .search import EmbeddingRows, Neighbors, nearest
from .verify import Verification, check_fitted, check_parts, check_tombstones, verify
from .writer import (
    ADD_INSTEAD,
    append,
    check_target,
    compact,
    create,
    lock,
    put_calibrations,
    rebuild_faiss,
    remove,
    sweep,
)

__all__ = [
    "ADD_INSTEAD",
    "EmbeddingRows",
    "FORMAT_VERSION",
    "Index",
    "Manifest",
    "Neighbors",
    "PartData",
    "REMOVED",
    "Selection",
    "Stored",
    "Verification",
    "append",
    "check_factory",
    "check_fitted",
    "check_ids",
    "check_parts",
    "check_target",
    "check_tombstones",
    "compact",
    "create",
    "lock",
    "nearest",
    "put_calibrations",
    "quantize_coarse",
    "rebuild_faiss",
    "remove",
    "sweep",
    "verify",
]
