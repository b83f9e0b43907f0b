"""embedcam: class activation maps for embedding networks, computed offline, drawn online.

Names are loaded on first use, so that importing the package costs nothing.
"""

import sys

if getattr(sys, "argv", [""])[0] == "-m" and sys.orig_argv[-len(sys.argv)] == __name__:
    try:  # `python -m embedcam`: Ctrl-C from here on
        from .cli.interrupts import INTERRUPTS

        INTERRUPTS.take()
    except KeyboardInterrupt:
        sys.stderr.write("embedcam: interrupted\n")
        raise SystemExit(130) from None

TYPE_CHECKING = False  # type checkers take it for true; `typing` costs 15 ms

__version__ = "0.1.0"

_WHERE = {
    name: module
    for module, names in {
        "errors": "EmbedcamError",
        "evaluate": "evaluate_index",
        "explain": "Explainer Explanation",
        "images": "find_images from_dataset",
        "index": "Index",
        "methods": "DirectWeights cam_for",
        "network": "EmbeddingNetwork load_network",
        "offline": "BuildReport add_images build_from_features build_index",
        "pairs": "PairExplainer",
        "preprocess": "Preprocess",
        "recipe": "METHODS Recipe",
        "report": "write_report",
        "targets": "ClassProxy Coordinate NegativeDistance PairContribution Similarity "
        "TripletMargin",
    }.items()
    for name in names.split()
}

__all__ = [
    "METHODS",
    "BuildReport",
    "ClassProxy",
    "Coordinate",
    "DirectWeights",
    "EmbedcamError",
    "EmbeddingNetwork",
    "Explainer",
    "Explanation",
    "Index",
    "NegativeDistance",
    "PairContribution",
    "PairExplainer",
    "Preprocess",
    "Recipe",
    "Similarity",
    "TripletMargin",
    "__version__",
    "add_images",
    "build_from_features",
    "build_index",
    "cam_for",
    "evaluate_index",
    "find_images",
    "from_dataset",
    "load_network",
    "write_report",
]

if TYPE_CHECKING:
    import typing

    from .errors import EmbedcamError
    from .evaluate import evaluate_index
    from .explain import Explainer, Explanation
    from .images import find_images, from_dataset
    from .index import Index
    from .methods import DirectWeights, cam_for
    from .network import EmbeddingNetwork, load_network
    from .offline import BuildReport, add_images, build_from_features, build_index
    from .pairs import PairExplainer
    from .preprocess import Preprocess
    from .recipe import METHODS, Recipe
    from .report import write_report
    from .targets import (
        ClassProxy,
        Coordinate,
        NegativeDistance,
        PairContribution,
        Similarity,
        TripletMargin,
    )


def __getattr__(name: str) -> "typing.Any":
    if name not in _WHERE:
        raise AttributeError(f"module 'embedcam' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
