"""What a job tells the user: how far it is while it runs, a report when it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..progress import progress_of
from ..render import Table, drawn_blocks

_SHOWN = 10


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the index.
        n_images: images indexed by this job.
        skipped: (id, reason) of images that could not be read.
        n_single: of these images, those alone in their class: their positives are their nearest
            neighbours. 0 where labels draw nothing.
        n_without_triplets: images whose every triplet was satisfied: their weights are zero.
        seconds: wall time of each stage.
    """

    path: Path
    n_images: int
    skipped: list[tuple[str, str]]
    n_single: int = 0
    n_without_triplets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows: list[tuple[str, object]] = [
            ("index", self.path),
            ("images", f"{self.n_images:,}"),
            ("alone in their class", f"{self.n_single:,}"),
            ("without evidence", f"{self.n_without_triplets:,}"),
            ("left out", f"{len(self.skipped):,}"),
            *((f"left out: {name}", reason) for name, reason in self.skipped[:_SHOWN]),
            *((stage, f"{seconds:.1f} s") for stage, seconds in self.seconds.items()),
        ]
        return "\n".join(drawn_blocks([Table(("build", ""), rows)]))


class Stages:
    """Times named stages, and shows how far they are.

    Args:
        progress: see `progress_of`.
    """

    def __init__(self, progress: bool | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, n_images: int = 0) -> Iterator[Callable[[int], Any]]:
        """Yields what is to be told how many images were dealt with."""
        start = time.perf_counter()
        with progress_of(stage, n_images, shown=self._progress) as advance:
            yield advance
        self.seconds[stage] = time.perf_counter() - start
