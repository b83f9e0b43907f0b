"""Copies of rows that are killed at random moments, and run again: each row once, as it was."""

import random
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from index_samples import make
from store_samples import read_back

from embedcam.index import Index
from embedcam.stores import Table, copy_rows, open_store

N, KILLS = 400, 4
URLS = {"lance": "lance:{}/rows", "qdrant": "qdrant:{}/rows", "parquet": "{}/rows.parquet"}


def begin(url: str, index: Path) -> subprocess.Popen[str]:
    """Start a copy; return once its store is open."""
    command = [sys.executable, str(Path(__file__).with_name("store_killer.py")), url, str(index)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begins\n"
    return child


LONG = [pytest.param(kind, marks=pytest.mark.peers) for kind in ("lance", "qdrant")]


@pytest.mark.parametrize("kind", ["parquet", *LONG])
def test_each_row_is_there_once_after_kills(kind: str, tmp_path: Path) -> None:
    path, url = tmp_path / "index", URLS[kind].format(tmp_path)
    make(path, N, "low-rank")
    with begin(URLS[kind].format(tmp_path / "timed"), path) as child:
        begun = time.monotonic()
        assert child.wait() == 0
    seconds = time.monotonic() - begun
    shutil.rmtree(tmp_path / "timed", ignore_errors=True)
    chance, killed = random.Random(4), 0
    for _ in range(KILLS):
        with begin(url, path) as child:
            time.sleep(chance.uniform(0, seconds / 3))
            child.kill()
            killed += child.wait() < 0
    assert killed >= KILLS // 2
    with Index.open(path) as index:
        with closing(open_store(url, Table.of(index, "full"))) as store:
            done = copy_rows(index, store)
            assert done.written + done.kept == N
        rows = {row["id"]: row for batch in index.rows() for row in batch.to_pylist()}
        with closing(open_store(url, Table.of(index))) as store:
            assert sorted(name for ids in store.ids() for name in ids) == sorted(rows)
            assert store.generations() == {index.generation: N}
            assert read_back(store.fetch(list(rows))) == rows
    left = {file.name for file in tmp_path.iterdir()} - {"index"}
    assert left == {"rows.parquet" if kind == "parquet" else "rows"}
