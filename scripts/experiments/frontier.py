"""The frontier: covering one object against telling two apart, which the default was chosen on.

Every figure is of the signed map (before the ReLU) unless it says *drawn*, so that no change of
contrast moves it; brackets are 95% bootstrap intervals over pictures.

- pictures of one object (birds and objects): the same recipes as in the experiment `truth`, alone
  (*single*) and two photographs side by side (*pasted*);
- *natural*: real pictures with objects of several classes (`several/`) against an index of others
  (`single/`). A case is an ordered pair of its classes c, d that the index knows, each with at
  least 2% of the picture in its boxes alone; weights of the nearest result of class c (without
  labels: of the five nearest). *c / d*: AUC of pixels of c alone against those of d alone;
  *c / rest*: of c's boxes against the rest; *equal areas*: c's share of the drawn map in both, each
  brought to the same area; *right*: how often c is the denser one;
- *a rival named*: `explain(query, result=A, above=B)`, A and B the nearest results of c and of d:
  the difference of their weights, each at length 1;
- *detail 2*: the same with the query's map joined from 224 and 448 pixels.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcam import Recipe
from embedcam.metrics import bootstrap_interval, box_mask, equal_area_share, pixel_auc
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.ops import joined, resize, signed_cam
from embedcam.targets import through_norm

from ..benchmarks.timing import table
from . import truth
from .data import (
    SIZE,
    Cache,
    data_arguments,
    frozen_network,
    read_pictures,
    squashed,
    unit,
)

STEP, LEAST, NEIGHBORS, BLOCK = 4, 0.02, 5, 64
"""Every so many pixels are ordered; a class alone needs so much; results without labels."""
COLUMNS = ("weights", "c / d", "c / rest", "drawn: c / d", "c / rest", "equal areas", "right")
DEFAULT = "**distinctive: the default**"
arguments = data_arguments


class Embedded(NamedTuple):
    """Pictures that explain: unit embeddings `[N D]`, labels as codes `[N]`."""

    embeddings: np.ndarray
    codes: np.ndarray | None

    def weights(self, recipe: Recipe) -> np.ndarray:
        """Return Grad-CAM weights `[N D]` by a recipe, but for the number of positions."""
        anchors = AnchorCotangents(recipe, self.embeddings, self.codes, self.embeddings.mean(0))
        values = anchors.of(np.arange(len(self.embeddings))).values
        if recipe.head_norm == "through":
            values = through_norm(values, self.embeddings, np.ones(len(values), np.float32))
        return values.astype(np.float32)


def mean_activation(one: Embedded) -> np.ndarray:
    return np.ones_like(one.embeddings)


def paper(one: Embedded) -> np.ndarray:
    weights = one.weights(Recipe.paper(encoding="dense"))
    return np.where(weights >= np.sort(weights, axis=1)[:, -50:][:, :1], weights, 0)


ROWS: dict[str, Recipe | Callable[[Embedded], np.ndarray]] = {
    "mean activation": mean_activation,
    "the paper: 50 triplets, top 50": paper,
    "margin, one triplet, through": Recipe(target="margin", triplets=1),
    "margin, 50 triplets, through": Recipe(target="margin", triplets=50),
    "margin, through": Recipe(target="margin"),
    "margin, around": Recipe(target="margin", norm="around"),
    "centred, around": Recipe(target="centred", norm="around"),
    "discriminant, through": Recipe(target="discriminant"),
    "discriminant, around": Recipe(target="discriminant", norm="around"),
    "distinctive, around": Recipe(norm="around"),
    DEFAULT: Recipe(),
}
UNLABELED = ("margin, through", "margin, around", "centred, around", "discriminant, through")


def weights_of(row: str, one: Embedded) -> np.ndarray:
    """Return the weights `[N K]` of a row."""
    made = ROWS[row]
    return one.weights(made) if isinstance(made, Recipe) else made(one)


class Case(NamedTuple):
    """An ordered pair of classes in a picture: pixels of either alone, and of the first's boxes."""

    picture: int
    label: str
    rival: str
    alone: np.ndarray
    other: np.ndarray
    boxes: np.ndarray


class Natural:
    """Real pictures of several objects, explained by pictures of one."""

    def __init__(self, folder: Path, weights: str, cache: Path | None) -> None:
        network = frozen_network(weights)
        indexed, asked = read_pictures(folder / "single"), read_pictures(folder / "several")
        kept = Cache(cache, network, [*indexed.paths, *asked.paths])

        def views(name: str, paths: list[Path], side: int) -> tuple[np.ndarray, np.ndarray]:
            found = kept.features(
                f"natural-{name}", lambda at: squashed(paths[at], side), len(paths), (side, side)
            )
            return found.activations, found.pooled

        self.labels = indexed.labels
        pooled = unit(views("single", indexed.paths, SIZE)[1])
        self.one = Embedded(pooled, label_codes(self.labels.tolist()))
        self.activations, pooled = views("several", asked.paths, SIZE)
        self.finer, _ = views("several", asked.paths, 2 * SIZE)
        self.queries = unit(pooled)
        self.similar = self.queries @ self.one.embeddings.T
        every = regions(folder / "several")
        self.cases = [
            case
            for number, path in enumerate(asked.paths)
            for case in cases(number, every[path], set(self.labels))
        ]
        self.pictures = np.array([case.picture for case in self.cases])

    def scored(
        self,
        weights: np.ndarray,
        detail: int,
        neighbors: int = 1,
        on_query: bool = False,
        above: bool = False,
    ) -> list[str]:
        """Return figures of weights `[N K]`, a column each.

        `on_query` takes them through the norm at the query, as a gradient computed there is;
        `above` subtracts those of the rival's nearest results.
        """  # fmt: skip
        at_one = weights / np.linalg.norm(weights, axis=1, keepdims=True)

        def nearest(label: str, case: Case) -> np.ndarray:
            near = np.where(self.labels == label, self.similar[case.picture], -9)
            mean: np.ndarray = at_one[np.argsort(-near, kind="stable")[:neighbors]].mean(0)
            return mean

        columns = []
        for start in range(0, len(self.cases), BLOCK):
            some = self.cases[start : start + BLOCK]
            asked = [case.picture for case in some]
            drawing = np.stack([nearest(case.label, case) for case in some])
            if above:
                drawing -= np.stack([nearest(case.rival, case) for case in some])
            if on_query:
                lengths = np.ones(len(some), np.float32)
                drawing = through_norm(drawing, self.queries[asked], lengths)
            grid = _signed(self.activations[asked], drawing)
            if detail == 2:
                grid = joined(grid, _signed(self.finer[asked], drawing))
            alone, other, boxes = (np.stack(one) for one in list(zip(*some, strict=True))[3:])
            sparse, aucs = np.s_[:, ::STEP, ::STEP], []
            for full in (resize(one, (SIZE, SIZE)) for one in (grid, np.maximum(grid, 0))):
                aucs.append(pixel_auc(full[sparse], alone[sparse], other[sparse]))
                aucs.append(pixel_auc(full[sparse], boxes[sparse]))
            share = equal_area_share(full, alone, other)
            columns.append([*aucs, share, (share > 0.5) + 0.5 * (share == 0.5)])
        return [self._figure(column) for column in np.concatenate(columns, axis=1)]

    def _figure(self, column: np.ndarray) -> str:
        _, places, counts = np.unique(self.pictures, return_inverse=True, return_counts=True)
        sums = np.bincount(places, column)

        def mean(picked: np.ndarray, axis: int) -> np.ndarray:
            picked = picked.astype(int)
            total: np.ndarray = sums[picked].sum(axis) / counts[picked].sum(axis)
            return total

        low, high = bootstrap_interval(np.arange(len(counts)), mean)
        return f"{column.mean():.3f} [{low:.3f}, {high:.3f}]"


def regions(folder: Path) -> dict[Path, list[tuple[str, np.ndarray]]]:
    """Return label and mask `[224 224]` of every line of annotations, by picture."""
    by_picture: dict[Path, list[tuple[str, np.ndarray]]] = {}
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            across, down = SIZE / float(row["width"]), SIZE / float(row["height"])
            x0, x1 = (round(float(row[name]) * across) for name in ("x0", "x1"))
            y0, y1 = (round(float(row[name]) * down) for name in ("y0", "y1"))
            inside = box_mask((x0, y0, x1, y1), (SIZE, SIZE)) >= 0.5
            by_picture.setdefault(folder / row["path"], []).append((row["label"], inside))
    return by_picture


def cases(number: int, boxes: list[tuple[str, np.ndarray]], known: set[str]) -> Iterator[Case]:
    """Yield the ordered pairs of classes of a picture."""
    masks: dict[str, np.ndarray] = {}
    for label, mask in boxes:
        if label in known:
            masks[label] = masks.get(label, False) | mask
    for c in masks:
        for d in masks:
            alone, other = masks[c] & ~masks[d], masks[d] & ~masks[c]
            if c != d and min(alone.mean(), other.mean()) >= LEAST:
                yield Case(number, c, d, alone, other, masks[c])


def _signed(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    blocks = (slice(start, start + 128) for start in range(0, len(weights), 128))
    maps = [signed_cam(weights[rows], activations[rows].astype(np.float32)) for rows in blocks]
    return np.concatenate(maps)


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables; folders with `several/` are natural, the others of single objects."""
    named = {name: Recipe.paper() if made is paper else made for name, made in ROWS.items()}
    recipes = {name: made for name, made in named.items() if isinstance(made, Recipe)}
    posed = [("Single and pasted", {**truth.OBJECTS, "recipes": recipes})]
    for folder in options.data:
        if (folder / "several").is_dir():
            yield from natural_tables(Natural(folder, options.weights, options.cache))
        else:
            yield from truth.of_folder(options, folder, posed)


def natural_tables(natural: Natural) -> Iterator[str]:
    """Yield the tables of real pictures: at one view, joined from two, without labels."""
    one, pictures = natural.one, len(set(natural.pictures))
    for detail in (1, 2):
        rows = [[name, *natural.scored(weights_of(name, one), detail)] for name in ROWS]
        rows += [
            ["the default, a rival named: the nearest of d",
             *natural.scored(one.weights(Recipe()), detail, above=True)],
            ["Grad-CAM of the cosine to the result, computed on the query",
             *natural.scored(one.embeddings, detail, on_query=True)],
        ]  # fmt: skip
        what = "detail 2" if detail == 2 else f"{len(natural.cases)} cases in {pictures} pictures"
        yield f"## Natural, {what}\n\n{table(COLUMNS, rows)}"
    unlabeled = one._replace(codes=None)
    rows = [
        [name, *natural.scored(weights_of(name, unlabeled), 1, NEIGHBORS)]
        for name in (*UNLABELED, DEFAULT)
    ]
    yield f"## Natural, an index without labels, five nearest of c\n\n{table(COLUMNS, rows)}"
