"""scripts/benchmarks: its parts on toy networks and tiny indexes. Values, never seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import seeded

from embedcam import EmbeddingNetwork, find_images
from embedcam.index import Index
from embedcam.preprocess import Preprocess
from scripts.benchmarks import __main__ as script
from scripts.benchmarks import (
    building,
    cases,
    evaluating,
    exactness,
    explaining,
    features,
    indexes,
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


class Clock:
    """Seconds that a test decides: every run of a case takes what it adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_cases_take_turns_and_only_their_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def case(name: str, seconds: float) -> object:
        def run(ready: str) -> None:
            order.append(f"{name} {ready}")
            clock.now += seconds

        def before() -> str:
            clock.now += 100
            return "made ready"

        def after(ready: str) -> None:
            clock.now += 100
            order.append(f"tidied {ready}")

        return timing.Case(run, before, after)

    took = timing.alternate({"a": case("a", 2), "b": case("b", 3)}, rounds=2, warmup=1)
    assert order == ["a made ready", "tidied made ready", "b made ready", "tidied made ready"] * 3
    assert took["a"].tolist() == [2, 2]
    assert took["b"].tolist() == [3, 3]


def test_a_ratio_is_taken_round_by_round() -> None:
    # A machine twice as slow in the second round changes no ratio.
    found = timing.ratio(np.array([1.1, 2.4, 1.0]), np.array([1.0, 2.0, 1.0]))
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.0, 1.2))
    assert str(found) == "1.100 (1.000-1.200)"


@pytest.mark.parametrize(
    ("value", "bar", "at_least", "expected"),
    [
        (1.05, 1.05, False, "<= 1.05: met"),
        (1.051, 1.05, False, "<= 1.05: **not met**"),
        (2.4, 2.5, True, ">= 2.5: **not met**"),
        (2.5, 2.5, True, ">= 2.5: met"),
        (9, None, False, ""),
    ],
)
def test_a_verdict_says_the_bar(
    value: float, bar: float | None, at_least: bool, expected: str
) -> None:
    assert timing.verdict(value, bar, at_least=at_least) == expected


def test_exactness_of_a_toy_is_met_and_a_wrong_mean_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = exactness.Subject("toy", toy_module(6), "1", 24)
    rows = rows_of(exactness.report(anchors=2, triplets=5, chosen=[subject]))[1:]
    assert len(rows) == 2 * 2 * 2
    assert all(row[-1].endswith(": met") for row in rows)
    assert {row[1] for row in rows} == {"float32", "float64"}

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
    assert not (tmp_path / "run").exists()


def test_the_embedding_is_what_an_index_holds(tmp_path: Path) -> None:
    source = find_images(cases.write_pictures(tmp_path / "pictures", 6, classes=2))
    subject = building.Subject("toy", toy_network(), ("gradcam",), 1.05)
    runs = building.Runs(subject, source, 4, tmp_path)
    out = runs.ready()
    runs.embed(out)
    runs.build("gradcam", out)
    with Index.open(out / "index") as index:
        stored = index.embeddings(index.positions(source.ids))
    np.testing.assert_allclose(np.load(out / "6.npy"), stored, atol=1e-6)


def test_every_way_to_explain_draws_the_same_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "SIZE", 24)
    network = toy_network()
    path = cases.index_of(network, tmp_path / "index", rows=40)
    image = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    query = explaining.Query(network, path, image)
    expected = query.explain_and_search()
    assert expected.shape == (24, 24)
    np.testing.assert_allclose(query.explain(), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(query.explain_ids(), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(query.embed(), query.embedding, atol=1e-6)
    assert query.lean_gradcam().shape == (24, 24)
    query.close()


def test_bytes_of_an_index_are_all_counted(tmp_path: Path) -> None:
    encoding = indexes.encodings(channels=64, rank=16, m=5)["top-5"]
    path = indexes.make_index(tmp_path / "index", 30, encoding, "none", 4)
    kept, named, once = indexes.bytes_of(path)
    # Five channels and five halves, a scale; 49 bytes of map, a scale; the count of triplets.
    assert kept == 30 * (5 * 2 + 5 * 2 + 4 + 49 + 4 + 4)
    assert kept + named + once == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_another_process_opens_the_index_without_torch(tmp_path: Path) -> None:
    text = indexes.open_report(200, 1, tmp_path)
    assert [row[0] for row in rows_of(text)[1:]] == [
        "opening, s",
        "growth of the resident set, MB",
        "first search (loads FAISS), s",
        "second search, s",
    ]
    assert list(tmp_path.iterdir()) == []


def test_search_has_a_row_for_each_factory(tmp_path: Path) -> None:
    text = indexes.search_report(300, 5, tmp_path, ("Flat", "HNSW8"))
    rows = rows_of(text)[1:]
    assert [row[0] for row in rows] == ["Flat", "HNSW8"]
    assert rows[0][3] == "1.000"


def test_features_are_explained_alike_however_neighbours_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHANNELS", 64)
    monkeypatch.setattr(features, "KEPT", 5)
    asked = features.Asked(features.make_indexes(60, tmp_path / "once"), 3)
    cases = asked.cases()
    found = {name: case.run(asked.queries[0]) for name, case in cases.items()}
    plain = found["with search"]
    alone = found.pop("search alone")
    assert asked.index.ids[alone.positions[0]] == plain.ids == asked.queries[0][2]
    for name, why in found.items():
        np.testing.assert_allclose(why.cam, plain.cam, rtol=1e-5, atol=1e-7)
        assert len(why.ids) == 10
        assert (why.trust is not None) == name.endswith("with trust")
    # Each case of a round has a query of its own.
    assert cases["ids given"].before() is not cases["search apart"].before()
    asked.close()
    monkeypatch.setattr(features, "RUNS", 2)
    rows = rows_of(features.report(60, 2, tmp_path / "again"))[1:]
    assert [row[0] for row in rows] == list(cases)
    assert [bool(row[3]) for row in rows] == [True] * 4 + [False] * 2
    assert list((tmp_path / "again").iterdir()) == []


def test_the_script_refuses_an_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.arguments(["explian"])
    assert "unknown section 'explian'" in capsys.readouterr().err
    chosen = script.arguments(["peers", "--quick"])
    assert (chosen.sections, chosen.rounds) == (["peers"], 2)


def test_methods_are_timed_beside_the_same_methods_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("torchcam")
    monkeypatch.setattr(zoo, "frozen_network", lambda name: toy_network())
    monkeypatch.setattr(zoo, "query_input", lambda: torch.rand(3, 24, 24))
    rows = rows_of(zoo.peers_report("toy", "toy", 1))[1:]
    pairs = {(row[0], row[3]) for row in rows}
    assert {("Grad-CAM", "pytorch-grad-cam"), ("Score-CAM", "torch-cam")} <= pairs
    assert all(float(row[5].split()[0]) > 0 for row in rows)


def test_eigen_cam_is_timed_beside_a_full_decomposition() -> None:
    rows = rows_of(zoo.decomposition_report(1))[1:]
    assert [row[:2] for row in rows][:2] == [["2048 x 7 x 7", "full"], ["2048 x 7 x 7", "thin"]]
    assert all(float(row[4].split()[0]) > 0 for row in rows)


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


def test_an_evaluation_is_timed_by_what_it_says_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "frozen_network", lambda name: toy_network())
    spent = {"forward": 4.0, "metrics": 1.0, "explaining": 0.5, "reading": 0.25, "total": 6.0}
    found = []

    def seconds(path: Path, source: object, network: object, boxes: Path) -> dict[str, float]:
        found.append((path.name, len(boxes.read_text().splitlines())))
        return spent

    measured = evaluating.seconds
    monkeypatch.setattr(evaluating, "seconds", seconds)
    rows = rows_of(evaluating.share_report(["toy"], 16, 2, tmp_path))[1:]
    assert rows == [["toy", "4.00", "1.00", "0.50", "0.25", "6.00", "0.250 (0.250-0.250)",
                     "<= 0.2: **not met**"]]  # fmt: skip
    assert found == [("evaluated-toy", 17)] * 2
    source = find_images(tmp_path / "evaluated-16")
    own = measured(tmp_path / "evaluated-toy", source, toy_network(), tmp_path / "boxes.csv")
    assert own["forward"] > 0
    assert own["metrics"] > 0


def test_queries_of_a_few_files_have_ids_of_their_own(tmp_path: Path) -> None:
    source = find_images(cases.write_pictures(tmp_path / "pictures", 3, classes=2))
    written = evaluating.write_queries(tmp_path / "queries.csv", source, 7)
    read = find_images(written)
    assert len(set(read.ids)) == 7
    assert {label for label in read.labels} == {"class-0", "class-1"}
    assert read.open(6).size == (320, 240)


def test_trust_is_what_two_queries_and_two_builds_differ_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusting, "linear_network", lambda name, folder: toy_network())
    rows = rows_of(trusting.report("toy", 48, 1, tmp_path))
    cases = ["without trust", "without trust again (A/A)", "with trust"]
    named = [f"{what} {case}" for what in ("query", "build") for case in cases]
    assert [row[0] for row in rows] == ["case", *named]
    assert rows[1][2:] == ["1.000 (1.000-1.000)", "0.00"]
    assert not (tmp_path / "trusting").exists()
    took = {"without trust": np.array([1.0, 3.0]), "with trust": np.array([1.5, 3.25])}
    assert trusting.rows("query", took)[1][2:] == [
        timing.ratio(*list(took.values())[::-1]),
        "375.00",
    ]


def test_onnx_is_timed_beside_torch_and_its_maps_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "BATCHES", (1, 2))
    text = onnx.onnx_report("toy", 1, tmp_path, lambda name: toy_network())
    rows = rows_of(text)[1:]
    assert [row[0] for row in rows[:3]] == [
        "batch 1, forward: torch",
        "batch 1, forward: torch again (A/A)",
        "batch 1, forward: ONNX Runtime",
    ]
    assert len(rows) == 2 * 2 * 3
    assert all((row[3] != "") == ("ONNX" in row[0]) for row in rows)
    assert "(<= 0.001: met)" in text

    network = toy_network()
    path = tmp_path / "toy-onnx"
    with Index.open(path) as index:
        right = onnx.Explainer(index, network)
        other = onnx.Explainer(index, network, n_neighbors=2)
        pictures = onnx.inputs(network, 3)
        assert onnx.maps_off(right, right, pictures) == 0
        assert onnx.maps_off(right, other, pictures) > 1e-3
