"""scripts/default_target.py on a tiny made data set and network, beside literal computations."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paper_samples import made_data, tiny_network

from embedcam.cam import resize
from embedcam.recipe import Recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The script, its parts, and a bench of a tiny data set with six scenes' worth of pairs."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    with pytest.MonkeyPatch.context() as patch:
        try:
            script = importlib.import_module("default_target")
            parts = {name: importlib.import_module(name) for name in ("photographs", "paper.bench")}
            patch.setattr(parts["photographs"], "N_SCENES", 3)
            patch.setattr(parts["paper.bench"], "load_network", lambda *_, **__: tiny_network())
            folder = made_data(tmp_path_factory.mktemp("data") / "tiny")
            bench = parts["paper.bench"].read_bench(folder, "none", None)
            yield SimpleNamespace(script=script, bench=bench, folder=folder)
        finally:
            sys.path.remove(str(SCRIPTS))
            for name in set(sys.modules) - before:
                where = getattr(sys.modules[name], "__file__", None) or ""
                if where.startswith(str(SCRIPTS)):
                    del sys.modules[name]


def removal(target: SimpleNamespace, folder: Path | None = None, pictures: int | None = 4) -> Any:
    network = tiny_network()
    kept = target.script.Cache(folder, network, target.bench.unseen.paths)
    return target.script.Removal(target.bench, network, kept, pictures)


def test_the_two_parts_together_are_the_default(target: SimpleNamespace) -> None:
    script, bench = target.script, target.bench
    plain = bench.cotangents(Recipe(target="margin")).values.astype(np.float64)
    f = bench.embeddings.astype(np.float64)
    centred = f - f.mean(0)
    covariance = centred.T @ centred / len(f)
    spread = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    whitened = plain @ np.linalg.inv(covariance + spread)
    literal = np.stack([c - (c @ own) * own for c, own in zip(whitened, f, strict=True)])
    shared = np.stack([literal[bench.codes == code].mean(0) for code in bench.codes])
    ways = dict(script.ways(bench))
    default = ways[script.DEFAULT].weights
    np.testing.assert_allclose(script.at_head(bench, shared), default, rtol=5e-3, atol=1e-6)
    np.testing.assert_allclose(
        ways["whitening alone"].weights, script.at_head(bench, literal), rtol=5e-3, atol=1e-6
    )
    again = np.stack([c - (c @ own) * own for c, own in zip(shared, f, strict=True)])
    once_more = ways["the label's mean, through the norm once more"].weights
    np.testing.assert_allclose(once_more, script.at_head(bench, again), rtol=5e-3, atol=1e-6)


def test_what_is_beyond_the_average_image_is_its_activations_less_theirs(
    target: SimpleNamespace,
) -> None:
    bench, ways = target.bench, dict(target.script.ways(target.bench))
    way = ways["evidence beyond the average image only"]
    seen = way.seen(bench.gallery.activations)
    assert seen.mean((0, 2, 3)) == pytest.approx(np.zeros(seen.shape[1]), abs=1e-5)
    assert way.weights is ways[target.script.MARGIN].weights


def test_a_fall_is_the_literal_one(target: SimpleNamespace) -> None:
    script, bench = target.script, target.bench
    ways, made = dict(script.ways(bench)), removal(target)
    module = tiny_network().module
    for name in (script.MARGIN, "evidence beyond the average image only"):
        expected = []
        for row, query in enumerate(made.queries):
            gaps = ((bench.embeddings - bench.embeddings[query]) ** 2).sum(1)
            gaps[query] = np.inf
            near = np.argsort(gaps)[:5]
            weights = ways[name].weights[near]
            weights = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).mean(0)
            activations = bench.gallery.activations[query]
            if ways[name].less is not None:
                activations = activations - ways[name].less[:, None, None]
            drawn = np.maximum(np.tensordot(weights, activations, 1), 0)
            full = resize(drawn.astype(np.float32), (224, 224)).ravel()
            taken = np.argsort(-full, kind="stable")[: round(0.2 * full.size)]
            image = made.inputs[row].reshape(3, -1).copy()
            image[:, taken] = 0
            with torch.no_grad():
                z = module(torch.from_numpy(image.reshape(1, 3, 224, 224)))[0].numpy()
            z = bench.head.matrix @ z
            apart = ((bench.embeddings - z / np.linalg.norm(z)) ** 2).sum(1)
            others = np.delete(np.arange(len(apart)), query)
            expected.append((apart[others] < apart[near[0]]).sum())
        assert made.falls(ways[name]).tolist() == expected
        assert max(expected) > 0


def test_falls_that_are_kept_are_not_measured_again(
    target: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = dict(target.script.ways(target.bench))[target.script.DEFAULT]
    first = removal(target, tmp_path).falls(way)
    again = removal(target, tmp_path)
    monkeypatch.setattr(again, "measured", lambda _: pytest.fail("measured again"))
    assert again.falls(way).tolist() == first.tolist()
    # Other pictures are other falls.
    fewer = removal(target, tmp_path, pictures=2)
    assert len(fewer.falls(way)) == 2


def test_medians_are_resampled_together(target: SimpleNamespace) -> None:
    b = np.array([1.0, 5, 9, 100, 4, 3, 2])
    # What is always 2 more has no spread, however the medians themselves spread.
    assert tuple(target.script.median_difference(b + 2, b)) == (2, 2, 2)
    low, high = target.script.median_difference(b, np.full(7, 4.0))[1:]
    assert low < 0 < high
    rows = target.script.fall_table({target.script.MARGIN: b, "more": b + 2}).splitlines()
    assert rows[2].startswith("| the plain margin | 4.0 [")
    assert rows[3].endswith("| +2.0 [+2.0, +2.0] | 19.7 | +2.0 [+2.0, +2.0], 100% |")


def test_the_report_has_every_way_and_the_command(
    target: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.script, "frozen_network", lambda _: tiny_network())
    output = tmp_path / "default_target.md"
    given = [str(target.folder), "--weights", "none", "--pictures", "4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["default_target.py", *given])
    target.script.main()
    text = output.read_text()
    assert "scripts/default_target.py DATA/tiny --weights" in text
    assert "Falls are of 4 pictures." in text
    for name, _ in target.script.ways(target.bench):
        assert len([line for line in text.splitlines() if line.startswith(f"| {name} |")]) == 2


def test_no_pictures_are_refused(
    target: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        target.script.arguments(["data", "--weights", "none", "--pictures", "0"])
    assert "--pictures 0: give at least 1" in capsys.readouterr().err
