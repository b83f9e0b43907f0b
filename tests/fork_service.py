"""Run by test_forking.py: a parent that computes on two threads, and the children it forks.

FOLDER holds `index`, and `again`: the same with an image less. A child may hang: set a limit.
"""

import os
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from photo_samples import network_of, picture

from embedcam import Explainer, Index
from embedcam.errors import IndexFormatError

# From Python 3.12 on: that forking beside threads is dangerous, which is the point here.
warnings.filterwarnings("ignore", category=DeprecationWarning)


def computed_with_two(explainer):
    """Leave OpenMP pools of two threads behind, of torch and of FAISS, in this very thread."""
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    with torch.inference_mode():
        large = torch.rand(8, 64, 64, 64)
        torch.nn.functional.conv2d(large, torch.rand(64, 64, 3, 3))
        large.exp().sum()
    flat = faiss.IndexFlatL2(64)
    flat.add(np.random.default_rng(0).random((20_000, 64), np.float32))
    flat.search(np.random.default_rng(1).random((200, 64), np.float32), 5)
    explainer.explain_batch([picture(0, 1), picture(1, 2)])


def child(run):
    """Run in a forked child, and fail if that fails."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a child failed"


def answers(explainer):
    """Of every way to ask, as arrays; forward passes and searches large enough for two threads."""
    pictures = [picture(n % 3, 70 + n) for n in range(64)]
    found = explainer.explain_batch(pictures)
    found += [explainer.explain(pictures[0]), explainer.explain(pictures[1], result="1/1.png")]
    activations = np.random.default_rng(0).random((64, 8, 8, 8), np.float32)
    vectors = explainer.index.embeddings(np.arange(64) % 30)
    found += explainer.explain_features(vectors, activations)
    ids = [int(name[0]) * 100 + int(name[2:-4]) for one in found for name in one.ids]
    return [np.stack([one.cam.sum() for one in found]), found[0].cam, np.array(ids)]


def alike(found, expected):
    # One thread adds up in another order than two.
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def explains(folder, explainer):
    """A child explains as its parent does, from an index of its own, on one thread."""
    expected, inherited = answers(explainer), explainer.index

    def run():
        alike(answers(explainer), expected)
        assert explainer.index is not inherited
        assert explainer.index.n_threads == 1
        assert torch.get_num_threads() == 1
        child(lambda: alike(answers(explainer), expected))  # and a child of the child

    child(run)
    assert explainer.index is inherited
    assert torch.get_num_threads() == 2
    alike(answers(explainer), expected)


def in_threads(folder, explainer):
    """Threads of a child share what the first of them opened."""
    expected = answers(explainer)

    def run():
        start = threading.Barrier(4)

        def ask(_):
            start.wait(10)
            alike(answers(explainer), expected)
            return explainer.index

        with ThreadPoolExecutor(4) as pool:
            assert len(set(map(id, pool.map(ask, range(4))))) == 1

    child(run)


def locks_held(folder, explainer):
    """What another thread of the parent held during the fork, a child does not wait for."""
    expected, held, go_on = answers(explainer), threading.Event(), threading.Event()

    def hold():
        with explainer._lock, explainer.network.runner.lock, explainer.index.faiss_file._lock:
            held.set()
            go_on.wait(60)

    holding = threading.Thread(target=hold)
    holding.start()
    held.wait(10)
    try:
        child(lambda: alike(answers(explainer), expected))
    finally:
        go_on.set()
        holding.join()


def index_alone(folder, explainer):
    """An index without an explainer, FAISS loaded before the fork or after it."""

    def run():
        np.testing.assert_array_equal(index.search(queries, 5).positions, expected)

    for early in (True, False):
        with Index.open(folder / "index") as index, Index.open(folder / "index") as other:
            queries = np.tile(index.embeddings(np.arange(30)), (20, 1))
            expected = other.search(queries, 5).positions
            if early:
                index.load()
            child(run)


def reloads(folder, explainer):
    """A child takes what lies there when it first asks, and reloads for itself."""
    place = folder / "current"
    place.symlink_to(folder / "index")
    served = Explainer(place, explainer.network)
    served.explain(picture(0, 1))

    def switch(name):
        (folder / "next").symlink_to(folder / name)
        os.replace(folder / "next", place)

    def run():
        assert len(served.index) == 41
        switch("index")
        assert served.reload()
        assert len(served.index) == 42
        assert served.index.n_threads == 1
        assert not served.reload()
        answers(served)

    switch("again")
    child(run)
    assert len(served.index) == 42
    # What cannot be opened any more is served as the parent had it.
    (folder / "nothing").mkdir()
    switch("nothing")
    before = answers(served)

    def runs_on():
        descriptors = os.listdir("/proc/self/fd")
        alike(answers(served), before)
        assert os.listdir("/proc/self/fd") == descriptors
        with pytest.raises(IndexFormatError, match=r"manifest\.json"):
            served.reload()

    child(runs_on)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for scene in sys.argv[2:]:
        asked = Explainer(folder / "index", network_of(), n_neighbors=3)
        computed_with_two(asked)
        globals()[scene](folder, asked)
        print(f"{scene}: done", flush=True)
