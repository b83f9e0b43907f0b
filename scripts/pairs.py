"""Do receipts point at what matched? Scenes of two photographs, and cells matched one by one.

    python scripts/pairs.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

The data, the split and the two embeddings are those of scripts/truth.py. 500 scenes of two unseen
pictures of different classes, x on the left and y on the right; x' and y' are the nearest other
pictures of the same classes.

- *map*: the scene is the query and x' the result; share of the positive evidence on the left;
- *above*: the scene is the query, x' the result, y' the rival; the same share;
- *cell*: the result is a scene of x' and y'. One cell of the query's left half is picked, the one
  with the most evidence for x', or every one in turn: share of what it matches on the left, and how
  often the best matching cell lies there.

*centred* is the default: what the average image shares is put apart.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from measuring import explaining, figure, right
from photographs import (
    SIZE,
    Pictures,
    forward,
    loaded,
    make_scenes,
    read_pictures,
    train_head,
)

from embedcam import EmbedcamError, load_network
from embedcam.pairs import PooledSide, make_comparison, make_receipt


def main() -> None:
    options = _arguments()
    texts = [f"# Receipts measured\n\n```\n{__doc__.strip()}\n```\n"]
    try:
        for folder in options.data:
            texts.append(measure(folder, options.weights))
            print(texts[-1])
    except EmbedcamError as error:
        sys.exit(f"pairs: {error}")
    if options.output:
        options.output.write_text("\n".join(texts))
        print(f"written to {options.output}")


def measure(folder: Path, weights: Path) -> str:
    """The tables of one data set."""
    network = load_network(
        "torchvision:mobilenet_v2", weights=weights, size=SIZE, resize="squash", channels_last=True
    )
    pictures = read_pictures(folder)
    classes = sorted(set(pictures.labels))
    seen = np.isin(pictures.labels, classes[: len(classes) // 2])
    paths = [path for path, old in zip(pictures.paths, seen, strict=True) if not old]
    unseen = Pictures(paths, pictures.labels[~seen], pictures.regions[~seen])
    everything = forward(network, loaded(pictures.paths), len(seen), (SIZE, SIZE), folder.name)
    maps, pooled = everything.activations[~seen], everything.pooled[~seen]
    scenes = make_scenes(unseen, network)
    lines = [f"## {folder.name}", ""]
    for name in ("reference", "frozen"):
        matrix = None
        if name == "reference":
            matrix = train_head(everything.pooled[seen], pictures.labels[seen])
        rows = _rows(unseen.labels, maps, pooled, scenes, matrix)
        lines += [
            f"{name.capitalize()} embedding:",
            "",
            "| evidence | share on the right side | right |",
            "|---|---|---|",
            *(f"| {what} | {figure(np.array(shares))} | {right(np.array(shares))} |"
              for what, shares in rows.items()),
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def _rows(labels, maps, pooled, scenes, matrix) -> dict[str, list[float]]:
    """Shares by what was measured."""

    def side(activations: np.ndarray) -> PooledSide:
        vector = activations.astype(np.float64).mean((1, 2))
        z = vector if matrix is None else matrix.astype(np.float64) @ vector
        return PooledSide(activations, z / np.linalg.norm(z), np.linalg.norm(z), matrix)

    z = pooled if matrix is None else pooled @ matrix.T
    embeddings = z / np.linalg.norm(z, axis=1, keepdims=True)
    mean = embeddings.mean(0)
    own = explaining(embeddings, labels, scenes.explained)
    other = explaining(embeddings, labels, scenes.other)
    found: dict[str, list[float]] = {}
    # Upright scenes only: a mirrored one tells nothing new of cells.
    for number in np.flatnonzero(scenes.left).tolist():
        query = side(scenes.activations[number].astype(np.float32))
        x, y = (maps[n].astype(np.float32) for n in (own[number], other[number]))
        result, rival, both = side(x), side(y), side(np.concatenate([x, y], axis=2))
        for centred in (True, False):
            kind = "centred" if centred else "not centred"
            first = make_receipt(query, result, mean, centred=centred)
            found.setdefault(f"map, {kind}", []).append(_share(first.query.cells))
            pair = make_receipt(query, both, mean, centred=centred)
            matrix_of_cells = pair.matrix()
            half = first.query.cells[:, : first.query.cells.shape[1] // 2]
            peak = np.unravel_index(half.argmax(), half.shape)
            best = matrix_of_cells[peak]
            found.setdefault(f"cell with most evidence, {kind}", []).append(_share(best))
            found.setdefault(f"its best match, {kind}", []).append(_on_left(best))
            every = [matrix_of_cells[place] for place in np.ndindex(*half.shape)]
            shares = [_share(one) for one in every]
            found.setdefault(f"every cell, {kind}", []).append(float(np.mean(shares)))
            best_of = [_on_left(one) for one in every]
            found.setdefault(f"their best matches, {kind}", []).append(float(np.mean(best_of)))
        second = make_receipt(query, rival, mean)
        above = make_comparison(query, make_receipt(query, result, mean), second, "l2")
        found.setdefault("above", []).append(_share(above.query.cells))
    return dict(sorted(found.items(), key=lambda row: ("not" in row[0], row[0])))


def _share(cells: np.ndarray) -> float:
    """Share of the positive evidence on the left half; 0.5 where there is none."""
    positive = np.maximum(cells, 0)
    total = positive.sum()
    return float(positive[:, : cells.shape[1] // 2].sum() / total) if total > 0 else 0.5


def _on_left(cells: np.ndarray) -> float:
    return float(np.unravel_index(cells.argmax(), cells.shape)[1] < cells.shape[1] // 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", type=Path, required=True, help="MobileNetV2's, .safetensors")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
