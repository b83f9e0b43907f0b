"""Broken indexes: each gives one sentence that names what is wrong, and no change copies it."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import faiss
import numpy as np
import pytest
from index_samples import encoding_of, make, part

from embedcam.errors import IndexFormatError
from embedcam.index import Index, append, compact, rebuild_faiss, remove, verify
from embedcam.index.manifest import sealed

Damage = Callable[[Path], object]
PART, FITTED, M, FAISS = "parts/000001", "fitted/000001", "manifest.json", "faiss-000001.index"
EMBEDDINGS, IDS, LABELS = f"{PART}/embeddings.f32", f"{PART}/ids", f"{PART}/labels"
LAYER, MEAN = f"{PART}/layer0", f"{FITTED}/embedding_mean.f32"
ROWS = encoding_of("low-rank")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole index, one of two parts with a removed row, and strangers of the same sizes."""
    root = tmp_path_factory.mktemp("indexes")
    make(root / "whole", 12, "top-m")
    shutil.copytree(root / "whole", root / "removed")
    remove(root / "removed", ["image-0002", "image-0005"])
    make(root / "stranger", 12, "top-m", start=50)
    make(root / "larger", 13, "top-m")
    append(make(root / "parts", 24, "low-rank"), part(24, 27, ROWS))
    remove(root / "parts", ["image-0002"])
    return root


@pytest.fixture
def copy(indexes: Path, tmp_path: Path) -> Callable[[str], Path]:
    for other in ("stranger", "larger"):
        shutil.copytree(indexes / other, tmp_path / other)
    return lambda which: Path(shutil.copytree(indexes / which, tmp_path / "x"))


def content(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def edit(change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Damage:
    """Change the manifest, with a checksum that fits (a forger's) unless told."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / M).read_text())
        change(manifest)
        (path / M).write_text(json.dumps(sealed(manifest) if seal else manifest))

    return damage


def at(*place: str | int, value: Any = None, absent: bool = False) -> Damage:
    """Another value in one place of the manifest, or none, sealed again."""

    def change(manifest: Any) -> None:
        for key in place[:-1]:
            manifest = manifest[key]
        manifest[place[-1]] = value
        if absent:
            del manifest[place[-1]]

    return edit(change)


def entry(name: str, **changes: object) -> Damage:
    return edit(lambda m: m["parts"][0]["files"][name].update(changes))


def write(name: str, data: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(data)


def truncate(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def flip(name: str, at: int = 0, bit: int = 6) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[at] ^= 1 << bit
        (path / name).write_bytes(data)

    return damage


def from_stranger(name: str, other: str = "stranger") -> Damage:
    return lambda path: shutil.copy(path.parent / other / name, path / name)


def link(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).rename(path.parent / "outside")
        (path / name).symlink_to(path.parent / "outside")

    return damage


def forge(name: str, array: np.ndarray) -> Damage:
    """Replace a file's content by other values, with the checksum to go with them."""

    def damage(path: Path) -> None:
        folder, _, file = name.rpartition("/")
        (path / name).write_bytes(array.tobytes())

        def change(manifest: dict[str, Any]) -> None:
            holders = {one["directory"]: one for one in (*manifest["parts"], manifest["fitted"])}
            line = holders[folder]["files"][file] if folder else manifest["tombstones"]
            assert line["bytes"] == array.nbytes, "a forgery of the same size"
            line["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()

        edit(change)(path)

    return damage


def full(name: str, shape: Any, value: float, dtype: str) -> Damage:
    return forge(name, np.full(shape, value, dtype))


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def cut_inside(path: Path) -> None:
    """Offsets in the middle of a character of two bytes."""
    data = bytearray((path / f"{IDS}.utf8").read_bytes())
    data[9:11] = "é".encode()
    forge(f"{IDS}.utf8", np.frombuffer(bytes(data), np.uint8))(path)


AT_OPENING: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate(EMBEDDINGS), f"{EMBEDDINGS}: truncated to 383"),
    "too long": (write(f"{IDS}.utf8", b"x" * 999), f"{IDS}.utf8: too long with 999"),
    "missing": (lambda p: (p / PART / "paths.utf8").unlink(), f"{PART}/paths.utf8: is missing"),
    "part missing": (lambda p: shutil.rmtree(p / PART), f"{PART}.*is missing"),
    "mixed sizes": (from_stranger(EMBEDDINGS, "larger"),
                    f"{EMBEDDINGS}: too long with 416 bytes where the manifest says 384"),
    "symbolic link": (link(EMBEDDINGS), f"{EMBEDDINGS}: .*symbolic link"),
    "linked folder": (link(PART), f"{PART}.*symbolic link"),
    "no manifest": (lambda p: (p / M).unlink(), "unfinished .* run the same build again"),
    "empty manifest": (write(M, b""), f"{M}: is not a readable JSON"),
    "a list": (write(M, b"[1]"), f"{M}: is not a JSON object"),
    "nested deeply": (write(M, b"[" * 200_000), f"{M}: is not a readable JSON"),
    "huge number": (write(M, b'{"a": ' + b"9" * 9000 + b"}"), f"{M}: is not a readable JSON"),
    "huge": (write(M, b" " * ((16 << 20) + 1)), f"{M}: .*at most 16777216 are read"),
    "not a number": (write(M, b'{"format": NaN}'), "NaN is not JSON"),
    "twice": (write(M, b'{"format": 1, "format": 2}'), "a key appears twice"),
    "other format": (at("format", value="zip"), "its format is 'zip'"),
    "newer": (at("format_version", value=2), "version 2.*install a newer embedcam"),
    "edited": (edit(lambda m: m.update(norm="around"), seal=False), "does not match its own"),
    "recipe edited": (at("recipe", "seed", value=1), "digest of the recipe"),
    "metric": (at("metric", value="cosine"), "metric is 'cosine'"),
    "sign": (at("sign", value="loss"), "sign is 'loss'"),
    "no layers": (at("layers", value=[]), "describes no layer"),
    "encoding": (at("layers", 0, "encoding", "name", value="zip"),
                 r"layers\[0\]\.encoding\.name is 'zip'; known: top-m, low-rank, dense"),
    "encoding lacks": (at("layers", 0, "encoding", "m", absent=True), "lacks 'm'"),
    "channels": (at("layers", 0, "channels", value=-3), "channels = -3"),
    "layer twice": (edit(lambda m: m["layers"].append(m["layers"][0])), "names one layer twice"),
    "coarse grid": (at("layers", 0, "coarse_grid", value=[9, 9]), "64 cells"),
    "grid": (at("layers", 0, "grid", value=[0, 3]),
             r"layers\[0\]\.grid\[0\] = 0 is impossible; expected 1 to 65535"),
    "counts": (at("counts", "rows", value=10**6),
               "counts says 1000000 rows and 12 live; the parts hold 12, 0"),
    "fit": (at("fit", "rows", value=99), "0 added and 99 fitted rows of 12 do not"),
    "part twice": (edit(lambda m: [m["parts"].append(m["parts"][0]),
                                   m["counts"].update(rows=24, live=24)]), "names one part twice"),
    "unlisted": (at("parts", 0, "files", "ids.utf8", absent=True), f"{IDS}.utf8: is not listed"),
    "file too many": (edit(lambda m: m["parts"][0]["files"].update(
        {"extra.u8": m["parts"][0]["files"]["ids.utf8"]})), f"{PART}/extra.u8: is no file of a pa"),
    "wrong dtype": (entry("embeddings.f32", dtype="int32"),
                    rf"{EMBEDDINGS}: .*int32 \[12, 8\] where the format asks for float32 \[12, 8"),
    "unknown dtype": (entry("ids.utf8", dtype="object"), "ids.utf8.dtype is 'object'"),
    "wrong shape": (entry("embeddings.f32", shape=[8, 12]),
                    rf"{EMBEDDINGS}: .*float32 \[8, 12\] where the format asks for float32 \[12,"),
    "huge shape": (entry("ids.utf8", shape=[2**60], bytes=2**60), "ids.utf8.*impossible"),
    "overflowing shape": (entry("embeddings.f32", shape=[2**32, 2**32], bytes=0), "says 0 bytes"),
    "large shape": (entry("ids.utf8", shape=[2**40], bytes=2**40), f"{IDS}.utf8: truncated"),
    "fraction": (entry("ids.utf8", shape=[1.5]), r"ids.utf8.shape\[0\] is 1\.5, not of type int"),
    "no checksum": (entry("ids.utf8", sha256="x"), "ids.utf8.sha256 is 'x'; expected a SHA-256"),
    "climbing": (at("parts", 0, "directory", value="../parts/000001"),
                 "'../parts/000001'; expected parts/NNNNNN"),
    "absolute": (at("fitted", "directory", value="/etc"), "fitted.directory is '/etc'"),
    "climbing file": (at("parts", 0, "files", "../../x", value={}),
                      "unknown entry '../../x'; expected a plain file name"),
    "faiss elsewhere": (at("faiss", "file", value="/dev/zero"), "'/dev/zero'"),
    "fitted extra": (edit(lambda m: m["fitted"]["files"].update(
        {"layer7.x.f32": m["fitted"]["files"]["embedding_mean.f32"]})), "no file of the fitted"),
    "faiss missing": (lambda p: (p / FAISS).unlink(), f"{FAISS}: is missing; .*rebuild-faiss"),
    "faiss cut": (truncate(FAISS), f"{FAISS}: truncated .*rebuild"),
    "faiss of another D": (flip(FAISS, 4, 1), "12 vectors of width 10; the index has 12 of 8"),
    "faiss of another N": (flip(FAISS, 8, 0), f"{FAISS}: holds 13 vectors"),
    "faiss magic": (flip(FAISS, 0, 7), f"{FAISS}: .*no FAISS index"),
    "faiss metric": (flip(FAISS, 33, 0), f"{FAISS}: .*metric l2"),
    "faiss inner size": (flip(FAISS, 44, 6), f"{FAISS}: its header does not go with its size"),
}  # fmt: skip
FILES = (
    "embeddings.f32", "triplets_used.u32", "ids.utf8", "ids.offsets.u64", "ids.order.u32",
    "paths.utf8", "paths.offsets.u64", "labels.utf8", "labels.offsets.u64", "labels.codes.i32",
    "layer0.channels.u16", "layer0.values.f32", "layer0.coarse.u8", "layer0.coarse_scales.f32",
)  # fmt: skip
BY_VERIFY: dict[str, tuple[Damage, str]] = {
    **{f"flipped {name}": (flip(f"{PART}/{name}"), f"{PART}/{name}: does not match its checksum")
       for name in FILES},
    "flipped mean": (flip(MEAN), "embedding_mean.f32: .*checksum"),
    "flipped vector": (flip(FAISS, 60), f"{FAISS}: .*checksum; .*rebuild-faiss"),
    "mixed up": (from_stranger(EMBEDDINGS), f"{EMBEDDINGS}: .*checksum"),
    "faiss of another": (from_stranger(FAISS), f"{FAISS}: .*checksum"),
    "long vectors": (full(EMBEDDINGS, (12, 8), 1, "f4"), f"{EMBEDDINGS}: row 0 has length 2.8"),
    "nan": (full(EMBEDDINGS, (12, 8), np.nan, "f4"), f"{EMBEDDINGS}: row 0 holds a NaN"),
    "channel": (full(f"{LAYER}.channels.u16", (12, 2), 9, "u2"), "names channel 9 of 6"),
    "channel twice": (full(f"{LAYER}.channels.u16", (12, 2), 5, "u2"), "a channel twice"),
    "weights": (full(f"{LAYER}.values.f32", (12, 2), np.inf, "f4"),
                f"{LAYER}.values.f32: row 0 holds a NaN or an infinity"),
    "scale": (full(f"{LAYER}.coarse_scales.f32", 12, -1, "f4"), "row 0 has the scale -1"),
    "offsets fall": (forge(f"{IDS}.offsets.u64", u64(*range(0, 100, 10), 5, 110, 120)),
                     f"{IDS}.offsets.u64: the offsets fall at string 9"),
    "offsets beyond": (forge(f"{IDS}.offsets.u64", u64(*range(0, 120, 10), 10**9)),
                       "run from 0 to 1000000000 where the text has 0 to 120"),
    "utf-8": (full(f"{IDS}.utf8", 120, 0xFF, "u1"), f"{IDS}.utf8: string 0 is not UTF-8"),
    "cut inside": (cut_inside, f"{IDS}.utf8: string 1 is not UTF-8"),
    "same ids": (full(f"{IDS}.utf8", 120, 65, "u1"), f"{IDS}.*live twice|not sorted"),
    "empty id": (forge(f"{IDS}.offsets.u64", u64(0, *range(0, 110, 10), 120)),
                 f"{IDS}.utf8: the id of row 0 is empty"),
    "order": (forge(f"{IDS}.order.u32", np.arange(12, dtype="u4")[::-1]), "not sorted at"),
    "no permutation": (full(f"{IDS}.order.u32", 12, 3, "u4"), f"{IDS}.order.u32: is no permutatio"),
    "order outside": (full(f"{IDS}.order.u32", 12, 99, "u4"), f"{IDS}.order.u32: is no permutatio"),
    "label code": (full(f"{LABELS}.codes.i32", 12, 7, "i4"), f"{LABELS}.codes.*outside -1 .. 2"),
    "labels": (full(f"{LABELS}.utf8", 21, 65, "u1"), f"{LABELS}.utf8: .*not sorted, each once"),
}  # fmt: skip


def refused(what: str, use: Callable[[Path], object], path: Path) -> str:
    """What is said in one sentence that begins with the place."""
    with pytest.raises(IndexFormatError, match=what) as caught:
        use(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text.removeprefix(str(path))) < 300
    return text


@pytest.mark.parametrize("name", AT_OPENING)
def test_seen_when_opened(copy: Callable[[str], Path], name: str) -> None:
    path, (damage, what) = copy("whole"), AT_OPENING[name]
    damage(path)
    text = refused(what, Index.open, path)
    assert verify(path, collect=True).problems == [text]


@pytest.mark.parametrize("name", BY_VERIFY)
def test_seen_by_verify(copy: Callable[[str], Path], name: str) -> None:
    path, (damage, what) = copy("whole"), BY_VERIFY[name]
    damage(path)
    Index.open(path).close()  # opening reads no content
    assert refused(what, verify, path) in verify(path, collect=True).problems


@pytest.mark.parametrize(
    ("values", "what"),
    [((2, 12), "removes row 12 of an index of 12 rows"), ((2, 2), "do not rise")],
)
def test_tombstones(copy: Callable[[str], Path], values: tuple[int, int], what: str) -> None:
    path = copy("removed")
    forge("tombstones-000002.u64", u64(*values))(path)
    for use in (Index.open, verify, compact, lambda path: Index.open(path, with_faiss=False)):
        refused(f"tombstones-000002.u64: .*{what}", use, path)


def test_damage_that_opening_cannot_see_never_leads_outside(copy: Callable[[str], Path]) -> None:
    path = copy("whole")
    full(f"{IDS}.order.u32", 12, 99, "u4")(path)
    full(f"{LABELS}.codes.i32", 12, 99, "i4")(path)
    full(f"{LAYER}.channels.u16", (12, 2), 99, "u2")(path)
    forge(f"{IDS}.offsets.u64", u64(*range(0, 120, 10), 10**15))(path)
    with Index.open(path) as index:
        assert index.ids[10] == "image-0010"
        reads = [lambda: index.ids[11], lambda: index.ids[:], lambda: index.labels[0]]
        for read in (*reads, lambda: index.position("image-0003"), lambda: index.weights([0])):
            with pytest.raises(IndexFormatError):
                read()


def test_an_unfinished_build_says_so(tmp_path: Path) -> None:
    (tmp_path / "x" / ".building").mkdir(parents=True)
    for name, what in (("x", "the index is unfinished .* it resumes"), ("", "not an embedcam ind")):
        with pytest.raises(IndexFormatError, match=what):
            Index.open(tmp_path / name)


# --- a change never copies damage into new files with good checksums ------------------------------

COPIED = (
    "embeddings.f32", "triplets_used.u32", "ids.utf8", "paths.utf8", "labels.codes.i32",
    "layer0.codes.f16", "layer0.scales.f32", "layer0.coarse.u8",
)  # fmt: skip


def append_few(path: Path) -> int:
    return append(path, part(30, 33, ROWS))


def unchanged(what: str, change: Callable[[Path], object], path: Path) -> None:
    before = content(path)
    refused(what, change, path)
    assert content(path) == before


@pytest.mark.parametrize("name", COPIED)
def test_no_flipped_bits_are_copied(copy: Callable[[str], Path], name: str) -> None:
    path = copy("parts")
    for number, changes in (("000001", [compact]), ("000002", [compact, append_few])):
        file = f"parts/{number}/{name}"
        flip(file)(path)
        for change in changes:
            unchanged(f"{file}: does not match its checksum; ", change, path)
        flip(file)(path)


def test_append_reads_only_the_parts_that_it_joins(copy: Callable[[str], Path]) -> None:
    path = copy("parts")
    truncate(f"{IDS}.utf8")(path)
    unchanged("truncated", append_few, path)
    (path / f"{IDS}.utf8").write_bytes((path / f"{IDS}.utf8").read_bytes() + b"3")
    flip(f"{LAYER}.codes.f16")(path)
    assert append_few(path) == 27
    refused(r"000001/layer0.codes.f16: does not match", verify, path)  # still seen


@pytest.mark.parametrize("change", [compact, lambda path: remove(path, ["image-0005"])])
def test_flipped_tombstones_are_not_passed_on(copy: Callable[[str], Path], change: Damage) -> None:
    path = copy("parts")
    flip("tombstones-000003.u64", bit=0)(path)  # row 3 for row 2: a position like any other
    Index.open(path).close()
    unchanged("tombstones-000003.u64: does not match its checksum", change, path)


@pytest.mark.parametrize(
    ("factory", "change"), [("Flat", append_few), ("HNSW8", append_few), ("HNSW8", compact)]
)
def test_a_damaged_faiss_file_is_not_grown(copy, factory, change) -> None:
    path = copy("parts")
    rebuild_faiss(path, factory)
    flip("faiss-000004.index", 200)(path)
    unchanged("faiss-000004.index: does not match its checksum", change, path)
    rebuild_faiss(path)
    change(path)
    verify(path)


def test_compact_makes_a_damaged_flat_file_anew_from_the_embeddings(copy) -> None:
    path = copy("parts")
    flip("faiss-000002.index", 200)(path)
    refused("checksum", verify, path)
    compact(path)
    verify(path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from test_index_corrupt import ROWS, append, part, rebuild_faiss
path, rows = Path(sys.argv[1]), part(500, 503, ROWS)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    append(path, rows) if sys.argv[3] == "append" else rebuild_faiss(path)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("operation", ["append", "rebuild"])
@pytest.mark.parametrize("short", [1, 500])
def test_a_full_disk_leaves_the_old_index(tmp_path: Path, operation: str, short: int) -> None:
    path = make(tmp_path / "x", 400, "low-rank")
    # The FAISS file is the largest one here: it alone does not fit.
    size = (path / FAISS).stat().st_size + (96 if operation == "append" else 0)
    before = content(path)
    command = [sys.executable, "-c", FULL_DISK, str(path), str(size - short), operation]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr
    assert content(path) == before
    verify(path)


def test_what_faiss_cannot_write_is_an_os_error(tmp_path, monkeypatch) -> None:
    path = make(tmp_path / "x", 24)
    before = content(path)
    error = RuntimeError("Error in void write(x) at impl/io.cpp:7: not written")
    monkeypatch.setattr(faiss, "write_index", Mock(side_effect=error))
    with pytest.raises(OSError, match=r"FAISS cannot write its file \(not written\)"):
        rebuild_faiss(path, "HNSW8")
    assert content(path) == before
