"""A demonstration that needs nothing: real handwritten digits in cluttered scenes, end to end.

`run_demo` draws the scenes, trains a small network on them, builds an index, explains held-out
queries and measures the maps against the true boxes. Importing this package loads neither torch
nor scikit-learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import DemoSettings


def run_demo(
    directory: str | Path,
    seed: int = 0,
    progress: bool = True,
    settings: DemoSettings | None = None,
) -> dict[str, Any]:
    """Run the demonstration in `directory` and return its summary; see `embedcam.demo.run`."""
    from .run import run_demo as run

    return run(directory, seed=seed, progress=progress, settings=settings)


__all__ = ["run_demo"]
