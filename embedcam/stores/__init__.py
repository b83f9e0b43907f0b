"""Rows of an index in other people's databases: what explains travels beside the vectors."""

from .copying import Copied, copy_rows
from .store import Store, Table, open_store

__all__ = ["Copied", "Store", "Table", "copy_rows", "open_store"]
