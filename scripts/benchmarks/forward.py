r"""Images a second of a build's embedding pass, beside an older checkout of the package.

    git worktree add ../before e54e8ea
    python -m scripts.benchmarks forward --old ../before --photographs FOLDER \
        --output docs/results/forward.md

Pictures are JPEG files, 500 px on the longer side, made of the photographs of a folder, or of
noise and slopes without one. Every case is a process of its own that has its network loaded and
waits; they take turns, one build each in a round. Networks have random weights.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from embedcam import find_images

from .cases import write_pictures
from .timing import ratio, section, verdict, written

LONGER = 500
BARS = {
    ("resnet50", "torch"): 1.5, ("resnet50", "onnx"): 2.3,
    ("mobilenet_v2", "torch"): 2.4, ("mobilenet_v2", "onnx"): 4.5,
}  # fmt: skip
CASES = {"before, torch": "torch", "now, torch": "torch", "now, ONNX Runtime": "onnx"}


def main() -> None:
    options = arguments()
    report = [preface(options)]
    print(report[0], flush=True)
    with tempfile.TemporaryDirectory(prefix="embedcam-forward-") as folder:
        pictures = Path(folder) / "pictures"
        write_photographs(pictures, options.photographs, options.images)
        for name in options.network:
            report.append(network_report(name, pictures, options))
            print(report[-1], flush=True)
    written("\n".join(report), options.output)


class Worker:
    """A process that builds with one checkout, runtime and network when it is told to."""

    def __init__(self, checkout: Path, pictures: Path, name: str, runtime: str, threads: int):
        script = Path(__file__).with_name("embedding_pass.py")
        # Not with the script's folder in front, whose onnx.py is not the package.
        command = [sys.executable, "-P", str(script), str(pictures), name, runtime, str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.parts = self.told()

    def told(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self.process.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told

    def build(self) -> dict[str, Any]:
        """Seconds of one build's embedding pass, and CPU seconds an image."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.told()

    def close(self) -> None:
        """Have it end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


class Took(NamedTuple):
    """Seconds of the pass and CPU seconds of the build, an image, `[rounds]` each."""

    wall: np.ndarray
    cpu: np.ndarray


def network_report(name: str, pictures: Path, options: argparse.Namespace) -> str:
    here = Path(__file__).parents[2]
    workers: dict[str, Worker] = {}
    try:
        for case, runtime in CASES.items():
            checkout = options.old.resolve() if case.startswith("before") else here
            workers[case] = Worker(checkout, pictures, name, runtime, options.threads)
        rounds = [
            {case: worker.build() for case, worker in workers.items()}
            for _ in range(options.rounds + 1)
        ][1:]
    finally:
        for worker in workers.values():
            worker.close()
    took = {
        case: Took(
            np.array([one[case]["wall"] / one[case]["images"] for one in rounds]),
            np.array([one[case]["cpu"] for one in rounds]),
        )
        for case in workers
    }
    base, rows = took["before, torch"], list[list[object]]()
    for case, (wall, cpu) in took.items():
        faster, bar = ratio(base.wall, wall), BARS.get((name, CASES[case]))
        told = verdict(faster.median, None if case[0] == "b" else bar, at_least=True)
        less = ratio(base.cpu, cpu)
        rows.append([case, f"{np.median(1 / wall):.1f}", faster, told,
                     f"{1e3 * np.median(cpu):.1f}", less])  # fmt: skip
    spent = [
        [what, *(f"{workers[case].parts[what]:.2f}" for case in list(CASES)[:2])]
        for what in ("decode", "prepare", "mark")
    ]
    return section(
        f"Embedding pass, {name}",
        f"{rounds[0]['before, torch']['images']} pictures, {options.rounds} rounds. Images a "
        "second of the pass and its ratio to the older checkout; CPU milliseconds an image of the "
        "whole build, what a build of few images costs taken off, and the same ratio.",
        ["case", "images/s", "times as many", "bar", "CPU ms", "times as few"],
        rows,
    ) + section(
        f"Before the network, {name}",
        "CPU milliseconds an image, one thread, medians of five passes over 64 pictures.",
        ["step", "before", "now"],
        spent,
    )


def write_photographs(folder: Path, photographs: Path | None, count: int) -> None:
    """JPEG files of `LONGER` pixels on the longer side, quality 90, a folder per class."""
    if photographs is None:
        photographs = write_pictures(folder.with_name("drawn"), count)
    source, rng = find_images(photographs), np.random.default_rng(0)
    for number, place in enumerate(rng.permutation(len(source))[:count].tolist()):
        picture = source.open(place)
        scale = LONGER / max(picture.size)
        sides = (round(picture.width * scale), round(picture.height * scale))
        larger = np.asarray(picture.resize(sides, Image.Resampling.BICUBIC), np.float32)
        # What enlarging has smoothed away, a photograph of this size would have.
        grained = larger + rng.normal(0, 4, (*larger.shape[:2], 1))
        path = folder / f"class-{number % 8}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def preface(options: argparse.Namespace) -> str:
    return (
        "# The forward pass of builds\n\n"
        "`python -m scripts.benchmarks forward --old CHECKOUT --photographs FOLDER`: images a "
        f"second from JPEG files of {LONGER} px, beside a checkout of an older commit; torch "
        f"{torch.__version__} with {options.threads} threads allowed, "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n\n"
        "Cases take turns, a build each in a round, every case in a process of its own. A ratio is "
        "the median over rounds of (older / this case in the same round), in brackets the smallest "
        "and the largest.\n\n"
        "Pillow decodes. The decoders of torchvision and OpenCV gave the same pixels in 1.04 "
        "instead of 1.22 CPU milliseconds a file, and took 1.30 and 1.23 with the picture that is "
        "then resized (64 files, medians of nine rounds); torchvision's is deprecated.\n"
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks forward",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--old", type=Path, required=True, help="checkout of an older commit")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER",
                        help="pictures to make the JPEG files of; default: drawn ones")  # fmt: skip
    parser.add_argument("--network", nargs="+", default=["resnet50", "mobilenet_v2"],
                        metavar="NAME", help="torchvision models")  # fmt: skip
    parser.add_argument("--images", type=int, default=256, help="of a build (256)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="that torch may use (2)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    return parser.parse_args(given)
