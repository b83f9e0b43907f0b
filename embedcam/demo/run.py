"""The demonstration from end to end: scenes, training, index, explanations, measurement."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .. import evaluate_index  # a user of the public names, as its readers are
from .._files import make_folder, write_whole
from ..errors import InputError, show
from ..explain.explainer import Explainer
from ..images import ImageSource, Item, find_images
from ..index import Index
from ..network import EmbeddingNetwork
from ..offline import build_index
from ..recipe.recipe import Recipe
from ..render import Row, Table, Tile, page, panel
from .digits_network import LAYER, digits_preprocess, load_weights, save_weights, train
from .scenes import SPLITS, TABLE, read_scenes, write_scenes
from .settings import DemoSettings

if TYPE_CHECKING:
    from ..evaluate.settings import Record

_RECORD = "stages.json"
_SCENES = ("seed", "scene_size", "n_gallery", "n_query", "n_pairs")
_TRAINING = (
    "seed", "input_size", "n_train", "steps", "batch_size", "learning_rate", "margin", "channels",
    "embedding_size",
)  # fmt: skip
# Shown: the first two-digit scenes, and the first query of each of these digits.
N_DOUBLES, SINGLES = 3, (3, 8)
NOTES = (
    "Box AUC: how well the signed map tells pixels of the digit's true box from the rest, on "
    "held-out one-digit scenes; chance is 0.5, and no change of contrast moves it. Energy: share "
    "of the drawn map inside, which a sharper map raises. Two digits: the same of the digit that "
    "the given result shows, against the other, and how often it has the larger share. Weights are "
    "the nearest result's, unless transferred from more; of two digits those of one result."
)
_HEADER = ("weights", "box AUC", "energy", "two digits AUC", "share", "right half")
_SCORES = dict(box_auc="auc", energy="energy", side_auc="objects_auc", share="share", right="right")


def run_demo(
    directory: str | Path,
    seed: int = 0,
    progress: bool = True,
    settings: DemoSettings | None = None,
) -> Record:
    """Draw scenes, train a small network, build an index, explain queries, measure the maps.

    Stages that an earlier run finished are kept.

    Parameters
    ----------
    directory : path
        A new or empty folder, or that of an earlier run. Written there: scenes/,
        network.safetensors, index/, why.png, why.html, summary.json.
    seed : int
        Of the scenes, the training and the triplets.
    progress : bool
        Show bars on a terminal, and print the table.
    settings : DemoSettings, optional
        Other sizes; their seed is replaced by `seed`.

    Returns
    -------
    dict
        What summary.json holds (recall_at_1, rows of the table, files, settings, recipe), with the
        folder and the seconds of the stages that ran in this call.

    Raises
    ------
    InputError
        The folder holds something else.
    """
    settings = replace(settings or DemoSettings(), seed=seed)
    begun = time.perf_counter()
    demo = _Demo(Path(directory), settings, progress)
    demo.stage("scenes", settings.digest(*_SCENES), demo.scenes / TABLE, demo.draw_scenes)
    demo.stage(
        "training", settings.digest(*_TRAINING), demo.weights,
        lambda: save_weights(train(settings, progress), demo.weights),
    )  # fmt: skip
    demo.stage("index", Recipe(seed=seed).digest(), demo.index / "manifest.json", demo.build)
    demo.stage("explanations", settings.digest(), demo.summary, demo.explain)
    summary: Record = json.loads(demo.summary.read_text(encoding="utf-8"))
    summary["folder"] = str(demo.folder)
    summary["seconds"] = {**demo.seconds, "total": round(time.perf_counter() - begun, 1)}
    if progress:
        show(*describe(summary))
    return summary


class _Demo:
    """The stages, where everything lies, and which stages an earlier run finished."""

    def __init__(self, folder: Path, settings: DemoSettings, progress: bool) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.scenes, self.index = folder / "scenes", folder / "index"
        self.weights, self.summary = folder / "network.safetensors", folder / "summary.json"
        self.seconds: dict[str, float] = {}
        self._done: dict[str, str] = {}
        self._recorded = self._read()
        make_folder(folder)

    def stage(self, name: str, digest: str, product: Path, make: Callable[[], object]) -> None:
        """Call `make` unless an earlier run made `product` under the same digest.

        Later stages are forgotten before the work begins: a killed run leaves none believed.
        """
        if self._recorded.get(name) != digest or not product.exists():
            self._recorded = {}
            self._write()
            begun = time.perf_counter()
            make()
            self.seconds[name] = round(time.perf_counter() - begun, 1)
        self._done[name] = digest
        self._write()

    def _read(self) -> dict[str, str]:
        path = self.folder / _RECORD
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): str(digest) for name, digest in recorded.items()}
        except FileNotFoundError:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise InputError(
                    f"{self.folder} holds files that are not this demonstration's; give an empty "
                    "or new folder"
                ) from None
            return {}
        except (OSError, ValueError, AttributeError):
            raise InputError(
                f"{path} is damaged; delete the folder and run the demo again"
            ) from None

    def _write(self) -> None:
        write_whole(self.folder / _RECORD, json.dumps({**self._recorded, **self._done}, indent=1))

    def draw_scenes(self) -> None:
        """Write the scenes as files; those of other settings are deleted."""
        shutil.rmtree(self.scenes, ignore_errors=True)
        write_scenes(self.settings, self.scenes, self.progress)

    def network(self) -> EmbeddingNetwork:
        """Return the trained network, wrapped."""
        preprocess = digits_preprocess(self.settings.input_size)
        module = load_weights(self.weights)
        return EmbeddingNetwork(module, LAYER, preprocess=preprocess, name="digits")

    def build(self) -> None:
        """Build an index of the gallery's folder."""
        build_index(
            find_images(self.scenes / "gallery"), self.network(), self.index,
            Recipe(seed=self.settings.seed), replace=True, progress=self._bars,
        )  # fmt: skip

    def explain(self) -> None:
        """Measure the maps, explain some queries, and write both."""
        network, settings = self.network(), self.settings
        with Index.open(self.index) as index:
            rows, recall, scenes = self._measure(index, network)
            summary = {
                "recall_at_1": recall,
                "n_gallery": len(index),
                "n_queries": settings.n_query,
                "n_pairs": settings.n_pairs,
                "rows": rows,
                "settings": asdict(settings),
                "recipe": Recipe(seed=settings.seed).to_dict(),
                "files": {
                    "panel": "why.png",
                    "page": "why.html",
                    "index": self.index.name,
                    "network": self.weights.name,
                    "scenes": self.scenes.name,
                },
            }
            shown = list(self._explained(Explainer(index, network), scenes))
        self._draw(shown, summary)
        write_whole(self.summary, json.dumps(summary, indent=1))

    @property
    def _bars(self) -> bool | None:
        return None if self.progress else False

    def _measure(
        self, index: Index, network: EmbeddingNetwork
    ) -> tuple[list[Record], float, list[Record]]:
        queries, pairs = (read_scenes(self.scenes, split) for split in SPLITS[2:])
        items = [Item(path, path, digits[0].label) for path, digits in queries.items()]
        source = ImageSource([*items, *(Item(path, path) for path in pairs)], self.scenes)
        recipes = _recipes(self.settings)
        one, five = (
            evaluate_index(
                index, source, network, boxes=self.scenes / TABLE, recipes=some,
                progress=self._bars, n_neighbors=count, controls=False, examples=0, scenes=0,
                measures=("retrieval", "localisation", "objects"), faithfulness=len(source),
            )
            for count, some in ((1, recipes), (5, {}))
        )  # fmt: skip
        # Single digits have a label, pairs have none; each score is one of the two's alone.
        asked, wide = (
            [row for row in each.rows if row["label"] is not None] + each.scenes
            for each in (one, five)
        )

        def line(rows: Sequence[Record], name: str, before: str = "") -> Record:
            return {"weights": name} | {
                score: _mean(rows, before + column) for score, column in _SCORES.items()
            }

        rows = [
            {
                "weights": "chance (area)",
                **dict.fromkeys(_SCORES, 0.5),
                "energy": _mean(asked, "area"),
            },
            *(line(asked, name, f"{name}: ") for name in ("mean activation", *recipes)),
            line(asked, "transferred from 1 neighbour"),
            line(wide, "transferred from 5 neighbours"),
        ]
        return rows, _mean(asked, "recall_1"), one.scenes

    def _explained(self, explainer: Explainer, scenes: Sequence[Record]) -> Iterator[Row]:
        pairs = list(read_scenes(self.scenes, "pair").items())[:N_DOUBLES]
        for place, (path, digits) in enumerate(pairs, self.settings.n_query):
            results = {row["label"]: row["result"] for row in scenes if row["first"] == place}
            query = Tile(Image.open(self.scenes / path).convert("RGB"), caption=Path(path).stem)
            tiles = []
            for digit in digits:
                neighbors = [results[digit.label]] if digit.label in results else None
                why = explainer.explain(self.scenes / path, neighbors=neighbors)
                tiles.append(why.tiles()[1][0])
                tiles.append(Tile(query.image, why.cam, why.extent, f"matched this {digit.label}"))
            names = " and ".join(digit.label for digit in digits)
            yield Row(query, tiles, title=f"One query, two results: {names}")
        paths = list(read_scenes(self.scenes, "query"))
        for number in SINGLES:
            query, nearest = explainer.explain(self.scenes / paths[number], n_neighbors=4).tiles()
            yield Row(query, nearest, title=f"A held-out {number} and its nearest images")

    def _draw(self, rows: Sequence[Row], summary: Record) -> None:
        panels = [panel(row.query, row.results, scale="each", title=row.title) for row in rows]
        size = max(one.width for one in panels), sum(one.height for one in panels)
        sheet, top = Image.new("RGB", size, "white"), 0
        for one in panels:
            sheet.paste(one, (0, top))
            top += one.height
        png = io.BytesIO()
        sheet.save(png, "PNG")
        write_whole(self.folder / "why.png", png.getvalue())
        header, *lines = _table(summary["rows"])
        text = page(
            rows,
            title="embedcam: why did this image come back?",
            intro=(
                f"An index of {summary['n_gallery']} scenes of handwritten digits among doodles, "
                "and queries of unseen handwriting. Recall@1 of the network on the held-out "
                f"queries: {summary['recall_at_1']:.3f}. The maps were drawn without "
                "back-propagation, from weights stored with the results."
            ),
            tables=[Table(header, lines, "Where the maps lie", NOTES)],
            scale="each",
        )
        write_whole(self.folder / "why.html", text)


def _recipes(settings: DemoSettings) -> dict[str, Recipe]:
    count, top = settings.n_triplets, settings.top_m
    triplets = Recipe(target="margin", sampling="random", triplets=count)
    paper = f"{count} triplets, top {top} of {settings.channels} (the paper)"
    return {
        "one triplet": replace(triplets, triplets=1),
        f"{count} triplets": triplets,
        paper: Recipe.paper(triplets=count, m=top),
        f"{count} triplets, Grad-CAM++": replace(triplets, method="gradcam++"),
    }


def _mean(rows: Sequence[Record], column: str) -> float:
    return float(np.mean([row[column] for row in rows if column in row]))


def _table(rows: Sequence[Record]) -> list[list[str]]:
    cells = ([f"{row[name]:.3f}" for name in list(_SCORES)[:-1]] for row in rows)
    lines = zip(rows, cells, strict=True)
    return [[*_HEADER], *([row["weights"], *each, f"{row['right']:.1%}"] for row, each in lines)]


def describe(summary: Record) -> list[str]:
    """Return the lines that are printed at the end."""
    lines = _table(summary["rows"])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    text = ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines]
    folder = Path(summary["folder"])
    return [
        f"Recall@1 on {summary['n_queries']} held-out scenes: {summary['recall_at_1']:.3f}",
        "", text[0], "-" * len(text[0]), *text[1:], "", NOTES, "",
        *(f"{name:<8}{folder / file}" for name, file in summary["files"].items()),
        f"{summary['seconds']['total']:.0f} seconds",
    ]  # fmt: skip
