"""A number predicted from pictures, from plain features and from those averaged under the maps.

The shape of the paper's application, house prices (Chen et al., WACV 2020), on scenes of the
demonstration whose number is known: a handwritten digit among 9 to 13 doodles, and as its price the
digit's *value* (0 to 9) or its *height* (in hundredths of the scene's side); or two digits among
doodles, and their *sum*. Of each seed 600 scenes in five folds: an index with the numbers of four
folds as its labels (`Recipe(labels="numbers")`), maps of all scenes by the five nearest of these, a
scene itself left out, `Explanation.features` of each, and ridge regression (`RidgeCV`, the features
by one scale for all channels) from those of the four folds to the fifth.

NETWORKS keeps the demonstration's network of each seed, trained for classes on other handwriting,
which is what a missing one is trained as; a file of weights is frozen MobileNetV2. The maps know
the numbers of the nearest scenes; what these alone predict, their mean, has a row of its own. Error
is the mean absolute one; intervals are 95%, of Student's t over the seeds; *less* is the paired
difference to plain.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsRegressor

from embedcam import EmbeddingNetwork, Explainer, Recipe, build_from_features, load_network
from embedcam.demo.digits_network import LAYER, digits_preprocess, load_weights, save_weights, train
from embedcam.demo.scenes import Scene, SceneMaker, Split
from embedcam.demo.settings import DemoSettings
from embedcam.offline.features import AffineHead
from embedcam.ops import area_average, attended

from ..benchmarks.timing import table

NEAREST = "no features: the mean of the five nearest"
N, FOLDS, NEIGHBORS, SIDE = 600, 5, 5, 192
RECIPES = {
    "numbers": Recipe(labels="numbers"),
    "numbers, margin": Recipe(labels="numbers", target="margin"),
    "centred": Recipe(target="centred", norm="around"),
}


class Scenes(NamedTuple):
    """Scenes of one seed with their features, and the boxes of their digits on the grid."""

    embeddings: np.ndarray
    activations: np.ndarray
    boxes: np.ndarray
    prices: dict[str, np.ndarray]


def height(scene: Scene) -> float:
    """The only digit's height, in a hundredth of the scene's side."""
    _, top, _, bottom = scene.digits[0].box
    return 100 * (bottom - top) / SIDE


def total(scene: Scene) -> float:
    return float(sum(int(digit.label) for digit in scene.digits))


Price = Callable[[Scene], float]
SETS: list[tuple[list[Split], dict[str, Price]]] = [
    (["gallery", "query"], {"value": total, "height": height}),
    (["pair"], {"sum": total}),
]
"""Splits of the demonstration's scenes, and the prices of each."""


def network_of(place: Path, seed: int) -> EmbeddingNetwork:
    """Frozen MobileNetV2 from a file; from a folder the demonstration's network of a seed."""
    if place.is_file():
        return load_network("torchvision:mobilenet_v2", weights=place, resize="squash")
    place.mkdir(exist_ok=True)
    settings, path = DemoSettings(seed=seed), place / f"digits-{seed}.safetensors"
    if not path.exists():
        save_weights(train(settings, progress=False), path)
    prepared = digits_preprocess(settings.input_size)
    return EmbeddingNetwork(load_weights(path), LAYER, preprocess=prepared)


def drawn(
    network: EmbeddingNetwork, seed: int, splits: list[Split], prices: dict[str, Price]
) -> Scenes:
    """600 scenes of a seed, of handwriting that the network was not trained on."""
    maker, inside = SceneMaker(seed, SIDE), np.zeros((N, SIDE, SIDE), np.float32)
    scenes = [maker.scene(splits[i % len(splits)], i // len(splits)) for i in range(N)]
    for one, scene in zip(inside, scenes, strict=True):
        for x0, y0, x1, y1 in (digit.box for digit in scene.digits):
            one[y0:y1, x0:x1] = 1
    assert network.preprocess is not None
    pictures = [network.preprocess(Image.fromarray(scene.pixels)) for scene in scenes]
    found = [network.forward(np.stack(pictures[i : i + 50])) for i in range(0, N, 50)]
    activations = np.concatenate([one.activations.numpy() for one in found])
    _, _, rows, columns = activations.shape
    return Scenes(
        np.concatenate([one.embedding.numpy() for one in found]),
        activations,
        area_average(inside, (rows, columns)),
        {name: np.array([price(scene) for scene in scenes]) for name, price in prices.items()},
    )


def attended_by(
    recipe: Recipe, scenes: Scenes, prices: np.ndarray, known: np.ndarray, head: AffineHead | None
) -> np.ndarray:
    """`Explanation.features` of all scenes, `[n K]`, by an index of the known ones."""
    with tempfile.TemporaryDirectory() as folder:
        build_from_features(
            scenes.embeddings[known],
            scenes.activations[known].mean((2, 3)),
            Path(folder) / "index",
            recipe,
            grid=scenes.activations.shape[2:],
            head=head,
            ids=[str(place) for place in np.flatnonzero(known)],
            labels=[repr(price) for price in prices[known].tolist()],
            progress=False,
        )
        with Explainer(Path(folder) / "index") as explainer:
            near = explainer.index.search(scenes.embeddings, NEIGHBORS + 1).positions
            ids = [[explainer.index.ids[int(place)] for place in row] for row in near]
            others = [
                [name for name in row if name != str(place)][:NEIGHBORS]
                for place, row in enumerate(ids)
            ]
            found = explainer.explain_features(
                scenes.embeddings, scenes.activations, neighbors=others
            )
    return np.stack([one.features for one in found])


def errors(
    scenes: Scenes, prices: np.ndarray, head: AffineHead | None, seed: int
) -> dict[str, tuple[float, float]]:
    """Mean absolute error over all scenes and R^2, by the way features are made."""
    plain = scenes.activations.mean((2, 3))
    salient = np.stack([attended(one, np.maximum(one.mean(0), 0)) for one in scenes.activations])
    boxed = [attended(*pair) for pair in zip(scenes.activations, scenes.boxes, strict=True)]
    fixed = {
        "plain mean": plain,
        "under the mean activation": salient,
        "plain and under the mean activation": np.concatenate([plain, salient], axis=1),
        "in the true boxes": np.stack(boxed),
    }
    fold = np.random.default_rng(seed).permutation(N) % FOLDS
    guesses: dict[str, np.ndarray] = defaultdict(lambda: np.empty(N))
    for part in range(FOLDS):
        known = fold != part
        made = {
            f"under the map, {name}": attended_by(recipe, scenes, prices, known, head)
            for name, recipe in RECIPES.items()
        }
        both = np.concatenate([plain, made["under the map, numbers"]], axis=1)
        for name, features in {**fixed, **made, "plain and under the map": both}.items():
            # One scale: a channel that is nearly constant would be blown up to the others.
            scaled = features / features[known].std(axis=0).max()
            model = RidgeCV(np.logspace(-4, 4, 17)).fit(scaled[known], prices[known])
            guesses[name][~known] = model.predict(scaled[~known])
        near = KNeighborsRegressor(NEIGHBORS).fit(scenes.embeddings[known], prices[known])
        guesses[NEAREST][~known] = near.predict(scenes.embeddings[~known])
    return {
        name: (float(np.abs(guess - prices).mean()), float(r2_score(prices, guess)))
        for name, guess in guesses.items()
    }


def figure(values: np.ndarray) -> str:
    """Mean and half the width of its 95% interval, over seeds."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.3f} ± {half:.3f}"


def lines_of(price: str, rows: dict[str, list[tuple[float, float]]]) -> str:
    """Return the table of a price: a line for each kind of features."""
    plain, lines = np.array(rows["plain mean"])[:, 0], []
    for name, both in rows.items():
        error, share = np.array(both).T
        less = "" if name == "plain mean" else figure(plain - error)
        lines.append([name, figure(error), less, figure(share)])
    return table(("features", f"error of the {price}", "less", "R²"), lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", type=Path, help="folder, or MobileNetV2's weights")
    parser.add_argument("--seeds", type=int, default=5)


def measure(options: argparse.Namespace) -> Iterator[str]:
    torch.set_num_threads(1)
    kept: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for seed in range(options.seeds):
        network = network_of(options.networks, seed)
        kind = network.head_kind
        head = None if kind.identity or kind.matrix is None else AffineHead(kind.matrix)
        for splits, priced in SETS:
            scenes = drawn(network, seed, splits, priced)
            for price, numbers in scenes.prices.items():
                for name, both in errors(scenes, numbers, head, seed).items():
                    kept.setdefault(price, {}).setdefault(name, []).append(both)
    frozen = options.networks.is_file()
    name = "MobileNetV2, frozen" if frozen else "The demonstration's network"
    yield f"## {name}\n"
    yield from (lines_of(price, rows) for price, rows in kept.items())
