"""Every queried image, explained: what came back, where its map lies, which objects it tells."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..images import Batch
from ..metrics.maps import pixel_count
from .controls import MEAN, mean_activation
from .maps import Maps, Seen
from .measures import Number, columns, localised, retrieved
from .regions import Region
from .scenes import of_boxes
from .settings import KS, METHOD, Settings
from .work import Row, Rows, Work


def explained(work: Work, positions: np.ndarray) -> tuple[Rows, list[Row]]:
    """Explain the images at some positions, one forward pass each.

    Returns:
        A row for each image that could be used, and one for each question about the objects of
        several labels that its boxes name.
    """
    rows: Rows = {}
    questions: list[Row] = []
    with work.reader.bar(len(positions), "images") as advance:
        for batch, seen in work.reader.seen(positions, advance):
            _check_pixels(work.settings, seen.size)
            placed = work.placed(batch, seen.size)
            rows |= _rows(work, batch, seen, placed)
            if work.wants("objects"):
                for place, position in enumerate(batch.positions.tolist()):
                    questions += of_boxes(work, seen.row(place), placed[place], position)
    return rows, questions


def located(
    work: Work, placed: Sequence[Region | None], maps: Mapping[str, Maps]
) -> list[dict[str, Number]]:
    """The localisation columns of a batch, by each way's maps; none for an image without region."""
    found: list[dict[str, Number]] = [{} for _ in placed]
    there = [place for place, region in enumerate(placed) if region is not None]
    regions = [region for region in placed if region is not None]
    if there and work.wants("localisation"):
        for way, some in maps.items():
            here = Maps(some.drawn[there], some.signed[there])
            numbers = localised(here, regions, work.settings.threshold)
            for place, values in zip(there, numbers, strict=True):
                if way != METHOD:
                    del values["area"]
                found[place] |= columns(way, values)
    return found


def _rows(work: Work, batch: Batch, seen: Seen, placed: Sequence[Region | None]) -> Rows:
    gallery, wanted = work.gallery, work.settings.n_neighbors
    items = [work.reader.source.items[position] for position in batch.positions]
    labels = [item.label for item in items]
    own = work.own.of(batch.positions.tolist(), seen.embeddings)
    with work.mapper.clock("explaining"):
        near = gallery.nearest(seen.embeddings, own, max(*KS, wanted))
    found = work.mapper.transferred(seen, [places[:wanted] for places in near])
    maps = {METHOD: Maps.of(found)}
    if any(region is not None for region in placed):
        maps[MEAN] = mean_activation(work.mapper, seen)
    with work.mapper.clock("metrics"):
        precise: list[float | None] = [None] * len(items)
        if work.wants("retrieval") and gallery.labelled:
            precise = gallery.precision_at_r(seen.embeddings, labels, own)
        where = located(work, placed, maps)
        rows: Rows = {}
        for place, (item, one) in enumerate(zip(items, found, strict=True)):
            row: Row = {
                "id": item.id,
                "label": item.label,
                "indexed": bool(own[place] >= 0),
                "result": one.ids[0],
                "result_label": one.labels[0],
                "distance": float(one.distances[0]),
                "trust": one.trust,
                "empty": one.empty,
            }
            if work.wants("retrieval"):
                others = [gallery.label_of(int(other)) for other in near[place]]
                known = item.label if gallery.labelled else None
                row |= retrieved(known, others) | {"map_at_r": precise[place]}
            rows[int(batch.positions[place])] = row | where[place]
    return rows


def _check_pixels(settings: Settings, size: tuple[int, int]) -> None:
    """Refuse what `metrics` could only refuse after a look at every image."""
    if "faithfulness" not in settings.measures or not settings.faithfulness:
        return
    pixels, steps, removed = size[0] * size[1], settings.steps, settings.removed
    if steps > pixels:
        raise InputError(
            f"steps = {steps}; it must be a whole number, 1 to {pixels}, the pixels of the "
            "network's input"
        )
    if pixel_count(removed, pixels) == pixels:
        raise InputError(
            f"removed = {removed} is every one of the {pixels} pixels of the network's input; "
            "give a smaller share"
        )
