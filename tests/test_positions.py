"""Weights by position: against literal loops, through an index, and what refuses them."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import index_samples
import numpy as np
import oracles
import pytest
import torch
from build_samples import (
    CHANNELS,
    activations_of,
    drawn,
    inputs,
    literal_weights,
    off,
    opened,
    paint,
    pictures,
    quicken,
    toy,
)
from test_index_corrupt import edit

from embedcam import Explainer, Index, Recipe, add_images, build_index, cam_for, find_images
from embedcam.errors import IndexFormatError, InputError, RecipeError
from embedcam.evaluate import evaluate_index
from embedcam.index import verify
from embedcam.index.encoding import LowRank, fit_pca, from_spec
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import label_codes
from embedcam.ops import signed_cam, signed_cams
from embedcam.prototypes import compress
from embedcam.report import write_report
from embedcam.targets import Similarity

POSITIONS = Recipe(method="hirescam", dtype="float32")
SAMPLED = replace(POSITIONS, target="margin", sampling="random", triplets=4)
KINDS = ["flattening", "depthwise"]
N = 48
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of enough pictures for trust, and the pictures."""
    folder = tmp_path_factory.mktemp("positions")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        source = pictures(folder / "photos", n=N)
        build_index(source, toy("depthwise").network, folder / "index", POSITIONS, progress=False)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choices", [{}, {"norm": "around"}, {"hinge": True, "margin": 0.5}])
def test_stored_weights_are_the_mean_gradient_of_every_triplet(kind, choices, tmp_path) -> None:
    made_of, source = toy(kind), pictures(tmp_path / "photos")
    recipe = Recipe(**{**SAMPLED.to_dict(), **choices})
    build_index(source, made_of.network, tmp_path / "index", recipe, batch_size=5, progress=False)
    with opened(tmp_path / "index") as (index, live):
        vectors, stored = index.embeddings(live), index.weights(live)
        triplets = drawn(recipe, vectors, list(index.labels[live]))
    expected, _ = literal_weights(made_of, source, recipe, vectors, triplets)
    # Not what its mean over positions would be.
    assert off(expected.mean((2, 3), keepdims=True) + 0 * expected, expected) > 0.5
    assert off(stored, expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_default_target_they_are_the_gradient_along_its_cotangent(kind, tmp_path) -> None:
    made_of, source = toy(kind), pictures(tmp_path / "photos")
    build_index(source, made_of.network, tmp_path / "index", POSITIONS, progress=False)
    activations = activations_of(made_of, source)
    with opened(tmp_path / "index") as (index, live):
        assert index.manifest.target == "distinctive"
        vectors, codes = index.embeddings(live), label_codes(list(index.labels[live]))
        along = AnchorCotangents(POSITIONS, vectors, codes, vectors.mean(0)).of(live).values
        for row, cotangent in enumerate(torch.from_numpy(along)):
            score, how = oracles.dot_score(cotangent), {"normalize": True, "norm": "around"}
            expected = oracles.gradient(made_of.head, activations[row], score, **how)
            assert off(index.weights([row])[0], expected.numpy()) < 1e-4


def test_principal_components_of_channels_and_positions_together() -> None:
    """Weights that three patterns make are kept by three numbers, to their rounding."""
    generator = np.random.default_rng(0)
    patterns, amounts = generator.standard_normal((3, 4, 2, 3)), generator.standard_normal((9, 3))
    weights = np.einsum("nr,rkhw->nkhw", amounts, patterns)
    encoding = fit_pca(weights, 8, "float32")
    rows = encoding.encode(weights)
    assert rows["codes"].shape == (9, 3)
    assert (encoding.n_channels, encoding.grid, encoding.bytes_per_image()) == (4, (2, 3), 12)
    np.testing.assert_allclose(encoding.decode(rows), weights, atol=1e-5)
    unpacked = encoding.unpack(rows)
    lengths = [oracles.l2_norm(row.ravel()) for row in weights]
    np.testing.assert_allclose(encoding.norms(unpacked), lengths, rtol=1e-5)
    shares = generator.standard_normal(9)
    expected = np.einsum("n,nkhw->khw", shares, weights)
    np.testing.assert_allclose(encoding.combine(unpacked, shares), expected, atol=1e-5)
    again = from_spec(json.loads(json.dumps(encoding.spec())), 4, encoding.fitted, [2, 3])
    assert again.spec() == encoding.spec()
    np.testing.assert_array_equal(again.decode(rows), encoding.decode(rows))
    with pytest.raises(InputError, match="need the layer's grid"):
        from_spec(encoding.spec(), 4, encoding.fitted)
    with pytest.raises(InputError, match=r"expected \[R K\*2\*5\] and \[K\*2\*5\]"):
        LowRank(np.zeros((2, 24)), np.zeros(24), grid=(2, 5))


def literal_map(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """The sum over channels, a number at a time."""
    out = np.zeros(weights.shape[1:])
    for k, i, j in np.ndindex(weights.shape):
        out[i, j] += float(weights[k, i, j]) * float(activations[k, i, j])
    return out


def test_a_map_by_position_is_the_sum_over_channels_at_each() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((3, 4, 2, 5)).astype(np.float32)
    weights, activations = numbers[:2], numbers[2]
    expected = [literal_map(row, activations) for row in weights]
    np.testing.assert_allclose(signed_cams(weights, activations), expected, rtol=1e-5)
    np.testing.assert_allclose(signed_cam(weights[0], activations), expected[0], rtol=1e-5)
    both = np.stack([activations] * 2)
    for kind in (np.asarray, torch.from_numpy):
        np.testing.assert_allclose(signed_cam(kind(weights), kind(both)), expected, rtol=1e-5)
    with pytest.raises(InputError, match="weights by position of the activations' own shape"):
        signed_cam(weights[:, :, :1], both)


def embedding_of(made_of, query: np.ndarray) -> np.ndarray:
    return made_of.network.forward(query[None]).embedding[0].numpy()


def test_neighbors_weights_of_length_one_are_averaged_and_draw_the_query(built: Path) -> None:
    made_of, source = toy("depthwise"), find_images(built / "photos")
    query = inputs(made_of, source)[7]
    own = activations_of(made_of, source).numpy()
    with opened(built / "index") as (index, _):
        verify(index.path)
        explainer = Explainer(index, made_of.network, n_neighbors=3)
        why = explainer.explain(query)
        stored = index.weights(index.positions(why.ids)).astype(float)
        expected = sum(one / np.sqrt((one**2).sum()) / 3 for one in stored)
        np.testing.assert_allclose(why.weights, expected, atol=1e-5)
        coarse = explainer.explain_features(embedding_of(made_of, query), own[7])
        np.testing.assert_allclose(coarse.signed_cam, (why.weights * own[7]).sum(0), atol=1e-4)
        assert None not in (why.trust, why.match)
        # What an image itself shows is drawn by its own weights.
        place = [item.id for item in source.items].index(why.ids[0])
        drawn_self = literal_map(stored[0], own[place]).clip(0)
        np.testing.assert_allclose(why.neighbor_cams[0], drawn_self, atol=drawn_self.max() / 100)
        told_apart = explainer.explain(query, result=why.ids[0], above=why.ids[2])
        difference = oracles.rival_weights(stored[0].ravel(), stored[2].ravel())
        np.testing.assert_allclose(told_apart.weights.ravel(), difference, atol=1e-5)


def test_images_are_added_compressed_and_reported(built: Path, tmp_path: Path) -> None:
    made_of = toy("depthwise")
    shutil.copytree(built / "index", tmp_path / "index")
    paint(tmp_path / "more", range(100, 106))
    more = find_images(tmp_path / "more")
    add_images(more, made_of.network, tmp_path / "index", progress=False)
    with opened(tmp_path / "index") as (index, live):
        assert len(live) == N + 6
        assert index.weights(live[-6:]).any((1, 2, 3)).all()
        with Explainer(tmp_path / "index", made_of.network) as explainer:
            write_report(explainer, more, tmp_path / "report", progress=False)
    lines = (tmp_path / "report" / "explanations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    compress(tmp_path / "index", tmp_path / "small", 6, progress=False)
    verify(tmp_path / "small")
    with Index.open(tmp_path / "small") as small, Explainer(small, made_of.network) as explainer:
        assert small.weights([0]).shape == (1, CHANNELS, 4, 4)
        assert explainer.explain(inputs(made_of, more)[0]).signed_cam.any()
        assert small.manifest.compressed.fidelity.cosine["1"].index > 0.5


def test_a_query_of_another_grid_and_a_finer_map_are_refused(built: Path) -> None:
    made_of = toy("depthwise")
    query = inputs(made_of, find_images(built / "photos"))[0]
    activations = np.ones((CHANNELS, 5, 4), np.float32)
    with Explainer(built / "index", made_of.network) as explainer:
        embedding, finer = embedding_of(made_of, query), np.ones((CHANNELS, 8, 8), np.float32)
        with pytest.raises(InputError, match=r"grid of 5 x 4, and this index keeps weights by pos"):
            explainer.explain_features(embedding, activations)
        message = "a query shown larger does not have; leave out detail"
        with pytest.raises(InputError, match=message):
            explainer.explain_features(embedding, finer[:, :4, :4], detail_activations=finer)
        with pytest.raises(InputError, match=message):
            explainer.explain(query, detail=2)


def test_a_build_says_what_a_head_that_does_not_pool_means(tmp_path, caplog) -> None:
    source = pictures(tmp_path / "photos")
    for number, (kind, recipe, said) in enumerate((
        ("flattening", Recipe(), ["--method hirescam"]),
        ("flattening", POSITIONS, ["aligned as the indexed pictures are"]),
        ("affine", Recipe(), []),
        ("other", Recipe(), []),
    )):  # fmt: skip
        path = tmp_path / str(number)
        with caplog.at_level(logging.WARNING, "embedcam"):
            caplog.clear()
            notes = build_index(source, toy(kind).network, path, recipe, progress=False).notes
        with Index.open(path) as index:
            assert bool(index.manifest.layers[0].uses_positions) == bool(said)
        assert caplog.messages == notes
        assert all(part in note for part, note in zip(said, notes, strict=True))


def test_what_cannot_be_kept_by_position_is_refused_before_any_work(tmp_path: Path) -> None:
    source = pictures(tmp_path / "photos")
    with pytest.raises(RecipeError, match="behind average pooling HiResCAM is Grad-CAM"):
        build_index(source, toy("affine").network, tmp_path / "index", POSITIONS, progress=False)
    for encoding in ("dense", "top-m"):
        with pytest.raises(RecipeError, match=f"principal components, and encoding = '{encoding}'"):
            replace(POSITIONS, encoding=encoding)


def test_the_method_gives_its_weights_on_a_picture_too() -> None:
    made_of = toy("depthwise")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = cam_for(made_of.network, images, Similarity(np.ones(5) / 5**0.5), "hirescam")
    activations = made_of.network.forward(images).activations.numpy()
    for row in range(2):
        expected = literal_map(made.weights[row], activations[row]).clip(0)
        np.testing.assert_allclose(made.grid_cam[row], expected, atol=1e-6)


def test_an_evaluation_keeps_to_inputs_of_one_size(built: Path) -> None:
    choices = {"measures": ("objects", "fidelity"), "scenes": 3, "fidelity": 6, "examples": 0}
    source, network = find_images(built / "photos"), toy("depthwise").network
    found = evaluate_index(built / "index", source, network, progress=False, **choices)
    assert "weights by position, for inputs of one size" in " ".join(found.summary["notes"])


def test_an_index_that_says_something_impossible_of_positions_is_refused(tmp_path: Path) -> None:
    good = index_samples.make(tmp_path / "good", kind="by-position")
    verify(good)
    with Index.open(good) as index:
        assert index.weights([0, 1]).shape == (2, index_samples.CHANNELS, *index_samples.GRID)
    for changes, said in (
        ({"grid": None, "cells": None}, "need the layer's grid"),
        ({"grid": [3, 3], "cells": 9}, r"the description says \[3 54\]"),
        ({"channels": 5}, r"the description says \[3 30\]"),
        ({"encoding": {"name": "by-position", "dtype": "float16"}}, "lacks 'rank'"),
    ):
        path = shutil.copytree(good, tmp_path / "broken", dirs_exist_ok=True)
        edit(lambda manifest, changes=changes: manifest["layers"][0].update(changes))(path)
        with pytest.raises(IndexFormatError, match=said):
            Index.open(path)
