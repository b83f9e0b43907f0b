"""Evaluating an index: what is orchestrated, against literal one-at-a-time re-computations."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from evaluate_samples import measure, run
from oracles import box_mask, energy_in_mask
from photo_samples import SQUASH, build, picture, write_photos
from PIL import Image

from embedcam import EmbeddingNetwork, Explainer, Index, Recipe, find_images
from embedcam.errors import InputError
from embedcam.evaluate import Evaluation
from embedcam.evaluate.examples import TRUE_BOX
from embedcam.evaluate.gallery import Gallery, sample
from embedcam.evaluate.groups import RESULTS
from embedcam.evaluate.maps import Mapper, Question
from embedcam.evaluate.report import tables
from embedcam.evaluate.rivals import ShuffledNetwork, permuted_rows, random_weights, wrong_rows
from embedcam.explain.answer import negatives_for
from embedcam.index import remove
from embedcam.metrics import map_at_r, noisy_linear_imputation, recall_at_k
from embedcam.ops import cam, resize


class Literal:
    """One query of an index, asked about one picture at a time."""

    def __init__(self, site: Path, network: EmbeddingNetwork, position: int) -> None:
        self.index, self.network = Index.open(site / "index"), network
        self.path = find_images(site / "queries").name(position)
        self.inputs = SQUASH(Image.open(self.path))
        explained = Explainer(self.index, network, n_neighbors=2).explain(self.path)
        self.map, self.result = explained.cam, explained.ids[0]
        self.gallery = self.index.embeddings(np.arange(12)).astype(np.float64)
        self.item = self.index.position(self.result)

    def embed(self, inputs: np.ndarray) -> np.ndarray:
        return self.network.forward(inputs[None]).embedding[0].numpy().astype(np.float64)

    def similarity(self, inputs: np.ndarray) -> float:
        return float(self.embed(inputs) @ self.gallery[self.item])

    def rank(self, inputs: np.ndarray) -> int:
        apart = [((row - self.embed(inputs)) ** 2).sum() for row in self.gallery]
        return 1 + sum(one < apart[self.item] for one in apart)

    def without(self, count: int) -> np.ndarray:
        """The input without its map's top pixels, one after another."""
        order = sorted(range(32 * 32), key=lambda i: (-self.map[i // 32, i % 32], i))
        inputs = self.inputs.copy()
        for i in order[:count]:
            inputs[:, i // 32, i % 32] = 0
        return inputs


Sampled = list[tuple[Literal, dict[str, Any]]]


@pytest.fixture(scope="module")
def sampled(site: Path, network: EmbeddingNetwork, evaluation: Evaluation) -> Sampled:
    """The images whose pixels were removed, and their rows."""
    rows = [(place, row) for place, row in enumerate(evaluation.rows) if "rank_drop" in row]
    assert len(rows) == 3
    return [(Literal(site, network, place), row) for place, row in rows]


def test_rank_drop_by_masking_and_searching(sampled: Sampled) -> None:
    drops = []
    for one, row in sampled:
        fallen = one.without(205)  # a fifth of 1024, to the nearest
        drops.append(one.rank(fallen) - one.rank(one.inputs))
        assert row["rank_drop"] == drops[-1]
        assert row["left_top"] == (one.rank(fallen) > 2)
        assert row["result"] == one.result
    assert any(drops)


def test_deletion_and_insertion_one_picture_at_a_time(sampled, evaluation) -> None:
    curves = []
    for one, row in sampled:
        taken = [one.without(count) for count in (0, 256, 512, 768, 1024)]
        deletion = [one.similarity(inputs) for inputs in taken]
        insertion = [one.similarity(one.inputs - inputs) for inputs in taken]
        curves.append((deletion, insertion))
        for name, curve in (("deletion", deletion), ("insertion", insertion)):
            area = (curve[0] / 2 + sum(curve[1:4]) + curve[4] / 2) / 4
            assert row[name] == pytest.approx(area, abs=1e-5)
    means = evaluation.summary["curves"]["transferred"]
    np.testing.assert_allclose(means["deletion"], np.mean([c[0] for c in curves], 0), atol=1e-5)
    np.testing.assert_allclose(means["insertion"], np.mean([c[1] for c in curves], 0), atol=1e-5)


def test_road_and_average_drop_one_picture_at_a_time(sampled: Sampled) -> None:
    for one, row in sampled:
        gone = (one.without(205) != one.inputs).any(0)
        filled = noisy_linear_imputation(one.inputs[None], gone[None])[0]
        whole = one.similarity(one.inputs)
        assert row["road_drop"] == pytest.approx(whole - one.similarity(filled), abs=1e-5)
        shown = (one.map - one.map.min()) / (one.map.max() - one.map.min())
        masked, base = one.similarity(one.inputs * shown), one.similarity(0 * one.inputs)
        if whole > base:
            drop = min(max(whole - masked, 0) / (whole - base), 1)
            assert row["drop"] == pytest.approx(drop, abs=1e-4)
        assert row["increase"] == (masked > whole)


def test_localisation_and_its_controls_literally(site, network, sampled) -> None:
    text = (site / "boxes.csv").read_text()
    lines = {line.split(",")[0]: line.split(",") for line in text.splitlines()}
    with Index.open(site / "index") as index:
        gallery = Gallery(index)
        for one, row in sampled:
            edges = np.array(lines[f"queries/{row['id']}"][1:5], float)
            inside = box_mask(edges * [32 / 48, 32 / 40, 32 / 48, 32 / 40], 32, 32)

            assert row["energy"] == pytest.approx(energy_in_mask(one.map, inside), rel=1e-4)
            assert row["area"] == pytest.approx(inside.mean())
            features = network.forward(one.inputs[None])
            activations = features.activations[0].numpy()

            near = index.search(features.embedding.numpy(), 2).positions[0]
            wrong = wrong_rows(gallery, Question(near, [-1], row["label"], row["id"]), 0)
            assert not {row["label"]} & set(index.labels[wrong])
            theirs = index.weights(wrong)
            mixed = sum(w / np.linalg.norm(w) / 2 for w in theirs)
            assert row["wrong images: energy"] != pytest.approx(row["energy"], rel=1e-3)
            for name, weights in (
                ("wrong images", mixed),
                ("random weights", random_weights([8], 0, row["id"])[0][0]),
                ("mean activation", np.ones(8, np.float32)),
            ):
                energy = energy_in_mask(resize(cam(weights, activations), (32, 32)), inside)
                assert row[f"{name}: energy"] == pytest.approx(energy, rel=1e-3)


def test_fidelity_literally(site: Path, network: EmbeddingNetwork, tmp_path: Path) -> None:
    """The own map by autograd on the query, the other by the index, and numpy's correlation."""
    build(site / "photos", tmp_path / "index", network, Recipe(target="margin"))
    source = find_images(site / "queries")
    told = measure(
        tmp_path / "index", source, network, measures=("fidelity",), fidelity=4, batch_size=3
    ).summary["fidelity"]
    explainer, module = Explainer(tmp_path / "index", network), network.module
    index = explainer.index
    kinds: dict[str, dict[int, list[float]]] = {kind: {} for kind in RESULTS}
    for position in sample(9, 4, 0).tolist():
        inputs, label = SQUASH(Image.open(source.name(position))), source.labels[position]
        ids = explainer.explain(inputs, n_neighbors=12).ids
        near = [index.position(name) for name in ids]
        rest = negatives_for(index, near[:2], [index.labels[row] for row in near[:2]])
        activations = module.relu(module.conv(torch.from_numpy(inputs)[None])).detach()
        activations.requires_grad_()
        embedding = torch.nn.functional.normalize(module.head(activations))[0]
        apart = index.embeddings(near[:2]).mean(0) - rest.mean(0)
        (gradient,) = torch.autograd.grad(2 * embedding @ torch.from_numpy(apart), activations)
        own = (gradient.mean((2, 3), keepdim=True) * activations).sum(1)[0].detach().numpy()
        alike = [name for name in ids if name.split("/")[0] == label]
        results = (ids, alike, [name for name in ids if name not in alike])
        for kind, names in zip(RESULTS, results, strict=True):
            for count in (n for n in (1, 2, 5, 10) if n <= len(names)):
                weights = explainer.explain(inputs, neighbors=names[:count]).weights
                other = np.einsum("k,khw->hw", weights, activations[0].detach().numpy())
                figure = np.corrcoef(own.ravel(), other.ravel())[0, 1]
                kinds[kind].setdefault(count, []).append(figure)
    assert {kind: [one["n_neighbors"] for one in line] for kind, line in told.items()} == {
        RESULTS[0]: [1, 2, 5, 10], RESULTS[1]: [1, 2], RESULTS[2]: [1, 2, 5]
    }  # fmt: skip
    for kind, line in told.items():
        for one in line:
            figures = kinds[kind][one["n_neighbors"]]
            assert (one["n"], one["mean"]) == (4, pytest.approx(np.mean(figures), abs=1e-4))
    assert abs(told[RESULTS[1]][0]["mean"] - told[RESULTS[2]][0]["mean"]) > 0.01


def test_fidelity_is_never_one_where_a_label_shares_its_weights(site, network, tmp_path) -> None:
    build(site / "photos", tmp_path / "index", network, Recipe(target="discriminant"))
    some = {"measures": ("fidelity",), "fidelity": 12}
    told = measure(tmp_path / "index", find_images(site / "photos"), network, **some)
    own = told.summary["fidelity"][RESULTS[1]]
    assert [one["n_neighbors"] for one in own] == [1, 2]  # of four images a label, one is asked
    assert all(one["mean"] < 0.999 for one in own)
    (table,) = [one for one in tables(told.summary) if one.caption.startswith("Transfer")]
    assert [row[0] for row in table.rows] == list(RESULTS)


def _share(drawn: np.ndarray, side: int) -> float:
    halves = drawn[:, :32].sum(), drawn[:, 32:].sum()
    return float(halves[side] / sum(halves)) if sum(halves) else 0.5


def test_scenes_literally(site: Path, network: EmbeddingNetwork, evaluation: Evaluation) -> None:
    assert len(evaluation.scenes) == 8
    salient: dict[tuple[int, int], float] = defaultdict(float)
    explainer = Explainer(site / "index", network)
    source = find_images(site / "queries")
    index = explainer.index
    gallery = Gallery(index)
    for row in evaluation.scenes:
        inputs = [SQUASH(Image.open(source.name(row[name]))) for name in ("first", "second")]
        scene = np.concatenate(inputs, 2)
        assert scene.shape == (3, 32, 64)
        embedding = network.forward(scene[None]).embedding[0].numpy()
        apart = {
            index.ids[i]: ((index.embeddings([i])[0] - embedding) ** 2).sum()
            for i in range(12)
            if index.labels[i] == row["label"]
        }
        nearest = min(apart, key=apart.__getitem__)
        assert row["result"] == nearest
        share = _share(explainer.explain(scene, neighbors=[nearest]).cam, row["side"])
        assert row["share"] == pytest.approx(share, abs=1e-5)
        assert row["right"] == (share > 0.5) + 0.5 * (share == 0.5)
        moved = permuted_rows(gallery, np.array([index.position(nearest)]), [-1])
        drawn = explainer.explain(scene, neighbors=[index.ids[int(moved[0])]]).cam
        share = _share(drawn, row["side"])
        assert row["shuffled index: share"] == pytest.approx(share, abs=1e-5)
        salient[row["first"], row["second"]] += row["mean activation: share"]
    assert list(salient.values()) == pytest.approx([1] * 4)  # it ignores the question
    apart = [row["objects_auc"] - row["shuffled index: objects_auc"] for row in evaluation.scenes]
    checks = {one["flag"].partition(" ")[0]: one for one in evaluation.summary["checks"]}
    check = checks["tells"]
    assert check["mean"] == pytest.approx(np.mean(apart))
    assert check["raised"] == (check["low"] <= 0)
    assert (check["says"] in evaluation.summary["flags"]) == check["raised"]


def test_scenes_of_indexed_images_leave_both_out(site, network, monkeypatch) -> None:
    asked: list[int] = []
    transferred = Mapper.transferred

    def noted(self: Mapper, seen: Any, rows: Any) -> Any:
        if len(rows) == len(rows[0]) == 1:
            asked.append(int(rows[0][0]))
        return transferred(self, seen, rows)

    monkeypatch.setattr(Mapper, "transferred", noted)
    some = {"measures": ("objects",), "scenes": 30, "examples": 0}
    told = run(site, network, images="photos", **some)
    ids = find_images(site / "photos").ids
    with Index.open(site / "index") as index:
        names = [(index.ids[place], index.labels[place]) for place in asked]
    assert len(names) == 3 * len(told.scenes) == 180
    for row, (result, label), (wrong, other), (moved, _) in zip(
        told.scenes, names[::3], names[1::3], names[2::3], strict=True
    ):
        assert (row["result"], row["label"]) == (result, label)
        assert other != label
        assert not {ids[row["first"]], ids[row["second"]]} & {result, wrong, moved}


def test_boxes_of_several_labels_literally(site, network, tmp_path) -> None:
    (tmp_path / "both").mkdir()
    lines = ["path,x0,y0,x1,y1,label"]
    for number in range(3):
        both = Image.new("RGB", (96, 40))
        for side in (0, 1):
            both.paste(picture((number + side) % 3, 80 + number), (48 * side, 0))
            edges = f"{48 * side},0,{48 * side + 48},40"
            lines.append(f"{number}.png,{edges},{(number + side) % 3}")
        both.save(tmp_path / "both" / f"{number}.png")
    (tmp_path / "both/boxes.csv").write_text(
        "\n".join([*lines, "0.png,0,0,9,9,stranger", "2.png,0,0,3,3,1"])
    )
    source = find_images(tmp_path / "both")
    told = measure(
        site / "index", source, network, boxes=tmp_path / "both/boxes.csv", measures=("objects",)
    )
    asked = [(row["first"], row["label"]) for row in told.scenes]
    assert asked == [(0, "0"), (0, "1"), (1, "1"), (1, "2"), (2, "2"), (2, "0")]
    explainer = Explainer(site / "index", network)
    for place, row in enumerate(told.scenes):
        drawn = explainer.explain(source.name(row["first"]), neighbors=[row["result"]]).cam
        left, right = drawn[:, :16].sum(), drawn[:, 16:].sum()
        if row["first"] == 0:  # what the stranger's box covers is nobody's alone
            left -= (drawn * box_mask((0, 0, 3, 7.2), 32, 32)).sum()
        if left + right > 0:
            share = (left, right)[place % 2] / (left + right)
            assert row["share"] == pytest.approx(share, abs=1e-4)
    assert told.summary["objects"]["boxes of several labels"]["questions"] == 6
    # The boxes of what was asked for are dashed in a colour of their own, and said to be.
    assert len(told.examples) == 2
    for row in told.examples:
        asked_for = row.query.caption.removeprefix("asked for ")
        assert row.query.subcaption.endswith(f"\ndashed: {asked_for}")
        pixels = np.asarray(row.query.image)
        assert ((pixels == TRUE_BOX).all(2)).sum() > 40


def test_examples_say_what_they_are_ordered_by(evaluation: Evaluation) -> None:
    auc, share = "pixel AUC", "the AUC of the object against the other"
    assert [row.title for row in evaluation.examples] == [
        f"Two pictures, best by {share}", f"Two pictures, worst by {share}",
        f"One picture, best by {auc}", f"One picture, worst by {auc}",
    ]  # fmt: skip
    dashed = [row.query.subcaption.endswith("dashed: the true box") for row in evaluation.examples]
    assert dashed == [False, False, True, True]


def test_an_indexed_image_never_explains_itself(site: Path, network: EmbeddingNetwork) -> None:
    told = run(site, network, images="photos")
    assert all(row["indexed"] and row["result"] != row["id"] for row in told.rows)
    assert told.summary["images"]["indexed"] == 12
    with Index.open(site / "index") as index:
        embeddings, labels = index.embeddings(np.arange(12)), index.labels[np.arange(12)]
    retrieval = told.summary["retrieval"]
    for k in (1, 5, 10):
        assert retrieval[f"recall_{k}"]["mean"] == pytest.approx(recall_at_k(embeddings, labels, k))
    assert retrieval["map_at_r"]["mean"] == pytest.approx(map_at_r(embeddings, labels))


def test_the_same_id_elsewhere_is_the_same_image_only_if_it_looks_the_same(site, network, tmp_path):
    (tmp_path / "moved/0").mkdir(parents=True)
    picture(0, 0).save(tmp_path / "moved/0/0.png")  # what was indexed, moved
    picture(1, 77).save(tmp_path / "moved/0/1.png")  # another picture of an indexed name
    moved = find_images(tmp_path / "moved")
    told = measure(site / "index", moved, network, measures=("retrieval",))
    assert [row["indexed"] for row in told.rows] == [True, False]
    # An index of the query alone is refused.
    write_photos(tmp_path / "photos", labels=2, each=2)
    build(tmp_path / "photos", tmp_path / "index", network)
    remove(tmp_path / "index", ["0/1.png", "1/0.png", "1/1.png"])
    with pytest.raises(InputError, match="holds nothing but the query itself"):
        run(tmp_path, network, images="photos", measures=("retrieval",))


def test_the_shuffled_network_keeps_numbers_and_leaves_the_original_alone(network) -> None:
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    image = torch.from_numpy(network.probe_images(1))
    here = network.forward(image).embedding
    other = ShuffledNetwork(network, 0, network.probe_images(2))
    assert other.count == 2  # a convolution and a linear layer
    assert other.stages[-1] == 2
    other.shuffle(2)
    assert not torch.allclose(other.network.forward(image).embedding, here)
    for name, value in other.network.module.state_dict().items():
        torch.testing.assert_close(value.flatten().sort()[0], before[name].flatten().sort()[0])
        torch.testing.assert_close(network.module.state_dict()[name], before[name])
    other.shuffle(1)
    head = other.network.module
    torch.testing.assert_close(head.conv.weight, before["conv.weight"])
    assert not torch.equal(head.linear.weight, before["linear.weight"])
    other.shuffle(0)
    torch.testing.assert_close(other.network.forward(image).embedding, here)


def test_batch_norms_of_the_shuffled_network_are_measured_anew() -> None:
    network = EmbeddingNetwork(toys.toy(), "relu")
    images = toys.images(4).numpy()
    other = ShuffledNetwork(network, 0, images)
    norm = other.network.module.norm
    before = norm.running_mean.clone()
    for modules in (other.count, 0, other.count):
        other.shuffle(modules)
        if modules:
            seen = other.network.module.conv(torch.from_numpy(images)).transpose(0, 1).flatten(1)
            torch.testing.assert_close(norm.running_mean, seen.mean(1))
            torch.testing.assert_close(norm.running_var, seen.var(1))
        else:
            torch.testing.assert_close(norm.running_mean, before)
        assert not norm.training
        assert norm.momentum == 0.1
    assert not network.module.norm.training


def test_without_controls_nothing_is_compared(site: Path, network: EmbeddingNetwork) -> None:
    told = run(site, network, controls=False, boxes=site / "boxes.csv").summary
    assert (told["controls"], told["flags"], told["sanity"]) == ({}, [], [])
    assert list(told["curves"]) == ["transferred"]
    assert told["faithfulness"]["rank_drop"]["n"] == 3
    # One wholly masked, and 3 + 3 + 3 pictures of one map, of each of three queries.
    assert told["masked_passes"] == 3 * (1 + 3 + 3 + 3)
