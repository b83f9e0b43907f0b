"""The examples for services run as a user runs them, warnings being errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
WITHOUT_TORCH = """
import runpy, sys
sys.modules.update(torch=None, torchvision=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-W", "error", *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    )


def told_by(process):
    try:
        told, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return tmp_path_factory.mktemp("examples") / "my.index"


@pytest.fixture(scope="module")
def told(index):
    """What each prints; they run at the same time."""
    options = {"service_features": ["--index", index], "threads": [], "workers": []}
    running = {name: started(EXAMPLES / f"{name}.py", *words) for name, words in options.items()}
    try:
        yield {name: told_by(process) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()


def test_a_service_with_its_own_features(told, index):
    found, *cam, named = told["service_features"].splitlines()
    assert (found.count("violin/"), named) == (5, "named: heron/3.jpg")
    # The object of the made-up query covers 3 x 3 of 7 x 7 cells; the rest is dark.
    cells = [row[4:18:2] for row in cam]
    lit = [(y, x) for y, row in enumerate(cells) for x, cell in enumerate(row) if cell in "+*#%@"]
    assert len(cam) == 7
    assert 4 <= len(lit) <= 9
    assert max(y for y, _ in lit) - min(y for y, _ in lit) == 2
    again = started("-c", WITHOUT_TORCH, EXAMPLES / "service_features.py", "--index", index)
    assert told_by(again) == told["service_features"]


def test_threads_with_a_reload_and_spawned_workers(told):
    *_, logged, changed, answered, gone = told["threads"].splitlines()
    assert "serving generation 2 with 23 images, after generation 1 with 24 images" in logged
    assert [changed, answered] == ["changed: True", "answered: 80 of 80"]
    assert gone.endswith("in answers after the change: False")
    assert told["workers"] == "12 of 12 queries found their kind, in workers\n"
