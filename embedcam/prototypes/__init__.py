"""A small index of prototypes out of a large one. No torch: it works where no network is."""

from .compression import CompressReport, compress

__all__ = ["CompressReport", "compress"]
