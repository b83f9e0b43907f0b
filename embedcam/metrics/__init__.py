"""How good maps, rankings and retrieval are: pure functions over arrays, NumPy in and out.

checks.py        what comes in, checked; magnitudes brought near 1 without rounding
order.py         pixels in order of value, in one way everywhere
contrast_free.py signed maps beside a region, by the order of their values alone
localisation.py  a map beside the place it should mark: energy, pointing, IoU, boxes
faithfulness.py  what is removed and in which order; what the scores after it say
imputation.py    removed pixels filled in from their surroundings
retrieval.py     Recall@K and mAP@R of embeddings
agreement.py     two maps or two weight vectors beside each other
intervals.py     how sure a mean or a difference is

Nothing here runs a network, sharpens a map or leaves an image out unsaid. What is not a number
never comes out: bad input is an `InputError`, and what a map without energy scores stands in each
docstring.
"""

from .agreement import correlations, cosines, map_iou, rank_correlations
from .contrast_free import average_precision, equal_area_share, hottest_precision, pixel_auc
from .faithfulness import (
    average_drop,
    average_increase,
    curve_area,
    deletion_steps,
    leaves_top,
    rank_drop,
    rank_of,
    removal_masks,
    score_drops,
)
from .imputation import noisy_linear_imputation
from .intervals import PairedDifference, bootstrap_interval, paired_difference
from .localisation import (
    best_iou,
    box_from_map,
    box_iou,
    box_mask,
    energy_share,
    iou_at,
    localisation_accuracy,
    pointing_hit,
)
from .retrieval import map_at_r, precision_at_r, recall_at_k, recalls_at

__all__ = [
    "PairedDifference",
    "average_drop",
    "average_increase",
    "average_precision",
    "best_iou",
    "bootstrap_interval",
    "box_from_map",
    "box_iou",
    "box_mask",
    "correlations",
    "cosines",
    "curve_area",
    "deletion_steps",
    "energy_share",
    "equal_area_share",
    "hottest_precision",
    "iou_at",
    "leaves_top",
    "localisation_accuracy",
    "map_at_r",
    "map_iou",
    "noisy_linear_imputation",
    "paired_difference",
    "pixel_auc",
    "pointing_hit",
    "precision_at_r",
    "rank_correlations",
    "rank_drop",
    "rank_of",
    "recall_at_k",
    "recalls_at",
    "removal_masks",
    "score_drops",
]
