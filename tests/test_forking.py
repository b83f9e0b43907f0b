"""Forked children: the lock they find open, and answers after two OpenMP threads, never a hang."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from photo_samples import build, network_of, write_photos

from embedcam._files import ProcessLock, compute_on_one_thread
from embedcam.index import remove

HERE = Path(__file__).parent
LIMIT = 120
SCENES = ["explains", "in_threads", "locks_held", "index_alone", "reloads"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What all scenes print in one process, killed with its children after `LIMIT` seconds."""
    made = tmp_path_factory.mktemp("forks")
    photos = write_photos(made / "photos", each=14)
    for name in ("index", "again"):
        build(photos, made / name, network_of(), trust=False)
    remove(made / "again", ["0/0.png"])
    places = os.pathsep.join([str(HERE), *sys.path])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes["env"] = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": places}
    command = [sys.executable, str(HERE / "fork_service.py"), str(made), *SCENES]
    started = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        return started.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        return f"{started.communicate()[0]}\nstill running after {LIMIT} s"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
@pytest.mark.parametrize("scene", SCENES)
def test_children(told: str, scene: str) -> None:
    assert f"{scene}: done\n" in told


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
    assert (most, inside) == ([1], [0])


def test_it_is_left_after_an_error_and_another_process_does_not_wait(monkeypatch) -> None:
    lock, held, done = ProcessLock(), threading.Event(), threading.Event()
    with pytest.raises(KeyError), lock:
        raise KeyError

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
    for torch in (SimpleNamespace(set_num_threads=told.append), None):
        monkeypatch.setitem(sys.modules, "torch", torch)
        compute_on_one_thread()
    monkeypatch.delitem(sys.modules, "torch")
    compute_on_one_thread()
    assert told == [1]
