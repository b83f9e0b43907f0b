"""Do the maps of every method point at the right object? Direct and transferred, unseen classes.

    python scripts/truth_methods.py DATA/birds20 DATA/objects24 \\
        --weights mobilenet_v2_imagenet.safetensors --output docs/results/truth-methods.md

The protocol, the reference embedding and the scenes are those of scripts/truth.py. Methods that
mask pixels take up to thousands of passes a picture, so each row is of a seeded sample, whose
size it names: `--pictures` of the fast methods, `--slow-pictures` of the others.

- *energy, own*: one object; share of the method's own map inside the box or mask. The target is an
  index's: the margin over every triplet of the gallery, or, for methods that average over triplets
  apart, over 50 drawn ones.
- *energy, weights*: the same of ReLU(sum w A), what an index draws.
- *share, direct*: two objects; the method run on the scene itself, its target the cosine similarity
  to the given result; share of the map's energy on the result's side, chance 0.5.
- *share, transferred*: the scene drawn with the result's own stored weights (dense).
- *weight form*: correlation of the picture's own map with the map of its weights.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import explaining
from photographs import SIZE, Pictures, forward, loaded, read_pictures, squashed, train_head
from safetensors.numpy import save_file

from embedcam import METHODS, EmbedcamError, EmbeddingNetwork, Similarity, cam_for, load_network
from embedcam.cam import cam, resize, sharpen
from embedcam.classes import label_codes
from embedcam.cotangents import AnchorCotangents
from embedcam.methods import MethodMap, MethodWarning
from embedcam.metrics import bootstrap_interval, energy_share, recall_at_k
from embedcam.recipe import Recipe
from embedcam.registry import LayersMethod, Method, WeightMethod
from embedcam.targets import Direction

SLOW = ("scorecam", "rise", "lime", "sbsm", "polycam")
OPTIONS: dict[str, dict[str, Any]] = {
    "polycam": {"layers": ["features.6", "features.13", "features"]},
    "rise": {"masks": 500},
    "lime": {"samples": 300, "superpixels": "grid"},
}


@dataclass
class Setting:
    """One data set under the reference embedding."""

    network: EmbeddingNetwork
    unseen: Pictures
    embeddings: np.ndarray

    def margin(self, method: Method, place: int) -> Direction:
        """What an index differentiates an image along: every triplet, or 50 drawn ones apart."""
        codes = label_codes(list(self.unseen.labels))
        name = method.name if isinstance(method, WeightMethod) else "gradcam"
        recipe = Recipe(method=name, target="margin")
        anchors = AnchorCotangents(recipe, self.embeddings, codes, self.embeddings.mean(0))
        found = anchors.of(np.array([place]))
        several = found.values.ndim == 3
        return Direction(found.values if several else found.values[:, None], found.used)


@dataclass
class Row:
    """One method's figures, each `[n]`."""

    method: Method
    own: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    direct: list[float] = field(default_factory=list)
    transferred: list[float] = field(default_factory=list)
    form: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """As Markdown."""
        columns = (self.own, self.drawn, self.direct, self.transferred)
        cells = [self.method.title, str(len(self.own)), *map(_figure, columns)]
        cells.append(f"{np.mean(self.form):.2f}" if self.form else "")
        return f"| {' | '.join([*cells, f'{1e3 * self.seconds:.0f}'])} |"


def main() -> None:
    options = arguments()
    texts = [_preface(options)]
    try:
        for folder in options.data:
            texts.append(measure(folder, options))
    except EmbedcamError as error:
        sys.exit(f"truth_methods: {error}")
    if options.output:
        options.output.write_text("\n".join(texts))
        print(f"written to {options.output}")


def measure(folder: Path, options: argparse.Namespace) -> str:
    """The table of one data set, printed while it grows."""
    setting, said = prepared(folder, options)
    lines = [
        f"## {folder.name}", "", said, "",
        "| method | n | energy, own | energy, weights | share, direct | share, transferred | "
        "weight form | ms a picture |",
        "|---|---:|---|---|---|---|---:|---:|",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    chosen = options.methods or [name for name, one in METHODS.items() if not one.trained]
    for name in chosen:
        count = options.slow_pictures if name in SLOW else options.pictures
        row = figures(METHODS[name], setting, count)
        lines.append(row.line())
        print(row.line(), flush=True)
    return "\n".join([*lines, ""])


def prepared(folder: Path, options: argparse.Namespace) -> tuple[Setting, str]:
    """The reference network, and the gallery of unseen classes put through it."""
    backbone = load_network(
        "torchvision:mobilenet_v2", weights=options.weights, size=SIZE, resize="squash"
    )
    pictures = read_pictures(folder)
    classes = sorted(set(pictures.labels))
    seen = np.isin(pictures.labels, classes[: len(classes) // 2])
    found = forward(backbone, loaded(pictures.paths), len(seen), (SIZE, SIZE), folder.name)
    with tempfile.TemporaryDirectory() as scratch:
        head = Path(scratch) / "head.safetensors"
        save_file({"weight": train_head(found.pooled[seen], pictures.labels[seen])}, head)
        network = load_network(
            "torchvision:mobilenet_v2", weights=options.weights, head=head, size=SIZE,
            resize="squash",
        )  # fmt: skip
    unseen = Pictures(
        [path for path, s in zip(pictures.paths, seen, strict=True) if not s],
        pictures.labels[~seen],
        pictures.regions[~seen],
    )
    matrix = network.head_kind.matrix
    assert matrix is not None
    z = found.pooled[~seen] @ matrix.T
    embeddings = z / np.linalg.norm(z, axis=1, keepdims=True)
    recall = recall_at_k(embeddings, unseen.labels)
    said = f"{len(z)} pictures of unseen classes, reference embedding, Recall@1 {recall:.3f}."
    return Setting(network, unseen, embeddings), said


def figures(method: Method, setting: Setting, count: int) -> Row:
    """One method on a seeded sample of pictures and of scenes."""
    row, took = Row(method), []
    generator = np.random.default_rng(0)
    unseen = setting.unseen
    places = generator.permutation(len(unseen.paths))[:count]
    others = [
        int(generator.choice(np.flatnonzero(unseen.labels != unseen.labels[i]))) for i in places
    ]
    results = explaining(setting.embeddings, unseen.labels, places)
    for number, (place, other, result) in enumerate(zip(places, others, results, strict=True)):
        image, begun = _input(setting, [int(place)]), time.perf_counter()
        made = _made(method, setting, image, setting.margin(method, int(place)))
        took.append(time.perf_counter() - begun)
        region = unseen.regions[place]
        row.own.append(_inside(np.maximum(made.cam, 0), region))
        if isinstance(method, WeightMethod | LayersMethod):
            drawn = _by_weights(setting.network, made, image)
            row.drawn.append(_inside(resize(drawn, (SIZE, SIZE)), region))
            row.form.append(_correlation(drawn, made.grid_cam))
        left = number % 2 == 0
        sides = [int(place), other] if left else [other, int(place)]
        scene = _input(setting, sides)
        half = np.zeros((SIZE, 2 * SIZE), np.float32)
        half[:, slice(0, SIZE) if left else slice(SIZE, None)] = 1
        aim = Similarity(setting.embeddings[result])
        row.direct.append(_inside(np.maximum(_made(method, setting, scene, aim).cam, 0), half))
        if isinstance(method, WeightMethod | LayersMethod):
            stored = _made(
                method,
                setting,
                _input(setting, [int(result)]),
                setting.margin(method, int(result)),
            )
            drawn = _by_weights(setting.network, stored, scene)
            row.transferred.append(_inside(resize(drawn, (SIZE, 2 * SIZE)), half))
        print(f"\r{method.title}: {number + 1}/{count}  ", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    row.seconds = float(np.median(took))
    return row


def _made(
    method: Method, setting: Setting, image: torch.Tensor, target: Direction | Similarity
) -> MethodMap:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)
        return cam_for(
            setting.network, image, target, method.name, progress=False,
            **OPTIONS.get(method.name, {}),
        )  # fmt: skip


def _by_weights(network: EmbeddingNetwork, made: MethodMap, image: torch.Tensor) -> np.ndarray:
    """The map that a method's weights, or those of its layers, draw on an input, `[h w]`."""
    if made.layer_weights is None:
        return cam(made.weights, network.forward(image[None]).activations[0].numpy())
    names = OPTIONS["polycam"]["layers"][::-1]
    maps = [one[0].numpy() for one in network.forward_layers(image[None], names)[1]]
    drawn = cam(made.layer_weights[names[0]], maps[0])
    for name, finer in zip(names[1:], maps[1:], strict=True):
        drawn = sharpen(cam(made.layer_weights[name], finer), drawn)
    return drawn


def _input(setting: Setting, places: list[int]) -> torch.Tensor:
    """Pictures side by side as the network's input, `[3 224 224 n]`."""
    prepare: Callable[..., np.ndarray] = setting.network.preprocess
    parts = [prepare(squashed(setting.unseen.paths[place])) for place in places]
    return torch.from_numpy(np.concatenate(parts, axis=2))


def _inside(cam_at_size: np.ndarray, region: np.ndarray) -> float:
    """Share of the energy in a region; a map without any scores chance."""
    if not cam_at_size.any():
        return float(region.mean())
    return float(energy_share(cam_at_size[None], region[None])[0])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    b = np.maximum(b, 0)
    if a.shape != b.shape:
        a, b = resize(a, (SIZE, SIZE)), resize(b, (SIZE, SIZE))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    low, high = bootstrap_interval(np.array(values))
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(folder.name for folder in options.data)
    rules = (__doc__ or "").partition("size it names")[2].partition("\n\n")[2]
    return (
        "# Truth: every method, direct and transferred\n\n"
        f"Made by `python scripts/truth_methods.py {names} --weights "
        f"mobilenet_v2_imagenet.safetensors --pictures {options.pictures} --slow-pictures "
        f"{options.slow_pictures}` (protocol in its heading). Brackets: 95% bootstrap intervals "
        "over the sample. *n*: pictures, and as many scenes. RISE with 500 masks, LIME with 300 "
        "samples on a grid. Milliseconds on a machine with other work: see benchmark.md.\n\n"
        + rules
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--pictures", type=int, default=100, help="of the fast methods (100)")
    parser.add_argument("--slow-pictures", type=int, default=10, help="of the others (10)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
