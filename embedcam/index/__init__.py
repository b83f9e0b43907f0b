"""The index on disk: created offline, opened online. NumPy and FAISS, no torch.

The format is index/README.md. `Index.open(path)` reads; `create`, `append`, `remove`, `compact`
and `rebuild_faiss` write, one writer at a time, each change visible through one rename; `verify`
checks.
"""

from .faiss_files import check_factory
from .locking import lock
from .manifest import FORMAT_VERSION
from .parts import PartData, check_ids, quantize_coarse
from .reader import Index
from .search import Neighbors, nearest
from .selection import Selection
from .verify import Report, verify
from .writer import append, check_target, compact, create, rebuild_faiss, remove, sweep

__all__ = [
    "FORMAT_VERSION",
    "Index",
    "Neighbors",
    "PartData",
    "Report",
    "Selection",
    "append",
    "check_factory",
    "check_ids",
    "check_target",
    "compact",
    "create",
    "lock",
    "nearest",
    "quantize_coarse",
    "rebuild_faiss",
    "remove",
    "sweep",
    "verify",
]
