"""Bars on terminals and in notebooks, log lines elsewhere."""

import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from embedcam.images import progress
from embedcam.images.progress import progress_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)


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
    with progress_of("embed", 4_000, shown=None, done=1_000) as advance:
        advance(32)
        wait_for(caplog, "embed: 1,032 of 4,000 images, 0 s", times=2)  # in one long step
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
