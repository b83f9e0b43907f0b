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
    "add_images": "build",
    "build_from_features": "features",
    "build_index": "build",
    "find_images": "images",
    "from_dataset": "images",
    "load_network": "models",
}

__all__ = [
    "BuildReport",
    "EmbedcamError",
    "EmbeddingNetwork",
    "Explainer",
    "Explanation",
    "Index",
    "Preprocess",
    "Recipe",
    "__version__",
    "add_images",
    "build_from_features",
    "build_index",
    "find_images",
    "from_dataset",
    "load_network",
]

if TYPE_CHECKING:
    from .build import BuildReport, add_images, build_index
    from .errors import EmbedcamError
    from .explain import Explainer, Explanation
    from .features import build_from_features
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
