"""Ctrl-C in the command line's process: exit code 130 and one line, whenever it comes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIGNALLED = """
import atexit, os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

name = os.environ["INTERRUPT_AT"]
if name == "exit":
    atexit.register(interrupt)

def hook(event, about):
    if event == "import" and about[0] == name:
        interrupt()

sys.addaudithook(hook)
"""
FACTORY = """
import os, signal, sys

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def answered():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    except BaseException as error:
        raise RuntimeError("some library's own words") from error

def swallowed():
    Dying()
    raise RuntimeError("never said")

def plain():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
"""
SAID = "embedcam: interrupted\n"
INFO = ("-m", "embedcam", "info", "nowhere")
BUILD = ("-m", "embedcam", "build", "photos", "index")
SCRIPT = ("-c", "import sys; from embedcam.__main__ import run; sys.exit(run())", *INFO[2:])


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Let children be interrupted, though whoever started the tests may have them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process that is interrupted where it imports a module, or as it exits."""
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED)
    (tmp_path / "own_factory.py").write_text(FACTORY)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(*words: str, at: str = "") -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": path, "INTERRUPT_AT": at}
        words = [sys.executable, *words]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)

    return run


@pytest.mark.parametrize(
    "name",
    ["embedcam.cli.interrupts", "embedcam.cli", "argparse", "embedcam.index", "numpy", "exit"],
)
def test_whatever_is_being_imported(run, name: str) -> None:
    done = run(*INFO, at=name)
    refused = "embedcam: nowhere: there is no index here; build one with `embedcam build`\n"
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (refused + SAID if name == "exit" else SAID)


def test_the_script_as_the_module_and_where_it_is_told_to_ignore_it(run) -> None:
    done = run(*SCRIPT, at="numpy")
    assert (done.returncode, done.stderr) == (130, SAID)
    assert run(*SCRIPT).returncode == 5
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SCRIPT[1]}"
    assert run("-c", ignoring, *SCRIPT[2:], at="numpy").returncode == 5


@pytest.mark.parametrize("factory", ["plain", "answered", "swallowed"])
def test_in_code_that_answers_it_by_something_else(run, factory: str) -> None:
    done = run(*BUILD, "--network", f"own_factory:{factory}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", SAID)


def test_importing_the_package_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    code = (
        "import signal, sys; sys.argv[0] = '-m'; import embedcam, embedcam.cli\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-c", code, "embedcam"], check=True, cwd=ROOT)
    assert signal.getsignal(signal.SIGINT) is before
