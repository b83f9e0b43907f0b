"""Image files and data sets: found, named, read and prepared for the network.

`find_images` and `from_dataset` list what there is, each image under a stable string id;
`read_image` decodes one, upright and in RGB, within limits; `load_batches` feeds a network.
This room owns the outside world of image files. It never imports torch.
"""

from .batches import Batch, embed, load_batches
from .datasets import DatasetSource, from_dataset
from .marks import FileState, file_state
from .reading import EXTENSIONS, MAX_PIXELS, read_image
from .sources import ImageSource, Item, LeftOut, find_images

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Batch",
    "DatasetSource",
    "FileState",
    "ImageSource",
    "Item",
    "LeftOut",
    "embed",
    "file_state",
    "find_images",
    "from_dataset",
    "load_batches",
    "read_image",
]
