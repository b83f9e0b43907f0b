"""An index opened, verified, searched and explained, in a child with a limit of time and memory."""

import contextlib
import io
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss  # before children are forked, so that none of them loads it
import numpy as np

import embedcam.cli.output  # loaded beforehand as well
import embedcam.cli.parser  # noqa: F401
from embedcam import EmbedcamError, Explainer
from embedcam.cli import main
from embedcam.cli.networks import network_of_index
from embedcam.index import Index
from embedcam.index.verify import verify
from embedcam.recipe.recipe import Recipe

from .kinds import queries

SECONDS, MEMORY_BYTES, MESSAGE_CHARACTERS = 10, 1 << 30, 2000
REFUSED, SAME, NAMED, FREE = "refused", "same answers", "named by verify", "another valid index"
OUTCOMES = (REFUSED, SAME, NAMED, FREE)
Answers = Mapping[str, Any]
faiss.omp_set_num_threads(1)


class Outcome(NamedTuple):
    """What became of one index."""

    kind: str
    said: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is none of what may happen."""
        return self.kind not in OUTCOMES


class Expected:
    """What the whole index answers."""

    def __init__(self, path: Path) -> None:
        with Index.open(path) as index:
            self.n_layers = len(index.layers)
            self.with_faiss = index.manifest.faiss is not None
            self.names = index.ids[index.live_positions()[:3]]
        self.answers = {name: step(path) for name, step in self.steps().items()}

    def steps(self) -> dict[str, Callable[[Path], Answers]]:
        """What is done with an index, each from its beginning."""
        return {
            "verify": _verify,
            "rows": _rows,
            "search": self._search,
            "explain": self._explain,
            "info": _info,
            "settings": _settings,
        }

    def _search(self, path: Path) -> Answers:
        if not self.with_faiss:
            return {}
        with Index.open(path) as index:
            near = index.search(queries(self.n_layers)[0], 3)
            return {"near": near.positions, "distances": near.distances}

    def _explain(self, path: Path) -> Answers:
        vectors, maps = queries(self.n_layers)
        names, found = None if self.with_faiss else self.names, dict[str, Any]()
        with Explainer(path, n_neighbors=3) as explainer:
            for row, vector in enumerate(vectors):
                one, *others = (layer[row] for layer in maps)
                why = explainer.explain_features(
                    vector, [one, *others] if others else one, neighbors=names
                )
                told = {"ids": list(why.ids), "labels": list(why.labels), "map": why.cam,
                        "weights": why.weights, "distances": why.distances, "trust": why.trust,
                        "match": why.match}  # fmt: skip
                found |= {f"{name} {row}": value for name, value in told.items()}
                for share in (why.trust, why.trust_low, why.match):
                    assert share is None or 0 <= share <= 1, f"trust or match of {share}"
        return found


def judged(path: Path, expected: Expected, free: Sequence[str] = ()) -> Outcome:
    """Say what becomes of an index; answers whose names begin as `free` says may differ."""
    refused, other = dict[str, str](), False
    for name, step in expected.steps().items():
        try:
            answers = step(path)
        except EmbedcamError as error:
            refused[name] = said = str(error)
            if "\n" in said or len(said) > MESSAGE_CHARACTERS:
                return Outcome("FAILED", f"{name}: {len(said)} characters: {said[:300]}")
            if name == "rows" and refused.get("verify") == said:
                return Outcome(REFUSED, said)  # it cannot be opened
            continue
        except Exception as error:
            return Outcome("FAILED", f"{name}: {type(error).__name__}: {str(error)[:300]}")
        other |= any(
            not (free and key.startswith(tuple(free))) and not _alike(answers.get(key), whole)
            for key, whole in expected.answers[name].items()
        )
    if "verify" in refused:
        return Outcome(NAMED, refused["verify"])
    if other:
        return Outcome("FAILED", "other answers, and verify finds nothing")
    return Outcome(REFUSED, next(iter(refused.values()))) if refused else Outcome(SAME)


def in_child(work: Callable[[Callable[[Any], None]], None]) -> list[Any]:
    """What `work` sends, from a forked child that ends after `SECONDS` without sending."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _limited(lambda: work(lambda sent: _send(writing, sent)))
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = io.BytesIO(pipe.read())
    _, status = os.waitpid(child, 0)
    received = []
    with contextlib.suppress(EOFError):
        while True:
            received.append(pickle.load(data))  # of our own child
    if os.WIFSIGNALED(status):
        ended = signal.Signals(os.WTERMSIG(status))
        hung = ended == signal.SIGALRM
        what = f"hangs over {SECONDS} s" if hung else f"ended by {ended.name}"
        received.append(Outcome("FAILED", what))
    elif status:
        received.append(Outcome("FAILED", f"exit status {os.WEXITSTATUS(status)}"))
    return received


def _limited(work: Callable[[], None]) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        warnings.simplefilter("ignore")
        work()
        os._exit(0)
    except BaseException:
        os._exit(9)


def _send(pipe: int, sent: Any) -> None:
    os.write(pipe, pickle.dumps(sent))
    signal.alarm(SECONDS)


def _verify(path: Path) -> Answers:
    verify(path)
    return {}


def _rows(path: Path) -> Answers:
    with Index.open(path, with_faiss=False) as index:
        found: dict[str, Any] = {"ids": index.ids[:], "labels": index.labels[:]}
        index.paths[:]
        found["places"] = [index.position(name) for name in index.ids[index.live_positions()]]
        for number in range(len(index.layers)):
            found[f"weights {number}"] = index.weights(np.arange(index.n_rows), number)
            found[f"coarse {number}"] = index.coarse(np.arange(index.n_rows), number)
        return found


def _info(path: Path) -> Answers:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        status = main(["info", str(path)])
    if status in (0, 5):
        return {}
    raise RuntimeError(f"exit status {status}: {said.getvalue()[:300]}")


def _settings(path: Path) -> Answers:
    with Index.open(path, with_faiss=False) as index:
        Recipe.of_index(index.manifest)
        if index.manifest.network is not None:
            network_of_index(index.manifest, {})
    return {}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.shape == b.shape and np.allclose(a, b, 1e-6, 1e-7)
    return bool(a == b)
