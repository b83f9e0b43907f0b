"""Numbers of one map beside its region, and of one query's results."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..metrics import (
    average_precision,
    best_iou,
    box_from_map,
    box_iou,
    energy_share,
    equal_area_share,
    hottest_precision,
    iou_at,
    pixel_auc,
    pointing_hit,
)
from .maps import Maps
from .regions import Region
from .settings import KS, METHOD

Number = float | None


def columns(way: str, numbers: Mapping[str, Number]) -> dict[str, Number]:
    """The names that a way's numbers have in a row: the method's their own, others' after it."""
    return {name if way == METHOD else f"{way}: {name}": one for name, one in numbers.items()}


def localised(found: Maps, regions: Sequence[Region], threshold: float) -> list[dict[str, Number]]:
    """The localisation measures of b maps, each beside its region.

    A map without energy scores what chance does, as everywhere in `metrics`.
    """
    maps, signed = found
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
        "auc": pixel_auc(signed, inside),
        "auc_chance": np.full(len(maps), 0.5),
        "average_precision": average_precision(signed, inside),
        "hottest": hottest_precision(signed, inside),
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


def told_apart(found: Maps, own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The measures of one map, `[1 H W]`, between two regions, each without the other.

    Where the two leave a part of the picture free, also the region's AUC against all the rest.
    """
    alone, others = (own * (1 - other))[None], (other * (1 - own))[None]
    share, right, _ = shares(found.drawn[0], own, other)
    even = float(equal_area_share(found.drawn, alone, others)[0])
    numbers = {
        "share": share,
        "right": float(right),
        "objects_auc": float(pixel_auc(found.signed, alone, others)[0]),
        "even_share": even,
        "denser": (even > 0.5) + 0.5 * (even == 0.5),
    }
    if not np.maximum(own, other).all():
        numbers["rest_auc"] = float(pixel_auc(found.signed, own[None])[0])
    return numbers


def retrieved(label: str | None, labels: Sequence[str | None]) -> dict[str, Number]:
    """Recall@k of one query from its neighbours' labels, nearest first; None without a label."""
    if label is None:
        return {f"recall_{k}": None for k in KS}
    hits = [other == label for other in labels]
    return {f"recall_{k}": float(any(hits[:k])) if len(hits) >= k else None for k in KS}
