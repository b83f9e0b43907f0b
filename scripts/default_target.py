"""Is the default target better than the plain margin, and than what was tried beside it?

    python scripts/default_target.py DATA/birds20 DATA/objects24 \\
        --weights mobilenet_v2_imagenet.safetensors \\
        --output docs/results/default_target.md --cache CACHE

A data folder is as scripts/prepare_data.py makes it. The reference embedding, the pictures and the
scenes are those of scripts/truth.py. With `--cache`, features and falls are kept as .npy files,
named by what they were made of: a killed run begins again where it stopped.

- *energy*: one object; share of a picture's map inside its box or mask, drawn with its own weights;
- *share*: two objects side by side; share of the map on the side of the explained one, drawn with
  the weights of the nearest other picture of its class; *larger half right*: how often it is more;
- *fall*: each picture is a query among the others and its map is transferred from the nearest five
  of them; the fifth of the pixels that the map marks most takes the mean colour; by so many places
  the nearest result then falls in the ranking of all others;
- *- margin*: difference to the plain margin's, picture by picture (of medians: pictures resampled
  together), and how many of the pictures have more, ties counted half;
- brackets: 95% bootstrap intervals over pictures, or over scenes with their mirror images.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from measuring import drawn, energy_in, nearest_others, share_of
from paper.bench import Bench, Row, frozen_network, read_bench
from paper.cache import Cache
from paper.report import Interval, markdown, table
from photographs import BATCH, SIZE, Scenes, squashed

from embedcam import EmbedcamError, EmbeddingNetwork
from embedcam.cam import resize
from embedcam.cotangents import Cotangents
from embedcam.metrics import (
    bootstrap_interval,
    paired_difference,
    rank_drop,
    rank_of,
    removal_masks,
)
from embedcam.recipe import Recipe
from embedcam.transfer import transfer

NEIGHBORS = 5
REMOVED = 0.2
MARGIN, DEFAULT = "the plain margin", "**the default**"
MIXED = 0.7
"""How much the neighbours' weights count where they are mixed with an image's own."""


@dataclass
class Way:
    """Weights `[N K]` of every picture, and what is taken from activations before, `[K]`."""

    weights: np.ndarray
    less: np.ndarray | None = None

    def seen(self, activations: np.ndarray) -> np.ndarray:
        """Activations `[n K h w]` as the weights are drawn on them."""
        return activations if self.less is None else activations - self.less[:, None, None]


def main() -> None:
    options = arguments()
    texts = []
    try:
        for folder in options.data:
            bench = read_bench(folder, options.weights, options.cache)
            network = frozen_network(options.weights)
            kept = Cache(options.cache, network, bench.unseen.paths)
            texts.append(measure(bench, Removal(bench, network, kept, options.pictures)))
            print(texts[-1], flush=True)
    except EmbedcamError as error:
        sys.exit(f"default_target: {error}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join([_preface(options), *texts]), encoding="utf-8")
        print(f"written to {options.output}")


def measure(bench: Bench, removal: "Removal") -> str:
    """The tables of one data set."""
    rows: list[Row] = []
    falls: dict[str, np.ndarray] = {}
    for name, way in ways(bench):
        scenes = way.seen(bench.scenes.activations)
        pictures = way.seen(bench.gallery.activations)
        energy = energy_in(pictures, way.weights, bench.unseen.regions)
        share = share_of(_replaced(bench, scenes), way.weights[bench.given])
        rows.append(Row((name,), energy, share, against=rows[0] if rows else None))
        falls[name] = removal.falls(way)
        print(f"{bench.name}, {name}: measured", file=sys.stderr, flush=True)
    asked = len(removal.queries)
    return (
        f"## {bench.name}\n\n{bench.said()} Falls are of {asked} pictures.\n\n"
        + table(["weights"], rows).replace(" - base", " - margin")
        + "\n"
        + fall_table(falls)
    )


def ways(bench: Bench) -> Iterator[tuple[str, Way]]:
    """The plain margin, the default, and what was tried beside it."""
    margin = bench.weights(Recipe(target="margin"))[0]
    yield MARGIN, Way(margin)
    yield DEFAULT, Way(bench.weights(Recipe())[0])
    plain = bench.cotangents(Recipe(target="margin")).values.astype(np.float64)
    alone, whitened = through(plain, bench), through(plain @ whitening(bench.embeddings), bench)
    shared = label_mean(whitened, bench.codes)
    for name, cotangents in (
        ("the label's mean alone", label_mean(alone, bench.codes)),
        ("whitening alone", whitened),
        ("the label's mean, through the norm once more", through(shared, bench)),
    ):
        yield name, Way(at_head(bench, cotangents))
    unit = margin / np.linalg.norm(margin, axis=1, keepdims=True)
    near = nearest_others(bench.embeddings, NEIGHBORS)
    yield (
        f"{1 - MIXED:.1f} of its own, {MIXED} of {NEIGHBORS} neighbours' of any label",
        Way((1 - MIXED) * unit + MIXED * unit[near].mean(1)),
    )
    pooled = bench.gallery.pooled
    yield "evidence beyond the average image only", Way(margin, pooled.mean(0))
    yield "times the result's own pooled channels", Way(unit * pooled)


def through(cotangents: np.ndarray, bench: Bench) -> np.ndarray:
    """c - f (f . c) of each picture: through the norm, but for its length, `[N D]`."""
    f = bench.embeddings.astype(np.float64)
    return cotangents - f * (f * cotangents).sum(1, keepdims=True)


def whitening(embeddings: np.ndarray) -> np.ndarray:
    """(C + tr(C) / D I)^-1, C the covariance of embeddings `[N D]`."""
    covariance = np.cov(embeddings.astype(np.float64).T, bias=True)
    width = len(covariance)
    return np.linalg.inv(covariance + np.trace(covariance) / width * np.eye(width))


def label_mean(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Each row's mean over the rows of its label, `[N D]`."""
    same = (codes[:, None] == codes).astype(np.float64)
    return same @ values / same.sum(1, keepdims=True)


def at_head(bench: Bench, cotangents: np.ndarray) -> np.ndarray:
    """Weights `[N K]` of dy/dz `[N D]` as an index gives them back."""
    found = Cotangents(cotangents.astype(np.float32), None, np.ones(len(cotangents), np.int64))
    return bench.weights(Recipe(), found)[0]


class Removal:
    """How far the nearest result falls without what a transferred map marks.

    Args:
        bench: pictures and their embeddings.
        network: the frozen one.
        kept: where falls are kept between runs.
        pictures: at most so many, a seeded sample; None for all.
    """

    def __init__(
        self, bench: Bench, network: EmbeddingNetwork, kept: Cache, pictures: int | None = None
    ) -> None:
        self.bench, self.network, self.kept = bench, network, kept
        order = np.random.default_rng(0).permutation(len(bench.codes))
        self.queries = np.sort(order[:pictures])
        self.near = nearest_others(bench.embeddings, NEIGHBORS)[self.queries]

    def falls(self, way: Way) -> np.ndarray:
        """Places fallen by each query, `[n]`."""
        maps = self.maps(way)
        digest = hashlib.sha256(self.queries.tobytes() + maps.tobytes()).hexdigest()[:16]
        name = f"{self.bench.name}-falls-{digest}"
        return self.kept.array(name, lambda: self.measured(removal_masks(maps, REMOVED)))

    def maps(self, way: Way) -> np.ndarray:
        """Transferred maps at the picture's size, `[n 224 224]`."""
        f, near = self.bench.embeddings, self.near
        distances = ((f[self.queries][:, None] - f[near]) ** 2).sum(-1)
        carried = transfer(way.weights[near], distances)
        seen = way.seen(self.bench.gallery.activations[self.queries])
        return resize(drawn(seen, carried).astype(np.float32), (SIZE, SIZE))

    def measured(self, masks: np.ndarray) -> np.ndarray:
        """The same of pixels `[n 224 224]` that are removed."""
        before = self.ranks(self.bench.embeddings[self.queries])
        pooled = []
        for start in range(0, len(masks), BATCH):
            some = slice(start, start + BATCH)
            shown = np.where(masks[some, None], np.float32(0), self.inputs[some])
            batch = torch.from_numpy(shown).contiguous(memory_format=torch.channels_last)
            pooled.append(self.network.forward(batch).activations.mean((-2, -1)).numpy())
        return rank_drop(before, self.ranks(self.bench.embed(np.concatenate(pooled))[0]))

    def ranks(self, embeddings: np.ndarray) -> np.ndarray:
        """The nearest result's place by embeddings `[n D]` of the queries, itself left out."""
        scores = embeddings.astype(np.float64) @ self.bench.embeddings.T
        scores[np.arange(len(scores)), self.queries] = scores.min() - 1
        return rank_of(scores, self.near[:, 0])

    @cached_property
    def inputs(self) -> np.ndarray:
        """The queries as the network takes them, `[n 3 224 224]`."""
        prepare, paths = self.network.preprocess, self.bench.unseen.paths
        return np.stack([prepare(squashed(paths[query])) for query in self.queries])


def fall_table(falls: dict[str, np.ndarray]) -> str:
    """Falls as Markdown, each beside the plain margin's."""
    base, lines = falls[MARGIN], []
    for name, values in falls.items():
        low, high = bootstrap_interval(values, np.median)
        cells = [name, f"{np.median(values):.1f} [{low:.1f}, {high:.1f}]", ""]
        cells += [f"{values.mean():.1f}", ""]
        if values is not base:
            apart = median_difference(values, base)
            found = paired_difference(values, base)
            cells[2] = f"{apart.mean:+.1f} [{apart.low:+.1f}, {apart.high:+.1f}]"
            cells[4] = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
            cells[4] += f", {found.win_rate:.0%}"
        lines.append(cells)
    columns = ["weights", "fall, median", "median - margin's", "fall, mean", "mean - margin's"]
    return markdown(columns, lines)


def median_difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """median(a) - median(b) of the same pictures, pairs resampled together."""

    def apart(places: np.ndarray, axis: int) -> np.ndarray:
        places = places.astype(int)
        return np.median(a[places], axis=axis) - np.median(b[places], axis=axis)

    middle = float(np.median(a) - np.median(b))
    return Interval(middle, *bootstrap_interval(np.arange(len(a)), apart))


def _replaced(bench: Bench, activations: np.ndarray) -> Scenes:
    scenes = bench.scenes
    return Scenes(activations, scenes.explained, scenes.left, scenes.other, scenes.pooled)


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(f"DATA/{folder.name}" for folder in options.data)
    few = "" if options.pictures is None else f" --pictures {options.pictures}"
    rules = (__doc__ or "").partition("where it stopped.\n\n")[2]
    return (
        "# The default target\n\n"
        f"Made by `python scripts/default_target.py {names} --weights "
        f"mobilenet_v2_imagenet.safetensors --output docs/results/default_target.md{few}`, seeds "
        "0; the protocol is that of [truth.md](truth.md). All weights are of the margin over all "
        "triplets, through the norm. *The default* is the discriminant target: the margin in "
        "whitened embeddings, the mean of a label's pictures; the rows below it take one of the "
        f"two away, or do something else with the plain margin's weights.\n\n{rules}"
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--pictures", type=int, metavar="N", help="falls of N pictures only (all)")
    parser.add_argument("--cache", type=Path, help="folder where features and falls are kept")
    options = parser.parse_args(given)
    if options.pictures is not None and options.pictures < 1:
        parser.error(f"--pictures {options.pictures}: give at least 1")
    return options


if __name__ == "__main__":
    main()
