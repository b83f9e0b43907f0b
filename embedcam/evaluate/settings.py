"""What is measured, on how many images, and what each measure is called."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final

from ..errors import InputError

GROUPS: Final = ("retrieval", "localisation", "faithfulness", "objects", "fidelity", "sanity")
"""What `measures` chooses among."""
METHOD: Final = "transferred"
"""The way that is judged; the others are its controls."""
KS: Final = (1, 5, 10)


@dataclass(frozen=True)
class Measure:
    """A number an image.

    better: 1 where larger is better, -1 where smaller.
    chance: the column of what a map that knows nothing scores; empty for none.
    free: whether no increasing change of the map's values moves it.
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
    "auc": Measure(
        "pixel AUC", "localisation", 1, "auc_chance",
        "chance that a pixel of the object has more of the signed map than one outside", True,
    ),
    "average_precision": Measure(
        "pixel average precision", "localisation", 1, "area",
        "how purely the object's pixels come first in the signed map", True,
    ),
    "hottest": Measure(
        "hottest pixels", "localisation", 1, "area",
        "share on the object of the signed map's hottest pixels, as many as it has", True,
    ),
    "energy": Measure(
        "energy inside", "localisation", 1, "area", "share of the map's energy on the object"
    ),
    "pointing": Measure(
        "pointing game", "localisation", 1, "area", "the map's largest value is on the object"
    ),
    "iou": Measure(
        "IoU", "localisation", 1, "area",
        "overlap of the object and the pixels from the threshold up",
    ),
    "best_iou": Measure(
        "best IoU", "localisation", 1, "",
        "the same at each image's best threshold: an upper bound",
    ),
    "found": Measure(
        "box found", "localisation", 1, "", "the box drawn from the map overlaps a true one by half"
    ),
    "insertion": Measure(
        "insertion area", "faithfulness", 1, "",
        "mean similarity to the result while the map's top pixels are put in",
    ),
    "deletion": Measure(
        "deletion area", "faithfulness", -1, "", "the same while they are taken out"
    ),
    "rank_drop": Measure(
        "rank drop", "faithfulness", 1, "",
        "how many places the nearest result falls in the ranking once the map's top pixels are "
        "taken out",
    ),
    "left_top": Measure(
        "leaves the results", "faithfulness", 1, "",
        "share of the images whose nearest result is no longer among the results after that",
    ),
    "road_drop": Measure(
        "ROAD drop", "faithfulness", 1, "",
        "similarity to the result that is lost where the top pixels are filled in from around "
        "them, so that no edge gives away what was taken out",
    ),
    "drop": Measure(
        "average drop", "faithfulness", -1, "",
        "share of the similarity to the result that is lost where the map is laid over the picture "
        "as a mask",

    ),
    "increase": Measure(
        "average increase", "faithfulness", 1, "",
        "share of the images that are more similar to their result under that mask than whole",

    ),
    "objects_auc": Measure(
        "AUC, object against the other", "objects", 1, "right_chance",
        "of the signed map's pixels on either object alone", True,
    ),
    "rest_auc": Measure(
        "AUC, object against the rest", "objects", 1, "right_chance",
        "of the signed map's pixels on it and on all else", True,
    ),
    "share": Measure(
        "share on the right object", "objects", 1, "share_chance",
        "of the energy on either object, with the weights of a result of one of them",
    ),
    "right": Measure("larger share is the right one", "objects", 1, "right_chance", ""),
    "even_share": Measure(
        "share at equal area", "objects", 1, "right_chance",
        "as the share, both objects brought to one area",
    ),
    "denser": Measure("denser side is the right one", "objects", 1, "right_chance", ""),
}  # fmt: skip
"""By the name of their column, in the order of the tables: first what is free of contrast."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how. The defaults end in minutes on a CPU.

    n_neighbors: images a query is explained by; the map is the one `explain` shows.
    transfer: "mean" or "distance".
    limit: images queried, a seeded sample; None for all.
    faithfulness: images of them whose pixels are removed and whose controls are drawn.
    scenes: pairs of pictures of different labels.
    fidelity: images whose own map is computed and held against transferred ones.
    steps: of the deletion and insertion curves.
    removed: share of the pixels taken out for the rank drop and ROAD.
    threshold: share of a map's largest value from which a pixel is marked, for IoU and boxes.
    fill: what takes a removed pixel's place: "mean", "black" or "blur".
    measures: groups among `GROUPS`.
    controls: whether controls are drawn.
    examples: best and worst ones shown, each.
    seed: of every sample and every random weight.
    batch_size: images a forward pass; None takes what is fast: 8 on a CPU, 32 elsewhere.
    """

    n_neighbors: int = 5
    transfer: str = "mean"
    limit: int | None = None
    faithfulness: int = 50
    scenes: int = 100
    fidelity: int = 100
    steps: int = 20
    removed: float = 0.2
    threshold: float = 0.2
    fill: str = "mean"
    measures: tuple[str, ...] = GROUPS
    controls: bool = True
    examples: int = 3
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("n_neighbors", 1), ("faithfulness", 0), ("scenes", 0), ("fidelity", 0), ("steps", 1),
            ("examples", 0), ("seed", 0),
        ):  # fmt: skip
            _whole(name, getattr(self, name), least)
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in ("removed", "threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise InputError(f"{name} = {value!r}; give a share between 0 and 1")
        if self.fill not in ("mean", "black", "blur"):
            raise InputError(f"fill = {self.fill!r} is unknown; use mean, black or blur")
        if isinstance(self.measures, str) or not isinstance(self.measures, Iterable):
            raise InputError(
                f"measures = {self.measures!r}; give a tuple of names among {', '.join(GROUPS)}"
            )
        unknown = [name for name in self.measures if name not in GROUPS]
        if unknown or not self.measures:
            named = repr(unknown[0]) if unknown else "nothing"
            raise InputError(f"measures names {named}; choose among {', '.join(GROUPS)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "measures": list(self.measures)}


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} = {value!r}; give a whole number of at least {least}")


class Clock:
    """Where the time went: reading, forward passes, explaining, metrics, named methods."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(
            ("reading", "forward", "explaining", "metrics", "methods"), 0.0
        )

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count what runs inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun
