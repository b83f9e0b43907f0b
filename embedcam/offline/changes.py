"""What of a collection is new, changed or gone since an index was made of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ..errors import InputError
from ..images import DatasetSource, ImageSource
from ..index import Index


@dataclass(frozen=True)
class Changes:
    """How a collection differs from its index; ids, in the order of the collection or the index.

    Attributes:
        new: of images that the index did not hold.
        changed: of those with another file, label or path than were indexed.
        vanished: of those that are there no more, or cannot be read any more.
        n_same: images that are as they were.
        n_unmarked: those of them of whose files the index keeps no mark, so that a change is not
            seen.
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
        """The same once it is known which images could not be read."""
        return replace(
            self,
            new=[name for name in self.new if name not in unreadable],
            changed=[name for name in self.changed if name not in unreadable],
            vanished=[*self.vanished, *(name for name in self.changed if name in unreadable)],
        )


def changes_since(
    index: Index, source: ImageSource, tick: Callable[[int], Any]
) -> tuple[Changes, list[int]]:
    """How a collection differs from the index that was made of it.

    Images that were added from other folders are left alone.

    Args:
        index: open.
        source: the whole collection, from `find_images`.
        tick: told how many images were looked at.

    Returns:
        The changes, and the places in the source of what is new or changed.

    Raises:
        InputError: another collection than the index was made of, or one without any image of it.
    """
    _check_root(index, source)
    live = index.live_positions()
    rows = index.select(live)
    listed = zip(rows.ids, rows.paths, rows.labels, rows.marks, strict=True)
    known = {name: (path, label, mark) for name, path, label, mark in listed}
    new, changed, places, n_unmarked = list[str](), list[str](), list[int](), 0
    for place, item in enumerate(source.items):
        tick(1)
        if item.id not in known:
            new.append(item.id)
            places.append(place)
            continue
        path, label, mark = known.pop(item.id)
        state = source.state(place, mark)
        if (path, label) != (item.path, item.label) or state not in ("same", None):
            changed.append(item.id)
            places.append(place)
        else:
            n_unmarked += state is None
    # Absolute paths are of images that were added from elsewhere.
    left = [(name, path) for name, (path, _, _) in known.items() if path]
    vanished = [name for name, path in left if not Path(path).is_absolute()]
    found = len(source) - len(new)
    _check_alike(index, source, found, len(changed))
    return Changes(new, changed, vanished, found - len(changed), n_unmarked), places


def _check_root(index: Index, source: ImageSource) -> None:
    if isinstance(source, DatasetSource):
        raise InputError(
            "a data set has no files to compare; update from a folder or a CSV: find_images(...)"
        )
    stored = index.manifest.images_root
    root = None if source.root is None else str(source.root.resolve())
    if stored is None:
        raise InputError(
            f"{index.path}: was not built from a folder or a CSV, so there is nothing to compare "
            "with; add images without --update (update=True)"
        )
    if root != stored:
        raise InputError(
            f"{index.path}: was built from {stored}, and {root} is given; update it from there, "
            "add images of another folder without --update (update=True), or redo the index with "
            "--refit (replace=True) where its images were moved"
        )


def _check_alike(index: Index, source: ImageSource, found: int, n_changed: int) -> None:
    """Refuse a list that would replace all that the index holds."""
    instead = "redo the index with --refit (replace=True) if it is to be replaced"
    if len(index) and not found:
        raise InputError(
            f"{index.path}: none of its {len(index):,} images is among the {len(source):,} given; "
            f"give the whole collection, or {instead}"
        )
    without = [label is None for label in index.labels[index.live_positions()]]
    given = [label is None for label in source.labels]
    if found and n_changed == found and all(without) != all(given):
        has, come = ("no labels", "with labels") if all(without) else ("labels", "without")
        raise InputError(
            f"{index.path}: has {has}, and the images given come {come}; give the labels "
            f"(--labels) that it was built with, or {instead}"
        )
