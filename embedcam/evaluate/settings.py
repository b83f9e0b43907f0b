"""What is measured, and on how many images."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from .._options import check, setting
from ..errors import InputError
from ..recipe import FILLS

GROUPS: Final = ("retrieval", "localisation", "faithfulness", "objects", "fidelity", "sanity")
"""What `measures` chooses among."""
Record = dict[str, Any]
"""Plain values by name: the columns of an image or a question, a summary, settings."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how; the defaults end in minutes on a CPU.

    Parameters
    ----------
    n_neighbors, transfer : images a query is explained by; "mean" or "distance"
    limit : images queried, a seeded sample; None for all
    faithfulness, scenes, fidelity : images whose pixels are removed and whose baselines are drawn;
        pairs of different labels; images whose own map is held against transferred ones
    steps : of the deletion and insertion curves
    removed, threshold : shares in (0, 1): of the pixels taken out for the rank drop and ROAD; of a
        map's largest value from which a pixel is marked
    fill : in place of a removed pixel: "mean", "black" or "blur"
    measures : groups among `GROUPS`
    controls, examples : draw baselines; best and worst ones shown, each
    seed : of every sample and every random weight
    batch_size : images a forward pass; None for what suits the network and the device
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
        GROUPS, "NAMES", f"of {', '.join(GROUPS)} (default all)", choices=GROUPS
    )
    controls: bool = setting(
        True, help="leave out what the maps are held against", flag="no_controls"
    )
    examples: int = setting(3, "N", "best and worst on the page (default 3 each)", least=0)
    seed: int = setting(0, "N", "of every sample (default 0)", least=0)
    batch_size: int | None = setting(
        None, "N", "images a pass (default by the device)", kind=int, least=1, table="work"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.measures:
            raise InputError(f"measures names nothing; choose among {', '.join(GROUPS)}")

    def to_dict(self) -> Record:
        """Return everything, ready for JSON."""
        return {**asdict(self), "measures": list(self.measures)}
