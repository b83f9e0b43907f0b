"""Which pixels answer, in vision transformers: scenes of digits, every method, and words.

The networks of the experiment `small_vit`, trained where their weights are missing, and scenes of
handwriting, backgrounds and seeds that training never saw: an index of scenes with one digit, asked
about scenes with one digit, and about scenes with two, once for each by the nearest result that
shows it. Figures are of the signed map, so that no change of contrast moves them, but *right*:

- *one digit*: pixel AUC of the digit's box against the rest; the share of the hottest fifth of all
  pixels that lies in it;
- *two digits*: AUC of the box of the digit asked for against the other's, and against the rest;
  *right*: how often the larger share of the map's energy in both is in the right one.

*Transferred* maps are drawn with what the index stores with the result, by each recipe and each
method an index can hold; *direct* ones by a method on the query itself, of its similarity to the
same result, on the first 40 scenes of a seed (`--direct`). *Words*: an index of scenes with two
digits, explained by a caption of either. Means and 95% bootstrap intervals over scenes, a scene's
two questions together; of several seeds of scenes and training the scenes of all. *Receipts* are
of scenes with one digit and their nearest results: shares of the similarity. The remainder is
biases, most of which all pictures share; what has no position is mostly what the class token knew
before the last attention.
"""

import argparse
import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from embedcam import (
    METHODS,
    EmbeddingNetwork,
    Explainer,
    PairExplainer,
    Recipe,
    build_index,
    cam_for,
)
from embedcam.demo.scenes import SceneMaker, Split
from embedcam.errors import NetworkError
from embedcam.images import from_dataset
from embedcam.methods import MethodWarning
from embedcam.metrics import box_mask, hottest_precision, pixel_auc
from embedcam.ops import resize, signed_cam
from embedcam.recipe.registry import LayersMethod
from embedcam.targets import Similarity

from ..benchmarks.timing import table
from .data import figure
from .small_vit import FIRST, PROMPTS, SIDE, Sizes, caption, small_vit, trained, two_towers

log = logging.getLogger(__name__)
COLUMNS = (
    "one digit: AUC", "hottest fifth", "two digits: AUC, one / other", "one / rest", "right",
)  # fmt: skip
RECEIPTS = (
    "remainder", "remainder, nothing put apart", "positions", "what has no position",
)  # fmt: skip
SIZE, BLOCK = (SIDE, SIDE), 50
READINGS = {"": "", "@gradeclip": "Grad-ECLIP, ", "@value": "values (MaskCLIP), "}
"""How the last attention is read, and what maps by it are called; nothing: the norm before it."""
RECIPES = {
    "the default": Recipe(),
    "the paper, 32 channels": Recipe.paper(m=32),
    "centred, around": Recipe(target="centred", norm="around"),
    "margin, 50 triplets": Recipe(target="margin", sampling="random", triplets=50),
    "margin, all, around": Recipe(target="margin", sampling="all", norm="around"),
}
MEAN = "mean activation"
LEFT_OUT = {"rise", "lime", "sbsm", "guidedbackprop", "guidedgradcam"}
"""Thousands of passes a picture; or made for ReLUs, which only the first convolutions have."""
SLOW = {
    "scorecam", "ablationcam", "groupcam", "clustercam", "cosinecam", "integratedgradcam",
    "smoothgradcam++",
}  # fmt: skip
"""Many passes a picture: directly on queries only."""
Cells = dict[str, list[np.ndarray]]
"""Columns of figures, a number a scene, by seed."""


class Asked(NamedTuple):
    """Questions about scenes, those about one together: which digit's pixels answer.

    inputs `[n 3 80 80]`; own, other `[n 80 80]`: the digit's box and the other digit's, empty
    without one; labels: of the digits.
    """

    inputs: np.ndarray
    own: np.ndarray
    other: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> "Asked":
        """Return the first questions."""
        return Asked(*(one[:count] for one in self))


def asked(network: EmbeddingNetwork, seed: int, split: Split, count: int) -> Asked:
    """Return a question about each digit of each scene of a split."""
    maker, rows = SceneMaker(seed, SIDE), []
    for number in range(count):
        scene = maker.scene(split, number)
        pixels = network.preprocess(Image.fromarray(scene.pixels))
        masks = [box_mask(one.box, SIZE) for one in scene.digits]
        for place, digit in enumerate(scene.digits):
            other = masks[1 - place] if len(masks) > 1 else np.zeros(SIZE)
            rows.append((pixels, masks[place], other, digit.label))
    return Asked(*(np.stack(one) for one in zip(*rows, strict=True)))


def pictures(seed: int, split: Split, count: int) -> list[tuple[Image.Image, str]]:
    """Return scenes as pictures, and the labels of their first digits."""
    maker = SceneMaker(seed, SIDE)
    scenes = [maker.scene(split, number) for number in range(count)]
    return [(Image.fromarray(one.pixels), one.digits[0].label) for one in scenes]


def seen(network: EmbeddingNetwork, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings `[n D]` and activations `[n K H W]` of many inputs."""
    made = [network.forward(inputs[at : at + BLOCK]) for at in range(0, len(inputs), BLOCK)]
    embeddings, activations = zip(*((one.embedding, one.activations) for one in made), strict=True)
    return torch.cat(embeddings).numpy(), torch.cat(activations).numpy()


# Figures


def scored(signed: np.ndarray, about: Asked) -> dict[str, np.ndarray]:
    """Return figures of signed maps `[n 80 80]`, a number a scene."""
    if not about.other.any():
        return {
            COLUMNS[0]: pixel_auc(signed, about.own),
            COLUMNS[1]: hottest_precision(signed, about.own, 0.2),
        }
    drawn = np.maximum(signed, 0)
    mine, theirs = ((drawn * one).sum((1, 2)) for one in (about.own, about.other))
    found = (
        pixel_auc(signed, about.own, about.other),
        pixel_auc(signed, about.own),
        np.heaviside(mine - theirs, 0.5),
    )
    return {name: one.reshape(-1, 2).mean(1) for name, one in zip(COLUMNS[2:], found, strict=True)}


class Table:
    """Rows of figures, those of every seed joined."""

    def __init__(self) -> None:
        self.rows: dict[str, Cells] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, signed: np.ndarray, about: Asked) -> None:
        """Add the figures of maps of one seed."""
        for column, values in scored(signed, about).items():
            self.rows[name][column].append(values)

    def __str__(self) -> str:
        lines = [
            [name, *(figure(np.concatenate(cells[one])) if cells[one] else "" for one in COLUMNS)]
            for name, cells in self.rows.items()
        ]
        return table(("map", *COLUMNS), lines)


# Maps


class Case:
    """A trained network read at a layer, its index of scenes with one digit, and the questions."""

    def __init__(self, network: EmbeddingNetwork, seed: int, sizes: argparse.Namespace) -> None:
        self.network, self.indexed = network, pictures(seed, "gallery", sizes.gallery)
        self.questions = [asked(network, seed, split, sizes.scenes) for split in ("query", "pair")]
        self.seen = [seen(network, one.inputs) for one in self.questions]
        self.kept = seen(network, np.stack([network.preprocess(one) for one, _ in self.indexed]))[0]
        classes = np.array([label for _, label in self.indexed])
        self.near = []
        for about, (embeddings, _) in zip(self.questions, self.seen, strict=True):
            alike = embeddings @ self.kept.T
            if about.other.any():  # the nearest result that shows the digit asked for
                alike = np.where(about.labels[:, None] == classes, alike, -np.inf)
            self.near.append(alike.argmax(1))
        single = self.near[0]
        self.recall = float(np.mean(classes[single] == self.questions[0].labels))

    def mean(self) -> list[np.ndarray]:
        """Return maps of the plain mean activation, of scenes with one digit and with two."""
        return [resize(activations.mean(1), SIZE) for _, activations in self.seen]

    @contextmanager
    def explainer(self, recipe: Recipe) -> Iterator[Explainer]:
        """Build an index by a recipe, and open it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            build_index(
                from_dataset(self.indexed), self.network, path, recipe, own_maps=False, trust=False,
                progress=False,
            )  # fmt: skip
            with Explainer(path, self.network) as explainer:
                yield explainer

    def transferred(self, recipe: Recipe) -> list[np.ndarray]:
        """Return signed maps by what an index stores with the results."""
        with self.explainer(recipe) as explainer:
            return [
                np.stack([one.signed_cam for one in explainer.explain_features(
                    *features, size=SIZE,
                    neighbors=[[explainer.index.ids[int(one)]] for one in near],
                )])
                for features, near in zip(self.seen, self.near, strict=True)
            ]  # fmt: skip

    def receipts(self, count: int) -> np.ndarray:
        """Return what receipts' amounts are of similarities, `[n 4]`, as `RECEIPTS` says."""
        rows = []
        with self.explainer(Recipe()) as explainer:
            pairs = PairExplainer(explainer)
            for image, near in zip(self.questions[0].inputs[:count], self.near[0], strict=False):
                result = self.indexed[int(near)][0]
                centred = pairs.receipt(image, result)
                plain = pairs.receipt(image, result, centred=False)
                left = abs(centred.remainder), abs(plain.remainder)
                amounts = *left, plain.beyond, sum(plain.parts.values())
                rows.append(np.array(amounts) / plain.similarity)
        return np.stack(rows)

    def direct(self, method: str, count: int) -> list[np.ndarray]:
        """Return maps of the first `count` scenes by a method, of the similarity to the results."""
        made = []
        for place, (about, near) in enumerate(zip(self.questions, self.near, strict=True)):
            some = count * (place + 1)
            found = cam_for(
                self.network, about.inputs[:some], Similarity(self.kept[near[:some]]), method,
                progress=False,
            )  # fmt: skip
            maps = found.grid_cam
            if found.weights is not None and not found.method.own_map:
                maps = signed_cam(found.weights, self.seen[place][1][:some])
            made.append(resize(maps, SIZE))
        return made


def arms(case: Case, reading: str, count: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield maps of every kind, by their names; what a method refuses is left out."""
    usable = {
        name: one
        for name, one in METHODS.items()
        if not (one.trained or one.reading or name in LEFT_OUT or isinstance(one, LayersMethod))
    }
    stored = dict(RECIPES)
    if not reading:
        yield MEAN, case.mean()
        stored |= {
            one.title: Recipe(method=name)
            for name, one in usable.items()
            if one.storable and name not in SLOW
        }
        stored.pop(METHODS["gradcam"].title)  # the default
    made = [
        (f"{READINGS[reading]}{name}, transferred", partial(case.transferred, recipe))
        for name, recipe in stored.items()
    ]
    for name in ["gradcam"] if reading else usable:
        title = READINGS[reading].removesuffix(", ") or METHODS[name].title
        made.append((f"{title}, direct", partial(case.direct, name, count)))
    for name, make in made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MethodWarning)  # a method that ignores the target
            try:
                yield name, make()
            except NetworkError as error:
                log.info("%s is left out: %s", name, error)


def words(network: EmbeddingNetwork, about: Asked, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield maps of captions of either digit on scenes with two, alone and above the other's."""
    indexed = pictures(seed, "pair", len(about.labels) // 2)
    told = [caption("a {a}", [int(label)]) for label in about.labels]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        build_index(
            from_dataset(indexed), network, path, prompts=PROMPTS, own_maps=False, trust=False,
            progress=False,
        )  # fmt: skip
        with Explainer(path, network) as explainer:
            for name, compared in (("words", False), ("words above the other digit's", True)):
                answers = [
                    explainer.explain_text(
                        text,
                        image=indexed[place // 2][0],
                        above=told[place ^ 1] if compared else None,
                    )
                    for place, text in enumerate(told)
                ]
                maps = np.stack([answer.results[0].signed_cam for answer in answers])
                yield name, resize(maps, SIZE)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="the networks' weights, as `small_vit` writes them"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--gallery", type=int, default=400, help="scenes that are indexed")
    parser.add_argument("--scenes", type=int, default=200, help="with one digit and with two")
    parser.add_argument("--direct", type=int, default=40, help="of these by each method directly")


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of the small ViT, of words, and of receipts of both networks."""
    torch.set_num_threads(1)
    found, told, recalls = Table(), Table(), []
    shares: dict[str, list[np.ndarray]] = defaultdict(list)
    for seed in range(FIRST, FIRST + options.seeds):
        vit, towers = trained(options.folder, seed, Sizes())
        for reading in READINGS:
            case = Case(small_vit(vit, reading), seed, options)
            for name, maps in arms(case, reading, options.direct):
                log.info("seed %d: %s", seed, name)
                for one, about in zip(maps, case.questions, strict=True):
                    found.add(name, one, about.first(len(one)))
            network = two_towers(towers, reading)
            about = asked(network, seed, "pair", options.scenes)
            if not reading:
                told.add(MEAN, resize(seen(network, about.inputs)[1].mean(1), SIZE), about)
            for name, maps in words(network, about, seed):
                told.add(f"{READINGS[reading] or 'Grad-CAM, '}{name}", maps, about)
            if not reading:
                recalls.append(f"{case.recall:.3f}")
                shares["small ViT"].append(case.receipts(options.direct))
                pair = Case(network, seed, options)
                shares["two towers"].append(pair.receipts(options.direct))
    yield f"## Small ViT\n\nRecall@1 of scenes with one digit: {', '.join(recalls)}.\n\n{found}"
    yield f"## Words\n\n{told}"
    yield f"## Receipts\n\n{receipts_table(shares)}"


def receipts_table(shares: dict[str, list[np.ndarray]]) -> str:
    """Return a table of receipts' amounts, medians over queries."""
    lines = []
    for name, seeds in shares.items():
        medians = np.median(np.concatenate(seeds), axis=0)
        lines.append([name, *(f"{share:.1%}" for share in medians)])
    return table(("network", *RECEIPTS), lines)
