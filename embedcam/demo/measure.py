"""How well each way of weighting channels finds the digit: the table of the demonstration.

Maps are sum_k w_k A_k, bilinearly up-sampled to the scene, nothing else done to them. One-digit
scenes: pixel AUC of the true box against the rest, of the signed map, which no change of contrast
moves, and the share of the drawn map's energy inside. Two-digit scenes: the same of the half with
the digit that a given result shows, against the other; the result is the gallery's nearest image of
that digit, and its weights are applied to the scene. Both halves are asked about in turn, so a map
that ignores the question scores exactly one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..explain.explainer import Explainer
from ..index.encoding import TopM
from ..methods.weights import weights_from_pooled
from ..metrics import box_mask, energy_share, pixel_auc
from ..network import EmbeddingNetwork
from ..offline.triplets import label_codes
from ..offline.cotangents import AnchorCotangents
from ..ops import resize, signed_cam
from ..recipe.recipe import Recipe
from ..targets import head_cotangent
from .scene_files import SceneFile

_BATCH, _STEP = 50, 4


@dataclass(frozen=True)
class Measured:
    """The features of a set of scenes.

    embedding: f `[n D]`, unit length; length: |z| before that, `[n]`; activations `[n K H W]`.
    """

    files: Sequence[SceneFile]
    embedding: np.ndarray
    length: np.ndarray
    activations: np.ndarray

    @property
    def labels(self) -> list[str]:
        """The first digit of each scene."""
        return [file.digits[0].label for file in self.files]


def features(network: EmbeddingNetwork, files: Sequence[SceneFile]) -> Measured:
    """One forward pass of every scene."""
    assert network.preprocess is not None
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(files), _BATCH):
        images = []
        for file in files[start : start + _BATCH]:
            with Image.open(file.path) as image:
                images.append(network.preprocess(image.convert("RGB")))
        found = network.forward(np.stack(images))
        kept.append(
            (found.embedding.numpy(), found.norm.numpy(), found.activations.numpy()),
        )
    embedding, length, activations = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return Measured(files, embedding, length, activations)


class OwnWeights:
    """Weights as a build computes them, under any recipe, of gallery images and of queries.

    A query is weighted as if it had been indexed with the gallery. Places count the gallery first,
    then the queries.
    """

    def __init__(self, network: EmbeddingNetwork, gallery: Measured, queries: Measured) -> None:
        self._network = network
        self._embedding = np.concatenate([gallery.embedding, queries.embedding])
        self._length = np.concatenate([gallery.length, queries.length])
        activations = (gallery.activations, queries.activations)
        self._pooled = np.concatenate([maps.mean((2, 3)) for maps in activations])
        self._positive = np.concatenate([maps.clip(min=0).mean((2, 3)) for maps in activations])
        self._cells = gallery.activations[0, 0].size
        self._labels = label_codes([*gallery.labels, *queries.labels])

    def of(self, recipe: Recipe, places: np.ndarray) -> np.ndarray:
        """Weights `[n K]` of the images at `places` `[n]`; cut where the recipe keeps the top M."""
        mean = self._embedding.mean(axis=0)
        anchors = AnchorCotangents(recipe, self._embedding, self._labels, mean)
        found = anchors.of(places)
        at_head = head_cotangent(
            found.values, self._embedding[places], self._length[places], recipe.head_norm, True
        )
        weights = weights_from_pooled(
            self._network,
            torch.from_numpy(self._pooled[places]),
            torch.from_numpy(self._positive[places]),
            torch.from_numpy(np.ascontiguousarray(at_head, np.float32)),
            None if found.used is None else torch.from_numpy(found.used),
            self._cells,
            recipe.method,
        ).numpy()
        if recipe.encoding != "top-m":
            return weights
        top = TopM(weights.shape[1], recipe.m, recipe.by, recipe.dtype)
        return top.decode(top.encode(weights))


@dataclass(frozen=True)
class Question:
    """Where in a two-digit scene is what a result shows?

    scene: place of the scene; side: 0 left, 1 right; results: places of the gallery's images of
    that side's digit, nearest to the scene first.
    """

    scene: int
    side: int
    results: np.ndarray


def questions(gallery: Measured, pairs: Measured, n_results: int = 5) -> list[Question]:
    """Both sides of every two-digit scene."""
    labels = np.array(gallery.labels)
    asked = []
    for scene, file in enumerate(pairs.files):
        nearness = gallery.embedding @ pairs.embedding[scene]
        for side, digit in enumerate(file.digits):
            of_class = np.flatnonzero(labels == digit.label)
            nearest = of_class[np.argsort(-nearness[of_class], kind="stable")]
            asked.append(Question(scene, side, nearest[:n_results]))
    return asked


class Scores:
    """Scores maps on one-digit scenes and on the questions of two-digit scenes."""

    def __init__(self, queries: Measured, pairs: Measured, asked: Sequence[Question]) -> None:
        self._queries, self._pairs, self._asked = queries, pairs, asked
        with Image.open(queries.files[0].path) as image:
            self._size = (image.height, image.width)
        self._boxes = np.stack(
            [box_mask(file.digits[0].box, self._size) for file in queries.files]
        ).astype(np.float32)
        left = box_mask((0, 0, self._size[1] / 2, self._size[0]), self._size)
        self._halves = np.stack([left, 1 - left])

    def chance(self) -> dict[str, float]:
        """The scores of a map that is the same everywhere."""
        box = float(self._boxes.mean())
        return {"box_auc": 0.5, "energy": box, "side_auc": 0.5, "share": 0.5, "right": 0.5}

    def row(self, one: np.ndarray, two: np.ndarray) -> dict[str, float]:
        """Mean scores of weights `one` `[queries K]` and `two` `[questions K]`."""
        boxes, energies = _in_blocks(one, self._queries.activations, self._size, self._boxes)
        scenes = self._pairs.activations[[question.scene for question in self._asked]]
        halves = self._halves[[question.side for question in self._asked]]
        sides, shares = _in_blocks(two, scenes, self._size, halves)
        right = (shares > 0.5) + 0.5 * (shares == 0.5)
        return {
            "box_auc": float(boxes.mean()),
            "energy": float(energies.mean()),
            "side_auc": float(sides.mean()),
            "share": float(shares.mean()),
            "right": float(right.mean()),
        }


def _in_blocks(
    weights: np.ndarray, activations: np.ndarray, size: tuple[int, int], inside: np.ndarray
) -> np.ndarray:
    """AUC of every `_STEP`th pixel of the signed maps, and energy shares of the drawn, `[2 n]`.

    A few maps at a time: those of all scenes are large.
    """
    found = []
    for start in range(0, len(weights), _BATCH):
        rows = slice(start, start + _BATCH)
        grids = signed_cam(weights[rows], activations[rows])
        apart = (resize(grids, size)[:, ::_STEP, ::_STEP], inside[rows, ::_STEP, ::_STEP])
        drawn = resize(np.maximum(grids, 0), size)
        found.append([pixel_auc(*apart), energy_share(drawn, inside[rows])])
    return np.concatenate(found, axis=1)


def transferred(
    explainer: Explainer,
    queries: Measured,
    pairs: Measured,
    asked: Sequence[Question],
    gallery_ids: Sequence[str],
    n_neighbors: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights that the index transfers: `[queries K]` by search, `[questions K]` by result."""
    found = explainer.explain_features(
        queries.embedding, queries.activations, n_neighbors=n_neighbors
    )
    scenes = [question.scene for question in asked]
    given = explainer.explain_features(
        pairs.embedding[scenes],
        pairs.activations[scenes],
        neighbors=[[gallery_ids[i] for i in q.results[:n_neighbors]] for q in asked],
    )
    return np.stack([e.weights for e in found]), np.stack([e.weights for e in given])


def measure(
    network: EmbeddingNetwork,
    explainer: Explainer,
    sets: tuple[Measured, Measured, Measured],
    gallery_ids: Sequence[str],
    n_triplets: int,
    top_m: int,
) -> list[dict[str, Any]]:
    """The table's rows: name, and the means that `Scores.row` gives.

    Args:
        network: the demo's.
        explainer: over the gallery's index.
        sets: gallery, queries, pairs.
        gallery_ids: ids of the gallery's scenes in the index, in the order of the set.
        n_triplets: S; top_m: M.
    """
    gallery, queries, pairs = sets
    asked = questions(gallery, pairs)
    scores = Scores(queries, pairs, asked)
    own = OwnWeights(network, gallery, queries)
    places = np.arange(len(gallery.files), len(gallery.files) + len(queries.files))
    results = np.array([question.results[0] for question in asked])
    channels = gallery.activations.shape[1]
    triplets = replace(Recipe(), target="margin", sampling="random", triplets=n_triplets)
    paper = Recipe.paper(triplets=n_triplets, m=top_m)
    recipes = {
        "one triplet": replace(triplets, triplets=1),
        f"{n_triplets} triplets": triplets,
        f"{n_triplets} triplets, top {top_m} of {channels} (the paper)": paper,
        f"{n_triplets} triplets, Grad-CAM++": replace(triplets, method="gradcam++"),
        "the default: every triplet, whitened": Recipe(),
    }
    same = np.ones((1, channels), np.float32)
    rows: list[dict[str, Any]] = [
        {"weights": "chance (area)", **scores.chance()},
        {
            "weights": "mean activation",
            **scores.row(same.repeat(len(places), 0), same.repeat(len(asked), 0)),
        },
    ]
    for name, recipe in recipes.items():
        rows.append(
            {"weights": name, **scores.row(own.of(recipe, places), own.of(recipe, results))}
        )
    for count, name in ((1, "transferred from 1 neighbour"), (5, "transferred from 5 neighbours")):
        drawn = transferred(explainer, queries, pairs, asked, gallery_ids, count)
        rows.append({"weights": name, **scores.row(*drawn)})
    return rows
