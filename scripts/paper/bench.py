"""One data set under the reference embedding, and what is measured on it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from measuring import (
    COARSE_BYTES,
    dense_weights,
    energy_in,
    explaining,
    pasted_auc,
    projected,
    share_of,
    single_auc,
    stored,
)
from photographs import (
    SIZE,
    Features,
    Pictures,
    Scenes,
    read_pictures,
    scene_pairs,
    scene_picture,
    scenes_of,
    squashed,
    train_head,
)

from embedcam import EmbeddingNetwork, load_network
from embedcam.errors import InputError
from embedcam.metrics import recall_at_k
from embedcam.offline.cotangents import AnchorCotangents, Cotangents
from embedcam.offline.features import AffineHead
from embedcam.offline.triplets import label_codes
from embedcam.recipe.recipe import Recipe
from embedcam.targets import head_cotangent

from .cache import Cache


@dataclass
class Row:
    """What one setting scores.

    Args:
        cells: what names it, a cell a column.
        single: AUC of each picture's own signed map, `[N]`.
        pasted: AUC of each scene and its mirror image, `[2 n]`.
        energy: of each picture's own map, `[N]`.
        share: of each scene and its mirror image, `[2 n]`.
        against: the row it is compared with, picture by picture.
        counts: triplets that count for each picture, `[N]`, where some may not.
        bytes: an image.
    """

    cells: tuple[str, ...]
    single: np.ndarray
    pasted: np.ndarray
    energy: np.ndarray
    share: np.ndarray
    against: "Row | None" = None
    counts: np.ndarray | None = None
    bytes: int | None = None


@dataclass
class Bench:
    """Pictures of unseen classes and scenes of two of them, forwarded once."""

    name: str
    unseen: Pictures
    gallery: Features
    scenes: Scenes
    head: AffineHead
    embeddings: np.ndarray = field(init=False)
    lengths: np.ndarray = field(init=False)
    codes: np.ndarray = field(init=False)
    mean: np.ndarray = field(init=False)
    given: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.embeddings, self.lengths = self.embed(self.gallery.pooled)
        codes = label_codes(list(self.unseen.labels))
        assert codes is not None
        self.codes, self.mean = codes, self.embeddings.mean(0)
        self.given = explaining(self.embeddings, self.unseen.labels, self.scenes.explained)

    def embed(self, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f `[n D]` and |z| `[n]` of pooled vectors `[n K]`."""
        z = self.head.output(pooled)
        lengths = np.linalg.norm(z, axis=1)
        return (z / lengths[:, None]).astype(np.float32), lengths

    def cotangents(self, recipe: Recipe) -> Cotangents:
        """dy/df of every picture as an anchor."""
        anchors = AnchorCotangents(recipe, self.embeddings, self.codes, self.mean)
        return anchors.of(np.arange(len(self.codes)))

    def weights(
        self,
        recipe: Recipe,
        cotangents: Cotangents | None = None,
        rows: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Weights `[n K]` as an index gives them back, and the bytes an image takes there.

        Args:
            recipe: method, norm, encoding, and where no cotangents are given the target.
            cotangents: dy/df; None for the recipe's own.
            rows: pictures `[n]` the cotangents are of; None for all.
        """
        rows = np.arange(len(self.codes)) if rows is None else rows
        return self.weights_at(
            recipe,
            cotangents or self.cotangents(recipe),
            self.gallery.pooled[rows],
            self.embeddings[rows],
            self.lengths[rows],
        )

    def weights_at(
        self,
        recipe: Recipe,
        found: Cotangents,
        pooled: np.ndarray,
        embeddings: np.ndarray,
        lengths: np.ndarray,
    ) -> tuple[np.ndarray, int]:
        """The same, differentiated at any embeddings, such as those of scenes."""
        values = found.values.astype(np.float32, copy=False)
        at_head = head_cotangent(values, embeddings, lengths, recipe.head_norm, True)
        dense = dense_weights(recipe, self.head, Features(pooled, pooled), at_head, found.used)
        weights, encoding = stored(recipe, self.head, at_head, dense, self.mean, embeddings)
        return weights, encoding.bytes_per_image() + COARSE_BYTES

    def row(
        self, cells: tuple[str, ...], recipe: Recipe, cotangents: Cotangents | None = None
    ) -> Row:
        """What a setting scores."""
        found = cotangents or self.cotangents(recipe)
        weights, size = self.weights(recipe, found)
        return replace(self.scored(cells, weights), counts=found.counts, bytes=size)

    def scored(self, cells: tuple[str, ...], weights: np.ndarray) -> Row:
        """What weights `[N K]` score."""
        energy = energy_in(self.gallery.activations, weights, self.unseen.regions)
        share = share_of(self.scenes, weights[self.given])
        return Row(cells, self.single(weights), self.pasted(weights), energy, share)

    def mean_activation(self, columns: int) -> Row:
        """What the plain mean of the activations scores: no explanation at all."""
        cells = ("mean activation", *[""] * (columns - 1))
        return self.scored(cells, np.ones_like(self.gallery.pooled))

    def single(self, weights: np.ndarray) -> np.ndarray:
        """AUC of each picture's own signed map, object against the rest, `[N]`."""
        return single_auc(self.gallery.activations, weights, self.unseen.objects)

    def pasted(self, weights: np.ndarray) -> np.ndarray:
        """AUC of each scene drawn with its result's weights, side against side, `[2 n]`."""
        return pasted_auc(self.scenes, weights[self.given])

    def frozen(self) -> "Bench":
        """The same pictures by the frozen pooled vector."""
        return replace(self, head=AffineHead(np.eye(self.gallery.pooled.shape[1], dtype="f4")))

    def said(self) -> str:
        """What the bench is, and whether its embedding retrieves as the frozen features do."""
        frozen = self.gallery.pooled
        frozen = frozen / np.linalg.norm(frozen, axis=1, keepdims=True)
        labels = self.unseen.labels
        recalls = [recall_at_k(one, labels) for one in (self.embeddings, frozen)]
        return (
            f"{self.name}: {len(labels)} pictures of {len(set(labels))} unseen classes, "
            f"{len(self.scenes.left) // 2} scenes and their mirror images; Recall@1 "
            f"{recalls[0]:.3f} (frozen features {recalls[1]:.3f})."
        )


def read_bench(folder: Path, weights: str, cache: Path | None) -> Bench:
    """A data folder's pictures put through the frozen network, and the head trained on half.

    Args:
        folder: as scripts/prepare_data.py makes it.
        weights: of MobileNetV2.
        cache: folder of features kept between runs, or None.

    Raises:
        InputError: a folder without annotations.csv.
    """
    if not (folder / "annotations.csv").is_file():
        official = (folder / "bounding_boxes.txt").is_file()
        what = "is CUB-200-2011 as it is downloaded" if official else "has no annotations.csv"
        raise InputError(
            f"{folder} {what}; convert the download first: python scripts/prepare_data.py "
            f"{'birds' if official else 'birds|objects'} {folder} DATA/NAME"
        )
    pictures, found, kept = frozen_features(folder, frozen_network(weights), cache)
    seen = pictures.seen()
    head = kept.array(
        f"{folder.name}-head", lambda: train_head(found.pooled[seen], pictures.labels[seen])
    )
    unseen = pictures.some(~seen)
    unseen.regions = projected(unseen.regions, found.activations)
    first, second = scene_pairs(unseen.labels)
    picture: Callable[[int], object] = partial(scene_picture, unseen, first=first, second=second)
    scenes = kept.features(f"{folder.name}-scenes", picture, 2 * len(first), (SIZE, 2 * SIZE))
    gallery = Features(found.activations[~seen].astype(np.float32), found.pooled[~seen])
    scenes.activations = scenes.activations.astype(np.float32)
    return Bench(folder.name, unseen, gallery, scenes_of(scenes, first, second), AffineHead(head))


def frozen_features(
    folder: Path, network: EmbeddingNetwork, cache: Path | None
) -> tuple[Pictures, Features, Cache]:
    """All pictures of a data folder put through the frozen network, and what keeps arrays of it."""
    pictures = read_pictures(folder)
    kept = Cache(cache, network, [folder / "annotations.csv", *pictures.paths])
    found = kept.features(
        f"{folder.name}-pictures",
        lambda number: squashed(pictures.paths[number]),
        len(pictures.paths),
        (SIZE, SIZE),
    )
    return pictures, found, kept


def data_arguments(description: str | None, data: str) -> argparse.Namespace:
    """The command line of a script that measures on data folders; `data` says which."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help=data)
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--cache", type=Path, help="folder where frozen features are kept")
    return parser.parse_args()


def frozen_network(weights: str) -> EmbeddingNetwork:
    """MobileNetV2 as it is everywhere here: squashed pictures, its last activations."""
    return load_network(
        "torchvision:mobilenet_v2",
        weights=weights,
        size=SIZE,
        resize="squash",
        channels_last=True,
    )
