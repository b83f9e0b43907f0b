"""The demonstration from end to end: scenes, training, index, explanations, measurement."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import show
from ..explain.explainer import Explainer
from ..images import find_images
from ..index import Index
from ..network import EmbeddingNetwork
from ..offline import build_index
from ..recipe.recipe import Recipe
from .digits_network import LAYER, digits_preprocess, load_weights, save_weights
from .measure import Measured, features, measure, questions
from .pictures import explain_doubles, explain_singles, html_page, panel_picture
from .scene_files import TABLE, read_scenes, write_scenes
from .settings import DemoSettings
from .stages import Stages
from .training import train

_SCENES = ("seed", "scene_size", "n_gallery", "n_query", "n_pairs")
_TRAINING = (
    "seed", "input_size", "n_train", "steps", "batch_size", "learning_rate", "margin", "channels",
    "embedding_size",
)  # fmt: skip
#: Shown: the first two-digit scenes, and the first query of each of these digits.
N_DOUBLES, SINGLES = 3, (3, 8)


def run_demo(
    directory: str | Path,
    seed: int = 0,
    progress: bool = True,
    settings: DemoSettings | None = None,
) -> dict[str, Any]:
    """Run the demonstration; stages that an earlier run finished are kept.

    Args:
        directory: a new or empty folder, or that of an earlier run. Written there: scenes/,
            network.safetensors, index/, why.png, why.html, summary.json.
        seed: of the scenes, the training and the triplets.
        progress: bars on a terminal, and the table on standard output.
        settings: other sizes; their seed is replaced by `seed`.

    Returns:
        What summary.json holds (recall_at_1, rows of the table, files, settings, recipe), with the
        folder and the seconds of the stages that ran in this call.

    Raises:
        InputError: the folder holds something else.
    """
    settings = replace(settings or DemoSettings(), seed=seed)
    folder = Path(directory)
    stages, begun = Stages(folder), time.perf_counter()
    demo = _Demo(folder, settings, progress)
    recipe = demo.recipe
    stages.run(
        "scenes", settings.digest(*_SCENES), demo.scenes / TABLE,
        demo.draw_scenes,
    )  # fmt: skip
    stages.run(
        "training", settings.digest(*_TRAINING), demo.weights,
        lambda: save_weights(train(settings, progress), demo.weights),
    )  # fmt: skip
    stages.run("index", recipe.digest(), demo.index / "manifest.json", demo.build)
    stages.run("explanations", settings.digest(), demo.summary, demo.explain)
    summary: dict[str, Any] = json.loads(demo.summary.read_text(encoding="utf-8"))
    summary["folder"] = str(folder)
    summary["seconds"] = {**stages.seconds, "total": round(time.perf_counter() - begun, 1)}
    if progress:
        show(*describe(summary).split("\n"))
    return summary


class _Demo:
    """The stages that need a network, and where everything lies."""

    def __init__(self, folder: Path, settings: DemoSettings, progress: bool) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.scenes = folder / "scenes"
        self.weights = folder / "network.safetensors"
        self.index = folder / "index"
        self.picture, self.page = folder / "why.png", folder / "why.html"
        self.summary = folder / "summary.json"
        self.recipe = Recipe(seed=settings.seed)

    def draw_scenes(self) -> None:
        """The scenes as files; those of other settings are deleted."""
        shutil.rmtree(self.scenes, ignore_errors=True)
        write_scenes(self.settings, self.scenes, self.progress)

    def network(self) -> EmbeddingNetwork:
        """The trained network, wrapped."""
        return EmbeddingNetwork(
            load_weights(self.weights),
            LAYER,
            preprocess=digits_preprocess(self.settings.input_size),
            name="digits",
        )

    def build(self) -> None:
        """The main job, offline: an index of the gallery's folder."""
        build_index(
            find_images(self.scenes / "gallery"),
            self.network(),
            self.index,
            self.recipe,
            replace=True,
            progress=None if self.progress else False,
        )

    def explain(self) -> None:
        """The main job, online, and the table."""
        network = self.network()
        gallery, queries, pairs = (
            features(network, read_scenes(self.scenes, split))
            for split in ("gallery", "query", "pair")
        )
        with Index.open(self.index) as index:
            explainer = Explainer(index, network)
            ids = [
                file.path.relative_to(self.scenes / "gallery").as_posix() for file in gallery.files
            ]
            rows = measure(
                network,
                explainer,
                (gallery, queries, pairs),
                ids,
                self.settings.n_triplets,
                self.settings.top_m,
            )
            recall = _recall_at_1(index, queries)
            summary = self._summary(rows, recall, len(gallery.files))
            self._draw(explainer, (gallery, queries, pairs), ids, summary)
        _write(self.summary, json.dumps(summary, indent=1))

    def _draw(
        self,
        explainer: Explainer,
        sets: tuple[Measured, Measured, Measured],
        ids: Sequence[str],
        summary: dict[str, Any],
    ) -> None:
        gallery, queries, pairs = sets
        asked = questions(gallery, pairs, n_results=1)[: 2 * N_DOUBLES]
        results = [
            [ids[asked[2 * scene + side].results[0]] for side in (0, 1)]
            for scene in range(N_DOUBLES)
        ]
        singles = explain_singles(explainer, [queries.files[digit] for digit in SINGLES])
        doubles = explain_doubles(explainer, pairs.files[:N_DOUBLES], results)
        unfinished = self.picture.with_name("why.part.png")
        panel_picture(singles, doubles).save(unfinished)
        unfinished.replace(self.picture)
        text = html_page(singles, doubles, table(summary["rows"]), _intro(summary), NOTES)
        _write(self.page, text)

    def _summary(self, rows: list[dict[str, Any]], recall: float, n_gallery: int) -> dict[str, Any]:
        return {
            "recall_at_1": recall,
            "n_gallery": n_gallery,
            "n_queries": self.settings.n_query,
            "n_pairs": self.settings.n_pairs,
            "rows": rows,
            "settings": self.settings.__dict__,
            "recipe": self.recipe.to_dict(),
            "files": {
                "panel": self.picture.name,
                "page": self.page.name,
                "index": self.index.name,
                "network": self.weights.name,
                "scenes": self.scenes.name,
            },
        }


def _recall_at_1(index: Index, queries: Measured) -> float:
    """How often the index's nearest image of a held-out query shows the same digit."""
    found = index.search(queries.embedding, 1).positions[:, 0]
    return float(
        np.mean([a == b for a, b in zip(index.labels[found], queries.labels, strict=True)])
    )


NOTES = (
    "Box AUC: how well the signed map tells pixels of the digit's true box from the rest, on "
    "held-out one-digit scenes; chance is 0.5, and no change of contrast moves it. Energy: share "
    "of the drawn map inside, which a sharper map raises. Two digits: the same of the half with "
    "the digit that the given result shows, and how often it has the larger share. Weights are the "
    "query's own (box) or the given result's (two digits), unless transferred."
)


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table as words, its header first."""
    header = ["weights", "box AUC", "energy", "two digits AUC", "share", "right half"]
    shown = ("box_auc", "energy", "side_auc", "share")
    return [
        header,
        *(
            [row["weights"], *(f"{row[name]:.3f}" for name in shown), f"{row['right']:.1%}"]
            for row in rows
        ),
    ]


def _intro(summary: dict[str, Any]) -> str:
    return (
        f"An index of {summary['n_gallery']} scenes of handwritten digits among doodles, and "
        f"queries of unseen handwriting. Recall@1 of the network on the held-out queries: "
        f"{summary['recall_at_1']:.3f}. The maps were drawn without back-propagation, from weights "
        "stored with the results."
    )


def describe(summary: dict[str, Any]) -> str:
    """What is printed at the end."""
    lines = table(summary["rows"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        line[0].ljust(widths[0])
        + "".join(
            "  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(
        [
            f"Recall@1 on {summary['n_queries']} held-out scenes: {summary['recall_at_1']:.3f}",
            "",
            *text,
            "",
            NOTES,
            "",
            *(
                f"{name:<8}{Path(summary['folder']) / file}"
                for name, file in summary["files"].items()
            ),
            f"{summary['seconds']['total']:.0f} seconds",
        ]
    )


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    run_demo(sys.argv[1])
