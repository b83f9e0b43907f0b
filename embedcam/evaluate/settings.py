"""What is measured, on how many images, and what each measure is called."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from .._options import check, setting
from ..errors import InputError
from ..recipe import FILLS

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

    Parameters
    ----------
    n_neighbors : int
        Images a query is explained by; the map is the one `explain` shows.
    transfer : str
        "mean" or "distance".
    limit : int, optional
        Images queried, a seeded sample; None for all.
    faithfulness, scenes, fidelity : int
        Images of them whose pixels are removed and whose baselines are drawn; pairs of pictures
        of different labels; images whose own map is held against transferred ones.
    steps : int
        Of the deletion and insertion curves.
    removed, threshold : float
        Shares between 0 and 1: of the pixels taken out for the rank drop and ROAD; of a map's
        largest value from which a pixel is marked, for IoU and boxes.
    fill : str
        What takes a removed pixel's place: "mean", "black" or "blur".
    measures : tuple of str
        Groups among `GROUPS`.
    controls : bool
        Draw baselines.
    examples : int
        Best and worst ones shown, each.
    seed : int
        Of every sample and every random weight.
    batch_size : int, optional
        Images a forward pass; None takes what is fast: 8 on a CPU, 32 elsewhere.
    """

    n_neighbors: int = setting(5, "N", "neighbours a map (default 5)", letter="-n", least=1)
    transfer: str = setting(
        "mean", help="how neighbours count (default mean)", choices=("mean", "distance")
    )
    limit: int | None = setting(None, "N", "images queried, a sample", kind=int, least=1)
    faithfulness: int = setting(
        50,
        "N",
        "images whose pixels are removed and whose controls are drawn (default 50)",
        least=0,
    )
    scenes: int = setting(100, "N", "pairs of pictures, side by side (default 100)", least=0)
    fidelity: int = setting(
        100,
        "N",
        "images whose own map is computed and held against transferred ones (default 100)",
        least=0,
    )
    steps: int = setting(20, "N", "of deletion and insertion (default 20)", least=1)
    removed: float = setting(
        0.2, "SHARE", "of the pixels, for the rank drop (default 0.2)", above=0, below=1
    )
    threshold: float = setting(
        0.2, "SHARE", "of a map's largest value, for IoU and boxes (default 0.2)", above=0, below=1
    )
    fill: str = setting("mean", help="in place of removed pixels (default mean)", choices=FILLS)
    measures: tuple[str, ...] = setting(
        GROUPS,
        "NAMES",
        "of retrieval, localisation, faithfulness, objects, fidelity, sanity (default all)",
        choices=GROUPS,
    )
    controls: bool = setting(
        True, help="leave out what the maps are held against", flag="no_controls"
    )
    examples: int = setting(3, "N", "best and worst on the page (default 3 each)", least=0)
    seed: int = setting(0, "N", "of every sample (default 0)", least=0)
    batch_size: int | None = setting(
        None, "N", "images a pass (default 8 on a CPU)", kind=int, least=1, table="work"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.measures:
            raise InputError(f"measures names nothing; choose among {', '.join(GROUPS)}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {**asdict(self), "measures": list(self.measures)}


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
