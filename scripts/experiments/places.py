"""What do the five best pairs of places carry, and do they lie on the object?

Frozen MobileNetV2, pictures squashed to 224 x 224, maps of 7 x 7. Of birds20 and objects24 every
picture is a query and the nearest other one its result; of natural the pictures of several classes
are the queries and the nearest one of a single class is the result. The mean embedding is that of
the indexed pictures.

- *five*, *three*, *best*: share of the similarity beyond the shared part (as the receipt has it)
  that so many pairs of regions carry, median over the queries [quartiles]. A region takes at most
  15% of its picture, all together at most 40%.
- *above 1*: of how many queries the five carry more than all there is; the other places then speak
  against the match.
- *both centred*: of the same places, where two positions give (v - m / n) . (v' - m / n'), as
  `receipt.point` shows them; over all of them this is (f - m) . (f' - m).
- *on the object*: the share of the regions' area in the boxes of the object, weighted by what each
  pair gives; of natural's queries in the boxes of the result's class, where it has any. *area*: the
  share of the picture that those boxes take.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embedcam.pairs import PooledSide, covered, make_receipt

from ..benchmarks.timing import table
from .data import Features, Pictures, data_arguments, frozen_features, frozen_network, unit

GRID = (7, 7)
arguments = data_arguments


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of all folders."""
    network, rows = frozen_network(options.weights), []
    for folder in options.data:
        parts = [folder / "several", folder / "single"]
        parts = parts if parts[0].is_dir() else [folder, folder]
        read = [frozen_features(part, network, options.cache)[:2] for part in parts]
        rows.append([folder.name, *_row(*map(_Set, parts, *zip(*read, strict=True)))])
    columns = ("five", "three", "best", "above 1", "both centred")
    yield table(("", *columns, "on the query's object (area)", "the result's (area)"), rows)


class _Set:
    """Pictures, their features and how much of each position lies in the boxes of a label."""

    def __init__(self, folder: Path, pictures: Pictures, features: Features) -> None:
        self.paths, self.labels = pictures.paths, pictures.labels
        self.activations = features.activations
        self.embeddings = unit(features.pooled)
        self._boxes: dict[tuple[Path, str], list[np.ndarray]] = defaultdict(list)
        with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                size = int(row["width"]), int(row["height"])
                box = [float(row[end]) for end in ("x0", "y0", "x1", "y1")]
                share = covered(box, size, (0, 0, *size), GRID)
                self._boxes[folder / row["path"], row["label"]].append(share)

    def side(self, number: int) -> PooledSide:
        activations = self.activations[number].astype(np.float32)
        pooled = activations.astype(np.float64).mean((1, 2))
        norm = float(np.linalg.norm(pooled))
        return PooledSide(activations, pooled / norm, norm, None)

    def objects(self, number: int, label: str) -> np.ndarray | None:
        boxes = self._boxes.get((self.paths[number], label))
        return None if boxes is None else np.max(boxes, axis=0)


def _row(queries: _Set, index: _Set) -> list[str]:
    found: dict[str, list[float]] = defaultdict(list)
    mean = index.embeddings.mean(0).astype(np.float64)
    for number, embedding in enumerate(queries.embeddings):
        near = index.embeddings @ embedding
        if queries.paths == index.paths:
            near[number] = -1
        other = int(near.argmax())
        query, result = queries.side(number), index.side(other)
        receipt = make_receipt(query, result, mean)
        places = receipt.places()
        gains = np.array([place.contribution for place in places])
        beyond = receipt.similarity - receipt.shared
        for name, n in (("five", 5), ("three", 3), ("best", 1)):
            found[name].append(gains[:n].sum() / beyond)
        centred = receipt.matrix()
        sums = [centred[place.query][:, place.result].sum() for place in places]
        found["both"].append(sum(sums) / beyond)
        label = index.labels[other]
        sides = {"query": queries.objects(number, label), "result": index.objects(other, label)}
        for of, inside in sides.items():
            if inside is not None and len(places):
                each = [inside[getattr(place, of)].mean() for place in places]
                found[of].append(float(np.average(each, weights=gains)))
                found[f"area of {of}"].append(float(inside.mean()))
    above = np.mean(np.array(found["five"]) > 1)
    return [
        *(_quartiles(found[name]) for name in ("five", "three", "best")),
        f"{above:.2f}",
        _quartiles(found["both"]),
        *(
            f"{np.mean(found[of]):.2f} ({np.mean(found[f'area of {of}']):.2f})"
            for of in ("query", "result")
        ),
    ]


def _quartiles(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
