"""Hostile values in the place of every key of every kind of index: what becomes of it?

    python -m scripts.campaigns manifests [--seconds 600] [--sample 400 --seed 0]

For each kind of index (scripts/campaigns/kinds.py) and each key of its manifest some forty values
(scripts/campaigns/values.py) take the key's place, and the key is left out; the checksums are made
to fit. What comes of it is opened, verified, searched, explained and described, in a child of its
own, within 10 seconds and 1 GB beyond what it began with. It must be refused in one sentence, or
answer as the unchanged index does. (Settings of an approximate search and the numbers of a
calibration may change answers: that is what they are for.)

One line a kind; the exit status is 1 where something failed, and then the place and the value are
printed.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .kinds import KINDS, build_kind
from .trial import OUTCOMES, Expected, Outcome, in_child, judged
from .values import VALUES, Place, changed, may_differ, places, write

BATCH = 50
Trial = tuple[Place, str]


def tried(path: Path, trials: Sequence[Trial], expected: Expected) -> list[Outcome]:
    """What becomes of an index with each of the values in its place."""
    manifest = json.loads((path / "manifest.json").read_text())

    def work(send: Callable[[Any], None]) -> None:
        for place, value in trials:
            write(path, changed(manifest, place, VALUES[value]))
            send(judged(path, expected, may_differ(place)))

    found: list[Outcome] = []
    try:
        found = in_child(work)
    finally:
        write(path, manifest)
    if len(found) < len(trials):  # a child died: the others go on in another
        found += tried(path, trials[len(found) :], expected)
    return found


def walk(name: str, folder: Path, sample: int | None, rng: random.Random, until: float) -> int:
    """Try a kind of index; returns how many failed."""
    path = build_kind(name, folder)
    expected = Expected(path)
    manifest = json.loads((path / "manifest.json").read_text())
    trials = [(place, value) for place in places(manifest) for value in VALUES]
    total, counts, failed = len(trials), Counter[str](), 0
    if sample is not None:
        trials = rng.sample(trials, sample)
    while trials and time.monotonic() < until:
        batch, trials = trials[:BATCH], trials[BATCH:]
        for (place, value), outcome in zip(batch, tried(path, batch, expected), strict=True):
            counts[outcome.kind] += 1
            if outcome.failed:
                failed += 1
                print(f"FAILED {name}: {'.'.join(map(str, place))} = {value}: {outcome.said}")
    said = ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOMES if counts[kind])
    print(f"{name}: {sum(counts.values())} of {total}: {said}, {failed} failed", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=3600, help="end after so long")
    parser.add_argument("--sample", type=int, help="try so many, drawn at random, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    until, rng, failed = time.monotonic() + options.seconds, random.Random(options.seed), 0
    each = None if options.sample is None else max(1, options.sample // len(KINDS))
    for name in KINDS:
        with tempfile.TemporaryDirectory(prefix="embedcam-hostile-") as folder:
            failed += walk(name, Path(folder), each, rng, until)
    return int(failed > 0)
