"""The whitened targets: discriminant, and distinctive, the default, against a literal loop."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from build_samples import CELLS, Toy, activations_of, opened, pictures, toy

from embedcam import DirectWeights, Index, Recipe, add_images, build_index
from embedcam.errors import RecipeError
from embedcam.images import ImageSource
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.targets import Whitened

pytestmark = pytest.mark.usefixtures("quick")
TARGETS = ["discriminant", "distinctive"]
DISTINCTIVE = Recipe(encoding="dense", dtype="float32", faiss="none")
RECIPE = replace(DISTINCTIVE, target="discriminant")


def unit(vector: np.ndarray) -> np.ndarray:
    length = sum(float(value) ** 2 for value in vector) ** 0.5
    return vector / length if length > 0 else vector


def literal(target, vectors: np.ndarray, labels: list[str | None], norm: str, row: int):
    """One image at a time: whitening, margins, a share of the norm, the label's mean, its own."""
    plain = target == "discriminant"
    x = [np.array([float(value) for value in vector]) for vector in vectors]
    n, width = len(x), len(x[0])
    mean = sum(x) / n
    c = sum(np.outer(one - mean, one - mean) for one in x) / n
    load = (1 if plain else 10) * sum(c[a, a] for a in range(width)) / width
    c = c + load * np.eye(width)
    alike = [i for i in range(n) if i == row or (labels[row] and labels[i] == labels[row])]
    kind = np.zeros(width)
    for i in alike:
        others = [j for j in range(n) if j != i]
        order = sorted(others, key=lambda j: float(((x[j] - x[i]) ** 2).sum()))
        near = order[: max(1, min(10, (n - 1) // 3))]
        nearest = sum(x[j] for j in near) / len(near)
        if len(alike) == 1:
            # Of few images without any label no more than half are kept from the negatives.
            excluded = near if any(labels) else order[: (n - 1) // 2]
            positive, share = nearest, 1.0
        else:
            excluded, share = alike, 1.0 if plain else 0.5
            same = [j for j in alike if j != i]
            positive = sum(x[j] for j in same) / len(same)
            if len(alike) <= 10 and not plain:
                borrowed = (10 - len(same)) / 20
                positive = (1 - borrowed) * positive + borrowed * nearest
        negatives = [j for j in others if j not in excluded]
        negative = sum(x[j] for j in negatives) / len(negatives)
        white = np.linalg.solve(c, 2 * (positive - negative))
        if norm == "through" and abs(sum(x[i] ** 2) - 1) < 1e-3:
            white = white - share * float(sum(white * x[i])) * x[i]
        kind += white / len(alike)
    own = 1.5 if len(alike) == 1 else 0.2
    return kind if plain else unit(kind) + own * unit(x[row] - mean)


def some(of_unit_length: bool = True) -> tuple[np.ndarray, list[str | None]]:
    """A label of 13 images, one of 4, two without any."""
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(19, 4)) + np.eye(4)[0]
    vectors[:13] += 1.5 * np.eye(4)[1]
    if of_unit_length:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), ["many"] * 13 + ["few"] * 4 + [None] * 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("of_unit_length", [True, False])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_the_cotangent_is_the_literal_one(target, of_unit_length, norm, monkeypatch) -> None:
    monkeypatch.setattr("embedcam.offline.triplets.SUMMED", 5)
    vectors, labels = some(of_unit_length)
    recipe = Recipe(target=target, norm=norm)
    anchors = AnchorCotangents(recipe, vectors, label_codes(labels), vectors.mean(0))
    found = anchors.of(np.array([3, 14, 18, 0]))
    for at, (row, other) in enumerate(((3, 14), (14, 18), (18, 0), (0, 14))):
        expected = literal(target, vectors, labels, norm, row)
        np.testing.assert_allclose(found.values[at], expected, rtol=1e-3, atol=1e-4)
        apart = np.abs(found.values[at] - literal(target, vectors, labels, norm, other))
        assert apart.max() > 1e-2, "the oracle cannot tell images apart"
    assert found.used is None
    assert found.counts.tolist() == [12 * 6, 3 * 15, 6 * 12, 12 * 6]
    # Of a collection that is mostly unlabelled they would be as many as its embeddings.
    sums = anchors.statistics()
    assert {name: array.shape for name, array in sums.items()} == {
        "total": (4,), "squares": (4, 4), "class_sums": (2, 4), "label_sums": (2, 4)
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_without_labels_every_image_asks_what_its_nearest_share(target) -> None:
    vectors, _ = some()
    anchors = AnchorCotangents(Recipe(target=target), vectors, None, vectors.mean(0))
    nearest = [literal(target, vectors, [None] * 19, "through", row) for row in range(19)]
    np.testing.assert_allclose(anchors.of(np.arange(19)).values, nearest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_without_spread_give_no_answer(target) -> None:
    vectors = np.tile(np.array([[1.0, 0, 0]], np.float32), (6, 1))
    anchors = AnchorCotangents(Recipe(target=target), vectors, np.arange(6) % 2, vectors.mean(0))
    assert not anchors.of(np.arange(6)).values.any()


def test_it_is_what_auto_stands_for_and_what_an_index_keeps(tmp_path) -> None:
    made_of, source = toy("affine"), pictures(tmp_path / "photos")
    build_index(source, made_of.network, tmp_path / "index", DISTINCTIVE, progress=False)
    with Index.open(tmp_path / "index") as index:
        assert index.manifest.recipe["target"] == index.manifest.target == "distinctive"
        assert Recipe.of_index(index.manifest) == DISTINCTIVE.resolved
    older = SimpleNamespace(recipe=Recipe().to_dict(), target="discriminant")
    assert Recipe.of_index(older).resolved_target == "discriminant"


def test_on_a_query_its_neighbors_stand_for_the_label() -> None:
    made_of = toy("affine")
    shape = made_of.network.probe_images().shape[1:]
    batch = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    own = made_of.network.forward(batch).embedding[0].numpy().astype(np.float64)
    generator = np.random.default_rng(0)
    others = generator.normal(size=(9, len(own)))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    positives, negatives = others[:3], others[3:]
    found = DirectWeights(made_of.network, DISTINCTIVE).weights(batch[0], positives, negatives)[0]
    mean = others.mean(0)
    covariance = (others - mean).T @ (others - mean) / 9
    load = 10 * np.trace(covariance) / len(own)
    apart = 2 * (positives.mean(0) - negatives.mean(0))
    white = np.linalg.solve(covariance + load * np.eye(len(own)), apart)
    cotangent = unit(white - 0.5 * (white @ own) * own) + 0.2 * unit(own - mean)
    expected = cotangent @ made_of.network.head_kind.matrix / CELLS
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def check(made_of: Toy, path: Path, norm: str, maps: torch.Tensor, rows: dict[int, int]) -> None:
    """These rows of the index have the gradient along the literal direction on these maps."""
    with opened(path) as (index, live):
        index.verify()
        assert index.manifest.triplets.sampling == "all"
        vectors, stored = index.embeddings(live), index.weights(live)
        labels = [str(label) for label in index.labels[live]]
    for row, place in rows.items():
        direction = torch.from_numpy(literal("discriminant", vectors, labels, norm, row))
        leaf = maps[place : place + 1].double().requires_grad_()
        (gradient,) = torch.autograd.grad((made_of.head(leaf)[0] * direction).sum(), leaf)
        expected = gradient[0].mean((1, 2)).numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(stored[row], expected, rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("kind", ["affine", "pooled", "other", "tokens"])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_a_build_differentiates_along_it_and_not_through_the_norm_again(
    kind, norm, tmp_path
) -> None:
    made_of, source = toy(kind), pictures(tmp_path / "photos")
    recipe = replace(RECIPE, norm=norm)
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    check(made_of, tmp_path / "index", norm, activations_of(made_of, source), {0: 0, 5: 5})


@pytest.mark.parametrize("method", ["scorecam", "ablationcam", "hirescam", "gradcam++"])
def test_other_methods_take_the_same_direction(method, tmp_path) -> None:
    made_of, source = toy("other"), pictures(tmp_path / "photos")
    encoding = "low-rank" if method == "hirescam" else "dense"
    recipe = replace(RECIPE, method=method, encoding=encoding)
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    with opened(tmp_path / "index") as (index, live):
        assert index.weights(live).any()


def test_added_images_take_what_their_label_shares_by_then(tmp_path) -> None:
    made_of, source = toy("affine"), pictures(tmp_path / "photos", n=14)
    first = ImageSource(source.items[:10], source.root)
    rest = ImageSource(source.items[10:], source.root)
    build_index(first, made_of.network, tmp_path / "index", RECIPE, progress=False)
    add_images(rest, made_of.network, tmp_path / "index", progress=False)
    check(made_of, tmp_path / "index", "through", activations_of(made_of, rest), {11: 1})


@pytest.mark.parametrize("target", TARGETS)
def test_a_draw_or_a_hinge_goes_with_triplets_alone(target) -> None:
    for choices, message in (
        ({"hinge": True}, "takes every triplet in closed form"),
        ({"triplets": 50}, "takes every triplet in closed form"),
        ({"sampling": "hard"}, "takes every triplet, so sampling = 'hard' means nothing"),
    ):
        with pytest.raises(RecipeError, match=f"'{target}' {message}"):
            Recipe(target=target, **choices)
    assert Whitened.of(target, "around", True).jacobian == 0
