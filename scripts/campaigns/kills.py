"""Kill jobs with SIGKILL at random moments: run again, each ends in the undisturbed one's bytes.

    python -m scripts.campaigns kills --count 200 --seconds 480 --seed 0

Needs no data: a tiny network with random weights and synthetic pictures in a temporary folder. Half
of the kills come before a step on the disk drawn at random (a file opened for writing, a rename, a
removal, a sync), half at a random time from outside, and a job that is killed may be killed again.
After each, the index opens and verifies, or says that it is unfinished; the page of a report is
whole or absent. Then the same job is run again and its bytes are compared. Prints a table, and
exits with 1 where anything did not hold.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import embedcam.offline.plan as plan
from embedcam import EmbeddingNetwork, Explainer, Preprocess, Recipe, find_images, write_report
from embedcam.errors import IndexFormatError
from embedcam.images import ImageSource
from embedcam.index import Index, compact, rebuild_faiss, remove, sweep, verify
from embedcam.offline import add_images, build_index, merge_job, plan_job, run_shard
from embedcam.prototypes import compress
from embedcam.report import LINES, PAGE

from ..benchmarks.timing import table
from .killing import KILLER, begin, everything, in_child, was_killed

SIDE, CHANNELS, WIDTH = 16, 8, 5
AGAIN = 0.3
"""How often a job that was killed is killed once more."""


class Net(nn.Module):
    """Convolution, ReLU, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, CHANNELS, 5, 4, 2), nn.ReLU()
        self.linear = nn.Linear(CHANNELS, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `[B D]`."""
        return self.linear(self.relu(self.conv(images)).mean((2, 3)))


class Bent(Net):
    """The same with a pooling that sees positions: weights take a second look at the images."""

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `[B D]`."""
        maps = self.relu(self.conv(images)).clamp(min=1e-3)
        return self.linear((maps**3).mean((2, 3)) ** (1 / 3))


@dataclass
class Kind:
    """A kind of job, and what became of those that were killed.

    Its index is the folder itself, or one below.
    """

    run: Callable[[Path], object]
    before: Callable[[Path], object] | None = None
    over: Callable[[Path], object] | None = None
    index: str = ""
    kills: int = 0
    early: int = 0
    late: int = 0
    same: int = 0
    seconds: float = 0
    steps: int = 0
    expected: dict[str, str] = field(default_factory=dict)


def kinds(base: Path) -> dict[str, Kind]:
    """The kinds of jobs, over pictures and an index that lie in `base`."""
    torch.manual_seed(0)
    network = EmbeddingNetwork(Net().eval(), "relu", preprocess=Preprocess(size=(SIDE, SIDE)))
    other = EmbeddingNetwork(Bent().eval(), "relu", preprocess=Preprocess(size=(SIDE, SIDE)))
    first, more, asked = (draw(base / name, n) for name, n in (("p", 12), ("q", 7), ("r", 10)))
    shared, few = base / "shared", {"batch_size": 4, "workers": 0, "progress": False}

    def build(folder: Path, seed: int = 0, replace: bool = False) -> None:
        recipe = Recipe(triplets=4, sampling="random", seed=seed)
        build_index(first, network, folder, recipe, replace=replace, **few)

    def add(folder: Path) -> None:
        add_images(more, network, folder, **few)

    def removed(folder: Path) -> None:
        remove(folder, ["c0/p0.png", "c1/p4.png"])

    def grown(folder: Path) -> None:
        for job in (build, add, removed):
            job(folder)

    def report(folder: Path) -> None:
        explainer = Explainer(shared, network, n_neighbors=3)
        write_report(explainer, asked, folder, batch_size=4, side=32, progress=False)

    def planned(folder: Path, kind: str = "pooled", **options: Any) -> None:
        recipe = Recipe(triplets=4, sampling="random")
        few = {"batch_size": 4, "pieces": 3, **options}
        plan_job(first, several[kind], folder / "job", recipe, **few)

    def pieces(folder: Path, kind: str = "pooled", rounds: int = 1) -> None:
        for turn in range(rounds):
            for piece in (range(3), (2, 0, 1))[turn % 2]:
                run_shard(folder / "job", piece, network=several[kind], **alone)

    def merged(folder: Path, kind: str = "pooled") -> None:
        merge_job(folder / "job", folder / "index", several[kind], **alone)

    def in_pieces(folder: Path, kind: str = "pooled", rounds: int = 1) -> None:
        pieces(folder, kind, rounds)
        merged(folder, kind)

    def embedded(folder: Path) -> None:
        planned(folder)
        pieces(folder)

    def more_planned(folder: Path) -> None:
        build(folder / "index")
        plan_job(more, network, folder / "job", add_to=folder / "index", batch_size=4, pieces=2)

    def more_in_pieces(folder: Path) -> None:
        for piece in (1, 0):
            run_shard(folder / "job", piece, network=network, **alone)
        merge_job(folder / "job", folder / "index", network, **alone)

    several, alone = {"pooled": network, "other": other}, {"workers": 0, "progress": False}
    again = {"kind": "other", "scratch_gb": 0}
    small = partial(compress, shared, replace=True, progress=False)
    in_child(grown, shared)
    return {
        "build": Kind(build),
        "add": Kind(add, build),
        "remove": Kind(removed, build, sweep),
        "compact": Kind(compact, grown),
        "compact --rebuild-faiss": Kind(partial(compact, rebuild_faiss="HNSW4"), grown),
        "rebuild": Kind(partial(rebuild_faiss, factory="IVF2,Flat"), grown, sweep),
        "compress": Kind(partial(small, prototypes=4), partial(small, prototypes=3)),
        "refit": Kind(partial(build, seed=5, replace=True), build),
        "report": Kind(report),
        "shards": Kind(in_pieces, planned, index="index"),
        "shards of three rounds": Kind(
            partial(in_pieces, kind="other", rounds=3), partial(planned, **again), index="index"
        ),
        "merge": Kind(merged, embedded, index="index"),
        "shards of additions": Kind(more_in_pieces, more_planned, merged, index="index"),
    }


def draw(folder: Path, count: int) -> ImageSource:
    """Pictures of three colours with noise, `c0/p0.png` ..."""
    for number in range(count):
        noise = np.random.default_rng([len(folder.name), ord(folder.name[0]), number])
        pixels = noise.integers(0, 120, (24, 24, 3)) + np.eye(3, dtype=int)[number % 3] * 130
        place = folder / f"c{number % 3}" / f"{folder.name}{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place)
    return find_images(folder)


def wrong_index(folder: Path, *manifests: bytes | None) -> str | None:
    """What is wrong with a killed index: it has one of these manifests, or is unfinished."""
    file = folder / "manifest.json"
    found = file.read_bytes() if file.exists() else None
    if found not in manifests:
        return "its manifest is neither the old nor the new one"
    if found is not None:
        return "; ".join(verify(folder).problems) or None
    try:
        Index.open(folder).close()
    except IndexFormatError as error:
        began = folder.exists() and any(folder.iterdir())
        if not began or "the index is unfinished" in str(error):
            return None
        return f"it does not say that it is unfinished: {error}"
    return "it opens without a manifest"


def wrong_report(folder: Path, expected: dict[str, str]) -> str | None:
    """What is wrong with a killed report: its page and its lines are whole or absent."""
    found = everything(folder) if folder.exists() else {}
    for file in (LINES, PAGE):
        if found.get(file) not in (None, expected[file]):
            return f"{file} is neither whole nor absent"
    return None


class Campaign:
    """Kills jobs in a folder, and counts."""

    def __init__(self, base: Path, seed: int) -> None:
        self.base, self.chance = base, random.Random(seed)
        self.kinds = kinds(base)
        self.failures: list[str] = []
        for name, kind in self.kinds.items():
            self._undisturbed(name, kind)

    def run(self, count: int, until: float) -> None:
        """Kill until there are that many, or the time is over."""
        while sum(kind.kills for kind in self.kinds.values()) < count:
            for name, kind in self.kinds.items():
                if time.monotonic() > until:
                    return
                try:
                    self._one(name, kind)
                except (RuntimeError, OSError) as error:
                    self.failures.append(f"{name}: {error}")

    def _place(self, name: str, what: str) -> Path:
        return self.base / f"{name.replace(' --', '-').replace(' ', '-')}-{what}"

    def _undisturbed(self, name: str, kind: Kind) -> None:
        start, whole = self._place(name, "start"), self._place(name, "whole")
        if kind.before is not None:
            in_child(kind.before, start)
            shutil.copytree(start, whole)
        steps = self.base / "steps"

        def counted(folder: Path) -> None:
            kind.run(folder)
            steps.write_text(str(KILLER.seen))

        began = time.monotonic()
        in_child(counted, whole)
        kind.seconds = time.monotonic() - began
        kind.steps = int(steps.read_text())
        kind.expected = everything(whole / kind.index)

    def _one(self, name: str, kind: Kind) -> None:
        start, folder = self._place(name, "start"), self._place(name, "killed")
        shutil.rmtree(folder, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, folder)
        while self._killed(kind, folder):
            kind.kills += 1
            done = self._check(name, kind, folder)
            if done or self.chance.random() > AGAIN:
                break
        else:
            done = True
        if (
            everything(folder / kind.index) != kind.expected
        ):  # else it was over before the signal came
            in_child(kind.over if done and kind.over else kind.run, folder)
        differing = set(everything(folder / kind.index).items()) ^ set(kind.expected.items())
        if differing:
            files = sorted({file for file, _ in differing})
            self.failures.append(f"{name}: run again, it differs in {files[:5]}")
        else:
            kind.same += 1

    def _killed(self, kind: Kind, folder: Path) -> bool:
        if self.chance.random() < 0.5:
            return in_child(kind.run, folder, self.chance.randint(1, kind.steps))
        pid = begin(kind.run, folder)
        time.sleep(self.chance.random() * kind.seconds)
        os.kill(pid, signal.SIGKILL)
        return was_killed(pid)

    def _check(self, name: str, kind: Kind, folder: Path) -> bool:
        mark = "report.json" if name == "report" else "manifest.json"
        start, whole, folder = (
            place / kind.index
            for place in (self._place(name, "start"), self._place(name, "whole"), folder)
        )
        new = (whole / mark).read_bytes()
        done = (folder / mark).exists() and (folder / mark).read_bytes() == new
        old = (start / mark).read_bytes() if (start / mark).exists() else None
        is_report = name == "report"
        wrong = wrong_report(folder, kind.expected) if is_report else wrong_index(folder, old, new)
        if wrong:
            self.failures.append(f"{name}: {wrong}")
        kind.late += done
        kind.early += not done
        return done

    def table(self) -> str:
        """The counts as markdown."""
        head = (
            "job",
            "kills",
            "before the commit",
            "after it",
            "runs that ended in the same bytes",
        )
        rows = [(n, k.kills, k.early, k.late, k.same) for n, k in self.kinds.items()]
        rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
        return table(head, rows)


def main() -> int:
    """Run the campaign; 1 where anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--seconds", type=float, default=480, help="at most (default 480)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks, from Python 3.12 on
    # A fork of a process that has used several threads waits for ever.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    plan.CHUNK = 4
    os.fsync = KILLER.step  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="embedcam-kills-") as name:
        campaign = Campaign(Path(name), options.seed)
        campaign.run(options.count, until)
    print(campaign.table())
    kills = sum(kind.kills for kind in campaign.kinds.values())
    if kills < options.count:
        campaign.failures.append(f"the time was over after {kills} of {options.count} kills")
    for failure in campaign.failures:
        print(failure, file=sys.stderr)
    return 1 if campaign.failures else 0
