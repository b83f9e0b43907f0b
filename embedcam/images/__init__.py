"""Image files and data sets: found, named, read and prepared for the network. Without torch."""

from .batches import Batch, embed, load_batches, map_batches
from .datasets import DatasetSource, from_dataset
from .reading import EXTENSIONS, MAX_PIXELS, FileState, ImageLike, file_state, read_image
from .sources import ImageSource, Item, LeftOut, find_images

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Batch",
    "DatasetSource",
    "FileState",
    "ImageLike",
    "ImageSource",
    "Item",
    "LeftOut",
    "embed",
    "file_state",
    "find_images",
    "from_dataset",
    "load_batches",
    "map_batches",
    "read_image",
]
