"""The index on disk: created offline, opened online. NumPy and FAISS, no torch.

The format is index/README.md. `Index.open(path)` reads; `create`, `append`, `remove`, `compact`
and `rebuild_faiss` write, one writer at a time, each change visible through one rename; `verify`
checks.
"""

from .faiss_files import check_factory
from .joining import check_fitted, check_parts, check_tombstones
from .locking import lock
from .manifest import FORMAT_VERSION
from .parts import PartData, check_ids, quantize_coarse
from .query import EmbeddingRows
from .reader import REMOVED, Index
from .records import Manifest
from .search import Neighbors, nearest
from .selection import Selection
from .verify import Report, verify
from .writer import (
    ADD_INSTEAD,
    append,
    check_target,
    compact,
    create,
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
    "Report",
    "Selection",
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
    "quantize_coarse",
    "put_calibrations",
    "rebuild_faiss",
    "remove",
    "sweep",
    "verify",
]
