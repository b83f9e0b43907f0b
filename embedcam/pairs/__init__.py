"""Why did *these two* match? Receipts of a query and a result, which add up to the similarity."""

from .explainer import PairExplainer, check_same, mean_of
from .receipt import Comparison, Line, Link, Receipt, make_comparison, make_receipt
from .sides import Contributions, HeldSide, PooledSide, Shown, Side

__all__ = [
    "Comparison",
    "Contributions",
    "HeldSide",
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
