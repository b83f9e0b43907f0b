"""Numbers of one map beside its region, and of one query's results."""

from collections.abc import Sequence

import numpy as np

from ..metrics import best_iou, box_from_map, box_iou, energy_share, iou_at, pointing_hit
from .regions import Region
from .settings import KS

Number = float | None


def localised(
    maps: np.ndarray, regions: Sequence[Region], threshold: float
) -> list[dict[str, Number]]:
    """The localisation measures of maps `[b H W]`, each beside its region.

    A map without energy scores what chance does, as everywhere in `metrics`.
    """
    inside = np.stack([region.inside for region in regions])
    columns = {
        "energy": energy_share(maps, inside),
        "pointing": pointing_hit(maps, inside),
        "iou": iou_at(maps, inside, threshold),
        "best_iou": best_iou(maps, inside)[0],
        "found": np.array(
            [
                box_iou(np.repeat(box[None], len(region.boxes), 0), region.boxes).max() >= 0.5
                for box, region in zip(box_from_map(maps, threshold), regions, strict=True)
            ],
            float,
        ),
        "area": inside.mean((1, 2)),
    }
    return [
        {name: float(values[place]) for name, values in columns.items()}
        for place in range(len(maps))
    ]


def shares(drawn: np.ndarray, own: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """How a map `[H W]` divides itself between two regions, each without the other.

    Returns:
        The share of the energy on either that is on `own`, chance where there is none; whether it
        is the larger half, a tie counting one half; and chance, `own`'s share of both areas.
    """
    alone, others = own * (1 - other), other * (1 - own)
    chance = float(alone.sum() / max((alone + others).sum(), 1e-12))
    mine, theirs = float((drawn * alone).sum()), float((drawn * others).sum())
    share = mine / (mine + theirs) if mine + theirs > 0 else chance
    return share, (share > 0.5) + 0.5 * (share == 0.5), chance


def retrieved(label: str | None, labels: Sequence[str | None]) -> dict[str, Number]:
    """Recall@k of one query from its neighbours' labels, nearest first; None without a label."""
    if label is None:
        return {f"recall_{k}": None for k in KS}
    hits = [other == label for other in labels]
    return {f"recall_{k}": float(any(hits[:k])) if len(hits) >= k else None for k in KS}
