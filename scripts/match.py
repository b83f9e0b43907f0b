"""Is the first result of the query's kind? Match on pictures that were not calibrated with.

    python scripts/match.py DATA/birds20 DATA/objects24 DATA/natural/single \\
        --weights mobilenet_v2_imagenet.safetensors --output docs/results/match.md --cache CACHE

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

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from paper.bench import data_arguments, frozen_features, frozen_network
from paper.report import markdown
from photographs import SIZE, forward
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from embedcam import EmbedcamError, EmbeddingNetwork
from embedcam.index.matching import TEN, MatchCalibration
from embedcam.index.search import nearest
from embedcam.offline.match import calibrate_match

SEEDS, FEW, MADE, LOW = 5, 10, 60, 0.2
COLUMNS = (
    "wrong first", "AUROC", "calibration error", "perfect", "falls", "noise", "blank", "together",
)  # fmt: skip


def main() -> None:
    options = data_arguments(__doc__, "folders with annotations.csv")
    try:
        network = frozen_network(options.weights)
        strange = [
            _unit(forward(network, pictures, MADE, (SIZE, SIZE), "noise").pooled)
            for pictures in (noise(), blank())
        ]
        lines = []
        for folder in options.data:
            embeddings, labels = read(folder, network, options.cache)
            name = folder.name if folder.name != "single" else folder.parent.name
            for kind in ("all", "ten", "none"):
                found = [figures(embeddings, labels, strange, kind, seed) for seed in range(SEEDS)]
                asked = (np.concatenate(parts) for parts in zip(*(said for _, said in found),
                                                                strict=True))  # fmt: skip
                together = "" if kind == "none" else f"{error(*asked):.3f}"
                runs = np.array([columns for columns, _ in found])
                lines.append([name, kind, *cells(runs), together])
                print(" | ".join(lines[-1]), flush=True)
    except EmbedcamError as problem:
        sys.exit(f"match: {problem}")
    if options.output:
        rules = (__doc__ or "").partition("--cache CACHE\n\n")[2]
        names = " ".join(f"DATA/{'/'.join(_tail(folder))}" for folder in options.data)
        head = (
            f"# Match measured\n\nMade by `python scripts/match.py {names} --weights "
            f"mobilenet_v2_imagenet.safetensors --output docs/results/match.md`.\n\n{rules}\n"
        )
        text = head + markdown(("set", "labels", *COLUMNS), lines)
        options.output.write_text(text, encoding="utf-8")


def read(
    folder: Path, network: EmbeddingNetwork, cache: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `[N D]` of length 1 and labels `[N]` of a data folder."""
    pictures, found, _ = frozen_features(folder, network, cache)
    return _unit(found.pooled), pictures.labels


def figures(
    embeddings: np.ndarray, labels: np.ndarray, strange: list[np.ndarray], kind: str, seed: int
) -> tuple[list[float], tuple[np.ndarray, np.ndarray]]:
    """The columns, of one half, NaN where one means nothing; match and whether it was right."""
    indexed, asked = halves(labels, seed, FEW if kind == "ten" else len(labels))
    known = [None] * len(indexed) if kind == "none" else labels[indexed].tolist()
    made = calibrate_match(embeddings[indexed], known, seed=seed)
    assert made is not None
    calibration = MatchCalibration.from_dict(made["several"])

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
    chance = [error(values, generator.random(len(values)) < values) for _ in range(200)]
    area = roc_auc_score(right, values)
    by_label = [np.nan] * 2 if kind == "none" else [error(values, right), np.mean(chance)]
    falls = -spearmanr(values, distances)[0]
    low = [float((match(one)[0] < LOW).mean()) for one in strange]
    return [1 - right.mean(), area, *by_label, falls, *low], (values, right)


def halves(labels: np.ndarray, seed: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of half of each label's pictures, so many at most, and of the other half."""
    generator = np.random.default_rng(seed)
    indexed, asked = [], []
    for label in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == label))
        middle = (len(order) + 1) // 2
        indexed.append(order[:middle][:most])
        asked.append(order[middle:])
    return np.sort(np.concatenate(indexed)), np.sort(np.concatenate(asked))


def error(values: np.ndarray, right: np.ndarray) -> float:
    """Mean |match - share of right ones| over ten bins of equal count."""
    bins = np.array_split(np.argsort(values, kind="stable"), 10)
    return float(np.mean([abs(values[one].mean() - right[one].mean()) for one in bins]))


def cells(runs: np.ndarray) -> list[str]:
    """Each column's mean over halves, and the worst; empty where it means nothing."""
    worst = (np.max, np.min, np.max, np.max, np.min, np.min, np.min)
    return [
        "" if np.isnan(column).any() else f"{column.mean():.3f} ({pick(column):.3f})"
        for column, pick in zip(runs.T, worst, strict=True)
    ]


def noise() -> Iterator[Image.Image]:
    """White, blocky and uniform noise in turn."""
    generator = np.random.default_rng(0)
    for number in range(MADE):
        kind = number % 3
        side = 14 if kind == 1 else SIZE
        pixels = generator.integers(0, 256, (side, side, 3))
        if kind == 0:
            pixels = (128 + 64 * generator.standard_normal(pixels.shape)).clip(0, 255)
        picture = Image.fromarray(pixels.astype(np.uint8))
        yield picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def blank() -> Iterator[Image.Image]:
    """Pictures of one colour."""
    for colour in np.random.default_rng(0).integers(0, 256, (MADE, 3)).tolist():
        yield Image.new("RGB", (SIZE, SIZE), tuple(colour))


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _tail(folder: Path) -> tuple[str, ...]:
    return folder.parts[-2:] if folder.name == "single" else folder.parts[-1:]


if __name__ == "__main__":
    main()
