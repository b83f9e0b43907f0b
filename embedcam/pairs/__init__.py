"""Why did *these two* match? Receipts of a query and a result, which add up to the similarity."""

from ..explain.sides import Contributions, HeldSide, PooledSide, Shown, Side
from .explainer import PairExplainer, check_same, mean_of
from .lines import Known, Line
from .receipt import Comparison, Link, Receipt, make_comparison, make_receipt

__all__ = [
    "Comparison",
    "Contributions",
    "HeldSide",
    "Known",
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
