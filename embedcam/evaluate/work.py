"""What every group of measures reads: the queries a batch at a time, the index and its maps."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..images import Batch, ImageSource, embed, load_batches
from ..images.progress import Advance, progress_of
from ..methods.subject import inputs_a_pass
from .controls import MEAN, control_maps, mean_activation
from .gallery import Gallery
from .maps import Mapper, Maps, Questions, Seen, Way
from .queries import OwnPositions
from .regions import Region, Regions
from .settings import METHOD, Settings

Row = dict[str, Any]
"""The columns of one image, or of one question about a picture of two objects."""
Rows = dict[int, Row]
"""Those of the images that could be read, by their position in the source."""


@dataclass
class Reader:
    """Reads images in batches, and keeps what is said of those that cannot be used.

    skipped: a sentence for each of them.
    """

    source: ImageSource
    mapper: Mapper
    settings: Settings
    on_unreadable: Literal["fail", "skip"]
    workers: int | None
    progress: bool | None
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        network = self.mapper.network
        if network.preprocess is None:
            raise InputError(
                "the network does not say how pictures are prepared for it; give it preprocess="
            )
        self.preprocess = network.preprocess
        self.batch_size = self.settings.batch_size or inputs_a_pass(network.device)

    def batches(
        self, positions: np.ndarray, advance: Advance | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Yield the images at some positions that can be read, a batch at a time."""
        loaded = load_batches(
            self.source,
            positions,
            self.preprocess,
            batch_size or self.batch_size,
            workers=self.workers,
            on_error=self.on_unreadable,
        )
        while True:
            with self.mapper.clock("reading"):
                batch = next(loaded, None)
            if batch is None:
                return
            self.skipped += [message for _, message in batch.errors]
            if len(batch):
                yield batch
            if advance is not None:
                advance(len(batch) + len(batch.errors))

    def seen(self, positions: np.ndarray, advance: Advance) -> Iterator[tuple[Batch, Seen]]:
        """Yield the batches that can be embedded, too, each with its forward pass."""
        for read in self.batches(positions, advance):
            batch, seen = embed(read, self.source, self.mapper.see, self.on_unreadable)
            self.skipped += [one[1] for one in batch.errors if one not in read.errors]
            if seen is not None:
                yield batch, seen

    def bar(self, total: int, what: str) -> AbstractContextManager[Advance]:
        """Show how far a group of measures is."""
        return progress_of(what, total, shown=self.progress)


@dataclass(frozen=True)
class Work:
    """What the groups of measures are functions of, beside the rows that were there before.

    own: where the index holds the queried images themselves.
    rivals: other ways of drawing that the maps are held against, by name.
    notes: what was left out and is worth knowing, a sentence each.
    """

    settings: Settings
    reader: Reader
    mapper: Mapper
    gallery: Gallery
    own: OwnPositions
    regions: Regions
    rivals: Mapping[str, Way] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def wants(self, group: str) -> bool:
        """Whether a group of measures was asked for."""
        return group in self.settings.measures

    def note(self, text: str) -> None:
        """Add what is worth knowing, once."""
        if text not in self.notes:
            self.notes.append(text)

    def drawn(self, asked: Questions) -> dict[str, Maps]:
        """The map of each question by every way: transferred, rivals, controls.

        Without controls the mean activation alone is among them.
        """
        maps = {METHOD: Maps.of(self.mapper.transferred(asked.seen, asked.near))}
        maps |= {name: way(asked) for name, way in self.rivals.items()}
        if not self.settings.controls:
            return maps | {MEAN: mean_activation(self.mapper, asked.seen)}
        return maps | control_maps(self.mapper, self.gallery, self.settings.seed, asked)

    def maps(self, seen: Seen, near: list[np.ndarray]) -> Maps:
        """The maps of some queries by their neighbours, as many as the settings name."""
        rows = [places[: self.settings.n_neighbors] for places in near]
        return Maps.of(self.mapper.transferred(seen, rows))

    def placed(self, batch: Batch, grid: tuple[int, int]) -> list[Region | None]:
        """The regions of a batch's images on a grid of (H, W)."""
        return [
            self.regions.of(position, size, self.reader.preprocess.extent(*size), grid)
            if self.regions.has(position)
            else None
            for position, size in zip(
                batch.positions.tolist(), map(tuple, batch.sizes.tolist()), strict=True
            )
        ]
