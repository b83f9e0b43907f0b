"""The lock that a forked child finds open."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from embedcam._files import ProcessLock, compute_on_one_thread


def test_one_thread_at_a_time_and_the_same_again() -> None:
    lock, inside, most = ProcessLock(), [0], [0]

    def enter(_: int) -> None:
        for _ in range(200):
            with lock, lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1]
    assert inside == [0]


def test_it_is_left_after_an_error() -> None:
    lock = ProcessLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    taken = threading.Event()

    def take() -> None:
        with lock:
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(10)
    assert taken.is_set()


def test_another_process_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held, done = ProcessLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            assert done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    own = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: own + 1)
        with lock:
            pass
    done.set()
    thread.join()


def test_torch_is_told_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=told.append))
    compute_on_one_thread()
    assert told == [1]
    for absent in (lambda: monkeypatch.setitem(sys.modules, "torch", None),
                   lambda: monkeypatch.delitem(sys.modules, "torch")):  # fmt: skip
        absent()
        compute_on_one_thread()
    assert told == [1]
