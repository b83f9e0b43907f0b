"""Frozen features kept between runs: plain .npy files, named by what they were made of."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from photographs import Features, forward
from PIL import Image

from embedcam import EmbeddingNetwork

PART = 128
"""Pictures a file: a killed run begins again at the last one."""


class Cache:
    """A folder of arrays; without a folder nothing is kept.

    Args:
        folder: made where it is missing, or None.
        network: the frozen network.
        files: pictures and tables that the features are made of.
    """

    def __init__(
        self, folder: Path | None, network: EmbeddingNetwork, files: Iterable[Path]
    ) -> None:
        self.folder, self.network = folder, network
        found = hashlib.sha256(network.identity().parameters_sha256.encode())
        for file in files:
            found.update(hashlib.sha256(file.read_bytes()).digest())
        self.key = found.hexdigest()[:16]
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def features(
        self, name: str, picture: Callable[[int], Image.Image], total: int, size: tuple[int, int]
    ) -> Features:
        """Features of pictures 0 .. total - 1, part by part, computed where they are not kept."""
        parts = []
        for start in range(0, total, PART):
            numbers = range(start, min(start + PART, total))
            label = f"{name}-{total}x{size[0]}x{size[1]}-{start:05d}"
            kept = self.read(f"{label}-activations"), self.read(f"{label}-pooled")
            if kept[0] is None or kept[1] is None or len(kept[0]) != len(numbers):
                made = forward(self.network, map(picture, numbers), len(numbers), size, label)
                self.write(f"{label}-pooled", made.pooled)
                self.write(f"{label}-activations", made.activations)
                kept = made.activations, made.pooled
            parts.append(kept)
        activations, pooled = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Features(activations, pooled)

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array kept under a name, or made and kept."""
        found = self.read(name)
        if found is None:
            found = make()
            self.write(name, found)
        return found

    def read(self, name: str) -> np.ndarray | None:
        """The array of that name; None where it is missing or was cut short."""
        if self.folder is None:
            return None
        try:
            found: np.ndarray = np.load(self._path(name), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return found

    def write(self, name: str, array: np.ndarray) -> None:
        """Keep an array: whole, or not at all."""
        if self.folder is None:
            return
        unfinished = self._path(name).with_suffix(f".{os.getpid()}.partial")
        with unfinished.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        unfinished.replace(self._path(name))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{self.key}.npy"
