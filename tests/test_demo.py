"""The demonstration: its scenes, its training, its measurement, and the whole of it in small."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import squared_distance
from PIL import Image

from embedcam.demo import run_demo, scenes
from embedcam.demo.digits_network import (
    LAYER,
    Batches,
    digits_preprocess,
    initialise,
    load_weights,
    save_weights,
    train,
    triplet_loss,
)
from embedcam.demo.run import _Demo
from embedcam.demo.scenes import SceneMaker, read_scenes, write_scenes
from embedcam.demo.settings import DemoSettings
from embedcam.errors import InputError, NetworkError
from embedcam.evaluate import evaluate_index
from embedcam.images import find_images
from embedcam.network import EmbeddingNetwork

# Seed, sides of scenes and inputs, scenes of each split, steps, a batch.
TINY = DemoSettings(
    0, 64, 64, 60, 40, 10, 10, 4, 20, channels=24, embedding_size=8, n_triplets=5, top_m=6
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    run_demo(folder, progress=False, settings=TINY)
    return folder


def test_importing_the_demo_is_cheap() -> None:
    code = "import sys, embedcam.demo; assert not {'torch', 'sklearn', 'faiss'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_handwriting_is_in_two_splits() -> None:
    splits = {
        name: {image.tobytes() for images in classes for image in images}
        for name, classes in scenes._split_digits(0).items()
    }
    assert [len(images) for images in splits.values()] == [1078, 359, 360]
    assert len(set.union(*splits.values())) == 1797


def test_scenes_depend_on_their_number_alone() -> None:
    maker = SceneMaker(3, 64)
    first = maker.scene("gallery", 7)
    maker.scene("gallery", 8)
    again = SceneMaker(3, 64).scene("gallery", 7)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.digits == again.digits
    assert first.digits[0].label == "7"
    assert not np.array_equal(first.pixels, SceneMaker(4, 64).scene("gallery", 7).pixels)


def test_the_box_holds_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    inks = []
    monkeypatch.setattr(scenes._Canvas, "clutter", lambda self, shape: None)
    drawn = lambda self: inks.append(self._ink) or np.zeros((4, 4, 3))  # noqa: E731
    monkeypatch.setattr(scenes._Canvas, "pixels", drawn)
    maker = SceneMaker(0, 96)
    for number in range(20):
        x0, y0, x1, y1 = maker.scene("query", number).digits[0].box
        rows, columns = np.nonzero(inks[-1] > 0.4)
        assert 0 <= x0 <= columns.min() <= columns.max() < x1 <= 96
        assert 0 <= y0 <= rows.min() <= rows.max() < y1 <= 96
        assert columns.max() - columns.min() >= x1 - x0 - 3
        # A pair has two classes in two halves.
        left, right = maker.scene("pair", number).digits
        assert left.label != right.label
        assert left.box[2] <= 48 <= right.box[0]


def literal_loss(embeddings: np.ndarray, labels: list[int], margin: float) -> float:
    distance = [[squared_distance(one, other) for other in embeddings] for one in embeddings]
    hinges = []
    for a, p in permutations(range(len(labels)), 2):
        if labels[p] == labels[a]:
            negatives = [distance[a][n] for n in range(len(labels)) if labels[n] != labels[a]]
            beyond = [d for d in negatives if d > distance[a][p]]
            hinges.append(max(distance[a][p] - min(beyond or [max(negatives)]) + margin, 0))
    return float(np.mean(hinges))


def test_triplet_loss_is_the_literal_one() -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for seed in range(3):
        embeddings = np.random.default_rng(seed).normal(size=(9, 4))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        found = triplet_loss(torch.from_numpy(embeddings), torch.tensor(labels), 0.2).item()
        assert found == pytest.approx(literal_loss(embeddings, labels, 0.2), abs=1e-9)
        assert found != pytest.approx(literal_loss(embeddings, labels, 0.3), abs=1e-3)


def test_training_is_seeded_and_leaves_the_random_state_alone() -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (train(TINY, progress=False) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    start = initialise(TINY.channels, TINY.embedding_size, TINY.seed)
    assert not torch.equal(first.head.weight, start.head.weight)


def test_training_windows_hold_the_digit() -> None:
    batches = Batches(TINY, progress=False)
    for low, high in ((0, 20), (30, 64), (44, 64), (17, 40)):
        for _ in range(20):
            start = batches._start(low, high, 40)
            assert 0 <= start <= low
            assert high <= start + 40 <= 64


def test_network_weights_come_back(tmp_path: Path) -> None:
    network = initialise(12, 4, seed=1).eval()
    save_weights(network, tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_weights(tmp_path / "w.safetensors")(images), network(images))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(NetworkError, match=r"bad\.safetensors: not the weights .* run the demo"):
        load_weights(tmp_path / "bad.safetensors")
    assert network.trunk(images).shape == (2, 12, 4, 4)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="batch_size is 25"):
        DemoSettings(batch_size=25)
    with pytest.raises(InputError, match="n_query = 3; give a whole number of at least 10"):
        DemoSettings(n_query=3)
    assert DemoSettings().digest("seed") != DemoSettings(seed=1).digest("seed")
    assert DemoSettings().digest("steps") == DemoSettings(seed=1).digest("steps")


def stages(folder: Path, digests: dict[str, str], fails: str = "") -> list[str]:
    made: list[str] = []
    demo = _Demo(folder, TINY, False)
    for name, digest in digests.items():

        def make(name: str = name) -> None:
            if name == fails:
                raise ZeroDivisionError
            (folder / name).touch()
            made.append(name)

        demo.stage(name, digest, folder / name, make)
    return made


def test_stages_run_once_and_make_later_ones_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    both = ["one", "two"]
    assert stages(folder, {"one": "a", "two": "same"}) == both
    assert stages(folder, {"one": "a", "two": "same"}) == []
    assert stages(folder, {"one": "b", "two": "same"}) == both
    (folder / "two").unlink()
    assert stages(folder, {"one": "b", "two": "same"}) == ["two"]
    # One that fails is not taken for finished.
    with pytest.raises(ZeroDivisionError):
        stages(folder, {"one": "c", "two": "same"}, fails="one")
    assert stages(folder, {"one": "b", "two": "same"}) == both
    # A run that is killed after its first stage leaves no later one believed.
    assert stages(folder, {"one": "c"}) == ["one"]
    assert stages(folder, {"one": "c", "two": "same"}) == ["two"]


def test_a_folder_of_other_things_is_refused(tmp_path) -> None:
    for name, text, message in (
        ("stages.json", "[1]", r"stages\.json is damaged; delete the folder"),
        ("stages.json", "[1", r"stages\.json is damaged; delete the folder"),
        ("thesis.txt", "mine", "give an empty or new folder"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            run_demo(tmp_path, progress=False, settings=TINY)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_scene_files(tmp_path: Path) -> None:
    write_scenes(TINY, tmp_path, progress=False)
    source = find_images(tmp_path / "gallery")
    assert len(source) == TINY.n_gallery
    assert source.labels == [item.path.split("/")[0] for item in source.items]
    pairs = read_scenes(tmp_path, "pair")
    assert len(pairs) == TINY.n_pairs
    scene = SceneMaker(TINY.seed, TINY.scene_size).scene("pair", 3)
    path, digits = list(pairs.items())[3]
    assert tuple(digits) == scene.digits
    with Image.open(tmp_path / path) as image:
        np.testing.assert_array_equal(np.asarray(image), scene.pixels)


def test_the_whole_demo(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    names = [row["weights"] for row in summary["rows"]]
    assert names[:3] == ["chance (area)", "mean activation", "one triplet"]
    assert names[4] == "5 triplets, top 6 of 24 (the paper)"
    assert names[-2:] == ["transferred from 1 neighbour", "transferred from 5 neighbours"]
    for row in summary["rows"]:
        assert all(0 <= row[score] <= 1 for score in row if score != "weights")
    assert 0 <= summary["recall_at_1"] <= 1
    with Image.open(demo / "why.png") as image:
        assert image.width > 1000
        assert np.asarray(image).std() > 20
    assert "the paper" in (demo / "why.html").read_text()
    assert not list(demo.rglob("*.part"))

    kept = ("summary.json", "why.png", "why.html", "index/manifest.json", "network.safetensors")
    before = {name: (demo / name).read_bytes() for name in kept}
    again = run_demo(demo, progress=True, settings=TINY)
    assert list(again["seconds"]) == ["total"]
    assert {name: (demo / name).read_bytes() for name in kept} == before
    assert "Recall@1 on 10 held-out scenes" in capsys.readouterr().out


def test_the_table_is_what_evaluating_the_index_says(demo: Path) -> None:
    table = json.loads((demo / "summary.json").read_text())["rows"]
    rows = {row.pop("weights"): row for row in table}
    network = EmbeddingNetwork(
        load_weights(demo / "network.safetensors"), LAYER, preprocess=digits_preprocess(64)
    )
    for part, columns in (
        ("query", {"box_auc": "auc", "energy": "energy"}),
        ("pairs", {"side_auc": "objects_auc", "share": "share", "right": "right"}),
    ):
        told = evaluate_index(
            demo / "index", find_images(demo / "scenes" / part), network, scenes=0, n_neighbors=1,
            boxes=demo / "scenes/annotations.csv", progress=False, controls=False, examples=0,
            measures=("localisation", "objects"),
        ).summary  # fmt: skip
        means = told["localisation"]
        if part == "pairs":
            means = told["objects"]["boxes of several labels"]["measures"]
        for score, column in columns.items():
            ours, salient = means[column]["mean"], means[column]["mean_activation"]["mean"]
            assert rows["transferred from 1 neighbour"][score] == pytest.approx(ours)
            assert rows["mean activation"][score] == pytest.approx(salient)
    assert rows["5 triplets, top 6 of 24 (the paper)"] != rows["5 triplets"]


def test_the_figure_of_all_methods_is_drawn_from_a_demo(demo: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "zoo_figure.py"
    words = [script, demo, "--output", tmp_path / "zoo.png", "--methods", "gradcam", "polycam"]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    with Image.open(tmp_path / "zoo.png") as image:
        assert image.width > 500
