"""Jobs that kill themselves, one for each line "SCENARIO FOLDER"; forks, so it has one thread."""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from build_samples import DENSE, Toy, dense, everything, paint, pictures, toy

sys.path.insert(0, str(Path(__file__).parents[1]))
import embedcam.offline.plan as plan
from embedcam.images import ImageSource, find_images
from embedcam.index import Index, verify
from embedcam.offline import add_images, build_index, merge_job, plan_job, run_shard
from embedcam.preprocess import custom
from embedcam.recipe.recipe import Recipe
from scripts.campaigns.killing import KILLER, Job, begin, in_child, was_killed


def killed_everywhere(
    base: Path, before: Job | None, job: Job, points: int, check: Callable[[Path], str | None]
) -> list[str]:
    """What went wrong with a job killed at about that many points, run again, and compared."""
    start, reference = base / "start", base / "reference"
    start.mkdir()
    if before is not None:
        before(start)
    shutil.copytree(start, reference)
    KILLER.watch(reference)
    job(reference)
    KILLER.folder, total = "", KILLER.seen
    expected, problems, killed = everything(reference), [], 0
    if total < 40:
        problems.append(f"only {total} changes were seen")
    for point in np.unique(np.linspace(1, total, points).round().astype(int)).tolist():
        folder = base / f"at-{point}"
        shutil.copytree(start, folder)
        killed += in_child(job, folder, point)
        if what := check(folder):
            problems.append(f"killed at {point} of {total}: {what}")
        if everything(folder) != expected:
            in_child(job, folder)
        found = everything(folder)
        differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        if differing:
            problems.append(f"killed at {point} of {total} and run again: {differing}")
        shutil.rmtree(folder)
    if killed < points - 2:
        problems.append(f"only {killed} of {points} were killed")
    return problems


def old_or_new(*sizes: int) -> Callable[[Path], str | None]:
    """Whole at every moment, with as many images as before or after; or, of a build, not there."""

    def check(folder: Path) -> str | None:
        if not sizes and not (folder / "manifest.json").exists():
            return None
        with Index.open(folder) as index:
            if sizes and len(index) not in sizes:
                return f"{len(index)} images"
        return "; ".join(verify(folder).problems) or None

    return check


QUIET = {"batch_size": 4, "workers": 0, "progress": False}


def build(it: Toy, source: ImageSource, recipe: Recipe = DENSE, **options) -> Job:
    return lambda folder: build_index(source, it.network, folder, recipe, **QUIET, **options)


def add(it: Toy, source: ImageSource, **options) -> Job:
    return lambda folder: add_images(source, it.network, folder, **QUIET, **options)


def scenario_pooled(base: Path) -> list[str]:
    job = build(toy(), pictures(base / "p"), Recipe(triplets=4))
    return killed_everywhere(base, None, job, 16, old_or_new())


def scenario_other(base: Path) -> list[str]:
    recipe = Recipe(triplets=4, method="gradcam++", rank=3)
    job = build(toy("other"), pictures(base / "p"), recipe, scratch_gb=0)
    return killed_everywhere(base, None, job, 16, old_or_new())


def scenario_add(base: Path) -> list[str]:
    it, first = toy(), pictures(base / "p")
    paint(base / "q", range(20, 27))
    job = add(it, find_images(base / "q"))
    return killed_everywhere(base, build(it, first), job, 16, old_or_new(12, 19))


def scenario_update(base: Path) -> list[str]:
    """Two pictures new, two replaced and one gone: one commit, so twelve images or thirteen."""
    it, photos = toy(), base / "p"
    build(it, pictures(photos))(base / "known")  # marked as the pictures were
    paint(photos, (20, 21))
    paint(photos, (3, 4), seed=6)
    (photos / "c2/005.png").unlink()
    job = add(it, find_images(photos), update=True)

    def known(folder: Path) -> None:
        shutil.copytree(base / "known", folder, dirs_exist_ok=True)

    return killed_everywhere(base, known, job, 16, old_or_new(12, 13))


def scenario_refit(base: Path) -> list[str]:
    it, source = toy("other"), pictures(base / "p")
    job = build(it, source, dense(norm="around"), replace=True)
    return killed_everywhere(base, build(it, source), job, 16, old_or_new(12))


def scenario_another_recipe(base: Path) -> list[str]:
    """Killed, and then asked for something else: nothing of the first remains."""
    it, source = toy(), pictures(base / "p")
    first, second = build(it, source), build(it, source, dense(seed=5))
    second(base / "fresh")
    problems = []
    for point in (5, 20, 30, 16, 60):
        folder = base / f"at-{point}"
        if not in_child(first, folder, point):
            problems.append(f"not killed at {point}")
        in_child(second, folder)
        if everything(folder) != everything(base / "fresh"):
            problems.append(f"killed at {point}: another index")
    return problems


def scenario_outside(base: Path) -> list[str]:
    """Killed from outside at random moments, again and again, until one run is let finish."""
    source = pictures(base / "p", 24)

    def slow(image):
        time.sleep(0.01)
        return np.asarray(image.resize((16, 16)), np.float32).transpose(2, 0, 1) / 255

    it = toy("other", preprocess=custom(slow, name="slow"))
    job = build(it, source)
    job(base / "first")  # what is imported once should not count
    start = time.monotonic()
    job(base / "whole")
    seconds = time.monotonic() - start
    chance, killed = random.Random(0), 0
    for _ in range(8):
        pid = begin(job, base / "i")
        time.sleep(seconds * chance.uniform(0.05, 0.3))
        os.kill(pid, signal.SIGKILL)
        killed += was_killed(pid)
    in_child(job, base / "i")
    same = everything(base / "i") == everything(base / "whole")
    return [] if same and killed > 2 else [f"same: {same}, killed {killed} times"]


def planned(base: Path, kind: str) -> tuple[Path, Job, Job, dict[str, str]]:
    """A job in two pieces; what does them, what merges them, and the bytes of one process."""
    it, source, recipe = toy(kind), pictures(base / "p", 14), Recipe(triplets=4, rank=3)
    options = {"batch_size": 4, "pieces": 2, "scratch_gb": 0}
    plan_job(source, it.network, base / "start" / "job", recipe, **options)
    build_index(source, it.network, base / "one", recipe, **QUIET, scratch_gb=0)
    alone = {"network": it.network, "workers": 0, "progress": False}

    def shards(folder: Path, order: Sequence[int] = (1, 0)) -> None:
        for piece in [*order] * 3:
            run_shard(folder / "job", piece, **alone)

    def merged(folder: Path) -> None:
        merge_job(folder / "job", folder / "index", **alone)

    return base / "start", shards, merged, everything(base / "one")


def chunks_in(folder: Path) -> dict[str, int]:
    """The whole chunks of a job, by name, and which folders they are."""
    return {file.parent.name: file.parent.stat().st_ino for file in folder.glob("*-0*/arrays.json")}


def scenario_shards(base: Path) -> list[str]:
    """Shards and the merge killed: what was whole stays, and the bytes are one process's."""
    start, shards, merged, expected = planned(base, "other")

    def job(folder: Path) -> None:
        shards(folder)
        merged(folder)

    shutil.copytree(start, base / "reference")
    KILLER.watch(base / "reference")
    job(base / "reference")
    KILLER.folder, total = "", KILLER.seen
    problems, killed = list[str](), 0
    for point in np.unique(np.linspace(1, total, 8).round().astype(int)).tolist():
        folder = base / f"at-{point}"
        shutil.copytree(start, folder)
        killed += in_child(job, folder, point)
        whole = chunks_in(folder / "job")
        in_child(job, folder)
        again = [name for name, at in whole.items() if chunks_in(folder / "job").get(name) != at]
        if again:
            problems.append(f"killed at {point} of {total}: {again} were done again")
        if everything(folder / "index") != expected:
            problems.append(f"killed at {point} of {total}: other bytes")
    return problems if killed > 6 and total > 40 else [f"killed {killed} times of {total}"]


def scenario_at_once(base: Path) -> list[str]:
    """Two processes on the same pieces at once, of which one is killed now and then."""
    start, shards, merged, expected = planned(base, "other")
    chance, problems = random.Random(0), list[str]()
    for turn in range(2):
        folder = base / f"turn-{turn}"
        shutil.copytree(start, folder)
        orders = (0, 1), (turn, 1 - turn)
        pids = [begin(partial(shards, order=order), folder) for order in orders]
        if turn:
            time.sleep(chance.uniform(0.02, 0.3))
            os.kill(pids[0], signal.SIGKILL)
        for pid in pids:
            was_killed(pid)
        in_child(merged, folder)
        if everything(folder / "index") != expected:
            problems.append(f"turn {turn}: other bytes")
    return problems


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks, from Python 3.12 on
    plan.CHUNK = 4
    os.fsync = lambda descriptor: None  # nothing here needs to survive a power failure
    for line in sys.stdin:
        name, folder = line.split(maxsplit=1)
        try:
            answer = globals()[f"scenario_{name}"](Path(folder.strip()))
        except Exception as error:
            answer = [f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
