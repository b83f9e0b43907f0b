"""Bars on terminals and in notebooks, log lines elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from index_samples import encoding_of, make, part

from embedcam import Recipe
from embedcam.cli import offline
from embedcam.images import progress
from embedcam.images.progress import in_passes, progress_of
from embedcam.index import append, compact, faiss_build, nearest, remove, search
from embedcam.offline import report
from embedcam.offline.features import build_from_features


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)


@contextmanager
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    now = [100.0]
    with monkeypatch.context() as patch:
        patch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
        yield lambda seconds: now.__setitem__(0, now[0] + seconds)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "embedcam.progress"]


def wait_for(caplog: pytest.LogCaptureFixture, line: str, times: int = 1) -> None:
    for _ in range(200):
        if lines_of(caplog).count(line) >= times:
            return
        time.sleep(0.01)
    raise AssertionError(f"{line!r} is not among {lines_of(caplog)}")


def test_without_a_terminal_or_tqdm_lines_are_logged(caplog, capsys, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    with (
        clock(monkeypatch) as later,
        progress_of("embed", 4_000, shown=None, done=1_000) as advance,
    ):
        advance(32)
        later(30)
        line = "embed: 1,032 of 4,000 images, 30 s, 1.1 a second, 46 min left"
        wait_for(caplog, line, times=2)  # in one long step
        advance(2_868)
        later(30)
        wait_for(caplog, "embed: 3,900 of 4,000 images, 60 s, 48 a second, 2 s left")
        later(20_000)
        wait_for(caplog, "embed: 3,900 of 4,000 images, 5.6 h, 0.14 a second, 12 min left")
    assert capsys.readouterr() == ("", "")
    assert not [one for one in threading.enumerate() if one.name == "embedcam-progress"]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress_of("explain", 3, "queries", shown=True):
        wait_for(caplog, "explain: 0 of 3 queries, 0 s")


def test_what_is_not_counted_has_its_time_and_quick_stages_say_nothing(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    for total, expected in ((0, "tracing: 0 s"), (None, "tracing: 7 passes, 0 s")):
        with progress_of("tracing", total, "passes", shown=None) as advance:
            advance(7)
            wait_for(caplog, expected)
    caplog.clear()
    monkeypatch.setattr(progress, "EVERY", 30.0)
    begun = time.monotonic()
    with progress_of("embed", 3, shown=None) as advance:
        advance(3)
    assert time.monotonic() - begun < 5
    assert lines_of(caplog) == []


@pytest.mark.parametrize(
    ("shown", "terminal", "bar"),
    [(False, False, False), (False, True, False), (None, True, True), (True, False, True)],
)
def test_a_bar_is_shown_where_wanted(monkeypatch, caplog, capsys, shown, terminal, bar) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_of("embed", 3, shown=shown) as advance:
        advance(3)
        time.sleep(0.05)
    assert ("embed: 100%" in capsys.readouterr().err) == bar
    assert lines_of(caplog) == []


def test_a_notebook_has_a_bar_unasked(monkeypatch, capsys) -> None:
    shells: list[object] = [None, SimpleNamespace(config={}), SimpleNamespace(config="IPKernelApp")]
    module = ModuleType("IPython")
    monkeypatch.setitem(sys.modules, "IPython", module)
    for shell, shown in zip(shells, (False, False, True), strict=True):
        module.get_ipython = lambda shell=shell: shell  # type: ignore[attr-defined]
        with progress_of("embed", 3, shown=None) as advance:
            advance(3)
        assert ("embed: 100%" in capsys.readouterr().err) == shown


def test_passes_over_images_count_each_once() -> None:
    told = list[int]()
    advance = in_passes(told.append, 3)
    for _ in range(3):
        advance(5)
        advance(2)
    assert (sum(told), min(told)) == (7, 0)
    assert told == [1, 1, 2, 0, 2, 1]  # 5, 7, 12, 14, 19 and 21 of 21


class Counts(dict[str, list[int]]):
    """By stage: how many images it has, and how many were told as done."""

    @contextmanager
    def __call__(self, stage: str, total: int, **_: object) -> Iterator[Callable[[int], None]]:
        assert stage not in self, "told apart by their names"
        counts = self[stage] = [total, 0]

        def advance(more: int) -> None:
            counts[1] += more

        yield advance


def test_every_stage_of_a_build_from_features_counts_all_images(tmp_path, monkeypatch) -> None:
    counts = Counts()
    monkeypatch.setattr(report, "progress_of", counts)
    monkeypatch.setattr(faiss_build, "_AUTO", ((50, "Flat"), (100, "IVF4,SQ8")))
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    build_from_features(
        vectors, vectors, tmp_path / "i", Recipe(faiss="auto"), grid=(2, 2),
        labels=[f"{row % 3}" for row in range(60)],
    )  # fmt: skip
    stages = ["check", "reduce", "weights", "match", "write", "train", "faiss", "lists"]
    assert list(counts.items()) == [
        (stage, [0, 0] if stage == "train" else [60, 60]) for stage in stages
    ]


@pytest.mark.parametrize(
    ("factory", "again"), [("Flat", 0), ("IVF2,SQ8", 0), ("HNSW4,Flat", 0), ("NSG4", 120)]
)
def test_stages_of_a_change_count_what_they_write(tmp_path, factory, again) -> None:
    counts, encoding = Counts(), encoding_of("top-m")
    path = make(tmp_path / "i", 120, factory=factory)
    append(path, part(120, 123, encoding), stage=counts)
    assert counts == {"write": [3, 3], "faiss": [3 + again, 3 + again]}
    counts.clear()
    remove(path, ["image-0001"])
    compact(path, stage=counts)
    assert counts == {"write": [122, 122], "faiss": [122, 122]}


def test_a_search_counts_rows_also_where_queries_come_in_batches(monkeypatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for gathered in (1 << 20, 200):
        monkeypatch.setattr(search, "_GATHERED", gathered)
        told = list[int]()
        nearest(vectors, vectors[:7], 2, progress=told.append)
        assert sum(told) == 50
    assert len(told) == 4


def test_lines_of_ids_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(offline, "_TOLD", 2)
    (tmp_path / "ids.csv").write_text("id\na\nb\nc\nd\ne\n")
    told = list[int]()
    ids, _ = offline._ids_of(str(tmp_path / "ids.csv"), told.append)
    assert (list(ids), told) == (["a", "b", "c", "d", "e"], [2, 2, 1])
