"""`explain_features` of a service that has its own embeddings and activations, search apart."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from embedcam import Explainer, Index
from embedcam.index import Neighbors
from embedcam.index.calibration import Calibration
from embedcam.index.encoding import TopM

from .indexes import make_index, near
from .timing import Case, alternate, table, verdict

CHANNELS, KEPT, GRID, NEIGHBORS = 2048, 50, (7, 7), 10
BAR = 1.0
RUNS = 5
Query = tuple[np.ndarray, np.ndarray, list[str], Neighbors]
"""Embedding `[D]`, activations `[K H W]`, the ids and the places that a search found."""


def calibration(width: int, neighbors: int) -> dict[str, Any]:
    """One that costs what any costs; its figures mean nothing."""
    made = Calibration(
        mean=(0.0,) * width,
        scale=(1.0,) * width,
        linear=(0.1,) * width,
        intercept=0.0,
        scores=tuple(np.linspace(-3, 3, 20)),
        correlations=tuple(np.linspace(0, 1, 20)),
        lows=tuple(np.linspace(0, 0.8, 20)),
        largest_distance=2.0,
        neighbors=neighbors,
        images=1000,
    )
    return made.to_dict()


TRUST = {"one": calibration(3, 1), "several": calibration(6, 5)}


class Asked:
    """Queries, and one explainer for each way to ask them."""

    def __init__(self, paths: dict[str, Path], queries: int) -> None:
        self.explainers = {name: Explainer(path) for name, path in paths.items()}
        self.index = Index.open(paths["plain"])
        # Search apart: these are told the rows that a search found, and explain the rest.
        self.apart = {name: Explainer(Index.open(path)) for name, path in paths.items()}
        for one in self.apart.values():
            one.index.search = lambda *_, **__: self.found  # type: ignore[method-assign]
        self.queries = self._make(queries)
        self.found = self.queries[0][3]

    def _make(self, count: int) -> list[Query]:
        centres = np.random.default_rng(0).standard_normal((1000, self.index.width), np.float32)
        rng = np.random.default_rng(1)
        # Enough activations that they are not in the processor's cache already.
        maps = rng.random((min(count, 200), CHANNELS, *GRID), np.float32)
        made = []
        for number, vector in enumerate(near(centres, count, rng)):
            found = self.index.search(vector[None], NEIGHBORS)
            ids = self.index.ids[found.positions[0]]
            made.append((vector, maps[number % len(maps)], ids, found))
        return made

    def cases(self) -> dict[str, Case]:
        """By name; the last two search."""
        turns = cycle(self.queries)
        runs: dict[str, Callable[[Query], Any]] = {
            "search apart": lambda q: self._apart("plain", q),
            "search apart, with trust": lambda q: self._apart("trust", q),
            "ids given": lambda q: self.explainers["plain"].explain_features(
                q[0], q[1], neighbors=q[2]
            ),
            "ids given, with trust": lambda q: self.explainers["trust"].explain_features(
                q[0], q[1], neighbors=q[2]
            ),
            "search alone": lambda q: self.index.search(q[0][None], NEIGHBORS),
            "with search": lambda q: self.explainers["plain"].explain_features(
                q[0], q[1], n_neighbors=NEIGHBORS
            ),
        }
        return {name: Case(run, lambda: self._next(turns)) for name, run in runs.items()}

    def _next(self, turns: Iterator[Query]) -> Query:
        query = next(turns)
        self.found = query[3]
        return query

    def _apart(self, name: str, query: Query) -> Any:
        return self.apart[name].explain_features(query[0], query[1], n_neighbors=NEIGHBORS)

    def close(self) -> None:
        """Let go of the indexes."""
        for one in (*self.explainers.values(), *self.apart.values()):
            one.index.close()
        self.index.close()


def make_indexes(rows: int, folder: Path) -> dict[str, Path]:
    """The same rows without and with a calibration of trust."""
    paths = {}
    for name, trust in (("plain", None), ("trust", TRUST)):
        path, source = folder / f"features-{name}", folder / "features-source"
        encoding = TopM(CHANNELS, min(KEPT, CHANNELS))
        paths[name] = make_index(path, rows, encoding, "Flat", source, trust=trust)
        shutil.rmtree(source)
    return paths


def report(rows: int, queries: int, folder: Path) -> str:
    """Median and 99th percentile of single queries."""
    paths = make_indexes(rows, folder)
    with closing(Asked(paths, queries)) as asked:
        runs = [alternate(asked.cases(), queries, warmup=5) for _ in range(RUNS)]
    for path in paths.values():
        shutil.rmtree(path)
    lines = []
    for name in runs[0]:
        middle, late = (
            [1e3 * float(np.percentile(run[name], share)) for run in runs] for share in (50, 99)
        )
        bar = None if name in ("search alone", "with search") else BAR
        lines.append([name, spread(middle), spread(late), verdict(float(np.median(middle)), bar)])
    return (
        f"\n## explain_features among {rows:,} images\n\nSingle queries, {NEIGHBORS} neighbours, "
        f"top {KEPT} of K = {CHANNELS}, activations {GRID[0]} x {GRID[1]} in and map out, D = "
        f"{asked.index.width}, FAISS Flat on one thread; milliseconds. Medians over {RUNS} runs of "
        f"{queries} queries each, in brackets the best and the worst run. *Search apart*: the "
        "index is told the rows that a search found before; *ids given*: `neighbors=`. The cases "
        "take turns with searches, which empty the processor's caches.\n\n"
        + table(["case", "p50", "p99", "bar of p50"], lines)
    )


def spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
