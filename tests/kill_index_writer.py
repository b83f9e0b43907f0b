"""Run as a program: kill a writer at every change it makes to the disk, and look at what is left.

    python kill_index_writer.py OPERATION FOLDER

Each time the index must verify and be the old or the new one, and doing the operation again must
end at the same manifest, byte for byte, as a run that nobody disturbed.
"""

import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path

import pytest
from index_samples import WIDTH, encoding_of, make, part

sys.path.insert(0, str(Path(__file__).parents[1]))
from embedcam.errors import IndexFormatError
from embedcam.index import Index, append, compact, faiss_build, rebuild_faiss, remove, verify
from embedcam.prototypes import compress
from scripts.campaigns.killing import in_child

ROWS = encoding_of("top-m")
REPLACED = ["image-0007", "image-0020", "image-0022"]


def prepare_life(path: Path) -> None:
    make(path, 20)
    append(path, part(20, 23, ROWS))
    remove(path, ["image-0004", "image-0021"])


def several_files() -> None:
    """Search files of 6 rows each."""
    faiss_build.MOST_BYTES = 6 * 4 * WIDTH


def prepare_several(path: Path) -> None:
    several_files()
    prepare_life(path)


def calibrate(path: Path) -> None:
    from embedcam.offline import calibrate_index

    calibrate_index(path)


OPERATIONS = {
    "create": (lambda path: None, lambda path: make(path, 20)),
    "append": (prepare_life, lambda path: append(path, part(30, 34, ROWS))),
    "update": (
        prepare_life,
        lambda path: append(path, part(20, 34, ROWS), removing=REPLACED),
    ),
    "append to several": (prepare_several, lambda path: append(path, part(30, 40, ROWS))),
    "several into one": (prepare_several, lambda path: rebuild_faiss(path, "HNSW8")),
    "remove": (prepare_life, lambda path: remove(path, ["image-0007", "image-0020"])),
    "compact": (prepare_life, compact),
    "rebuild": (prepare_life, lambda path: rebuild_faiss(path, "HNSW8")),
    "calibrate": (prepare_life, lambda path: calibrate(path)),
    "compress": (
        lambda path: make(path.with_name("source"), 20),
        lambda path: compress(path.with_name("source"), path, 4, per_class=True),
    ),
    "replace": (prepare_life, lambda path: make(path, 9, "dense", replace=True, start=100)),
}


def n_search_files(path: Path) -> int:
    return 1 + len(json.loads((path / "manifest.json").read_text())["faiss"].get("more", ()))


def state(path: Path) -> bytes | None:
    """The manifest of a verified index, or None for an unfinished one."""
    if not (path / "manifest.json").exists():
        begun = path.exists() and any(path.iterdir())
        message = "the index is unfinished" if begun else "no index here|not an embedcam index"
        with pytest.raises(IndexFormatError, match=message):
            Index.open(path)
        return None
    verify(path)
    return (path / "manifest.json").read_bytes()


def main(operation: str, folder: Path) -> None:
    # A killed process loses nothing that it wrote: syncing would only slow this down.
    os.fsync = lambda descriptor: None
    prepare, operate = OPERATIONS[operation]
    before, undisturbed, path = folder / "before", folder / "undisturbed", folder / "x"
    prepare(before)
    old = state(before)
    if before.exists():
        shutil.copytree(before, undisturbed)
    operate(undisturbed)
    new = state(undisturbed)
    assert new not in (None, old)
    outcomes = set()
    for kills in count():
        if before.exists():
            shutil.copytree(before, path)
        through = not in_child(operate, path, kills + 1)
        found = state(path)
        assert found in (old, new), f"neither old nor new after {kills} changes"
        outcomes.add(found == new)
        if found == old:
            operate(path)
            assert state(path) == new
        else:
            rebuild_faiss(path)  # any later writer sweeps what is left over
            rebuild_faiss(path)
        leftovers = {p.name for p in path.rglob("*")} - {".lock"}
        assert not [name for name in leftovers if name.endswith(".tmp")], leftovers
        assert len(list(path.glob("faiss-*"))) == n_search_files(path)
        shutil.rmtree(path)
        if through:
            break
    assert kills >= (2 if operation == "calibrate" else 5)  # calibrating writes one manifest
    assert outcomes == {False, True}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
