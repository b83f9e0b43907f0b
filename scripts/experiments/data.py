"""Labelled photographs with boxes: read, put through a frozen network, kept between runs.

A data folder holds `annotations.csv` (path,label,x0,y0,x1,y1,width,height and perhaps mask), as
examples/prepare_data.py makes it. Of birds and objects the first half of the classes, in the
alphabet, trains the reference head and the second half is measured.
"""

import argparse
import csv
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from embedcam import EmbeddingNetwork, load_network
from embedcam.errors import InputError
from embedcam.images import ImageSource, Item, read_image
from embedcam.metrics import bootstrap_interval

SIZE, BATCH, SEEDS = 224, 8, 5
"""Side of the network's input; pictures a forward pass; seeded halves."""
CASES = {"all": None, "ten": 10, "none": None}
"""Of each label at most so many are indexed; *none*: without their labels."""


class Pictures(NamedTuple):
    """Where the pictures of a data set lie, and what they show."""

    paths: list[Path]
    labels: np.ndarray

    def some(self, chosen: np.ndarray) -> "Pictures":
        """Return those for which a mask `[N]` is true."""
        paths = [path for path, kept in zip(self.paths, chosen, strict=True) if kept]
        return Pictures(paths, self.labels[chosen])

    def seen(self) -> np.ndarray:
        """Return whether a picture is of the classes that train the head, `[N]`."""
        classes = sorted(set(self.labels))
        return np.isin(self.labels, classes[: len(classes) // 2])

    def source(self, root: Path, labeled: bool = True) -> ImageSource:
        """Return the pictures as an index or an evaluation takes them."""
        names = [str(path.relative_to(root)) for path in self.paths]
        labels = self.labels.tolist() if labeled else [None] * len(names)
        return ImageSource(
            [Item(n, n, label) for n, label in zip(names, labels, strict=True)], root
        )


class Features(NamedTuple):
    """Frozen activations `[N K 7 7]` and pooled vectors `[N K]` of pictures."""

    activations: np.ndarray
    pooled: np.ndarray

    def some(self, chosen: np.ndarray) -> "Features":
        """Return those of some pictures."""
        return Features(self.activations[chosen], self.pooled[chosen])


def read_pictures(folder: Path) -> Pictures:
    """Read the pictures of a folder, each once; refuse a download that was not converted."""
    if not (folder / "annotations.csv").is_file():
        official = (folder / "bounding_boxes.txt").is_file()
        what = "is CUB-200-2011 as it is downloaded" if official else "has no annotations.csv"
        raise InputError(
            f"{folder} {what}; convert the download first: python examples/prepare_data.py "
            f"{'birds' if official else 'birds|objects'} {folder} DATA/NAME"
        )
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        labels = {row["path"]: row["label"] for row in csv.DictReader(file)}
    return Pictures([folder / path for path in labels], np.array(list(labels.values())))


def squashed(path: Path, side: int = SIZE) -> Image.Image:
    """Read a picture at side x side, nothing cut off."""
    return read_image(path).resize((side, side), Image.Resampling.BILINEAR)


def frozen_network(weights: str | Path, head: Path | None = None) -> EmbeddingNetwork:
    """Load MobileNetV2 as it is everywhere here: squashed pictures, its last activations."""
    return load_network(
        "torchvision:mobilenet_v2", weights=weights, head=head, size=SIZE, resize="squash",
        channels_last=True,
    )  # fmt: skip


def forward(
    network: EmbeddingNetwork,
    pictures: Iterable[Image.Image],
    total: int,
    size: tuple[int, int],
    what: str,
) -> Features:
    """Return frozen activations, in small batches, half precision in memory."""
    prepare, made = replace(network.preprocess, size=size), []
    waiting = iter(tqdm(pictures, what, total))
    while batch := [prepare(picture) for picture in islice(waiting, BATCH)]:
        activations = network.forward(np.stack(batch)).activations
        made.append((activations.half().numpy(), activations.mean((-2, -1)).numpy()))
    return Features(*map(np.concatenate, zip(*made, strict=True)))


class Cache:
    """A folder of .npz files, named by what they were made of; without a folder nothing is kept."""

    def __init__(
        self, folder: Path | None, network: EmbeddingNetwork, files: Iterable[Path]
    ) -> None:
        self.folder, self.network = folder, network
        made_of = hashlib.sha256(network.identity().parameters_sha256.encode())
        for file in files if folder else ():
            made_of.update(hashlib.sha256(file.read_bytes()).digest())
        self.key = made_of.hexdigest()[:16]

    def features(
        self, name: str, picture: Callable[[int], Image.Image], total: int, size: tuple[int, int]
    ) -> Features:
        """Return features of pictures 0 .. total - 1, computed where none are kept."""
        label = f"{name}-{total}x{size[0]}x{size[1]}"

        def make() -> dict[str, np.ndarray]:
            return forward(self.network, map(picture, range(total)), total, size, label)._asdict()

        return Features(**self.kept(label, make))

    def kept(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return arrays kept under a name, or make and keep them."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}-{self.key}.npz"
        try:
            with path.open("rb") as file, np.load(file) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            arrays = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial.npz")
        np.savez(unfinished, **arrays)
        unfinished.replace(path)
        return arrays


def frozen_features(
    folder: Path, network: EmbeddingNetwork, cache: Path | None, side: int = SIZE
) -> tuple[Pictures, Features, Cache]:
    """Put all pictures of a data folder through the frozen network."""
    pictures = read_pictures(folder)
    kept = Cache(cache, network, [folder / "annotations.csv", *pictures.paths])
    features = kept.features(
        f"{folder.name}-pictures", lambda number: squashed(pictures.paths[number], side),
        len(pictures.paths), (side, side),
    )  # fmt: skip
    return pictures, features, kept


def reference_head(folder: Path, weights: str | Path, cache: Path | None) -> np.ndarray:
    """Return the reference embedding's matrix `[128 K]`, trained on the first half of classes."""
    pictures, features, kept = frozen_features(folder, frozen_network(weights), cache)
    seen = pictures.seen()

    def make() -> dict[str, np.ndarray]:
        return {"head": train_head(features.pooled[seen], pictures.labels[seen])}

    return kept.kept(f"{folder.name}-head", make)["head"]


def reference_network(weights: str | Path, matrix: np.ndarray, scratch: Path) -> EmbeddingNetwork:
    """Load the frozen network with the head of a matrix, written to a folder."""
    head = scratch / "head.safetensors"
    save_file({"weight": matrix}, head)
    return frozen_network(weights, head)


def train_head(pooled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Train Linear(K, 128): from principal directions, 100 Adam steps of 128 triplets."""
    torch.manual_seed(0)
    directions = np.linalg.svd(pooled - pooled.mean(0), full_matrices=False)[2][:128]
    head = nn.Linear(pooled.shape[1], len(directions), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(directions))
    loss = nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: ((a - b) ** 2).sum(-1), margin=0.2
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4)
    generator, inputs = np.random.default_rng(0), torch.from_numpy(pooled)
    for _ in range(100):
        anchors = generator.integers(len(labels), size=128)
        rows = [anchors]
        for same in (True, False):
            alike = (labels[anchors, None] == labels) == same
            alike[np.arange(128), anchors] = False
            rows.append([generator.choice(np.flatnonzero(one)) for one in alike])
        a, p, n = (nn.functional.normalize(head(inputs[one])) for one in rows)
        optimizer.zero_grad()
        loss(a, p, n).backward()
        optimizer.step()
    return head.weight.detach().numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows `[n D]` at length 1, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def halves(labels: np.ndarray, seed: int, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return places of half of each label's pictures, `most` at most, and of the other half."""
    generator = np.random.default_rng(seed)
    indexed, asked = [], []
    for label in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == label))
        middle = (len(order) + 1) // 2
        indexed.append(order[:middle][:most])
        asked.append(order[middle:])
    return np.sort(np.concatenate(indexed)), np.sort(np.concatenate(asked))


def mean_and_worst(runs: Sequence[Sequence[float]], largest: Sequence[int]) -> list[str]:
    """Return each column's mean over seeds and its worst: the smallest, of some the largest."""
    return [
        "" if np.isnan(column).any()
        else f"{column.mean():.3f} ({(max if at in largest else min)(column):.3f})"
        for at, column in enumerate(np.array(runs).T)
    ]  # fmt: skip


def binned_error(values: np.ndarray, truth: np.ndarray) -> float:
    """Return mean |value - truth| over ten bins of equal count."""
    bins = np.array_split(np.argsort(values, kind="stable"), 10)
    return float(np.mean([abs(values[one].mean() - truth[one].mean()) for one in bins]))


def figure(values: np.ndarray) -> str:
    """Format a mean and its 95% bootstrap interval over images or scenes."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def name_of(folder: Path) -> str:
    """Return what a data folder is called: of `natural/single` natural."""
    return folder.parent.name if folder.name == "single" else folder.name


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an experiment on data folders."""
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--cache", type=Path, help="folder where frozen features are kept")
