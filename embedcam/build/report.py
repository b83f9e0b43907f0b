"""What a job tells the user: a progress bar while it runs, a report when it is done."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..images import LeftOut
from ..images.sources import cut


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the index.
        n_images: images indexed by this job.
        skipped: (id, reason) of images that could not be read, or not embedded.
        n_single: of these images, those alone in their class, those without a label among them:
            their positives are their nearest neighbours. 0 where labels draw nothing.
        n_without_triplets: images whose every triplet was satisfied: their weights are zero.
        seconds: wall time of each stage.
        labels: how many of these images have each label, by its name.
        n_unlabelled: of these images, those without a label; all of them where labels is empty.
        left_out: what lies beside the images and was not taken.
        notes: what looks like a mistake, a sentence each.
    """

    path: Path
    n_images: int
    skipped: list[tuple[str, str]]
    n_single: int = 0
    n_without_triplets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    n_unlabelled: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)

    def taken(self) -> list[str]:
        """What was taken and what was not, a line each."""
        said = [f"labels: {self._labels_line()}"] if self.n_images else []
        others = [str(self.left_out)] if str(self.left_out) else []
        others += [f"{len(self.skipped):,} skipped"] if self.skipped else []
        return [*said, *([f"not taken: {', '.join(others)}"] if others else []), *self.notes]

    def _labels_line(self) -> str:
        if not self.labels:
            return "none"
        few = ", ".join(cut(name, 30) for name in [*self.labels][:3])
        few += ", ..." if len(self.labels) > 3 else ""
        least, most = (choose(self.labels, key=self.labels.__getitem__) for choose in (min, max))
        each = f"{self.labels[most]:,}"
        if self.labels[least] < self.labels[most]:
            each = f"{self.labels[least]:,} ({cut(least, 30)}) to {each} ({cut(most, 30)})"
        without = f"; {self.n_unlabelled:,} images without a label" if self.n_unlabelled else ""
        return f"{len(self.labels):,} ({few}), of {each} images each{without}"


def label_counts(labels: Iterable[str | None]) -> tuple[dict[str, int], int]:
    """How many images have each label, by its name, and how many have none."""
    counts = Counter(labels)
    n_unlabelled = counts.pop(None, 0)
    return {name: counts[name] for name in sorted(filter(None, counts))}, n_unlabelled


class Stages:
    """Times named stages, and shows a bar for those that go through the images.

    Args:
        progress: True shows bars, False none, None only on a terminal.
    """

    def __init__(self, progress: bool | None) -> None:
        self._silent = None if progress is None else not progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, n_images: int = 0) -> Iterator[Callable[[int], Any]]:
        """Yields what is to be told how many images were dealt with."""
        start = time.perf_counter()
        silent = self._silent if n_images else True
        with tqdm(total=n_images, desc=stage, unit=" images", disable=silent) as bar:
            yield bar.update
        self.seconds[stage] = time.perf_counter() - start
