"""Indexes from features that a collection already has: `build_from_features`."""

from .offline.features import AffineHead, build_from_features, read_head

__all__ = ["AffineHead", "build_from_features", "read_head"]
