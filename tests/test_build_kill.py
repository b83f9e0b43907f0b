"""SIGKILL at any moment of a build, addition, refit or shard: again, it ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def killer():
    """A process that forks and kills; importing torch is paid for once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("build_killer.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        yield process
        process.stdin.close()
        process.wait(60)


@pytest.mark.parametrize(
    "scenario",
    ["pooled", "other", "add", "update", "refit", "another_recipe", "outside", "shards", "at_once"],
)
def test_a_killed_job_run_again_ends_in_the_same_bytes(tmp_path, killer, scenario) -> None:
    killer.stdin.write(f"{scenario} {tmp_path}\n")
    killer.stdin.flush()
    assert json.loads(killer.stdout.readline()) == []
