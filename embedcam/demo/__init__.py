"""A demonstration that needs nothing: real handwritten digits in cluttered scenes, end to end.

Importing this package loads neither torch nor scikit-learn.
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
    """Draw scenes, train a small network, build an index, explain queries, measure the maps.

    Stages that an earlier run finished are kept.

    Parameters
    ----------
    directory : path
        A new or empty folder, or that of an earlier run. Written there: scenes/,
        network.safetensors, index/, why.png, why.html, summary.json.
    seed : int
        Of the scenes, the training and the triplets.
    progress : bool
        Show bars on a terminal, and print the table.
    settings : DemoSettings, optional
        Other sizes; their seed is replaced by `seed`.

    Returns
    -------
    dict
        What summary.json holds (recall_at_1, rows of the table, files, settings, recipe), with the
        folder and the seconds of the stages that ran in this call.

    Raises
    ------
    InputError
        The folder holds something else.
    """
    from .run import run_demo as run

    return run(directory, seed=seed, progress=progress, settings=settings)


__all__ = ["run_demo"]
