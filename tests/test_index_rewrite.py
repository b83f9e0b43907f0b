"""A change of an index never copies damage into new files with good checksums."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from index_samples import encoding_of, make, part

from embedcam.errors import IndexFormatError
from embedcam.index import Index, append, compact, rebuild_faiss, remove, verify

FILES = [
    "embeddings.f32", "triplets_used.u32", "ids.utf8", "paths.utf8", "labels.codes.i32",
    "layer0.codes.f16", "layer0.scales.f32", "layer0.coarse.u8",
]  # fmt: skip
ROWS = encoding_of("low-rank")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts (24 rows and 3), of which one row is removed."""
    path = make(tmp_path_factory.mktemp("rewrite") / "x", 24, "low-rank")
    append(path, part(24, 27, ROWS))
    remove(path, ["image-0002"])
    return path


def flip(file: Path, at: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def content(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def refused(path: Path, change: Callable[[Path], object], name: str) -> None:
    before = content(path)
    with pytest.raises(IndexFormatError) as caught:
        change(path)
    text = str(caught.value)
    assert text.startswith(f"{path / name}: does not match its checksum; ")
    assert "\n" not in text
    assert content(path) == before


def append_few(path: Path) -> int:
    return append(path, part(30, 33, ROWS))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", ["000001", "000002"])
def test_compact_copies_no_flipped_bits(
    whole: Path, tmp_path: Path, number: str, name: str
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "x"))
    flip(path / "parts" / number / name)
    refused(path, compact, f"parts/{number}/{name}")


@pytest.mark.parametrize("name", FILES)
def test_append_copies_no_flipped_bits(whole: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "x"))
    flip(path / "parts/000002" / name)
    refused(path, append_few, f"parts/000002/{name}")


def test_append_reads_only_the_parts_that_it_joins(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "x"))
    flip(path / "parts/000001/layer0.codes.f16")
    assert append_few(path) == 27
    with pytest.raises(IndexFormatError, match=r"000001/layer0.codes.f16: does not match"):
        verify(path)  # still seen


@pytest.mark.parametrize(
    "change", [compact, lambda path: remove(path, ["image-0005"])], ids=["compact", "remove"]
)
def test_flipped_tombstones_are_not_passed_on(
    whole: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "x"))
    flip(path / "tombstones-000003.u64")  # row 3 for row 2: a position like any other
    Index.open(path).close()
    refused(path, change, "tombstones-000003.u64")


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
@pytest.mark.parametrize("change", [append_few, compact], ids=["append", "compact"])
def test_a_damaged_faiss_file_is_not_grown(
    whole: Path, tmp_path: Path, factory: str, change: Callable[[Path], object]
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "x"))
    rebuild_faiss(path, factory)
    flip(path / "faiss-000004.index", 200)
    refused(path, change, "faiss-000004.index")
    rebuild_faiss(path)
    change(path)
    verify(path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from index_samples import encoding_of, part
from embedcam.index import append, rebuild_faiss
path, limit, operation = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if operation == "append":
        append(path, part(500, 503, encoding_of("low-rank")))
    else:
        rebuild_faiss(path)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("operation", ["append", "rebuild"])
@pytest.mark.parametrize("short", [1, 500])
def test_a_full_disk_leaves_the_old_index(tmp_path: Path, operation: str, short: int) -> None:
    """The FAISS file is the largest one here: it alone does not fit."""
    import errno

    path = make(tmp_path / "x", 400, "low-rank")
    size = (path / "faiss-000001.index").stat().st_size + (96 if operation == "append" else 0)
    before = content(path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(size - short), operation],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr
    assert content(path) == before
    verify(path)


def test_what_faiss_cannot_write_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    def fail(index: object, writer: object) -> None:
        raise RuntimeError("Error in void write(x) at impl/io.cpp:7: not written")

    path = make(tmp_path / "x", 24)
    before = content(path)
    monkeypatch.setattr(faiss, "write_index", fail)
    with pytest.raises(OSError, match=r"FAISS cannot write its file \(not written\)"):
        rebuild_faiss(path)
    assert content(path) == before
