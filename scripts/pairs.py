"""Do receipts point at what matched? Scenes of two photographs, and cells matched one by one.

    python scripts/pairs.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

The data, the split and the two embeddings are those of scripts/truth.py. 500 scenes of two unseen
pictures of different classes, x on the left and y on the right; x' and y' are the nearest other
pictures of the same classes.

- *map*: the scene is the query and x' the result. *AUC*: of its signed evidence, cells on the left
  against those on the right; *share*: of the positive evidence on the left, *right*: how often it
  is more; no change of contrast moves the first and the last;
- *above*: the scene is the query, x' the result, y' the rival; the same;
- *mean activation*: the plain mean of the query's channels, no explanation at all;
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
from paper.bench import Bench, read_bench

from embedcam import EmbedcamError
from embedcam.metrics import pixel_auc
from embedcam.pairs import PooledSide, make_comparison, make_receipt


def main() -> None:
    options = _arguments()
    texts = [f"# Receipts measured\n\n```\n{__doc__.strip()}\n```\n"]
    try:
        for folder in options.data:
            bench = read_bench(folder, options.weights, options.cache)
            lines = [f"## {bench.name}", ""]
            for name, one in (("Reference", bench), ("Frozen", bench.frozen())):
                lines += [
                    f"{name} embedding:", "",
                    "| evidence | AUC | share on the right side | right |", "|---|---|---|---|",
                    *_lines(one), "",
                ]  # fmt: skip
            texts.append("\n".join(lines))
            print(texts[-1], flush=True)
    except EmbedcamError as error:
        sys.exit(f"pairs: {error}")
    if options.output:
        options.output.write_text("\n".join(texts), encoding="utf-8")
        print(f"written to {options.output}")


def _lines(bench: Bench) -> list[str]:
    """Rows of the table as Markdown."""
    found = {name: np.array(values) for name, values in _scores(bench).items()}
    order = sorted(found, key=lambda name: (name != "mean activation", "not" in name, name))
    lines = []
    for name in order:
        values = found[name]
        area = "" if values.ndim == 1 else figure(values[:, 0])
        share = values if values.ndim == 1 else values[:, 1]
        lines.append(f"| {name} | {area} | {figure(share)} | {right(share)} |")
    return lines


def _scores(bench: Bench) -> dict[str, list]:
    """By what was measured, AUC and share of each scene; of a best match its share alone."""
    matrix = bench.head.matrix.astype(np.float64)
    mean, scenes = bench.mean, bench.scenes
    other = explaining(bench.embeddings, bench.unseen.labels, scenes.other)

    def side(activations: np.ndarray) -> PooledSide:
        z = matrix @ activations.astype(np.float64).mean((1, 2))
        return PooledSide(activations, z / np.linalg.norm(z), np.linalg.norm(z), bench.head.matrix)

    found: dict[str, list] = {}
    # Upright scenes only: a mirrored one tells nothing new of cells.
    for number in np.flatnonzero(scenes.left).tolist():
        query = side(scenes.activations[number])
        x, y = (bench.gallery.activations[n] for n in (bench.given[number], other[number]))
        result, rival, both = side(x), side(y), side(np.concatenate([x, y], axis=2))
        plain = scenes.activations[number].mean(0)
        found.setdefault("mean activation", []).append(_score(plain[None])[0])
        for centred in (True, False):
            kind = "centred" if centred else "not centred"
            first = make_receipt(query, result, mean, centred=centred)
            found.setdefault(f"map, {kind}", []).append(_score(first.query.cells[None])[0])
            matches = make_receipt(query, both, mean, centred=centred).matrix()
            half = first.query.cells[:, : first.query.cells.shape[1] // 2]
            peak = np.unravel_index(half.argmax(), half.shape)
            best = matches[peak]
            found.setdefault(f"cell with most evidence, {kind}", []).append(_score(best[None])[0])
            found.setdefault(f"its best match, {kind}", []).append(_on_left(best))
            every = np.stack([matches[place] for place in np.ndindex(*half.shape)])
            found.setdefault(f"every cell, {kind}", []).append(_score(every).mean(0))
            best_of = [_on_left(one) for one in every]
            found.setdefault(f"their best matches, {kind}", []).append(float(np.mean(best_of)))
        receipts = (make_receipt(query, one, mean) for one in (result, rival))
        above = make_comparison(query, *receipts, "l2")
        found.setdefault("above", []).append(_score(above.query.cells[None])[0])
    return found


def _score(cells: np.ndarray) -> np.ndarray:
    """Of evidence `[n h w]`, AUC of the left half against the right one, and the share of what is
    positive on the left, 0.5 where nothing is: `[n 2]`."""
    positive, half = np.maximum(cells, 0), cells.shape[2] // 2
    left = np.zeros(cells.shape, bool)
    left[:, :, :half] = True
    total = positive.sum((1, 2))
    inside = positive[:, :, :half].sum((1, 2))
    share = np.where(total > 0, inside / np.where(total > 0, total, 1), 0.5)
    return np.stack([pixel_auc(cells, left), share], axis=1)


def _on_left(cells: np.ndarray) -> float:
    return float(np.unravel_index(cells.argmax(), cells.shape)[1] < cells.shape[1] // 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", type=Path, required=True, help="MobileNetV2's, .safetensors")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--cache", type=Path, help="folder where frozen features are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
