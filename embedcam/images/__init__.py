"""Image files and data sets: found, named, read and prepared for the network. Without torch."""

from .batches import Batch, embed, load_batches, map_batches
from .datasets import DatasetSource, from_dataset
from .finding import find_images, is_collection
from .places import PLACE, Root, as_root, is_there, located, open_place, place_state, root_text
from .reading import EXTENSIONS, MAX_PIXELS, FileState, ImageLike, file_state, is_url, read_image
from .sources import ImageSource, Item, LeftOut, load_source

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "PLACE",
    "Batch",
    "DatasetSource",
    "FileState",
    "ImageLike",
    "ImageSource",
    "Item",
    "LeftOut",
    "Root",
    "as_root",
    "embed",
    "file_state",
    "find_images",
    "from_dataset",
    "is_collection",
    "is_there",
    "is_url",
    "load_batches",
    "load_source",
    "located",
    "map_batches",
    "open_place",
    "place_state",
    "read_image",
    "root_text",
]
