"""What an index costs by itself: bytes an image, opening, searching."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from embedcam.index import Index, PartData, create, quantize_coarse, rebuild_faiss
from embedcam.index.encoding import Encoding, LowRank, TopM, fit_pca
from embedcam.offline.merge import header, layer_entry
from embedcam.recipe.recipe import Recipe

from .timing import Case, alternate, milliseconds, ratio, table, verdict

CHANNELS, WIDTH, GRID = 1280, 128, (7, 7)
BYTES_BAR, OPEN_BAR, GROWTH_BAR = 320, 1.0, 200.0
FACTORIES = ("Flat", "HNSW32", "IVF1024,SQ8")
NOT_COUNTED = ("ids", "labels", "paths", "embeddings")
BLOCK = 50_000

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
print(len(opened), seconds, grown, first, again)
"""


def make_index(
    path: Path,
    rows: int,
    encoding: Encoding,
    factory: str,
    folder: Path,
    clusters: int = 1000,
    trust: dict[str, Any] | None = None,
) -> Path:
    """An index of clustered unit vectors and random weights, its arrays never whole in memory."""
    arrays = {
        "vectors": _mapped(folder / "vectors", "f4", (rows, WIDTH)),
        "maps": _mapped(folder / "maps", "u1", (rows, *GRID)),
        "scales": _mapped(folder / "scales", "f4", (rows,)),
        **{
            name: _mapped(folder / f"field-{name}", field.dtype, (rows, *field.shape))
            for name, field in encoding.fields.items()
        },
    }
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((clusters, WIDTH), np.float32)
    for start in range(0, rows, BLOCK):
        part = slice(start, min(start + BLOCK, rows))
        n = part.stop - start
        arrays["vectors"][part] = near(centres, n, rng)
        arrays["maps"][part], arrays["scales"][part] = quantize_coarse(
            rng.random((n, *GRID), np.float32)
        )
        for name, values in _fields(encoding, n, rng).items():
            arrays[name][part] = values
    paths = [f"images/{row:08d}.jpg" for row in range(rows)]
    data = PartData(
        ids=paths,
        labels=[f"class {row % 1000}" for row in range(rows)],
        paths=paths,
        embeddings=arrays["vectors"],
        triplets_used=np.full(rows, 50, np.uint32),
        fields=[{name: arrays[name] for name in encoding.fields}],
        coarse=[(arrays["maps"], arrays["scales"])],
    )
    described = header(
        Recipe(faiss=factory),
        None,
        None,
        WIDTH,
        True,
        [layer_entry("features", GRID, encoding, GRID)],
    )
    if trust is not None:
        described["trust_calibration"] = trust
    create(path, described, [encoding.fitted], {"embedding_mean": centres[0]}, data)
    return path


def near(centres: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors `[n D]` around the centres."""
    chosen = centres[rng.integers(0, len(centres), n)]
    vectors = chosen + np.float32(0.7) * rng.standard_normal(chosen.shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def encodings(channels: int = CHANNELS, rank: int = 128, m: int = 50) -> dict[str, Encoding]:
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2 * rank, channels), np.float32)
    return {f"top-{m}": TopM(channels, m), f"rank {rank}": fit_pca(sample, rank)}


def _fields(encoding: Encoding, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if isinstance(encoding, LowRank):
        return encoding.encode_codes(rng.standard_normal((n, encoding.rank), np.float32))
    return encoding.encode(rng.standard_normal((n, encoding.n_channels), np.float32))


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.dtype(dtype), shape)


# -------------------------------------------------------------------- storage


def storage_report(rows: int, folder: Path) -> str:
    """Bytes an image, from the files of real index directories."""
    lines = []
    for name, encoding in encodings().items():
        path = make_index(folder / "storage", rows, encoding, "none", folder / "source")
        kept, named, once = bytes_of(path)
        lines.append([name, f"{kept / rows:.1f}", verdict(kept / rows, BYTES_BAR),
                      f"{named / rows:.1f}", f"{once / 1e6:.2f}"])  # fmt: skip
        shutil.rmtree(path)
        shutil.rmtree(folder / "source")
    return (
        f"\n## Bytes an image\n\nSums of file sizes of an index of {rows:,} images, "
        f"K = {CHANNELS}, D = {WIDTH}, own maps of {GRID[0]} x {GRID[1]}; FAISS apart. "
        "*Once*: manifest and fitted arrays.\n\n"
        + table(["weights", "beyond id, label, path, embedding", "bar",
                 "id, label, path, embedding", "once, MB"], lines)
    )  # fmt: skip


def bytes_of(path: Path) -> tuple[int, int, int]:
    """Bytes of the weights' and maps' files, of ids, labels, paths and embeddings, and once."""
    kept = named = once = 0
    for file in path.rglob("*"):
        if not file.is_file():
            continue
        size = file.stat().st_size
        if file.relative_to(path).parts[0] != "parts":
            once += size
        elif file.name.split(".")[0] in NOT_COUNTED:
            named += size
        else:
            kept += size
    return kept, named, once


# -------------------------------------------------------------------- open


def open_report(rows: int, rounds: int, folder: Path) -> str:
    """Seconds and growth of the resident set in a process that imported `embedcam.index` alone."""
    if not Path("/proc/self/statm").exists():
        return "\n## Opening\n\nNot measured: this system has no /proc.\n"
    path = make_index(
        folder / "large", rows, encodings()["rank 128"], "Flat", folder / "source", 4000
    )
    shutil.rmtree(folder / "source")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found = np.array([opened(path) for _ in range(max(3, rounds))])
    shutil.rmtree(path)
    seconds, grown, first, again = np.median(found, axis=0)
    return (
        f"\n## Opening {rows:,} images\n\nAn index of {size / 1e9:.2f} GB (D = {WIDTH}, rank 128, "
        "own maps, FAISS Flat), page cache warm, a process that imported `embedcam.index` alone; "
        f"medians of {len(found)} processes.\n\n"
        + table(
            ["what", "measured", "bar"],
            [
                ["opening, s", f"{seconds:.3f}", verdict(seconds, OPEN_BAR)],
                ["growth of the resident set, MB", f"{grown:.1f}", verdict(grown, GROWTH_BAR)],
                ["first search (loads FAISS), s", f"{first:.3f}", ""],
                ["second search, s", f"{again:.3f}", ""],
            ],
        )
    )


def opened(path: Path) -> tuple[float, float, float, float]:
    """Seconds to open, MB grown, seconds of the first and of the second search."""
    ran = subprocess.run(
        [sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True, check=True
    )
    _, seconds, grown, first, again = map(float, ran.stdout.split())
    return seconds, grown, first, again


# -------------------------------------------------------------------- search


def search_report(
    rows: int, queries: int, folder: Path, factories: tuple[str, ...] = FACTORIES
) -> str:
    """Single queries on one thread through `Index.search`."""
    encoding = LowRank(np.eye(WIDTH), np.zeros(WIDTH), "head", "embedding")
    path = make_index(folder / "search", rows, encoding, "none", folder / "source")
    shutil.rmtree(folder / "source")
    centres = np.random.default_rng(0).standard_normal((1000, WIDTH), np.float32)
    asked = near(centres, queries, np.random.default_rng(1))
    truth: np.ndarray | None = None
    lines = []
    for factory in factories:
        built = Case(partial(rebuild_faiss, path, factory)).seconds()
        with Index.open(path) as index:
            found = np.concatenate([index.search(query[None], 10).positions for query in asked])
            truth = found if truth is None else truth
            hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
            once, again = (Case(partial(_search_next, index, cycle(asked))) for _ in range(2))
            took = alternate({"once": once, "again": again}, queries, warmup=10)
            size = (path / index.manifest.faiss.file).stat().st_size
        lines.append(
            [
                factory,
                milliseconds(took["once"]),
                ratio(took["again"], took["once"]),
                f"{np.mean(hits) / 10:.3f}",
                f"{size / 1e6:.1f}",
                f"{built:.1f}",
            ]
        )
    shutil.rmtree(path)
    return (
        f"\n## Search of {rows:,} x {WIDTH}\n\n`Index.search`, single queries, 10 neighbours, "
        "FAISS on one thread: it proposes, the stored embeddings decide. Unit vectors around 1,000 "
        "centres. Recall@10 is against Flat.\n\n"
        + table(["FAISS", "ms", "again (A/A)", "recall@10", "MB", "built in s"], lines)
    )


def _search_next(index: Index, queries: Iterator[np.ndarray]) -> None:
    index.search(next(queries)[None], 10)
