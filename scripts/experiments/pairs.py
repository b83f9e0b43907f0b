"""Do receipts point at what matched? Scenes of two photographs, and cells matched one by one.

The data, the split and the two embeddings are those of the experiment `truth`. 500 scenes of two
unseen pictures of different classes, x on the left and y on the right; x' and y' are the nearest
other pictures of the same classes.

- *map*: the scene is the query and x' the result. *AUC*: of its signed evidence, cells on the left
  against those on the right; *share*: of the positive evidence on the left, *right*: how often it
  is more; no change of contrast moves the first and the last;
- *above*: the scene is the query, x' the result, y' the rival; the same;
- *mean activation*: the plain mean of the query's channels, no explanation at all;
- *cell*: the result is a scene of x' and y'. One cell of the query's left half is picked, the one
  with the most evidence for x', or every one in turn: share of what it matches on the left, and how
  often the best matching cell lies there.

*centred* is the default: what the average image shares is put apart.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

from embedcam.metrics import energy_share, pixel_auc
from embedcam.pairs import PooledSide, make_comparison, make_receipt

from ..benchmarks.timing import table
from .data import (
    SIZE,
    Pictures,
    data_arguments,
    figure,
    frozen_features,
    frozen_network,
    reference_head,
    squashed,
    unit,
)

N_SCENES = 500
arguments = data_arguments


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of each folder under both embeddings."""
    for folder in options.data:
        pictures, features, kept = frozen_features(
            folder, frozen_network(options.weights), options.cache
        )
        unseen = ~pictures.seen()
        pictures = pictures.some(unseen)
        gallery = features.activations[unseen].astype(np.float32)
        first, second = scene_pairs(pictures.labels)
        scenes = kept.features(
            f"{folder.name}-scenes",
            lambda number: scene_picture(pictures, first[number], second[number]),  # noqa: B023
            len(first), (SIZE, 2 * SIZE),
        ).activations.astype(np.float32)  # fmt: skip
        head = reference_head(folder, options.weights, options.cache)
        for name, matrix in (("Reference", head), ("Frozen", np.eye(len(head[0]), dtype="f4"))):
            scores = _scores(matrix, pictures.labels, gallery, scenes, (first, second))
            rows = table(("evidence", "AUC", "share on the right side", "right"), _rows(scores))
            yield f"## {folder.name}\n\n{name} embedding:\n\n{rows}"


def scene_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw seeded pairs of pictures of different classes."""
    generator = np.random.default_rng(0)
    first = generator.integers(len(labels), size=N_SCENES)
    second = [generator.choice(np.flatnonzero(labels != labels[i])) for i in first]
    return first, np.array(second)


def scene_picture(pictures: Pictures, left: int, right: int) -> Image.Image:
    scene = Image.new("RGB", (2 * SIZE, SIZE))
    for place, one in enumerate((left, right)):
        scene.paste(squashed(pictures.paths[one]), (place * SIZE, 0))
    return scene


def nearest_alike(embeddings: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the nearest other picture of the same class of each."""
    distances = 2 - 2 * embeddings[asked] @ embeddings.T
    distances[labels[asked][:, None] != labels] = np.inf
    distances[np.arange(len(asked)), asked] = np.inf
    return distances.argmin(1)


def _rows(scores: dict[str, np.ndarray]) -> Iterator[list[str]]:
    for name in sorted(scores, key=lambda one: (one != "mean activation", "not" in one, one)):
        area, share = np.array(scores[name]).T
        right = (share > 0.5) + 0.5 * (share == 0.5)
        yield [name, "" if np.isnan(area).any() else figure(area), figure(share), figure(right)]


def _scores(
    matrix: np.ndarray,
    labels: np.ndarray,
    gallery: np.ndarray,
    scenes: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
) -> dict[str, list[np.ndarray]]:
    """AUC and share of each scene by each kind of evidence, `[2]`; no AUC (NaN) of a best match."""
    wide = matrix.astype(np.float64)
    embeddings = unit(gallery.mean((2, 3)) @ matrix.T)
    mean = embeddings.mean(0)
    given, other = (nearest_alike(embeddings, labels, one) for one in pairs)
    found: dict[str, list[np.ndarray]] = defaultdict(list)

    def side(activations: np.ndarray) -> PooledSide:
        z = wide @ activations.astype(np.float64).mean((1, 2))
        return PooledSide(activations, z / np.linalg.norm(z), np.linalg.norm(z), matrix)

    def told(name: str, evidence: np.ndarray) -> None:
        found[name].append(_score(evidence).mean(0))

    def best(name: str, matches: np.ndarray) -> None:
        at = matches.reshape(len(matches), -1).argmax(1) % matches.shape[2]
        found[name].append(np.array([np.nan, (at < matches.shape[2] // 2).mean()]))

    for number, scene in enumerate(scenes):
        query = side(scene)
        x, y = gallery[given[number]], gallery[other[number]]
        result, rival, both = side(x), side(y), side(np.concatenate([x, y], axis=2))
        told("mean activation", scene.mean(0)[None])
        for centred in (True, False):
            kind = "centred" if centred else "not centred"
            cells = make_receipt(query, result, mean, centred=centred).query.cells
            told(f"map, {kind}", cells[None])
            half = cells[:, : cells.shape[1] // 2]
            matches = make_receipt(query, both, mean, centred=centred).matrix()
            every = matches[:, : half.shape[1]].reshape(half.size, *matches.shape[2:])
            most = every[half.argmax()][None]
            told(f"cell with most evidence, {kind}", most)
            best(f"its best match, {kind}", most)
            told(f"every cell, {kind}", every)
            best(f"their best matches, {kind}", every)
        receipts = (make_receipt(query, one, mean) for one in (result, rival))
        told("above", make_comparison(query, *receipts, "l2").query.cells[None])
    return found


def _score(cells: np.ndarray) -> np.ndarray:
    """AUC of evidence `[n h w]` on the left against the right, and share of what is positive."""
    left = np.zeros(cells.shape, bool)
    left[:, :, : cells.shape[2] // 2] = True
    return np.stack([pixel_auc(cells, left), energy_share(np.maximum(cells, 0), left)], axis=1)
