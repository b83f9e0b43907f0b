"""Worker processes, each with an explainer of its own.

    python examples/workers.py

Start workers with "spawn" and give them the index's path: an `Explainer` is not pickled, and the
files of an index are mapped, so that all workers share one copy in memory. Forked workers work too,
with one thread for torch and FAISS, as long as the parent is not computing while it forks.
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from service_features import KINDS, build, features

from embedcam import Explainer

_OF_THIS_WORKER: list[Explainer] = []


def open_explainer(path: str) -> None:
    _OF_THIS_WORKER.append(Explainer(path))


def explain(query: tuple[int, int]) -> tuple[int, str, list[str]]:
    """(process, kind of the query, ids found) for a made-up query; arguments are pickled."""
    (explainer,) = _OF_THIS_WORKER
    label, seed = query
    why = explainer.explain_features(*features(label, seed), n_neighbors=3)
    return os.getpid(), KINDS[label], why.ids


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.index"
        build(path)
        with ProcessPoolExecutor(
            max_workers=2,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=open_explainer,
            initargs=(str(path),),
        ) as pool:
            queries = [(number % len(KINDS), 1000 + number) for number in range(12)]
            answers = list(pool.map(explain, queries))
        right = sum(ids[0].startswith(kind) for _, kind, ids in answers)
        print(f"{right} of {len(answers)} queries found their kind,", end=" ")
        print("in this process" if {os.getpid()} & {pid for pid, *_ in answers} else "in workers")


if __name__ == "__main__":
    sys.exit(main())
