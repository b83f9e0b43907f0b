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
from collections.abc import Iterator

import numpy as np
from PIL import Image

from embedcam.metrics import pixel_auc
from embedcam.pairs import PooledSide, make_comparison, make_receipt

from .data import (
    SIZE,
    Pictures,
    data_arguments,
    figure,
    frozen_features,
    frozen_network,
    reference_head,
    squashed,
    table,
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


def _rows(scores: dict[str, list]) -> Iterator[list[str]]:
    for name in sorted(scores, key=lambda one: (one != "mean activation", "not" in one, one)):
        values = np.array(scores[name])
        area = "" if values.ndim == 1 else figure(values[:, 0])
        share = values if values.ndim == 1 else values[:, 1]
        right = (share > 0.5) + 0.5 * (share == 0.5)
        yield [name, area, figure(share), figure(right)]


def _scores(
    matrix: np.ndarray,
    labels: np.ndarray,
    gallery: np.ndarray,
    scenes: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
) -> dict[str, list]:
    wide = matrix.astype(np.float64)
    embeddings = unit(gallery.mean((2, 3)) @ matrix.T)
    mean = embeddings.mean(0)
    given, other = (nearest_alike(embeddings, labels, one) for one in pairs)

    def side(activations: np.ndarray) -> PooledSide:
        z = wide @ activations.astype(np.float64).mean((1, 2))
        return PooledSide(activations, z / np.linalg.norm(z), np.linalg.norm(z), matrix)

    found: dict[str, list] = {}
    for number, scene in enumerate(scenes):
        query = side(scene)
        x, y = gallery[given[number]], gallery[other[number]]
        result, rival, both = side(x), side(y), side(np.concatenate([x, y], axis=2))
        plain = scene.mean(0)
        found.setdefault("mean activation", []).append(_score(plain[None])[0])
        for centred in (True, False):
            kind = "centred" if centred else "not centred"
            first = make_receipt(query, result, mean, centred=centred)
            found.setdefault(f"map, {kind}", []).append(_score(first.query.cells[None])[0])
            matches = make_receipt(query, both, mean, centred=centred).matrix()
            half = first.query.cells[:, : first.query.cells.shape[1] // 2]
            peak = np.unravel_index(half.argmax(), half.shape)
            best = matches[peak]
            found.setdefault(f"cell with most evidence, {kind}", []).append(_score(best[None])[0])
            found.setdefault(f"its best match, {kind}", []).append(_on_left(best))
            every = np.stack([matches[place] for place in np.ndindex(*half.shape)])
            found.setdefault(f"every cell, {kind}", []).append(_score(every).mean(0))
            best_of = [_on_left(one) for one in every]
            found.setdefault(f"their best matches, {kind}", []).append(float(np.mean(best_of)))
        receipts = (make_receipt(query, one, mean) for one in (result, rival))
        above = make_comparison(query, *receipts, "l2")
        found.setdefault("above", []).append(_score(above.query.cells[None])[0])
    return found


def _score(cells: np.ndarray) -> np.ndarray:
    """Of evidence `[n h w]`, AUC of the left half against the right one, and the share of what is
    positive on the left, 0.5 where nothing is: `[n 2]`."""
    positive, half = np.maximum(cells, 0), cells.shape[2] // 2
    left = np.zeros(cells.shape, bool)
    left[:, :, :half] = True
    total = positive.sum((1, 2))
    inside = positive[:, :, :half].sum((1, 2))
    share = np.where(total > 0, inside / np.where(total > 0, total, 1), 0.5)
    return np.stack([pixel_auc(cells, left), share], axis=1)


def _on_left(cells: np.ndarray) -> float:
    return float(np.unravel_index(cells.argmax(), cells.shape)[1] < cells.shape[1] // 2)
