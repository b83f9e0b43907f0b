"""As many images as one machine takes: built from half precision, opened, searched, explained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import scale
from .timing import section

WIDTH, QUERIES, NEAREST = 64, 100, 5
_ASKING = """
import json, sys, time
import faiss, numpy
from embedcam import Explainer
from embedcam.index import Index, IndexRows, nearest

path, queries, k = sys.argv[1], numpy.load(sys.argv[2]), int(sys.argv[3])
anonymous, resident = ("RssAnon", "VmHWM")

def memory(name):
    text = open("/proc/self/status").read()
    return int(text.partition(name + ":")[2].split()[0]) << 10

def timed(what):
    begun = time.perf_counter(), time.process_time()
    result = what()
    return result, time.perf_counter() - begun[0], time.process_time() - begun[1]

before = memory(anonymous)
index, opened, _ = timed(lambda: Index.open(path))
_, first, _ = timed(lambda: index.search(queries[:1], k))
each = [timed(lambda: index.search(query[None], k)) for query in queries]
found = numpy.concatenate([one[0].positions for one in each])
searching = memory(anonymous) - before
maps = numpy.random.default_rng(0).random((index.embeddings([0]).shape[1], 7, 7), numpy.float32)
explainer = Explainer(index)
explainer.explain_features(queries[0], maps, n_neighbors=k)
_, explained, _ = timed(lambda: explainer.explain_features(queries[0], maps, n_neighbors=k))
peak = memory(resident)
true = nearest(IndexRows(index), queries, k).positions
hits = [len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found.tolist())]
entry = index.manifest.faiss
print(json.dumps({
    "opened": opened, "first": first, "explained": explained,
    "wall": float(numpy.median([one[1] for one in each])),
    "cpu": float(numpy.mean([one[2] for one in each])),
    "anonymous": searching, "resident": peak, "recall": float(numpy.mean(hits)),
    "factory": entry.factory, "nprobe": entry.search.nprobe,
    "faiss": sum(one.bytes for one in (entry, *entry.more)),
}))
"""


def report(rows: int, folder: Path, width: int = WIDTH) -> str:
    """What one build of so many images takes, and what its index answers."""
    made = folder / "large"
    options = scale.write_features(made, rows, width=width, dtype="float16")
    queries = scale.features_of(np.arange(QUERIES), [2, 0], scale.LABELS, width)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    np.save(made / "queries.npy", queries)
    built = scale.run(["build", str(made / "index"), *options, "--faiss", "auto"], made)
    size = sum(file.stat().st_size for file in (made / "index").rglob("*.*"))
    asked = [str(made / "index"), str(made / "queries.npy"), str(NEAREST)]
    told = json.loads(
        subprocess.run(
            [sys.executable, "-c", _ASKING, *asked],
            check=True, stdout=subprocess.PIPE, env=scale.environment(),
        ).stdout
    )  # fmt: skip
    shutil.rmtree(made)
    visited = f", {told['nprobe']} lists visited" if told["nprobe"] else ""
    lines: list[list[object]] = [
        [f"build: {one.name}", f"{one.cpu:.0f} CPU s", _gigabytes(one.peak - built.begun)]
        for one in built.stages
    ]
    lines += [
        ["build: all stages", f"{built.cpu:.0f} CPU s", _gigabytes(built.peak - built.begun)],
        ["open", f"{told['opened']:.3f} s", ""],
        ["the first search", f"{told['first']:.2f} s", ""],
        [
            f"each of {QUERIES} more",
            f"{1e3 * told['wall']:.1f} ms, {1e3 * told['cpu']:.1f} CPU ms",
            _gigabytes(told["anonymous"]),
        ],
        ["explain_features, 5 neighbours", f"{1e3 * told['explained']:.0f} ms", ""],
    ]
    return section(
        f"{rows:,} x {width}",
        f"Unit vectors around {scale.LABELS:,} labels' centres, in half precision, from memory-"
        f"mapped arrays with `embedcam build --embeddings --pooled --ids --faiss auto`: "
        f"{told['factory']}{visited}. The most anonymous memory while a "
        f"stage ran, beyond what the imports took; with the mapped files' pages, which the system "
        f"takes back, the build held {_gigabytes(built.resident)} and searching "
        f"{_gigabytes(told['resident'])}. The index takes {_gigabytes(size)} on disk, "
        f"{_gigabytes(told['faiss'])} of it the search file. Of {QUERIES} queries that are not "
        f"indexed {told['recall']:.4f} of the true {NEAREST} were found.",
        ["what", "time", "anonymous memory"],
        lines,
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{max(size, 0) / 1e6:.0f} MB"
