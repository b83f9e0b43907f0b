"""Images grouped by label, and sums over each group. Arrays only."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_SUMMED = 1 << 14


@dataclass
class Classes:
    """Images grouped by label: `order` lists positions class by class."""

    codes: np.ndarray
    order: np.ndarray = field(init=False)
    starts: np.ndarray = field(init=False)
    sizes: np.ndarray = field(init=False)
    ranks: np.ndarray = field(init=False)
    shared: np.ndarray = field(init=False)
    """Each class's number among those of two images or more, -1 for an image alone."""

    def __post_init__(self) -> None:
        _, self.codes = np.unique(self.codes, return_inverse=True)
        self.order = np.argsort(self.codes, kind="stable")
        self.sizes = np.bincount(self.codes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.ranks = np.empty(len(self.codes), np.int64)
        self.ranks[self.order] = np.arange(len(self.codes)) - self.starts[self.codes[self.order]]
        self.shared = np.where(self.sizes > 1, np.cumsum(self.sizes > 1) - 1, -1)

    def sums(self, rows: Callable[[np.ndarray], np.ndarray], width: int) -> np.ndarray:
        """Sums over the images of each shared class, float64 `[C width]`, by their numbers.

        Images alone have no sum: a collection that is mostly without labels would take as many
        numbers as its embeddings, in doubles.

        Args:
            rows: gives `[b width]` of the images at positions `[b]`.
            width: of a row.
        """
        found = np.zeros((int((self.sizes > 1).sum()), width))
        shared = np.flatnonzero(self.sizes[self.codes] > 1)
        for start in range(0, len(shared), _SUMMED):
            places = shared[start : start + _SUMMED]
            np.add.at(found, self.shared[self.codes[places]], rows(places))
        return found


def alone(labels: np.ndarray) -> np.ndarray:
    """Which images are alone with their label, `[N]` booleans; of numbers, which have none.

    Args:
        labels: `[N]`, codes of classes, or numbers as floats.
    """
    if labels.dtype.kind == "f":
        return np.isnan(labels)
    classes = Classes(labels)
    single: np.ndarray = classes.sizes[classes.codes] == 1
    return single


def label_codes(labels: list[str | None]) -> np.ndarray | None:
    """Labels as integers `[N]`; None where no image has one.

    An image without a label among labelled ones is a class of its own.
    """
    if all(label is None for label in labels):
        return None
    known = {label: code for code, label in enumerate(sorted({s for s in labels if s is not None}))}
    free = iter(range(len(known), len(known) + len(labels)))
    return np.array([next(free) if label is None else known[label] for label in labels], np.int64)
