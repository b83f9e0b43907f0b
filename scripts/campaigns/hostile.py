"""Hostile indexes: is each one refused, answered as if whole, or found by `verify`?

What comes of a copy of a tiny index of some kind (scripts/campaigns/kinds.py) is opened, verified,
searched, explained and described, within 10 seconds and 1 GB beyond what the process began with, in
a child, so that a crash is seen. It must be refused in one sentence of at most 2,000 characters,
give the answers of the whole index, or be damaged in a way that `verify` names. (Settings of an
approximate search and the numbers of a calibration may change answers: that is what they are for.)
Anything else has failed and is printed; then the exit status is 1.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..benchmarks.timing import table
from .damage import DAMAGE, VALUES, Damage, Victim, placed, places
from .kinds import KINDS, build_kind
from .trial import NAMED, OUTCOMES, REFUSED, SAME, Expected, Outcome, in_child, judged

BATCH = 25
FAILED = "failed"


class Trial(NamedTuple):
    """A damage to an index of a kind, called by a number or a name, and its random numbers."""

    name: str
    kind: str
    damage: Damage
    rng: random.Random


class Campaign:
    """Trials of indexes that are built once."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "tried"
        self.wholes = {name: build_kind(name, folder / str(n)) for n, name in enumerate(KINDS)}
        self.expected = {name: Expected(path) for name, path in self.wholes.items()}

    def tried(self, trial: Trial) -> tuple[str, Outcome]:
        """Damage a copy and judge it: what was done, and what became of it."""
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "outside").mkdir(parents=True)
        path = Path(shutil.copytree(self.wholes[trial.kind], self.place / "index"))
        others = [path for kind, path in self.wholes.items() if kind != trial.kind]
        done = trial.damage(Victim(path, others, trial.rng, self.place / "outside"))
        return done.what, judged(path, self.expected[trial.kind], done.may_differ)

    def run(self, trials: Iterable[Trial], until: float) -> Iterator[tuple[Trial, Outcome]]:
        """Try them in children until the time is over; print what failed."""
        waiting, left = list[Trial](), iter(trials)
        while (waiting := [*waiting, *islice(left, BATCH - len(waiting))]) and (
            time.monotonic() < until
        ):

            def work(send: Callable[[object], None]) -> None:
                for trial in waiting:  # noqa: B023
                    send(self.tried(trial))

            for trial, found in zip(waiting, in_child(work), strict=False):
                # A bare outcome: the child died of this one, and the others go on in another.
                what, outcome = ("?", found) if isinstance(found, Outcome) else found
                waiting = waiting[1:]
                if outcome.failed:
                    print(f"FAILED {trial.name}, {trial.kind}: {what}: {outcome.said}", flush=True)
                yield trial, outcome


@contextmanager
def campaign() -> Iterator[Campaign]:
    with tempfile.TemporaryDirectory(prefix="embedcam-hostile-") as folder:
        yield Campaign(Path(folder))


def options_of(words: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--seconds", type=float, default=seconds, help="end after so long")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    return parser


def manifests() -> int:
    """Put some forty values in the place of every key of every kind of index: a line a kind."""
    parser = options_of("Hostile values in the place of every key of every kind of index.", 3600)
    parser.add_argument("--sample", type=int, help="try so many, drawn at random, in all")
    options = parser.parse_args()
    until, rng, failed = time.monotonic() + options.seconds, random.Random(options.seed), 0
    with campaign() as made:
        for kind, path in made.wholes.items():
            manifest = json.loads((path / "manifest.json").read_text())
            trials = [
                Trial(f"{place} = {value}", kind, partial(placed, place=place, value=value), rng)
                for place in places(manifest)
                for value in VALUES
            ]
            total = len(trials)
            if options.sample is not None:
                trials = rng.sample(trials, max(1, options.sample // len(KINDS)))
            outcomes = [outcome for _, outcome in made.run(trials, until)]
            counts = Counter(outcome.kind for outcome in outcomes)
            said = ", ".join(f"{counts[one]} {one}" for one in OUTCOMES if counts[one])
            wrong = sum(outcome.failed for outcome in outcomes)
            print(f"{kind}: {len(outcomes)} of {total}: {said}, {wrong} failed", flush=True)
            failed += wrong
    return int(failed > 0)


def mutant(seed: int, number: int) -> Trial:
    """A random damage to a random kind of index, the same for its number."""
    rng = random.Random(f"{seed} {number}")
    kind, damage = rng.choice(list(KINDS)), rng.choice(list(DAMAGE))
    return Trial(f"mutant {number}, {damage}", kind, DAMAGE[damage], rng)


def mutants() -> int:
    """Damage files at random: a table of each kind of damage."""
    parser = options_of("Random damage to the files of an index of every kind.", 3600)
    parser.add_argument("--count", type=int, default=10_000, help="mutants")
    parser.add_argument("--only", type=int, help="make and judge the mutant of this number alone")
    options = parser.parse_args()
    began = time.monotonic()
    with campaign() as made:
        if options.only is not None:
            what, outcome = made.tried(mutant(options.seed, options.only))
            print(f"{what}: {outcome.kind}: {outcome.said}")
            return int(outcome.failed)
        trials = (mutant(options.seed, number) for number in range(options.count))
        counts = Counter(
            (trial.name.partition(", ")[2], FAILED if outcome.failed else outcome.kind)
            for trial, outcome in made.run(trials, began + options.seconds)
        )
    columns = (REFUSED, SAME, NAMED, FAILED)
    each = np.array([[counts[name, column] for column in columns] for name in DAMAGE])
    rows = zip((*DAMAGE, "all"), np.vstack([each, each.sum(0)]).tolist(), strict=True)
    lines = [[name, sum(numbers), *numbers] for name, numbers in rows]
    print(table(("damage", "mutants", *columns), lines))
    seconds, total, kinds = time.monotonic() - began, counts.total(), len(KINDS)
    print(f"seed {options.seed}: {total} mutants of {kinds} indexes in {seconds:.0f} s")
    return int(any(what == FAILED for _, what in counts))
