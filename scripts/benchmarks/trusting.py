"""What trust costs: a query that says how far it can be believed, and a build that calibrates."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from embedcam import EmbeddingNetwork, Explainer, Index, Recipe, build_index, find_images
from embedcam.images import ImageSource

from .cases import SIZE, fresh, linear_network, query_input, write_pictures
from .timing import Case, alternate, milliseconds, ratio, section

NEIGHBORS = 5
PLAIN, TRUST = "without trust", "with trust"


def report(name: str, images: int, rounds: int, folder: Path) -> str:
    """What trust adds to a query, and to a build."""
    source = find_images(write_pictures(folder / f"trusted-{images}", images))
    network = linear_network(name, folder)
    path = folder / f"trusted-{name}.index"
    build_index(source, network, path, Recipe(), progress=False)
    queries, channels = queries_of(path, network, 20 * rounds)
    builds, stage = builds_of(source, network, rounds, folder)
    return section(
        f"Trust, {name}",
        "Linear head of 128 numbers. `explain_features` of one query at "
        f"{SIZE} x {SIZE}, {NEIGHBORS} neighbours of {images}, search included, {20 * rounds} "
        f"rounds; the same index with and without its calibration, {channels} channels. *Added*: "
        f"median over rounds. Builds of {images} pictures of 320 x 240, {rounds} rounds; the stage "
        f"`trust` of the last ones takes {stage:.2f} s (median).",
        ["case", "ms", "ratio", "added, ms"],
        [*rows("query", queries), *rows("build", builds)],
    )


def queries_of(
    path: Path, network: EmbeddingNetwork, rounds: int
) -> tuple[dict[str, np.ndarray], int]:
    """Seconds of a query by an index without and with calibration, and its layer's channels."""
    features = network.forward(query_input()[None])
    given = features.embedding.numpy()[0], features.activations.numpy()[0]
    with Index.open(path) as calibrated, Index.open(path) as plain:
        plain.manifest = replace(plain.manifest, trust_calibration=None)
        explainers = {
            name: Explainer(index, n_neighbors=NEIGHBORS)
            for name, index in ((PLAIN, plain), (TRUST, calibrated))
        }
        told = [one.explain_features(*given).trust is not None for one in explainers.values()]
        assert told == [False, True], "too few pictures to calibrate with"
        cases = {
            name: partial(explainer.explain_features, *given, size=(SIZE, SIZE))
            for name, explainer in explainers.items()
        }
        return alternate(cases, rounds, warmup=5, control=True), len(given[1])


def builds_of(
    source: ImageSource, network: EmbeddingNetwork, rounds: int, folder: Path
) -> tuple[dict[str, np.ndarray], float]:
    """Seconds of a build without and with calibration, and of its stage."""
    out, stages = folder / "trusting", []

    def build(trust: bool) -> None:
        made = build_index(
            source, fresh(network), out, Recipe(faiss="none"), trust=trust, progress=False
        )
        if trust:
            stages.append(made.seconds["trust"])

    cases = {
        name: Case(partial(build, name == TRUST), after=partial(shutil.rmtree, out))
        for name in (PLAIN, TRUST)
    }
    took = alternate(cases, rounds, control=True)
    return took, float(np.median(stages[-rounds:]))


def rows(what: str, took: dict[str, np.ndarray]) -> list[list[object]]:
    """Each case beside the first, and what it adds to it."""
    return [
        [
            f"{what} {name}",
            milliseconds(seconds),
            ratio(seconds, took[PLAIN]),
            f"{1e3 * np.median(seconds - took[PLAIN]):.2f}",
        ]
        for name, seconds in took.items()
    ]
