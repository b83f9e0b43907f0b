"""OFFLINE: a network and its images -> an index on disk. Resumable, and the same bytes each time.

    embed -> weights -> fit the encoding -> encode and draw own maps -> write

Each arrow is a set of finished chunks in a scratch folder inside the index's own, so a job killed
at any moment goes on where it stopped. `explain` never imports this room: they meet on disk.
"""

from .changes import Changes
from .features import build_from_features
from .jobs import SCRATCH_GB, add_images, build_index, calibrate_index, indexed_images
from .report import BuildReport

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
