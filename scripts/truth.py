"""Do the maps point at the right object? Every setting on unseen classes, with intervals.

    python scripts/truth.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

A data folder is as scripts/prepare_data.py makes it. Protocol (seeds 0, nothing tuned on this):

- classes in alphabetical order; the first half trains the head, the second half is measured;
- pictures resized to 224 x 224; frozen MobileNetV2, layer `features`, average pool, then
  *reference*: Linear(1280, 128, bias=False) from the training half's principal directions, 100
  Adam steps, lr 1e-4, 128 triplets a step, margin 0.2, L2-normalised; *frozen*: the pooled vector;
- energies are of ReLU(sum w A), bilinearly up-sampled, nothing else; no energy scores chance;
- one object: share of a picture's energy inside its box or mask, drawn with its own stored weights;
- two objects: 500 pairs of pictures of different classes side by side (224 x 448), each also
  mirrored, drawn with the stored weights of the nearest *other* picture of the first one's class to
  the first one alone: the share on its side, and how often the larger half is the right one;
- transfer: correlation of the map drawn with the weights of 1 and 5 neighbours with the own map.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measuring import (
    COARSE_BYTES,
    dense_weights,
    energy_in,
    explaining,
    figure,
    halves,
    nearest_others,
    projected,
    right,
    share_of,
    stored,
    transfer_correlation,
)
from photographs import (
    SIZE,
    Features,
    Pictures,
    Scenes,
    forward,
    loaded,
    make_scenes,
    read_pictures,
    train_head,
)

from embedcam import EmbedcamError, load_network
from embedcam.classes import label_codes
from embedcam.cotangents import AnchorCotangents
from embedcam.features import AffineHead
from embedcam.metrics import recall_at_k
from embedcam.recipe import Recipe
from embedcam.targets import head_cotangent


@dataclass
class Row:
    """One setting on one data set; figures by picture `[N]` or by scene and its mirror `[2 n]`."""

    weights: str
    encoding: str = ""
    size: int | None = None
    energy: np.ndarray | None = None
    share: np.ndarray | None = None
    close: np.ndarray | None = None
    closer: np.ndarray | None = None

    def line(self) -> str:
        """The row as Markdown."""
        cells = [self.weights, self.encoding, "" if self.size is None else str(self.size)]
        cells += [figure(self.energy), figure(self.share), right(self.share)]
        cells.append("" if self.close is None else
                     f"{self.close.mean():.2f} ({np.quantile(self.close, 0.05):.2f})")  # fmt: skip
        cells.append("" if self.closer is None else f"{self.closer.mean():.2f}")
        return f"| {' | '.join(cells)} |"


Tables = dict[tuple[str, str], list[Row]]
"""Rows of every (embedding, data set)."""


def main() -> None:
    options = _arguments()
    tables: Tables = {}
    texts, valid = [], True
    try:
        for folder in options.data:
            text, counts = measure(Path(folder), options, tables)
            texts.append(text)
            valid &= counts
    except EmbedcamError as error:
        sys.exit(f"truth: {error}")
    chosen = choice(tables)
    print(chosen)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(_preface(options) + chosen + "\n".join(texts))
        print(f"written to {options.output}")
    if not valid:
        sys.exit("truth: Recall@1 is not within 0.02 of the frozen features': no table counts")


def choice(tables: Tables) -> str:
    """Which setting the figures choose, and whether it clears the bars on every data set."""
    lines = ["## What the figures choose", ""]
    for embedding in dict.fromkeys(name for name, _ in tables):
        sets = {data: rows for (name, data), rows in tables.items() if name == embedding}
        keys = [(r.weights, r.encoding) for r in next(iter(sets.values())) if r.size]
        sums = {key: sum(_gain(rows, _find(rows, key)) for rows in sets.values()) for key in keys}
        small = [key for key in keys if all(_find(rows, key).size <= 320 for rows in sets.values())]
        best = sorted(small, key=lambda key: -sums[key])
        lines += [
            f"{embedding.capitalize()} embedding: sum over the data sets of (energy - the mean "
            "activation's) + (share - 0.5), settings within 320 bytes an image, the best five:",
            "",
            "| weights | encoding | sum |",
            "|---|---|---|",
            *(f"| {key[0]} | {key[1]} | {sums[key]:.3f} |" for key in best[:5]),
            "",
            f"The first, `{best[0][0]}, {best[0][1]}`, against the bars:",
            "",
            "| data set | energy over mean activation (bar 0.03) | share (bar 0.88) | larger half "
            "right (bar 0.93) | bytes (bar 320) | share lost to dense (bar 0.01) | |",
            "|---|---|---|---|---|---|---|",
        ]
        for data, rows in sets.items():
            row, dense = _find(rows, best[0]), _find(rows, (best[0][0], "dense"))
            figures = (
                row.energy.mean() - _find(rows, ("mean activation", "")).energy.mean(),
                row.share.mean(),
                halves(row.share).mean(),
                row.size,
                max(0.0, dense.share.mean() - row.share.mean()),
            )
            met = (
                figures[0] >= 0.03 and figures[1] >= 0.88 and figures[2] >= 0.93
                and figures[3] <= 320 and figures[4] <= 0.01
            )  # fmt: skip
            shown = " | ".join(f"{f:.3f}" if isinstance(f, float) else str(f) for f in figures)
            lines.append(f"| {data} | {shown} | {'met' if met else 'MISSED'} |")
        lines.append("")
    return "\n".join([*lines, ""])


def _find(rows: list[Row], key: tuple[str, str]) -> Row:
    return next(row for row in rows if (row.weights, row.encoding) == key)


def _gain(rows: list[Row], row: Row) -> float:
    mean = _find(rows, ("mean activation", ""))
    return float(row.energy.mean() - mean.energy.mean() + row.share.mean() - 0.5)


def measure(folder: Path, options: argparse.Namespace, tables: Tables) -> tuple[str, bool]:
    """The tables of one data set as Markdown, printed while they grow, and whether they count."""
    backbone = load_network(
        "torchvision:mobilenet_v2", weights=options.weights, size=SIZE, resize="squash"
    )
    pictures = read_pictures(folder)
    classes = sorted(set(pictures.labels))
    half = classes[: len(classes) // 2]
    seen = np.isin(pictures.labels, half)
    features = forward(
        backbone, loaded(pictures.paths), len(pictures.paths), (SIZE, SIZE), "pictures"
    )
    unseen = Pictures(
        [p for p, s in zip(pictures.paths, seen, strict=True) if not s],
        pictures.labels[~seen],
        projected(pictures.regions[~seen], features.activations),
    )
    gallery = Features(features.activations[~seen], features.pooled[~seen])
    scenes = make_scenes(unseen, backbone)
    texts, valid = [], True
    matrix = train_head(features.pooled[seen], pictures.labels[seen])
    identity = np.eye(features.pooled.shape[1], dtype=np.float32)
    for name, head in (("reference", matrix), ("frozen", identity)):
        rows = tables.setdefault((name, folder.name), [])
        text, counts = table(folder.name, name, AffineHead(head), unseen, gallery, scenes, rows)
        texts.append(text)
        valid &= counts
    return "\n".join(texts), valid


SETTINGS: dict[str, Recipe] = {}
for _target, _sampling, _count in (
    ("margin", "random", 1),
    ("margin", "random", 50),
    ("margin", "all", 50),
    ("centred", "random", 1),
):
    for _norm in ("through", "around"):
        for _method in ("gradcam", "gradcam++"):
            if _sampling == "all" and _method == "gradcam++":
                continue
            _name = {1: "one triplet", 50: "50 triplets"}[_count]
            _name = "all triplets" if _sampling == "all" else _name
            _name = "centred" if _target == "centred" else _name
            SETTINGS[f"{_method}, {_name}, {_norm}"] = Recipe(
                method=_method,
                target=_target,
                norm=_norm,
                sampling=_sampling,
                triplets=None if _sampling == "all" else _count,
            )
for _norm in ("through", "around"):
    SETTINGS[f"gradcam, discriminant, {_norm}"] = Recipe(target="discriminant", norm=_norm)
ENCODINGS = {
    "dense": {"encoding": "dense"},
    "low-rank 128": {"encoding": "low-rank"},
    "top 50 signed": {"encoding": "top-m", "by": "signed"},
    "top 50 magnitude": {"encoding": "top-m", "by": "magnitude"},
}


def table(
    folder: str,
    embedding: str,
    head: AffineHead,
    unseen: Pictures,
    gallery: Features,
    scenes: Scenes,
    rows: list[Row],
) -> tuple[str, bool]:
    """One embedding's table, and whether it counts: it must retrieve like the frozen features."""
    z = head.output(gallery.pooled)
    lengths = np.linalg.norm(z, axis=1)
    embeddings = (z / lengths[:, None]).astype(np.float32)
    neighbors = nearest_others(embeddings, 5)
    recall = recall_at_k(embeddings, unseen.labels)
    frozen = gallery.pooled / np.linalg.norm(gallery.pooled, axis=1, keepdims=True)
    usual = recall_at_k(frozen, unseen.labels)
    lines = [
        f"### {folder}, {embedding} embedding",
        "",
        f"{len(z)} pictures of {len(set(unseen.labels))} unseen classes; Recall@1 {recall:.3f} "
        f"(frozen features {usual:.3f}).",
        "",
        "| weights | encoding | bytes | energy | share | larger half right | transfer, 1 nearest: "
        "correlation (5th percentile) | 5 nearest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for row in _rows(head, unseen, gallery, scenes, embeddings, lengths, neighbors):
        rows.append(row)
        lines.append(row.line())
        print(row.line(), flush=True)
    return "\n".join([*lines, ""]), abs(recall - usual) <= 0.02


def _rows(
    head: AffineHead,
    unseen: Pictures,
    gallery: Features,
    scenes: Scenes,
    embeddings: np.ndarray,
    lengths: np.ndarray,
    neighbors: np.ndarray,
) -> Iterator[Row]:
    chance = np.full((2, len(scenes.left) // 2), 0.5)
    yield Row("chance (area)", energy=unseen.regions.sum((1, 2)) / SIZE**2, share=chance)
    ones = np.ones_like(gallery.pooled)
    energy = energy_in(gallery.activations, ones, unseen.regions)
    share = share_of(scenes, np.ones((len(scenes.left), ones.shape[1]), np.float32))
    yield Row("mean activation", energy=energy, share=share)
    codes = label_codes(list(unseen.labels))
    mean = embeddings.mean(0)
    given = explaining(embeddings, unseen.labels, scenes.explained)
    for name, recipe in SETTINGS.items():
        found = AnchorCotangents(recipe, embeddings, codes, mean).of(np.arange(len(codes)))
        at_head = head_cotangent(found.values, embeddings, lengths, recipe.head_norm, True)
        dense = dense_weights(recipe, head, gallery, at_head, found.used)
        for encoding_name, changes in ENCODINGS.items():
            chosen = replace(recipe, **changes)
            weights, encoding = stored(chosen, head, at_head, dense, mean, embeddings)
            yield Row(
                name,
                encoding_name,
                encoding.bytes_per_image() + COARSE_BYTES,
                energy_in(gallery.activations, weights, unseen.regions),
                share_of(scenes, weights[given]),
                transfer_correlation(gallery.activations, weights, neighbors, embeddings, 1),
                transfer_correlation(gallery.activations, weights, neighbors, embeddings, 5),
            )


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(Path(folder).name for folder in options.data)
    return (
        "# Truth: do the maps point at the right object?\n\n"
        "*Energy*: share of a picture's map inside its box or mask. *Share*: of two pictures of "
        "different\nclasses side by side, drawn with the stored weights of a result of one class, "
        "the share on that side.\n*Larger half right*: how often that side has the larger share. "
        "*Bytes*: an image, beside id, label,\npath and embedding, own map included.\n\n"
        f"Made by `python scripts/truth.py {names} --weights mobilenet_v2_imagenet.safetensors` "
        "(protocol in its heading). Brackets: 95% bootstrap intervals over images or scenes.\n\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
