"""What is explained: targets, as scores of an embedding and as their cotangents there.

cotangents.py  the triplet margin's and the centred target's cotangents, the whitened
               ones', and the norm's two ways
scores.py      targets as objects: a score for every embedding, what a method explains

Arrays only: everything works on NumPy arrays and on tensors alike.
"""

from ..recipe import NORMS, TARGETS, WHITENED
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
    "NORMS",
    "TARGETS",
    "WHITENED",
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
