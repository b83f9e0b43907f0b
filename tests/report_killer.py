"""A report killed with SIGKILL at any change to its files: prints what went wrong as JSON."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import faiss
import torch
from build_killer import in_child, killed_everywhere
from build_samples import everything
from photo_samples import build, network_of, picture, write_photos

from embedcam import Explainer, find_images, write_report
from embedcam.report import LINES, PAGE
from embedcam.report.folder import Folder


def whole_or_none(reference):
    def check(folder):
        for name in (LINES, PAGE):
            file = folder / name
            if file.exists() and file.read_bytes() != (reference / name).read_bytes():
                return f"{name} is neither whole nor absent"
        if (folder / PAGE).exists() and not (folder / LINES).exists():
            return "the page came before the lines"
        return None

    return check


def main():
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

    def report(folder):
        quick = {"side": 48, "receipts": False}
        write_report(explainer, source, folder, batch_size=4, progress=False, **quick)

    check = whole_or_none(base / "reference")
    problems = killed_everywhere(base, None, report, 14, check)
    expected, read = everything(base / "reference"), Folder.read
    for point in (1, 9, len(source), len(source) + 1, 2 * len(source) - 1, 2 * len(source)):
        seen = []

        def killing(folder, position, point=point, seen=seen):
            seen.append(position)
            if len(seen) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(folder, position)

        folder = base / f"reading-{point}"
        Folder.read = killing
        if not in_child(report, folder):
            problems.append(f"not killed at reading {point}")
        Folder.read = read
        if what := check(folder):
            problems.append(f"killed at reading {point}: {what}")
        in_child(report, folder)
        if everything(folder) != expected:
            problems.append(f"killed at reading {point} and run again: other bytes")
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
