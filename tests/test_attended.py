"""Features averaged under a map: by loops, from every entry of the API, in JSON and as .npy."""

import json
from pathlib import Path

import numpy as np
import pytest
from photo_samples import CHANNELS, SIDE, build, picture, write_photos
from test_report import records
from test_report_cli import here, say  # noqa: F401 - fixtures

from embedcam import EmbeddingNetwork, Explainer, Recipe, find_images, write_report
from embedcam.explain.queries import larger_input
from embedcam.ops import area_average, attended, cam, joined, resize, signed_cam


def oracle(activations: np.ndarray, drawn: np.ndarray) -> list[float]:
    """sum_ij M_ij A_k,ij / sum_ij M_ij, a cell at a time; the mean over cells where M is empty."""
    weights = drawn if drawn.any() else np.ones_like(drawn)
    cells = list(np.ndindex(*drawn.shape))
    below = sum(float(weights[cell]) for cell in cells)
    return [sum(float(weights[c]) * float(A[c]) for c in cells) / below for A in activations]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-40, 1e30])
def test_features_are_the_loop_over_cells(scale: float) -> None:
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(5, 3, 4)).astype(np.float32)
    drawn = np.maximum(rng.normal(size=(3, 4)), 0).astype(np.float32)
    assert 0 < (drawn > 0).sum() < drawn.size
    found = attended(activations, drawn * np.float32(scale))
    assert found.dtype == np.float32
    expected = oracle(activations, drawn * (scale > 0))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_map_on_another_grid_is_brought_to_the_activations() -> None:
    rng = np.random.default_rng(1)
    activations, fine = rng.normal(size=(2, 2, 3)), rng.random((4, 6))
    means = area_average(fine, (2, 3))
    np.testing.assert_allclose(attended(activations, fine), oracle(activations, means), rtol=1e-5)
    coarse = rng.random((1, 2))
    expected = oracle(activations, resize(coarse, (2, 3)))
    np.testing.assert_allclose(attended(activations, coarse), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, network: EmbeddingNetwork) -> Path:
    folder = tmp_path_factory.mktemp("attended")
    return build(write_photos(folder / "photos"), folder / "index", network)


def test_every_way_of_asking_gives_those_of_its_own_map(index, network) -> None:
    query = picture(0, 7)
    inputs = network.preprocess(query)
    seen = network.forward(inputs[None])
    activations, embedding = seen.activations[0].numpy(), seen.embedding[0].numpy()
    with Explainer(index, network) as explainer:
        plain = explainer.explain(query)
        expected = oracle(activations, cam(plain.weights, activations))
        assert plain.features.shape == (CHANNELS,)
        assert np.abs(plain.features - activations.mean((1, 2))).max() > 1e-3
        again = explainer.explain_features(embedding, activations, size=(SIDE, SIDE))
        several = explainer.explain_batch([picture(1, 7), query])
        named = explainer.explain(query, result="0/1.png", above="1/1.png")
        fine = explainer.explain(query, detail=2)
    for one in (plain, again, several[1]):
        np.testing.assert_allclose(one.features, expected, rtol=1e-4)
    rival = oracle(activations, cam(named.weights, activations))
    np.testing.assert_allclose(named.features, rival, rtol=1e-4)
    larger = network.forward(larger_input(query, inputs, network.preprocess)[None])
    maps = larger.activations[0].numpy()
    signed = joined(signed_cam(fine.weights, activations), signed_cam(fine.weights, maps))
    np.testing.assert_allclose(fine.features, oracle(maps, np.maximum(signed, 0)), rtol=1e-3)
    assert np.abs(fine.features - plain.features).max() > 1e-3


def test_a_query_that_nothing_speaks_for_has_the_plain_mean(index: Path) -> None:
    with Explainer(index) as explainer:
        embedding = explainer.index.embeddings([0])[0]
        plain = explainer.explain_features(embedding, np.ones((CHANNELS, 2, 2), np.float32))
        against = np.where(plain.weights > 0, -1, 0).astype(np.float32)[:, None, None]
        activations = against * np.array([[1, 2], [3, 6]], np.float32)
        empty = explainer.explain_features(embedding, activations)
    assert empty.empty
    np.testing.assert_allclose(empty.features, 3 * against[:, 0, 0])


def test_several_layers_give_the_deepest_ones(tmp_path: Path, network: EmbeddingNetwork) -> None:
    recipe = Recipe(method="polycam", layers=("conv", "relu"), sampling="random", triplets=3)
    path = build(write_photos(tmp_path / "photos"), tmp_path / "index", network, recipe)
    with Explainer(path, network) as explainer:
        query = picture(0, 7)
        found = explainer.explain(query)
        _, layers = network.forward_layers(network.preprocess(query)[None], ["relu", "conv"])
        deepest, shallow = (one[0].numpy() for one in layers)
        vector, maps = explainer.index.embeddings([0])[0], [deepest, shallow]
        again = explainer.explain_features(vector, maps, neighbors=found.ids)
    np.testing.assert_allclose(found.features, oracle(deepest, again.cam), rtol=1e-4)


def test_json_and_a_report_hold_them_on_request(index, network, tmp_path) -> None:
    for number in range(3):
        picture(number, 60 + number).save(tmp_path / f"{number}.png")
    (tmp_path / "1b.png").write_text("a letter")
    source, asked = find_images(tmp_path, "none"), {"features": True, "batch_size": 2}
    with Explainer(index, network) as explainer:
        write_report(explainer, source, tmp_path / "out", **asked)
        before = (tmp_path / "out/features.npy").stat().st_mtime_ns
        assert write_report(explainer, source, tmp_path / "out", **asked).n_new == 0
        assert (tmp_path / "out/features.npy").stat().st_mtime_ns == before
        write_report(explainer, source, tmp_path / "plain")
        found = [explainer.explain(tmp_path / f"{number}.png") for number in range(3)]
    assert "features" not in found[0].to_dict()
    told = np.float32(found[0].to_dict(features=True)["features"])
    np.testing.assert_array_equal(told, found[0].features)
    assert not (tmp_path / "plain/features.npy").exists()
    assert '"features"' not in (tmp_path / "plain/explanations.jsonl").read_text()
    table = np.load(tmp_path / "out/features.npy")
    assert (table.dtype, table.shape) == (np.float32, (4, CHANNELS))
    lines = records(tmp_path / "out")
    assert [line["query"] for line in lines] == ["0.png", "1.png", "1b.png", "2.png"]
    assert np.isnan(table[2]).all()
    for row, one in zip(table[[0, 1, 3]], found, strict=True):
        np.testing.assert_allclose(row, one.features, rtol=1e-4)
    np.testing.assert_array_equal(table[3], np.float32(lines[3]["features"]))


def test_the_command_line_gives_them(say, tmp_path) -> None:  # noqa: F811
    words = "embedcam: --features goes with --json or --report FOLDER; give one of them\n"
    assert say("photos/0/1.png", "--features") == (2, "", words)
    asked = "photos/0/1.png", "--json", "--features", "-n", 2
    # By a method of the zoo: of the map that it draws.
    answers = [say(*asked), say(*asked, "--method", "gradcam")]
    assert [answer[0] for answer in answers] == [0, 0]
    one, other = (json.loads(answer[1])[0]["features"] for answer in answers)
    assert len(one) == CHANNELS
    assert other != one
    assert say("queries/deep", "--report", tmp_path / "out", "--features", "-n", 2)[0] == 0
    assert np.load(tmp_path / "out/features.npy").shape == (5, CHANNELS)
