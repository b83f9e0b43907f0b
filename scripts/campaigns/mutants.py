"""Random damage to indexes: is each one refused, answered as if whole, or found by `verify`?

    python -m scripts.campaigns mutants [--count 10000] [--seconds 3600] [--seed 0]
    python -m scripts.campaigns mutants --seed 0 --only 1234

A mutant is a copy of a tiny index of some kind (scripts/campaigns/kinds.py) with one damage
(scripts/campaigns/damage.py). It is opened, verified, searched, explained and described, within 10
seconds and 1 GB beyond what the process began with, in a child, so that a crash is seen. It must
be refused in one sentence of at most 2,000 characters, give the answers of the whole index, or be
damaged in a way that `verify` names. Anything else has failed and is printed with its number, by
which `--only` makes it again. Prints a table; the exit status is 1 where something failed.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .damage import DAMAGE, Victim
from .kinds import KINDS, build_kind
from .trial import NAMED, REFUSED, SAME, Expected, Outcome, in_child, judged

BATCH = 25
FAILED = "failed"


class Campaign:
    """Mutants by number, over indexes that are built once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._wholes = [build_kind(name, folder / str(n)) for n, name in enumerate(KINDS)]
        self._expected = [Expected(path) for path in self._wholes]

    def mutant(self, number: int) -> tuple[str, str, Outcome]:
        """Make one and judge it: the kind of damage, what was done, and what became of it."""
        rng = random.Random(f"{self._seed} {number}")
        kind, damage = rng.randrange(len(self._wholes)), rng.choice(list(DAMAGE))
        whole, place = self._wholes[kind], self._folder / "mutant"
        shutil.rmtree(place, ignore_errors=True)
        (place / "outside").mkdir(parents=True)
        path = Path(shutil.copytree(whole, place / "index"))
        others = [one for one in self._wholes if one != whole]
        done = DAMAGE[damage](Victim(path, others, rng, place / "outside"))
        what = f"{list(KINDS)[kind]}: {done.what}"
        return damage, what, judged(path, self._expected[kind], done.may_differ)

    def batch(self, first: int, count: int) -> list[tuple[str, str, Outcome]]:
        """Mutants from `first` on, in children."""

        def work(send: Callable[[Any], None]) -> None:
            for number in range(first, first + count):
                send(self.mutant(number))

        found: list[Any] = in_child(work)
        if found and isinstance(found[-1], Outcome):  # the child died of this one
            found[-1] = ("?", "see --only", found[-1])
        return found


def run(campaign: Campaign, count: int, until: float) -> tuple[Counter[tuple[str, str]], int]:
    """So many mutants, or as many as there is time for: how many of each kind became what."""
    counts, number = Counter[tuple[str, str]](), 0
    while number < count and time.monotonic() < until:
        for damage, what, outcome in campaign.batch(number, min(BATCH, count - number)):
            counts[damage, FAILED if outcome.failed else outcome.kind] += 1
            if outcome.failed:
                print(f"FAILED mutant {number}: {what}: {outcome.said}", flush=True)
            number += 1
    return counts, number


def table(counts: Counter[tuple[str, str]]) -> str:
    columns = (REFUSED, SAME, NAMED, FAILED)
    rows = [*DAMAGE, *sorted({damage for damage, _ in counts} - set(DAMAGE))]
    lines = [f"| damage | mutants | {' | '.join(columns)} |", "|---|---:|---:|---:|---:|---:|"]
    for name in rows:
        each = [counts[name, column] for column in columns]
        lines.append(f"| {name} | {sum(each)} | {' | '.join(map(str, each))} |")
    total = [sum(counts[name, column] for name in rows) for column in columns]
    lines.append(f"| all | {sum(total)} | {' | '.join(map(str, total))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutants")
    parser.add_argument("--seconds", type=float, default=3600, help="end after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants")
    parser.add_argument("--only", type=int, help="make and judge the mutant of this number alone")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="embedcam-mutants-") as folder:
        campaign = Campaign(Path(folder), options.seed)
        if options.only is not None:
            damage, what, outcome = campaign.mutant(options.only)
            print(f"{damage}: {what}: {outcome.kind}: {outcome.said}")
            return int(outcome.failed)
        counts, number = run(campaign, options.count, began + options.seconds)
    print(table(counts))
    seconds = time.monotonic() - began
    print(f"\nseed {options.seed}: {number} mutants of {len(KINDS)} indexes in {seconds:.0f} s")
    return int(any(what == FAILED for _, what in counts))
