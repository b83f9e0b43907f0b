"""The distinctive target, the default: what an image's kind shares, and a part of its own."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from build_samples import pictures, quicken, toy

from embedcam import DirectWeights, Index, Recipe, build_index
from embedcam.errors import RecipeError
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.targets import Whitened

RECIPE = Recipe(encoding="dense", dtype="float32", faiss="none")


def unit(vector: np.ndarray) -> np.ndarray:
    length = sum(float(value) ** 2 for value in vector) ** 0.5
    return vector / length if length > 0 else vector


def literal(vectors: np.ndarray, labels: list[str | None], norm: str, row: int) -> np.ndarray:
    """One image at a time: whitening, margins, a share of the norm, the label's mean, its own."""
    x = [np.array([float(value) for value in vector]) for vector in vectors]
    n, width = len(x), len(x[0])
    mean = sum(x) / n
    c = sum(np.outer(one - mean, one - mean) for one in x) / n
    load = 10 * sum(c[a, a] for a in range(width)) / width
    c = c + load * np.eye(width)
    alike = [i for i in range(n) if i == row or (labels[row] and labels[i] == labels[row])]
    kind = np.zeros(width)
    for i in alike:
        others = [j for j in range(n) if j != i]
        near = sorted(others, key=lambda j: float(((x[j] - x[i]) ** 2).sum()))
        near = near[: max(1, min(10, (n - 1) // 3))]
        nearest = sum(x[j] for j in near) / len(near)
        if len(alike) == 1:
            positive = nearest
            negatives = [j for j in others if j not in near]
            share = 1.0
        else:
            same = [j for j in alike if j != i]
            positive = sum(x[j] for j in same) / len(same)
            if len(alike) <= 10:
                borrowed = (10 - len(same)) / 20
                positive = (1 - borrowed) * positive + borrowed * nearest
            negatives = [j for j in others if j not in alike]
            share = 0.5
        negative = sum(x[j] for j in negatives) / len(negatives)
        white = np.linalg.solve(c, 2 * (positive - negative))
        if norm == "through" and abs(sum(x[i] ** 2) - 1) < 1e-3:
            white = white - share * float(sum(white * x[i])) * x[i]
        kind += white / len(alike)
    own = 1.5 if len(alike) == 1 else 0.2
    return unit(kind) + own * unit(x[row] - mean)


def some(of_unit_length: bool = True) -> tuple[np.ndarray, list[str | None]]:
    """A label of 13 images, one of 4, two without any."""
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(19, 4)) + np.eye(4)[0]
    vectors[:13] += 1.5 * np.eye(4)[1]
    if of_unit_length:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), ["many"] * 13 + ["few"] * 4 + [None] * 2


@pytest.mark.parametrize("of_unit_length", [True, False])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_the_cotangent_is_the_literal_one(
    of_unit_length: bool, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcam.offline.cotangents._BLOCK", 5)
    monkeypatch.setattr("embedcam.offline.triplets._SUMMED", 5)
    vectors, labels = some(of_unit_length)
    recipe = Recipe(norm=norm)
    anchors = AnchorCotangents(recipe, vectors, label_codes(labels), vectors.mean(0))
    rows = [3, 14, 18, 0]
    found = anchors.of(np.array(rows)).values
    for at, row in enumerate(rows):
        expected = literal(vectors, labels, norm, row)
        np.testing.assert_allclose(found[at], expected, rtol=1e-3, atol=1e-4)
        other = literal(vectors, labels, norm, row - 3)
        assert np.abs(found[at] - other).max() > 1e-2, "the oracle cannot tell images apart"


def test_without_labels_every_image_asks_what_its_nearest_share() -> None:
    vectors, _ = some()
    found = AnchorCotangents(Recipe(), vectors, None, vectors.mean(0)).of(np.arange(19)).values
    # Of so few images no more than a half may be kept from the negatives.
    nearest = [literal_unlabelled(vectors, row) for row in range(19)]
    np.testing.assert_allclose(found, nearest, rtol=1e-3, atol=1e-4)


def literal_unlabelled(vectors: np.ndarray, row: int) -> np.ndarray:
    x = vectors.astype(np.float64)
    order = sorted((i for i in range(19) if i != row), key=lambda i: ((x[i] - x[row]) ** 2).sum())
    positive, negative = x[order[:6]].mean(0), x[order[9:]].mean(0)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / 19
    load = 10 * np.trace(covariance) / 4
    white = np.linalg.solve(covariance + load * np.eye(4), 2 * (positive - negative))
    white = white - (white @ x[row]) * x[row]
    return unit(white) + 1.5 * unit(x[row] - x.mean(0))


def test_every_image_has_an_answer_of_its_own() -> None:
    vectors, labels = some()
    anchors = AnchorCotangents(Recipe(), vectors, label_codes(labels), vectors.mean(0))
    found = anchors.of(np.arange(13)).values
    assert len(np.unique(found.round(5), axis=0)) == 13


def test_embeddings_without_spread_give_no_answer() -> None:
    vectors = np.tile(np.array([[1.0, 0, 0]], np.float32), (6, 1))
    anchors = AnchorCotangents(Recipe(), vectors, np.arange(6) % 2, vectors.mean(0))
    assert not anchors.of(np.arange(6)).values.any()


def test_it_is_what_auto_stands_for_and_what_an_index_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("affine"), pictures(tmp_path / "photos")
    build_index(source, made_of.network, tmp_path / "index", RECIPE, progress=False)
    with Index.open(tmp_path / "index") as index:
        assert index.manifest.recipe["target"] == index.manifest.target == "distinctive"
        assert Recipe.of_index(index.manifest) == RECIPE.resolved


def test_an_older_index_keeps_the_target_that_auto_stood_for() -> None:
    older = SimpleNamespace(recipe=Recipe().to_dict(), target="discriminant")
    assert Recipe.of_index(older).resolved_target == "discriminant"


def test_on_a_query_its_neighbors_stand_for_the_label() -> None:
    made_of = toy("affine")
    batch = (
        np.random.default_rng(1)
        .normal(size=(1, *made_of.network.probe_images().shape[1:]))
        .astype(np.float32)
    )
    own = made_of.network.forward(batch).embedding[0].numpy().astype(np.float64)
    generator = np.random.default_rng(0)
    others = generator.normal(size=(9, len(own)))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    positives, negatives = others[:3], others[3:]
    found = DirectWeights(made_of.network, RECIPE).weights(batch[0], positives, negatives)[0]
    mean = others.mean(0)
    covariance = (others - mean).T @ (others - mean) / 9
    load = 10 * np.trace(covariance) / len(own)
    white = np.linalg.solve(
        covariance + load * np.eye(len(own)), 2 * (positives.mean(0) - negatives.mean(0))
    )
    kind = white - 0.5 * (white @ own) * own
    cotangent = unit(kind) + 0.2 * unit(own - mean)
    matrix = made_of.network.head_kind.matrix
    grid = made_of.network.forward(batch).activations.shape[-2:]
    expected = cotangent @ matrix / np.prod(grid)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_draw_or_a_hinge_goes_with_triplets_alone() -> None:
    with pytest.raises(RecipeError, match="'distinctive' takes every triplet in closed form"):
        Recipe(target="distinctive", triplets=9)
    with pytest.raises(RecipeError, match="'distinctive' takes every triplet, so sampling"):
        Recipe(target="distinctive", sampling="hard")
    assert Whitened.of("distinctive", "around", True).jacobian == 0
