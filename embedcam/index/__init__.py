"""The index on disk: created offline, opened online. NumPy and FAISS, no torch.

The format is index/README.md. `Index.open(path)` reads; `create`, `append`, `remove`, `compact`
and `rebuild_faiss` write, one writer at a time, each change visible through one rename; `verify`
checks.
"""

from .faiss_build import check_factory
from .manifest import FORMAT_VERSION, Manifest, RunEntry
from .parts import PartData, check_ids, quantize_coarse
from .reader import REMOVED, Index, Selection, Stored
from .rows import IndexRows
from .search import Neighbors, nearest
from .verify import Verification, check_files, verify
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
    "FORMAT_VERSION",
    "Index",
    "IndexRows",
    "Manifest",
    "Neighbors",
    "PartData",
    "REMOVED",
    "RunEntry",
    "Selection",
    "Stored",
    "Verification",
    "append",
    "check_factory",
    "check_files",
    "check_ids",
    "check_target",
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
