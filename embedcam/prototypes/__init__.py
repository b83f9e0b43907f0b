"""A small index out of a large one: k-means prototypes with merged weights, and what that loses.

job.py       compress: from an index to an index of prototypes
grouping.py  which images belong together, and sums over each group's rows
merging.py   a prototype's embedding, its medoid, its weights and its map
fidelity.py  how near transferred weights come to an image's own, before and after

NumPy and scikit-learn, no torch: an index can be compressed where no network is.
"""

from .job import CompressReport, compress

__all__ = ["CompressReport", "compress"]
