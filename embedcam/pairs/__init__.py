"""Why did *these two* match? Receipts of a query and a result, which add up to the similarity."""

from ..explain.sides import Contributions, DifferentiatedSide, PooledSide, Shown, Side
from .explainer import PairExplainer, check_same, mean_of
from .receipt import Comparison, Line, Link, Receipt, make_comparison, make_receipt

__all__ = [
    "Comparison",
    "DifferentiatedSide",
    "Contributions",
    "Line",
    "Link",
    "PairExplainer",
    "PooledSide",
    "Receipt",
    "Shown",
    "Side",
    "check_same",
    "make_comparison",
    "make_receipt",
    "mean_of",
]
