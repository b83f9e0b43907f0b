"""What every group of measures reads: the queries a batch at a time, the index and its maps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..images import Batch, ImageSource, embed, load_batches
from ..images.progress import Advance, progress_of
from .gallery import Gallery, OwnRows
from .maps import Draw, Mapper, Question, Questions, Seen
from .measures import MEAN, TRANSFERRED, Maps, Number, columns, localized
from .regions import Region, Regions
from .rivals import baseline_maps, mean_activation
from .settings import Record, Settings

Rows = dict[int, Record]
"""The columns of the images that could be read, by their position in the source."""


@dataclass
class Work:
    """What the groups of measures read; `skipped` and `notes` are sentences for the reader."""

    settings: Settings
    source: ImageSource
    mapper: Mapper
    gallery: Gallery
    own_rows: OwnRows
    regions: Regions
    on_unreadable: Literal["fail", "skip"]
    workers: int | None
    progress: bool | None
    rivals: dict[str, Draw] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        network = self.mapper.network
        self.preprocess = network.require_preprocess()
        self.batch_size = self.settings.batch_size or network.usual_run.batch_size

    def wants(self, group: str) -> bool:
        """Return whether a group of measures was asked for."""
        return group in self.settings.measures

    def note(self, text: str) -> None:
        """Add what is worth knowing, once."""
        if text not in self.notes:
            self.notes.append(text)

    def bar(self, total: int, what: str) -> AbstractContextManager[Advance]:
        """Show how far a group of measures is."""
        return progress_of(what, total, shown=self.progress)

    def seen(
        self, positions: np.ndarray, advance: Advance | None = None, batch_size: int | None = None
    ) -> Iterator[tuple[Batch, Seen]]:
        """Yield the images that can be read and embedded, a batch at a time, in one pass each."""
        loaded = load_batches(
            self.source, positions, self.preprocess, batch_size or self.batch_size,
            workers=self.workers, on_error=self.on_unreadable,
        )  # fmt: skip
        while True:
            with self.mapper.clock("reading"):
                read = next(loaded, None)
            if read is None:
                return
            batch, seen = embed(read, self.source, self.mapper.see, self.on_unreadable)
            self.skipped += [message for _, message in batch.errors]
            if seen is not None:
                yield batch, seen
            if advance is not None:
                advance(len(read) + len(read.errors))

    def questions(self, batch: Batch, seen: Seen) -> Questions:
        """Ask about images: for each its nearest images, itself left out."""
        own = self.own_rows.known(batch.positions.tolist())
        with self.mapper.clock("explaining"):
            near = self.gallery.nearest(seen.embeddings, own, self.settings.n_neighbors)
        items = (self.source.items[position] for position in batch.positions)
        each = zip(near, own.tolist(), items, strict=True)
        asked = [Question(rows, [row], item.label, item.id) for rows, row, item in each]
        return Questions(seen, asked)

    def of_pictures(self, row: Record) -> tuple[str, list[int]]:
        """Return the name of the pictures a question is about, and the rows that show them."""
        places = [place for place in (row["first"], row["second"]) if place >= 0]
        names = (self.source.items[place].id for place in places)
        return " | ".join(names), self.own_rows.known(places).tolist()

    def draw(self, asked: Questions) -> dict[str, Maps]:
        """Draw each question by every method; the mean activation is always among them."""
        maps = {TRANSFERRED: self.mapper.maps(asked.seen, asked.near)}
        maps |= {name: draw(asked) for name, draw in self.rivals.items()}
        if not self.settings.controls:
            return maps | {MEAN: mean_activation(self.mapper, asked.seen)}
        return maps | baseline_maps(self.mapper, self.gallery, self.settings.seed, asked)

    def placed(self, batch: Batch, grid: tuple[int, int]) -> list[Region | None]:
        """Return the regions of a batch's images on a grid of (H, W)."""
        return [
            self.regions.of(position, (width, height), self.preprocess.extent(width, height), grid)
            for position, (width, height) in zip(
                batch.positions.tolist(), batch.sizes.tolist(), strict=True
            )
        ]

    def located(
        self, placed: Sequence[Region | None], maps: Mapping[str, Maps]
    ) -> list[dict[str, Number]]:
        """Return the localization columns of a batch, by each method's maps."""
        rows: list[dict[str, Number]] = [{} for _ in placed]
        regions = {place: region for place, region in enumerate(placed) if region is not None}
        if not regions or not self.wants("localisation"):
            return rows
        there = list(regions)
        for method, some in maps.items():
            here = Maps(some.drawn[there], some.signed[there])
            numbers = localized(here, list(regions.values()), self.settings.threshold)
            for place, values in zip(there, numbers, strict=True):
                if method != TRANSFERRED:
                    del values["area"]
                rows[place] |= columns(method, values)
        return rows
