"""Writers that are killed, readers that are in the way."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from index_samples import encoding_of, make, part
from kill_index_writer import OPERATIONS

from embedcam.index import Index, append, compact, remove, verify
from embedcam.index import manifest as manifest_file

KEPT = (".lock", "manifest.json")


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_killed_before_any_change(tmp_path: Path, operation: str) -> None:
    program = Path(__file__).with_name("kill_index_writer.py")
    # FAISS hangs in a forked child once its parent has used several threads.
    alone, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, program, operation]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch) -> None:
    path, synced, commits = make(tmp_path / "x", 20), set(), []
    rename, fsync = os.replace, os.fsync

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            commits.append(target)
            fresh = {p for p in path.rglob("*") if p.name not in KEPT} - before
            late = [str(p) for p in fresh if p.stat().st_ino not in synced]
            assert not late, late
            assert path.stat().st_ino in synced
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "replace", check)
    for change in (
        lambda: append(path, part(20, 23, encoding_of("top-m"))),
        lambda: remove(path, ["image-0003"]),
        lambda: compact(path),
        lambda: make(path, 20, "dense", replace=True),
    ):
        before = set(path.rglob("*"))
        change()
        assert path.stat().st_ino in synced  # the manifest's own name
    assert len(commits) == 4


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 20, "low-rank")
    append(path, part(20, 60, encoding_of("low-rank")))
    remove(path, ["image-0003"])
    with Index.open(path) as old:
        remove(path, ["image-0010"])
        compact(path)
        assert sorted(p.name for p in (path / "parts").iterdir()) == ["000005"]
        assert len(Index.open(path)) == 58
        (path / ".building").mkdir()
        make(path, 9, "dense", replace=True, start=100)
        # FAISS is loaded only now, from a file whose name is gone.
        found = old.search(old.embeddings([10, 40]), 1)
        assert found.positions.tolist() == [[10], [40]]
        assert old.ids[40] == "image-0040"
        old.verify()
    with Index.open(path) as new:
        assert (len(new), new.ids[0]) == (9, "image-0100")
    assert (path / ".building").exists()


def test_a_reader_that_loses_the_race_reads_again(tmp_path, monkeypatch) -> None:
    path = make(tmp_path / "x", 20)
    remove(path, ["image-0003"])
    read, raced = manifest_file.read, []

    def read_then_compact(root: Path) -> dict[str, object]:
        manifest = read(root)
        if not raced:
            raced.append(True)
            compact(path)
        return manifest

    monkeypatch.setattr(manifest_file, "read", read_then_compact)
    with Index.open(path) as index:
        assert (index.manifest.generation, len(index)) == (3, 19)


def test_readers_and_a_writer_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, stop = make(tmp_path / "x", 20), threading.Event()

    def read() -> None:
        while not stop.is_set():
            with Index.open(path) as index:
                row = index.position("image-0007")
                assert index.search(index.embeddings([row]), 1).positions[0, 0] == row

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for start in range(100, 120):
                append(path, part(start, start + 1, encoding_of("top-m")))
                remove(path, [f"image-{start:04d}"])
                if start % 3 == 0:
                    compact(path)
        finally:
            stop.set()
    assert [reader.result() for reader in readers] == [None, None]
    verify(path)
