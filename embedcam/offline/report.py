"""What a job tells the user: how far it is while it runs, a report when it is done."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import cut
from ..images import LeftOut
from ..images.number_labels import number_of
from ..images.progress import progress_of
from ..render import Table, drawn_blocks
from .changes import Changes

_SHOWN = 10


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
        labels: how many of these images have each label, by its name; empty where labels are
            numbers.
        n_unlabelled: of these images, those without a label.
        left_out: what lies beside the images and was not taken.
        notes: what looks like a mistake, a sentence each.
        changes: what an update found new, changed and vanished; None of other jobs.
        numbers: the least and the largest label where labels are numbers, else None.
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
    changes: Changes | None = None
    numbers: tuple[float, float] | None = None

    def taken(self) -> list[str]:
        """What was taken and what was not, a line each."""
        said = [f"labels: {self._labels_line()}"] if self.n_images else []
        not_taken = self._not_taken()
        return [*said, *([f"not taken: {not_taken}"] if not_taken else []), *self.notes]

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows: list[tuple[str, object]] = [
            ("index", self.path),
            ("images", f"{self.n_images:,}"),
            ("labels", self._labels_line()),
            ("alone in their class", f"{self.n_single:,}"),
            ("without evidence", f"{self.n_without_triplets:,}"),
            ("not taken", self._not_taken()),
            *((f"skipped: {name}", reason) for name, reason in self.skipped[:_SHOWN]),
            *(("note", text) for text in self.notes),
            *((stage, f"{seconds:.1f} s") for stage, seconds in self.seconds.items()),
        ]
        return "\n".join(drawn_blocks([Table(("build", ""), rows)]))

    def _not_taken(self) -> str:
        others = [str(self.left_out)] if str(self.left_out) else []
        others += [f"{len(self.skipped):,} skipped"] if self.skipped else []
        return ", ".join(others)

    def _labels_line(self) -> str:
        without = f"; {self.n_unlabelled:,} images without a label" if self.n_unlabelled else ""
        if self.numbers is not None:
            return "numbers from {:g} to {:g}".format(*self.numbers) + without
        if not self.labels:
            return "none"
        few = ", ".join(cut(name, 30) for name in [*self.labels][:3])
        few += ", ..." if len(self.labels) > 3 else ""
        least, most = (choose(self.labels, key=self.labels.__getitem__) for choose in (min, max))
        each = f"{self.labels[most]:,}"
        if self.labels[least] < self.labels[most]:
            each = f"{self.labels[least]:,} ({cut(least, 30)}) to {each} ({cut(most, 30)})"
        images = "image" if self.labels[most] == 1 else "images"
        return f"{len(self.labels):,} ({few}), of {each} {images} each{without}"


def label_counts(labels: Iterable[str | None], kind: str = "classes") -> tuple[dict[str, int], int]:
    """How many images have each label, by its name (of numbers nothing), and how many have none."""
    counts = Counter(labels)
    n_unlabelled = counts.pop(None, 0)
    if kind == "numbers":
        return {}, n_unlabelled
    return {name: counts[name] for name in sorted(filter(None, counts))}, n_unlabelled


def number_range(labels: Iterable[str | None], kind: str) -> tuple[float, float] | None:
    """The least and the largest of labels that are numbers; None of classes, or without any."""
    values = [number_of(label) for label in labels if label is not None]
    return (min(values), max(values)) if values and kind == "numbers" else None


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
