"""How far a transfer is from the image's own weights: asked of images that the index holds."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..images import embed, load_batches
from ..metrics import cosines, map_iou, rank_correlations
from .gallery import Gallery
from .maps import Mapper

COUNTS = (1, 2, 5, 10, 20)
TOP = 0.2


def fidelity(
    mapper: Mapper,
    gallery: Gallery,
    source: Any,
    rows: np.ndarray,
    batch_size: int,
    tick: Callable[[int], Any],
) -> tuple[list[dict[str, float]], int]:
    """Own and transferred weights of indexed images, by number of neighbours.

    Args:
        mapper: draws.
        gallery: the index.
        source: pictures of some indexed images.
        rows: of the index, one for each picture of the source.
        batch_size: images a forward pass.
        tick: called with the images that are done.

    Returns:
        A record for each image and count: `n_neighbors`, `distance` (of the nearest, squared),
        `cosine` of the weights, `rank_correlation` and `iou` of the maps; and how many pictures
        could not be read or embedded.
    """
    counts = [n for n in COUNTS if n < len(gallery)]
    records, missing = [], 0
    preprocess = mapper.network.preprocess
    for batch in load_batches(
        source, np.arange(len(source)), preprocess, batch_size, on_error="skip"
    ):
        batch, whole = embed(batch, source, mapper.see, "skip")
        missing += len(batch.errors)
        tick(len(batch.errors))
        if whole is None:
            continue
        own = rows[batch.positions]
        # On the layer's own grid: resizing adds no evidence.
        seen = whole.small()
        near = gallery.nearest(seen.embeddings, own, max(counts, default=1))
        mine = mapper.transferred(seen, [np.array([row]) for row in own])
        for count in counts:
            theirs = mapper.transferred(seen, [places[:count] for places in near])
            with mapper.clock("metrics"):
                drawn = [np.stack([one.cam for one in some]) for some in (mine, theirs)]
                weights = [
                    np.stack([one.weights.ravel() for one in some]) for some in (mine, theirs)
                ]
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
    return records, missing
