"""Pictures to index, others to query with, their boxes, and an index to evaluate."""

from pathlib import Path
from typing import Any

import numpy as np
from photo_samples import build, network_of, picture, write_photos

from embedcam import EmbeddingNetwork, evaluate_index, find_images
from embedcam.images import ImageSource

QUICK: dict[str, Any] = {
    "faithfulness": 3, "scenes": 4, "fidelity": 5, "steps": 4, "examples": 1, "n_neighbors": 2,
}  # fmt: skip


def make_folder(root: Path) -> Path:
    """Write photos/, queries/, boxes.csv of the queries, and index/."""
    write_photos(root / "photos")
    lines = ["path,x0,y0,x1,y1,label"]
    for label in range(3):
        (root / "queries" / str(label)).mkdir(parents=True)
        for number in range(3):
            one = picture(label, 50 + number)
            one.save(root / "queries" / str(label) / f"q{number}.png")
            at = np.argwhere(np.asarray(one).max(2) > 200)
            (y0, x0), (y1, x1) = at.min(0), at.max(0) + 1
            lines.append(f"queries/{label}/q{number}.png,{x0},{y0},{x1},{y1},{label}")
    (root / "boxes.csv").write_text("\n".join(lines) + "\n")
    build(root / "photos", root / "index", network_of())
    return root


def run(folder: Path, network: EmbeddingNetwork, images: str = "queries", **more: Any) -> Any:
    return measure(folder / "index", find_images(folder / images), network, **more)


def measure(index: Path, source: ImageSource, network: EmbeddingNetwork, **more: Any) -> Any:
    settings = {**QUICK, "progress": False, "workers": 0, **more}
    return evaluate_index(index, source, network, **settings)
