"""Weights by position: against literal loops, through an index, and what refuses them."""

import json
import logging
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
        vectors, labels = index.embeddings(live), list(index.labels[live])
        stored = index.weights(live)
        expected, counts = literal_weights(
            made_of, source, recipe, vectors, drawn(recipe, vectors, labels)
        )
    assert stored.shape == (12, CHANNELS, 4, 4)
    assert counts.any()
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
    assert encoding.rank == 3
    rows = encoding.encode(weights)
    assert rows["codes"].shape == (9, 3)
    assert (encoding.n_channels, encoding.grid, encoding.bytes_per_image()) == (4, (2, 3), 12)
    np.testing.assert_allclose(encoding.decode(rows), weights, atol=1e-5)
    unpacked = encoding.unpack(rows)
    lengths = [np.sqrt(sum(float(one) ** 2 for one in row.flat)) for row in weights]
    np.testing.assert_allclose(encoding.norms(unpacked), lengths, rtol=1e-5)
    shares = generator.standard_normal(9)
    expected = sum(share * row for share, row in zip(shares, weights, strict=True))
    np.testing.assert_allclose(encoding.combine(unpacked, shares), expected, atol=1e-5)
    again = from_spec(json.loads(json.dumps(encoding.spec())), 4, encoding.fitted, [2, 3])
    assert again.spec() == encoding.spec()
    np.testing.assert_array_equal(again.decode(rows), encoding.decode(rows))
    with pytest.raises(InputError, match="need the layer's grid"):
        from_spec(encoding.spec(), 4, encoding.fitted)
    with pytest.raises(InputError, match=r"expected \[R K\*2\*5\] and \[K\*2\*5\]"):
        LowRank(np.zeros((2, 24)), np.zeros(24), grid=(2, 5))


def test_a_map_by_position_is_the_sum_over_channels_at_each() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((3, 4, 2, 5)).astype(np.float32)
    weights, activations = numbers[:2], numbers[2]
    expected = np.zeros((2, 2, 5))
    for n, k, i, j in np.ndindex(weights.shape):
        expected[n, i, j] += float(weights[n, k, i, j]) * float(activations[k, i, j])
    np.testing.assert_allclose(signed_cams(weights, activations), expected, rtol=1e-5)
    np.testing.assert_allclose(signed_cam(weights[0], activations), expected[0], rtol=1e-5)
    both = np.stack([activations] * 2)
    np.testing.assert_allclose(signed_cam(weights, both), expected, rtol=1e-5)
    torched = signed_cam(torch.from_numpy(weights), torch.from_numpy(both))
    np.testing.assert_allclose(torched, expected, rtol=1e-5)
    with pytest.raises(InputError, match="weights by position of the activations' own shape"):
        signed_cam(weights[:, :, :1], both)


def test_neighbors_weights_of_length_one_are_averaged_and_draw_the_query(built: Path) -> None:
    made_of, source = toy("depthwise"), find_images(built / "photos")
    query = inputs(made_of, source)[7]
    activations = activations_of(made_of, source)[7].numpy()
    with opened(built / "index") as (index, _):
        verify(index.path)
        explainer = Explainer(index, made_of.network, n_neighbors=3)
        why = explainer.explain(query)
        stored = index.weights(index.positions(why.ids)).astype(float)
        expected = sum(one / np.sqrt((one**2).sum()) / 3 for one in stored)
        assert why.weights.shape == (CHANNELS, 4, 4)
        np.testing.assert_allclose(why.weights, expected, atol=1e-5)
        coarse = explainer.explain_features(why_embedding(made_of, query), activations)
        np.testing.assert_allclose(coarse.signed_cam, (why.weights * activations).sum(0), atol=1e-4)
        assert why.trust is not None
        assert why.match is not None
        # What an image itself shows is drawn by its own weights.
        own = activations_of(made_of, source).numpy()
        place = [item.id for item in source.items].index(why.ids[0])
        drawn_self = oracles_map(stored[0], own[place])
        np.testing.assert_allclose(why.neighbor_cams[0], drawn_self, atol=drawn_self.max() / 100)
        told_apart = explainer.explain(query, result=why.ids[0], above=why.ids[2])
        difference = oracles.rival_weights(stored[0].ravel(), stored[2].ravel())
        np.testing.assert_allclose(told_apart.weights.ravel(), difference, atol=1e-5)


def why_embedding(made_of, query: np.ndarray) -> np.ndarray:
    return made_of.network.forward(query[None]).embedding[0].numpy()


def oracles_map(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """ReLU of the sum over channels, a number at a time."""
    out = np.zeros(weights.shape[1:])
    for k, i, j in np.ndindex(weights.shape):
        out[i, j] += float(weights[k, i, j]) * float(activations[k, i, j])
    return np.maximum(out, 0)


def test_images_are_added_compressed_and_reported(built: Path, tmp_path: Path) -> None:
    made_of = toy("depthwise")
    source = pictures(tmp_path / "photos", n=N)
    build_index(source, made_of.network, tmp_path / "index", POSITIONS, progress=False)
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
        embedding, finer = why_embedding(made_of, query), np.ones((CHANNELS, 8, 8), np.float32)
        with pytest.raises(InputError, match=r"grid of 5 x 4, and this index keeps weights by pos"):
            explainer.explain_features(embedding, activations)
        message = "a query shown larger does not have; leave out detail"
        with pytest.raises(InputError, match=message):
            explainer.explain_features(embedding, finer[:, :4, :4], detail_activations=finer)
        with pytest.raises(InputError, match=message):
            explainer.explain(query, detail=2)


def test_a_build_says_what_a_head_that_does_not_pool_means(tmp_path, caplog) -> None:
    source = pictures(tmp_path / "photos")
    said = {}
    for name, kind, recipe in (
        ("channels", "flattening", Recipe()),
        ("positions", "flattening", POSITIONS),
        ("pooled", "affine", Recipe()),
        ("power mean", "other", Recipe()),
    ):
        with caplog.at_level(logging.WARNING, "embedcam"):
            caplog.clear()
            report = build_index(source, toy(kind).network, tmp_path / name, recipe, progress=False)
        said[name] = report.notes
        with Index.open(tmp_path / name) as index:
            noted = bool(index.manifest.layers[0].uses_positions)
            assert noted == bool(report.notes)
        assert caplog.messages == report.notes
    assert "--method hirescam" in said["channels"][0]
    assert "aligned as the indexed pictures are" in said["positions"][0]
    assert said["pooled"] == said["power mean"] == []


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
    aim = Similarity(np.ones(5) / 5**0.5)
    made = cam_for(made_of.network, images, aim, "hirescam")
    activations = made_of.network.forward(images).activations.numpy()
    assert made.weights is not None
    for row in range(2):
        expected = oracles_map(made.weights[row], activations[row])
        np.testing.assert_allclose(made.grid_cam[row], expected, atol=1e-6)
    assert f"{CHANNELS} channel weights" in repr(made)


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
    for number, (change, said) in enumerate(
        (
            (lambda layer: layer.update(grid=None, cells=None), "need the layer's grid"),
            (lambda layer: layer.update(grid=[3, 3], cells=9), r"the description says \[3 54\]"),
            (lambda layer: layer.update(channels=5), r"the description says \[3 30\]"),
            (lambda layer: layer["encoding"].pop("rank"), "lacks 'rank'"),
            (lambda layer: layer["encoding"].update(name="low-rank", origin="pca", codes="stored"),
             r"the basis has shape \[3, 36\]"),
        )
    ):  # fmt: skip
        path = index_samples.make(tmp_path / str(number), kind="by-position")
        edit(lambda manifest, change=change: change(manifest["layers"][0]))(path)
        with pytest.raises(IndexFormatError, match=said):
            Index.open(path)
