"""From an oriented RGB picture to the network's input, and back to the pixels it saw.

A `Preprocess` does two things that must never disagree: it makes the array the network is fed, and
it says which rectangle of the picture that array shows. Its numbers are those of torchvision's
`ImageClassification` preset on PIL input (resize the shorter side, crop the centre, scale to
[0, 1], normalise), or of a plain resize to the network's size ("squash": nothing is cut off).

`CustomPreprocess` wraps a caller's own transform; `from_transform` recognises torchvision's presets
and the usual Resize / CenterCrop / ToTensor / Normalize chains and turns them into a `Preprocess`.
"""

from .custom import AnyPreprocess, CustomPreprocess, custom, preprocess_from_dict
from .protocol import AffineHead, Embedded, Network
from .recognise import from_transform
from .standard import IMAGENET_MEAN, IMAGENET_STD, Extent, Preprocess

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AffineHead",
    "AnyPreprocess",
    "CustomPreprocess",
    "Embedded",
    "Extent",
    "Network",
    "Preprocess",
    "custom",
    "from_transform",
    "preprocess_from_dict",
]
