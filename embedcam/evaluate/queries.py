"""Which images are queried, and which of them the index holds itself."""

import os
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from ..images import ImageSource
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
    together with its pictures.
    """

    def __init__(self, index: Index, source: ImageSource, positions: np.ndarray) -> None:
        self._index = index
        items = [source.items[position] for position in positions.tolist()]
        self._by_id = index.find_live([item.id for item in items])
        root = (index.manifest["images"] or {}).get("root")
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

    def unsure(self, positions: Sequence[int]) -> bool:
        """Whether only the embeddings of these images can tell."""
        items = [self._source.items[position] for position in positions]
        return any(
            item.id in self._by_id
            and not (item.path and _absolute(self._source.root, item.path) in self._by_path)
            for item in items
        )

    def of(self, positions: Sequence[int], embeddings: np.ndarray | None) -> np.ndarray:
        """Rows of the index, -1 for images it does not hold.

        Args:
            positions: in the source, `[b]`.
            embeddings: of these images, `[b D]`; None where none is `unsure`.
        """
        found = np.full(len(positions), -1)
        for row, position in enumerate(positions):
            item = self._source.items[position]
            full = _absolute(self._source.root, item.path) if item.path else ""
            if full in self._by_path:
                found[row] = self._by_path[full]
            elif embeddings is not None and item.id in self._by_id:
                place = self._by_id[item.id]
                stored = self._index.embeddings([place])[0].astype(np.float64)
                apart = ((stored - embeddings[row]) ** 2).sum()
                if apart <= SAME * (stored**2).sum():
                    found[row] = place
        return found


def _absolute(root: object, path: str) -> str:
    return os.path.abspath(os.path.join(str(root), path) if root is not None else path)
