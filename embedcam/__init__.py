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

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    import typing

    from .errors import EmbedcamError as EmbedcamError
    from .evaluate import evaluate_index as evaluate_index
    from .explain import Explainer as Explainer
    from .explain import Explanation as Explanation
    from .images import find_images as find_images
    from .images import from_dataset as from_dataset
    from .index import Index as Index
    from .methods import DirectWeights as DirectWeights
    from .methods import cam_for as cam_for
    from .network import EmbeddingNetwork as EmbeddingNetwork
    from .network import load_network as load_network
    from .offline import BuildReport as BuildReport
    from .offline import add_images as add_images
    from .offline import build_from_features as build_from_features
    from .offline import build_index as build_index
    from .pairs import PairExplainer as PairExplainer
    from .preprocess import Preprocess as Preprocess
    from .recipe import METHODS as METHODS
    from .recipe import Recipe as Recipe
    from .report import write_report as write_report
    from .targets import ClassProxy as ClassProxy
    from .targets import Coordinate as Coordinate
    from .targets import NegativeDistance as NegativeDistance
    from .targets import PairContribution as PairContribution
    from .targets import Similarity as Similarity
    from .targets import TripletMargin as TripletMargin


def __getattr__(name: str) -> "typing.Any":
    if name not in _WHERE:
        raise AttributeError(f"module 'embedcam' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
