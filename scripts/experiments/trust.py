"""Does trust say what it says? For queries that the index has never seen.

Half of each label's pictures are indexed (at most ten a label in *ten*, without their labels in
*none*), the other half are queries; of birds and objects the pictures of the second half of their
classes. Frozen pooled MobileNetV2, the default recipe. The true correlation is of the signed map
that is drawn with the one that `DirectWeights` computes for the same neighbours. Means over seeded
halves, in brackets the worst.

- *error*: mean |trust - true correlation| over ten bins of equal count (bar 0.05, the worst 0.08);
- *Spearman*: of trust with the true correlation (bar 0.4);
- *trusted*: share of queries whose `trust_low` is 0.5 or more; *below*: share of these whose true
  correlation is below 0.5 (bar 0.15);
- *detail 2*: error and Spearman for the map joined from 224 and 448 pixels;
- *elsewhere*: trust and true correlation of queries from another of the sets, in the mean.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from embedcam import Explainer, Index, Recipe, build_from_features
from embedcam.explain.answer import negatives_for
from embedcam.index import put_calibrations
from embedcam.index.calibration import correlation
from embedcam.network import EmbeddingNetwork
from embedcam.offline.merge import plain
from embedcam.offline.trust import View, calibrate_trust, trust_rows
from embedcam.ops import drawn_and_signed
from embedcam.targets import head_cotangent, query_cotangent

from ..benchmarks.timing import table
from .data import (
    CASES,
    SEEDS,
    SIZE,
    Features,
    binned_error,
    data_arguments,
    frozen_features,
    frozen_network,
    halves,
    mean_and_worst,
    name_of,
    unit,
)

HEAD = (
    "indexed", "neighbours", "true correlation", "error", "Spearman", "trusted", "below",
    "detail 2: error", "Spearman", "elsewhere: trust", "true",
)  # fmt: skip
LARGEST = (1, 4, 5)
"""Columns of which the largest is the worst."""
arguments = data_arguments


class Set(NamedTuple):
    """Pictures with their features at both sizes."""

    labels: np.ndarray
    embeddings: np.ndarray
    views: list[Features]


def read_set(folder: Path, network: EmbeddingNetwork, cache: Path | None) -> Set:
    """Read the pictures of a folder; of posed ones the second half of the classes."""
    both = [frozen_features(folder, network, cache, side) for side in (SIZE, 2 * SIZE)]
    pictures = both[0][0]
    kept = np.full(len(pictures.labels), "natural" in folder.parts) | ~pictures.seen()
    views = [features.some(kept) for _, features, _ in both]
    return Set(pictures.labels[kept], unit(views[0].pooled), views)


def calibrated(
    one: Set, rows: np.ndarray, case: str, path: Path, network: EmbeddingNetwork
) -> Index:
    """An index of the rows, calibrated as a build does it."""
    recipe, embeddings = Recipe(), one.embeddings[rows]
    labels = [None if case == "none" else str(label) for label in one.labels[rows]]
    pooled = one.views[0].pooled[rows]
    build_from_features(
        embeddings, pooled, path, recipe, grid=(7, 7), labels=labels, progress=False
    )
    with Index.open(path) as index:
        maps, sample = one.views[0].activations, trust_rows(index.ids, recipe, network)
        made = calibrate_trust(
            recipe, network, [index.encoding(0)], lambda _, some: index.select(some).fields(0),
            embeddings, labels, sample,
            (View([maps[row].astype(np.float32)]) for row in rows[sample]), lambda _: None,
        )  # fmt: skip
    put_calibrations(path, {"trust_calibration": plain(made)})
    return Index.open(path)


def looked(index: Index, one: Set, rows: np.ndarray, count: int) -> np.ndarray:
    """Of each query trust, `trust_low`, and true correlations at detail 1 and 2, `[n 4]`."""
    explainer, found = Explainer(index, n_neighbors=count), []
    for row in rows:
        coarse, fine = (view.activations[row].astype(np.float32) for view in one.views)
        embedding = one.embeddings[row]
        explained = explainer.explain_features(embedding, coarse, detail_activations=fine)
        direct = direct_weights(index, embedding, explained.ids)
        plain = explainer.explain_features(embedding, coarse).signed_cam
        true = []
        for drawn, finer in ((plain, None), (explained.signed_cam, [fine])):
            expected = drawn_and_signed([direct], [coarse], finer)[1]
            true.append(correlation(*(m.ravel().astype(float) for m in (drawn, expected))))
        found.append([explained.trust, explained.trust_low, *true])
    return np.array(found, float)


def direct_weights(index: Index, embedding: np.ndarray, ids: list[str]) -> np.ndarray:
    """What `DirectWeights` computes on a query, in closed form."""
    recipe, near = Recipe.of_index(index.manifest), index.positions(ids)
    others = negatives_for(index, near.tolist(), index.select(near).labels)
    values = query_cotangent(
        recipe.resolved_target, recipe.norm, embedding, index.embeddings(near), others
    )
    length = np.ones(1, np.float32)
    return head_cotangent(values[None], embedding[None], length, recipe.head_norm, True)[0]


def figures(found: np.ndarray, strange: np.ndarray) -> list[float]:
    trust, low, true, joined = found.T
    trusted = low >= 0.5
    return [
        float(true.mean()), binned_error(trust, true), float(spearmanr(trust, true)[0]),
        float(trusted.mean()), float((true[trusted] < 0.5).mean()) if trusted.any() else 0.0,
        binned_error(trust, joined), float(spearmanr(trust, joined)[0]),
        float(strange[:, 0].mean()), float(strange[:, 2].mean()),
    ]  # fmt: skip


def measured(name: str, one: Set, other: Set, network: EmbeddingNetwork) -> str:
    lines: list[list[str]] = []
    elsewhere = np.arange(0, len(other.labels), 8)
    for case, most in CASES.items():
        runs: dict[int, list[list[float]]] = {1: [], 5: []}
        for seed in range(SEEDS):
            rows, queries = halves(one.labels, seed, most)
            with (
                tempfile.TemporaryDirectory(prefix="embedcam-trust-") as folder,
                calibrated(one, rows, case, Path(folder) / "index", network) as index,
            ):
                for count, kept in runs.items():
                    asked = (
                        looked(index, *of, count) for of in ((one, queries), (other, elsewhere))
                    )
                    kept.append(figures(*asked))
        lines += [
            [case, str(count), *mean_and_worst(kept, LARGEST)] for count, kept in runs.items()
        ]
    return f"## {name}\n\n{table(HEAD, lines)}"


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of each folder; queries from elsewhere are of the one before it."""
    network = frozen_network(options.weights)
    sets = {folder: read_set(folder, network, options.cache) for folder in options.data}
    for at, folder in enumerate(options.data):
        yield measured(name_of(folder), sets[folder], sets[options.data[at - 1]], network)
