"""FAISS files: written as FAISS would, merged from shards, chosen, and believed after a look."""

import hashlib
import json
import re
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_samples import WIDTH, encoding_of, make, part
from test_index_corrupt import FAISS, at, edit, flip
from threadpoolctl import threadpool_limits

from embedcam.errors import IndexFormatError, InputError
from embedcam.index import (
    Index,
    append,
    compact,
    faiss_build,
    faiss_files,
    manifest,
    nearest,
    rebuild_faiss,
    remove,
    verify,
    writer,
)
from embedcam.index.faiss_choice import enough_lists
from embedcam.index.faiss_layout import is_bounded
from embedcam.index.search import SLACK

pytestmark = pytest.mark.usefixtures("quick_disk")
PARSED = (
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,SQ4",
    "IVF8,SQ6",
    "IVF8,SQfp16",
    "IVF8,PQ4x4",
    "IVF8,PQ4x5",
)
MERGED = ("Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16", "IVF8,PQ4x4", "IVF8,RaBitQ")


def vectors_of(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)


def bytes_of(index: faiss.Index) -> bytes:
    return faiss.serialize_index(index).tobytes()


def entry_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())["faiss"]


# --- written as FAISS would -----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("n", [0, 1, 700])
def test_a_flat_file_is_the_one_that_faiss_writes(tmp_path, monkeypatch, metric, n) -> None:
    monkeypatch.setattr("embedcam.index.arrays.BLOCK_BYTES", 96)
    monkeypatch.setattr(faiss_files, "BLOCK_BYTES", 100)
    vectors = vectors_of(n)
    entry = faiss_files.write_flat(tmp_path, FAISS, vectors, metric)
    index = faiss.index_factory(WIDTH, "Flat", ("ip", "l2").index(metric))
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs"))
    ours = (tmp_path / FAISS).read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(ours), hashlib.sha256(ours).hexdigest())


def test_a_flat_file_grows_by_copying_what_it_holds(tmp_path, monkeypatch) -> None:
    path = make(tmp_path / "x", 40)
    monkeypatch.setattr(faiss_files, "BLOCK_BYTES", 50)
    monkeypatch.setattr(faiss, "write_index", None)
    monkeypatch.setattr(faiss, "read_index", None)
    append(path, part(40, 44, encoding_of("top-m")))
    monkeypatch.undo()
    rows = Index.open(path, with_faiss=False).embeddings(np.arange(44))
    index = faiss.IndexFlatL2(WIDTH)
    index.add(rows)
    assert (path / "faiss-000002.index").read_bytes() == bytes_of(index)
    verify(path)


def test_every_block_has_its_digest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(faiss_files, "FAISS_BLOCK", 1000)
    vectors = vectors_of(90)
    for name, write in (
        ("flat", lambda: faiss_files.write_flat(tmp_path, "flat", vectors, "l2")),
        ("ivf", lambda: faiss_files.write_faiss(tmp_path, filled("IVF8,SQ8", vectors), "ivf")),
    ):
        told, data = write()["blocks"], (tmp_path / name).read_bytes()
        pieces = [data[start : start + 1000] for start in range(0, len(data), 1000)]
        assert len(pieces) > 1
        digests = [hashlib.blake2b(piece, digest_size=8).hexdigest() for piece in pieces]
        assert told == {"of": hashlib.sha256(data).hexdigest(), "blake2b": "".join(digests)}


# --- trained once, filled by shards ---------------------------------------------------------------


def filled(factory: str, vectors: np.ndarray, metric: str = "l2") -> faiss.Index:
    return faiss_build.build(factory, vectors, metric, np.arange(len(vectors)))[0]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", MERGED)
def test_merged_shards_are_one_build(tmp_path, factory, metric) -> None:
    vectors = vectors_of(900)
    rows = np.arange(900)
    cuts = [0, 1, 100, 100, 350, 351, 600, 899, 900]  # 8 shards, one of them empty
    trained, trained_on = faiss_build.train(factory, vectors, metric, rows)
    entry = faiss_files.write_faiss(tmp_path, trained, "trained.index")
    shards = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        # As a worker does: the trained index comes from a file, the shard goes into one.
        empty = faiss_files.read_shard(tmp_path, entry)
        made = faiss_build.shard(empty, vectors, start, stop)
        shards.append(faiss_files.write_faiss(tmp_path, made, f"shard-{number}.index"))
    read = (faiss_files.read_shard(tmp_path, one) for one in shards)
    merged = faiss_build.merge(trained, read)
    whole, of_whole = faiss_build.build(factory, vectors, metric, rows)
    assert merged.ntotal == 900
    assert trained_on == of_whole
    assert bytes_of(merged) == bytes_of(whole)


@pytest.mark.parametrize("factory", ["HNSW8", "IVF8,PQ4x4fs", "NSG8", "OPQ4,IVF8,PQ4x4", "LSH"])
def test_what_cannot_be_merged_says_so(factory) -> None:
    index = faiss_build.train(factory, vectors_of(300), "l2", np.arange(300))[0]
    with pytest.raises(InputError, match=r"FAISS cannot merge shards of Index.*one place, or"):
        faiss_build.merge(index, [])


def test_a_damaged_shard_is_not_merged(tmp_path) -> None:
    entry = faiss_files.write_faiss(tmp_path, filled("IVF8,SQ8", vectors_of(90)), "shard.index")
    flip("shard.index", 200)(tmp_path)
    with pytest.raises(IndexFormatError, match=r"shard\.index: does not match its checksum"):
        faiss_files.read_shard(tmp_path, entry)


# --- believed after a look ------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """How often a whole file was hashed."""
    calls: list[int] = []
    whole = faiss_files.sha256_of
    monkeypatch.setattr(faiss_files, "sha256_of", lambda d: calls.append(d) or whole(d))
    return calls


def found(path: Path) -> np.ndarray:
    with Index.open(path) as index:
        return index.search(index.embeddings([3, 9]), 4).positions


@pytest.mark.parametrize("factory", ["Flat", *PARSED])
def test_a_first_search_looks_at_a_sample(tmp_path, hashed, factory) -> None:
    path = make(tmp_path / "x", 300, factory=factory)
    assert found(path)[:, 0].tolist() == [3, 9]
    assert not hashed
    flip(FAISS, 70)(path)
    with pytest.raises(IndexFormatError, match="does not match its checksum; the file is derived"):
        found(path)
    assert not hashed


@pytest.mark.parametrize("factory", ["HNSW8", "IVF8,RaBitQ", "IVF8_HNSW4,SQ8", "PCA4,IVF8,SQ8"])
def test_other_types_are_compared_whole(tmp_path, hashed, factory) -> None:
    path = make(tmp_path / "x", 300, factory=factory)
    found(path)
    assert len(hashed) == 1


@pytest.mark.parametrize(("factory", "times"), [("Flat", 0), ("IVF8,SQ8", 1)])
def test_files_of_earlier_writers_open_as_they_did(tmp_path, hashed, factory, times) -> None:
    path = make(tmp_path / "x", 300, factory=factory)
    first = found(path)
    at("faiss", "blocks", absent=True)(path)
    np.testing.assert_array_equal(found(path), first)
    assert len(hashed) == times
    # One that an earlier writer put in place of ours: it keeps the entry that it does not know.
    stale = {"of": "0" * 64, "blake2b": "0" * 16}
    at("faiss", "blocks", value=stale)(path)
    np.testing.assert_array_equal(found(path), first)
    assert len(hashed) == 2 * times
    flip(FAISS, 300)(path)
    if times:
        with pytest.raises(IndexFormatError, match="does not match its checksum"):
            found(path)


def test_a_sample_holds_the_first_and_the_last_block(tmp_path, monkeypatch) -> None:
    for module in (faiss_files, manifest):
        monkeypatch.setattr(module, "FAISS_BLOCK", 256)
    path = make(tmp_path / "x", 300, factory="IVF8,SQ8")
    size = (path / FAISS).stat().st_size
    seen = []
    for start in range(0, size, 256):
        # A place inside the codes or the vectors: sizes are believed apart from this.
        where = min(start + 200, size - 1) if start else 100
        flip(FAISS, where, 0)(path)
        try:
            found(path)
        except IndexFormatError:
            seen.append(start // 256)
        flip(FAISS, where, 0)(path)
    assert (len(seen), seen[0], seen[-1]) == (8, 0, (size - 1) // 256)
    flip(FAISS, 600, 0)(path)
    with pytest.raises(IndexFormatError, match="checksum"):
        verify(path)


@pytest.mark.parametrize(
    ("factory", "metric"), [*((factory, "l2") for factory in PARSED), ("IVF8,SQ8", "ip")]
)
def test_sizes_inside_a_file_are_believed_where_they_fit(tmp_path, factory, metric) -> None:
    vectors = np.repeat(vectors_of(8), 40, axis=0) + 1e-3 * vectors_of(320, 1)
    index = filled(factory, vectors, metric)
    few = faiss_build.shard(faiss_build.train(factory, vectors, metric, np.arange(320))[0],
                            vectors, 0, 3)  # fmt: skip
    kind = ("ip", "l2").index(metric)
    for one, rows in ((index, 320), (few, 3)):  # of few rows most lists are empty
        data = bytes_of(one)
        lists = data.index(b"ilar")
        assert fits(tmp_path, data, rows, kind)
        assert not fits(tmp_path, data + b"x", rows, kind)
        assert not fits(tmp_path, data[:-1], rows, kind)
        # Whatever number is changed before the codes: refused, or none that memory depends on.
        first = lists + 28 + 8 * int.from_bytes(data[lists + 24 : lists + 28], "little")
        for place in [*range(0, 80), *range(lists - 60, first)]:
            hostile = bytearray(data)
            hostile[place] ^= 0x40
            if fits(tmp_path, bytes(hostile), rows, kind):
                (tmp_path / "x").write_bytes(hostile)
                read = faiss.read_index(str(tmp_path / "x"), faiss.IO_FLAG_MMAP_IFC)
                read.search(vectors[:20], 30)


def fits(folder: Path, data: bytes, rows: int, metric: int) -> bool:
    (folder / "x").write_bytes(data)
    with open(folder / "x", "rb") as file:
        return is_bounded(file.fileno(), len(data), WIDTH, rows, metric)


@pytest.mark.parametrize("factory", ["HNSW8", "SQ8", "IVF8_HNSW4,SQ8", "IVF8,RaBitQ", "PQ4x4"])
def test_other_layouts_are_not_believed(tmp_path, factory) -> None:
    assert not fits(tmp_path, bytes_of(filled(factory, vectors_of(300))), 300, 1)


@pytest.mark.parametrize(
    ("place", "value"),
    [("sizes", (2**62, 0)), ("sizes", (2**64 - 1, 1)), ("count", 2**61), ("lists", 2**40)],
)
def test_a_forger_leads_nowhere(tmp_path, place, value) -> None:
    path = make(tmp_path / "x", 300, factory="IVF8,SQ8")
    data = bytearray((path / FAISS).read_bytes())
    lists = data.index(b"ilar")
    where, form = {"sizes": (lists + 32, "<2Q"), "count": (lists + 24, "<Q"),
                   "lists": (lists + 4, "<Q")}[place]  # fmt: skip
    struct.pack_into(form, data, where, *(value if isinstance(value, tuple) else (value,)))
    (path / FAISS).write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    blocks = {"of": sha256, "blake2b": digest}
    edit(lambda m: m["faiss"].update(sha256=sha256, blocks=blocks))(path)
    with pytest.raises(IndexFormatError, match=r"faiss-000001\.index: FAISS refuses it"):
        found(path)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"of": "x", "blake2b": ""}, r"faiss\.blocks\.of is 'x'; expected a SHA-256"),
        ({"of": "0" * 64, "blake2b": "0" * 15}, r"blake2b is .*; expected digests of 16 hexadec"),
        ("", r"faiss\.blocks is '', not of type dict"),
        (None, None),
    ],
)
def test_digests_of_blocks_in_the_manifest(tmp_path, value, what) -> None:
    path = make(tmp_path / "x", 12)
    at("faiss", "blocks", value=value)(path)
    if what is None:
        Index.open(path).close()
        return
    with pytest.raises(IndexFormatError, match=what):
        Index.open(path)


def test_as_many_digests_as_blocks(tmp_path) -> None:
    path = make(tmp_path / "x", 12)
    at("faiss", "blocks", "blake2b", value="0" * 32)(path)
    with pytest.raises(IndexFormatError, match=r"blocks\.blake2b has 32 digits for 1 blocks"):
        Index.open(path)


# --- coarse codes and "auto" ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "times"),
    [
        ("Flat", 1), ("SQ8", 1), ("IVF8,SQ6", 1), ("IVF8,SQ4", 2), ("IVF8,PQ32x4", 4),
        ("PQ8x8", 16), ("IVF8,PQ8x8", 16), ("IVF8,PQ4x8", 64), ("RaBitQ", 16), ("IVF8,RaBitQ", 16),
        ("IVF8,PQ8x4fs", 64), ("HNSW8", 1), ("HNSW8,SQ4", 2), ("OPQ16,IVF8,PQ8x8", 16),
        ("PCA16,IVF8,SQ8", 4), ("IVF8,PQ8x8,RFlat", 1), ("LSH", 16), ("NSG8", 1),
    ],
)  # fmt: skip
def test_candidates_follow_from_the_bits_of_a_code(factory, times) -> None:
    index = faiss.index_factory(64, factory)
    assert faiss_build.candidates(index) == times


def test_a_search_asks_for_as_many_candidates(tmp_path, monkeypatch) -> None:
    make(path := tmp_path / "index", 100, factory="PQ4x4")
    asked = []
    monkeypatch.setattr(
        "embedcam.index.search.parameters", lambda index, probes, effort: asked.append(effort)
    )
    with Index.open(path) as index:
        for _ in range(2):
            index.search(index.embeddings([3]), 1)
    assert asked == [4 * (1 + SLACK)] * 2


@pytest.mark.parametrize("factory", ["IVF16,RaBitQ", "IVF16,PQ8x4", "RaBitQ"])
def test_coarse_codes_still_find_the_true_neighbors(factory) -> None:
    width = 32
    around = vectors_of(60, 5, width)
    draw = np.random.default_rng(6)
    vectors = around[draw.integers(0, 60, 6000)] + 0.5 * vectors_of(6000, 7, width)
    queries = around[draw.integers(0, 60, 40)] + 0.5 * vectors_of(40, 8, width)
    index = filled(factory, vectors)
    true = nearest(vectors, queries, 5).positions

    def recall(fetch: int) -> float:
        options = faiss_build.parameters(index, 16, 1)
        rows = index.search(queries, fetch, params=options)[1]
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(true, rows, strict=True)]))

    times = faiss_build.candidates(index)
    assert times > 1
    assert recall(5 + SLACK) < recall(times * (5 + SLACK))
    assert recall(times * (5 + SLACK)) >= 0.99


@pytest.mark.parametrize(
    ("n", "chosen"),
    [
        (0, "Flat"), (19_999, "Flat"), (20_000, "IVF512,SQ8"), (100_000, "IVF512,SQ8"),
        (200_000, "IVF1024,SQ8"), (1_000_000, "IVF1024,SQ8"), (2_000_000, "IVF4096,SQ8"),
        (10**7, "IVF4096,SQ8"), (2 * 10**7, "IVF16384,SQ8"), (10**9, "IVF16384,SQ8"),
    ],
)  # fmt: skip
def test_auto_chooses_by_the_number_of_images(n, chosen) -> None:
    assert faiss_build.choose("Auto", n) == chosen
    assert faiss_build.choose("HNSW32", n) == "HNSW32"
    faiss_build.check_factory("auto", 128, n)


def test_what_was_chosen_is_said() -> None:
    said = faiss_build.choice_note("auto", "IVF1024,SQ8", 1_000_000)
    assert said == "search: IVF1024,SQ8, chosen for 1,000,000 images"
    assert faiss_build.choice_note("IVF1024,SQ8", "IVF1024,SQ8", 1_000_000) is None
    grown = faiss_build.choice_note("auto", "Flat", 30_000)
    assert grown is not None
    assert grown.startswith("search: Flat; auto prefers IVF512,SQ8 for 30,000 images")


@pytest.fixture
def lists_early(monkeypatch) -> None:
    """Lists from 200 images on."""
    monkeypatch.setattr(faiss_build, "_AUTO", ((200, "Flat"), (10**9, "IVF32,SQ8")))


@pytest.mark.usefixtures("lists_early")
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_an_index_made_by_auto(tmp_path, metric) -> None:
    path = make(tmp_path / "x", 150, factory="auto", metric=metric)
    assert (entry_of(path)["factory"], entry_of(path)["search"]) == ("Flat", {})
    append(path, part(150, 2000, encoding_of("top-m")))
    assert entry_of(path)["factory"] == "Flat"
    rebuild_faiss(path, "auto")
    entry = entry_of(path)
    assert entry["factory"] == "IVF32,SQ8"
    assert entry["trained_on"] == 2000
    queries = part(3000, 3200, encoding_of("top-m")).embeddings
    with Index.open(path) as index:
        found = index.search(queries, 5).positions
        loaded = index.faiss_file.loaded()
        rows = index.embeddings(np.arange(2000))
    true = nearest(rows, queries, 5, metric).positions
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, true, strict=True)]) >= 0.99
    # Literally: the first number of lists, doubled, at which the sample finds its true five.
    own = np.sort(np.random.default_rng(0).choice(2000, 256, replace=False))
    scores = rows[own].astype(float) @ rows.T.astype(float)
    scores[np.arange(256), own] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :5]
    for probes in (8, 16, 32):
        options = faiss_build.parameters(loaded, probes, 1)
        proposed = loaded.search(rows[own], 6 + SLACK, params=options)[1]
        if (
            np.mean([len(set(a) & set(b)) / 5 for a, b in zip(best, proposed, strict=True)])
            >= 0.995
        ):
            break
    assert entry["search"] == {"nprobe": probes}
    rebuild_faiss(path)  # of the same kind: what was chosen stays
    assert entry_of(path)["search"] == {"nprobe": probes}
    rebuild_faiss(path, "IVF32,SQ8")
    assert entry_of(path)["search"] == {"nprobe": 8}
    verify(path)


def test_copies_of_one_image_are_all_right() -> None:
    vectors = np.repeat(vectors_of(50), 40, axis=0)
    assert enough_lists(filled("IVF16,SQ8", vectors), vectors, "l2") == 8


@pytest.mark.usefixtures("lists_early")
def test_where_lists_cannot_tell_images_apart_auto_takes_flat(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "enough_lists", lambda *_: None)
    path = make(tmp_path / "x", 400, factory="auto")
    entry = entry_of(path)
    assert (entry["factory"], entry["trained_on"], entry["search"]) == ("Flat", 0, {})
    verify(path)


# --- several files ------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch) -> None:
    """At most 1,600 bytes of rows in a file: 50 of Flat, 100 of IVF,SQ8, 160 of IVF,PQ4x4."""
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1600)


SECOND = "faiss-000001.0001.index"


def answers(path: Path, k: int = 7) -> list[list[int]]:
    queries = part(3000, 3040, encoding_of("top-m")).embeddings
    with Index.open(path) as index:
        return index.search(queries, k).positions.tolist()


def files_of(path: Path) -> dict[str, int]:
    """The rows of each search file that the manifest names; no other lies there."""
    entry = entry_of(path)
    files = {one["file"]: one["rows"] for one in entry.get("more", [])}
    total = json.loads((path / "manifest.json").read_text())["counts"]["rows"]
    assert {p.name for p in path.glob("faiss-*")} == {entry["file"], *files}
    return {entry["file"]: total - sum(files.values()), **files}


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", MERGED)
def test_several_files_are_searched_as_one(tmp_path, monkeypatch, factory, metric) -> None:
    one = make(tmp_path / "one", 390, factory=factory, metric=metric)
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1600)
    path = make(tmp_path / "x", 390, factory=factory, metric=metric)
    rows = files_of(path)
    each = next(iter(rows.values()))
    numbers = 0 if factory == "Flat" else 8
    assert each == 1600 // (numbers + faiss.read_index(str(one / FAISS)).code_size) < 390
    assert list(rows) == [FAISS, *(f"faiss-000001.{n:04d}.index" for n in range(1, len(rows)))]
    assert [*rows.values()] == [min(each, 390 - start) for start in range(0, 390, each)]
    verify(path)
    # Each is what one shard is, and the search over all the one over a single file.
    vectors = part(0, 390, encoding_of("top-m")).embeddings
    trained = faiss_build.train(factory, vectors, metric, np.arange(390))[0]
    for number, file in enumerate(rows):
        shard = faiss_build.shard(trained, vectors, each * number, min(390, each * (number + 1)))
        assert (path / file).read_bytes() == bytes_of(shard)
    with Index.open(path) as index, Index.open(one) as single:
        some, alone = index.faiss_file.loaded(), single.faiss_file.loaded()
        assert faiss_build.candidates(some) == faiss_build.candidates(alone)
        options = faiss_build.parameters(some, 3, 1)
        found = some.search(vectors[:40], 60, params=options)
        expected = alone.search(vectors[:40], 60, params=options)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
        assert index.manifest.named_bytes == sum(
            p.stat().st_size for p in path.rglob("*") if p.name not in ("manifest.json", ".lock")
            and p.is_file()
        )  # fmt: skip
    assert answers(path) == answers(one)
    remove(one, [f"image-{n:04d}" for n in range(0, 390, 3)])
    remove(path, [f"image-{n:04d}" for n in range(0, 390, 3)])
    assert answers(path, 200) == answers(one, 200)
    compact(path)
    compact(one)
    assert [*files_of(path).values()] == [min(each, 260 - at) for at in range(0, 260, each)]
    assert answers(path) == answers(one)
    verify(path)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(("factory", "each"), [("Flat", 50), ("IVF8,SQ8", 100)])
def test_full_files_stay_and_the_last_grows(tmp_path, factory, each) -> None:
    path = make(tmp_path / "x", each - 10, factory=factory)
    trained = entry_of(path)["trained_on"]
    start = each - 10
    for stop, expected in (
        (each, {"faiss-000002.index": each}),
        (each + 5, {"faiss-000002.index": each, "faiss-000003.0001.index": 5}),
        (
            3 * each + 1,
            {
                "faiss-000002.index": each,
                "faiss-000004.0001.index": each,
                "faiss-000004.0002.index": each,
                "faiss-000004.0003.index": 1,
            },
        ),
    ):
        before = {p.name: p.stat().st_mtime_ns for p in path.glob("faiss-*")}
        append(path, part(start, stop, encoding_of("top-m")))
        start = stop
        assert files_of(path) == expected
        for name in before.keys() & expected.keys():
            assert (path / name).stat().st_mtime_ns == before[name]
        assert entry_of(path)["trained_on"] == trained
        verify(path)
    index, _ = faiss_build.train(factory, part(0, each - 10, encoding_of("top-m")).embeddings, "l2",
                                 np.arange(each - 10))  # fmt: skip
    rows = part(0, stop, encoding_of("top-m")).embeddings
    for number, file in enumerate(expected):
        begin = number * each
        shard = faiss_build.shard(index, rows, begin, min(stop, begin + each))
        assert (path / file).read_bytes() == bytes_of(shard)


@pytest.mark.parametrize("factory", ["HNSW8", "NSG8", "PCA4,IVF8,SQ8"])
def test_types_that_cannot_be_merged_stay_in_one_file(tmp_path, monkeypatch, factory) -> None:
    one = make(tmp_path / "one", 300, factory=factory)
    append(one, part(300, 310, encoding_of("top-m")))
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1600)
    path = make(tmp_path / "x", 300, factory=factory)
    append(path, part(300, 310, encoding_of("top-m")))
    assert files_of(path) == {"faiss-000002.index": 310}
    assert (path / "manifest.json").read_bytes() == (one / "manifest.json").read_bytes()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
def test_at_most_so_many_files(tmp_path, monkeypatch, factory) -> None:
    monkeypatch.setattr(manifest, "MOST_FAISS_FILES", 3)
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 160)
    path = make(tmp_path / "x", 30, factory=factory)
    each = 5 if factory == "Flat" else 10
    assert [*files_of(path).values()] == [each, each, 30 - 2 * each]
    append(path, part(30, 44, encoding_of("top-m")))
    assert [*files_of(path).values()] == [each, each, 44 - 2 * each]
    verify(path)


def test_a_manifest_has_digests_of_so_many_blocks_in_all(tmp_path, monkeypatch) -> None:
    for module in (faiss_files, manifest, writer):
        monkeypatch.setattr(module, "FAISS_BLOCK", 256)
        monkeypatch.setattr(module, "MOST_FAISS_BLOCKS", 30)
    path = make(tmp_path / "few", 200)
    assert entry_of(path)["blocks"] is not None
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1600)
    path = make(tmp_path / "x", 400)
    entry = entry_of(path)
    assert [one["blocks"] for one in (entry, *entry["more"])] == [None] * 8
    verify(path)


@pytest.mark.usefixtures("small_files")
def test_what_an_earlier_embedcam_does_with_several_files(tmp_path) -> None:
    path = make(tmp_path / "x", 390, factory="IVF8,SQ8")
    # It knows no "more", so it misses rows in the file that it does know, and refuses it.
    entry = at("faiss", "more", absent=True)
    entry(path)
    with pytest.raises(IndexFormatError, match="holds 100 vectors of width 8; the index has 390"):
        Index.open(path)
    # Its sweep leaves files alone that it does not know: by this, and nothing else.
    for name in ("faiss-000001.0001.index", "faiss-000001.0001.index.tmp"):
        assert re.fullmatch(r"faiss-[0-9]+\.index(\.tmp)?", name) is None
    # What it makes instead is one file, beside which ours are swept.
    rebuild_faiss(path, "HNSW8")
    assert files_of(path) == {"faiss-000002.index": 390}


def add_a_file(entry: dict[str, Any]) -> None:
    entry["more"].append({**entry["more"][-1], "file": "faiss-000001.0004.index"})


HOSTILE = {
    "one more file": (add_a_file,
                      "holds 100 vectors of width 8; its part of the index has 10 of 8"),
    "one file less": (lambda m: m["more"].pop(), "holds 100 vectors .* of the index has 190 of 8"),
    "one row less": (lambda m: m["more"][-1].update(rows=89), "holds 100 vectors .* has 101 of 8"),
    "all rows": (lambda m: m["more"][0].update(rows=200), r"more holds 390 of 390 rows"),
    "rows that are too many": (lambda m: m["more"][0].update(rows=2**48 - 1), "more holds 2814749"),
    "no rows": (lambda m: m["more"][0].update(rows=0), r"more\[0\]\.rows = 0 is impossible"),
    "the same file twice": (lambda m: m["more"][1].update(file=SECOND), "the file number 2"),
    "the first file again": (lambda m: m["more"][1].update(file=FAISS), r"faiss-NNNNNN\.\[0-9"),
    "a file elsewhere": (lambda m: m["more"][0].update(file="../x.index"), "expected faiss-NNNNNN"),
    "the order": (lambda m: m["more"].reverse(), "the file number 1"),
    "no list": (lambda m: m.update(more="x"), "is 'x', not of type list"),
    "many": (lambda m: m.update(more=[{**m["more"][0], "rows": 1}] * 256), "names 256 files; at m"),
    "a number of rows as text": (lambda m: m["more"][0].update(rows="1"), "rows is '1'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_build, "MOST_BYTES", 1600)
        return make(tmp_path_factory.mktemp("several") / "x", 390, factory="IVF8,SQ8")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lists_of_files(tmp_path, several, name) -> None:
    change, what = HOSTILE[name]
    path = shutil.copytree(several, tmp_path / "x")
    edit(lambda m: change(m["faiss"]))(path)
    with pytest.raises(IndexFormatError, match=what):
        Index.open(path)


def test_files_of_two_types_or_of_one_that_is_never_several(tmp_path, several) -> None:
    vectors = part(0, 390, encoding_of("top-m")).embeddings

    def forge(folder: Path, factory: str, numbers: list[int]) -> Path:
        path = shutil.copytree(several, folder)
        for number in numbers:
            file = path / (f"faiss-000001.{number:04d}.index" if number else FAISS)
            rows = vectors[100 * number : 100 * number + 100]
            file.write_bytes(data := bytes_of(filled(factory, rows)))
            told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "blocks": None}
            edit(lambda m, n=number, t=told: ([m["faiss"], *m["faiss"]["more"]][n]).update(t))(path)
        return path

    with pytest.raises(IndexFormatError, match=r"0002\.index: is of another type than the file of"):
        Index.open(forge(tmp_path / "two", "IVF8,Flat", [2]))
    path = forge(tmp_path / "graphs", "HNSW8", [0, 1, 2, 3])
    with pytest.raises(IndexFormatError, match=r"faiss-000001\.index: is of a type that is in one"):
        found(path)


def test_damage_in_any_of_several_files_is_found(tmp_path, several) -> None:
    path = shutil.copytree(several, tmp_path / "x")
    assert verify(path).ok
    for file in files_of(path):
        flip(file, 700)(path)
        for use in (found, verify):
            with pytest.raises(
                IndexFormatError, match=f"{file}: does not match its checksum; the f"
            ):
                use(path)
        if file == "faiss-000001.0003.index":  # which is the one that grows
            with pytest.raises(IndexFormatError, match="does not match its checksum"):
                append(path, part(390, 395, encoding_of("top-m")))
        flip(file, 700)(path)
    (path / SECOND).unlink()
    with pytest.raises(IndexFormatError, match=f"{SECOND}: is missing; the file is derived"):
        Index.open(path)
    rebuild_faiss(path)
    assert files_of(path) == {"faiss-000002.index": 390}


def test_a_reader_of_several_files_keeps_them(tmp_path, several) -> None:
    path = shutil.copytree(several, tmp_path / "x")
    expected = answers(path)
    queries = part(3000, 3040, encoding_of("top-m")).embeddings
    index = Index.open(path)
    rebuild_faiss(path, "Flat")
    assert index.search(queries, 7).positions.tolist() == expected
    index.close()
    with pytest.raises(InputError, match="the index is closed"):
        index.search(queries, 7)
    assert [one.descriptor for one in (index.faiss_file, *index.faiss_file.more)] == [None] * 4


@pytest.mark.usefixtures("small_files")
def test_making_the_same_files_again_changes_nothing(tmp_path, several) -> None:
    path = shutil.copytree(several, tmp_path / "x")
    before = (path / "manifest.json").read_bytes()
    make(path, 390, factory="IVF8,SQ8", replace=True)
    assert (path / "manifest.json").read_bytes() == before
    assert len(files_of(path)) == 4


@pytest.mark.usefixtures("lists_early", "small_files")
def test_auto_measures_over_all_files(tmp_path, monkeypatch) -> None:
    path = make(tmp_path / "x", 2000, factory="auto")
    assert len(files_of(path)) == 20
    with faiss_build.threads(3), threadpool_limits(3):
        again = make(tmp_path / "again", 2000, factory="auto")
    for file in (*files_of(path), "manifest.json"):
        assert (again / file).read_bytes() == (path / file).read_bytes()
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1 << 20)
    one = make(tmp_path / "one", 2000, factory="auto")
    assert len(files_of(one)) == 1
    assert entry_of(path)["search"] == entry_of(one)["search"]
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 1600)
    monkeypatch.setattr(writer, "enough_lists", lambda *_: None)
    rebuild_faiss(path, "auto")
    assert (entry_of(path)["factory"], [*files_of(path).values()]) == ("Flat", [50] * 40)
    verify(path)
