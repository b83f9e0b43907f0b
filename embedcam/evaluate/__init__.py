"""How good an index's maps are, measured on query images; and whether the network retrieves at all.

    images -> one forward -> neighbours, transferred weights, map -> numbers an image -> summary

An image that lies in the index never explains itself. (An index of prototypes does not know which
images were merged into it, and the findings say so.)
"""

from .report import Evaluation
from .run import evaluate_index
from .settings import Settings

__all__ = ["Evaluation", "Settings", "evaluate_index"]
