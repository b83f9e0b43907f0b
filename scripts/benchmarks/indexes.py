"""What an index costs by itself: bytes an image, opening, searching."""

import shutil
import subprocess
import sys
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from embedcam.index import Index, rebuild_faiss
from embedcam.index.encoding import Encoding, LowRank, TopM, fit_pca
from embedcam.recipe.recipe import Recipe

from .cases import HEAD_WIDTH, near, write_index
from .timing import Case, alternate, milliseconds, ratio, section, verdict

CHANNELS = 1280
BYTES_BAR, OPEN_BAR, GROWTH_BAR = 320, 1.0, 200.0
FACTORIES = ("Flat", "HNSW32", "IVF1024,SQ8")
NOT_COUNTED = ("ids", "labels", "paths", "embeddings")

OPENING = """
import os, sys, time
import embedcam.index as index
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
before, start = resident(), time.perf_counter()
opened = index.Index.open(sys.argv[1])
seconds, grown = time.perf_counter() - start, resident() - before
import numpy
query = opened.embeddings([0])
start = time.perf_counter()
opened.search(query, 10)
first = time.perf_counter() - start
start = time.perf_counter()
opened.search(query, 10)
again = time.perf_counter() - start
assert "torch" not in sys.modules
print(seconds, grown, first, again)
"""


def make_index(
    path: Path, rows: int, encoding: Encoding, factory: str, clusters: int = 1000
) -> Path:
    """An index of clustered unit vectors and random weights."""
    return write_index(path, near(rows, 0, clusters), encoding, Recipe(faiss=factory))


def encodings(channels: int = CHANNELS, rank: int = 128, m: int = 50) -> dict[str, Encoding]:
    sample = np.random.default_rng(0).standard_normal((2 * rank, channels), np.float32)
    return {f"top-{m}": TopM(channels, m), f"rank {rank}": fit_pca(sample, rank)}


def storage_report(rows: int, folder: Path) -> str:
    """Bytes an image, from the files of real index directories."""
    lines = []
    for name, encoding in encodings().items():
        path = make_index(folder / "storage", rows, encoding, "none")
        kept, named, once = bytes_of(path)
        lines.append([name, f"{kept / rows:.1f}", verdict(kept / rows, BYTES_BAR),
                      f"{named / rows:.1f}", f"{once / 1e6:.2f}"])  # fmt: skip
        shutil.rmtree(path)
    beyond = "id, label, path, embedding"
    return section(
        "Bytes an image",
        f"Sums of file sizes of an index of {rows:,} images, K = {CHANNELS}, D = {HEAD_WIDTH}, own "
        "maps of 7 x 7; FAISS apart. *Once*: manifest and fitted arrays.",
        ["weights", f"beyond {beyond}", "bar", beyond, "once, MB"],
        lines,
    )


def bytes_of(path: Path) -> tuple[int, int, int]:
    """Bytes of the weights' and maps' files, of ids, labels, paths and embeddings, and once."""
    kept = named = once = 0
    for file in filter(Path.is_file, path.rglob("*")):
        size = file.stat().st_size
        if file.relative_to(path).parts[0] != "parts":
            once += size
        elif file.name.split(".")[0] in NOT_COUNTED:
            named += size
        else:
            kept += size
    return kept, named, once


def open_report(rows: int, rounds: int, folder: Path) -> str:
    """Seconds and growth of the resident set in a process that imported `embedcam.index` alone."""
    if not Path("/proc/self/statm").exists():
        return "\n## Opening\n\nNot measured: this system has no /proc.\n"
    path = make_index(folder / "large", rows, encodings()["rank 128"], "Flat", 4000)
    size = sum(bytes_of(path))
    command = [sys.executable, "-c", OPENING, str(path)]
    found = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(max(3, rounds))
    ]
    shutil.rmtree(path)
    seconds, grown, first, again = np.median(np.array(found, float), axis=0)
    return section(
        f"Opening {rows:,} images",
        f"An index of {size / 1e9:.2f} GB (D = {HEAD_WIDTH}, rank 128, "
        "own maps, FAISS Flat), page cache warm, a process that imported `embedcam.index` alone; "
        f"medians of {len(found)} processes.",
        ["what", "measured", "bar"],
        [
            ["opening, s", f"{seconds:.3f}", verdict(seconds, OPEN_BAR)],
            ["growth of the resident set, MB", f"{grown:.1f}", verdict(grown, GROWTH_BAR)],
            ["first search (loads FAISS), s", f"{first:.3f}", ""],
            ["second search, s", f"{again:.3f}", ""],
        ],
    )


def search_report(
    rows: int, queries: int, folder: Path, factories: tuple[str, ...] = FACTORIES
) -> str:
    """Single queries on one thread through `Index.search`."""
    encoding = LowRank(np.eye(HEAD_WIDTH), np.zeros(HEAD_WIDTH), "head", "embedding")
    path = make_index(folder / "search", rows, encoding, "none")
    asked = near(queries, 1)[:, None]
    truth: np.ndarray | None = None
    lines = []
    for factory in factories:
        built = Case(partial(rebuild_faiss, path, factory)).seconds()
        with Index.open(path) as index:
            found = np.concatenate([index.search(query, 10).positions for query in asked])
            truth = found if truth is None else truth
            hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
            once, again = (
                Case(partial(index.search, n_neighbors=10), partial(next, cycle(asked)))
                for _ in range(2)
            )
            took = alternate({"once": once, "again": again}, queries, warmup=10)
            size = (path / index.manifest.faiss.file).stat().st_size
        lines.append(
            [factory, milliseconds(took["once"]), ratio(took["again"], took["once"]),
             f"{np.mean(hits) / 10:.3f}", f"{size / 1e6:.1f}", f"{built:.1f}"]
        )  # fmt: skip
    shutil.rmtree(path)
    return section(
        f"Search of {rows:,} x {HEAD_WIDTH}",
        "`Index.search`, single queries, 10 neighbours, FAISS on one thread: it proposes, the "
        "stored embeddings decide. Unit vectors around 1,000 centres. Recall@10 is against Flat.",
        ["FAISS", "ms", "again (A/A)", "recall@10", "MB", "built in s"],
        lines,
    )
