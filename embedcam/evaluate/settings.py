"""What is measured, and on how many images."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final

from ..errors import InputError

GROUPS: Final = ("retrieval", "localisation", "faithfulness", "objects", "fidelity", "sanity")
"""What `measures` chooses among."""


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
