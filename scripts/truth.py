"""Do the maps point at the right object? Every setting on unseen classes, with intervals.

    python scripts/truth.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

A data folder holds `annotations.csv` (path,label,x0,y0,x1,y1,width,height and perhaps mask), as
scripts/prepare_data.py makes it. Protocol (all seeds 0, nothing tuned on these figures):

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
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from embedcam import EmbedcamError, EmbeddingNetwork, load_network
from embedcam.assembly import make_encoding, sample_places
from embedcam.cam import cam, resize
from embedcam.cotangents import AnchorCotangents
from embedcam.encoding import Encoding, LowRank
from embedcam.features import AffineHead
from embedcam.images import read_image
from embedcam.metrics import bootstrap_interval, box_mask, recall_at_k
from embedcam.passes import is_exact
from embedcam.recipe import Recipe
from embedcam.targets import head_cotangent
from embedcam.transfer import transfer
from embedcam.triplets import label_codes
from embedcam.weights import weights_from_pooled

SIZE, GRID, N_SCENES = 224, (7, 7), 500
COARSE_BYTES = 7 * 7 + 4 + 4  # own map, its scale, the count of triplets


@dataclass
class Pictures:
    """A data set: where its pictures lie, what they show, and where."""

    paths: list[Path]
    labels: np.ndarray
    regions: np.ndarray
    """`[N 224 224]` in [0, 1]; once the grid is known, seen from it, `[N 7 7]`."""


@dataclass
class Features:
    """Frozen activations `[N K 7 7]` and pooled vectors `[N K]` of pictures."""

    activations: np.ndarray
    pooled: np.ndarray


@dataclass
class Scenes:
    """Side-by-side pairs: activations `[n K 7 14]`, which picture is explained, on which side."""

    activations: np.ndarray
    explained: np.ndarray
    left: np.ndarray


def main() -> None:
    options = _arguments()
    try:
        text = "\n".join(measure(Path(folder), options) for folder in options.data)
    except EmbedcamError as error:
        sys.exit(f"truth: {error}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(_preface(options) + text)
        print(f"written to {options.output}")


def measure(folder: Path, options: argparse.Namespace) -> str:
    """All tables of one data set, as Markdown; printed while they grow."""
    backbone = load_network(
        "torchvision:mobilenet_v2", weights=options.weights, size=SIZE, resize="squash"
    )
    pictures = read_pictures(folder)
    classes = sorted(set(pictures.labels))
    half = classes[: len(classes) // 2]
    seen = np.isin(pictures.labels, half)
    features = forward(
        backbone, _loaded(pictures.paths), len(pictures.paths), (SIZE, SIZE), "pictures"
    )
    unseen = Pictures(
        [p for p, s in zip(pictures.paths, seen, strict=True) if not s],
        pictures.labels[~seen],
        _projected(pictures.regions[~seen], features.activations),
    )
    gallery = Features(features.activations[~seen], features.pooled[~seen])
    scenes = make_scenes(unseen, backbone)
    tables = []
    matrix = train_head(features.pooled[seen], pictures.labels[seen])
    identity = np.eye(features.pooled.shape[1], dtype=np.float32)
    for name, head in (("reference", matrix), ("frozen", identity)):
        tables.append(table(folder.name, name, AffineHead(head), unseen, gallery, scenes))
    return "\n".join(tables)


def read_pictures(folder: Path) -> Pictures:
    """Paths, labels and regions (masks where given, else boxes) at 224 x 224."""
    paths, labels, regions = [], [], []
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            paths.append(folder / row["path"])
            labels.append(row["label"])
            if row.get("mask"):
                mask = Image.open(folder / row["mask"]).convert("L")
                shrunk = mask.resize((SIZE, SIZE), Image.Resampling.BOX)
                regions.append(np.asarray(shrunk, np.float32) / 255)
                continue
            x0, y0, x1, y1 = (float(row[n]) for n in ("x0", "y0", "x1", "y1"))
            across, down = SIZE / float(row["width"]), SIZE / float(row["height"])
            box = (x0 * across, y0 * down, x1 * across, y1 * down)
            regions.append(box_mask(box, (SIZE, SIZE)).astype(np.float32))
    return Pictures(paths, np.array(labels), np.stack(regions))


def forward(
    network: EmbeddingNetwork,
    pictures: Iterator[Image.Image],
    total: int,
    size: tuple[int, int],
    what: str,
) -> Features:
    """Frozen activations, in batches of 32, half precision in memory."""
    prepare = replace(network.preprocess, size=size)
    kept, pooled, batch = [], [], []
    for number, picture in enumerate(pictures, 1):
        batch.append(prepare(picture))
        if len(batch) == 32 or number == total:
            activations = network.forward(np.stack(batch)).activations
            kept.append(activations.half().numpy())
            pooled.append(activations.mean((-2, -1)).numpy())
            batch = []
            print(f"\r{what}: {number}/{total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Features(np.concatenate(kept), np.concatenate(pooled))


def make_scenes(unseen: Pictures, network: EmbeddingNetwork) -> Scenes:
    """500 side-by-side pairs of different classes, and their mirror images."""
    generator = np.random.default_rng(0)
    first = generator.integers(len(unseen.paths), size=N_SCENES)
    second = np.array(
        [generator.choice(np.flatnonzero(unseen.labels != unseen.labels[i])) for i in first]
    )

    def pictures() -> Iterator[Image.Image]:
        for mirrored in (False, True):
            for a, b in zip(first, second, strict=True):
                scene = Image.new("RGB", (2 * SIZE, SIZE))
                for place, one in enumerate((a, b)):
                    scene.paste(_squashed(unseen.paths[one]), (place * SIZE, 0))
                yield scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else scene

    features = forward(network, pictures(), 2 * N_SCENES, (SIZE, 2 * SIZE), "scenes")
    left = np.repeat([True, False], N_SCENES)
    return Scenes(features.activations, np.tile(first, 2), left)


def train_head(pooled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The reference embedding's matrix `[128 K]`."""
    torch.manual_seed(0)
    centred = pooled - pooled.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:128]
    head = nn.Linear(pooled.shape[1], 128, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(directions))
    loss = nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: ((a - b) ** 2).sum(-1), margin=0.2
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4)
    generator = np.random.default_rng(0)
    inputs = torch.from_numpy(pooled)
    for _ in range(100):
        anchors = generator.integers(len(labels), size=128)
        same = [generator.choice(_others(labels, a, same=True)) for a in anchors]
        other = [generator.choice(_others(labels, a, same=False)) for a in anchors]
        a, p, n = (nn.functional.normalize(head(inputs[rows])) for rows in (anchors, same, other))
        optimizer.zero_grad()
        loss(a, p, n).backward()
        optimizer.step()
    return head.weight.detach().numpy()


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
                method=_method, target=_target, norm=_norm, sampling=_sampling, triplets=_count
            )
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
) -> str:
    """One embedding's table."""
    z = head.output(gallery.pooled)
    lengths = np.linalg.norm(z, axis=1)
    embeddings = (z / lengths[:, None]).astype(np.float32)
    neighbors = _neighbors(embeddings, 5)
    recall = recall_at_k(embeddings, unseen.labels)
    frozen = gallery.pooled / np.linalg.norm(gallery.pooled, axis=1, keepdims=True)
    lines = [
        f"### {folder}, {embedding} embedding",
        "",
        f"{len(z)} pictures of {len(set(unseen.labels))} unseen classes; Recall@1 {recall:.3f} "
        f"(frozen features {recall_at_k(frozen, unseen.labels):.3f}).",
        "",
        "| weights | encoding | bytes | energy | share | larger half right | transfer, 1 nearest: "
        "correlation (5th percentile) | 5 nearest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for row in _rows(head, unseen, gallery, scenes, embeddings, lengths, neighbors):
        lines.append(row)
        print(row, flush=True)
    return "\n".join([*lines, ""])


def _rows(
    head: AffineHead,
    unseen: Pictures,
    gallery: Features,
    scenes: Scenes,
    embeddings: np.ndarray,
    lengths: np.ndarray,
    neighbors: np.ndarray,
) -> Iterator[str]:
    area = unseen.regions.sum((1, 2)) / SIZE**2
    yield f"| chance (area) | | | {_figure(area)} | 0.500 | | | |"
    ones = np.ones_like(gallery.pooled)
    energy = _energy(gallery.activations, ones, unseen.regions)
    share = _share(scenes, np.ones((len(scenes.left), ones.shape[1]), np.float32))
    yield f"| mean activation | | | {_figure(energy)} | {_figure(share)} | {_right(share)} | | |"
    codes = label_codes(list(unseen.labels))
    mean = embeddings.mean(0)
    given = _explaining(embeddings, unseen.labels, scenes.explained)
    for name, recipe in SETTINGS.items():
        found = AnchorCotangents(recipe, embeddings, codes, mean).of(np.arange(len(codes)))
        at_head = head_cotangent(found.values, embeddings, lengths, recipe.norm, True)
        dense = _weights(recipe, head, gallery, at_head, found.used)
        for encoding_name, changes in ENCODINGS.items():
            chosen = replace(recipe, **changes)
            weights, encoding = _stored(chosen, head, at_head, dense, mean, embeddings)
            energy = _energy(gallery.activations, weights, unseen.regions)
            share = _share(scenes, weights[given])
            close = _correlation(gallery.activations, weights, neighbors, embeddings, 1)
            closer = _correlation(gallery.activations, weights, neighbors, embeddings, 5)
            size = encoding.bytes_per_image() + COARSE_BYTES
            yield (
                f"| {name} | {encoding_name} | {size} | {_figure(energy)} | {_figure(share)} | "
                f"{_right(share)} | {close.mean():.2f} ({np.quantile(close, 0.05):.2f}) | "
                f"{closer.mean():.2f} |"
            )


def _weights(
    recipe: Recipe,
    head: AffineHead,
    gallery: Features,
    at_head: np.ndarray,
    used: np.ndarray | None,
) -> np.ndarray:
    """Averaged weights `[N K]`."""
    pooled = torch.from_numpy(gallery.pooled)
    marks = None if used is None else torch.from_numpy(used)
    made = weights_from_pooled(
        head, pooled, pooled, torch.from_numpy(at_head), marks, 49, recipe.method
    )
    return made.numpy()


def _stored(
    recipe: Recipe,
    head: AffineHead,
    at_head: np.ndarray,
    dense: np.ndarray,
    mean: np.ndarray,
    embeddings: np.ndarray,
) -> tuple[np.ndarray, Encoding]:
    """Weights as an index gives them back: encoded and decoded, `[N K]`."""
    exact = is_exact(recipe, head.matrix)
    encoding = make_encoding(
        recipe,
        head.matrix if exact else None,
        GRID,
        mean,
        True,
        lambda: dense[sample_places(len(dense), recipe.seed)],
    )
    if exact and isinstance(encoding, LowRank):
        rows = {**encoding.encode_codes(at_head), "embedding": embeddings}
        return encoding.decode(rows), encoding
    return encoding.decode(encoding.encode(dense)), encoding


def _energy(activations: np.ndarray, weights: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of each map's energy in its region `[N h w]`, projected by `_projected`."""
    maps = _maps(activations, weights)
    inside, total = (maps * regions).sum((1, 2)), (maps * _projected(None, maps)).sum((1, 2))
    chance = regions.sum((1, 2)) / _projected(None, maps).sum()
    return np.where(total > 0, inside / np.where(total > 0, total, 1), chance)


def _projected(regions: np.ndarray | None, maps: np.ndarray) -> np.ndarray:
    """Regions `[.. H W]` seen from the maps' grid; without regions, the whole picture.

    Resizing is linear, so sum(resize(map) * region) = sum(map * resize^T(region)): the same shares
    without drawing every map at full size.
    """
    h, w = maps.shape[-2:]
    down, across = (resize(np.eye(n, dtype=np.float32), (SIZE * n // 7, n)) for n in (h, w))
    whole = np.ones((len(down), len(across)), np.float32)
    return down.T @ (whole if regions is None else regions) @ across


def _maps(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """cam of half-precision activations, in blocks, float64 `[N h w]`."""
    return np.concatenate(
        [
            cam(
                weights[i : i + 128].astype(np.float32), activations[i : i + 128].astype(np.float32)
            )
            for i in range(0, len(weights), 128)
        ]
    ).astype(np.float64)


def _share(scenes: Scenes, weights: np.ndarray) -> np.ndarray:
    """Share of each scene's energy on the explained side, `[2 n]`: upright, mirrored."""
    half = np.zeros((SIZE, 2 * SIZE), np.float32)
    half[:, :SIZE] = 1
    sides = np.stack(
        [_projected(1 - half, scenes.activations), _projected(half, scenes.activations)]
    )
    shares = _energy(scenes.activations, weights, sides[scenes.left.astype(int)])
    return shares.reshape(2, -1)


def _explaining(embeddings: np.ndarray, labels: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """For each scene the nearest other picture of the explained one's class."""
    distances = 2 - 2 * embeddings[explained] @ embeddings.T
    distances[labels[explained][:, None] != labels] = np.inf
    distances[np.arange(len(explained)), explained] = np.inf
    return distances.argmin(1)


def _neighbors(embeddings: np.ndarray, k: int) -> np.ndarray:
    similarities = embeddings @ embeddings.T
    np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


def _correlation(
    activations: np.ndarray,
    weights: np.ndarray,
    neighbors: np.ndarray,
    embeddings: np.ndarray,
    k: int,
) -> np.ndarray:
    """Pearson correlation of each picture's transferred map with its own."""
    near = neighbors[:, :k]
    distances = ((embeddings[:, None] - embeddings[near]) ** 2).sum(-1)
    pair = (_maps(activations, w) for w in (weights, transfer(weights[near], distances)))
    a, b = (m.reshape(len(m), -1) - m.mean((1, 2))[:, None] for m in pair)
    lengths = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    product = (a * b).sum(1)
    return np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0)


def _figure(values: np.ndarray) -> str:
    """Mean and 95% bootstrap interval over images or scenes."""
    if values.ndim == 2:
        values = values.mean(0)
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _right(share: np.ndarray) -> str:
    """How often the larger half is the right one; an even split counts half."""
    return _figure((share > 0.5) + 0.5 * (share == 0.5))


def _others(labels: np.ndarray, anchor: int, same: bool) -> np.ndarray:
    chosen = (labels == labels[anchor]) == same
    chosen[anchor] = False
    return np.flatnonzero(chosen)


def _squashed(path: Path) -> Image.Image:
    return read_image(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _loaded(paths: list[Path]) -> Iterator[Image.Image]:
    return (_squashed(path) for path in paths)


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(Path(folder).name for folder in options.data)
    return (
        "# Truth: do the maps point at the right object?\n\n"
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
