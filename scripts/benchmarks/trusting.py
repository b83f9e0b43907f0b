"""What trust costs: a query that says how far it can be believed, and a build that calibrates."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from embedcam import EmbeddingNetwork, Explainer, Index, Recipe, build_index, find_images
from embedcam.images import ImageSource

from .cases import SIZE, fresh, linear_network, query_input, write_pictures
from .timing import Case, alternate, milliseconds, ratio, table

NEIGHBORS = 5
PLAIN, CONTROL, TRUST = "without trust", "without trust again (A/A)", "with trust"


def report(name: str, images: int, rounds: int, folder: Path) -> str:
    """What trust adds to a query, and to a build."""
    source = find_images(write_pictures(folder / f"trusted-{images}", images))
    network = linear_network(name, folder)
    path = folder / f"trusted-{name}.index"
    build_index(source, network, path, Recipe(), progress=False)
    queries, channels = queries_of(path, network, 20 * rounds)
    builds, stage = builds_of(source, network, rounds, folder)
    return (
        f"\n## Trust, {name}\n\nLinear head of 128 numbers. `explain_features` of one query at "
        f"{SIZE} x {SIZE}, {NEIGHBORS} neighbours of {images}, search included, {20 * rounds} "
        f"rounds; the same index with and without its calibration, {channels} channels. "
        "*Added*: median over rounds.\n\n"
        + table(["query", "ms", "ratio", "added, ms"], queries)
        + f"\nBuilds of {images} pictures of 320 x 240, {rounds} rounds; the stage `trust` of the "
        f"last ones takes {stage:.2f} s (median).\n\n"
        + table(["build", "ms", "ratio", "added, ms"], builds)
    )


def queries_of(path: Path, network: EmbeddingNetwork, rounds: int) -> tuple[list[list], int]:
    """Rows of a query by an index with and without calibration, and the channels of its layer."""
    features = network.forward(query_input()[None])
    given = features.embedding.numpy()[0], features.activations.numpy()[0]
    with Index.open(path) as calibrated, Index.open(path) as plain:
        plain.manifest = replace(plain.manifest, trust_calibration=None)
        explainers = {
            PLAIN: Explainer(plain, n_neighbors=NEIGHBORS),
            TRUST: Explainer(calibrated, n_neighbors=NEIGHBORS),
        }
        told = [one.explain_features(*given).trust is not None for one in explainers.values()]
        assert told == [False, True], "too few pictures to calibrate with"
        cases = {
            name: Case(partial(explainer.explain_features, *given, size=(SIZE, SIZE)))
            for name, explainer in explainers.items()
        }
        took = alternate({PLAIN: cases[PLAIN], CONTROL: cases[PLAIN], TRUST: cases[TRUST]}, rounds,
                         warmup=5)  # fmt: skip
    return rows(took), len(given[1])


def builds_of(
    source: ImageSource, network: EmbeddingNetwork, rounds: int, folder: Path
) -> tuple[list[list], float]:
    """Rows of a build with and without calibration, and the seconds of its stage."""
    out, stages = folder / "trusting", []

    def build(trust: bool, _: None) -> None:
        made = build_index(
            source, fresh(network), out, Recipe(faiss="none"), trust=trust, progress=False
        )
        if trust:
            stages.append(made.seconds["trust"])

    def nothing() -> None:
        """Nothing is made ready."""

    without, calibrating = (
        Case(partial(build, trust), nothing, lambda _: shutil.rmtree(out))
        for trust in (False, True)
    )
    took = alternate({PLAIN: without, CONTROL: without, TRUST: calibrating}, rounds)
    return rows(took), float(np.median(stages[-rounds:]))


def rows(took: dict[str, np.ndarray]) -> list[list]:
    """Each case beside the first, and what it adds to it."""
    return [
        [
            name,
            milliseconds(seconds),
            ratio(seconds, took[PLAIN]),
            f"{1e3 * np.median(seconds - took[PLAIN]):.2f}",
        ]
        for name, seconds in took.items()
    ]
