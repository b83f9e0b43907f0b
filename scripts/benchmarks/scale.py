"""A million images from features: anonymous memory and CPU seconds of each stage, FAISS's apart.

The command runs in a process of its own, whose `RssAnon` is read every few milliseconds from
outside: what it holds beside mapped files, which the system takes back when it needs to.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .timing import section, verdict

WIDTH, LABELS, BLOCK = 128, 1000, 1 << 14
BAR_BYTES, BAR_CPU = 300, 40.0
_EVERY = 0.005
_CHILD = """
import json, sys, time
from contextlib import contextmanager
import faiss, sklearn.isotonic, sklearn.linear_model
import embedcam.offline.features
from embedcam import cli
from embedcam.offline.report import Stages

out, marks, usual = sys.argv[1], [], Stages.__call__

def mark(name):
    marks.append([name, time.monotonic(), time.process_time()])

@contextmanager
def marked(self, stage, *given):
    mark(stage)
    with usual(self, stage, *given) as advance:
        yield advance
    mark("between")

Stages.__call__ = marked
time.sleep(0.05)
mark("read")
code = cli.main(sys.argv[2:])
mark("end")
open(out, "w").write(json.dumps(marks))
sys.exit(code)
"""


class Stage(NamedTuple):
    """What a stage took: CPU seconds, and the most anonymous bytes while it ran."""

    name: str
    cpu: float
    peak: int


class Run(NamedTuple):
    """What a command took, the time to import it left out; `begun` bytes were there before.

    `resident` bytes are the most with the pages of mapped files.
    """

    begun: int
    stages: list[Stage]
    resident: int

    @property
    def peak(self) -> int:
        """The most anonymous bytes of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def cpu(self) -> float:
        """CPU seconds of all stages."""
        return sum(stage.cpu for stage in self.stages)


def features_of(places: np.ndarray, seed: list[int], labels: int, width: int) -> np.ndarray:
    """Return pooled activations `[n width]` around centers of labels, which take turns."""
    kinds = max(labels, 1)
    centers = np.random.default_rng(0).standard_normal((kinds, width), np.float32)
    noise = np.random.default_rng(seed).standard_normal((len(places), width), np.float32)
    return np.asarray(centers[_kinds(places, labels)] + noise)


def _kinds(places: np.ndarray, labels: int) -> np.ndarray:
    return np.asarray(places * 7919 % max(labels, 1))


def write_features(
    folder: Path, rows: int, labels: int = LABELS, width: int = WIDTH, dtype: str = "float32"
) -> list[str]:
    """Write embeddings, pooled activations, ids and labels; return options of `build`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.npy" for name in ("embeddings", "pooled")]
    unit, pooled = (
        np.lib.format.open_memmap(file, "w+", np.dtype(dtype), (rows, width)) for file in files
    )
    with open(folder / "ids.csv", "w", encoding="utf-8") as lines:
        lines.write("id,label\n" if labels else "id\n")
        for start in range(0, rows, BLOCK):
            places = np.arange(start, min(start + BLOCK, rows))
            some = features_of(places, [1, start], labels, width)
            pooled[places] = some
            unit[places] = some / np.linalg.norm(some, axis=1, keepdims=True)
            for place, kind in zip(places.tolist(), _kinds(places, labels).tolist(), strict=True):
                name = f"photos/{kind:04d}/{place:08d}.jpg"
                lines.write(f"{name},kind {kind}\n" if labels else f"{name}\n")
    ids = ["--ids", str(folder / "ids.csv")]
    return ["--embeddings", str(files[0]), "--pooled", str(files[1]), "--grid", "7x7", *ids]


def run(arguments: Sequence[str], folder: Path) -> Run:
    """Run a command of `embedcam` and watch its memory."""
    marks, samples, resident = folder / "marks.json", list[tuple[float, int]](), 0
    command = [sys.executable, "-c", _CHILD, str(marks), *arguments, "--quiet"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            anonymous, highest = _memory(child.pid)
            samples.append((time.monotonic(), anonymous))
            resident = max(resident, highest)
            time.sleep(_EVERY)
    if child.returncode:
        raise SystemExit(f"`embedcam {' '.join(arguments)}` failed")
    listed = json.loads(marks.read_text())
    stages: dict[str, Stage] = {}
    for (name, begin, cpu), (_, end, later) in pairwise(listed):
        peak = max((taken for at, taken in samples if begin <= at <= end), default=0)
        before = stages.get(name, Stage(name, 0.0, 0))
        stages[name] = Stage(name, before.cpu + later - cpu, max(before.peak, peak))
    begun = [taken for at, taken in samples if at < listed[0][1]][-1]
    return Run(begun, list(stages.values()), resident)


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def _memory(process: int) -> tuple[int, int]:
    """Return a process's anonymous bytes now, and the most that it has held with mapped pages."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    held = (status.partition(f"{name}:")[2].split() or ["0"] for name in ("RssAnon", "VmHWM"))
    anonymous, highest = (int(one[0]) << 10 for one in held)
    return anonymous, highest


def report(rows: int, folder: Path, labels: int = LABELS, width: int = WIDTH) -> str:
    """Bytes an image and CPU seconds by stage, of so many images and of a quarter."""
    made = folder / "scale"
    options = {n: write_features(made / str(n), n, labels, width) for n in (rows // 4, rows)}

    def built(n: int, factory: str) -> Run:
        shutil.rmtree(made / "index", ignore_errors=True)
        return run(["build", str(made / "index"), *options[n], "--faiss", factory], made)

    few, all_, flat = built(rows // 4, "none"), built(rows, "none"), built(rows, "Flat")
    shutil.rmtree(made)
    lines: list[list[object]] = [
        [one.name, f"{one.cpu:.1f}", f"{max(one.peak - all_.begun, 0) / rows:.0f}", ""]
        for one in all_.stages
    ]
    slope = (all_.peak - few.peak) / (rows - rows // 4)
    whole, with_faiss = ((one.peak - one.begun) / rows for one in (all_, flat))
    bars = [verdict(whole, BAR_BYTES), verdict(slope, BAR_BYTES)]
    bars += [verdict(flat.cpu, BAR_CPU * rows / 1e6) + " CPU s"]
    told = bars if labels else [""] * 3
    lines += [
        ["all stages, without FAISS", f"{all_.cpu:.1f}", f"{whole:.0f}", told[0]],
        ["each further image", "", f"{slope:.0f}", told[1]],
        ["the same with FAISS Flat", f"{flat.cpu:.1f}", f"{with_faiss:.0f}", told[2]],
    ]
    kinds = f"{labels:,} labels" if labels else "no labels"
    return section(
        f"{rows:,} x {width} from features, {kinds}",
        "`embedcam build --embeddings --pooled --ids` with memory-mapped arrays; the largest "
        "anonymous memory while a stage ran, beyond what the imports took, divided by the images. "
        f"*Each further image*: from {rows // 4:,} to {rows:,} images.",
        ["stage", "CPU seconds", "bytes an image", "bar"],
        lines,
    )
