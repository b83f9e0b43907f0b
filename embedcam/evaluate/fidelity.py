"""How far a transfer is from the image's own weights: asked of images that the index holds."""

from pathlib import Path
from typing import Any

import numpy as np

from ..explanation import may_follow
from ..images import ImageSource, Item, embed, load_batches
from ..metrics import cosines, map_iou, rank_correlations
from ..targets import WHITENED
from .queries import chosen
from .work import Row, Rows, Work

COUNTS = (1, 2, 5, 10, 20)
TOP = 0.2


def fidelity(work: Work, rows: Rows, root: Path | None, moved: bool) -> list[Row]:
    """Own and transferred weights of indexed images, by number of neighbours.

    Args:
        work: with the index.
        rows: of the queries, whose pictures are taken where the index holds them.
        root: folder of the indexed images.
        moved: whether it was named by the user.

    Returns:
        A record for each image and count: `n_neighbors`, `distance` (of the nearest, squared),
        `cosine` of the weights, `rank_correlation` and `iou` of the maps.
    """
    if not work.wants("fidelity") or not work.settings.fidelity or len(work.gallery) < 2:
        return []
    if work.mapper.index.manifest.get("compressed") is not None:
        work.note(
            "no transfer fidelity: a prototype's weights are no image's own; what prototypes "
            "lose was measured when they were made, see `embedcam info`"
        )
        return []
    source, places = _indexed(work, rows, root, moved)
    if source is None:
        work.note(
            "no transfer fidelity: the index's own pictures are not to be found; say where "
            "they lie now (--indexed, indexed=), or evaluate with images that are indexed"
        )
        return []
    mapper, gallery = work.mapper, work.gallery
    counts = [n for n in COUNTS if n < len(gallery)]
    records, missing = [], 0
    reader = work.reader
    with reader.bar(len(source), "fidelity") as tick:
        for batch in load_batches(
            source, np.arange(len(source)), reader.preprocess, reader.batch_size, on_error="skip"
        ):
            batch, whole = embed(batch, source, mapper.see, "skip")
            missing += len(batch.errors)
            tick(len(batch.errors))
            if whole is None:
                continue
            own = places[batch.positions]
            # On the layer's own grid: resizing adds no evidence.
            seen = whole.small()
            near = gallery.nearest(seen.embeddings, own, max(counts, default=1))
            mine = mapper.transferred(seen, [np.array([row]) for row in own])
            for count in counts:
                theirs = mapper.transferred(seen, [one[:count] for one in near])
                with mapper.clock("metrics"):
                    drawn = [np.stack([one.cam for one in some]) for some in (mine, theirs)]
                    weights = [np.stack([one.weights for one in some]) for some in (mine, theirs)]
                    alike = zip(
                        cosines(*weights),
                        rank_correlations(*drawn),
                        map_iou(drawn[0], drawn[1], TOP),
                        strict=True,
                    )
                    for place, (cosine, correlation, overlap) in enumerate(alike):
                        records.append(
                            {
                                "n_neighbors": float(count),
                                "distance": float(theirs[place].distances[0]),
                                "cosine": float(cosine),
                                "rank_correlation": float(correlation),
                                "iou": float(overlap),
                            }
                        )
            tick(len(batch))
    if missing:
        work.note(f"transfer fidelity: {missing} indexed pictures could not be used")
    return records


def shared(work: Work) -> bool:
    """Whether the images of a label share their weights."""
    return work.mapper.index.manifest["target"] in WHITENED and work.gallery.labelled


def _indexed(
    work: Work, rows: Rows, root: Path | None, moved: bool
) -> tuple[ImageSource | None, np.ndarray]:
    """Pictures that the index holds, and their rows: among the queries, else its own files."""
    index, gallery, queries = work.mapper.index, work.gallery, work.reader.source
    wanted, seed = min(work.settings.fidelity, len(gallery)), work.settings.seed
    held = work.own.held(list(rows))
    mine = np.array(list(rows), np.int64)[held >= 0]
    if len(mine) >= wanted:
        some = mine[chosen(len(mine), wanted, seed)].tolist()
        return _Part(queries, some), work.own.held(some)
    places = gallery.positions[chosen(len(gallery), wanted, seed)]
    if root is None:
        return None, places[:0]
    listed = zip(index.ids[places], index.paths[places], places.tolist(), strict=True)
    there = [
        (Item(name, path), row)
        for name, path, row in listed
        if path and may_follow(str(root / path), root, moved)
    ]
    states = [work.mapper.explainer.file_state(item.id) for item, _ in there]
    if replaced := states.count("changed"):
        work.note(
            f"transfer fidelity: {replaced} indexed pictures were replaced since the build and "
            "are left out"
        )
        there = [one for one, state in zip(there, states, strict=True) if state != "changed"]
    if not any((root / item.path).is_file() for item, _ in there):
        return None, places[:0]
    source = ImageSource([item for item, _ in there], root, max_pixels=queries.max_pixels)
    return source, np.array([row for _, row in there])


class _Part(ImageSource):
    """Some images of a source."""

    def __init__(self, source: ImageSource, positions: list[int]) -> None:
        items = [source.items[position] for position in positions]
        super().__init__(items, source.root, max_pixels=source.max_pixels)
        self._source, self._positions = source, positions

    def open(self, position: int) -> Any:
        """The picture."""
        return self._source.open(self._positions[position])
