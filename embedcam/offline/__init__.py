"""OFFLINE: a network and its images -> an index on disk. Resumable, and the same bytes each time.

A job is a plan (what is to be done), shards (ranges of chunks, each a file in a checkpoint inside
the index's folder), and a merge (reductions, encoding, calibrations, one commit). A job killed at
any moment goes on where it stopped.
"""

from .build import add_images, build_index, calibrate_index, indexed_images
from .features import build_from_features
from .plan import SCRATCH_GB
from .report import BuildReport, Changes

__all__ = [
    "SCRATCH_GB",
    "BuildReport",
    "Changes",
    "add_images",
    "build_from_features",
    "build_index",
    "calibrate_index",
    "indexed_images",
]
