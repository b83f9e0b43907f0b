"""Is the first result of the query's kind? Match on pictures that were not calibrated with.

Frozen MobileNetV2, pictures squashed to 224 x 224, all classes of a set. Half of each label's
pictures are indexed (*ten*: at most ten of them; *none*: without their labels), match is calibrated
on these alone, and the other half is asked. Five seeded halves: means, in brackets the worst.

- *wrong first*: share of the queries whose first result has another label;
- *AUROC*: of match between queries with a right and with a wrong first result (bar 0.85);
- *calibration error*: mean |match - share of right ones| over ten bins of equal count (bar 0.05);
  *perfect*: what a match that is exactly right would have on so many queries, whose first results
  are right or wrong by chance, at match's own probability: the mean of 200 draws; *together*: the
  error over ten bins of all halves' queries, of which bins of few queries hide less;
- *falls*: minus the rank correlation of match with the first result's distance. Without labels
  match is how usual that distance is and says nothing of labels: no error is measured;
- *noise*, *blank*: share below 0.2 of 60 pictures each (bar 0.95): white, blocky and uniform noise,
  and pictures of one colour.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from embedcam.index.calibration import TEN
from embedcam.index.search import nearest
from embedcam.offline.match import calibrate_match
from embedcam.recipe.recipe import Recipe

from ..benchmarks.timing import table
from .data import (
    CASES,
    SEEDS,
    SIZE,
    binned_error,
    data_arguments,
    forward,
    frozen_features,
    frozen_network,
    halves,
    mean_and_worst,
    name_of,
    unit,
)

MADE, LOW = 60, 0.2
COLUMNS = (
    "wrong first", "AUROC", "calibration error", "perfect", "falls", "noise", "blank", "together",
)  # fmt: skip
arguments = data_arguments


def measure(options: argparse.Namespace) -> Iterator[str]:
    network = frozen_network(options.weights)
    strange = [
        unit(forward(network, pictures, MADE, (SIZE, SIZE), "noise").pooled)
        for pictures in (map(picture, noise()), map(picture, blank()))
    ]
    lines = []
    for folder in options.data:
        pictures, features, _ = frozen_features(folder, network, options.cache)
        embeddings, labels = unit(features.pooled), pictures.labels
        for case in CASES:
            runs = [figures(embeddings, labels, strange, case, seed) for seed in range(SEEDS)]
            values, right = map(np.concatenate, zip(*(one for _, one in runs), strict=True))
            together = "" if case == "none" else f"{binned_error(values, right):.3f}"
            cells = mean_and_worst([columns for columns, _ in runs], (0, 2, 3))
            lines.append([name_of(folder), case, *cells, together])
    yield table(("set", "labels", *COLUMNS), lines)


def figures(
    embeddings: np.ndarray, labels: np.ndarray, strange: list[np.ndarray], case: str, seed: int
) -> tuple[list[float], tuple[np.ndarray, np.ndarray]]:
    """The columns, of one half, NaN where one means nothing; match and whether it was right."""
    indexed, asked = halves(labels, seed, CASES[case])
    known = [None] * len(indexed) if case == "none" else labels[indexed].tolist()
    made = calibrate_match(
        [str(row) for row in indexed], embeddings[indexed], known, Recipe(seed=seed)
    )
    assert made is not None
    calibration = made["several"]

    def match(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = nearest(embeddings[indexed], queries, TEN, "l2")
        values = [
            calibration.match(apart, [known[place] for place in near])
            for near, apart in zip(found.positions, found.distances, strict=True)
        ]
        return np.array(values), found.positions[:, 0], found.distances[:, 0]

    values, first, distances = match(embeddings[asked])
    right = labels[indexed][first] == labels[asked]
    generator = np.random.default_rng(seed)
    chance = [binned_error(values, generator.random(len(values)) < values) for _ in range(200)]
    area = roc_auc_score(right, values)
    by_label = [np.nan] * 2 if case == "none" else [binned_error(values, right), np.mean(chance)]
    falls = -spearmanr(values, distances)[0]
    low = [float((match(one)[0] < LOW).mean()) for one in strange]
    return [1 - right.mean(), area, *by_label, falls, *low], (values, right)


def picture(pixels: np.ndarray) -> Image.Image:
    """Pixels as a picture of the network's size."""
    made = Image.fromarray(pixels.astype(np.uint8))
    return made.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def noise() -> Iterator[np.ndarray]:
    """Yield white, blocky and uniform noise in turn."""
    generator = np.random.default_rng(0)
    for number in range(MADE):
        side = 14 if number % 3 == 1 else SIZE
        pixels = generator.integers(0, 256, (side, side, 3))
        if number % 3 == 0:
            pixels = (128 + 64 * generator.standard_normal(pixels.shape)).clip(0, 255)
        yield pixels


def blank() -> Iterator[np.ndarray]:
    for color in np.random.default_rng(0).integers(0, 256, (MADE, 3)):
        yield np.broadcast_to(color, (SIZE, SIZE, 3))
