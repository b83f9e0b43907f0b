"""Broken indexes: each gives one sentence that names the file and what is wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_samples import encoding_of, make, part

from embedcam.errors import IndexFormatError
from embedcam.index import Index, append, compact, remove, verify
from embedcam.index.manifest import sealed

Damage = Callable[[Path], None]
PART, FITTED = "parts/000001", "fitted/000001"


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole index, one with removed rows, and a stranger of the same sizes."""
    root = tmp_path_factory.mktemp("indexes")
    make(root / "whole", 12, "top-m")
    shutil.copytree(root / "whole", root / "removed")
    remove(root / "removed", ["image-0002", "image-0005"])
    make(root / "stranger", 12, "top-m", start=50)
    make(root / "larger", 13, "top-m")
    return root


def edit(change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Damage:
    """Change the manifest, with a checksum that fits (a forger's) unless told."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(sealed(manifest) if seal else manifest))

    return damage


def entry(name: str, **changes: object) -> Damage:
    return edit(lambda m: m["parts"][0]["files"][name].update(changes))


def truncate(name: str, by: int = 1) -> Damage:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-by])

    return damage


def flip(name: str, at: int = 0, bit: int = 6) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[at] ^= 1 << bit
        (path / name).write_bytes(bytes(data))

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(data) and None


def from_stranger(name: str, other: str = "stranger") -> Damage:
    return lambda path: shutil.copy(path.parent / other / name, path / name) and None


def link(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).rename(path.parent / "outside")
        (path / name).symlink_to(path.parent / "outside")

    return damage


def link_folder(path: Path) -> None:
    (path / PART).rename(path.parent / "elsewhere")
    (path / PART).symlink_to(path.parent / "elsewhere")


def folder_for_file(path: Path) -> None:
    (path / PART / "ids.utf8").unlink()
    (path / PART / "ids.utf8").mkdir()


def forge(name: str, array: np.ndarray) -> Damage:
    """Replace a file's content by other values, with the checksum to go with them."""

    def damage(path: Path) -> None:
        folder, _, file = name.rpartition("/")
        (path / name).write_bytes(array.tobytes())
        digest = hashlib.sha256(array.tobytes()).hexdigest()

        def change(manifest: dict[str, Any]) -> None:
            holders = [*manifest["parts"], manifest["fitted"]]
            for holder in holders:
                if holder["directory"] == folder:
                    line = holder["files"][file]
            if not folder:
                line = manifest["tombstones"]
            assert line["bytes"] == array.nbytes, "a forgery of the same size"
            line["sha256"] = digest

        edit(change)(path)

    return damage


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


M = "manifest.json"
AT_OPENING: list[tuple[str, Damage, str, str]] = [
    ("truncated", truncate(f"{PART}/embeddings.f32"), f"{PART}/embeddings.f32", "truncated to 383"),
    ("too long", write(f"{PART}/ids.utf8", b"x" * 999), f"{PART}/ids.utf8", "too long with 999"),
    ("missing", lambda p: (p / PART / "paths.utf8").unlink(), f"{PART}/paths.utf8", "is missing"),
    ("part missing", lambda p: shutil.rmtree(p / PART), PART, "is missing"),
    ("fitted missing", lambda p: shutil.rmtree(p / FITTED), FITTED, "is missing"),
    ("mixed sizes", from_stranger(f"{PART}/embeddings.f32", "larger"), f"{PART}/embeddings.f32",
     "too long with 416 bytes where the manifest says 384"),
    ("symbolic link", link(f"{PART}/embeddings.f32"), f"{PART}/embeddings.f32", "symbolic link"),
    ("linked folder", link_folder, PART, "symbolic link"),
    ("a folder for a file", folder_for_file, f"{PART}/ids.utf8", "not a regular file"),
    ("no manifest", lambda p: (p / M).unlink(), "unfinished", "run the same build again"),
    ("empty manifest", write(M, b""), M, "not a readable JSON"),
    ("garbage", write(M, b"\xff\x00\x17"), M, "not a readable JSON"),
    ("a list", write(M, b"[1]"), M, "not a JSON object"),
    ("nested deeply", write(M, b"[" * 200_000), M, "not a readable JSON"),
    ("nested and closed", write(M, b'{"a":' * 90_000 + b"1" + b"}" * 90_000), M, "not a readable"),
    ("huge number", write(M, b'{"a": ' + b"9" * 9000 + b"}"), M, "not a readable JSON"),
    ("huge", write(M, b" " * ((16 << 20) + 1)), M, "at most 16777216 are read"),
    ("not a number", write(M, b'{"format": NaN}'), M, "NaN is not JSON"),
    ("beyond a float", write(M, b'{"format": -1e999}'), M, "-1e999 is not JSON"),
    ("twice", write(M, b'{"format": 1, "format": 2}'), M, "a key appears twice"),
    ("other format", edit(lambda m: m.update(format="zip")), M, "its format is 'zip'"),
    ("newer", edit(lambda m: m.update(format_version=2)), M, "version 2.*install a newer embedcam"),
    ("version as text", edit(lambda m: m.update(format_version="1")), M, "version '1'"),
    ("edited", edit(lambda m: m.update(norm="around"), seal=False), M, "does not match its own"),
    ("recipe edited", edit(lambda m: m["recipe"].update(seed=1)), M, "digest of the recipe"),
    ("metric", edit(lambda m: m.update(metric="cosine")), M, "metric is 'cosine'"),
    ("sign", edit(lambda m: m.update(sign="loss")), M, "sign is 'loss'"),
    ("no layers", edit(lambda m: m.update(layers=[])), M, "describes no layer"),
    ("layer", edit(lambda m: m.update(layers=[3])), M, r"layers\[0\] is 3, not of type dict"),
    ("encoding", edit(lambda m: m["layers"][0]["encoding"].update(name="zip")), M,
     r"layers\[0\]\.encoding\.name is 'zip'; known: top-m, low-rank, dense"),
    ("encoding lacks", edit(lambda m: m["layers"][0]["encoding"].pop("m")), M, "lacks 'm'"),
    ("channels", edit(lambda m: m["layers"][0].update(channels=-3)), M, "channels = -3"),
    ("layer twice", edit(lambda m: m["layers"].append(m["layers"][0])), M, "names one layer twice"),
    ("coarse grid", edit(lambda m: m["layers"][0].update(coarse_grid=[9, 9])), M, "64 cells"),
    ("grid", edit(lambda m: m["layers"][0].update(grid=[0, 3])), M,
     r"layers\[0\]\.grid\[0\] = 0 is impossible; expected 1 to 65535"),
    ("counts", edit(lambda m: m["counts"].update(rows=10**6)), M,
     "counts says 1000000 rows and 12 live; the parts hold 12, 0"),
    ("fit", edit(lambda m: m["fit"].update(rows=99)), M, "0 added and 99 fitted rows of 12 do not"),
    ("part twice", edit(lambda m: [m["parts"].append(m["parts"][0]),
     m["counts"].update(rows=24, live=24)]), M, "names one part twice"),
    ("file unlisted", edit(lambda m: m["parts"][0]["files"].pop("ids.utf8")), f"{PART}/ids.utf8",
     "not listed in the manifest"),
    ("file too many", edit(lambda m: m["parts"][0]["files"].update(
     {"extra.u8": m["parts"][0]["files"]["ids.utf8"]})), f"{PART}/extra.u8", "no file of a part"),
    ("wrong dtype", entry("embeddings.f32", dtype="int32"), f"{PART}/embeddings.f32",
     r"int32 \[12, 8\] where the format asks for float32 \[12, 8\]"),
    ("unknown dtype", entry("ids.utf8", dtype="object"), f"{PART}/ids.utf8", "'object'"),
    ("wrong shape", entry("embeddings.f32", shape=[8, 12]), f"{PART}/embeddings.f32",
     r"float32 \[8, 12\] where the format asks for float32 \[12, 8\]"),
    ("huge shape", entry("ids.utf8", shape=[2**60], bytes=2**60), f"{PART}/ids.utf8", "impossible"),
    ("overflowing shape", entry("embeddings.f32", shape=[2**32, 2**32], bytes=0),
     f"{PART}/embeddings.f32", "says 0 bytes where"),
    ("large shape", entry("ids.utf8", shape=[2**40], bytes=2**40), f"{PART}/ids.utf8", "truncated"),
    ("fraction", entry("ids.utf8", shape=[1.5]), f"{PART}/ids.utf8",
     r"shape\[0\] is 1\.5, not of type int"),
    ("truth", entry("ids.utf8", shape=[True], bytes=1), f"{PART}/ids.utf8",
     r"shape\[0\] is True, not of type int"),
    ("no checksum", entry("ids.utf8", sha256="x"), f"{PART}/ids.utf8",
     "sha256 is 'x'; expected a SHA-256"),
    ("climbing", edit(lambda m: m["parts"][0].update(directory="../parts/000001")), M,
     "'../parts/000001'; expected parts/NNNNNN"),
    ("absolute", edit(lambda m: m["fitted"].update(directory="/etc")), M,
     "fitted.directory is '/etc'"),
    ("climbing file", edit(lambda m: m["parts"][0]["files"].update({"../../x": {}})), M,
     "unknown entry '../../x'; expected a plain file name"),
    ("dots", edit(lambda m: m["fitted"]["files"].update({"a..b": {}})), M, "unknown entry 'a..b'"),
    ("faiss elsewhere", edit(lambda m: m["faiss"].update(file="/dev/zero")), M, "'/dev/zero'"),
    ("fitted extra", edit(lambda m: m["fitted"]["files"].update(
     {"layer7.x.f32": m["fitted"]["files"]["embedding_mean.f32"]})), f"{FITTED}/layer7.x.f32",
     "no file of the fitted"),
    ("faiss missing", lambda p: (p / "faiss-000001.index").unlink(), "faiss-000001.index",
     "is missing; .*rebuild-faiss"),
    ("faiss cut", truncate("faiss-000001.index"), "faiss-000001.index", "truncated .*rebuild"),
    ("faiss of another D", flip("faiss-000001.index", 4, 1), "faiss-000001.index",
     "12 vectors of width 10; the index has 12 of 8"),
    ("faiss of another N", flip("faiss-000001.index", 8, 0), "faiss-000001.index", "holds 13 vect"),
    ("faiss magic", flip("faiss-000001.index", 0, 7), "faiss-000001.index", "no FAISS index"),
    ("faiss metric", flip("faiss-000001.index", 33, 0), "faiss-000001.index", "metric l2"),
    ("faiss inner size", flip("faiss-000001.index", 44, 6), "faiss-000001.index", "with its size"),
]  # fmt: skip
BY_VERIFY: list[tuple[str, Damage, str, str]] = [
    *(
        (f"flipped {name}", flip(f"{PART}/{name}"), f"{PART}/{name}", "does not match its checksum")
        for name in (
            "embeddings.f32", "triplets_used.u32", "ids.utf8", "ids.offsets.u64", "ids.order.u32",
            "paths.utf8", "paths.offsets.u64", "labels.utf8", "labels.offsets.u64",
            "labels.codes.i32", "layer0.channels.u16", "layer0.values.f32", "layer0.coarse.u8",
            "layer0.coarse_scales.f32",
        )
    ),
    ("flipped mean", flip(f"{FITTED}/embedding_mean.f32"), "embedding_mean.f32", "checksum"),
    ("flipped vector", flip("faiss-000001.index", 60), "faiss-000001.index",
     "checksum; .*rebuild-faiss"),
    ("mixed up", from_stranger(f"{PART}/embeddings.f32"), f"{PART}/embeddings.f32", "checksum"),
    ("faiss of another", from_stranger("faiss-000001.index"), "faiss-000001.index", "checksum"),
    ("long vectors", forge(f"{PART}/embeddings.f32", np.ones((12, 8), np.float32)),
     f"{PART}/embeddings.f32", "row 0 has length 2.8"),
    ("nan", forge(f"{PART}/embeddings.f32", np.full((12, 8), np.nan, np.float32)),
     f"{PART}/embeddings.f32", "row 0 holds a NaN"),
    ("channel", forge(f"{PART}/layer0.channels.u16", np.full((12, 2), 9, np.uint16)),
     f"{PART}/layer0.channels.u16", "names channel 9 of 6"),
    ("channel twice", forge(f"{PART}/layer0.channels.u16", np.full((12, 2), 5, np.uint16)),
     f"{PART}/layer0.channels.u16", "a channel twice"),
    ("weights", forge(f"{PART}/layer0.values.f32", np.full((12, 2), np.inf, np.float32)),
     f"{PART}/layer0.values.f32", "row 0 holds a NaN or an infinity"),
    ("scale", forge(f"{PART}/layer0.coarse_scales.f32", np.full(12, -1, np.float32)),
     f"{PART}/layer0.coarse_scales.f32", "row 0 has the scale -1"),
    ("offsets fall", forge(f"{PART}/ids.offsets.u64", u64(*range(0, 100, 10), 5, 110, 120)),
     f"{PART}/ids.offsets.u64", "the offsets fall at string 9"),
    ("offsets beyond", forge(f"{PART}/ids.offsets.u64", u64(*range(0, 120, 10), 10**9)),
     f"{PART}/ids.offsets.u64", "run from 0 to 1000000000 where the text has 0 to 120"),
    ("utf-8", forge(f"{PART}/ids.utf8", np.full(120, 0xFF, np.uint8)), f"{PART}/ids.utf8",
     "string 0 is not UTF-8"),
    ("cut inside", forge(f"{PART}/ids.offsets.u64", u64(0, 10, 20, *range(30, 130, 10))),
     f"{PART}/ids.utf8", "string 1 is not UTF-8"),
    ("same ids", forge(f"{PART}/ids.utf8", np.full(120, 65, np.uint8)), f"{PART}/ids.",
     "live twice|not sorted"),
    ("empty id", forge(f"{PART}/ids.offsets.u64", u64(0, *range(0, 110, 10), 120)),
     f"{PART}/ids.utf8", "id of row 0 is empty"),
    ("order", forge(f"{PART}/ids.order.u32", np.arange(12, dtype=np.uint32)[::-1]),
     f"{PART}/ids.order.u32", "not sorted at"),
    ("no permutation", forge(f"{PART}/ids.order.u32", np.full(12, 3, np.uint32)),
     f"{PART}/ids.order.u32", "no permutation"),
    ("order outside", forge(f"{PART}/ids.order.u32", np.full(12, 99, np.uint32)),
     f"{PART}/ids.order.u32", "no permutation"),
    ("label code", forge(f"{PART}/labels.codes.i32", np.full(12, 7, np.int32)),
     f"{PART}/labels.codes.i32", "outside -1 .. 2"),
    ("labels", forge(f"{PART}/labels.utf8", np.full(21, 65, np.uint8)), f"{PART}/labels.utf8",
     "not sorted, each once"),
]  # fmt: skip


def copy_of(indexes: Path, which: str, tmp_path: Path) -> Path:
    for other in ("stranger", "larger"):
        shutil.copytree(indexes / other, tmp_path / other)
    return Path(shutil.copytree(indexes / which, tmp_path / "x"))


def one_sentence(error: IndexFormatError, path: Path, file: str) -> str:
    text = str(error)
    assert text.startswith(str(path))
    assert file in text
    assert "\n" not in text
    assert len(text.removeprefix(str(path))) < 300
    return text


@pytest.mark.parametrize(
    ("damage", "file", "what"), [c[1:] for c in AT_OPENING], ids=[c[0] for c in AT_OPENING]
)
def test_seen_when_opened(
    indexes: Path, tmp_path: Path, damage: Damage, file: str, what: str
) -> None:
    path = copy_of(indexes, "whole", tmp_path)
    damage(path)
    with pytest.raises(IndexFormatError, match=what) as caught:
        Index.open(path)
    text = one_sentence(caught.value, path, file)
    assert verify(path, collect=True).problems == [text]


@pytest.mark.parametrize(
    ("damage", "file", "what"), [c[1:] for c in BY_VERIFY], ids=[c[0] for c in BY_VERIFY]
)
def test_seen_by_verify(
    indexes: Path, tmp_path: Path, damage: Damage, file: str, what: str
) -> None:
    path = copy_of(indexes, "whole", tmp_path)
    if what.startswith("string 1"):  # needs a character of two bytes to cut
        data = bytearray((path / PART / "ids.utf8").read_bytes())
        data[9:11] = "é".encode()
        forge(f"{PART}/ids.utf8", np.frombuffer(bytes(data), np.uint8))(path)
    damage(path)
    Index.open(path).close()  # opening reads no content
    with pytest.raises(IndexFormatError, match=what) as caught:
        verify(path)
    text = one_sentence(caught.value, path, file)
    report = verify(path, collect=True)
    assert text in report.problems
    assert not report.ok


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ((2, 12), "removes row 12 of an index of 12 rows"),
        ((2, 2**63 + 1), "removes row"),
        ((5, 2), "do not rise"),
        ((2, 2), "do not rise"),
    ],
)
def test_tombstones(indexes: Path, tmp_path: Path, values: tuple[int, int], what: str) -> None:
    path = copy_of(indexes, "removed", tmp_path)
    forge("tombstones-000002.u64", u64(*values))(path)
    for use in (Index.open, verify, compact, lambda path: Index.open(path, with_faiss=False)):
        with pytest.raises(IndexFormatError, match=what) as caught:
            use(path)
        one_sentence(caught.value, path, "tombstones-000002.u64")


def test_damage_that_opening_cannot_see_never_leads_outside(indexes: Path, tmp_path: Path) -> None:
    path = copy_of(indexes, "whole", tmp_path)
    forge(f"{PART}/ids.order.u32", np.full(12, 99, np.uint32))(path)
    forge(f"{PART}/labels.codes.i32", np.full(12, 99, np.int32))(path)
    forge(f"{PART}/layer0.channels.u16", np.full((12, 2), 99, np.uint16))(path)
    forge(f"{PART}/ids.offsets.u64", u64(*range(0, 120, 10), 10**15))(path)
    with Index.open(path) as index:
        assert index.ids[10] == "image-0010"
        for read in (
            lambda: index.ids[11],
            lambda: index.ids[:],
            lambda: index.position("image-0003"),
            lambda: index.labels[0],
            lambda: index.weights([0]),
        ):
            with pytest.raises(IndexFormatError):
                read()


def test_an_unfinished_build_says_so(tmp_path: Path) -> None:
    (tmp_path / "x" / ".building").mkdir(parents=True)
    with pytest.raises(IndexFormatError, match=r"the index is unfinished .* it resumes"):
        Index.open(tmp_path / "x")
    with pytest.raises(IndexFormatError, match="not an embedcam index"):
        Index.open(tmp_path)
    with pytest.raises(IndexFormatError, match="no index here"):
        Index.open(tmp_path / "nowhere")


def test_a_broken_index_is_not_written_to(indexes: Path, tmp_path: Path) -> None:
    path = copy_of(indexes, "whole", tmp_path)
    truncate(f"{PART}/ids.utf8")(path)
    before = sorted(str(p) for p in path.rglob("*"))
    with pytest.raises(IndexFormatError, match="truncated"):
        append(path, part(20, 23, encoding_of("top-m")))
    assert sorted(str(p) for p in path.rglob("*")) == before


def test_flipped_bits_of_the_manifest_are_seen(indexes: Path, tmp_path: Path) -> None:
    name = "manifest.json"
    path = copy_of(indexes, "whole", tmp_path)
    whole = (path / name).read_bytes()
    for at in range(0, len(whole), 17):
        flip(name, at, at % 8)(path)
        with pytest.raises(IndexFormatError):
            Index.open(path)
        (path / name).write_bytes(whole)
    Index.open(path).close()
