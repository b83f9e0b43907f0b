"""A report that is killed with SIGKILL before any change to its files; see test_report_kill.py.

Takes a folder to work in, prints what went wrong as JSON. It forks, so it runs on one thread.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import faiss
import torch
from build_killer import killed_everywhere
from photo_samples import build, network_of, picture, write_photos

from embedcam import Explainer, find_images, write_report
from embedcam.report import LINES, PAGE


def whole_or_none(reference: Path):
    """The page and the lines of a killed report: those of the one that was let finish, or none."""

    def check(folder: Path) -> str | None:
        for name in (LINES, PAGE):
            file = folder / name
            if file.exists() and file.read_bytes() != (reference / name).read_bytes():
                return f"{name} is neither whole nor absent"
        if (folder / PAGE).exists() and not (folder / LINES).exists():
            return "the page came before the lines"
        return None

    return check


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks, from Python 3.12 on
    os.fsync = lambda descriptor: None  # nothing here needs to survive a power failure
    base = Path(sys.argv[1])
    index = build(write_photos(base / "photos"), base / "index", network := network_of())
    for number in range(13):
        (base / "queries" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        picture(number % 3, 50 + number).save(base / f"queries/{number % 3}/{number}.png")
    (base / "queries/broken.png").write_text("a letter")
    explainer, source = Explainer(index, network), find_images(base / "queries", "none")

    def report(folder: Path) -> None:
        write_report(explainer, source, folder, batch_size=4, side=48, progress=False)

    check = whole_or_none(base / "reference")
    print(json.dumps(killed_everywhere(base, None, report, 16, check)))


if __name__ == "__main__":
    main()
