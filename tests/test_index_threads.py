"""One open index and many threads: loaded once, closed once, let go at once."""

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_samples import WIDTH, make

from embedcam.errors import IndexFormatError, InputError
from embedcam.index import Index, compact, remove
from embedcam.index.faiss_files import FaissFile

AT_ONCE = 8
pytestmark = pytest.mark.usefixtures("quick_disk")


def together(run: Callable[[int], Any], count: int = AT_ONCE) -> list[Any]:
    """What so many threads return that begin at the same moment."""
    start = threading.Barrier(count)

    def one(number: int) -> Any:
        start.wait(10)
        return run(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def slow_load(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Loading takes a while; each descriptor is noted after it was seen to be open."""
    loads: list[int] = []
    load = FaissFile.read

    def slowly(file: FaissFile) -> Any:
        descriptor = file.descriptor
        if descriptor is not None:
            time.sleep(0.1)
            os.fstat(descriptor)
            loads.append(descriptor)
        return load(file)

    monkeypatch.setattr(FaissFile, "read", slowly)
    return loads


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat"])
def test_a_first_search_in_every_thread_loads_once(tmp_path, slow_load, factory) -> None:
    path = make(tmp_path / "x", 200, "dense", factory)
    with Index.open(path) as one:
        queries = one.embeddings(np.arange(AT_ONCE))
        expected = [one.search(queries[i : i + 1], 7) for i in range(AT_ONCE)]
        every = one.search(queries, 7)
    slow_load.clear()
    with Index.open(path) as index:
        found = together(lambda i: (index.search(queries[i : i + 1], 7), index.search(queries, 7)))
    assert len(slow_load) == 1
    for (single, batch), alone in zip(found, expected, strict=True):
        for mine, other in ((single, alone), (batch, every)):
            np.testing.assert_array_equal(mine.positions, other.positions)
            np.testing.assert_allclose(mine[1:], other[1:], atol=1e-6)
    np.testing.assert_array_equal([one.positions[0] for one in expected], every.positions)


def test_a_broken_file_is_refused_in_every_thread(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 40, "dense", "HNSW8")
    file = path / "faiss-000001.index"
    file.write_bytes(file.read_bytes()[:-5] + b"wrong")
    with Index.open(path) as index:

        def search(_: int) -> None:
            with pytest.raises(IndexFormatError, match="does not match its checksum"):
                index.search(np.eye(1, WIDTH), 3)

        together(search)


def test_closing_waits_for_a_load_and_happens_once(tmp_path, slow_load, monkeypatch) -> None:
    index = Index.open(make(tmp_path / "x", 40, "dense"))
    descriptor, closed, close = index.faiss_file.descriptor, [], os.close

    def note(number: int) -> None:
        closed.append(number)
        close(number)

    monkeypatch.setattr(os, "close", note)
    loading = threading.Thread(target=index.load)
    loading.start()
    time.sleep(0.02)
    together(lambda _: index.close())
    loading.join()
    # The load saw its descriptor open although the index was being closed.
    assert slow_load == [descriptor]
    assert closed.count(descriptor) == 1
    assert index.faiss_file.descriptor is None
    for ask in (index.load, lambda: index.search(np.eye(1, WIDTH), 3), lambda: index.ids[0]):
        with pytest.raises(InputError, match="the index is closed; open it again"):
            ask()


def search_on(index: Index, query: np.ndarray) -> None:
    while True:
        found = index.search(query, 2).positions[0]
        assert (found[0], index.ids[found][0]) == (3, "image-0003")
        assert index.select(found).fields()["values"].shape == (2, 2)


def test_closing_under_searches_ends_them_right_or_closed(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 300, "top-m")
    for _ in range(5):
        index = Index.open(path)

        def run(number: int, index: Index = index) -> None:
            if number == 0:
                time.sleep(0.002)
                index.close()
            else:
                with pytest.raises(InputError, match="the index is closed"):
                    search_on(index, index.embeddings([3]))

        together(run)


def test_so_many_threads_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    path, seen = make(tmp_path / "x", 40, "dense"), []
    search = faiss.IndexFlat.search

    def note(self: Any, *given: Any, **options: Any) -> Any:
        seen.append(faiss.omp_get_max_threads())
        return search(self, *given, **options)

    before = faiss.omp_get_max_threads()
    monkeypatch.setattr(faiss.IndexFlatL2, "search", note)
    try:
        faiss.omp_set_num_threads(2)
        for asked in (None, 1, 3):
            with Index.open(path, n_threads=asked) as index:
                index.search(index.embeddings([0]), 3)
                index.search(index.embeddings([0, 1]), 3)
        with Index.open(path) as index:
            monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked child
            index.search(np.eye(2, WIDTH), 3)
            with pytest.raises(
                InputError, match=r"x: an open index is not pickled.*\.open\(path\)"
            ):
                pickle.dumps(index)
    finally:
        faiss.omp_set_num_threads(before)
    assert seen == [1, 2, 1, 1, 1, 3, 1]
    for wrong in (0, 2.0, True):
        with pytest.raises(InputError, match=r"n_threads = .*; give a whole number of at least 1"):
            Index.open(path, n_threads=wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_files_go_with_the_last_who_holds_the_index(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 40, "dense")

    def held() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                      if os.path.islink(f"/proc/self/fd/{n}")]  # fmt: skip
        return [text for text in [*lines, *open_files] if str(path) in text]

    gc.collect()
    gc.disable()
    try:
        index = Index.open(path)
        index.load()
        ids, rows = index.ids, index.embeddings([1])
        index.search(rows, 3)
        remove(path, ["image-0000"])
        compact(path)
        assert any("(deleted)" in text for text in held())
        assert ids[1] == "image-0001"
        del index, ids
        assert held() == []
        assert rows.shape == (1, WIDTH)
    finally:
        gc.enable()


@pytest.mark.parametrize("factory", ["Flat", "none"])
@pytest.mark.parametrize("rows", [40, 41])
def test_a_link_led_elsewhere_during_opening_mixes_nothing(
    tmp_path, monkeypatch, rows, factory
) -> None:
    """With as many rows every size fits, and nothing but the place tells the files apart."""
    from embedcam.index import manifest

    link, read = tmp_path / "current", manifest.read
    link.symlink_to(make(tmp_path / "one", 40, factory=factory))
    other = make(tmp_path / "two", rows, start=100, factory=factory)

    def switching(root: Path) -> dict[str, Any]:
        found = read(root)
        if link.resolve() != other:
            link.unlink()
            link.symlink_to(other)
        return found

    monkeypatch.setattr(manifest, "read", switching)
    with Index.open(link) as index:
        assert index.path == link
        assert index.ids[0] == "image-0100"
        assert index.verify()
