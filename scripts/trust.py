"""How far can trust be trusted? Calibration and novelty of transfers on photographs.

    python scripts/trust.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

The data and the reference embedding are those of scripts/truth.py. For each data set an index is
built of the pictures of unseen classes, which calibrates itself on a half of them; the other half
are leave-one-out queries, so that trust is not measured on what it was fitted on; a query keeps its
part, one of a label's pictures, in the weights that its label shares. Five seeded halves:
figures are means over them, in brackets the worst. Queries from elsewhere: the other data set's
unseen classes, noise (white, coarse, uniform) and blank pictures.

- *calibration error*: mean |trust - true correlation| over ten bins of equal count;
- *error / constant*: mean |trust - true correlation| over that of the best constant (bar 0.9);
- *Spearman*: of trust with the true correlation of the transferred with the directly drawn map, to
  six decimals: neighbours of one label have one answer, and 1 is 1 however it was rounded;
- *AUROC*: of trust between leave-one-out queries and those from elsewhere;
- *without strangers*: calibrations of the same builds, fitted again on images explained by their
  neighbours alone, not as if the index held nothing of their label or nothing of its nearer half.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import SIZE, forward, loaded, read_pictures, train_head
from safetensors.numpy import save_file
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from embedcam import EmbedcamError, Explainer, Index, Recipe, build_index, load_network, trust
from embedcam.calibration import Calibration, correlation
from embedcam.cam import cam
from embedcam.images import ImageSource, Item
from embedcam.network import EmbeddingNetwork

N_NOISE = 60
SPLITS = 5
COUNTS = {1: "one", 5: "several"}
"""Neighbours, and the calibration an index has for so many."""


def main() -> None:
    options = arguments()
    lines = [_preface(options)]
    try:
        for folder in options.data:
            others = [other for other in options.data if other != folder]
            lines.append(measure(folder, others, options))
    except EmbedcamError as error:
        sys.exit(f"trust: {error}")
    if options.output:
        options.output.write_text("\n".join(lines))
        print(f"written to {options.output}")


def measure(folder: Path, others: list[Path], options: argparse.Namespace) -> str:
    """The table of one data set."""
    backbone = load_network(
        "torchvision:mobilenet_v2", weights=options.weights, size=SIZE, resize="squash",
        channels_last=True,
    )  # fmt: skip
    pictures = read_pictures(folder)
    classes = sorted(set(pictures.labels))
    seen = np.isin(pictures.labels, classes[: len(classes) // 2])
    features = forward(backbone, loaded(pictures.paths), len(seen), (SIZE, SIZE), folder.name)
    with tempfile.TemporaryDirectory(prefix="embedcam-trust-") as scratch:
        head = Path(scratch) / "head.safetensors"
        save_file({"weight": train_head(features.pooled[seen], pictures.labels[seen])}, head)
        network = load_network(
            "torchvision:mobilenet_v2", weights=options.weights, head=head, size=SIZE,
            resize="squash", channels_last=True,
        )  # fmt: skip
        unseen = np.flatnonzero(~seen)
        items = [
            Item(str(place), str(pictures.paths[place]), str(pictures.labels[place]))
            for place in unseen
        ]
        # The other half of the pictures is left to be measured on.
        trust.SAMPLE = len(items) // 2
        elsewhere = {}
        for other in others:
            found = read_pictures(other)
            kinds = sorted(set(found.labels))
            rest = np.flatnonzero(~np.isin(found.labels, kinds[: len(kinds) // 2]))
            paths = [found.paths[place] for place in rest]
            elsewhere[other.name] = forward(
                backbone, loaded(paths), len(paths), (SIZE, SIZE), other.name
            )
        runs = []
        own = features.activations[unseen]
        for seed in range(SPLITS):
            path = Path(scratch) / f"index-{seed}"
            source = ImageSource(items, None)
            with alone() as fitted:
                build_index(source, network, path, Recipe(seed=seed), batch_size=8)
            with Index.open(path) as index:
                found = figures(index, network, own, elsewhere, seed)
                plain = {name: fitted[name].to_dict() for name in index.manifest["trust"]}
                index.manifest["trust"] = plain
                less = figures(index, network, own, elsewhere, seed)
            named = {f"{count}, without strangers": row for count, row in less.items()}
            runs.append({**{str(count): row for count, row in found.items()}, **named})
        text = table(folder.name, [*elsewhere, "noise", "blank"], runs, len(own))
    print(text, flush=True)
    return text


@contextmanager
def alone() -> Iterator[dict[str, Calibration]]:
    """While it lasts, what an index calibrates with is fitted once more without strangers."""
    found: dict[str, Calibration] = {}
    usual = trust.fit_calibration

    def fit(evidence, correlations, novel, novel_correlations, nearest, **given: Any):
        name = COUNTS[1 if given["neighbors"] == 1 else 5]
        none = np.empty((0, evidence.shape[1])), np.empty(0)
        found[name] = usual(evidence, correlations, *none, nearest, **given)
        return usual(evidence, correlations, novel, novel_correlations, nearest, **given)

    trust.fit_calibration = fit
    try:
        yield found
    finally:
        trust.fit_calibration = usual


def figures(
    index: Index, network: EmbeddingNetwork, own: np.ndarray, elsewhere, seed: int
) -> dict[int, list[float]]:
    """Of explanations by one and by five neighbours, what the columns say."""
    matrix, made, found = network.head_kind.matrix, synthetic(network), {}
    for count in COUNTS:
        explainer = Explainer(index, n_neighbors=count)
        held = np.setdiff1d(np.arange(len(own)), trust.sample_rows(len(own), seed))
        given, true = [], []
        for row in held:
            activations = own[row].astype(np.float32)
            embedding = _embed(activations, matrix)
            near = index.search(embedding[None], count + 1).positions[0]
            near = [index.ids[place] for place in near if place != row][:count]
            explained = explainer.explain_features(embedding, activations, neighbors=near)
            direct = cam(index.weights(np.array([row]))[0], activations)
            given.append(explained.trust)
            true.append(correlation(explained.cam.ravel(), direct.ravel()))
        given, true = np.array(given), np.array(true)
        areas = []
        for activations in [*(f.activations for f in elsewhere.values()), *made]:
            strange = [
                explainer.explain_features(_embed(one, matrix), one).trust
                for one in activations.astype(np.float32)
            ]
            known = np.r_[np.ones(len(given)), np.zeros(len(strange))]
            areas.append(roc_auc_score(known, np.r_[given, strange]))
        bins = np.array_split(np.argsort(given, kind="stable"), 10)
        error = np.mean([abs(given[part].mean() - true[part].mean()) for part in bins])
        constant = np.abs(true - np.median(true)).mean()
        found[count] = [
            float(true.mean()), float(error), float(np.abs(given - true).mean() / constant),
            float(spearmanr(given, true.round(6))[0]), *map(float, areas),
        ]  # fmt: skip
    return found


def table(name: str, strangers: list[str], runs: list[dict[str, list[float]]], total: int) -> str:
    """The splits' means and worst as Markdown."""
    lines = [
        f"## {name}", "",
        f"{total} pictures, {total - total // 2} of them queries.", "",
        "| neighbours | mean correlation | calibration error (bar 0.05) | error / constant (0.9) | "
        "Spearman (0.4) | " + " | ".join(f"AUROC, {one} (0.95)" for one in strangers) + " |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(strangers),
    ]  # fmt: skip
    for count in runs[0]:
        values = np.array([run[count] for run in runs])
        worst = [np.max if place in (1, 2) else np.min for place in range(values.shape[1])]
        cells = [
            f"{values[:, place].mean():.3f} ({pick(values[:, place]):.3f})"
            for place, pick in enumerate(worst)
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def synthetic(network: EmbeddingNetwork) -> list[np.ndarray]:
    """Activations of noise and of blank pictures, `[n K h w]` each."""
    generator = np.random.default_rng(0)
    noise = []
    for place in range(N_NOISE):
        if place % 3 == 0:
            one = generator.normal(0, 1, (3, SIZE, SIZE))
        elif place % 3 == 1:
            one = generator.normal(0, 1, (3, 14, 14)).repeat(SIZE // 14, 1).repeat(SIZE // 14, 2)
        else:
            one = generator.uniform(-2, 2.5, (3, SIZE, SIZE))
        noise.append(one.astype(np.float32))
    colours = generator.uniform(-2.1, 2.6, (N_NOISE, 3, 1, 1)).astype(np.float32)
    blank = np.broadcast_to(colours, (N_NOISE, 3, SIZE, SIZE))
    return [
        np.concatenate(
            [
                network.forward(torch.from_numpy(np.array(pictures[at : at + 10]))).activations
                for at in range(0, N_NOISE, 10)
            ]
        )
        for pictures in (np.stack(noise), blank)
    ]


def _embed(activations: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    z = matrix @ activations.mean((1, 2))
    return (z / np.linalg.norm(z)).astype(np.float32)


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(folder.name for folder in options.data)
    rules = (__doc__ or "").partition("imagenet.safetensors\n\n")[2]
    return (
        "# How far trust can be trusted\n\n"
        f"Made by `python scripts/trust.py {names} --weights mobilenet_v2_imagenet.safetensors`. "
        + rules
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
