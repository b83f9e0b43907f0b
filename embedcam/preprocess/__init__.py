"""From an oriented RGB picture to the network's input; what all networks do is `Network`."""

from .protocol import Embedded, HeadMatrix, Network
from .recognise import from_transform
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AnyPreprocess,
    CustomPreprocess,
    Extent,
    Preprocess,
    custom,
    preprocess_from_dict,
    refuse_random,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "HeadMatrix",
    "AnyPreprocess",
    "CustomPreprocess",
    "Embedded",
    "Extent",
    "Network",
    "Preprocess",
    "custom",
    "from_transform",
    "preprocess_from_dict",
    "refuse_random",
]
