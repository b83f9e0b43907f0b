"""What `faiss = "auto"` chooses: recall of the true five, and what the first search costs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from embedcam.index import Index, faiss_build, faiss_files, nearest
from embedcam.index.encoding import LowRank
from embedcam.index.faiss_choice import enough_lists
from embedcam.index.search import SLACK
from embedcam.recipe.recipe import Recipe

from .cases import near, write_index
from .timing import section

WIDTH, QUERIES, NEAREST = 128, 1000, 5
DATA = ("clusters", "sphere, 16 of 128", "sphere, 32 of 128", "uniform on the sphere")


def vectors_of(kind: str, count: int, seed: int) -> np.ndarray:
    """Unit vectors `[n 128]`; whatever they share comes from a seed of its own."""
    own, shared = np.random.default_rng(seed), np.random.default_rng(77)
    if kind == "clusters":  # 1,000 of them, wide enough to touch
        centers = shared.standard_normal((1000, WIDTH), dtype=np.float32)
        made = centers[own.integers(0, 1000, count)]
        made += 0.6 * own.standard_normal((count, WIDTH), dtype=np.float32)
    elif kind.startswith("sphere"):  # a Gaussian of fewer dimensions, and a tenth in all
        inner = int(kind.split()[1])
        basis = shared.standard_normal((inner, WIDTH), dtype=np.float32) / np.sqrt(inner)
        made = own.standard_normal((count, inner), dtype=np.float32) @ basis
        made += 0.1 * own.standard_normal((count, WIDTH), dtype=np.float32)
    else:
        made = own.standard_normal((count, WIDTH), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


FIRST = """
import sys, time
import faiss, numpy
from embedcam.index import Index
query = numpy.load(sys.argv[2])
start = time.perf_counter()
index = Index.open(sys.argv[1])
opened = time.perf_counter()
index.search(query, 10)
first = time.perf_counter()
index.search(query, 10)
print(opened - start, first - opened, time.perf_counter() - first)
"""


def first_report(rows: int, rounds: int, folder: Path) -> str:
    """Seconds of opening and of the first search, each in a process of its own."""
    encoding = LowRank(np.eye(WIDTH), np.zeros(WIDTH), "head", "embedding")
    path = write_index(folder / "first", near(rows, 0), encoding, Recipe(faiss="auto"))
    np.save(folder / "query.npy", near(1, 1))
    command = [sys.executable, "-c", FIRST, str(path), str(folder / "query.npy")]
    lines = []
    for pages in ("in memory", "dropped"):
        took = []
        for _ in range(max(5, rounds)):
            for file in path.rglob("*.*") if pages == "dropped" else ():
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            took.append([float(number) for number in done.stdout.split()])
        for what, seconds in zip(("opening", "first", "second"), np.array(took).T, strict=True):
            least, middle, most = np.quantile(seconds, [0, 0.5, 1])
            lines.append([what, pages, f"{middle:.4f}", f"{least:.4f} to {most:.4f}"])
    factory = Index.open(path, with_faiss=False).manifest.faiss.factory
    shutil.rmtree(path)
    return section(
        f"The first search, {rows:,} x {WIDTH}",
        f"`Index.open`, then `index.search` for one query, twice: {factory}, "
        f"{max(5, rounds)} processes that have imported embedcam.index and faiss; seconds.",
        ["what", "pages of the files", "median", "range"],
        lines,
    )


def report(rows: int, folder: Path) -> str:
    """One line for each kind of data, for queries that are not among the rows."""
    lines = []
    for kind in DATA:
        vectors, queries = vectors_of(kind, rows, 1), vectors_of(kind, QUERIES, 3)
        true = nearest(vectors, queries, NEAREST).positions
        factory = faiss_build.choose("auto", rows)
        began = time.process_time()
        index, _ = faiss_build.build(factory, vectors, "l2", np.arange(rows), auto=True)
        built = time.process_time()
        nprobe = enough_lists(index, vectors, "l2") or 0
        measured = time.process_time()
        options = faiss_build.parameters(index, nprobe, 1)
        fetch = faiss_build.candidates(index) * (NEAREST + SLACK)
        with faiss_build.threads(1):
            started = time.process_time()
            found = index.search(queries, fetch, params=options)[1]
            took = time.process_time() - started
        hits = [len(set(a) & set(b)) / NEAREST for a, b in zip(true, found, strict=True)]
        place = folder / "searching"
        place.mkdir()
        entry = faiss_files.write_faiss(place, index, "faiss-000001.index")
        size = os.path.getsize(place / str(entry["file"]))
        shutil.rmtree(place)
        seconds = (f"{built - began:.1f}", f"{measured - built:.1f}")
        numbers = (f"{np.mean(hits):.4f}", f"{1e3 * took / QUERIES:.2f}", f"{size / rows:.0f}")
        lines.append([kind, factory, str(nprobe), *numbers, *seconds])
    return section(
        f"FAISS chosen by auto, {rows:,} x {WIDTH}",
        f"Recall of the true {NEAREST} among the candidates that are re-ranked exactly, of "
        f"{QUERIES} queries that are not indexed; CPU milliseconds a query on one thread, bytes an "
        "image, CPU seconds to train and fill, and to measure how many lists are to be visited.",
        ["data", "factory", "nprobe", "recall", "ms", "bytes", "build s", "measure s"],
        lines,
    )
