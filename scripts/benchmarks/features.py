"""`explain_features` of a service that has its own embeddings and activations, search apart."""

import shutil
from collections.abc import Callable
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcam import Explainer, Index, Recipe
from embedcam.index import Neighbors
from embedcam.index.encoding import TopM

from .cases import HEAD_WIDTH, TRUST, near, write_index
from .timing import Case, alternate, section, verdict

CHANNELS, KEPT, GRID, NEIGHBORS = 2048, 50, (7, 7), 10
BAR, RUNS = 1.0, 5


class Query(NamedTuple):
    """Embedding `[D]`, activations `[K H W]`, the ids and the places that a search found."""

    embedding: np.ndarray
    activations: np.ndarray
    ids: list[str]
    found: Neighbors


class Asked:
    """Queries, and one explainer for each way to ask them."""

    def __init__(self, paths: dict[str, Path], count: int) -> None:
        self.explainers = {name: Explainer(path) for name, path in paths.items()}
        self.index = Index.open(paths["plain"])
        # Search apart: these are told the rows that a search found, and explain the rest.
        self.apart = {name: Explainer(Index.open(path)) for name, path in paths.items()}
        for one in self.apart.values():
            one.index.search = lambda *_, **__: self.found  # type: ignore[method-assign]
        # Enough activations that they are not in the processor's cache already.
        maps = np.random.default_rng(1).random((min(count, 200), CHANNELS, *GRID), np.float32)
        self.queries = []
        for number, vector in enumerate(near(count, 1)):
            found = self.index.search(vector[None], NEIGHBORS)
            ids = self.index.ids[found.positions[0]]
            self.queries.append(Query(vector, maps[number % len(maps)], ids, found))
        self.found = self.queries[0].found

    def cases(self) -> dict[str, Case]:
        """By name; the last two search."""
        turns = cycle(self.queries)

        def following() -> Query:
            query = next(turns)
            self.found = query.found
            return query

        def asking(explainer: Explainer) -> Callable[[Query], object]:
            return lambda q: explainer.explain_features(*q[:2], n_neighbors=NEIGHBORS)

        def naming(explainer: Explainer) -> Callable[[Query], object]:
            return lambda q: explainer.explain_features(*q[:2], neighbors=q.ids)

        runs: dict[str, Callable[[Query], object]] = {
            "search apart": asking(self.apart["plain"]),
            "search apart, with trust": asking(self.apart["trust"]),
            "ids given": naming(self.explainers["plain"]),
            "ids given, with trust": naming(self.explainers["trust"]),
            "search alone": lambda q: self.index.search(q.embedding[None], NEIGHBORS),
            "with search": asking(self.explainers["plain"]),
        }
        return {name: Case(run, following) for name, run in runs.items()}

    def close(self) -> None:
        """Let go of the indexes."""
        for one in (*self.explainers.values(), *self.apart.values()):
            one.index.close()
        self.index.close()


def make_indexes(rows: int, folder: Path) -> dict[str, Path]:
    """The same rows without and with a calibration of trust."""
    vectors, encoding = near(rows, 0), TopM(CHANNELS, KEPT)
    return {
        name: write_index(
            folder / f"features-{name}", vectors, encoding, Recipe(faiss="Flat"), GRID, trust=trust
        )
        for name, trust in (("plain", None), ("trust", TRUST))
    }


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
    return section(
        f"explain_features among {rows:,} images",
        f"Single queries, {NEIGHBORS} neighbours, "
        f"top {KEPT} of K = {CHANNELS}, activations {GRID[0]} x {GRID[1]} in and map out, D = "
        f"{HEAD_WIDTH}, FAISS Flat on one thread; milliseconds. Medians over {RUNS} runs of "
        f"{queries} queries each, in brackets the best and the worst run. *Search apart*: the "
        "index is told the rows that a search found before; *ids given*: `neighbors=`. The cases "
        "take turns with searches, which empty the processor's caches.",
        ["case", "p50", "p99", "bar of p50"],
        lines,
    )


def spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
