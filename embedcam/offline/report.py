"""What a job tells the user, and how a collection differs from its index."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import InputError, cut
from ..images import DatasetSource, ImageSource, Item, LeftOut, is_url, root_text
from ..images.number_labels import number_of
from ..images.progress import Advance, progress_of
from ..images.texts import LabelColumn, hashes_of, in_runs
from ..index import Index
from ..index.arrays import ArrayLike
from ..index.faiss_build import choice_note
from ..index.manifest import read as read_manifest
from ..recipe.recipe import Recipe
from ..render import Table, drawn_blocks
from .triplets import alone

_SHOWN, _RUN = 10, 1 << 14
_REDO = "redo the index with --refit (replace=True)"
_Stored = tuple[str, str | None, np.ndarray]
"""Path, label and mark of an indexed image."""


@dataclass(frozen=True)
class Changes:
    """How a collection differs from its index; ids, in the order of the collection or the index.

    `changed` have another file, label or path than were indexed; `vanished` are there no more, or
    cannot be read any more. Of `n_same` images that are as they were the index keeps no mark of
    `n_unmarked` files, so that a change of those is not seen.
    """

    new: list[str]
    changed: list[str]
    vanished: list[str]
    n_same: int
    n_unmarked: int

    @property
    def gone(self) -> list[str]:
        """Ids whose rows are to be removed."""
        return [*self.changed, *self.vanished]

    def without(self, unreadable: set[str]) -> Self:
        """Return the same once it is known which images could not be read."""
        return replace(
            self,
            new=[name for name in self.new if name not in unreadable],
            changed=[name for name in self.changed if name not in unreadable],
            vanished=[*self.vanished, *(name for name in self.changed if name in unreadable)],
        )


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes
    ----------
    path
        The index.
    n_images
        Images indexed by this job.
    skipped
        (id, reason) of images that could not be read, or not embedded.
    n_single
        Of these images, those alone in their class, those without a label among them: their
        positives are their nearest neighbors. 0 where labels draw nothing.
    n_without_triplets
        Images whose every triplet was satisfied: their weights are zero.
    seconds
        Wall time of each stage.
    labels
        How many of these images have each label, by its name; empty where labels are numbers.
    n_unlabelled
        Of these images, those without a label.
    left_out
        What lies beside the images and was not taken.
    notes
        What looks like a mistake, a sentence each.
    changes
        What an update found new, changed and vanished; None of other jobs.
    numbers
        The least and the largest label where labels are numbers, else None.
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
        """Return what was taken and what was not, a line each."""
        lines = [f"labels: {self._labels_line()}"] if self.n_images else []
        not_taken = self._not_taken()
        return [*lines, *([f"not taken: {not_taken}"] if not_taken else []), *self.notes]

    def _repr_html_(self) -> str:
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


class Stages:
    """Wall times of named stages, which show how far they are."""

    def __init__(self, progress: bool | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, n_images: int) -> Iterator[Advance]:
        """Time a stage and show its progress; yield what is told how many more are done."""
        start = time.perf_counter()
        with progress_of(stage, n_images, shown=self._progress) as advance:
            yield advance
        took = time.perf_counter() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took


def report_of(
    path: Path,
    recipe: Recipe,
    labels: Sequence[str | None],
    codes: np.ndarray | None,
    triplets_used: ArrayLike,
    stages: Stages,
) -> BuildReport:
    """Return what a job did with images of these labels; `codes` end with theirs."""
    (counts, n_unlabelled), n_single, numbers = LabelColumn.of(labels).counts(), 0, None
    if codes is not None and recipe.resolved_target != "centred" and recipe.sampling != "given":
        n_single = int(alone(codes)[len(codes) - len(labels) :].sum())
    by_class = {name: count for name, count in counts.items() if name}
    written, note = read_manifest(path), None
    if written.faiss is not None:
        note = choice_note(recipe.faiss, written.faiss.factory, written.counts.live)
    if recipe.labels == "numbers":
        values, by_class = [number_of(label) for label in counts], {}
        numbers = (min(values), max(values)) if values else None
    return BuildReport(
        path,
        len(labels),
        [],
        n_single,
        int((np.asarray(triplets_used) == 0).sum()),
        stages.seconds,
        by_class,
        n_unlabelled,
        numbers=numbers,
        notes=[] if note is None else [note],
    )


def changes_since(
    index: Index, source: ImageSource, progressed: Advance
) -> tuple[Changes, list[int]]:
    """Return how a collection differs from its index, and places of what is new or changed."""
    _check_root(index, source)
    live = index.live_positions()
    found, bare = _Found(index, live), all(label is None for label in in_runs(index.labels, live))
    new, changed, places, n_unmarked = list[str](), list[str](), list[int](), 0
    for start in range(0, len(source), _RUN):
        items = source.items[start : start + _RUN]
        for place, (item, stored) in enumerate(found.of(items), start):
            progressed(1)
            state = "new" if stored is None else source.state(place, stored[2])
            if stored is not None and stored[:2] != (item.path, item.label):
                state = "changed"
            n_unmarked += state is None
            if state not in ("same", None):
                (new if state == "new" else changed).append(item.id)
                places.append(place)
    # Absolute paths are of images that were added from elsewhere, which are left alone.
    left, n_indexed = live[~found.seen], len(live)
    names = zip(in_runs(index.ids, left), in_runs(index.paths, left), strict=True)
    vanished = [
        name for name, path in names if path and not (Path(path).is_absolute() or is_url(path))
    ]
    n_known = len(source) - len(new)
    if n_indexed and not n_known:
        raise InputError(
            f"{index.path}: none of its {n_indexed:,} images is among the {len(source):,} given; "
            f"give the whole collection, or {_REDO} if it is to be replaced"
        )
    unlabelled = all(label is None for label in source.labels)
    if n_known and len(changed) == n_known and bare != unlabelled:
        has, come = ("no labels", "with labels") if bare else ("labels", "without")
        raise InputError(
            f"{index.path}: has {has}, and the images given come {come}; give the labels "
            f"(--labels) that it was built with, or {_REDO} if it is to be replaced"
        )
    return Changes(new, changed, vanished, n_known - len(changed), n_unmarked), places


class _Found:
    """Finds images in an index by their ids, many at once; `seen` `[n]` says which live rows."""

    def __init__(self, index: Index, live: np.ndarray) -> None:
        self._index, self._live = index, live
        hashes = hashes_of(in_runs(index.ids, live))
        self._order = np.argsort(hashes)
        self._hashes, self.seen = hashes[self._order], np.zeros(len(live), bool)

    def of(self, items: Sequence[Item]) -> Iterator[tuple[Item, _Stored | None]]:
        """Yield each image with what the index keeps of it, None where it has none of its id."""
        hashes = hashes_of(item.id for item in items)
        first = np.searchsorted(self._hashes, hashes)
        stop = np.searchsorted(self._hashes, hashes, side="right")
        counts = stop - first
        # Two ids may have one hash: all that do are looked at.
        owner = np.repeat(np.arange(len(items)), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self._order[first[owner] + nth]
        kept = self._index.select(self._live[rows])
        paths, labels, marks = kept.paths, kept.labels, kept.marks
        stored: dict[int, _Stored] = {}
        for at, (place, name) in enumerate(zip(owner.tolist(), kept.ids, strict=True)):
            if name == items[place].id:
                self.seen[rows[at]] = True
                stored[place] = paths[at], labels[at], marks[at]
        for place, item in enumerate(items):
            yield item, stored.get(place)


def _check_root(index: Index, source: ImageSource) -> None:
    if isinstance(source, DatasetSource):
        raise InputError(
            "a data set has no files to compare; update from a folder or a CSV: find_images(...)"
        )
    stored = index.manifest.images_root
    root = root_text(source.root)
    if stored is None:
        raise InputError(
            f"{index.path}: was not built from a folder or a CSV, so there is nothing to compare "
            "with; add images without --update (update=True)"
        )
    if root != stored:
        raise InputError(
            f"{index.path}: was built from {stored}, and {root} is given; update it from there, "
            f"add images of another folder without --update (update=True), or {_REDO} where its "
            "images were moved"
        )
