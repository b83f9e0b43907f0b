"""Weights by position against weights by channel, behind heads that do not pool.

Small networks are trained by a triplet loss on aligned handwritten digits (scikit-learn's, of 60% of the
handwriting): each picture of 32 x 32 pixels has one digit of 16 x 16 in its left or its right half, within
a pixel of its place. The head is *depthwise*, a convolution over the whole grid of each channel and a
matrix, as face networks have it; *flattening*, one matrix of all positions; or, for comparison, *average
pooling*. Indexes of each hold another 20% of the handwriting once in each half, at its place, by the default
target; they differ in the method alone. Queries are of the last 20%: two different digits side by side. Each
digit is asked for with the weights of the nearest result of its class, and measured is the pixel AUC of the
signed map: the digit's ink against the other digit's ink (0.5 knows nothing). *moved*: the whole query by
two pixels, along, across or both. Means over scenes and seeds with 95% bootstrap intervals over scenes, and
the lowest mean of a seed.

*Nothing aligned*: real pictures with objects of several classes, evaluated as in the experiment `truth`, at
a layer of MobileNetV2 with convolutions and average pooling behind it.
"""  # noqa: E501

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from embedcam import (
    EmbeddingNetwork,
    Explainer,
    Index,
    Recipe,
    build_index,
    cam_for,
    from_dataset,
    load_network,
)
from embedcam.demo.digits_network import digits_preprocess, triplet_loss
from embedcam.images import ImageSource
from embedcam.metrics import bootstrap_interval, pixel_auc
from embedcam.ops import resize, signed_cam
from embedcam.render import overlay
from embedcam.targets import Similarity

from ..benchmarks.timing import table
from .truth import OBJECTS, evaluated, sources

SIDE, DIGIT, CHANNELS, WIDTH = 32, 16, 96, 32
HEADS = ("depthwise", "flattening", "average pooling")
METHODS = {
    "gradcam": "Grad-CAM: a weight a channel",
    "xgradcam": "XGrad-CAM: a weight a channel",
    "hirescam": "HiResCAM: a weight a channel and position",
}
MEAN, DIRECT = "mean activation", "HiResCAM computed on the query, for its cosine to the result"
MOVES = ((0, 2), (2, 0), (0, -2), (-2, 0), (2, 2), (-2, -2), (2, -2), (-2, 2))
LAYER = "features.16"
INK = 0.3
"""Share of full ink from which a pixel belongs to a digit."""


class DigitsInTwo(nn.Module):
    """`[B 3 32 32]` -> embedding `[B D]`, not normalised; the trunk's grid is 8 x 8."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(_block(3, 24, 2), _block(24, 48, 2), _block(48, CHANNELS, 1))
        cells = SIDE // 4
        if head == "depthwise":
            whole = nn.Conv2d(CHANNELS, CHANNELS, cells, groups=CHANNELS, bias=False)
            linear = nn.Linear(CHANNELS, WIDTH, bias=False)
            self.head = nn.Sequential(whole, nn.BatchNorm2d(CHANNELS), nn.Flatten(), linear)
        else:
            cells = 1 if head == "average pooling" else cells
            linear = nn.Linear(CHANNELS * cells * cells, WIDTH)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(cells), nn.Flatten(), linear)

    def forward(self, images: Tensor) -> Tensor:
        """Embedding `[B D]` of normalised images `[B 3 32 32]`."""
        embedding: Tensor = self.head(self.trunk(images))
        return embedding


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Handwriting(NamedTuple):
    """Digits `[n 16 16]` in [0, 1] and what they are, `[n]`."""

    ink: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> np.ndarray:
        """Places of one digit's."""
        return np.flatnonzero(self.labels == label)


def split(seed: int) -> list[Handwriting]:
    """The handwriting that is learned, that is indexed, and that is asked about."""
    pixels, labels = load_digits(return_X_y=True)
    ink = resize(pixels.reshape(-1, 8, 8).astype(np.float32) / 16, (DIGIT, DIGIT))
    order = np.random.default_rng([seed, 0]).permutation(len(ink))
    parts = np.split(order, (int(0.6 * len(ink)), int(0.8 * len(ink))))
    return [Handwriting(ink[part], labels[part]) for part in parts]


def placed(ink: np.ndarray, half: int, move: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A picture `[32 32]` with a digit in its left (0) or right (1) half, moved (down, right)."""
    wide = np.zeros((SIDE + 8, SIDE + 8), np.float32)
    top, left = 4 + SIDE // 4 + move[0], 4 + DIGIT * half + move[1]
    wide[top : top + DIGIT, left : left + DIGIT] = ink
    return wide[4:-4, 4:-4]


def picture_of(ink: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * ink + 0.5).astype(np.uint8)).convert("RGB")


def train(head: str, writing: Handwriting, seed: int, steps: int) -> DigitsInTwo:
    """By triplets within batches of eight pictures of each digit."""
    generator, per_class = np.random.default_rng([seed, 1]), 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsInTwo(head).train()
    preprocess = digits_preprocess(SIDE)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    labels = torch.arange(10).repeat_interleave(per_class)
    for _ in range(steps):
        batch = []
        for label in labels:
            ink = writing.ink[generator.choice(writing.of(int(label)))]
            half, down, right = (int(generator.integers(*one)) for one in ((2,), (-1, 2), (-1, 2)))
            batch.append(preprocess(picture_of(placed(ink, half, (down, right)))))
        found = network(torch.from_numpy(np.stack(batch)))
        loss = triplet_loss(F.normalize(found, dim=1), labels, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


class Scene(NamedTuple):
    """Two digits side by side: the picture's ink, each digit's own `[32 32]`, and what they are."""

    ink: np.ndarray
    own: tuple[np.ndarray, np.ndarray]
    labels: tuple[int, int]


def scenes(writing: Handwriting, seed: int, count: int, moved: bool) -> list[Scene]:
    generator = np.random.default_rng([seed, 2])
    made: list[Scene] = []
    while len(made) < count:
        pair = generator.choice(len(writing.ink), 2)
        first, second = (int(writing.labels[one]) for one in pair)
        if first == second:
            continue
        move = MOVES[len(made) % len(MOVES)] if moved else (0, 0)
        own = [placed(writing.ink[one], half, move) for half, one in enumerate(pair)]
        made.append(Scene(np.maximum(*own), (own[0] > INK, own[1] > INK), (first, second)))
    return made


@contextmanager
def indexes(network: EmbeddingNetwork, source: ImageSource) -> Iterator[dict[str, Explainer]]:
    """An explainer for each method that this network's weights can be stored by."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for method in METHODS:
            if method == "hirescam" and network.head_kind.pooled:
                continue
            path = Path(folder) / method
            build_index(source, network, path, Recipe(method=method), progress=False)
            made[method] = Explainer(path, network)
        yield made


def in_both_halves(writing: Handwriting) -> ImageSource:
    """A picture of each digit in the left half, and one in the right half."""
    return from_dataset(
        [
            (picture_of(placed(ink, half)), str(label))
            for ink, label in zip(writing.ink, writing.labels, strict=True)
            for half in (0, 1)
        ]
    )


def signed_maps(
    network: EmbeddingNetwork,
    explainers: dict[str, Explainer],
    inputs: np.ndarray,
    asked: list[str],
) -> dict[str, np.ndarray]:
    """Signed maps of each way, `[n H W]`."""
    index, size = next(iter(explainers.values())).index, inputs.shape[-2:]
    vectors = np.asarray(index.embeddings(index.live_positions()))
    labels, maps = np.array(list(index.labels)), {way: [] for way in (*explainers, MEAN, DIRECT)}
    for one, label in zip(inputs, asked, strict=True):
        features = network.forward(one[None])
        near = vectors @ features.embedding[0].numpy()
        result = int(np.where(labels == label, near, -np.inf).argmax())
        for way, explainer in explainers.items():
            maps[way].append(explainer.explain(one, result=index.ids[result]).signed_cam)
        seen = features.activations[0].numpy()
        maps[MEAN].append(resize(seen.sum(0), size))
        own = cam_for(network, one, Similarity(vectors[result]), "hirescam", progress=False)
        assert own.weights is not None
        maps[DIRECT].append(resize(signed_cam(own.weights, seen), size))
    return {way: np.stack(found) for way, found in maps.items()}


def told(maps: np.ndarray, asked: list[Scene]) -> np.ndarray:
    """AUC of the ink asked for against the other's, a mean over both questions a scene, `[n]`."""
    inside = np.stack([one.own[half] & ~one.own[1 - half] for half in (0, 1) for one in asked])
    other = np.stack([one.own[1 - half] & ~one.own[half] for half in (0, 1) for one in asked])
    return pixel_auc(maps, inside, other).reshape(2, -1).mean(0)


def draw(path: Path, asked: list[Scene], maps: dict[str, np.ndarray]) -> None:
    """Draw the first scenes: the picture, and by each way the left digit's map and the right's."""
    from matplotlib.figure import Figure

    shown = [(way, half) for way in maps if way in METHODS for half in (0, 1)]
    figure = Figure((1.3 * (1 + len(shown)), 8), layout="constrained")
    for axes, row in zip(figure.subplots(6, 1 + len(shown)), range(6), strict=True):
        picture = picture_of(asked[row].ink)
        axes[0].imshow(picture)
        for axis, (way, half) in zip(axes[1:], shown, strict=True):
            axis.imshow(overlay(picture, np.maximum(maps[way][half * len(asked) + row], 0), None))
            axis.set_title(f"{way}: {('left', 'right')[half]} digit", fontsize=7)
        for axis in axes:
            axis.set_axis_off()
    figure.savefig(path)


def told_of(
    network: EmbeddingNetwork, explainers: dict[str, Explainer], asked: list[Scene]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Signed maps of both digits of each scene `[2n H W]`, and their figures `[n]`, of each way."""
    inputs = np.stack([network.preprocess(picture_of(one.ink)) for one in asked])
    questions = [str(one.labels[half]) for half in (0, 1) for one in asked]
    maps = signed_maps(network, explainers, np.concatenate([inputs, inputs]), questions)
    return maps, {way: told(found, asked) for way, found in maps.items()}


def measured(options: argparse.Namespace) -> Iterator[str]:
    for head in HEADS:
        cells: dict[tuple[str, bool], list[np.ndarray]] = defaultdict(list)
        recalls, n_bytes = [], {}
        for seed in range(options.seeds):
            learned, kept, asking = split(seed)
            trained = train(head, learned, seed, options.steps)
            network = EmbeddingNetwork(trained, "trunk", preprocess=digits_preprocess(SIDE))
            with indexes(network, in_both_halves(kept)) as explainers:
                for moved in (False, True):
                    asked = scenes(asking, seed, options.scenes, moved)
                    maps, figures = told_of(network, explainers, asked)
                    for way, found in figures.items():
                        cells[way, moved].append(found)
                    if options.figure and (head, seed, moved) == (HEADS[0], 0, False):
                        draw(options.figure, asked, maps)
                recalls.append(recall(network, explainers["gradcam"].index, asking))
                for way, explainer in explainers.items():
                    n_bytes[way] = explainer.index.encoding().bytes_per_image()
                    explainer.close()
        rows = [
            [METHODS.get(way, way), n_bytes.get(way, ""), figure(cells[way, False]),
             figure(cells[way, True])]
            for way in figures
        ]  # fmt: skip
        yield (
            f"\n## {head.capitalize()}\n\nRecall@1 of single digits {np.mean(recalls):.3f}.\n\n"
            + table(("weights", "bytes an image", "in place", "moved"), rows)
        )


def unaligned(folder: Path, weights: str) -> str:
    """Evaluate recipes on real pictures, with convolutions and pooling behind the layer."""
    network = load_network(
        "torchvision:mobilenet_v2", weights=weights, size=224, resize="squash", layer=LAYER
    )
    indexed, asked, boxes = sources(folder)
    recipes = {name: Recipe(method=name) for name in METHODS if name != "gradcam"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "index"
        build_index(indexed, network, path, Recipe(), trust=False, progress=False)
        choices = {**OBJECTS, "recipes": recipes, "methods": ["hirescam"], "scenes": 0}
        return evaluated("Nothing aligned", path, asked, network, boxes, choices)


def figure(by_seed: list[np.ndarray]) -> str:
    """Mean, interval over scenes, and the lowest mean of a seed."""
    values = np.concatenate(by_seed)
    low, high = bootstrap_interval(values)
    least = min(one.mean() for one in by_seed)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}], {least:.3f}"


def recall(network: EmbeddingNetwork, index: Index, writing: Handwriting) -> float:
    """How often the nearest indexed picture shows the digit of a single one, in its place."""
    singles = (placed(ink, row % 2) for row, ink in enumerate(writing.ink))
    inputs = [network.preprocess(picture_of(one)) for one in singles]
    near = index.search(network.forward(np.stack(inputs)).embedding.numpy(), 1)
    found = index.labels[near.positions[:, 0]]
    return float(np.mean([int(label) for label in found] == writing.labels))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--scenes", type=int, default=200, help="queries of each seed")
    parser.add_argument("--natural", type=Path, help="folder of real pictures that are not aligned")
    parser.add_argument("--weights", help="of MobileNetV2, with --natural")
    parser.add_argument("--figure", type=Path, help="picture to write")


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield a table a head, and that of real pictures."""
    torch.set_num_threads(1)
    yield from measured(options)
    if options.natural:
        yield unaligned(options.natural, options.weights)
