"""scripts/benchmarks: its parts on toy networks and tiny indexes. Values, never seconds."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from toys import seeded

from embedcam import EmbeddingNetwork, find_images
from embedcam.preprocess import Preprocess
from scripts.benchmarks import __main__ as script
from scripts.benchmarks import (
    building,
    cases,
    embedding_pass,
    evaluating,
    exactness,
    explaining,
    features,
    forward,
    indexes,
    large,
    onnx,
    timing,
    trusting,
    zoo,
)


def toy_module(width: int, bias: bool = True) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1, bias=bias),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, width, bias=bias),
        )
    )


def toy_network(width: int = 6) -> EmbeddingNetwork:
    preprocess = Preprocess.imagenet(24)
    return EmbeddingNetwork(toy_module(width), "1", preprocess=preprocess, name="toy")


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if set("".join(row)) - set("-:")]


def test_cases_take_turns_and_a_ratio_is_taken_round_by_round() -> None:
    order = []

    def case(name: str) -> timing.Case:
        return timing.Case(order.append, lambda: name, lambda ready: order.append(f"after {ready}"))

    took = timing.alternate({"a": case("a"), "b": case("b")}, rounds=2, warmup=1)
    assert order == ["a", "after a", "b", "after b"] * 3
    assert [len(took[name]) for name in "ab"] == [2, 2]
    # A machine twice as slow in the second round changes no ratio.
    found = timing.ratio(np.array([1.1, 2.4, 1.0]), np.array([1.0, 2.0, 1.0]))
    assert str(found) == "1.100 (1.000-1.200)"
    assert timing.verdict(1.051, 1.05, at_least=False) == "<= 1.05: **not met**"
    assert timing.verdict(2.5, 2.5, at_least=True) == ">= 2.5: met"


def test_exactness_of_a_toy_is_met_and_a_wrong_mean_is_not(monkeypatch) -> None:
    subject = exactness.Subject("toy", toy_module(6), "1", 24)
    rows = rows_of(exactness.report(anchors=2, triplets=5, chosen=[subject]))[1:]
    assert len(rows) == 2 * 2 * 2
    assert all(row[-1].endswith(": met") for row in rows)
    right = exactness.production
    monkeypatch.setattr(exactness, "production", lambda *given: 1.001 * right(*given))
    rows = rows_of(exactness.report(anchors=1, triplets=5, chosen=[subject]))[1:]
    assert all(row[-1].endswith("**not met**") for row in rows)


def test_a_build_forwards_each_image_once_and_its_stages_are_kept(tmp_path: Path) -> None:
    source = find_images(cases.write_pictures(tmp_path / "pictures", 12, classes=2))
    subject = building.Subject("toy", toy_network(), ("gradcam", "gradcam++"), 1.05)
    runs = building.Runs(subject, source, 4, tmp_path)
    took = runs.seconds(rounds=1)
    assert list(took) == ["embedding", "embedding again (A/A)", "gradcam", "gradcam++"]
    assert set(runs.stages["gradcam"][0]) == {"before", "embed", "weights", "encode", "write"}
    few = building.Runs(subject, type(source)(source.items[::2], source.root), 4, tmp_path)
    assert runs.forwards("gradcam") - few.forwards("gradcam") == 12 - 6


def test_every_way_to_explain_draws_the_same_map(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(explaining, "SIZE", 24)
    network = toy_network()
    path = cases.index_of(network, tmp_path / "index", rows=40)
    image = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    query = explaining.Query(network, path, image)
    expected = query.explain_and_search()
    np.testing.assert_allclose(query.explain(), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(query.explain_ids(), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(query.embed(), query.embedding, atol=1e-6)
    assert query.lean_gradcam().shape == expected.shape == (24, 24)
    query.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_bytes_opening_and_search_of_an_index(tmp_path: Path) -> None:
    encoding = indexes.encodings(channels=64, rank=16, m=5)["top-5"]
    path = indexes.make_index(tmp_path / "index", 30, encoding, "none", 4)
    kept, named, once = indexes.bytes_of(path)
    # Five channels and five halves, a scale; 49 bytes of map, a scale; the count of triplets.
    assert kept == 30 * (5 * 2 + 5 * 2 + 4 + 49 + 4 + 4)
    assert kept + named + once == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert len(rows_of(indexes.open_report(200, 1, tmp_path))) == 1 + 4
    rows = rows_of(indexes.search_report(300, 5, tmp_path, ("Flat", "HNSW8")))[1:]
    assert [row[0] for row in rows] == ["Flat", "HNSW8"]
    assert rows[0][3] == "1.000"


def test_a_large_index_is_built_searched_and_explained(tmp_path: Path) -> None:
    text = large.report(300, tmp_path, width=8)
    assert "Of 100 queries that are not indexed 1.0000 of the true 5 were found." in text
    assert "--faiss auto`: Flat. " in text
    whats = [row[0] for row in rows_of(text)[1:]]
    stages = ("read", "check", "between", "reduce", "weights", "match", "write", "faiss")
    assert whats[: len(stages)] == [f"build: {one}" for one in stages]
    assert whats[-1] == "explain_features, 5 neighbours"
    assert list(tmp_path.iterdir()) == []


def test_features_are_explained_in_every_way(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("CHANNELS", 64), ("KEPT", 5), ("RUNS", 2)):
        monkeypatch.setattr(features, name, value)
    rows = rows_of(features.report(60, 2, tmp_path))[1:]
    assert [bool(row[3]) for row in rows] == [True] * 4 + [False] * 2
    assert list(tmp_path.iterdir()) == []


def test_the_script_refuses_an_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.arguments(["explian"])
    assert "unknown section 'explian'" in capsys.readouterr().err
    chosen = script.arguments(["peers", "--quick"])
    assert (chosen.sections, chosen.rounds) == (["peers"], 2)


def test_methods_are_timed_beside_the_same_methods_of_others(monkeypatch) -> None:
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("torchcam")
    monkeypatch.setattr(zoo, "frozen_network", lambda name: toy_network())
    monkeypatch.setattr(zoo, "query_input", lambda: torch.rand(3, 24, 24))
    rows = rows_of(zoo.peers_report("toy", "toy", 1))[1:]
    pairs = {(row[0], row[3]) for row in rows}
    assert {("Grad-CAM", "pytorch-grad-cam"), ("Score-CAM", "torch-cam")} <= pairs
    assert all(float(row[5].split()[0]) > 0 for row in rows)


def test_metrics_beside_torch_cams_are_the_same_metrics() -> None:
    pytest.importorskip("torchcam")
    # Without biases what is wholly masked scores 0, which torch-cam takes every score to start at.
    network = EmbeddingNetwork(toy_module(6, bias=False), "1")
    generator = torch.Generator().manual_seed(1)
    shades = torch.randn(10, 3, 1, 1, generator=generator)
    images = torch.randn(10, 3, 24, 24, generator=generator) * shades + 1
    reference = network.forward(torch.ones(1, 3, 24, 24)).embedding[0]
    drop, increase = evaluating.drop_and_increase(network, images, reference)
    peer = evaluating.torch_cam(evaluating.METRICS[0], network, images, reference)()
    assert drop == pytest.approx(peer["avg_drop"], abs=1e-5)
    assert increase == pytest.approx(peer["conf_increase"])
    assert drop > 0.01
    found = evaluating.deletion_and_insertion(network, images, reference, steps=4)
    peer = evaluating.torch_cam(evaluating.METRICS[1], network, images, reference, steps=4)()
    # Ties of a map fall differently by their rounding.
    assert found == pytest.approx((peer["deletion_auc"], peer["insertion_auc"]), abs=2e-3)
    assert abs(found[0] - found[1]) > 0.02


def test_an_evaluation_is_timed_by_what_it_says_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluating, "frozen_network", lambda name: toy_network())
    (row,) = rows_of(evaluating.share_report(["toy"], 16, 1, tmp_path))[1:]
    assert row[0] == "toy"
    assert all(float(seconds) >= 0 for seconds in row[1:6])


def test_trust_is_what_two_queries_and_two_builds_differ_by(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trusting, "linear_network", lambda name, folder: toy_network())
    rows = rows_of(trusting.report("toy", 48, 1, tmp_path))
    cases = ["without trust", "without trust again (A/A)", "with trust"]
    named = [f"{what} {case}" for what in ("query", "build") for case in cases]
    assert [row[0] for row in rows] == ["case", *named]
    assert rows[1][2:] == ["1.000 (1.000-1.000)", "0.00"]


def test_onnx_is_timed_beside_torch_and_its_maps_are_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnx, "BATCHES", (1, 2))
    monkeypatch.setattr(onnx, "ALONE_BARS", {"toy": 0.0})
    text = onnx.onnx_report("toy", 1, tmp_path, lambda name: toy_network())
    rows, (head, *apart) = rows_of(text)[1:13], rows_of(text)[13:]
    assert len(rows) == 2 * 2 * 3
    assert all((row[3] != "") == ("ONNX" in row[0]) for row in rows)
    assert "(<= 0.001: met)" in text
    assert head == ["case", "ms", "ratio", "bar"]
    alone = timing.AGAIN.format(onnx.ALONE)
    assert [row[0] for row in apart] == [onnx.ALONE, alone, onnx.EXPLAIN, onnx.FROM_FILE]
    assert [row[3] for row in apart] == ["", "", "<= 0: **not met**", ""]


def test_pictures_of_a_size_are_made_of_photographs(tmp_path: Path) -> None:
    drawn = cases.write_pictures(tmp_path / "drawn", 3)
    forward.write_photographs(tmp_path / "larger", drawn, 2)
    larger = find_images(tmp_path / "larger")
    assert [larger.open(place).size for place in range(len(larger))] == [(500, 375)] * 2


def test_a_pass_is_timed_by_builds(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(embedding_pass, "load_network", lambda *_, **__: toy_network())
    monkeypatch.setattr(embedding_pass.sys, "stdin", ["\n", "\n"])
    pictures = cases.write_pictures(tmp_path / "drawn", 24)
    embedding_pass.main(str(pictures), "toy", "torch", torch.get_num_threads())
    parts, *built = map(json.loads, capsys.readouterr().out.splitlines())
    assert [*parts] == ["decode", "prepare", "mark"]
    assert all(milliseconds > 0 for milliseconds in parts.values())
    assert [one["images"] for one in built] == [24, 24]
    assert all(one["wall"] > 0 for one in built)


def test_how_many_times_as_many_images_a_second(tmp_path: Path, monkeypatch) -> None:
    class Told:
        parts: ClassVar = {"decode": 1.0, "prepare": 2.0, "mark": 0.5}

        def __init__(self, checkout: Path, pictures: Path, name: str, runtime: str, _: int):
            self.before = checkout == tmp_path
            self.seconds = 8.0 if self.before else 2.0 if runtime == "torch" else 1.0

        def build(self) -> dict[str, float]:
            return {"images": 16, "wall": self.seconds, "cpu": self.seconds / 10}

        def close(self) -> None:
            pass

    monkeypatch.setattr(forward, "Worker", Told)
    monkeypatch.setattr(forward, "BARS", {("toy", "torch"): 4.5, ("toy", "onnx"): 4.5})
    options = forward.arguments(["--old", str(tmp_path), "--rounds", "2"])
    rows = rows_of(forward.network_report("toy", tmp_path, options))
    assert [row[1] for row in rows[1:4]] == ["2.0", "8.0", "16.0"]
    assert [row[2].split()[0] for row in rows[1:4]] == ["1.000", "4.000", "8.000"]
    assert [row[3] for row in rows[1:4]] == ["", ">= 4.5: **not met**", ">= 4.5: met"]
    assert rows[2][4] == "200.0"
    assert rows[-3:] == [["decode", "1.00", "1.00"], ["prepare", "2.00", "2.00"],
                         ["mark", "0.50", "0.50"]]  # fmt: skip
