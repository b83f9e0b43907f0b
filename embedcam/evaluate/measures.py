"""What each measure is called, and its numbers: of one map beside its region, of one query."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

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
from .regions import Region

Number = float | None
TRANSFERRED: Final = "transferred"
"""The method that is judged; the others are its baselines or stand beside it."""
MEAN: Final = "mean activation"
KS: Final = (1, 5, 10)


class Measure(NamedTuple):
    """A number an image: larger is better where `better` is 1, smaller where it is -1.

    chance: the column of what a map that knows nothing scores; free: contrast does not move it.
    """

    title: str
    group: str
    better: int
    chance: str = ""
    says: str = ""
    free: bool = False


MEASURES: Final = {
    **{f"recall_{k}": Measure(f"Recall@{k}", "retrieval", 1) for k in KS},
    "map_at_r": Measure("mAP@R", "retrieval", 1),
    "auc": Measure("pixel AUC", "localisation", 1, "auc_chance",
        "chance that a pixel of the object has more of the signed map than one outside", True),
    "average_precision": Measure("pixel average precision", "localisation", 1, "area",
        "how purely the object's pixels come first in the signed map", True),
    "hottest": Measure("hottest pixels", "localisation", 1, "area",
        "share on the object of the signed map's hottest pixels, as many as it has", True),
    "energy": Measure("energy inside", "localisation", 1, "area",
        "share of the map's energy on the object"),
    "pointing": Measure("pointing game", "localisation", 1, "area",
        "the map's largest value is on the object"),
    "iou": Measure("IoU", "localisation", 1, "area",
        "overlap of the object and the pixels from the threshold up"),
    "best_iou": Measure("best IoU", "localisation", 1, "",
        "the same at each image's best threshold: an upper bound"),
    "found": Measure("box found", "localisation", 1, "",
        "the box drawn from the map overlaps a true one by half"),
    "insertion": Measure("insertion area", "faithfulness", 1, "",
        "mean similarity to the result while the map's top pixels are put in"),
    "deletion": Measure("deletion area", "faithfulness", -1, "",
        "the same while they are taken out"),
    "rank_drop": Measure("rank drop", "faithfulness", 1, "",
        "how many places the nearest result falls in the ranking once the map's top pixels are "
        "taken out"),
    "left_top": Measure("leaves the results", "faithfulness", 1, "",
        "share of the images whose nearest result is no longer among the results after that"),
    "road_drop": Measure("ROAD drop", "faithfulness", 1, "",
        "similarity to the result that is lost where the top pixels are filled in from around "
        "them, so that no edge gives away what was taken out"),
    "drop": Measure("average drop", "faithfulness", -1, "",
        "share of the similarity to the result that is lost where the map is laid over the "
        "picture as a mask"),
    "increase": Measure("average increase", "faithfulness", 1, "",
        "share of the images that are more similar to their result under that mask than whole"),
    "objects_auc": Measure("AUC, object against the other", "objects", 1, "right_chance",
        "of the signed map's pixels on either object alone", True),
    "rest_auc": Measure("AUC, object against the rest", "objects", 1, "right_chance",
        "of the signed map's pixels on it and on all else", True),
    "share": Measure("share on the right object", "objects", 1, "share_chance",
        "of the energy on either object, with the weights of a result of one of them"),
    "right": Measure("larger share is the right one", "objects", 1, "right_chance"),
    "even_share": Measure("share at equal area", "objects", 1, "right_chance",
        "as the share, both objects brought to one area"),
    "denser": Measure("denser side is the right one", "objects", 1, "right_chance"),
}  # fmt: skip
"""By the name of their column, in the order of the tables: first what is free of contrast."""


class Maps(NamedTuple):
    """Maps of b images `[b H W]`: as a picture shows them, >= 0, and before the ReLU."""

    drawn: np.ndarray
    signed: np.ndarray


class Clock:
    """Counts where the time goes."""

    def __init__(self) -> None:
        names = ("reading", "forward", "explaining", "metrics", "methods")
        self.seconds = dict.fromkeys(names, 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count what runs inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun


def columns(method: str, numbers: Mapping[str, Number]) -> dict[str, Number]:
    """Return a method's numbers by their names in a row: others' stand behind the method's."""
    before = "" if method == TRANSFERRED else f"{method}: "
    return {before + name: number for name, number in numbers.items()}


def localized(maps: Maps, regions: Sequence[Region], threshold: float) -> list[dict[str, Number]]:
    """Return the localization measures of b maps, each beside its region."""
    drawn, signed = maps
    inside = np.stack([region.inside for region in regions])
    boxes = zip(box_from_map(drawn, threshold), (region.boxes for region in regions), strict=True)
    hits = [box_iou(np.repeat(box[None], len(true), 0), true).max() >= 0.5 for box, true in boxes]
    values = {
        "energy": energy_share(drawn, inside),
        "pointing": pointing_hit(drawn, inside),
        "iou": iou_at(drawn, inside, threshold),
        "best_iou": best_iou(drawn, inside)[0],
        "found": np.array(hits, float),
        "auc": pixel_auc(signed, inside),
        "auc_chance": np.full(len(drawn), 0.5),
        "average_precision": average_precision(signed, inside),
        "hottest": hottest_precision(signed, inside),
        "area": inside.mean((1, 2)),
    }
    return [{name: float(one[row]) for name, one in values.items()} for row in range(len(drawn))]


def shares(drawn: np.ndarray, own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return `own`'s share of a map's energy `[H W]` on either region alone, and chance."""
    alone, others = own * (1 - other), other * (1 - own)
    chance = float(alone.sum() / max((alone + others).sum(), 1e-12))
    mine, theirs = float((drawn * alone).sum()), float((drawn * others).sum())
    return mine / (mine + theirs) if mine + theirs > 0 else chance, chance


def told_apart(maps: Maps, own: np.ndarray, other: np.ndarray) -> dict[str, Number]:
    """Return the measures of one map `[1 H W]` between two regions, each without the other."""
    alone, others = (own * (1 - other))[None], (other * (1 - own))[None]
    share, even = shares(maps.drawn[0], own, other)[0], equal_area_share(maps.drawn, alone, others)
    numbers: dict[str, Number] = {
        "share": share,
        "right": float(np.heaviside(share - 0.5, 0.5)),
        "objects_auc": float(pixel_auc(maps.signed, alone, others)[0]),
        "even_share": float(even[0]),
        "denser": float(np.heaviside(even[0] - 0.5, 0.5)),
    }
    if not np.maximum(own, other).all():
        numbers["rest_auc"] = float(pixel_auc(maps.signed, own[None])[0])
    return numbers


def retrieved(label: str | None, labels: Sequence[str | None]) -> dict[str, Number]:
    """Return Recall@k of one query from its neighbors' labels; None without one."""
    return {
        f"recall_{k}": float(label in labels[:k])
        if label is not None and len(labels) >= k
        else None
        for k in KS
    }
