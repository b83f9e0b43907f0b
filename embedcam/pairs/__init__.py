"""Why did *these two* match? Receipts of a query and a result, which add up to the similarity."""

from ..explain.sides import Contributions, HeldSide, PooledSide, Shown, Side
from .explainer import PairExplainer, check_same, mean_of, named_concepts
from .lines import NOTHING_KNOWN, Known, Line
from .naming import suggest_names
from .places import Place, covered
from .receipt import Comparison, Link, Receipt, make_comparison, make_receipt
from .texts import TextReceipt, make_text_receipt

__all__ = [
    "NOTHING_KNOWN",
    "Comparison",
    "Contributions",
    "HeldSide",
    "Known",
    "Line",
    "Link",
    "PairExplainer",
    "Place",
    "PooledSide",
    "Receipt",
    "Shown",
    "Side",
    "TextReceipt",
    "check_same",
    "covered",
    "make_comparison",
    "make_receipt",
    "make_text_receipt",
    "mean_of",
    "named_concepts",
    "suggest_names",
]
