"""Do a few concepts say why two photographs match? Shares of a similarity that lines carry.

MobileNetV2 as it is (frozen, no head), squashed pictures. Half of the pictures of each label are
indexed, the others ask, at most 150, and each is paired with its nearest indexed picture; of
`natural` those of one class are indexed and those of several ask. What both share with the average
indexed image is put apart; of what is left the *share* is the signed sum of the lines with the
largest amounts, in the median over the queries, with the lower quartile.

- *channels*: the ten channels with the largest amounts;
- *concepts*: the eight concepts with the largest amounts, of as many parts as fitted;
- *own proportions*: the same where a part explains no more of a channel than its own proportions
  say; the rest, that channels are stronger or weaker than any sum of parts, belongs to no line;
- *shuffled parts*: the eight largest of parts whose numbers were shuffled within each channel:
  what dividing by shares gives where parts mean nothing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embedcam import EmbeddingNetwork
from embedcam.index.concepts import Concepts
from embedcam.offline.concepts import NUMBERS, drawn_cells, fit_parts
from embedcam.offline.plan import SAMPLED
from embedcam.pairs.lines import N_CONCEPTS

from ..benchmarks.timing import table
from .data import Features, data_arguments, frozen_features, frozen_network, halves, unit

MOST_QUERIES, N_CHANNELS = 150, 10
Pair = list[tuple[np.ndarray, np.ndarray]]
"""Embedding and activations of a query and of its nearest picture."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the experiment's options."""
    data_arguments(parser)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 32, 64], help="how many")


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield a table for each folder."""
    network = frozen_network(options.weights)
    for folder in options.data:
        indexed, asked = _pictures(folder, network, options.cache)
        rows = [*_rows(indexed, asked, options.parts)]
        yield f"## {folder.name}\n\n{table(('lines', 'share', 'lower quartile', 'rest'), rows)}"


def _pictures(
    folder: Path, network: EmbeddingNetwork, cache: Path | None
) -> tuple[Features, Features]:
    """Return features of the pictures to index, and of those to ask."""
    if (folder / "single").is_dir():
        both = [frozen_features(folder / n, network, cache)[1] for n in ("single", "several")]
        return both[0], both[1].some(np.arange(MOST_QUERIES))
    pictures, features, _ = frozen_features(folder, network, cache)
    indexed, asked = halves(pictures.labels, 0, None)
    some = np.random.default_rng(0).permutation(asked)[:MOST_QUERIES]
    return features.some(indexed), features.some(some)


def _rows(indexed: Features, asked: Features, parts: list[int]) -> Iterator[list[str]]:
    gallery, queries = unit(indexed.pooled), unit(asked.pooled)
    mean, nearest = gallery.mean(0), (queries @ gallery.T).argmax(1)
    pairs = [
        [(queries[at], asked.activations[at]), (gallery[to], indexed.activations[to])]
        for at, to in enumerate(nearest)
    ]
    channels = [
        sum(one[0] * (other[0] - mean) for one, other in (pair, pair[::-1])) / 2 for pair in pairs
    ]
    shares = [_share(amounts, amounts.sum(), N_CHANNELS) for amounts in channels]
    yield _row(f"{N_CHANNELS} channels", shares, [0.0])
    sample = _sample(indexed)
    for n in parts:
        found = fit_parts(sample, n, 0)
        assert found is not None
        shuffled = np.random.default_rng(0).permuted(found[0], axis=0)
        for name, values in ((f"{n} concepts", found[0]), ("shuffled parts", shuffled)):
            of = _divided(Concepts(values, ("",) * n), pairs, mean)
            yield _row(f"{N_CONCEPTS} of {name}", *of[:2])
            if values is found[0]:
                yield _row(f"{N_CONCEPTS} of {n}, own proportions", *of[2:])


def _divided(concepts: Concepts, pairs: list[Pair], mean: np.ndarray) -> list[list[float]]:
    """Return of each pair what eight concepts carry and what is left, by shares and as they are."""
    told: list[list[float]] = [[], [], [], []]
    for pair in pairs:
        total, amounts, plain = 0.0, np.zeros(len(concepts)), np.zeros(len(concepts))
        for (one, activations), (other, _) in (pair, pair[::-1]):
            given, wide = one * (other - mean) / 2, activations.astype(np.float32)
            total += float(given.sum())
            amounts += concepts.divide(given, wide)[0]
            # Of what is in the channels, as much as the parts themselves would put there.
            sums = wide.sum((1, 2), dtype=np.float64)
            slopes = np.divide(given, sums, out=np.zeros(len(sums)), where=sums > 0)
            plain += concepts.amounts(wide) * float(sums.max()) * (concepts.parts @ slopes)
        for at, values in ((0, amounts), (2, plain)):
            told[at].append(_share(values, total, N_CONCEPTS))
            told[at + 1].append(1 - float(values.sum()) / total)
    return told


def _share(amounts: np.ndarray, total: float, n: int) -> float:
    largest = np.argsort(-np.abs(amounts), kind="stable")[:n]
    return float(amounts[largest].sum() / total)


def _row(name: str, shares: list[float], rest: list[float]) -> list[str]:
    quartile, middle = np.percentile(shares, [25, 50])
    return [name, f"{middle:.3f}", f"{quartile:.3f}", f"{np.median(rest):.3f}"]


def _sample(features: Features) -> np.ndarray:
    """Return activations at positions drawn as a build draws them, by names of their numbers."""
    flat = features.activations.reshape(*features.activations.shape[:2], -1)
    n_cells = NUMBERS // (flat.shape[1] * min(len(flat), SAMPLED))
    some = (
        one[:, drawn_cells(str(n), 0, flat.shape[2], n_cells)].T
        for n, one in enumerate(flat[:SAMPLED])
    )
    return np.concatenate([*some]).astype(np.float32)
