"""Do the maps of every method point at the right object? Direct and transferred, unseen classes.

    python scripts/truth_methods.py DATA/birds20 DATA/objects24 \\
        --weights mobilenet_v2_imagenet.safetensors --output docs/results/truth-methods.md

The protocol, the reference embedding and the scenes are those of scripts/truth.py. Methods that
mask pixels take up to thousands of passes a picture, so each row is of a seeded sample, whose
size it names: `--pictures` of the fast methods, `--slow-pictures` of the others.

- *single*: one object; pixel AUC of its box or mask against the rest. Of the signed map sum w A,
  which an index draws, where the method yields weights, else of the map as it comes, whose zeros
  tie. The target is an index's: the default over the gallery, or, for methods that average over
  triplets apart, the margin over 50 drawn ones. *Energy*: share of the method's own map inside.
- *direct*: two objects; the method run on the scene itself, its target the cosine similarity to the
  given result; AUC of the result's side against the other, and share of the map's energy there.
- *transferred*: the same of the scene drawn with the result's own stored weights (dense).
- *weight form*: correlation of the picture's own map with the map of its weights.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import explaining, figure
from photographs import SIZE, STEP, Pictures, forward, loaded, read_pictures, squashed, train_head
from safetensors.numpy import save_file

from embedcam import METHODS, EmbedcamError, EmbeddingNetwork, Similarity, cam_for, load_network
from embedcam.methods import MethodMap, MethodWarning
from embedcam.metrics import energy_share, pixel_auc, recall_at_k
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.ops import cam, resize, sharpen, signed_cam
from embedcam.recipe.recipe import Recipe
from embedcam.recipe.registry import LayersMethod, Method, WeightMethod
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
    anchors: dict[str, AnchorCotangents] = field(default_factory=dict)

    def asked(self, method: Method, place: int) -> tuple[Direction, str]:
        """What an index differentiates an image along, and the norm's way that is left for it."""
        name = method.name if isinstance(method, WeightMethod) else "gradcam"
        if name not in self.anchors:
            codes = label_codes(list(self.unseen.labels))
            mean = self.embeddings.mean(0)
            self.anchors[name] = AnchorCotangents(Recipe(method=name), self.embeddings, codes, mean)
        found = self.anchors[name].of(np.array([place]))
        several = found.values.ndim == 3
        aim = Direction(found.values if several else found.values[:, None], found.used)
        gradient = method.targeted and not method.scored
        return aim, self.anchors[name].recipe.head_norm if gradient else "through"


@dataclass
class Row:
    """One method's figures: (AUC, share) of each picture, and of each scene twice."""

    method: Method
    own: list[tuple[float, float]] = field(default_factory=list)
    direct: list[tuple[float, float]] = field(default_factory=list)
    transferred: list[tuple[float, float]] = field(default_factory=list)
    form: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """As Markdown: of each list of (AUC, share) both columns."""
        cells = [self.method.title, str(len(self.own))]
        for values in (self.own, self.direct, self.transferred):
            columns = np.array(values).T if values else ([], [])
            cells += [figure(column) if len(column) else "" for column in columns]
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
        "| method | n | single: AUC | energy | direct: AUC | share | transferred: AUC | share | "
        "weight form | ms a picture |",
        "|---|---:|---|---|---|---|---|---|---:|---:|",
        mean_activation(setting, options.pictures),
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
    seen = pictures.seen()
    found = forward(backbone, loaded(pictures.paths), len(seen), (SIZE, SIZE), folder.name)
    with tempfile.TemporaryDirectory() as scratch:
        head = Path(scratch) / "head.safetensors"
        save_file({"weight": train_head(found.pooled[seen], pictures.labels[seen])}, head)
        network = load_network(
            "torchvision:mobilenet_v2", weights=options.weights, head=head, size=SIZE,
            resize="squash",
        )  # fmt: skip
    unseen = pictures.some(~seen)
    matrix = network.head_kind.matrix
    assert matrix is not None
    z = found.pooled[~seen] @ matrix.T
    embeddings = z / np.linalg.norm(z, axis=1, keepdims=True)
    recall = recall_at_k(embeddings, unseen.labels)
    said = f"{len(z)} pictures of unseen classes, reference embedding, Recall@1 {recall:.3f}."
    return Setting(network, unseen, embeddings), said


def sampled(setting: Setting, count: int) -> Iterator[tuple[int, int, torch.Tensor, np.ndarray]]:
    """A seeded sample: place of a picture, of its nearest of the class, a scene of it beside a
    picture of another class, and the half of the scene that shows it."""
    generator = np.random.default_rng(0)
    unseen = setting.unseen
    places = generator.permutation(len(unseen.paths))[:count]
    others = [
        int(generator.choice(np.flatnonzero(unseen.labels != unseen.labels[i]))) for i in places
    ]
    results = explaining(setting.embeddings, unseen.labels, places)
    for number, (place, other, result) in enumerate(zip(places, others, results, strict=True)):
        left = number % 2 == 0
        scene = _input(setting, [int(place), other] if left else [other, int(place)])
        half = np.zeros((SIZE, 2 * SIZE), np.float32)
        half[:, slice(0, SIZE) if left else slice(SIZE, None)] = 1
        yield int(place), int(result), scene, half


def mean_activation(setting: Setting, count: int) -> str:
    """The row of the plain mean of the channels on the same sample: no explanation at all."""
    own, direct = [], []
    for place, _, scene, half in sampled(setting, count):
        for found, image, region in (
            (own, _input(setting, [place]), setting.unseen.regions[place]),
            (direct, scene, half),
        ):
            grid = setting.network.forward(image[None]).activations[0].mean(0).numpy()
            found.append(_scores(grid, resize(grid, region.shape), region))
    cells = [figure(column) for values in (own, direct) for column in np.array(values).T]
    return f"| mean activation | {count} | {' | '.join(cells)} |  |  |  |  |"


def figures(method: Method, setting: Setting, count: int) -> Row:
    """One method on the sample."""
    row, took = Row(method), []
    for number, (place, result, scene, half) in enumerate(sampled(setting, count)):
        image, begun = _input(setting, [place]), time.perf_counter()
        made = _made(method, setting, image, *setting.asked(method, place))
        took.append(time.perf_counter() - begun)
        ordered, drawn = _maps(setting.network, made, image)
        row.own.append(_scores(ordered, drawn, setting.unseen.regions[place]))
        if isinstance(method, WeightMethod | LayersMethod):
            row.form.append(_correlation(np.maximum(ordered, 0), made.grid_cam))
        direct = _made(method, setting, scene, Similarity(setting.embeddings[result]))
        row.direct.append(_scores(*_maps(setting.network, direct, scene), half))
        if isinstance(method, WeightMethod | LayersMethod):
            asked = setting.asked(method, result)
            stored = _made(method, setting, _input(setting, [result]), *asked)
            grid = _by_weights(setting.network, stored, scene)
            drawn = resize(np.maximum(grid, 0), half.shape)
            row.transferred.append(_scores(grid, drawn, half))
        print(f"\r{method.title}: {number + 1}/{count}  ", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    row.seconds = float(np.median(took))
    return row


def _made(
    method: Method,
    setting: Setting,
    image: torch.Tensor,
    target: Direction | Similarity,
    norm: str = "through",
) -> MethodMap:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)
        return cam_for(
            setting.network, image, target, method.name, norm=norm, progress=False,
            **OPTIONS.get(method.name, {}),
        )  # fmt: skip


def _maps(
    network: EmbeddingNetwork, made: MethodMap, image: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """What AUC is taken of, `[h w]`, and the method's own map as drawn, `[H W]`."""
    drawn = np.maximum(made.cam, 0)
    by_channel = isinstance(made.method, WeightMethod | LayersMethod)
    return _by_weights(network, made, image) if by_channel else made.cam, drawn


def _by_weights(network: EmbeddingNetwork, made: MethodMap, image: torch.Tensor) -> np.ndarray:
    """The signed map that a method's weights draw; of several layers the drawn one, `[h w]`."""
    if made.layer_weights is None:
        return signed_cam(made.weights, network.forward(image[None]).activations[0].numpy())
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


def _scores(ordered: np.ndarray, drawn: np.ndarray, region: np.ndarray) -> tuple[float, float]:
    """AUC of a region by one map, on every `STEP`th pixel, and share of another's energy in it,
    chance where it has none."""
    if ordered.shape != region.shape:
        ordered = resize(ordered, region.shape)
    inside = region[::STEP, ::STEP] >= 0.5
    area = float(pixel_auc(ordered[None, ::STEP, ::STEP], inside[None])[0])
    share = energy_share(drawn[None], region[None])[0] if drawn.any() else region.mean()
    return area, float(share)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    b = np.maximum(b, 0)
    if a.shape != b.shape:
        a, b = resize(a, (SIZE, SIZE)), resize(b, (SIZE, SIZE))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(f"DATA/{folder.name}" for folder in options.data)
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
