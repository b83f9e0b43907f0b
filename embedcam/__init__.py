"""embedcam: class activation maps for embedding networks, computed offline, drawn online.

Names are loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "BuildReport": "build",
    "EmbedcamError": "errors",
    "EmbeddingNetwork": "network",
    "Explainer": "explain",
    "Explanation": "explain",
    "Index": "index",
    "Preprocess": "preprocess",
    "Recipe": "recipe",
    "add": "build",
    "build": "build",
    "cam": "cam",
    "find_images": "images",
    "from_dataset": "images",
    "load_network": "models",
}

__all__ = sorted([*_WHERE, "__version__"])  # noqa: PLE0605 - the table is the one source

if TYPE_CHECKING:
    from .build import BuildReport, add, build
    from .cam import cam
    from .errors import EmbedcamError
    from .explain import Explainer, Explanation
    from .images import find_images, from_dataset
    from .index import Index
    from .models import load_network
    from .network import EmbeddingNetwork
    from .preprocess import Preprocess
    from .recipe import Recipe


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'embedcam' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
