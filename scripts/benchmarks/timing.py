"""Timing by turns, and the tables that come of it."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Run = Callable[..., object]
AGAIN = "{} again (A/A)"


class Case(NamedTuple):
    """Something to be timed: `run`, of what `before` makes ready, which `after` tidies up."""

    run: Run
    before: Run | None = None
    after: Run | None = None

    def seconds(self) -> float:
        """One timed run, garbage collection off."""
        ready = () if self.before is None else (self.before(),)
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            self.run(*ready)
            return time.perf_counter() - start
        finally:
            gc.enable()
            if self.after is not None:
                self.after(*ready)


def alternate(
    cases: Mapping[str, Case | Run], rounds: int, warmup: int = 1, *, control: bool = False
) -> dict[str, np.ndarray]:
    """Seconds of each case in each round `[rounds]`; the cases take turns: A B C A B C.

    With `control` the first is run a second time in each round, right after itself.
    """
    turns = {name: one if isinstance(one, Case) else Case(one) for name, one in cases.items()}
    if control:
        first = next(iter(turns))
        turns = {first: turns[first], AGAIN.format(first): turns[first], **turns}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    # What lives already is left out of the collections between runs: they would cost more than the
    # runs, and empty the processor's cache.
    gc.collect()
    gc.freeze()
    try:
        for number in range(warmup + rounds):
            for name, case in turns.items():
                took = case.seconds()
                if number >= warmup:
                    seconds[name].append(took)
    finally:
        gc.unfreeze()
    return {name: np.array(took) for name, took in seconds.items()}


class Ratio(NamedTuple):
    """Median, smallest and largest over the rounds of one case's time over another's."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratio(seconds: np.ndarray, base: np.ndarray) -> Ratio:
    """Round by round, so that a machine that slows down slows both."""
    each = seconds / base
    return Ratio(float(np.median(each)), float(each.min()), float(each.max()))


def verdict(value: float, bar: float | None, *, at_least: bool = False) -> str:
    if bar is None:
        return ""
    met = value >= bar if at_least else value <= bar
    return f"{'>=' if at_least else '<='} {bar:g}: {'met' if met else '**not met**'}"


def milliseconds(seconds: np.ndarray) -> str:
    low, middle, high = (1e3 * float(f(seconds)) for f in (np.min, np.median, np.max))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def compared(
    took: Mapping[str, np.ndarray],
    before: str = "",
    bars: Mapping[str, float | None] | None = None,
    *,
    at_least: bool = False,
) -> list[list[object]]:
    """Rows of case, milliseconds, ratio to the first case, and the bar."""
    base, rows = next(iter(took.values())), list[list[object]]()
    for case, seconds in took.items():
        over, bar = ratio(seconds, base), (bars or {}).get(case)
        told = verdict(over.median, bar, at_least=at_least)
        rows.append([before + case, milliseconds(seconds), over, told])
    return rows


def peak_of(code: str) -> float:
    """Run Python code in a process of its own; its largest resident set in MB, NaN if it failed."""
    # Not getrusage's, which a child inherits from the process that started it.
    asked = "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code + asked],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return float(done.stdout.split()[-1]) / 1024 if done.returncode == 0 else float("nan")


def written(text: str, output: Path | None) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"written to {output}")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *[list(map(str, r)) for r in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def section(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A part of a report: its title, what was measured, and a table."""
    return f"\n## {title}\n\n{note}\n\n{table(head, rows)}"
