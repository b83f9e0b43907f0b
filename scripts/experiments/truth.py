"""Do the maps point at the right object? `evaluate_index` on unseen classes, method beside method.

- *reference*: frozen MobileNetV2, layer `features`, average pool, Linear(1280, 128) trained on the
  first half of the classes; *frozen*: the pooled vector itself;
- the second half of the classes is indexed and asked about, a picture never by itself; of a folder
  with `single/` and `several/` the first is indexed and the second, real pictures with objects of
  several classes, asked about;
- one object: the box against the rest; two objects: pairs of pictures side by side and boxes of
  several labels, each asked about with one result of its label. Measures, baselines and intervals
  are those of `embedcam evaluate` (docs/evaluation.md).

*recipes*: targets, norms and encodings; *methods*: every method, on the query itself; *targets*:
those the default was chosen among; *transfer*: one and five neighbors, by mean and by distance,
and how alike transferred maps are to the query's own.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcam import METHODS, EmbeddingNetwork, Recipe, build_index, evaluate_index
from embedcam.evaluate.report import intro, tables
from embedcam.images import ImageSource
from embedcam.recipe import WHITENED

from ..benchmarks.timing import table
from .data import (
    data_arguments,
    frozen_network,
    name_of,
    read_pictures,
    reference_head,
    reference_network,
)

OBJECTS = {"measures": ("retrieval", "localisation", "objects"), "examples": 0}


def arguments(parser: argparse.ArgumentParser) -> None:
    data_arguments(parser)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help="of the table of methods; default: all")
    parser.add_argument("--pictures", type=int, default=100, help="sampled with methods (100)")
    parser.add_argument("--scenes", type=int, default=500, help="pairs side by side (500)")


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of each folder under both embeddings."""
    chosen = [table for what in options.tables for table in TABLES[what](options)]
    for folder in options.data:
        yield from of_folder(options, folder, chosen)


Table = tuple[str, dict[str, Any]]
"""A title, and what `evaluate_index` is asked for."""


def of_folder(options: argparse.Namespace, folder: Path, tables: Sequence[Table]) -> Iterator[str]:
    """Yield tables of a folder under both embeddings."""
    for kind in ("reference", "frozen"):
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            network = frozen_network(options.weights)
            if kind == "reference":
                matrix = reference_head(_single(folder), options.weights, options.cache)
                network = reference_network(options.weights, matrix, scratch)
            indexed, asked, boxes = sources(folder)
            path = scratch / "index"
            build_index(indexed, network, path, Recipe(), trust=False, progress=False)
            yield f"## {name_of(folder)}, {kind} embedding\n"
            for title, choices in tables:
                yield evaluated(title, path, asked, network, boxes, choices)


def evaluated(
    title: str,
    path: Path,
    asked: ImageSource,
    network: EmbeddingNetwork,
    boxes: Path,
    choices: dict[str, Any],
) -> str:
    """Evaluate an index and return its tables as Markdown."""
    summary = evaluate_index(path, asked, network, boxes=boxes, progress=False, **choices).summary
    parts = [f"### {title}\n", f"{intro(summary)}\n"]
    for one in tables(summary):
        parts += [f"*{one.caption}*\n", table(one.header, one.rows)]
    return "\n".join(parts)


def sources(folder: Path) -> tuple[ImageSource, ImageSource, Path]:
    """Return what is indexed, what is asked about, and the file of its boxes."""
    single, several = _single(folder), folder / "several"
    pictures = read_pictures(single)
    if several.is_dir():
        asked = read_pictures(several).source(several, labeled=False)
        return pictures.source(single), asked, several / "annotations.csv"
    unseen = pictures.some(~pictures.seen()).source(folder)
    return unseen, unseen, folder / "annotations.csv"


def _single(folder: Path) -> Path:
    return folder / "single" if (folder / "several").is_dir() else folder


def _recipes(options: argparse.Namespace) -> Iterator[Table]:
    made = {}
    for norm in ("through", "around"):
        for method in ("gradcam", "gradcam++"):
            base = Recipe(method=method, target="margin", norm=norm, sampling="random")
            made[f"{method}, one triplet, {norm}"] = replace(base, triplets=1)
            made[f"{method}, 50 triplets, {norm}"] = replace(base, triplets=50)
        made[f"all triplets, {norm}"] = Recipe(target="margin", norm=norm, sampling="all")
    yield "Triplets", {**OBJECTS, **_sizes(options), "recipes": made}
    encodings = {
        "dense": Recipe(encoding="dense"),
        "low-rank 128": Recipe(encoding="low-rank"),
        "top 50 signed": Recipe(encoding="top-m", by="signed", m=50),
        "top 50 magnitude": Recipe(encoding="top-m", by="magnitude", m=50),
        "the paper": Recipe.paper(),
    }
    yield "Encodings", {**OBJECTS, **_sizes(options), "recipes": encodings}


def _targets(options: argparse.Namespace) -> Iterator[Table]:
    made = {
        f"{target}, {norm}": Recipe(target=target, norm=norm)
        for target in ("margin", "centred", *WHITENED)
        for norm in ("through", "around")
    }
    yield "Targets", {**OBJECTS, **_sizes(options), "recipes": made}


def _methods(options: argparse.Namespace) -> Iterator[Table]:
    names = [n for n, one in METHODS.items() if not (one.trained or one.attends or n == "polycam")]
    sizes = {"limit": options.pictures, "faithfulness": options.pictures}
    sizes["scenes"] = min(options.scenes, options.pictures)
    yield "Methods", {**OBJECTS, **sizes, "methods": options.methods or names}


def _transfer(options: argparse.Namespace) -> Iterator[Table]:
    measures = ("localisation", "fidelity")
    for count, transfer in ((1, "mean"), (5, "mean"), (5, "distance")):
        choices = {"measures": measures, "n_neighbors": count, "transfer": transfer, "examples": 0}
        yield f"{count} nearest, {transfer}", {**choices, "controls": False, "fidelity": 500}


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    return {"faithfulness": 10_000, "scenes": options.scenes}


TABLES = {
    "recipes": _recipes, "targets": _targets, "methods": _methods, "transfer": _transfer,
}  # fmt: skip
