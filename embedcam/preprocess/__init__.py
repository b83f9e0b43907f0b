"""From an oriented RGB picture to the network's input; what all networks do is `Network`."""

from .protocol import Embedded, HeadMatrix, Network
from .transforms import (
    AnyPreprocess,
    CustomPreprocess,
    Extent,
    Preprocess,
    custom,
    from_transform,
    preprocess_from_dict,
    refuse_random,
)

__all__ = [
    "AnyPreprocess",
    "CustomPreprocess",
    "Embedded",
    "Extent",
    "HeadMatrix",
    "Network",
    "Preprocess",
    "custom",
    "from_transform",
    "preprocess_from_dict",
    "refuse_random",
]
