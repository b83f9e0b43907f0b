"""A build in pieces by two workers that are killed, and what Ray costs.

objects24 as tar shards, MobileNetV2, in each way once. Passes of the workers are counted one by
one, so that a chunk (256 images) that is done twice is seen, with what was under way of the next;
an index is the same where all of its files have the same bytes. CPU seconds are of all processes
that a run starts, looked up every 50 ms. Ray's own start is a cluster with two workers that have
loaded the network, and nothing else, less the import of embedcam; what Ray costs beyond it is to
be at most 10% of one process's CPU seconds.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchvision.models import MobileNetV2

from embedcam import EmbeddingNetwork
from embedcam.index import Index

from ..benchmarks.timing import section
from .data import Pictures, frozen_network, read_pictures

CHUNK, WORKERS, MOST = 256, 2, 0.10
AHEAD = 4 * 8
"""Images of the next chunk that may be under way while one is written: passes side by side."""
PASSES, WEIGHTS = "EMBEDCAM_PASSES", "EMBEDCAM_WEIGHTS"


class Counted(MobileNetV2):
    """MobileNetV2 that writes a line a pass: its process, how many images, and which."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the classes of images `[B 3 224 224]`."""
        if path := os.environ.get(PASSES):
            line = f"{os.getpid()} {len(images)} {float(images.double().sum())}\n"
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        return super().forward(images)


def counted() -> EmbeddingNetwork:
    """Load the network of this experiment, as workers do by its name."""
    network = frozen_network(os.environ[WEIGHTS])
    network.module.__class__ = Counted
    return network


class Waiting:
    """A worker that has loaded the network and does nothing, for Ray's own start."""

    def load(self) -> int:
        """Load the network and look at the probe picture."""
        counted().identity()
        return os.getpid()


def start_alone() -> None:
    """Start a cluster with workers that have the network, and end it."""
    from embedcam.offline import engine

    with engine._cluster(None, WORKERS) as ray:
        actors = [ray.remote(num_cpus=1)(Waiting).remote() for _ in range(WORKERS)]
        ray.get([actor.load.remote() for actor in actors])


class Run:
    """A command with all processes it starts: what they did, and their CPU seconds."""

    def __init__(self, words: list[str], folder: Path, weights: Path) -> None:
        self.passes = folder / f"passes-{time.monotonic_ns()}"
        self.passes.touch()
        env = {**os.environ, PASSES: str(self.passes), WEIGHTS: str(weights)}
        env |= {"OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
        self.process = subprocess.Popen(
            [sys.executable, *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._ticks: dict[tuple[int, int], int] = {}
        self._known, self._over = {self.process.pid}, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._look()

    def _look(self) -> None:
        for one in Path("/proc").glob("[0-9]*"):
            try:
                fields = (one / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid, parent, begun = int(one.name), int(fields[1]), int(fields[19])
            if pid in self._known or parent in self._known:
                self._known.add(pid)
                self._ticks[pid, begun] = int(fields[11]) + int(fields[12])

    def end(self, *, well: bool = True) -> "Run":
        """Wait until the command and all that it started have ended."""
        said = self.process.communicate()[1]
        if well and self.process.returncode:
            raise SystemExit(f"{shlex.join(map(str, self.process.args))}: {said}")
        until = time.monotonic() + 20
        while time.monotonic() < until and any(map(_alive, self._known - {self.process.pid})):
            time.sleep(0.05)
        self._over.set()
        self._thread.join()
        return self

    @property
    def cpu(self) -> float:
        """CPU seconds of all processes."""
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def seen(self) -> dict[int, list[tuple[int, str]]]:
        """Return the passes (images, which) by process."""
        by: dict[int, list[tuple[int, str]]] = {}
        for line in self.passes.read_text(encoding="utf-8").splitlines():
            process, n, which = line.split()
            by.setdefault(int(process), []).append((int(n), which))
        return by


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class Setting(NamedTuple):
    """Where the shards lie, what is built of them, and which passes look at the probe."""

    folder: Path
    weights: Path
    images: str
    n_images: int
    probes: set[str]

    @property
    def network(self) -> list[str]:
        """The network's name, of this module."""
        return ["--network", f"{__name__}:counted"]

    def command(self, *words: object) -> Run:
        """Start an embedcam command."""
        return Run(["-m", "embedcam", *map(str, words), *self.network], self.folder, self.weights)

    def build(self, index: Path, *more: object) -> Run:
        """Start a build of the shards."""
        return self.command("build", self.images, index, "--no-trust", *more)

    def ray(self, index: Path) -> Run:
        """Start a build of the shards by Ray."""
        return self.build(index, "--engine", "ray", "--ray-workers", WORKERS)

    def embedded(self, runs: list[Run]) -> int:
        """Count the images that were shown to the network, without the probe picture."""
        each = (one for run in runs for by in run.seen().values() for one in by)
        return sum(n for n, which in each if which not in self.probes)


def write_shards(pictures: Pictures, folder: Path, n: int) -> str:
    """Write pictures with their labels to so many tar shards, as webdataset has them."""
    for number, rows in enumerate(np.array_split(np.arange(len(pictures.paths)), n)):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for row in rows.tolist():
                path, label = pictures.paths[row], str(pictures.labels[row]).encode()
                parts = ((path.suffix, path.read_bytes()), (".cls", label))
                for ending, content in parts:
                    about = tarfile.TarInfo(f"{row:06d}{ending}")
                    about.size = len(content)
                    tar.addfile(about, BytesIO(content))
    return f"{folder}/{{000..{n - 1:03d}}}.tar"


def until(true: Callable[[], object], run: Run) -> None:
    """Wait until something is so, while a command runs."""
    while not true():
        if run.process.poll() is not None:
            raise SystemExit(f"ended too soon: {run.process.communicate()[1]}")
        time.sleep(0.001)


def kill_embedding(run: Run, job: Path) -> None:
    """Kill a worker amid the passes of a chunk that is not its first."""

    def amid() -> int | None:
        for pid, passes in run.seen().items():
            n = sum(n for n, _ in passes)
            if pid != run.process.pid and n > 1.4 * CHUNK and _alive(pid):
                return pid
        return None

    until(amid, run)
    os.kill(amid() or 0, signal.SIGKILL)


def kill_writing(run: Run, job: Path) -> None:
    """Kill a worker while it writes a chunk."""

    def writing() -> int | None:
        for name in os.listdir(job) if job.is_dir() else ():
            if name.startswith("embed-") and "." in name:
                return int(name.split("-")[-2])
        return None

    found: list[int] = []
    until(lambda: (pid := writing()) and not found.append(pid), run)
    os.kill(found[0], signal.SIGKILL)


def same(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files of the same bytes."""
    both = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    ]
    return both[0] == both[1]


def trials(to: Setting, one: Path) -> Iterator[list[object]]:
    """Yield a row for each way of killing: images embedded once more, and whether it is the same.

    The build of one process is in `one`.
    """

    def row(name: str, kills: int, runs: list[Run], index: Path) -> list[object]:
        again = to.embedded(runs) - to.n_images
        with Index.open(index) as made:
            ids = list(made.ids)
        there = "all once" if len(set(ids)) == len(ids) == to.n_images else "NOT"
        good = "yes" if again <= kills * (CHUNK + AHEAD) else "NO"
        told = [name, kills, again, good, there, "yes" if same(one, index) else "NO"]
        print(*told, sep="; ", file=sys.stderr, flush=True)
        return told

    chunks = -(-to.n_images // CHUNK)
    for name, kill in (("embeds", kill_embedding), ("writes a chunk", kill_writing)):
        index = to.folder / f"ray-{name[:6]}"
        run = to.ray(index)
        kill(run, index / ".building")
        yield row(f"Ray, a worker that {name}", 1, [run.end()], index)
    index = to.folder / "ray-driver"
    run = to.ray(index)
    until(lambda: len([*index.glob(".building/embed-*/arrays.json")]) == chunks, run)
    run.process.kill()
    run.end(well=False)
    unfinished = not (index / "manifest.json").exists()
    again = to.ray(index).end()
    told = "Ray, the driver before the merge" + ("" if unfinished else " (TOO LATE)")
    yield row(told, 1, [run, again], index)
    for name, kill in (("embeds", kill_embedding), ("writes a chunk", kill_writing)):
        job, index = to.folder / f"job-{name[:6]}", to.folder / f"shells-{name[:6]}"
        to.command("plan", to.images, job, "--no-trust", "--pieces", 6).end()
        runs = [to.command("shard", job, piece, "--of", WORKERS) for piece in range(WORKERS)]
        if kill is kill_writing:
            kill_writing(runs[0], job)
        else:
            first = runs[0]
            until(lambda run=first: to.embedded([run]) > 1.4 * CHUNK, first)
            first.process.kill()
        ended = [one.end(well=False) for one in runs]
        failed = [piece for piece, one in enumerate(ended) if one.process.returncode]
        ended += [to.command("shard", job, piece, "--of", WORKERS).end() for piece in failed]
        to.command("merge", job, index).end()
        yield row(f"`shard` from two shells, one that {name}", 1, ended, index)


def costs(to: Setting, rounds: int) -> list[list[object]]:
    """Return CPU seconds of one process, of Ray and of its start, by turns."""
    module = __name__
    code = {
        "import of embedcam": "import embedcam.offline.engine, " + module,
        "cluster and loaded workers": f"import {module} as it; it.start_alone()",
    }
    took: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, kind in (("one process", ()), ("Ray", ("ray",))):
            index = to.folder / f"cost-{number}-{name[:3]}"
            run = to.ray(index) if kind else to.build(index)
            took.setdefault(name, []).append(run.end().cpu)
            print(f"{name}: {run.cpu:.1f} CPU s", file=sys.stderr, flush=True)
        for name, text in code.items():
            took.setdefault(name, []).append(Run(["-c", text], to.folder, to.weights).end().cpu)
    middle = {name: float(np.median(seconds)) for name, seconds in took.items()}
    start = middle["cluster and loaded workers"] - middle["import of embedcam"]
    over = middle["Ray"] - middle["one process"] - start
    share = over / middle["one process"]
    rows: list[list[object]] = [[name, f"{seconds:.1f}"] for name, seconds in middle.items()]
    verdict = "met" if share <= MOST else "MISSED"
    rows.append(["Ray beyond its start", f"{over:.1f} ({share:.1%}; {MOST:.0%}: {verdict})"])
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA/objects24")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 13], metavar="N")
    parser.add_argument("--rounds", type=int, default=1, help="of the costs, by turns")


def measure(options: argparse.Namespace) -> Iterator[str]:
    pictures = read_pictures(options.data)
    weights = options.weights.resolve()
    for number, n in enumerate(options.shards):
        with TemporaryDirectory(prefix="shards-") as name:
            folder = Path(name)
            (folder / "tars").mkdir()
            images = write_shards(pictures, folder / "tars", n)
            to = Setting(folder, weights, images, len(pictures.paths), set())
            planned = to.command("plan", images, folder / "planned", "--no-trust").end()
            to = to._replace(probes={which for by in planned.seen().values() for _, which in by})
            note = f"{to.n_images:,} images in chunks of {CHUNK}; {WORKERS} workers."
            if not number:
                rows = costs(to, options.rounds)
                yield section(
                    "What Ray costs", "CPU seconds of all processes.", ["", "CPU s"], rows
                )
            to.build(folder / "one").end()
            head = ["killed", "kills", "images again", "at most a chunk a kill", "ids", "same"]
            yield section(f"{n} tar shards", note, head, list(trials(to, folder / "one")))
