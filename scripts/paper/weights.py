"""Which weights: averaging, encodings, targets, methods and sampling, each as rows."""

from dataclasses import replace

import numpy as np

from embedcam.offline.cotangents import Cotangents
from embedcam.recipe.recipe import Recipe
from embedcam.targets import NORMS, WHITENED

from .bench import Bench, Row

COUNTS = (1, 2, 5, 10, 50, 100)
KEPT = (10, 25, 50, 100, 200, 400, 640, 800)
RANKS = (8, 20, 50, 100, 128)
ENCODINGS = {
    "dense": {"encoding": "dense"},
    "low-rank 128": {"encoding": "low-rank"},
    "low-rank 128, around": {"encoding": "low-rank", "norm": "around"},
    "top 50 signed": {"encoding": "top-m", "m": 50, "by": "signed"},
}
ALL = Recipe(target="margin", sampling="all", encoding="dense")


def drawing(count: int, **changes: object) -> Recipe:
    """Dense weights averaged over that many triplets an image."""
    return replace(ALL, **{"sampling": "random", "triplets": count, **changes})


def averaging(bench: Bench) -> list[Row]:
    """S = 1, 2, 5, 10, 50, 100 and all, in each encoding; each against its own S = 1."""
    rows = []
    for name, encoding in ENCODINGS.items():
        encoding = {**encoding, "m": min(50, bench.head.matrix.shape[1])}
        single = None
        for count in (*COUNTS, None):
            recipe = replace(ALL if count is None else drawing(count), **encoding)
            row = bench.row((name, str(count or "all")), recipe)
            row.against = single
            single = single or row
            rows.append(row)
    return [*rows, bench.mean_activation(2)]


def encodings(bench: Bench) -> list[Row]:
    """Top-M by sign and by magnitude, low-rank of rising rank, and dense; of all triplets.

    Top-M rows are compared with the low-rank encoding of as many bytes, two numbers a channel kept,
    or of full rank where that takes fewer.
    """
    channels, full = bench.head.matrix.shape[1], len(bench.head.matrix)
    found = bench.cotangents(ALL)
    dense = bench.row(("dense", ""), ALL, found)
    ranks = {}
    for rank in sorted({min(rank, full) for rank in RANKS}):
        recipe = replace(ALL, encoding="low-rank", rank=rank)
        name = "head's own" if rank == full else "components"
        ranks[rank] = bench.row((f"low-rank, {name}", str(rank)), recipe, found)
        ranks[rank].against = dense
    rows = [dense, *ranks.values()]
    for by in ("signed", "magnitude"):
        for m in (*[m for m in KEPT if m < channels], channels):
            recipe = replace(ALL, encoding="top-m", m=m, by=by)
            row = bench.row((f"top-M, {by}", str(m)), recipe, found)
            row.against = ranks[max(rank for rank in ranks if rank <= max(2 * m, min(ranks)))]
            rows.append(row)
    return [*rows, bench.mean_activation(2)]


def targets(bench: Bench) -> list[Row]:
    """The margin, its two distances alone, other targets, the hinge; through and around."""
    positives, negatives = pair_means(bench.embeddings, bench.codes)
    f, ones = bench.embeddings, np.ones(len(bench.codes), np.int64)
    rows = []
    for norm in NORMS:
        recipe = replace(ALL, norm=norm)
        margin = bench.row(("margin, all triplets", norm), recipe)
        alone = {
            "nearness of positives alone": positive_cotangent(f, positives),
            "distance of negatives alone": negative_cotangent(f, negatives),
            "the loss with its own sign": -bench.cotangents(recipe).values,
        }
        compared = [
            bench.row((name, norm), recipe, Cotangents(values, None, ones))
            for name, values in alone.items()
        ]
        for target in WHITENED:
            compared.append(bench.row((target, norm), Recipe(target=target, norm=norm)))
        compared.append(bench.row(("centred", norm), replace(ALL, target="centred", norm=norm)))
        for row in compared:
            row.against = margin
        drawn = bench.row(("margin, 50 triplets", norm), drawing(50, norm=norm))
        hinged = bench.row(
            ("margin, 50 triplets, hinge 0.2", norm), drawing(50, norm=norm, hinge=True)
        )
        hinged.against = drawn
        rows += [margin, *compared, drawn, hinged]
    return [*rows, bench.mean_activation(2)]


def methods(bench: Bench) -> list[Row]:
    """Grad-CAM and Grad-CAM++ of the same triplets, beside the mean activation."""
    mean = bench.mean_activation(3)
    rows = [mean]
    for norm in NORMS:
        for count in (1, 50):
            recipe = drawing(count, norm=norm)
            usual = bench.row(("Grad-CAM", str(count), norm), recipe)
            other = bench.row(("Grad-CAM++", str(count), norm), replace(recipe, method="gradcam++"))
            usual.against, other.against = mean, usual
            rows += [usual, other]
    return rows


def sampling(bench: Bench) -> list[Row]:
    """Random, semihard and hard negatives, one and 50 triplets, beside all of them."""
    rows = []
    for count in (1, 50):
        made = [
            bench.row((kind, str(count)), drawing(count, sampling=kind))
            for kind in ("random", "semihard", "hard")
        ]
        for row in made[1:]:
            row.against = made[0]
        rows += made
    every = bench.row(("all", "all"), ALL)
    every.against = rows[3]
    return [*rows, every, bench.mean_activation(2)]


def pair_means(embeddings: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each picture's mean positive, itself left out, and mean negative, `[N D]` each."""
    same = codes[:, None] == codes
    positive, negative = same & ~np.eye(len(codes), dtype=bool), ~same
    return (
        (positive @ embeddings) / np.maximum(positive.sum(1), 1)[:, None],
        (negative @ embeddings) / np.maximum(negative.sum(1), 1)[:, None],
    )


def positive_cotangent(embeddings: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """dy/df of y = -mean D(f, f_p): 2 (mean f_p - f); its f vanishes through the norm."""
    return 2 * (positives - embeddings)


def negative_cotangent(embeddings: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """dy/df of y = mean D(f, f_n): 2 (f - mean f_n). The two add up to the margin's."""
    return 2 * (embeddings - negatives)
