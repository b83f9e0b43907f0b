"""The scenes as files: a folder per class for the index, and one table of the true boxes."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images.progress import progress_of
from .scenes import Box, PlacedDigit, SceneMaker, Split
from .settings import DemoSettings

TABLE = "annotations.csv"
COLUMNS = ("path", "label", "x0", "y0", "x1", "y1", "width", "height", "split")


@dataclass(frozen=True)
class SceneFile:
    """A written scene: its path, and its digits with their boxes, left one first."""

    path: Path
    digits: tuple[PlacedDigit, ...]


def write_scenes(settings: DemoSettings, folder: Path, progress: bool = True) -> None:
    """Write gallery/, query/ (a folder per class), pairs/ and the table, the table last."""
    maker = SceneMaker(settings.seed, settings.scene_size)
    counts: dict[Split, int] = {
        "gallery": settings.n_gallery,
        "query": settings.n_query,
        "pair": settings.n_pairs,
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    total, shown = sum(counts.values()), None if progress else False
    with progress_of("scenes", total, "scenes", shown=shown) as advance:
        for split, count in counts.items():
            for number in range(count):
                scene = maker.scene(split, number)
                place = "pairs" if split == "pair" else f"{split}/{scene.digits[0].label}"
                name = f"{place}/{split}-{number:04d}.png"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scene.pixels).save(folder / name, compress_level=1)
                for digit in scene.digits:
                    size = (settings.scene_size, settings.scene_size)
                    writer.writerow((name, digit.label, *digit.box, *size, split))
                advance(1)
    unfinished = folder / (TABLE + ".part")
    unfinished.write_text(table.getvalue(), encoding="utf-8")
    unfinished.replace(folder / TABLE)


def read_scenes(folder: Path, split: Split) -> list[SceneFile]:
    """The written scenes of a split, in the table's order."""
    found: dict[str, list[PlacedDigit]] = {}
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                box: Box = (int(row["x0"]), int(row["y0"]), int(row["x1"]), int(row["y1"]))
                found.setdefault(row["path"], []).append(PlacedDigit(row["label"], box))
    return [SceneFile(folder / path, tuple(digits)) for path, digits in found.items()]
