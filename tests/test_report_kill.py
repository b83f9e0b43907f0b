"""SIGKILL at any moment of a report: a whole page or none; run again, it ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_killed_report_run_again_ends_in_the_same_bytes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    script = Path(__file__).with_name("report_killer.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
