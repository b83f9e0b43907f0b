"""Measures of maps, rankings and retrieval: pure functions over arrays, NumPy in and out.

Bad input is an `InputError`; what is not a number never comes out.
"""

from .faithfulness import (
    average_drop,
    average_increase,
    curve_area,
    deletion_steps,
    leaves_top,
    noisy_linear_imputation,
    rank_drop,
    rank_of,
    removal_masks,
    score_drops,
)
from .localisation import (
    average_precision,
    best_iou,
    box_from_map,
    box_iou,
    box_mask,
    energy_share,
    equal_area_share,
    hottest_precision,
    iou_at,
    localisation_accuracy,
    pixel_auc,
    pointing_hit,
)
from .maps import (
    PairedDifference,
    bootstrap_interval,
    correlations,
    cosines,
    map_iou,
    paired_difference,
    rank_correlations,
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
