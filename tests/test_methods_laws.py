"""Every method of the zoo against its oracle, and the laws that all of them keep."""

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
import zoo_attention
import zoo_cases
import zoo_clustering
import zoo_gradients
import zoo_learned
import zoo_perturbation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo_cases import SIZE, WIDTH, distance, parts, run, run_on

from embedcam import METHODS, Coordinate, EmbeddingNetwork, Similarity
from embedcam.errors import NetworkError
from embedcam.targets import Direction

ORACLES = {
    **zoo_gradients.ORACLES, **zoo_clustering.ORACLES, **zoo_perturbation.ORACLES,
    **zoo_learned.ORACLES, **zoo_attention.ORACLES,
}  # fmt: skip
OWN_CASES = {**zoo_learned.CASES, **zoo_attention.CASES}
POOLED = ["cam", *zoo_learned.ORACLES]  # no other head than a pooled one
MASKING = ["scorecam", "groupcam", "clustercam", "cosinecam", "polycam", "rise", "lime", "sbsm"]
LAYERS = ["features.1", "features.2", "features"]
CASES: list[dict[str, Any]] = [
    {"target": "similarity", "seed": 1},
    {"target": "dot", "signed": True, "normalize": False, "seed": 1},
    {"target": "triplets", "seed": 2},
    {"target": "triplets", "signed": True, "normalize": False},
    {"head": "curved", "target": "similarity", "signed": True},
    {"head": "curved", "target": "dot", "normalize": False},
    {"head": "curved", "target": "triplets"},
    {"head": "curved", "target": "triplets", "signed": True, "normalize": False, "seed": 1},
]
# Fewer passes than by default.
FEW: dict[str, Any] = {"rise": {"masks": 60, "cells": 3}, "lime": {"samples": 60, "segments": 9}}


def rich(name: str) -> zoo_cases.Case:
    return case_of(name, target="triplets", seed=3, **({} if name in POOLED else CURVED))


def case_of(name: str, **kind: Any) -> zoo_cases.Case:
    return OWN_CASES.get(name, zoo_cases.make)(**kind)


def kinds_of(name: str) -> list[dict[str, Any]]:
    return [kind for kind in CASES if name not in POOLED or "head" not in kind]


@pytest.mark.parametrize("name", ORACLES)
def test_each_method_is_its_formula(name: str) -> None:
    options, speaking, kinds = FEW.get(name, {}), 0, kinds_of(name)
    for kind in kinds:
        case = case_of(name, **kind)
        expected = ORACLES[name](case, **options)
        assert distance(expected, run(case, name, **options)[0]) < 1e-9, kind
        speaking += all(np.abs(part).max() > 0 for part in expected.parts)
    assert speaking >= len(kinds) - 3


@pytest.mark.parametrize("name", ORACLES)
def test_each_oracle_can_fail(name: str) -> None:
    options, case = FEW.get(name, {}), rich(name)
    expected = ORACLES[name](case, **options)
    assert distance(expected, run(case, name, case.image[None].flip(-1), **options)[0]) > 1e-3
    with torch.no_grad():
        next(case.module.parameters())[:, 0] *= 1.5
    assert distance(expected, run(case, name, **options)[0]) > 1e-3


CURVED = {"head": "curved"}
VIEWS = ("base", "scissors", "difference")
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("rise", {}),
    ("lime", {}),
    *(("layercam", {"layers": LAYERS, "shallow": some}) for some in ([], LAYERS[:2])),
    *(("zoomcam", {"layers": some}) for some in (LAYERS, LAYERS[:2])),
    ("smoothgradcam++", {"samples": 3, "sigma": 0.4}),
    ("smoothgradcam++", {"samples": 2, "sigma": 0.0}),
    ("smoothgradcam++", {"seed": 5}),
    ("integratedgradcam", {"steps": 7}),
    ("scorecam", {"weights": "softmax"}),
    ("scorecam", {"weights": "softmax", "temperature": 0.05}),
    ("scorecam", {"fill": 0.7}),
    ("rise", {"masks": 30, "cells": 2, "probability": 0.2, "fill": -1.5}),
    ("rise", {"masks": 20, "cells": 15}),
    ("lime", {"samples": 50, "superpixels": "grid", "segments": 6, "fill": 2.0}),
    ("lime", {"samples": 50, "superpixels": "grid", "kernel": 3.0, "ridge": 0.1}),
    ("sbsm", {"window": (5, 4), "stride": (3, 5), "fill": 0.4}),
    ("sbsm", {"window": SIZE, "stride": (1, 1)}),
    *(
        ("groupcam", {"groups": groups, "clustering": clustering})
        for groups in (1, 4)
        for clustering in ("contiguous", "kmeans", "agglomerative")
    ),
    *(("groupcam", {"groups": n, "percentile": cut}) for n, cut in ((4, None), (2, 0), (3, 33.3))),
    *(
        ("clustercam", {"n_clusters": n, "clustering": clustering, "view": view})
        for n in (2, 5)
        for clustering in ("kmeans", "spectral")
        for view in VIEWS
    ),
    *(("clustercam", {"n_clusters": 3, "weighing": "scored", "view": view}) for view in VIEWS),
    ("clustercam", {"fill": 0.7}),
    *(("cosinecam", {"n_clusters": n}) for n in (1, 2, 3, 5)),
    *(("polycam", {"variant": variant}) for variant in ("plus", "minus", "both")),
    ("polycam", {"layers": ("features.1", "features.2", "features")}),
    ("polycam", {"layers": ("features",)}),
    ("polycam", {"baseline": False}),
    ("polycam", {"fill": 0.7}),
]


def test_every_option_of_every_method_is_tried() -> None:
    for name, method in METHODS.items():
        tried = {"subject", *FEW.get(name, {})}.union(*(some for of, some in OPTIONS if of == name))
        assert signature(method.load()).parameters.keys() <= tried, name


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_option_is_the_formulas(name: str, options: dict[str, Any]) -> None:
    speaking = False
    for kind in (CASES[6], CASES[1]) if options else (CASES[6],):
        case = zoo_cases.make(**kind)
        expected = ORACLES[name](case, **options)
        assert distance(expected, run(case, name, **options)[0]) < 1e-9, kind
        speaking |= all(np.abs(part).max() > 0 for part in expected.parts)
    assert speaking


@pytest.mark.parametrize("name", ORACLES)
def test_a_batch_is_one_at_a_time_and_its_size_changes_nothing(name: str) -> None:
    case, options = rich(name), FEW.get(name, {})
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *SIZE, generator=generator, dtype=torch.float64)
    references = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    if name in zoo_clustering.ORACLES and name != "polycam":
        options = {"groups": 3, "clustering": "kmeans"} if name == "groupcam" else {"n_clusters": 3}
    alone = [
        run_on(case.network, images[i : i + 1], Similarity(references[i]), name, **options)[0]
        for i in range(3)
    ]
    target = Similarity(references)
    for size in (1, 7, 100):
        together, _ = run_on(case.network, images, target, name, batch_size=size, **options)
        for row in range(3):
            for a, b in zip(parts(together, row), parts(alone[row]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())
    # Two at a time from the public door: the last piece is smaller.
    pieces = zoo_cases.made(name, case.network, images, target, batch_size=2, **options)
    last = zoo_cases.made(name, case.network, images[2], target.at(2), **options).cam
    np.testing.assert_allclose(pieces.cam[2], last, atol=1e-6 * np.abs(last).max() + 1e-12)


@pytest.mark.parametrize("name", ["rise", "lime", "smoothgradcam++"])
def test_the_seed_decides_and_nothing_global(name: str) -> None:
    case, state = rich(name), torch.random.get_rng_state()
    first, again, other = (
        parts(run(case, name, seed=seed, **FEW.get(name, {}))[0])[0] for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-3)


HOMOGENEOUS = ["gradcam", "xgradcam", "integratedgradcam", "hirescam", "layercam", "eigengradcam"]


@pytest.mark.parametrize("name", [*HOMOGENEOUS, "scorecam", "ablationcam", "rise", "lime", "sbsm"])
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_scaling_the_target_scales_what_it_draws(name: str, seed: int, scale: float) -> None:
    case = zoo_cases.make("curved", "dot", seed=seed)
    few = {"lime": {"samples": 20}, "rise": {"masks": 20, "cells": 3}}
    options = {**few, "integratedgradcam": {"steps": 4}}.get(name, {})
    larger = Direction(scale * case.target.directions)
    one = parts(run(case, name, **options)[0])
    more = parts(run_on(case.network, case.image[None], larger, name, **options)[0])
    for a, b in zip(one, more, strict=True):
        np.testing.assert_allclose(scale * a, b, rtol=1e-7, atol=1e-9 * scale * np.abs(a).max())


@pytest.mark.parametrize("name", [name for name in ORACLES if METHODS[name].targeted])
def test_a_target_that_says_nothing_gives_zeros(name: str) -> None:
    case = case_of(name)
    for options in ({}, {"layers": LAYERS}) if METHODS[name].several else (FEW.get(name, {}),):
        output, _ = run_on(case.network, case.image[None], Direction(np.zeros(3)), name, **options)
        assert not any(part.any() for part in parts(output))


@pytest.mark.parametrize("name", ORACLES)
def test_a_picture_of_one_color_gives_numbers(name: str) -> None:
    for kind in kinds_of(name)[: 2 if name in zoo_learned.ORACLES else None]:
        case = case_of(name, **kind)
        for color in (0.0, 0.4, 2.0):
            image = torch.full_like(case.image, color)[None]
            output, _ = run(case, name, image, **FEW.get(name, {}))
            assert all(np.isfinite(part).all() for part in parts(output))


@pytest.mark.parametrize("name", [*zoo_perturbation.ORACLES, "groupcam", "clustercam", "cosinecam"])
def test_nothing_to_see_is_zero(name: str) -> None:
    case = zoo_cases.make()
    case.module.features.append(nn.Threshold(1e9, 0.0))
    assert not any(part.any() for part in parts(run(case, name, **FEW.get(name, {}))[0]))


@pytest.mark.parametrize("name", ORACLES)
def test_other_precisions_give_nearly_the_same(name: str) -> None:
    options = FEW.get(name, {})
    exact = parts(run(rich(name), name, **options)[0])
    for dtype in (torch.float32, torch.bfloat16):
        case = rich(name)
        network = EmbeddingNetwork(case.module.to(dtype), case.network.layer)
        rough, _ = run_on(network, case.image[None].to(dtype), case.target, name, **options)
        for a, b in zip(parts(rough), exact, strict=True):
            assert np.isfinite(a).all()
            # Of differences of scores little is left in half precision.
            if dtype == torch.float32:
                assert np.abs(a - b).max() < 1e-2 * np.abs(b).max()


@pytest.mark.parametrize("name", MASKING)
def test_positions_have_no_regions_to_mask(name: str) -> None:
    network = EmbeddingNetwork(nn.Sequential(nn.Conv1d(2, 5, 3)).eval(), "0", layout="bkl")
    message = f"{METHODS[name].title} masks regions of a picture .* use 'ablationcam'"
    with pytest.raises(NetworkError, match=message):
        run_on(network, torch.randn(1, 2, 9), Coordinate(0), name)
