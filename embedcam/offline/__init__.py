"""OFFLINE: a network and its images -> an index on disk. Resumable, and the same bytes each time.

A job is a plan (what is to be done), shards (ranges of chunks, each a folder of arrays), and a
merge (reductions, encoding, calibrations, one commit): in one process, with its chunks inside the
index's folder, or in many that share the folder of the job. Killed at any moment it goes on where
it stopped.
"""

from .build import add_images, build_index, calibrate_index, indexed_images
from .engine import RayEngine
from .features import build_from_features
from .plan import SCRATCH_GB
from .report import BuildReport, Changes
from .sharded import PlanReport, ShardReport, merge_job, missing_pieces, plan_job, run_shard

__all__ = [
    "SCRATCH_GB",
    "BuildReport",
    "Changes",
    "PlanReport",
    "RayEngine",
    "ShardReport",
    "add_images",
    "build_from_features",
    "build_index",
    "calibrate_index",
    "indexed_images",
    "merge_job",
    "missing_pieces",
    "plan_job",
    "run_shard",
]
