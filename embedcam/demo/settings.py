"""The sizes of the demonstration, and digests that tell whether a stage is still current."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ..errors import InputError

STAGES_VERSION = 2
"""Raised when the code of a stage changes what it makes; finished stages of another are redone."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults take under three minutes on two cores.

    seed: of the scenes, the training and the triplets.
    scene_size: side of the written scenes, pixels; input_size: side the network sees.
    n_train: scenes held in memory for training; n_gallery: scenes to be indexed; n_query: single
        digits to be explained; n_pairs: two-digit scenes.
    steps, batch_size, learning_rate, margin: of the training.
    channels: K, kept well above the paper's M so that the top M leave something out.
    embedding_size: D.
    n_triplets: S; top_m: M.
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
                f"batch_size is {self.batch_size}; the ten classes share a batch evenly, so give "
                "20, 30, 40 ..."
            )
        if min(self.n_train, self.n_gallery, self.n_query, self.n_pairs) < 10:
            raise InputError("every set of scenes needs at least 10 of them, one of each class")
        if self.n_train < self.batch_size:
            raise InputError(
                f"n_train is {self.n_train}, less than one batch of {self.batch_size} scenes"
            )

    def digest(self, *names: str) -> str:
        """Return the digest of some settings, of all without names, and of the stages' version."""
        chosen = asdict(self)
        chosen = {name: chosen[name] for name in names or chosen}
        text = json.dumps([STAGES_VERSION, chosen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
