"""How good an index's maps are, measured on query images; and whether the network retrieves at all.

    images -> one forward -> neighbours, transferred weights, map -> numbers an image -> summary

An image that lies in the index never explains itself. (An index of prototypes does not know which
images were merged into it, and the findings say so.)
"""

from typing import TYPE_CHECKING

from .settings import Settings

if TYPE_CHECKING:
    from .report import Evaluation
    from .run import evaluate_index
else:

    def __getattr__(name):
        modules = {"Evaluation": "report", "evaluate_index": "run"}
        if name not in modules:
            raise AttributeError(f"module 'embedcam.evaluate' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{modules[name]}", __name__), name)


__all__ = ["Evaluation", "Settings", "evaluate_index"]
