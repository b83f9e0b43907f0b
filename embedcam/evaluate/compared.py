"""A sample of the images: each map beside its controls, and its pixels removed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import EmbedcamError
from ..images import Batch
from ..metrics import rank_correlations
from .controls import MEAN, SHUFFLED, WRONG, ShuffledNetwork
from .explained import located
from .faithfulness import Asked, Curves, Faithfulness
from .maps import Maps, Questions, Seen
from .measures import columns
from .queries import chosen
from .settings import METHOD
from .work import Rows, Work

CALIBRATED = 16
"""Images that a shuffled network's batch norms are measured on."""


@dataclass
class Compared:
    """What the sample showed beside its columns.

    images: of the sample.
    passes: masked images through the network.
    curves: of each way.
    stages: rank correlation of the maps and whether the second is empty, of each image, by how
        many modules of the network were shuffled.
    modules: of the network, with parameters.
    """

    images: int = 0
    passes: int = 0
    curves: dict[str, Curves] = field(default_factory=dict)
    stages: dict[int, list[tuple[float, bool]]] = field(default_factory=dict)
    modules: int = 0


def compared(work: Work, rows: Rows) -> tuple[Rows, Compared]:
    """Hold a sample of the images against controls, and remove their pixels.

    Returns:
        The rows with the columns of both.
    """
    sample, found = _sample(work, rows), Compared()
    if not len(sample):
        return rows, found
    controls, faithful = work.settings.controls, work.wants("faithfulness")
    shuffled = _shuffled(work, sample) if controls else None
    asking = Faithfulness(work.mapper.network, work.gallery, work.settings, work.mapper.clock)
    rows = dict(rows)
    with work.reader.bar(len(sample), "controls" if controls else "faithfulness") as advance:
        for batch in work.reader.batches(sample):
            seen = work.mapper.see(batch.images)
            own = work.own.held(batch.positions.tolist())
            with work.mapper.clock("explaining"):
                near = work.gallery.nearest(seen.embeddings, own, work.settings.n_neighbors)
            items = [work.reader.source.items[position] for position in batch.positions]
            asked = Questions(
                seen,
                near,
                own[:, None].tolist(),
                [item.label for item in items],
                [item.id for item in items],
            )
            maps = work.drawn(asked)
            if not controls:
                del maps[MEAN]
            elif WRONG not in maps:
                work.note("the index holds too few images for a control with wrong images' weights")
            if shuffled is not None:
                last = _cascade(work, shuffled, batch, seen, near, own, found)
                maps |= {} if last is None else {SHUFFLED: last}
            others = {way: some for way, some in maps.items() if way != METHOD}
            with work.mapper.clock("metrics"):
                where = located(work, work.placed(batch, seen.size), others)
            for place, position in enumerate(batch.positions.tolist()):
                row = rows[position] | where[place]
                row |= {f"{way}: empty": not some.drawn[place].any()
                        for way, some in others.items()}  # fmt: skip
                if faithful:
                    result = int(near[place][0])
                    one = Asked(
                        batch.images[place], seen.embeddings[place], result, int(own[place])
                    )
                    drawn = {way: some.drawn[place] for way, some in maps.items()}
                    for way, values in asking(one, drawn).items():
                        row |= columns(way, values)
                rows[position] = row
                advance(1)
    found.images, found.passes, found.curves = len(sample), asking.passes, asking.curves
    if shuffled is not None:
        shuffled.shuffle(0)
        found.modules = shuffled.count
    return rows, found


def _sample(work: Work, rows: Rows) -> np.ndarray:
    """Positions of the images that are compared."""
    settings = work.settings
    faithful = work.wants("faithfulness")
    beside = settings.controls or bool(work.rivals)
    localise = beside and work.wants("localisation") and len(work.regions)
    sane = settings.controls and work.wants("sanity")
    read = np.array(sorted(rows))
    if not settings.faithfulness or not (faithful or localise or sane):
        return read[:0]
    if localise and not faithful:
        # Drawn among those that say something: of many images few may have a box.
        where = [position for position in read.tolist() if "area" in rows[position]]
        read = np.array(where, np.int64) if where or not sane else read
    return read[chosen(len(read), settings.faithfulness, settings.seed)]


def _shuffled(work: Work, sample: np.ndarray) -> ShuffledNetwork | None:
    some = next(work.reader.batches(sample[:CALIBRATED], None, CALIBRATED), None)
    if some is None:
        work.note("no controls: the images could be read before, and no longer can")
        return None
    try:
        return ShuffledNetwork(work.mapper.network, work.settings.seed, some.images)
    except EmbedcamError as error:
        work.note(f"no network of shuffled parameters as a control: {error}")
        return None


def _cascade(
    work: Work,
    shuffled: ShuffledNetwork,
    batch: Batch,
    seen: Seen,
    near: Sequence[np.ndarray],
    own: np.ndarray,
    found: Compared,
) -> Maps | None:
    """Maps of the wholly shuffled network; how alike each stage's are is noted in `found`."""
    here = work.maps(seen.small(), list(near)).drawn
    stages = shuffled.stages if work.wants("sanity") else shuffled.stages[-1:]
    last = None
    for stage in stages:
        shuffled.shuffle(stage)
        other = shuffled.see(work.mapper, batch.images)
        if other is None:
            work.note("the network computes nothing finite once its parameters are shuffled")
            return None
        with work.mapper.clock("explaining"):
            rows = work.gallery.nearest(other.embeddings, own, work.settings.n_neighbors)
        there = work.maps(other.small(), rows).drawn
        with work.mapper.clock("metrics"):
            alike = rank_correlations(here, there)
        empty = [not drawn.any() for drawn in there]
        found.stages.setdefault(stage, []).extend(zip(alike.tolist(), empty, strict=True))
        if stage == shuffled.stages[-1]:
            last = work.maps(other, rows)
    return last
