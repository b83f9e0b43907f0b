"""The index: what is written comes back, through every change, for any content."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import WIDTH, encoding_of, header_of, make, part
from test_index_corrupt import content

from embedcam.errors import IndexBusyError, IndexFormatError, InputError
from embedcam.index import (
    Index,
    PartData,
    append,
    check_factory,
    compact,
    create,
    lock,
    quantize_coarse,
    rebuild_faiss,
    remove,
)
from embedcam.index.encoding import TopM

TOP = encoding_of("top-m")
KINDS = ["top-m", "low-rank", "embedding", "dense", "dense32"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
pytestmark = pytest.mark.usefixtures("quick_disk")


def check_rows(index: Index, written: PartData, positions: np.ndarray, kind: str) -> None:
    """Every array of these positions equals what was written, bit for bit."""
    encoding = encoding_of(kind)
    assert index.ids[positions] == list(written.ids)
    assert index.labels[positions] == list(written.labels)
    assert index.paths[positions] == list(written.paths)
    np.testing.assert_array_equal(index.embeddings(positions), written.embeddings)
    np.testing.assert_array_equal(index.triplets_used(positions), written.triplets_used)
    rows = dict(written.fields[0])
    if encoding.uses_embedding:
        rows["embedding"] = written.embeddings
    for name, values in index.rows(positions).items():
        np.testing.assert_array_equal(values, rows[name])
    np.testing.assert_array_equal(index.weights(positions), encoding.decode(rows))
    maps, scales = written.coarse[0]
    expected = maps * (scales[:, None, None] / np.float32(255))
    np.testing.assert_array_equal(index.coarse(positions), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "x", 9, kind)
    encoding = encoding_of(kind)
    with Index.open(path) as index:
        assert (len(index), index.n_rows, index.width) == (9, 9, WIDTH)
        check_rows(index, part(0, 9, encoding), np.arange(9), kind)
        shuffled = np.array([7, 0, 7])
        expected = part(0, 9, encoding).embeddings[shuffled]
        np.testing.assert_array_equal(index.embeddings(shuffled), expected)
        assert index.ids[shuffled] == ["image-0007", "image-0000", "image-0007"]
        assert index.ids[-1] == "image-0008"
        assert index.labels[2:5] == ["class 2", "class 0", None]
        assert [index.position(i) for i in index.ids] == list(range(9))
        np.testing.assert_array_equal(index.fitted("embedding_mean"), np.arange(WIDTH))
        assert list(index.probe()) == ["probe_embedding"]
        assert index.manifest.to_dict()["fit"] == {"images": 9, "rows": 9}
        assert len(index.verify()) == 8


def test_coarse_bytes_are_within_half_a_step() -> None:
    cams = np.random.default_rng(0).random((4, 3, 3)).astype(np.float32)
    cams[2] = 0
    stored, scales = quantize_coarse(cams)
    np.testing.assert_array_equal(scales, cams.max(axis=(1, 2)))
    error = np.abs(stored * (scales[:, None, None] / 255) - cams)
    assert (error <= scales[:, None, None] / 509).all()
    assert not stored[2].any()
    with pytest.raises(InputError, match="not negative"):
        quantize_coarse(-cams)


def test_the_same_build_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", 40), make(tmp_path / "b", 40)
    assert content(first) == content(second)
    for path in (first, second):
        append(path, part(40, 60, TOP))
        remove(path, ["image-0003"])
        compact(path)
    assert content(first) == content(second)


def test_a_life_of_changes(tmp_path: Path) -> None:
    encoding = encoding_of("low-rank")
    path = make(tmp_path / "x", 20, "low-rank")
    assert append(path, part(20, 25, encoding)) == 20
    assert remove(path, ["image-0003", "image-0022"]) == 2
    append(path, part(3, 4, encoding))  # a removed id may come back
    with Index.open(path) as index:
        assert (len(index), index.n_rows) == (24, 26)
        assert index.manifest.counts.added_after_fit == 5
        assert index.position("image-0003") == 25
        np.testing.assert_array_equal(index.positions(["image-0024", "image-0003"]), [24, 25])
        with pytest.raises(InputError, match="'image-0022' is not in the index any more"):
            index.position("image-0022")
        assert not index.live([3, 22]).any()
        assert set(index.live_positions()) == set(range(26)) - {3, 22}
    assert compact(path) == 2
    with Index.open(path) as index:
        assert (index.n_rows, len(index.parts)) == (24, 1)
        assert index.manifest.to_dict()["fit"] == {"images": 20, "rows": 19}
        assert index.manifest.counts.added_after_fit == 5
        order = [*(n for n in range(25) if n not in (3, 22)), 3]
        for row, number in enumerate(order):
            check_rows(index, part(number, number + 1, encoding), np.array([row]), "low-rank")
        index.verify()
    assert compact(path) == 0
    names = [".lock", "faiss-000005.index", "fitted", "manifest.json", "parts"]
    assert sorted(p.name for p in path.iterdir()) == names


def test_many_small_additions_stay_few_parts(tmp_path: Path) -> None:
    encoding = encoding_of("dense")
    path = make(tmp_path / "x", 30, "dense")
    for row in range(30, 70):
        append(path, part(row, row + 1, encoding))
    with Index.open(path) as index:
        assert len(index.parts) <= 4
        check_rows(index, part(0, 70, encoding), np.arange(70), "dense")
        index.verify()


@st.composite
def contents(draw: st.DrawFn) -> tuple[str, list[PartData], list[int]]:
    kind = draw(st.sampled_from(KINDS))
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    total = sum(sizes)
    ids = draw(st.lists(TEXT.filter(bool), min_size=total, max_size=total, unique=True))
    labels = draw(st.lists(st.none() | TEXT, min_size=total, max_size=total))
    paths, parts, stop = draw(st.lists(TEXT, min_size=total, max_size=total)), [], 0
    for size in sizes:
        start, stop = stop, stop + size
        some = {"ids": ids[start:stop], "labels": labels[start:stop], "paths": paths[start:stop]}
        parts.append(replace(part(start, stop, encoding_of(kind)), **some))
    removed = draw(st.sets(st.integers(0, total - 1))) if total else set()
    return kind, parts, sorted(removed)


@settings(max_examples=40)
@given(contents())
def test_any_content_survives_every_change(content: tuple[str, list[PartData], list[int]]) -> None:
    kind, parts, removed = content
    encoding = encoding_of(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        create(path, header_of(encoding), [encoding.fitted], {}, parts[0])
        for more in parts[1:]:
            append(path, more)
        with Index.open(path) as index:
            start = 0
            for one in parts:
                check_rows(index, one, np.arange(start, start + len(one)), kind)
                start += len(one)
            ids = list(index.ids)
            assert index.positions(ids).tolist() == list(range(start))
            index.verify()
        assert remove(path, [ids[row] for row in removed]) == len(removed)
        kept = [row for row in range(start) if row not in removed]
        with Index.open(path) as index:
            assert index.live_positions().tolist() == kept
            assert index.find_live(ids) == {ids[row]: row for row in kept}
            index.verify()
        assert compact(path) == len(removed)
        with Index.open(path) as index:
            assert list(index.ids) == [ids[row] for row in kept]
            index.verify()


def test_an_unknown_id_names_near_ones(tmp_path: Path) -> None:
    index = Index.open(make(tmp_path / "x", 12))
    for ask, message in (
        (lambda: index.position("image-00O7"), "no image 'image-00O7'; did you mean .*image-000"),
        (lambda: index.positions("image-0001"), "list of ids"),
        (lambda: index.position(7), "an id is a string; got 7"),
        (lambda: index.embeddings([12]), "position 12 is outside the index, which has rows 0 to 1"),
        (lambda: index.fitted("mean"), "no array 'mean'; it keeps: embedding_mean"),
        (lambda: index.weights([0], layer=1), "layer 1 of an index of 1 layers"),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    # Of ids with the same file name the nearest folder comes first.
    ids = [f"{folder}/1.jpg" for folder in ("anchor", "butterfly", "camera", "elephant", "panda")]
    append(index.path, replace(part(12, 17, TOP), ids=ids))
    with Index.open(index.path) as more, pytest.raises(InputError, match=r"did you mean 'panda/1"):
        more.position("pandas/1.jpg")


ONES = np.ones((3, WIDTH), np.float32)
TWICE = {"channels": np.ones((3, 2), int), "values": np.ones((3, 2))}
WRONG_ROWS = [
    ({"labels": ["a"]}, r"labels has the shape \[1\]; expected \[3\]"),
    ({"embeddings": ONES[:, :4]}, r"embeddings has the shape \[3, 4\]"),
    ({"embeddings": ONES * np.nan}, "row 0 holds a NaN"),
    ({"embeddings": ONES}, "row 0 has length 2.8.* unit vectors"),
    ({"ids": ["a", "a", "b"]}, "'a' is given twice"),
    ({"ids": ["a", "", "b"]}, "id 1 is ''"),
    ({"ids": ["a", "\udc80", "b"]}, "id 1, .* has no UTF-8 form"),
    ({"ids": ["image-0001", "b", "c"]}, "1 of 3 ids are already in the index: 'image-0001'"),
    ({"triplets_used": np.array([1, -1, 2])}, "do not fit uint32"),
    ({"coarse": [None]}, r"lacks \['layer0.coarse', 'layer0.coarse_scales'\]"),
    ({"fields": [{}]}, r"lacks \['layer0.channels', 'layer0.values'\]"),
    ({"fields": [{**TWICE, "channels": np.full((3, 2), 9)}]}, "row 0 names channel 9 of 6"),
    ({"fields": [TWICE]}, "row 0 names a channel twice"),
    ({"marks": np.zeros((4, 4), np.uint32)}, r"marks has the shape \[4, 4\]; expected \[3, 4\]"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_ROWS)
def test_wrong_rows_are_refused_and_change_nothing(tmp_path, fields, message) -> None:
    path = make(tmp_path / "x", 6)
    before = content(path)
    with pytest.raises(InputError, match=message):
        append(path, replace(part(20, 23, TOP), **fields))
    assert content(path) == before


def test_removing_an_unknown_id_changes_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 6)
    before = content(path)
    with pytest.raises(InputError, match="no image 'owl'"):
        remove(path, ["image-0001", "owl"])
    with pytest.raises(InputError, match="no image 'owl'"):
        append(path, part(30, 31, TOP), removing=["owl"])
    assert content(path) == before
    remove(path, ["image-0001"])
    with pytest.raises(InputError, match="it was removed"):
        remove(path, ["image-0001"])


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds 'thesis.tex', which is no part of an index"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    path = make(tmp_path / "x", 6)
    with pytest.raises(InputError, match="already holds a finished index"):
        make(path)
    with pytest.raises(IndexFormatError, match="no index here"):
        append(tmp_path / "nowhere", part(0, 1, TOP))
    assert not (tmp_path / "nowhere").exists()


def test_the_header_is_checked(tmp_path: Path) -> None:
    encoding, rows = encoding_of("dense"), part(0, 4, encoding_of("dense"))
    good = header_of(encoding)
    wide = {**good["layers"][0], "channels": 1 << 21}
    for change, message in [
        ({"metric": "cosine"}, "header's metric is 'cosine'; known: l2, ip"),
        ({"surprise": 1}, "unknown.*surprise"),
        ({"embedding": {"width": 3, "normalized": True}}, "expected the width 8"),
        ({"sign": "loss"}, "header's sign is 'loss'; known: margin"),
        ({"recipe": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"layers": [{"name": "x"}]}, r"layers\[0\]\.channels is missing"),
        ({"triplets": {"count": -1}}, r"header's triplets\.sampling is missing"),
        # What could not be read again:
        ({"method": "x" * 501}, "the header's method has 501 characters"),
        ({"layers": [wide]}, r"header's layers\[0\]\.channels"),
        ({"images": {"root": 3}}, "the header's images.root is 3, not of type str"),
        ({"network": {"loading": [1]}}, r"the header's network\.loading is \[1\]"),
    ]:
        with pytest.raises(InputError, match=message):
            create(tmp_path / "x", {**good, **change}, [{}], {}, rows)
    assert not list((tmp_path / "x").glob("[!.]*"))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 6)
    holder = (
        "import sys, time\nfrom embedcam.index import lock\n"
        "with lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", holder, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(IndexBusyError, match="another process is writing"):
            remove(path, ["image-0001"])
        assert len(Index.open(path)) == 6  # readers do not mind
        process.kill()
    with lock(path), lock(path):  # the kernel let go; nested in one thread it is one lock
        assert remove(path, ["image-0001"]) == 1
        with ThreadPoolExecutor(1) as pool:
            failed = pool.submit(remove, path, ["image-0002"]).exception()
    assert isinstance(failed, IndexBusyError)  # another thread is another writer


def test_importing_and_opening_need_neither_torch_nor_faiss(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 6)
    program = (
        "import sys\nfrom embedcam.index import Index\n"
        "index = Index.open(sys.argv[1])\nindex.weights([1]); index.coarse([1])\n"
        "assert not {'torch', 'faiss'} & set(sys.modules)\n"
        "index.search(index.embeddings([1]), 2)\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def test_faiss_factories_are_checked_before_any_work() -> None:
    check_factory("IVF4,Flat", 8, 4)
    check_factory("Flat", 8, 0)
    for factory, message in (
        ("IVF100,Flat", "'IVF100,Flat' needs at least 100 images to train.* 12"),
        ("PQ4", "'PQ4' needs at least 256"),
        ("Flatt", "'Flatt' cannot be used .*could not parse"),
        ("IDMap,Flat", "drop IDMap"),
    ):
        with pytest.raises(InputError, match=message):
            check_factory(factory, 8, 12)


def test_faiss_is_derived(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 40, factory="HNSW8")
    original = (path / "faiss-000001.index").read_bytes()
    (path / "faiss-000001.index").write_bytes(b"malice")
    rebuild_faiss(path)
    assert (path / "faiss-000002.index").read_bytes() == original
    rebuild_faiss(path, "none")
    with Index.open(path) as index:
        assert not list(path.glob("faiss*"))
        with pytest.raises(InputError, match="without FAISS; give neighbors="):
            index.search(index.embeddings([0]), 3)
    with pytest.raises(InputError, match="name a factory"):
        rebuild_faiss(path)
    rebuild_faiss(path, "IVF4,Flat")
    with Index.open(path) as index:
        assert index.manifest.faiss.search.nprobe == 4
        index.verify()


def test_the_worked_example_of_the_format(tmp_path: Path) -> None:
    """index/README.md's example, written and compared byte for byte."""
    encoding = TopM(3, 1, "signed", "float32")
    ids, labels, paths = ["b", "a"], ["owl", None], ["b.png", "a.png"]
    fields = encoding.encode(np.array([[0, 0, 0.5], [0.25, 0, 0]]))
    coarse, used = quantize_coarse(np.array([[[1, 0]], [[1, 2]]])), np.array([50, 50])
    rows = PartData(ids, labels, paths, np.eye(2, dtype="f4"), used, [fields], [coarse])
    path = tmp_path / "x"
    create(path, header_of(encoding, 2, (1, 2)), [encoding.fitted], {}, rows)
    files = {f.name: f.read_bytes() for f in (path / "parts" / "000001").iterdir()}
    readme = Path(__file__).parents[1].joinpath("index", "README.md").read_text(encoding="utf-8")
    example = readme.split("## A worked example")[1].split("so image")[0]
    seen = set()
    for line in example.splitlines():
        name, _, shown = line.strip().partition(" ")
        if name not in files:
            continue
        numbers, found, _ = shown.partition(" as uint64")
        if found:
            expected = np.array([int(n) for n in numbers.split(",")], np.uint64).tobytes()
        else:
            expected = bytes.fromhex(shown.strip().split("   ")[0])
        assert files[name] == expected, name
        seen.add(name)
    assert seen == set(files)
    remove(path, ["b"])
    assert (path / "tombstones-000002.u64").read_bytes() == bytes(8)
    with Index.open(path) as index:
        assert index.weights([0, 1]).tolist() == [[0, 0, 0.5], [0.25, 0, 0]]
        np.testing.assert_allclose(index.coarse([0, 1]), [[[1, 0]], [[1.004, 2]]], atol=1e-4)
        assert index.manifest.to_dict()["counts"] == {"rows": 2, "live": 1, "added_after_fit": 0}
