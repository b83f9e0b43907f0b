"""The sizes of the demonstration, and digests that tell whether a stage is still current."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from .._checks import whole
from ..errors import InputError

STAGES_VERSION = 2
"""Raised when the code of a stage changes what it makes; finished stages of another are redone."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults take under three minutes on two cores.

    channels: K, well above M, so that the top M leave something out; n_triplets: S; top_m: M.
    """

    seed: int = 0
    scene_size: int = 192
    input_size: int = 96
    n_train: int = 2000
    n_gallery: int = 600
    n_query: int = 200
    n_pairs: int = 200
    steps: int = 260
    batch_size: int = 80
    learning_rate: float = 3e-3
    margin: float = 0.2
    channels: int = 160
    embedding_size: int = 32
    n_triplets: int = 50
    top_m: int = 50

    def __post_init__(self) -> None:
        if self.batch_size % 10 or self.batch_size < 20:
            raise InputError(
                f"batch_size is {self.batch_size}; ten classes share a batch: give 20, 30, 40 ..."
            )
        # One of each class at least, and a batch of those trained on.
        whole("n_train", self.n_train, self.batch_size)
        for name in ("n_gallery", "n_query", "n_pairs"):
            whole(name, getattr(self, name), 10)

    def digest(self, *names: str) -> str:
        """Return the digest of some settings, of all without names, and of the stages' version."""
        chosen = {name: getattr(self, name) for name in names} or asdict(self)
        text = json.dumps([STAGES_VERSION, chosen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
