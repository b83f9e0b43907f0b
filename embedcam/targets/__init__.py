"""Targets to explain, as scores of an embedding (objects) and as cotangents there."""

from .cotangents import (
    Whitened,
    centred_cotangent,
    head_cotangent,
    margin_cotangent,
    query_cotangent,
    through_norm,
    whitened_cotangent,
    whitening,
    with_own,
)
from .scores import (
    ClassProxy,
    Coordinate,
    Direction,
    NegativeDistance,
    PairContribution,
    Similarity,
    Target,
    TripletMargin,
)

__all__ = [
    "ClassProxy",
    "Coordinate",
    "Direction",
    "NegativeDistance",
    "PairContribution",
    "Similarity",
    "Target",
    "TripletMargin",
    "Whitened",
    "centred_cotangent",
    "head_cotangent",
    "margin_cotangent",
    "query_cotangent",
    "through_norm",
    "whitened_cotangent",
    "whitening",
    "with_own",
]
