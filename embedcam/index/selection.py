"""Some rows of an index: found in their parts once, then fetched field by field."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .files import broken
from .layout import MARKS, Layer
from .parts import Part
from .strings import StringTable, check_row

Piece = tuple[Part, np.ndarray | slice, np.ndarray]
"""A part, the places among the selected rows that lie in it, and their rows there."""


class Selection:
    """Rows of an index in the order they were asked for; made by `Index.select`.

    Args:
        root: the index, for messages.
        parts: mapped.
        starts: position of each part's first row.
        layers: of the index.
        width: D.
        positions: checked, int64 `[n]`.
    """

    def __init__(
        self,
        root: Path,
        parts: Sequence[Part],
        starts: np.ndarray,
        layers: Sequence[Layer],
        width: int,
        positions: np.ndarray,
    ) -> None:
        self.positions = positions
        self._root, self._layers, self._width = root, layers, width
        self._pieces = _split(parts, starts, positions)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def ids(self) -> list[str]:
        """Stable ids, `[n]`."""
        return self._strings("ids")

    @property
    def paths(self) -> list[str]:
        """Where the images were read, `[n]`."""
        return self._strings("paths")

    @property
    def labels(self) -> list[str | None]:
        """Labels, None for images without one, `[n]`."""
        out: list[str | None] = [None] * len(self)
        for part, where, rows in self._pieces:
            names: dict[int, str | None] = {-1: None}
            for slot, code in zip(_slots(where, rows), part.codes[rows].tolist(), strict=True):
                if code not in names:
                    names[code] = part.labels[check_row(code, len(part.labels))]
                out[slot] = names[code]
        return out

    @property
    def embeddings(self) -> np.ndarray:
        """Stored embeddings, float32 `[n D]`."""
        return self.array("embeddings.f32", np.empty((0, self._width), np.float32))

    @property
    def triplets_used(self) -> np.ndarray:
        """Triplets that gave evidence for each row's weights, uint32 `[n]`."""
        return self.array("triplets_used.u32", np.empty(0, np.uint32))

    @property
    def marks(self) -> np.ndarray:
        """Marks of the images' files, uint32 `[n 4]`; zeros where none was taken."""
        out = np.zeros((len(self), 4), np.uint32)
        for part, where, rows in self._pieces:
            if MARKS in part.arrays:
                out[where] = part.arrays[MARKS][rows]
        return out

    def fields(self, layer: int = 0) -> dict[str, np.ndarray]:
        """What the layer's encoding decodes: its fields, and "embedding" where it uses that.

        Raises:
            IndexFormatError: a channel beyond the layer's.
        """
        found = self._layers[layer]
        fields = {name: self.array(*no_rows) for name, no_rows in found.no_rows.items()}
        if "channels" in fields and fields["channels"].max(initial=0) >= found.channels:
            raise broken(
                self._root, found.file("channels"), f"names a channel beyond {found.channels}"
            )
        if found.encoding.uses_embedding:
            fields["embedding"] = self.embeddings
        return fields

    def coarse(self, layer: int = 0) -> np.ndarray | None:
        """Coarse CAMs, float32 `[n h w]`, or None where none are stored.

        Raises:
            IndexFormatError: a damaged file.
        """
        found = self._layers[layer]
        if found.coarse_grid is None:
            return None
        maps, scales = found.coarse_files
        stored = self.array(maps, np.empty((0, *found.coarse_grid), np.uint8))
        scale = self.array(scales, np.empty(0, np.float32))
        if not np.isfinite(scale).all():
            raise broken(self._root, scales, "holds a NaN or an infinity")
        return stored * (scale[:, None, None] / np.float32(255))

    def array(self, file: str, empty: np.ndarray) -> np.ndarray:
        """Rows of a file, like `empty` `[0 ...]`."""
        if len(self._pieces) == 1:
            part, _, rows = self._pieces[0]
            only: np.ndarray = part.arrays[file][rows]
            return only
        out = np.empty((len(self), *empty.shape[1:]), empty.dtype)
        for part, where, rows in self._pieces:
            out[where] = part.arrays[file][rows]
        return out

    def _strings(self, kind: str) -> list[str]:
        out = [""] * len(self)
        for part, where, rows in self._pieces:
            table: StringTable = getattr(part, kind)
            first, last = int(rows[0]), int(rows[-1])
            # Many rows in a run are decoded from one piece of the blob.
            run = (
                len(rows) > 1 and last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all())
            )
            found = table.tolist(first, last + 1) if run else table.take(rows)
            for slot, text in zip(_slots(where, rows), found, strict=True):
                out[slot] = text
        return out


def _split(parts: Sequence[Part], starts: np.ndarray, positions: np.ndarray) -> list[Piece]:
    if len(positions) == 0:
        return []
    if len(parts) == 1:
        return [(parts[0], slice(None), positions)]
    home = np.searchsorted(starts, positions, side="right") - 1
    return [
        (parts[number], where, positions[where] - starts[number])
        for number in np.unique(home).tolist()
        for where in [np.flatnonzero(home == number)]
    ]


def _slots(where: np.ndarray | slice, rows: np.ndarray) -> Sequence[int]:
    found: list[int] = [] if isinstance(where, slice) else where.tolist()
    return range(len(rows)) if isinstance(where, slice) else found
