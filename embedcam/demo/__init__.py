"""A demonstration that needs nothing: real handwritten digits in cluttered scenes, end to end.

Importing this package loads neither torch nor scikit-learn.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import run_demo
else:

    def __getattr__(name):
        if name != "run_demo":
            raise AttributeError(f"module 'embedcam.demo' has no attribute {name!r}")
        from .run import run_demo

        return run_demo


__all__ = ["run_demo"]
