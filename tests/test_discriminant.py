"""The discriminant target: the margin in whitened embeddings, shared by a label's images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from build_samples import Toy, inputs, opened, pictures, quicken, toy

from embedcam import Recipe, add_images, build_index
from embedcam.errors import RecipeError
from embedcam.images import ImageSource
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes

RECIPE = Recipe(target="discriminant", encoding="dense", dtype="float32", faiss="none")


def literal(vectors: np.ndarray, labels: list[str], norm: str, row: int) -> np.ndarray:
    """One number at a time: whitening, margins, the norm, and the mean over the label."""
    n, width = vectors.shape
    x = [[float(value) for value in vector] for vector in vectors]
    mean = [sum(x[i][a] for i in range(n)) / n for a in range(width)]
    c = np.zeros((width, width))
    for a in range(width):
        for b in range(width):
            c[a, b] = sum((x[i][a] - mean[a]) * (x[i][b] - mean[b]) for i in range(n)) / n
    load = sum(c[a, a] for a in range(width)) / width
    for a in range(width):
        c[a, a] += load
    members = [i for i in range(n) if labels[i] == labels[row]]
    total = np.zeros(width)
    for i in members:
        positives = [j for j in members if j != i]
        negatives = [j for j in range(n) if labels[j] != labels[row]]
        margin = np.zeros(width)
        for p in positives:
            for q in negatives:
                for a in range(width):
                    margin[a] += 2 * (x[p][a] - x[q][a]) / len(positives) / len(negatives)
        white = np.linalg.solve(c, margin)
        if norm == "through" and abs(sum(value**2 for value in x[i]) - 1) < 1e-3:
            along = sum(x[i][a] * white[a] for a in range(width))
            white = white - along * np.array(x[i])
        total += white / len(members)
    return total


def some(unit: bool) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(14, 4)) + np.eye(4)[0]
    vectors[::2] += 1.5 * np.eye(4)[1]
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), ["even" if i % 2 == 0 else "odd" for i in range(14)]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_the_cotangent_is_the_literal_one(
    unit: bool, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcam.offline.cotangents._BLOCK", 5)
    monkeypatch.setattr("embedcam.offline.triplets._SUMMED", 5)
    vectors, labels = some(unit)
    recipe = replace(RECIPE, norm=norm)
    anchors = AnchorCotangents(recipe, vectors, label_codes(list(labels)), vectors.mean(0))
    found = anchors.of(np.array([3, 0, 9]))
    for at, row in enumerate((3, 0, 9)):
        expected = literal(vectors, labels, norm, row)
        np.testing.assert_allclose(found.values[at], expected, rtol=2e-4, atol=1e-5)
        other = literal(vectors, labels, norm, row + 1)
        assert np.abs(found.values[at] - other).max() > 0.1
    assert found.used is None
    assert found.counts.tolist() == [6 * 7] * 3


def test_images_without_a_label_among_labelled_ones_share_with_none_and_take_no_room() -> None:
    vectors, names = some(True)
    labels = [name if i < 6 else None for i, name in enumerate(names)]
    anchors = AnchorCotangents(RECIPE, vectors, label_codes(labels), vectors.mean(0))
    found = anchors.of(np.arange(14))
    x = vectors.astype(np.float64)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / 14
    whitening = np.linalg.inv(covariance + np.trace(covariance) / 4 * np.eye(4))
    own = []
    for row in range(14):
        apart = ((x - x[row]) ** 2).sum(1)
        others = [i for i in range(14) if i != row]
        if labels[row] is None:
            positives = sorted(others, key=apart.__getitem__)[:4]  # a third of the others
            negatives = [i for i in others if i not in positives]
        else:
            positives = [i for i in others if labels[i] == labels[row]]
            negatives = [i for i in others if labels[i] != labels[row]]
        white = 2 * (x[positives].mean(0) - x[negatives].mean(0)) @ whitening
        own.append(white - (white @ x[row]) * x[row])
        assert found.counts[row] == len(positives) * len(negatives)
    for row in range(14):
        alike = [i for i in range(14) if i == row or (labels[i] and labels[i] == labels[row])]
        expected = np.mean([own[i] for i in alike], axis=0)
        np.testing.assert_allclose(found.values[row], expected, rtol=1e-3, atol=1e-4)
    assert anchors.sampler is not None
    # Of a collection that is mostly unlabelled they would be as many as its embeddings.
    assert anchors._class_sums.shape == anchors.sampler._class_sums.shape == (2, 4)


def test_without_labels_it_is_the_images_own() -> None:
    vectors, _ = some(True)
    margin, found = (
        AnchorCotangents(recipe, vectors, None, vectors.mean(0)).of(np.arange(14)).values
        for recipe in (Recipe(target="margin"), RECIPE)
    )
    centred = vectors - vectors.mean(0)
    covariance = centred.T @ centred / 14
    white = margin @ np.linalg.inv(covariance + np.trace(covariance) / 4 * np.eye(4))
    white -= vectors * (vectors * white).sum(1, keepdims=True)
    np.testing.assert_allclose(found, white, rtol=1e-3, atol=1e-5)


def test_embeddings_without_spread_are_not_whitened() -> None:
    vectors = np.tile(np.array([[1.0, 0, 0]], np.float32), (6, 1))
    anchors = AnchorCotangents(RECIPE, vectors, np.arange(6) % 2, vectors.mean(0))
    assert not anchors.of(np.arange(6)).values.any()


@pytest.mark.parametrize("kind", ["affine", "pooled", "other", "tokens"])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_a_build_differentiates_along_it_and_not_through_the_norm_again(
    kind: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy(kind), pictures(tmp_path / "photos")
    recipe = replace(RECIPE, norm=norm)
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    check(made_of, source, tmp_path / "index", recipe)


@pytest.mark.parametrize("method", ["scorecam", "ablationcam", "hirescam", "gradcam++"])
def test_other_methods_take_the_same_direction(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("other"), pictures(tmp_path / "photos")
    encoding = "low-rank" if method == "hirescam" else "dense"
    recipe = replace(RECIPE, method=method, encoding=encoding)
    build_index(source, made_of.network, tmp_path / "index", recipe, progress=False)
    with opened(tmp_path / "index") as (index, live):
        assert index.weights(live).any()


def check(made_of: Toy, source: ImageSource, path: Path, recipe: Recipe) -> None:
    with opened(path) as (index, live):
        index.verify()
        assert index.manifest.target == "discriminant"
        assert index.manifest.triplets.sampling == "all"
        vectors, stored = index.embeddings(live), index.weights(live)
        labels = [str(label) for label in index.labels[live]]
    maps = made_of.network.forward(inputs(made_of, source)).activations.double()
    for row in (0, 5):
        direction = torch.from_numpy(literal(vectors, labels, recipe.norm, row))
        leaf = maps[row : row + 1].clone().requires_grad_()
        z = made_of.head(leaf)
        (gradient,) = torch.autograd.grad((z[0] * direction).sum(), leaf)
        expected = gradient[0].mean((1, 2)).numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(stored[row], expected, rtol=2e-3, atol=2e-4 * scale)


def test_added_images_take_what_their_label_shares_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made_of, source = toy("affine"), pictures(tmp_path / "photos", n=14)
    first = ImageSource(source.items[:10], source.root)
    rest = ImageSource(source.items[10:], source.root)
    path = tmp_path / "index"
    build_index(first, made_of.network, path, RECIPE, progress=False)
    add_images(rest, made_of.network, path, progress=False)
    with opened(path) as (index, live):
        order = [index.ids[place] for place in live]
        vectors, stored = index.embeddings(live), index.weights(live)
        labels = [str(label) for label in index.labels[live]]
    assert len(order) == 14
    maps = made_of.network.forward(inputs(made_of, rest)).activations.double()
    direction = torch.from_numpy(literal(vectors, labels, "through", 11))
    leaf = maps[1:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((made_of.head(leaf)[0] * direction).sum(), leaf)
    expected = gradient[0].mean((1, 2)).numpy()
    np.testing.assert_allclose(stored[11], expected, rtol=2e-3, atol=2e-4 * abs(expected).max())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"hinge": True}, "takes every triplet in closed form"),
        ({"triplets": 50}, "takes every triplet in closed form"),
        ({"sampling": "hard"}, "takes every triplet, so sampling = 'hard' means nothing"),
    ],
)
def test_what_it_does_not_take_is_refused(choices: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(Recipe(target="discriminant"), **choices)
