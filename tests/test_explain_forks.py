"""Forked children of a parent that computed on two OpenMP threads: they answer, and never hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from photo_samples import build, network_of, write_photos

from embedcam.index import remove

HERE = Path(__file__).parent
LIMIT = 120
SCENES = ["explains", "in_threads", "locks_held", "index_alone", "reloads"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, and looks into /proc; elsewhere use spawn"
)


def run(*command: str) -> str:
    """What a process prints that is killed, with its children, after `LIMIT` seconds."""
    places = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": places}
    started = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        told, _ = started.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        told, _ = started.communicate()
        return f"{told}\nstill running after {LIMIT} s"
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("forks")
    photos = write_photos(made / "photos", each=14)
    for name in ("index", "again"):
        build(photos, made / name, network_of(), trust=False)
    remove(made / "again", ["0/0.png"])
    return made


@pytest.fixture(scope="module")
def told(folder: Path) -> str:
    """Of all scenes in one process, for starting one costs more than they do."""
    return run(str(HERE / "fork_service.py"), str(folder), *SCENES)


@pytest.mark.parametrize("scene", SCENES)
def test_children(told: str, scene: str) -> None:
    assert f"{scene}: done\n" in told
