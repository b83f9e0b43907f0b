"""Covering the object against telling two apart: the frontier the default target was chosen on.

    python scripts/frontier.py DATA/birds20 DATA/objects24 DATA/natural \\
        --weights mobilenet_v2_imagenet.safetensors --output docs/results/frontier.md --cache CACHE

Every figure is of the signed map (before the ReLU) unless it says *drawn*, so that no change of
contrast moves it; brackets are 95% bootstrap intervals over pictures.

- *single*: pixel AUC of the box or mask against the rest, pictures of one object of unseen classes
  drawn with their own weights: birds / objects, by the frozen pooled vector and by the reference
  embedding of scripts/truth.py;
- *pasted*: two photographs side by side, AUC of one side against the other, with the weights of the
  nearest other picture of the explained one's class: the same four;
- *natural*: real pictures with objects of several classes (DATA/natural/several) against an index
  of others (DATA/natural/single). A case is an ordered pair of its classes c, d that the index
  knows, each with at least 2% of the picture in its boxes alone; weights of the nearest result of
  class c (without labels: of the five nearest). *c / d*: AUC of pixels of c alone against those of
  d alone; *c / rest*: of c's boxes against the rest; *equal areas*: c's share of the drawn map in
  both, each brought to the same area; *right*: how often c is the denser one;
- *a rival named*: `explain(query, result=A, above=B)`, A and B the nearest results of c and of d:
  the difference of their weights, each at length 1;
- *detail 2*: the same with the query's map joined from 224 and 448 pixels.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from paper.bench import Bench, data_arguments, frozen_network, read_bench
from paper.cache import Cache
from photographs import SIZE, STEP, Features, read_pictures
from PIL import Image

from embedcam import EmbedcamError, Recipe
from embedcam.images import read_image
from embedcam.metrics import bootstrap_interval, box_mask, equal_area_share, pixel_auc
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.ops import joined, resize
from embedcam.targets import through_norm

LEAST, NEIGHBORS = 0.02, 5
"""A class alone needs so much of a picture; results that explain without labels."""


@dataclass(frozen=True)
class Set:
    """Embeddings that explain.

    Args:
        embeddings: f, unit length, `[N D]`.
        codes: labels as numbers, `[N]`.
        matrix: W of the head, `[D K]`.
    """

    embeddings: np.ndarray
    codes: np.ndarray
    matrix: np.ndarray

    @classmethod
    def of_bench(cls, bench: Bench) -> "Set":
        """A bench's own."""
        return cls(bench.embeddings, bench.codes, bench.head.matrix)

    def weights(self, cotangents: np.ndarray) -> np.ndarray:
        """Grad-CAM weights `[N K]` of dy/dz `[N D]`, but for the number of cells."""
        return cotangents.astype(np.float32) @ self.matrix

    def of(self, recipe: Recipe, labelled: bool = True) -> np.ndarray:
        """Weights by a recipe."""
        codes = self.codes if labelled else None
        mean = self.embeddings.mean(0)
        found = AnchorCotangents(recipe, self.embeddings, codes, mean)
        values = found.of(np.arange(len(self.codes))).values
        if recipe.head_norm == "through":
            values = through_norm(values, self.embeddings, np.ones(len(values), np.float32))
        return self.weights(values)


Row = Callable[[Set], np.ndarray]


def rows() -> dict[str, Row]:
    """What is drawn with: weights `[N K]` of a set, by name."""

    def recipe(**choices: str | int) -> Row:
        return lambda one: one.of(Recipe(**choices))

    def paper(one: Set) -> np.ndarray:
        weights = one.of(Recipe.paper(encoding="dense"))
        least = -np.sort(-weights, axis=1)[:, 49:50]
        return np.where(weights >= least, weights, 0)

    return {
        "mean activation": lambda one: np.ones((len(one.codes), one.matrix.shape[1]), np.float32),
        "the paper: 50 triplets, top 50": paper,
        "margin, one triplet, through": recipe(target="margin", triplets=1),
        "margin, 50 triplets, through": recipe(target="margin", triplets=50),
        "margin, through": recipe(target="margin"),
        "margin, around": recipe(target="margin", norm="around"),
        "centred, around": recipe(target="centred", norm="around"),
        "discriminant, through": recipe(target="discriminant"),
        "discriminant, around": recipe(target="discriminant", norm="around"),
        "distinctive, around": recipe(norm="around"),
        "**distinctive: the default**": recipe(),
    }


UNLABELLED: dict[str, Row] = {
    "margin, through": lambda one: one.of(Recipe(target="margin"), False),
    "margin, around": lambda one: one.of(Recipe(target="margin", norm="around"), False),
    "centred, around": lambda one: one.of(Recipe(target="centred", norm="around")),
    "discriminant, through": lambda one: one.of(Recipe(target="discriminant"), False),
    "**distinctive: the default**": lambda one: one.of(Recipe(), False),
}
"""The same where the index has no labels."""


@dataclass(frozen=True)
class Case:
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
        indexed = read_pictures(folder / "single")
        boxes = _boxes(folder / "several")
        kept = Cache(cache, network, [*indexed.paths, *boxes])
        one = self._features(kept, "single", indexed.paths, SIZE)
        paths = list(boxes)
        self.views = [self._features(kept, "several", paths, side) for side in (SIZE, 2 * SIZE)]
        self.labels = indexed.labels
        codes = label_codes(list(indexed.labels))
        assert codes is not None
        f = one.pooled / np.linalg.norm(one.pooled, axis=1, keepdims=True)
        self.set = Set(f, codes, np.eye(f.shape[1], dtype=np.float32))
        pooled = self.views[0].pooled
        self.queries = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        self.similar = self.queries @ f.T
        self.cases = list(self._cases(boxes))

    @staticmethod
    def _features(kept: Cache, name: str, paths: list[Path], side: int) -> Features:
        def picture(number: int) -> Image.Image:
            return read_image(paths[number]).resize((side, side), Image.Resampling.BILINEAR)

        return kept.features(f"natural-{name}", picture, len(paths), (side, side))

    def _cases(self, boxes: dict[Path, list[tuple[str, np.ndarray]]]) -> Iterator[Case]:
        known = set(self.labels)
        for number, found in enumerate(boxes.values()):
            masks: dict[str, np.ndarray] = {}
            for label, mask in found:
                masks[label] = masks.get(label, np.zeros_like(mask)) | mask
            names = [label for label in masks if label in known]
            for c in names:
                for d in names:
                    alone, other = masks[c] & ~masks[d], masks[d] & ~masks[c]
                    if c != d and min(alone.mean(), other.mean()) >= LEAST:
                        yield Case(number, c, d, alone, other, masks[c])

    def scored(
        self,
        weights: np.ndarray,
        neighbors: int,
        detail: int,
        on_query: bool = False,
        above: bool = False,
    ) -> np.ndarray:
        """c / d, c / rest, drawn c / d and c / rest, equal areas, right: `[cases 6]`.

        With `on_query` the weights are taken through the norm at the query, as a gradient that is
        computed for each query is; with `above` those of d's nearest results are subtracted.
        """
        unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)

        def of(label: str, case: Case) -> np.ndarray:
            order = np.where(self.labels == label, self.similar[case.picture], -9)
            mean: np.ndarray = unit[np.argsort(-order, kind="stable")[:neighbors]].mean(0)
            return mean

        found = []
        for case in self.cases:
            drawn = of(case.label, case)
            if above:
                drawn = drawn - of(case.rival, case)
            if on_query:
                drawn = through_norm(drawn, self.queries[case.picture], np.float32(1))
            maps = [
                np.tensordot(drawn, view.activations[case.picture], 1)
                for view in self.views[:detail]
            ]
            grid = maps[0] if detail == 1 else joined(*(one.astype(np.float32) for one in maps))
            both = np.stack([grid, np.maximum(grid, 0)]).astype(np.float32)
            full = resize(both, (SIZE, SIZE))
            every = full[:, ::STEP, ::STEP]
            regions = [np.stack([one[::STEP, ::STEP]] * 2)
                       for one in (case.alone, case.other, case.boxes)]  # fmt: skip
            apart, rest = pixel_auc(every, *regions[:2]), pixel_auc(every, regions[2])
            share = equal_area_share(full[1:], case.alone[None], case.other[None])[0]
            right = float(share > 0.5) + 0.5 * float(share == 0.5)
            found.append([apart[0], rest[0], apart[1], rest[1], share, right])
        return np.array(found)

    def shown(self, values: np.ndarray) -> list[str]:
        """Each column's mean over cases, with an interval over pictures."""
        pictures = np.array([case.picture for case in self.cases])
        places = [np.flatnonzero(pictures == one) for one in np.unique(pictures)]
        counts = np.array([len(some) for some in places])
        cells = []
        for column in values.T:
            sums = np.array([column[some].sum() for some in places])

            def mean(drawn: np.ndarray, axis: int, sums: np.ndarray = sums) -> np.ndarray:
                drawn = drawn.astype(int)
                total: np.ndarray = sums[drawn].sum(axis) / counts[drawn].sum(axis)
                return total

            low, high = bootstrap_interval(np.arange(len(places)), mean)
            cells.append(f"{column.mean():.3f} [{low:.3f}, {high:.3f}]")
        return cells


def _boxes(folder: Path) -> dict[Path, list[tuple[str, np.ndarray]]]:
    """Label and mask `[224 224]` of every box, by picture."""
    found: dict[Path, list[tuple[str, np.ndarray]]] = {}
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
            across, down = SIZE / float(row["width"]), SIZE / float(row["height"])
            box = (round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down))
            mask = box_mask(box, (SIZE, SIZE)) >= 0.5
            found.setdefault(folder / row["path"], []).append((row["label"], mask))
    return found


def shown(values: np.ndarray) -> str:
    """A mean with its interval over pictures."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)]) + "\n"


NATURAL = ["c / d", "c / rest", "drawn: c / d", "c / rest", "equal areas", "right"]
RIVAL = "the default, a rival named: the nearest of d"
ON_QUERY = "Grad-CAM of the cosine to the result, computed on the query"


def measure(posed: dict[str, Bench], natural: Natural) -> tuple[str, dict[str, list[float]]]:
    """The tables, and what the figure shows: single and natural means by row."""
    single, pasted, one, two = [], [], [], []
    points: dict[str, list[float]] = {}
    for name, row in rows().items():
        found = [(each.single(w), each.pasted(w).mean(0)) for each in posed.values()
                 for w in (row(Set.of_bench(each)),)]  # fmt: skip
        weights = row(natural.set)
        plain, fine = (natural.scored(weights, 1, detail) for detail in (1, 2))
        single.append([name, *(shown(values) for values, _ in found)])
        pasted.append([name, *(shown(values) for _, values in found)])
        one.append([name, *natural.shown(plain)])
        two.append([name, *natural.shown(fine)])
        points[name] = [np.mean([values.mean() for values, _ in found]), plain[:, 0].mean()]
        print(f"{name}: measured", file=sys.stderr, flush=True)
    default, cosine = natural.set.of(Recipe()), natural.set.embeddings
    for lines, detail in ((one, 1), (two, 2)):
        for name, values in (
            (RIVAL, natural.scored(default, 1, detail, above=True)),
            (ON_QUERY, natural.scored(cosine, 1, detail, on_query=True)),
        ):
            lines.append([name, *natural.shown(values)])
    without = [
        [name, *natural.shown(natural.scored(row(natural.set), NEIGHBORS, 1))]
        for name, row in UNLABELLED.items()
    ]
    sets = ["weights", *posed]
    pictures = len({case.picture for case in natural.cases})
    texts = [
        "## One object: single\n\n" + table(sets, single),
        "## Two photographs side by side: pasted\n\n" + table(sets, pasted),
        f"## Natural, {len(natural.cases)} cases in {pictures} pictures\n\n"
        + table(["weights", *NATURAL], one),
        "## Natural, detail 2\n\n" + table(["weights", *NATURAL], two),
        "## Natural, an index without labels, five nearest of c\n\n"
        + table(["weights", *NATURAL], without),
    ]
    return "\n".join(texts), points


def draw(points: dict[str, list[float]], path: Path) -> None:
    """The frontier: telling two apart over covering one."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="covers one object (pixel AUC, mean of four sets)",
                              ylabel="tells two apart (natural, c / d)")  # fmt: skip
    for (name, (x, y)), mark in zip(points.items(), "os^Dv<>PX*hd", strict=False):
        default = name.startswith("**")
        colour = "#d55e00" if default else "#0072b2"
        axes.plot(x, y, mark, color=colour, label=name.strip("*"), markersize=9 if default else 7)
    figure.legend(fontsize=8, loc="outside right upper")
    axes.margins(0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = data_arguments(__doc__, "posed folders, and natural last")
    try:
        posed: dict[str, Bench] = {}
        for folder in options.data[:-1]:
            bench = read_bench(folder, options.weights, options.cache)
            posed[f"{folder.name}, frozen"] = bench.frozen()
            posed[f"{folder.name}, reference"] = bench
        natural = Natural(options.data[-1], options.weights, options.cache)
        text, points = measure(posed, natural)
    except EmbedcamError as error:
        sys.exit(f"frontier: {error}")
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        picture = options.output.parent / "figures" / "frontier.png"
        draw(points, picture)
        rules = (__doc__ or "").partition("--cache CACHE\n\n")[2]
        names = " ".join(f"DATA/{folder.name}" for folder in options.data)
        head = (
            "# The frontier\n\nMade by `python scripts/frontier.py "
            f"{names} --weights mobilenet_v2_imagenet.safetensors --output "
            f"docs/results/frontier.md`.\n\n![The frontier](figures/frontier.png)\n\n{rules}\n"
        )
        options.output.write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
