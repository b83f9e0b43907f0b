"""The mapped rows of an open index, by position."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from .layout import Layer
from .parts import Part
from .selection import Selection


class Rows:
    """Parts in the order of their rows, until they are closed.

    Apart from `Index`, so that `index.ids` and the others refer to this and not to the index: an
    index that nobody holds any more is then let go at once, not when garbage is collected.

    Args:
        root: the index, for messages.
        parts: mapped.
        layers: of the index.
        width: D.
    """

    def __init__(self, root: Path, parts: list[Part], layers: Sequence[Layer], width: int) -> None:
        self.starts = np.cumsum([0, *(part.count for part in parts)])
        self._root, self._layers, self._width = root, layers, width
        self._parts: list[Part] | None = parts

    @property
    def parts(self) -> list[Part]:
        """The mapped parts.

        Raises:
            InputError: they were closed.
        """
        parts = self._parts
        if parts is None:
            raise InputError(f"{self._root}: the index is closed; open it again")
        return parts

    def close(self) -> None:
        """Let go of the files; selections made before stay valid."""
        self._parts = None

    def select(self, positions: np.ndarray) -> Selection:
        """Rows at checked positions, int64 `[n]`."""
        return Selection(self._root, self.parts, self.starts, self._layers, self._width, positions)

    def ids(self, positions: np.ndarray) -> list[str]:
        """Ids at checked positions."""
        return self.select(positions).ids

    def paths(self, positions: np.ndarray) -> list[str]:
        """Paths at checked positions."""
        return self.select(positions).paths

    def labels(self, positions: np.ndarray) -> list[str | None]:
        """Labels at checked positions."""
        return self.select(positions).labels
