"""scripts/paper_tables.py on a tiny made data set and network, beside literal computations."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paper_samples import CLASSES, made_data, tiny_network
from torch import nn

from embedcam import EmbeddingNetwork, Recipe
from embedcam.errors import InputError
from embedcam.methods import DirectWeights
from embedcam.offline.cotangents import Cotangents
from embedcam.offline.triplets import NearestOthers, TripletSampler
from embedcam.ops import resize

SCRIPTS = Path(__file__).parents[1] / "scripts"
PARTS = ("cache", "bench", "weights", "transfers", "report", "sections")
PAIRS = 5


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The modules, a tiny network in place of the real one, and a bench of a tiny data set."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    with pytest.MonkeyPatch.context() as patch:
        try:
            loaded: dict[str, Any] = {
                name: importlib.import_module(f"paper.{name}") for name in PARTS
            }
            loaded["script"] = importlib.import_module("paper_tables")
            loaded["match"] = importlib.import_module("match")
            loaded["photographs"] = importlib.import_module("photographs")
            patch.setattr(loaded["photographs"], "N_SCENES", PAIRS)
            patch.setattr(loaded["bench"], "load_network", lambda *_, **__: tiny_network())
            folder = made_data(tmp_path_factory.mktemp("data") / "tiny")
            kept = tmp_path_factory.mktemp("cache")
            bench = loaded["bench"].read_bench(folder, "none", kept)
            yield SimpleNamespace(tiny=bench, folder=folder, kept=kept, **loaded)
        finally:
            sys.path.remove(str(SCRIPTS))
            for name in set(sys.modules) - before:
                where = getattr(sys.modules[name], "__file__", None) or ""
                if where.startswith(str(SCRIPTS)):
                    del sys.modules[name]


def literal_weights(
    tiny: Any, activations: np.ndarray, score: Any, norm: str = "through"
) -> np.ndarray:
    """(1/Z) sum_ij dy/dA_ij of y = score(f), by automatic differentiation in float64."""
    A = torch.tensor(activations.astype(np.float64), requires_grad=True)
    z = torch.from_numpy(tiny.head.matrix.astype(np.float64)) @ A.mean((1, 2))
    if norm == "through":
        score(z / z.norm()).backward()
    else:
        f = (z / z.norm()).detach().requires_grad_()
        z.backward(torch.autograd.grad(score(f), f)[0])
    assert A.grad is not None
    return A.grad.mean((1, 2)).numpy()


def literal_energy(weights: np.ndarray, activations: np.ndarray, region: np.ndarray) -> float:
    """Share of the up-sampled map inside a region, pixel by pixel; chance where it is empty."""
    grid = np.maximum(np.tensordot(weights, activations.astype(np.float64), 1), 0)
    full = resize(grid, region.shape)
    return float((full * region).sum() / full.sum()) if full.any() else float(region.mean())


def literal_auc(values: np.ndarray, inside: np.ndarray) -> float:
    """How often a value inside is larger than one outside, pair by pair; ties count half."""
    apart = values[inside][:, None] - values[~inside]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


def literal_single(weights: np.ndarray, activations: np.ndarray, region: np.ndarray) -> float:
    """AUC of every fourth pixel of the signed map, up-sampled, inside a region against outside."""
    grid = np.tensordot(weights, activations.astype(np.float64), 1)
    return literal_auc(resize(grid, region.shape)[::4, ::4], region[::4, ::4] >= 0.5)


def squared(a: torch.Tensor, b: np.ndarray) -> torch.Tensor:
    return ((a - torch.from_numpy(b.astype(np.float64))) ** 2).sum()


def regions(paper: SimpleNamespace) -> np.ndarray:
    """Of the unseen classes, at full size."""
    read = paper.photographs.read_pictures(paper.folder)
    seen = sorted(set(read.labels))[: CLASSES // 2]
    return read.regions[~np.isin(read.labels, seen)].astype(np.float64)


def test_the_gain_of_averaging_is_the_literal_one(
    paper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, inside = paper.tiny, regions(paper)
    monkeypatch.setattr(paper.weights, "COUNTS", (1, 5))
    rows = {row.cells: row for row in paper.weights.averaging(tiny)}
    literal = {}
    for count in (1, 5):
        sampler = TripletSampler(
            tiny.embeddings, tiny.codes, NearestOthers(tiny.embeddings), n_triplets=count
        )
        drawn = sampler.draw(np.arange(len(tiny.codes)))
        energies, areas = [], []
        for i, A in enumerate(tiny.gallery.activations):
            each = [
                literal_weights(
                    tiny,
                    A,
                    lambda f, p=p, n=n: (
                        squared(f, tiny.embeddings[n]) - squared(f, tiny.embeddings[p])
                    ),
                )
                for p, n in zip(drawn.positives[i], drawn.negatives[i], strict=True)
            ]
            energies.append(literal_energy(np.mean(each, 0), A, inside[i]))
            areas.append(literal_single(np.mean(each, 0), A, inside[i]))
        literal[count] = np.array(areas)
        found = rows["dense", str(count)]
        np.testing.assert_allclose(found.energy, energies, atol=2e-3)
        np.testing.assert_allclose(found.single, areas, atol=3e-3)
    row = rows["dense", "5"]
    gained = paper.report.gain(row, "single")
    assert gained.mean == pytest.approx((literal[5] - literal[1]).mean(), abs=2e-3)
    assert gained.win_rate == pytest.approx((literal[5] > literal[1]).mean(), abs=0.05)
    assert f"{gained.mean:+.3f} [" in paper.report.difference(row, "single")
    mean = rows.pop(("mean activation", ""))
    ones = np.ones(len(tiny.gallery.activations[0]))
    areas = [
        literal_single(ones, *one) for one in zip(tiny.gallery.activations, inside, strict=True)
    ]
    np.testing.assert_allclose(mean.single, areas, atol=1e-6)
    # Each encoding is compared with one triplet of its own.
    for (name, count), one in rows.items():
        assert one.against is (None if count == "1" else rows[name, "1"])


@pytest.mark.parametrize("norm", ["through", "around"])
def test_distances_alone_are_what_autograd_says(paper: SimpleNamespace, norm: str) -> None:
    tiny, f = paper.tiny, paper.tiny.embeddings
    positives, negatives = paper.weights.pair_means(f, tiny.codes)
    recipe = replace(paper.weights.ALL, norm=norm, dtype="float32")
    ones = np.ones(len(f), np.int64)
    found = {}
    for sign, cotangent in (
        (1, paper.weights.positive_cotangent(f, positives)),
        (-1, paper.weights.negative_cotangent(f, negatives)),
    ):
        found[sign], _ = tiny.weights(recipe, Cotangents(cotangent, None, ones))
        for i, A in enumerate(tiny.gallery.activations[:6]):
            same = tiny.codes == tiny.codes[i]
            chosen = same & (np.arange(len(f)) != i) if sign == 1 else ~same

            def score(own: torch.Tensor, chosen: Any = chosen, sign: int = sign) -> Any:
                return -sign * sum(squared(own, one) for one in f[chosen]) / chosen.sum()

            expected = literal_weights(tiny, A, score, norm)
            np.testing.assert_allclose(found[sign][i], expected, rtol=2e-3, atol=1e-5)
    margin, _ = tiny.weights(recipe)
    np.testing.assert_allclose(found[1] + found[-1], margin, rtol=1e-3, atol=1e-5)


def test_what_a_transfer_keeps_is_the_literal_ratio(paper: SimpleNamespace) -> None:
    tiny, inside, f = paper.tiny, regions(paper), paper.tiny.embeddings.astype(np.float64)
    count = len(tiny.codes)
    kept, direct, areas, alike = np.zeros((4, count))
    right = np.zeros(count, bool)
    order = np.random.default_rng(0).permutation(count)
    W = tiny.head.matrix.astype(np.float64)

    def weights(i: int, index: list[int]) -> np.ndarray:
        positives = [f[j] for j in index if j != i and tiny.codes[j] == tiny.codes[i]]
        negatives = [f[j] for j in index if tiny.codes[j] != tiny.codes[i]]
        c = 2 * (np.mean(positives, 0) - np.mean(negatives, 0))
        return W.T @ ((c - f[i] * (f[i] @ c)) / tiny.lengths[i]) / 49

    for queries in np.array_split(order, 5):
        index = [i for i in range(count) if i not in queries]
        stored = {i: weights(i, index) for i in index}
        for q in queries:
            near = sorted(index, key=lambda j: ((f[q] - f[j]) ** 2).sum())[:5]
            carried = np.mean([stored[j] / np.linalg.norm(stored[j]) for j in near], 0)
            A = tiny.gallery.activations[q]
            kept[q] = literal_energy(carried, A, inside[q])
            direct[q] = literal_energy(weights(q, index), A, inside[q])
            areas[q] = literal_single(carried, A, inside[q])
            maps = (np.tensordot(w, A.astype(np.float64), 1) for w in (carried, weights(q, index)))
            alike[q] = np.corrcoef(*(one.ravel() for one in maps))[0, 1]
            right[q] = tiny.codes[near[0]] == tiny.codes[q]
    rows = {(r.recipe, r.source): r for r in paper.transfers.pictures(tiny)}
    found = rows["all triplets, through", "5 nearest, mean"]
    np.testing.assert_allclose(found.direct, direct, atol=3e-3)
    np.testing.assert_allclose(found.kept, kept, atol=3e-3)
    np.testing.assert_allclose(found.auc, areas, atol=3e-3)
    np.testing.assert_allclose(found.alike, alike, atol=5e-3)
    assert 0 < right.sum() < count
    every = rows["all triplets, through", "1 nearest"]
    for whose, chosen in (("its", right), ("another", ~right)):
        part = rows["all triplets, through", f"1 nearest, of {whose} label"]
        np.testing.assert_array_equal(part.alike, every.alike[chosen])
    ratio = paper.report.ratio(found.kept, found.direct)
    assert ratio.mean == pytest.approx(kept.mean() / direct.mean(), abs=5e-3)
    assert ratio.low < ratio.mean < ratio.high


def test_the_defaults_direct_map_is_the_one_that_is_computed_on_a_query(
    paper: SimpleNamespace,
) -> None:
    tiny = paper.tiny
    head = nn.Linear(*tiny.head.matrix.shape[::-1], bias=False)
    head.weight.data = torch.from_numpy(tiny.head.matrix)
    module = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    direct = DirectWeights(EmbeddingNetwork(module, "0"), Recipe())
    found = paper.transfers.carried_weights(tiny, Recipe(encoding="dense", dtype="float32"))
    index, queries = next(paper.transfers.folds(len(tiny.codes)))
    for place in queries[:3]:
        same = tiny.codes[index] == tiny.codes[place]
        sides = (tiny.embeddings[index[chosen]] for chosen in (same, ~same))
        expected = direct.weights(tiny.gallery.activations[place], *sides)[0]
        unit = (one / np.linalg.norm(one) for one in (found["direct"][place], expected))
        np.testing.assert_allclose(*unit, atol=1e-4)


def test_in_scenes_the_target_is_differentiated_in_the_scene(paper: SimpleNamespace) -> None:
    tiny = paper.tiny
    rows = {(r.recipe, r.source): r for r in paper.transfers.scenes(tiny)}
    # Around the norm a target's weights are the same wherever they are differentiated.
    assert {name for name, _ in rows} == {"all triplets, through", "50 triplets, top 50, through"}
    f, given = tiny.embeddings, tiny.given
    shares, areas = np.zeros(2 * PAIRS), np.zeros(2 * PAIRS)
    for number, A in enumerate(tiny.scenes.activations):
        same = tiny.codes == tiny.codes[given[number]]
        positives = f[same & (np.arange(len(f)) != given[number])].astype(np.float64).mean(0)
        c = torch.from_numpy(2 * (positives - f[~same].astype(np.float64).mean(0)))
        half = np.zeros((224, 448))
        half[:, slice(0, 224) if tiny.scenes.left[number] else slice(224, None)] = 1
        weights = literal_weights(tiny, A, lambda own, c=c: own @ c)
        shares[number] = literal_energy(weights, A, half)
        grid = np.tensordot(weights, A.astype(np.float64), 1)
        areas[number] = literal_auc(grid, half[16::32, 16::32] > 0)
    found = rows["all triplets, through", "1 given"]
    np.testing.assert_allclose(found.direct, shares.reshape(2, -1).mean(0), atol=3e-3)
    np.testing.assert_allclose(found.direct_auc, areas.reshape(2, -1).mean(0), atol=5e-3)


def test_features_are_kept_and_a_cut_file_is_made_again(
    paper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(paper.kept.iterdir())
    assert all(file.suffix == ".npy" for file in files)
    forwarded: list[str] = []
    usual = paper.cache.forward

    def watched(*given: Any) -> Any:
        forwarded.append(given[-1])
        return usual(*given)

    monkeypatch.setattr(paper.cache, "forward", watched)
    again = paper.bench.read_bench(paper.folder, "none", paper.kept)
    assert forwarded == []
    np.testing.assert_array_equal(again.scenes.activations, paper.tiny.scenes.activations)
    scenes = next(file for file in files if "scenes" in file.name and "activations" in file.name)
    scenes.write_bytes(scenes.read_bytes()[:-100])
    again = paper.bench.read_bench(paper.folder, "none", paper.kept)
    assert len(forwarded) == 1
    np.testing.assert_array_equal(again.scenes.activations, paper.tiny.scenes.activations)
    assert sorted(paper.kept.iterdir()) == files


def test_the_report_has_every_section_and_figure(paper: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "results" / "paper.md"
    names = list(paper.sections.SECTIONS)
    text = paper.script.report([paper.tiny], names, output)
    assert output.read_text() == text
    for name in names:
        assert f"## {paper.sections.SECTIONS[name].title}" in text
        picture = output.parent / "figures" / f"paper-{name}.png"
        assert f"(figures/{picture.name})" in text
        assert picture.stat().st_size < 60_000
    assert not re.search(r"\bnan\b", text)
    promised = [line for line in text.splitlines() if line.startswith("| transferred from 5 keeps")]
    assert len(promised) == len(paper.transfers.RECIPES)
    assert all(line.endswith((": met |", "** |")) for line in promised)


def test_a_missed_bar_says_by_how_much(paper: SimpleNamespace) -> None:
    bar = paper.report.Bar(
        "keeps 0.97", "all", {"a": "0.980", "b": "0.950"}, {"a": -0.01, "b": 0.02}
    )
    assert bar.line() == "| keeps 0.97 | all | 0.980: met | 0.950: **missed by 0.020** |"


def test_a_download_as_it_comes_is_sent_to_be_converted(
    paper: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "bounding_boxes.txt").touch()
    with pytest.raises(
        InputError, match=r"CUB-200-2011 as it is downloaded.*prepare_data\.py birds"
    ):
        paper.bench.read_bench(tmp_path, "none", None)


def test_match_is_asked_of_the_other_half_of_each_label(paper: SimpleNamespace) -> None:
    labels = np.repeat(["a", "b", "c"], [9, 30, 2])
    for most in (5, 99):
        indexed, asked = paper.match.halves(labels, 3, most)
        assert not set(indexed) & set(asked)
        assert [(labels[indexed] == one).sum() for one in "abc"] == [5, min(15, most), 1]
        assert [(labels[asked] == one).sum() for one in "abc"] == [4, 15, 1]
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 6))
    points = centres[np.repeat([0, 1, 2], 40)] + 1.2 * generator.normal(size=(120, 6))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    names = np.repeat(["a", "b", "c"], 40)
    far = [np.float32(30 * np.eye(6)[:2])]
    columns, (said, was_right) = paper.match.figures(points, names, far, "all", 0)
    wrong, area, error, perfect, _, low = columns
    indexed, asked = paper.match.halves(names, 0, 120)
    first = [names[indexed][np.argmin(((points[indexed] - points[i]) ** 2).sum(1))] for i in asked]
    assert wrong == pytest.approx(np.mean(first != names[asked]))
    assert low == 1
    assert area > 0.6
    assert 0 < perfect < 0.3
    assert 0 < error < 0.3
    assert error == pytest.approx(paper.match.error(said, was_right))
    assert was_right.tolist() == (first == names[asked]).tolist()
    alone, _ = paper.match.figures(points, names, far, "none", 0)
    assert alone[0] == pytest.approx(wrong)
    assert np.isnan(alone[2:4]).all()
    assert alone[4] == pytest.approx(1, abs=1e-3)
    values, right = np.linspace(0, 1, 20), np.arange(20) % 2 == 0
    literal = [abs(values[i : i + 2].mean() - 0.5) for i in range(0, 20, 2)]
    assert paper.match.error(values, right) == pytest.approx(np.mean(literal))
