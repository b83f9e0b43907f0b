"""Which images are queried, and which of them the index holds itself."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..images import ImageSource, Item
from ..index import Index

SAME = 1e-4
"""Squared distance, in units of the embedding's own squared length, up to which an indexed image of
the same id is the same picture: half precision and another batch stay below it."""


def chosen(total: int, limit: int | None, seed: int) -> np.ndarray:
    """A seeded sample of the positions 0 .. total, in rising order; all of them without a limit."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))


def generator(seed: int, *words: object) -> np.random.Generator:
    """Random numbers that hang on the seed and the words alone, not on what was drawn before."""
    digest = blake2b("\0".join(map(str, words)).encode("utf-8", "surrogatepass"), digest_size=16)
    return np.random.default_rng([seed, int.from_bytes(digest.digest(), "little")])


class OwnPositions:
    """Where the index holds the queried images themselves.

    The same file is the same image. The same id is it where the embedding, too, is the stored one:
    `a/1.jpg` of one folder may be another picture than `a/1.jpg` of the next, and an index is moved
    together with its pictures. A prototype has the path of one of the images that were merged into
    it: it is that image where the embedding is the image's own, and else nobody's.
    """

    def __init__(
        self, index: Index, source: ImageSource, positions: np.ndarray, root: Path | None
    ) -> None:
        self._index, self.asked = index, len(positions)
        self._merged = index.manifest.is_compressed
        items = [source.items[position] for position in positions.tolist()]
        self._by_id = index.find_live([item.id for item in items])
        wanted = {_absolute(source.root, item.path) for item in items if item.path}
        self._by_path: dict[str, int] = {}
        if root is not None and wanted:
            live = index.live_positions()
            for start in range(0, len(live), 65536):
                some = live[start : start + 65536]
                for place, path in zip(some.tolist(), index.paths[some], strict=True):
                    if path and (full := _absolute(root, path)) in wanted:
                        self._by_path[full] = place
        self._source = source
        self._held: dict[int, int] = {}

    def held(self, positions: Sequence[int]) -> np.ndarray:
        """The rows that `of` found before, `[b]`."""
        return np.array([self._held[position] for position in positions])

    def unsure(self, positions: Sequence[int]) -> bool:
        """Whether only the embeddings of these images can tell."""
        items = [self._source.items[position] for position in positions]
        places = [self._candidate(item) for item in items]
        return any(place >= 0 and not sure for place, sure in places)

    def _candidate(self, item: Item) -> tuple[int, bool]:
        """The row that may be the image, -1 for none, and whether that is certain."""
        full = _absolute(self._source.root, item.path) if item.path else ""
        if full in self._by_path:
            return self._by_path[full], not self._merged
        return self._by_id.get(item.id, -1), False

    def of(self, positions: Sequence[int], embeddings: np.ndarray | None) -> np.ndarray:
        """Rows of the index, -1 for images it does not hold.

        Args:
            positions: in the source, `[b]`.
            embeddings: of these images, `[b D]`; None where none is `unsure`.
        """
        found = np.full(len(positions), -1)
        for row, position in enumerate(positions):
            place, sure = self._candidate(self._source.items[position])
            if sure:
                found[row] = place
            elif embeddings is not None and place >= 0:
                stored = self._index.embeddings([place])[0].astype(np.float64)
                apart = ((stored - embeddings[row]) ** 2).sum()
                if apart <= SAME * (stored**2).sum():
                    found[row] = place
        self._held.update(zip(positions, found.tolist(), strict=True))
        return found


def _absolute(root: object, path: str) -> str:
    return os.path.abspath(os.path.join(str(root), path) if root is not None else path)
