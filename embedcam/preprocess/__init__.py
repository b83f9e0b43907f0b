"""From an oriented RGB picture to the network's input; what all networks do is `Network`."""

from .passes import usual_passes
from .protocol import NORMS, Embedded, HeadMatrix, HeldNorm, Network
from .recognizing import from_transform
from .transforms import (
    AnyPreprocess,
    Array,
    CustomPreprocess,
    Extent,
    Preprocess,
    Transform,
    custom,
    preprocess_from_dict,
    refuse_random,
)

__all__ = [
    "NORMS",
    "AnyPreprocess",
    "Array",
    "CustomPreprocess",
    "Embedded",
    "Extent",
    "HeadMatrix",
    "HeldNorm",
    "Network",
    "Preprocess",
    "Transform",
    "custom",
    "from_transform",
    "preprocess_from_dict",
    "refuse_random",
    "usual_passes",
]
