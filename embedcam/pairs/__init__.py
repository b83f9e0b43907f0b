"""Why did *these two* match? Receipts of a query and a result, which add up to the similarity.

sides.py      what each cell and channel of one picture gives to its embedding
heads.py      the head behind a pair, where all follows from the mean of the activations
lines.py      a score in lines: the channels that give most, and the rest
receipt.py    the receipt of a pair, and of a result against its rival: numbers alone
drawing.py    receipts as pictures
explainer.py  receipts of queries against the images of an index
"""

from .explainer import PairExplainer, check_same, mean_of
from .lines import Line
from .receipt import Comparison, Link, Receipt, Shown, make_comparison, make_receipt
from .sides import DifferentiatedSide, Evidence, PooledSide, Side

__all__ = [
    "Comparison",
    "DifferentiatedSide",
    "Evidence",
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
